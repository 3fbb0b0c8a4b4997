"""Checkpoints of a run: folders that are complete or absent; the best few and the last are kept."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_trm.data.processes import main_process
from llm_trm.errors import InputError
from llm_trm.files import named_in, publish, read_json, sweep, unfinished, write_json
from llm_trm.manifest import require_whole, write_manifest
from llm_trm.models.run_folder import CHECKPOINTS_FOLDER, INDEX_FILE
from llm_trm.ranges import FINITE
from llm_trm.train.run.settings import START_OVER
from llm_trm.train.run.training_state import PROGRESS_FILE, require_state

#: Names of checkpoints, and of what a crash of an older version left of them.
_NAMES = re.compile(r"(?:batch|step)-\d{8}")
_LEFTOVERS = re.compile(r"\.(?:batch|step)-\d{8}\.\w{8}")
_logger = logging.getLogger(__name__)


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


def newest_whole(newest_first: list[Path], require: Callable[[Path, str], None]) -> Path:
    """The first of some checkpoints that can be resumed; a warning names the damage of those before it.

    Args:
        require: Raises InputError, ending in a remedy, if a checkpoint cannot be resumed.

    Raises:
        InputError: None can be resumed; the message is about the newest.
    """
    faults: list[InputError] = []
    for path in newest_first:
        try:
            require(path, START_OVER)
        except InputError as error:
            faults.append(error)
            continue
        for fault in faults:
            damage = str(fault).partition(f": {START_OVER}")[0]
            if main_process():
                _logger.warning("%s: resuming from the checkpoint before it, %s", damage, path.name)
        return path
    raise faults[0]


class Checkpoints:
    """The checkpoints of the run in ``folder``, and its index.

    A checkpoint is written to a folder with another name and renamed when all of it has reached the disk.
    Then the index, which alone defines what counts, is replaced, and the run's folders that it does not name
    are removed. A crash at any moment leaves either the old state or the new one.

    Users keep folders of their own next to the checkpoints, and link to other disks. Only what a run wrote
    is removed, and no link is followed.

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
        return self._folder / self.index()["last"]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss; None if none was validated."""
        best = self.index()["best"]
        return self._folder / best if best else None

    def newest_whole(self) -> Path:
        """The newest checkpoint that can be resumed; a warning names the damage of newer ones.

        Raises:
            InputError: No index, a broken one, or no checkpoint that can be resumed.
        """
        index = self.index()
        names = [index["last"], *sorted(_named(index) - {index["last"]}, reverse=True)]
        return newest_whole([self._folder / name for name in names], _require_whole)

    @contextmanager
    def new(self, name: str, loss: float | None) -> Iterator[Path]:
        """A folder to write to, which becomes the last checkpoint if the block ends without an error.

        Args:
            name: Name of the checkpoint.
            loss: Validation loss, which decides what is kept; None if it was not validated.

        Raises:
            InputError: The user has a file or folder of that name.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with unfinished(self._folder, name) as temporary:
            written = temporary / name
            written.mkdir()
            yield written
            write_manifest(written)
            target = self._folder / name
            before = self.index() if self.exist() else {"last": None, "best": None, "kept": []}
            if name in _named(before):
                raise ValueError(f"checkpoint {name} exists already")
            if self._is_own(target, set()):  # left by a crash, before it was in the index
                shutil.rmtree(target)
            if target.exists() or target.is_symlink():
                raise InputError(f"{target} is no checkpoint of this run: move it to another folder")
            publish(written, target)
        kept = [*before["kept"]]
        if loss is not None:
            kept.append({"name": name, "validation_loss": loss if math.isfinite(loss) else None})
            kept.sort(key=lambda entry: math.inf if (own := entry["validation_loss"]) is None else own)
            del kept[self._keep :]
        self._write_index(name, kept)
        self._remove(_named(before))

    def go_on_from(self, checkpoint: Path) -> None:
        """Make ``checkpoint`` the last one; newer ones, which are damaged, and leftovers are removed."""
        before, name = self.index(), checkpoint.name
        if before["last"] != name:
            self._write_index(name, [entry for entry in before["kept"] if entry["name"] <= name])
        self._remove(_named(before))

    def clear(self) -> None:
        """Remove the index, then the checkpoints."""
        known: set[str] = set()
        if self.exist():
            with suppress(InputError):  # a broken index cannot name them
                known = _named(self.index())
        self._index_path.unlink(missing_ok=True)
        self._remove(known)
        with suppress(OSError):  # not empty, or a link
            self._folder.rmdir()

    def _write_index(self, last: str, kept: list[dict[str, Any]]) -> None:
        best = kept[0]["name"] if kept else None
        write_json(self._index_path, {"last": last, "best": best, "kept": kept})

    def _remove(self, known: set[str]) -> None:
        """Remove what the run wrote and its index does not name: ``known`` names, and what crashes left."""
        if not self._folder.is_dir():
            return
        sweep(self._folder)
        named = _named(self.index()) if self.exist() else set()
        for path in self._folder.iterdir():
            if path.name not in named and self._is_own(path, known):
                shutil.rmtree(path, ignore_errors=True)

    def _is_own(self, path: Path, known: set[str]) -> bool:
        """Whether the run wrote the folder ``path``: its index named it, or it has what a checkpoint has."""
        if path.is_symlink() or not path.is_dir():
            return False
        if path.name in known:
            return True
        if self._folder.is_symlink():  # runs that share it have checkpoints of the same names
            return False
        if _LEFTOVERS.fullmatch(path.name):
            return True
        return bool(_NAMES.fullmatch(path.name)) and (path / PROGRESS_FILE).is_file()

    def index(self) -> dict[str, Any]:
        """The index: names of the ``last`` and the ``best`` checkpoint, and entries of the ``kept`` ones.

        Raises:
            InputError: It is missing or broken.
        """
        index = read_json(self._index_path, START_OVER)
        try:
            losses = [entry["validation_loss"] for entry in index["kept"]]
            names = [index["last"], *(entry["name"] for entry in index["kept"])]
            names += [index["best"]] if index["best"] is not None else []
            whole = all(named_in(self._folder, n, self._index_path, START_OVER).name == n for n in names)
            whole = whole and all(loss is None or FINITE.fault(loss) is None for loss in losses)
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise InputError(f"{self._index_path} is not an index of checkpoints: {START_OVER}")
        return dict(index)


def _require_whole(checkpoint: Path, remedy: str) -> None:
    require_whole(checkpoint, remedy)
    require_state(checkpoint, remedy)


def _named(index: dict[str, Any]) -> set[str]:
    return {index["last"], *(entry["name"] for entry in index["kept"])} - {None}
