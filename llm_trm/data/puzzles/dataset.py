"""Folders of puzzles: ``dataset.json`` and one safetensors file per split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from llm_trm.checksums import file_digest, require_unchanged
from llm_trm.choices import Task
from llm_trm.claims import claimed
from llm_trm.errors import InputError
from llm_trm.files import read_json, writable_folder, write_json, write_text
from llm_trm.publishing import publishing
from llm_trm.ranges import COUNT, GRID_SIDE, VOCABULARY, require_ranges
from llm_trm.weights import read_tensors, write_tensors

#: The padding token in every vocabulary; losses ignore cells with this label.
PADDING = 0

#: The description of a folder; written last.
INFO_FILE = "dataset.json"
#: The meaning of the puzzle identifiers, in folders of ARC puzzles.
ARC_FILE = "arc.json"
_REMEDY = "name a folder that `llm-trm data sudoku`, `maze` or `arc` wrote"
_SPLITS = ("train", "test")
#: Key of the checksums by file name, in the description; folders of older versions have none.
_CHECKSUMS = "sha256"


@dataclass(frozen=True)
class PuzzleInfo:
    """Properties of all puzzles in a folder.

    Attributes:
        task: Kind of puzzle.
        rows, columns: Size of the grid; a sequence has L = rows x columns cells, row by row.
        vocab_size: Number of tokens V, including padding (0).
        num_puzzles: Number of puzzle identifiers, each with its own embedding.
        facts: How the puzzles were created, as JSON values.

    Raises:
        ValueError: A value is out of range or has the wrong type, or the task is unknown.
    """

    task: Task
    rows: Annotated[int, GRID_SIDE]
    columns: Annotated[int, GRID_SIDE]
    vocab_size: Annotated[int, VOCABULARY]
    num_puzzles: Annotated[int, COUNT] = 1
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_ranges(self)

    @property
    def seq_len(self) -> int:
        """Number of cells L of a grid."""
        return self.rows * self.columns


@dataclass(frozen=True)
class PuzzleSplit:
    """Puzzles of one split.

    Attributes:
        inputs: Tokens of the questions, uint8 [N, L].
        labels: Tokens of the answers, uint8 [N, L]; 0 at ignored cells.
        puzzles: Puzzle identifiers, int32 [N].
    """

    inputs: Tensor
    labels: Tensor
    puzzles: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def digest(self) -> str:
        """A short fingerprint of all tensors."""
        content = hashlib.sha256()
        for tensor in (self.inputs, self.labels, self.puzzles):
            content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            content.update(tensor.cpu().contiguous().numpy().data)
        return content.hexdigest()[:16]

    def to(self, device: torch.device) -> PuzzleSplit:
        """A copy on ``device``."""
        return PuzzleSplit(self.inputs.to(device), self.labels.to(device), self.puzzles.to(device))


@contextmanager
def new_puzzles(folder: Path, *, overwrite: bool, others: tuple[str, ...] = ()) -> Iterator[Path]:
    """Create ``folder`` for puzzles, and be the only process that writes in it until the block ends.

    Args:
        overwrite: Whether :func:`write_puzzles` may replace puzzles of any task that are in the folder.
        others: Further files that will be written.

    Raises:
        InputError: The folder has puzzles, another process writes in it, or it is not writable.
    """
    with claimed(folder):
        for name in (INFO_FILE, *map(_split_file, _SPLITS), *others):
            if (folder / name).exists() and not overwrite:
                raise InputError(
                    f"{folder} already has puzzles ({name}): replace them with --overwrite, or choose "
                    "another --output"
                )
        yield folder


def write_puzzles(
    folder: Path,
    info: PuzzleInfo,
    splits: Mapping[str, PuzzleSplit],
    others: Mapping[str, str] | None = None,
) -> None:
    """Write a folder of puzzles in place of those that are there, which stay until the new ones are whole.

    ``dataset.json`` is moved last, so that a folder that has it is complete. It records the SHA-256 of every
    other file. Files that are not of puzzles are not touched.

    Args:
        others: Further files, as text by name.

    Raises:
        InputError: The folder is not writable.
    """
    for name, split in splits.items():
        _check(info, split, f"split {name!r}")
    writable_folder(folder)
    with publishing(folder, INFO_FILE, _written_before(folder)) as temporary:
        for name, split in splits.items():
            tensors = {"inputs": split.inputs, "labels": split.labels, "puzzles": split.puzzles}
            write_tensors(temporary / _split_file(name), tensors)
        for name, text in (others or {}).items():
            write_text(temporary / name, text)
        sizes = {name: len(split) for name, split in splits.items()}
        checksums = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / INFO_FILE, {**asdict(info), "splits": sizes, _CHECKSUMS: checksums})


def _written_before(folder: Path) -> list[str]:
    """Files of the puzzles in a folder."""
    found = [_split_file(name) for name in _SPLITS]
    try:
        arc = read_info(folder).task == "arc"
    except InputError:  # none, or a broken description
        arc = False
    return [*found, ARC_FILE] if arc else found


def read_info(folder: Path) -> PuzzleInfo:
    """Read ``dataset.json`` of ``folder``.

    Raises:
        InputError: The folder is not a folder of puzzles.
    """
    return _read_info(folder)[0]


def require_unchanged_file(folder: Path, name: str) -> None:
    """Raise InputError unless a file has the content that ``dataset.json`` recorded, if it recorded any."""
    info, checksums = _read_info(folder)
    if checksums is None:
        return
    remedy = f"copy the folder again, or write it again with llm-trm data {info.task} --overwrite"
    if name not in checksums:
        raise InputError(f"{folder / INFO_FILE} has no checksum of {name}: {remedy}")
    require_unchanged(folder / name, checksums[name], remedy)


def _read_info(folder: Path) -> tuple[PuzzleInfo, dict[str, Any] | None]:
    """The description of a folder, and its checksums; None for those of a folder of an older version."""
    content = read_json(folder / INFO_FILE, _REMEDY)
    try:
        content.pop("splits")
        checksums = content.pop(_CHECKSUMS, None)
        if checksums is not None and not isinstance(checksums, dict):
            raise TypeError
        return PuzzleInfo(**content), checksums
    except ValueError as error:
        raise InputError(f"{folder / INFO_FILE}: {error}: {_REMEDY}") from error
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{folder / INFO_FILE} does not describe puzzles: {_REMEDY}") from None


def read_split(folder: Path, name: str) -> PuzzleSplit:
    """Read a split of ``folder``, ``"train"`` or ``"test"``.

    Raises:
        InputError: The split is missing, invalid, or does not match ``dataset.json``.
    """
    path = folder / _split_file(name)
    tensors = read_tensors(path, _REMEDY)
    try:
        split = PuzzleSplit(tensors["inputs"], tensors["labels"], tensors["puzzles"])
    except KeyError as error:
        raise InputError(f"{path} has no {error}: {_REMEDY}") from None
    _check(read_info(folder), split, str(path))
    require_unchanged_file(folder, path.name)
    return split


def repeated(split: PuzzleSplit, learned: PuzzleSplit) -> int:
    """Number of puzzles of ``split`` whose question equals a question of ``learned``."""
    if split.inputs.shape[1:] != learned.inputs.shape[1:]:
        return 0
    asked = [row.tobytes() for row in split.inputs.cpu().numpy()]
    wanted = set(asked)
    found = {question for row in learned.inputs.cpu().numpy() if (question := row.tobytes()) in wanted}
    return sum(question in found for question in asked)


def _split_file(name: str) -> str:
    return f"{name}.safetensors"


def _check(info: PuzzleInfo, split: PuzzleSplit, what: str) -> None:
    shape = (len(split), info.seq_len)
    if split.inputs.shape != shape or split.labels.shape != shape or split.puzzles.shape != shape[:1]:
        raise InputError(f"{what} does not have grids of {info.rows} x {info.columns} cells: {_REMEDY}")
    if len(split) and max(split.inputs.max(), split.labels.max()) >= info.vocab_size:
        raise InputError(f"{what} has tokens beyond the vocabulary of {info.vocab_size}: {_REMEDY}")
    if len(split) and not 0 <= split.puzzles.min() <= split.puzzles.max() < info.num_puzzles:
        raise InputError(f"{what} has puzzle identifiers beyond {info.num_puzzles}: {_REMEDY}")
