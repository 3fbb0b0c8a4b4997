"""Checkpoints of a run: folders that are complete or absent; the best few and the last are kept."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.files import named_in, publish, read_json, write_json
from llm_trm.models.run_folder import CHECKPOINTS_FOLDER, INDEX_FILE

_START_OVER = "start over with --overwrite"


def permit(
    output: Path, has_checkpoint: bool, has_model: bool = False, *, resume: bool, overwrite: bool
) -> None:
    """Raise InputError unless a run may start, or continue, in the folder ``output``.

    Args:
        has_checkpoint: Whether the folder has a checkpoint to resume.
        has_model: Whether the folder contains a finished model.
    """
    if (has_checkpoint or has_model) and not (resume or overwrite):
        raise InputError(
            f"{output} already contains a run: continue it with --resume, replace it with --overwrite, or "
            "choose another folder"
        )
    if resume and not has_checkpoint:
        raise InputError(f"{output} contains no checkpoint to resume: leave --resume out")


class Checkpoints:
    """The checkpoints of the run in ``folder``, and its index.

    A checkpoint is written to a folder with another name and renamed when all of it has reached the disk.
    Then the index, which alone defines what counts, is replaced, and folders that it does not name are
    removed. A crash at any moment leaves either the old state or the new one.

    Args:
        folder: Folder of the run.
        keep: Number of checkpoints to keep for their validation loss, in addition to the last.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self._folder, self._keep = folder / CHECKPOINTS_FOLDER, keep
        self._index_path = folder / INDEX_FILE

    def exist(self) -> bool:
        """Whether the run has a checkpoint."""
        return self._index_path.exists()

    def permit(self, *, resume: bool, overwrite: bool) -> None:
        """Raise InputError unless a run may start, or continue, in this folder."""
        permit(self._index_path.parent, self.exist(), resume=resume, overwrite=overwrite)

    @property
    def last(self) -> Path:
        """The newest checkpoint.

        Raises:
            InputError: No index, or a broken one.
        """
        return self._folder / self._index()["last"]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss; None if none was validated."""
        best = self._index()["best"]
        return self._folder / best if best else None

    @contextmanager
    def new(self, name: str, loss: float | None) -> Iterator[Path]:
        """A folder to write to, which becomes the last checkpoint if the block ends without an error.

        Args:
            name: Name of the checkpoint.
            loss: Validation loss, which decides what is kept; None if it was not validated.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self._folder))
        try:
            yield temporary
            target = self._folder / name
            index = self._index() if self.exist() else {"last": None, "best": None, "kept": []}
            if name in _named(index):
                raise ValueError(f"checkpoint {name} exists already")
            shutil.rmtree(target, ignore_errors=True)  # left by a crash, before it was in the index
            publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = [*index["kept"]]
        if loss is not None:
            kept.append({"name": name, "validation_loss": loss if math.isfinite(loss) else None})
            kept.sort(key=lambda entry: math.inf if (own := entry["validation_loss"]) is None else own)
            del kept[self._keep :]
        write_json(self._index_path, {"last": name, "best": kept[0]["name"] if kept else None, "kept": kept})
        self.sweep()

    def sweep(self) -> None:
        """Remove everything that the index does not name."""
        named = _named(self._index())
        for path in self._folder.iterdir():
            if path.name not in named:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove the index, then the checkpoints."""
        self._index_path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _index(self) -> dict[str, Any]:
        index = read_json(self._index_path, _START_OVER)
        if not isinstance(index, dict) or not {"last", "best", "kept"} <= index.keys():
            raise InputError(f"{self._index_path} is not an index of checkpoints: {_START_OVER}")
        try:
            names = _named(index) | {index["best"]} - {None}
        except (KeyError, TypeError) as error:
            raise InputError(f"{self._index_path} is not an index of checkpoints: {_START_OVER}") from error
        for name in names:
            if named_in(self._folder, name, self._index_path, _START_OVER).name != name:
                raise InputError(f"{self._index_path} is not an index of checkpoints: {_START_OVER}")
        return index


def _named(index: dict[str, Any]) -> set[str]:
    return {index["last"], *(entry["name"] for entry in index["kept"])}
