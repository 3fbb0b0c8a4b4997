"""Trackers of a run, through accelerate: wandb, tensorboard, or lines of JSON."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trm.choices import Track
from llm_trm.data.processes import world_size
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import write_text
from llm_trm.text import read_lines

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker


#: What ``--track jsonl`` writes in the folder of the run.
JSONL_FILE = "metrics.jsonl"

_NEEDS = {"wandb": ("wandb",), "tensorboard": ("tensorboard",), "jsonl": ()}


def make_accelerator(
    track: Track | None,
    folder: Path,
    project: str,
    config: Mapping[str, Any],
    *,
    device: str = "auto",
    resumed_at: int | None = None,
) -> Accelerator:
    """:func:`new_accelerator` and :func:`start_tracking` in one call."""
    accelerator = new_accelerator(track, folder, device=device, resumed_at=resumed_at)
    start_tracking(accelerator, project, config)
    return accelerator


def new_accelerator(
    track: Track | None, folder: Path, *, device: str = "auto", resumed_at: int | None = None
) -> Accelerator:
    """An :class:`accelerate.Accelerator` whose tracker has not begun: nothing is written yet.

    Args:
        track: Where ``accelerator.log(values, step)`` will go; None for nowhere.
        folder: Of the run; tensorboard's event files and ``metrics.jsonl`` will lie there.
        device: ``"cpu"`` keeps off the accelerators; any other value takes what accelerate finds.
        resumed_at: Step that a resumed run goes on from: the lines that ``metrics.jsonl`` has of later steps
            will be dropped. None begins the file anew.

    Raises:
        InputError: accelerate or the tracker's package is not installed, or the environment of a launch makes
            no sense.
    """
    require("train", "accelerate")
    world_size()  # accelerate's own complaint would be a traceback
    from accelerate import Accelerator

    require_tracker(track)
    log_with: list[Any] | None = None
    if track == "jsonl":
        log_with = [json_tracker(folder, resumed_at)]
    elif track is not None:
        log_with = [track]
    return Accelerator(cpu=device == "cpu", log_with=log_with, project_dir=str(folder))


def start_tracking(accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
    """Begin the tracker's run; the folder must exist by now.

    Args:
        project: Name of the project at the tracker.
        config: Settings of the run, kept with it. Values that are no number, string or bool become strings.
    """
    if accelerator.log_with:
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in config.items()
        }
        accelerator.init_trackers(project, plain)


def finish_tracking(accelerator: Accelerator) -> None:
    """Close the trackers; the process group stays, unlike in ``accelerator.end_training()``."""
    for tracker in accelerator.trackers:
        tracker.finish()


def require_tracker(track: Track | None) -> None:
    """Raise InputError unless what ``track`` needs is installed."""
    for package in _NEEDS[track] if track else ():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--track {track} needs {package}: pip install {package}, or use --track jsonl")


def json_tracker(folder: Path, resumed_at: int | None) -> GeneralTracker:
    """A tracker that appends a JSON object a call to ``metrics.jsonl`` in ``folder``; see
    :func:`new_accelerator`. Its ``start()`` is to be called once the folder exists."""
    from accelerate.tracking import GeneralTracker, on_main_process

    path = folder / JSONL_FILE

    class JSONLines(GeneralTracker):  # type: ignore[misc]
        name = "jsonl"
        requires_logging_directory = False

        @property
        def tracker(self) -> Path:
            return path

        @on_main_process
        def start(self) -> None:
            write_text(path, "" if resumed_at is None else lines_until(path, resumed_at))

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            """The run's folder holds its settings already."""

        @on_main_process
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    return JSONLines()


def lines_until(path: Path, step: int) -> str:
    """The whole lines of ``path`` up to ``step``; a line that a crash cut short is left out."""
    kept = []
    for line in read_lines(path, only_text=True) if path.exists() else ():
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if at is None or at <= step:
            kept.append(line + "\n")
    return "".join(kept)
