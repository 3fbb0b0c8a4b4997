"""The parts, except learning, that all trainings with their own loop share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from llm_trm.claims import claimed, require_unclaimed
from llm_trm.data.processes import main_process
from llm_trm.errors import InputError, Interrupted
from llm_trm.files import write_json
from llm_trm.ranges import AMOUNT, FINITE, require_in, require_ranges, shown
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.folder import clear_records
from llm_trm.train.run.interruption import Interruption
from llm_trm.train.run.metrics import RunMetrics
from llm_trm.train.run.report import Plan, Report
from llm_trm.train.run.tracking import finish_tracking, new_accelerator, start_tracking
from llm_trm.train.run.training_state import read_progress

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run, as JSON values.

    Attributes:
        sums: Sums of the training metrics since the last evaluation.
        steps: Number of updates that ``sums`` covers.
        history: Records of the evaluations.
        settings: What a resumed run must share.

        NUMBERS: Finite numbers in every record of the history.
        TABLES: Tables of numbers in every record, and numbers that each must have.
        OPTIONAL: Tables that may be null.

    Raises:
        ValueError: A number that is not finite, out of range or of the wrong type.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = ()
    TABLES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()

    sums: dict[str, Annotated[float, FINITE]]
    steps: Annotated[float, AMOUNT]
    history: list[dict[str, Any]]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        require_ranges(self)
        for place, record in enumerate(self.history):
            at = f"history[{place}]: "
            for name in self.NUMBERS:
                require_in(FINITE, name, record.get(name), where=at)
            for name, needed in self.TABLES.items():
                table = record.get(name)
                if table is None and name in self.OPTIONAL and name in record:
                    continue
                # An error of a model that diverged is NaN.
                if not isinstance(table, dict) or not all(type(n) in (int, float) for n in table.values()):
                    raise ValueError(f"{at}{name} must be a table of numbers, not {shown(table)}")
                if missing := set(needed) - table.keys():
                    raise ValueError(f"{at}{name} lacks {min(missing)}")


P = TypeVar("P", bound=Progress)


class Run(Generic[P]):
    """The folder, checkpoints, metrics, trackers and report of a training, and how it is interrupted.

    Args:
        config: A :class:`RunSettings` with the fields ``keep``, ``log_every``, ``track`` and ``device`` too.
        report: Follows the run.
        progress: Dataclass of the progress that a checkpoint records.

    Attributes:
        checkpoint: The checkpoint that the run continues from; None for a new run.
        resumed: Progress of that checkpoint; None for a new run.
        history: Records of the evaluations so far.
        step: Steps so far.
        accelerator: From :meth:`launch`; None without it, for a single process without trackers.

    Raises:
        InputError: The folder contains a run, or none to resume, or another process writes in it.
    """

    def __init__(self, config: Any, report: Report | None, progress: type[P]) -> None:
        self.config = config
        self.report = report or Report()
        if main_process():
            require_unclaimed(config.output)
        self.checkpoints = Checkpoints(config.output, self.config.keep)
        self.checkpoints.permit(resume=self.config.resume, overwrite=self.config.overwrite)
        self._seen = self.checkpoints.index() if config.resume else None
        self.checkpoint = self.checkpoints.newest_whole() if self.config.resume else None
        self.resumed = None if self.checkpoint is None else read_progress(self.checkpoint, progress)
        self.metrics = RunMetrics()
        self.history: list[dict[str, Any]] = []
        self.step = 0
        self.accelerator: Accelerator | None = None
        self.interruption = Interruption(config, self.config.log_every)
        if self.resumed is not None:
            self.history = self.resumed.history
            self.metrics.sums, self.metrics.steps = self.resumed.sums, self.resumed.steps

    def launch(self, resumed_at: int | None) -> Accelerator:
        """Join the processes of ``accelerate launch`` and prepare the trackers; nothing is written yet.

        Args:
            resumed_at: Step of the trackers that the run continues from; None for a new run.
        """
        self.accelerator = new_accelerator(
            self.config.track, self.config.output, device=self.config.device, resumed_at=resumed_at
        )
        return self.accelerator

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.accelerator is None or self.accelerator.is_main_process

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only run in the folder until the block ends; everything is written within it.

        Raises:
            InputError: Another process writes in the folder, or has done so since this run looked.
        """
        with claimed(self.config.output, main=self.is_main):
            if self.is_main:
                self.checkpoints.permit(resume=self.config.resume, overwrite=self.config.overwrite)
                if self.config.resume and self.checkpoints.index() != self._seen:
                    raise InputError(
                        f"{self.config.output} has been continued by another process: run the same command "
                        "again"
                    )
            yield

    def start(self, plan: Plan) -> None:
        """Write the settings, and tell the report and the trackers that training starts."""
        if self.is_main:
            if self.config.overwrite:
                self.checkpoints.clear()
                clear_records(self.config.output)
            elif self.checkpoint is not None:
                self.checkpoints.go_on_from(self.checkpoint)
            write_json(self.config.output / self.config.FILE, self.config.record())
            self.report.begin(plan)
        if self.accelerator is not None:
            start_tracking(self.accelerator, f"llm-trm-{self.config.COMMAND}", self.config.record())

    def finish(self) -> None:
        """Close the trackers."""
        if self.accelerator is not None:
            finish_tracking(self.accelerator)

    def log(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Log values as ``group/name`` with the trackers."""
        if self.accelerator is not None:
            self.accelerator.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def stepped(self, metrics: Mapping[str, float] | None) -> bool:
        """Report that ``step`` is done, with new metrics if any; returns whether to stop after it."""
        if self.is_main:
            self.report.step(self.step)
            if metrics is not None:
                self.report.metrics(self.step, metrics)
        return self.interruption.wanted(self.step, self.accelerator)

    def record(self, record: dict[str, Any]) -> None:
        """Add an evaluation to the history, and start the next sums of metrics."""
        self.history.append(record)
        self.metrics.clear()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Report an evaluation."""
        if self.is_main:
            self.report.evaluated(record)

    def interrupted(self) -> Interrupted:
        """The exception that ends an interrupted training, once its checkpoint is written."""
        self.finish()
        return self.interruption.stop(self.step)

    def require_updates(self, when: str) -> None:
        """Raise InputError if no update since the last evaluation had a finite gradient."""
        if not self.metrics.steps:
            raise InputError(
                f"no gradient {when} was finite: choose a lower --learning-rate than "
                f"{self.config.learning_rate:g}, or --precision fp32"
            )

    def progress(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a :class:`Progress` at this moment."""
        return {
            "sums": self.metrics.sums,
            "steps": self.metrics.steps,
            "history": self.history,
            "settings": settings,
        }
