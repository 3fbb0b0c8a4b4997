"""Ctrl-C and SIGTERM end a training after the current step, with a checkpoint."""

from __future__ import annotations

import shlex
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from llm_trm.errors import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llm_trm.train.run.settings import RunSettings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While it is entered, the first Ctrl-C or SIGTERM asks the training to stop; a second one acts at once.

    Args:
        config: Settings of the run.
        every: Steps between which processes agree whether to stop, which takes a reduction; a single process
            stops after any step.
    """

    def __init__(self, config: RunSettings, every: int = 1) -> None:
        self._every = every
        self._config: Any = config
        self._before: dict[int, Any] = {}
        self._signal, self._agreed = 0, False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        self.__exit__()

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
        file = self._config.output / self._config.FILE
        again = ["llm-trm", "train", self._config.COMMAND, "--config", str(file), "--resume"]
        name = signal.Signals(self._signal).name
        return Interrupted(
            self._signal, f"{name}: stopped after step {step}; to continue: {shlex.join(again)}"
        )
