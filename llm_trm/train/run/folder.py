"""What a run removes from its output folder: records of an earlier run, leftovers of a killed one."""

from __future__ import annotations

from pathlib import Path

from llm_trm.train.run.figure import CURVES_FILE
from llm_trm.train.run.tracking import JSONL_FILE


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
