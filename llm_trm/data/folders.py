"""Lists the data files of a folder."""

from __future__ import annotations

from pathlib import Path


def data_files(folder: Path, suffix: str) -> list[Path]:
    """The files in ``folder`` whose names end in ``suffix``, in any case, sorted by name.

    Hidden files are left out: macOS puts ``._name.json`` beside ``name.json`` on foreign disks, for example.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()
    )
