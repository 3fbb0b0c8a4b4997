"""Pair files: the states of a language model before it thinks, and the state after.

A folder contains ``pairs.json``, the index, and numbered shards. ``shard-00000.safetensors`` has the packed
states of its samples, and ``shard-00000.jsonl`` has one record per sample, in the same order:

===============  =============  =============================================================================
``hidden_pre``   ``[rows, D]``  final-norm states of every position before ``<think>``, samples concatenated
``hidden_post``  ``[N, D]``     final-norm state at the position of ``</think>``
``offsets``      ``[N + 1]``    int64; sample i has the rows ``offsets[i] .. offsets[i + 1] - 1``
===============  =============  =============================================================================

The records load with ``datasets.load_dataset("json", data_files="FOLDER/shard-*.jsonl",
features=record_features())``; :data:`RECORD` lists their fields. Without the features, ``datasets`` infers
different types for a field that is null in the whole of one shard but not in the next.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from llm_trm.checksums import file_digest, is_unchanged, require_unchanged
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import named_in, read_json, write_json, write_text
from llm_trm.ranges import ANY_SEED, PLACE, WIDTH, require_ranges
from llm_trm.text import parse_json, read_lines
from llm_trm.weights import read_shapes, read_tensors, require_present, write_tensors

if TYPE_CHECKING:
    from datasets import Features

FORMAT, VERSION = "llm-trm pairs", 1
INDEX = "pairs.json"
#: Dtypes of stored states, by their names in the index.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}

#: Fields of a record and their types. Lengths are in tokens and do not include the tags.
RECORD = {
    "index": "int64",  # index of the problem, in 0 .. num_samples - 1
    "problem": "string",  # the question
    "answer": "string",  # the reference answer, or null
    "thinking": "string",  # the text between <think> and </think>
    "context_length": "int64",  # rows of hidden_pre
    "thinking_tokens": "int64",
    "next_token": "int64",  # id of the language model's most likely token at </think>
    "response": "string",  # the text after </think>, empty if none was generated
    "correct": "bool",  # whether it gives the reference answer; null if unknown
}

# A single key, because safetensors does not write metadata in a fixed order.
_METADATA_KEY = "llm_trm"
_REMEDY = "run the same llm-trm datagen command again, which generates missing and damaged shards"


@dataclass(frozen=True)
class Pair:
    """One sample.

    Attributes:
        hidden_pre: ``[L, D]``, L >= 1.
        hidden_post: ``[D]``.
        record: The fields of :data:`RECORD`.
    """

    hidden_pre: Tensor
    hidden_post: Tensor
    record: dict[str, Any]


@dataclass(frozen=True)
class ShardEntry:
    """A shard's entry in the index.

    Attributes:
        file, metadata: Names of the safetensors and the JSONL file in the folder.
        samples, rows: N and the sum of the context lengths.
        bytes: Size of ``file``.
        sha256, metadata_sha256: Checksums of the two files; None in the index of an older version.
    """

    file: str
    metadata: str
    samples: Annotated[int, PLACE]
    rows: Annotated[int, PLACE]
    bytes: Annotated[int, PLACE]
    sha256: str | None = None
    metadata_sha256: str | None = None

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class PairShard:
    """One shard in memory.

    Attributes:
        hidden_pre: ``[rows, D]``, in the stored dtype.
        hidden_post: ``[N, D]``.
        offsets: ``[N + 1]``, int64.
        records: N records with the fields of :data:`RECORD`.
        path: The safetensors file.
    """

    hidden_pre: Tensor
    hidden_post: Tensor
    offsets: Tensor
    records: list[dict[str, Any]]
    path: Path


@dataclass(frozen=True)
class PairFiles:
    """A folder of pairs whose index has been checked. The states are read from disk on demand.

    Attributes:
        folder: The folder.
        hidden_size: Width D.
        dtype: Dtype of the stored states, a key of :data:`DTYPES`.
        model: Name that the language model was loaded by.
        settings: All settings that determine the samples.
        seed: Seed of the sampling noise.
        failures: Number of problems without a sample, by reason.
        entries: The shards.
    """

    folder: Path
    hidden_size: Annotated[int, WIDTH]
    dtype: str
    model: str
    settings: dict[str, Any]
    seed: Annotated[int, ANY_SEED]
    failures: dict[str, Annotated[int, PLACE]]
    entries: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        require_ranges(self)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(entry.samples for entry in self.entries)

    @property
    def rows(self) -> int:
        """Number of rows of ``hidden_pre`` in all shards."""
        return sum(entry.rows for entry in self.entries)

    def shards(self) -> Iterator[PairShard]:
        """Iterate over the shards, reading each on demand.

        Raises:
            InputError: A shard cannot be read, contradicts the index, or contains NaN or infinity.
        """
        return (_read_shard(self.folder, entry, self.hidden_size) for entry in self.entries)

    def records(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of all samples, without reading their states."""
        for entry in self.entries:
            yield from _read_metadata(self.folder, entry)


