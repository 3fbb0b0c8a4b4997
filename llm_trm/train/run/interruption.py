"""Ctrl-C and SIGTERM end a training after the current step, with a checkpoint."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llm_trm.errors import Interrupted, signal_of
from llm_trm.models.run_folder import INDEX_FILE
from llm_trm.signals import STOPPING, handling

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llm_trm.train.run.settings import RunSettings


class Interruption:
    """While it is entered, the first Ctrl-C or SIGTERM asks the training to stop; a second one acts at once.

    A signal that the process was started to ignore, as in a background job of a script, stays ignored.

    Args:
        config: Settings of the run.
        every: Steps between which processes agree whether to stop, which takes a reduction; a single process
            stops after any step.
    """

    def __init__(self, config: RunSettings, every: int = 1) -> None:
        self._every = every
        self._config: Any = config
        self._handlers = ExitStack()
        self._signal, self._agreed = 0, False

    def __enter__(self) -> Interruption:
        self._handlers.enter_context(handling(self._ask, *STOPPING))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        self._handlers.close()

    @property
    def agreed(self) -> bool:
        """Whether :meth:`wanted` has been true: the same answer in every process."""
        return self._agreed

    def wanted(self, step: int, accelerator: Accelerator | None = None) -> bool:
        """Whether to write a checkpoint and stop after ``step``: the same answer in every process."""
        if accelerator is None or accelerator.num_processes == 1:
            self._agreed = self._signal != 0
        elif step % self._every == 0:
            import torch

            asked = torch.tensor(self._signal, device=accelerator.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self._signal = int(asked)
            self._agreed = self._signal != 0
        return self._agreed

    def stop(self, step: int) -> Interrupted:
        """The exception that ends the training, once the checkpoint of ``step`` is written."""
        return _Advised(
            self._signal, f"{_name(self._signal)}: stopped after step {step}; {_advice(self._config)}"
        )


class _Advised(Interrupted):
    """Its message says how to continue."""


@contextmanager
def advising(config: RunSettings) -> Iterator[None]:
    """Say how to continue if a signal ends the block before, between or after the steps of the training.

    Args:
        config: Settings of the run. If it neither resumes nor has written its settings yet, there is nothing
            to continue, and the interruption passes unchanged.
    """
    file = _settings_file(config)
    before = file.stat().st_mtime_ns if file.exists() else None
    try:
        yield
    except KeyboardInterrupt as error:
        started = config.resume or (file.exists() and file.stat().st_mtime_ns != before)
        if isinstance(error, _Advised) or not started or not _has_progress(config):
            raise
        message = f"{_name(signal_of(error))}: stopped; {_advice(config)}"
        raise Interrupted.during(error, message) from error


def _has_progress(config: Any) -> bool:
    """Whether the run has left something that --resume continues from."""
    if config.COMMAND == "phase1":  # its stages and hidden states count too
        return True
    output = config.output
    return (output / INDEX_FILE).exists() or any(output.glob("checkpoint-*/trainer_state.json"))


def _advice(config: Any) -> str:
    again = ["llm-trm", "train", config.COMMAND, "--config", str(_settings_file(config)), "--resume"]
    return f"to continue: {shlex.join(again)}"


def _settings_file(config: Any) -> Path:
    return Path(config.output, config.FILE)


def _name(number: int) -> str:
    return signal.Signals(number).name
