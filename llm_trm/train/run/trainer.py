"""The parts, except learning, that all trainings on a Hugging Face Trainer share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llm_trm.data.processes import world_size
from llm_trm.errors import InputError
from llm_trm.files import read_object, write_json
from llm_trm.manifest import write_manifest
from llm_trm.models.causal.loading import FACTS_FILE, clear_model
from llm_trm.models.loading import no_bars
from llm_trm.train.run.checkpoints import newest_whole, permit
from llm_trm.train.run.folder import clear_records, sweep_weights
from llm_trm.train.run.interruption import Interruption
from llm_trm.train.run.report import Plan, Report
from llm_trm.train.run.settings import START_OVER
from llm_trm.train.run.tracking import finish_tracking, require_tracker, start_tracking, track_with
from llm_trm.train.run.trainer_checkpoints import (
    checkpoint_of,
    checkpoints,
    complete_checkpoints,
    require_resumable,
    require_room,
    step_of,
    take_up_finished,
    trainer_state,
)

A = TypeVar("A", bound=TrainingArguments)


def training_arguments(kind: type[A], config: Any, **settings: Any) -> A:
    """The arguments of a Trainer: those that all runs share, and ``settings``."""
    arguments = kind(
        output_dir=str(config.output),
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        logging_steps=config.log_every,
        seed=config.seed,
        use_cpu=config.device_type == "cpu",
        dataloader_pin_memory=config.device_type == "cuda",
        remove_unused_columns=False,
        # Reports and trackers are ours.
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    if arguments.n_gpu > 1:
        # The Trainer would use all GPUs in one process, by DataParallel: several take `accelerate launch`.
        arguments._n_gpu = 1
    return arguments


def count_parameters(model: Any) -> tuple[int, int]:
    """The number of trainable parameters of a model, and that of all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