def open_pairs(path: Path, hidden_size: int | None = None) -> PairFiles:
    """Open a folder that ``llm-trm datagen`` has completed.

    Args:
        path: The folder.
        hidden_size: Required width D of the states; any if None.

    Raises:
        InputError: The index is missing or has another format, a shard is missing or contradicts the index,
            or the states have another width.
    """
    index_path = path / INDEX
    index = read_json(
        index_path, "name the folder of a finished llm-trm datagen, or run it again to finish it"
    )
    try:
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise InputError(
                f"{index_path} does not have the format {FORMAT!r} {VERSION}: create it with llm-trm datagen"
            )
        files = PairFiles(
            folder=path,
            hidden_size=index["hidden_size"],
            dtype=index["dtype"],
            model=index["model"],
            settings=index["settings"],
            seed=index["seed"],
            failures=index["failures"],
            entries=tuple(ShardEntry(**entry) for entry in index["shards"]),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{index_path}: {error}: {_REMEDY}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{index_path} is not an index of pairs ({error!r}): {_REMEDY}") from error
    if hidden_size is not None and files.hidden_size != hidden_size:
        raise InputError(
            f"{index_path}: its states have width {files.hidden_size} (model {files.model}), not "
            f"{hidden_size}: use pairs that were generated with this model"
        )
    for entry in files.entries:
        for name in (entry.file, entry.metadata):
            named_in(path, name, index_path, _REMEDY)
        _check(path, entry, files)
    return files


def write_shard(
    folder: Path,
    number: int,
    pairs: Sequence[Pair],
    failures: Mapping[str, Sequence[int]],
    hidden_size: int,
    dtype: str,
) -> None:
    """Write shard ``number``: first its states, then its records, each atomically.

    Args:
        pairs: The pairs in the order of their index; may be empty.
        failures: Indices of the problems without a pair, by reason.
        hidden_size: Width D.
        dtype: A key of :data:`DTYPES`.
    """
    file, metadata = shard_paths(folder, number)
    lengths = torch.tensor([0, *(len(pair.hidden_pre) for pair in pairs)], dtype=torch.int64)
    nothing = torch.empty(0, hidden_size, dtype=DTYPES[dtype])
    tensors = {
        "hidden_pre": torch.cat([nothing, *(pair.hidden_pre.to(DTYPES[dtype]) for pair in pairs)]),
        "hidden_post": torch.cat([nothing, *(pair.hidden_post[None].to(DTYPES[dtype]) for pair in pairs)]),
        "offsets": lengths.cumsum(0),
    }
    write_tensors(file, tensors, {_METADATA_KEY: json.dumps({"version": VERSION, "failures": failures})})
    lines = (json.dumps({field: pair.record[field] for field in RECORD}) + "\n" for pair in pairs)
    write_text(metadata, "".join(lines))


@dataclass(frozen=True)
class ShardSummary:
    """Properties of a shard that are known without reading its states.

    Attributes:
        entry: The shard's entry in the index.
        hidden_size: Width D.
        dtype: Dtype of the states, a key of :data:`DTYPES`.
        failures: Indices of the problems without a pair, by reason.
    """

    entry: ShardEntry
    hidden_size: int
    dtype: str
    failures: dict[str, list[int]]


def summarize_shard(folder: Path, number: int) -> ShardSummary | None:
    """Summarize shard ``number``; None if it is missing or incomplete."""
    from safetensors import SafetensorError, safe_open

    file, metadata = shard_paths(folder, number)
    if not metadata.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})[_METADATA_KEY])
            pre, post = opened.get_slice("hidden_pre"), opened.get_slice("hidden_post")
            (rows, hidden_size), samples = pre.get_shape(), post.get_shape()[0]
            stored = pre.get_dtype()
        _read_records(metadata, samples)
        dtype = next(name for name, short in _SAFETENSORS_NAMES.items() if short == stored)
    except (OSError, SafetensorError, LookupError, ValueError, StopIteration):
        return None
    entry = ShardEntry(file.name, metadata.name, samples, rows, file.stat().st_size)
    return ShardSummary(entry, hidden_size, dtype, about["failures"])


