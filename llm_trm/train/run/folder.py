"""The output folder of a run: one process at a time writes in it, and a new run drops old records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_trm.claims import claimed
from llm_trm.data.processes import main_process
from llm_trm.train.run.figure import CURVES_FILE
from llm_trm.train.run.tracking import JSONL_FILE


@contextmanager
def alone_in(folder: Path, *, main: bool | None = None) -> Iterator[None]:
    """Be the only run in ``folder`` until the block ends; see :func:`llm_trm.claims.claimed`.

    Args:
        main: Whether this is the main process of its run, which alone claims the folder; by default, what
            the environment variables of the launcher say.

    Raises:
        InputError: Another run writes in the folder, or it is not writable.
    """
    if main_process() if main is None else main:
        with claimed(folder):
            yield
    else:
        yield


def clear_records(folder: Path) -> None:
    """Remove the curves and metrics of an earlier run, which would pass for those of the new one."""
    for name in (CURVES_FILE, JSONL_FILE):
        (folder / name).unlink(missing_ok=True)


def sweep_weights(folder: Path) -> None:
    """Remove the temporary files that safetensors leaves in ``folder`` if its process is killed."""
    for path in folder.glob(".tmp??????"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                # The length of the header, and its start; zeros where nothing was written yet.
                start = file.read(9)[8:]
            if start in (b"{", b"\0", b""):
                path.unlink()