class TrainerRun(TrainerCallback):
    """The folder, settings file, trackers and report of a training on a Trainer, and how it is interrupted.

    Args:
        config: A :class:`~llm_trm.train.run.settings.RunSettings` with the fields of
            :func:`training_arguments`, ``track``, ``resume`` and ``overwrite``.
        report: Follows the run.
        model_file: A file that the output folder contains once the run is finished.
        keep_last: Number of newest checkpoints to keep; None if a callback decides.
        sources: Folders or names of models that the run starts from.

    Attributes:
        checkpoint: The checkpoint that the run continues from; None for a new run.
        state: What the Trainer recorded at that checkpoint; empty for a new run.

    Raises:
        InputError: The folder contains a run, none to resume, one with other settings, or one of
            ``sources``; or a tracker is not installed.
    """

    def __init__(
        self,
        config: Any,
        report: Report | None,
        *,
        model_file: str = FACTS_FILE,
        keep_last: int | None = None,
        sources: tuple[str | Path | None, ...] = (),
    ) -> None:
        world_size()  # otherwise accelerate would end with a traceback
        require_tracker(config.track)
        self.config = config
        self.report = report or Report()
        self._settings = config.record()
        self._keep_last = keep_last
        self._earlier: dict[str, Any] = {}
        self._interruption = Interruption(config, config.log_every)
        if any(source and Path(source).resolve() == config.output.resolve() for source in sources):
            raise InputError(f"--output {config.output} is what the run starts from: choose another folder")
        self.checkpoint = self._permitted(model_file)
        self.state = {} if self.checkpoint is None else trainer_state(self.checkpoint)

    @property
    def start_step(self) -> int:
        """The step that the run continues from; 0 for a new run."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    def _permitted(self, model_file: str) -> Path | None:
        config, complete = self.config, complete_checkpoints(self.config.output)
        # A run that stopped before its first checkpoint left nothing to lose.
        has_model = (config.output / model_file).exists()
        permit(config.output, bool(complete), has_model, resume=config.resume, overwrite=config.overwrite)
        if not config.resume:
            require_room(config.output, 0)
            return None
        self._earlier = read_object(config.output / config.FILE, START_OVER)
        config.require_same(self._earlier)
        checkpoint = newest_whole(complete, require_resumable)
        require_room(config.output, step_of(checkpoint))
        return checkpoint

    def require_same_data(self, kind: str, digest: str, *names: str | None) -> None:
        """Record the data of the run, and raise InputError if the run started with other data.

        Args:
            kind: ``"questions"`` or ``"problems"``.
            digest: Hash of all of them, including the held-out ones.
            names: Sources of the data, for the message.
        """
        key = f"{kind}_sha256"
        self._settings[key] = digest
        if self._earlier.get(key, digest) != digest:
            raise InputError(
                f"{' or '.join(name for name in names if name)} no longer contains the {kind} that the "
                f"run in {self.config.output} started with, so {kind} that it was trained on may now be held "
                f"out: {START_OVER}, or choose another folder"
            )

    def start(self, trainer: Trainer, plan: Callable[..., Plan]) -> None:
        """Write the settings and start the trackers; all processes must call it.

        Args:
            trainer: A Trainer that has not started. It must evaluate to logs with names ``eval_...``.
            plan: Makes the plan for the report from ``steps`` and ``start``.
        """
        self._trainer: Any = trainer
        self._plan, self._main = plan, trainer.is_world_process_zero()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        if self._main:
            if self.config.overwrite:
                self._clear()
            self._sweep()
            write_json(self.config.output / self.config.FILE, self._settings)
        trainer.accelerator.wait_for_everyone()
        resumed_at = None if self.checkpoint is None else self.start_step
        track_with(trainer.accelerator, self.config.track, self.config.output, resumed_at=resumed_at)
        start_tracking(trainer.accelerator, f"llm-trm-{self.config.COMMAND}", self.config.record())

    def _clear(self) -> None:
        """Remove settings, checkpoints and model of an earlier run; other files may be the user's own."""
        (self.config.output / self.config.FILE).unlink(missing_ok=True)
        for path in checkpoints(self.config.output):
            shutil.rmtree(path)
        clear_model(self.config.output)
        clear_records(self.config.output)

    def _sweep(self) -> None:
        """Remove what crashes left: incomplete and damaged checkpoints, temporary files of weights."""
        sweep_weights(self.config.output)
        complete = complete_checkpoints(self.config.output)
        for path in checkpoints(self.config.output):
            if path not in complete or step_of(path) > self.start_step:
                shutil.rmtree(path)

    def train(self, *, best: bool = False) -> None:
        """Train to the end, or until a signal arrives; see :meth:`stop_if_interrupted`.

        Args:
            best: Whether resuming a finished run loads the weights with the lowest loss instead of the last.
        """
        trainer, checkpoint = self._trainer, self.checkpoint
        with no_bars():
            if checkpoint is not None and take_up_finished(trainer, checkpoint, best=best):
                self._begin(trainer.state)
                return
            with self._interruption:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                # A signal may have arrived after the last step.
                self._interruption.wanted(trainer.state.global_step, trainer.accelerator)

    def stop_if_interrupted(self) -> None:
        """Raise Interrupted if a signal arrived in :meth:`train`; a checkpoint is written by then."""
        if self._interruption.agreed:
            self.finish()
            raise self._interruption.stop(self._trainer.state.global_step)

    def finish(self) -> None:
        """Close the trackers, and wait for the other processes."""
        finish_tracking(self._trainer.accelerator)
        self._trainer.accelerator.wait_for_everyone()

    def _begin(self, state: Any) -> None:
        if self._main:
            self.report.begin(self._plan(steps=state.max_steps, start=state.global_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the plan: the Trainer knows the number of steps by now."""
        self._begin(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step; after a signal, ask for a checkpoint and the end."""
        if self._main:
            self.report.step(state.global_step)
        if self._interruption.wanted(state.global_step, self._trainer.accelerator):
            control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """List the files of a complete checkpoint; this callback is the last one."""
        self._trainer.accelerator.wait_for_everyone()  # each process writes its random state
        if not self._main:
            return
        if (checkpoint := checkpoint_of(self.config.output, state.global_step)).is_dir():
            write_manifest(checkpoint)
        if self._keep_last is not None:  # save_total_limit would delete a user's checkpoint-5-mine too
            for path in checkpoints(self.config.output)[: -self._keep_last]:
                shutil.rmtree(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Pass metrics to the report and the trackers."""
        values = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        if "train_runtime" in values:  # the Trainer's summary of this process, not of the run
            return
        self._trainer.accelerator.log(values, step=state.global_step)
        if not self._main:
            return
        if any(name.startswith("eval_") for name in values):
            self.report.evaluated({"step": state.global_step, **values})
        else:
            self.report.metrics(state.global_step, values)