def damaged_shards(folder: Path, numbers: Sequence[int]) -> set[int]:
    """Those of ``numbers`` whose files differ from the checksums in the index, if there is a valid index."""
    try:
        entries = [ShardEntry(**entry) for entry in read_json(folder / INDEX, _REMEDY)["shards"]]
    except (InputError, KeyError, TypeError, ValueError):
        return set()
    found = set()
    for number in numbers:
        if number >= len(entries):  # an index of fewer problems
            continue
        entry = entries[number]
        digests = (entry.sha256, entry.metadata_sha256)
        for path, digest in zip(shard_paths(folder, number), digests, strict=True):
            if path.is_file() and not is_unchanged(path, digest):
                found.add(number)
    return found


def write_index(
    folder: Path, shards: int, *, model: str, seed: int, settings: Mapping[str, Any]
) -> PairFiles:
    """Write the index of ``shards`` shards, at least one, and open the folder.

    Raises:
        InputError: A shard is incomplete, or its width or dtype differs from the first shard's.
    """
    found = []
    for number in range(shards):
        summary = summarize_shard(folder, number)
        path = shard_paths(folder, number)[0]
        if summary is None:
            raise InputError(f"{path} is missing or incomplete: {_REMEDY}")
        found.append(summary)
        if (summary.hidden_size, summary.dtype) != (found[0].hidden_size, found[0].dtype):
            raise InputError(
                f"{path} has states of another width or dtype than the others: delete it, and {_REMEDY}"
            )
    failures = Counter[str]()
    for summary in found:
        failures.update({reason: len(indices) for reason, indices in summary.failures.items()})
    index = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "hidden_size": found[0].hidden_size,
        "dtype": found[0].dtype,
        "seed": seed,
        "settings": dict(settings),
        "samples": sum(summary.entry.samples for summary in found),
        "rows": sum(summary.entry.rows for summary in found),
        "failures": dict(sorted(failures.items())),
        "shards": [asdict(_with_checksums(folder, summary.entry)) for summary in found],
    }
    write_json(folder / INDEX, index)
    return open_pairs(folder)


def _with_checksums(folder: Path, entry: ShardEntry) -> ShardEntry:
    return replace(
        entry,
        sha256=file_digest(folder / entry.file),
        metadata_sha256=file_digest(folder / entry.metadata),
    )


def record_features() -> Features:
    """The types of :data:`RECORD`, for ``datasets.load_dataset``."""
    require("train", "datasets")
    from datasets import Features, Value

    return Features({name: Value(kind) for name, kind in RECORD.items()})


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The safetensors and the JSONL file of shard ``number``."""
    stem = f"shard-{number:05d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.jsonl"


def _check(folder: Path, entry: ShardEntry, files: PairFiles) -> None:
    """Compare a shard with the index without reading its states."""
    path = folder / entry.file
    for name in (entry.file, entry.metadata):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: {_REMEDY}")
    require_present(path, _REMEDY)
    if (size := path.stat().st_size) != entry.bytes:
        raise InputError(f"{path} has {size} bytes, not {entry.bytes}: {_REMEDY}")
    _compare(path, read_shapes(path, _REMEDY), _expected(entry, files.hidden_size))


def _expected(entry: ShardEntry, hidden_size: int) -> dict[str, tuple[int, ...]]:
    return {
        "hidden_pre": (entry.rows, hidden_size),
        "hidden_post": (entry.samples, hidden_size),
        "offsets": (entry.samples + 1,),
    }


def _compare(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise InputError(
                f"{path}: {name} has shape {shapes.get(name)}, but {INDEX} has {shape}: {_REMEDY}"
            )


def _read_shard(folder: Path, entry: ShardEntry, hidden_size: int) -> PairShard:
    path = folder / entry.file
    tensors = read_tensors(path, f"delete the file, and {_REMEDY}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _compare(path, shapes, _expected(entry, hidden_size))
    offsets = tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != entry.rows or bool((offsets.diff() < 1).any()):
        raise InputError(
            f"{path}: offsets do not increase from 0 to {entry.rows}: delete the file, and {_REMEDY}"
        )
    require_unchanged(path, entry.sha256, _REMEDY)
    records = _read_metadata(folder, entry)
    return PairShard(tensors["hidden_pre"], tensors["hidden_post"], offsets, records, path)


def _read_metadata(folder: Path, entry: ShardEntry) -> list[dict[str, Any]]:
    path = folder / entry.metadata
    records = _read_records(path, entry.samples)
    require_unchanged(path, entry.metadata_sha256, _REMEDY)
    return records


def _read_records(path: Path, samples: int) -> list[dict[str, Any]]:
    try:
        records = [parse_json(line) for line in read_lines(path)]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    if len(records) != samples:
        raise InputError(f"{path} has {len(records)} records, not {samples}: {_REMEDY}")
    return records
