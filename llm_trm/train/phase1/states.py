"""Hidden states of a frozen language model over texts, computed once and kept in files.

A folder of states contains ``states.json``, the index, and numbered shards of about 16,000 states each. A
shard is written completely or not at all, so that an interrupted run continues where it stopped, and each of
n processes makes every n-th shard. The folder's name is a fingerprint of the model and the tokens: different
weights or texts get different folders, and the same states are never computed twice.

=============  =============  ============================================================================
``states``     ``[rows, D]``  states after the model's final norm, sequence after sequence, no padding
``lengths``    ``[N]``        int64, the length of each sequence
=============  =============  ============================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_trm.checksums import file_digest, require_unchanged
from llm_trm.errors import InputError
from llm_trm.files import read_json, writable_folder, write_json
from llm_trm.ranges import PLACE, WIDTH, require_in, shown
from llm_trm.weights import read_tensors, write_tensors

if TYPE_CHECKING:
    from llm_trm.models.loading import ThinkingModel

INDEX = "states.json"
_SHARDS = "states-*.safetensors"
_SHARD_ROWS = 16_384
#: Number of shards that are shuffled together, and the size up to which shards stay in memory.
_POOL = 8
_KEPT_BYTES = 1 << 30
#: Number of values of each weight that the fingerprint of a model reads.
_PROBES = 64


def fingerprint(model: ThinkingModel, sequences: Sequence[Tensor]) -> str:
    """A hash of the tokens and of names, shapes and samples of the weights, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in model.model.state_dict().items():
        values = weight.flatten()
        probes = values[:: max(1, len(values) // _PROBES)].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + probes.numpy().tobytes())
    for tokens in sequences:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def final_states(model: ThinkingModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """States of sequences of tokens after the model's final norm, as one padded batch.

    Args:
        sequences: Token ids [length] each, at least one.

    Returns:
        States [length, D] in the model's dtype, on its device.
    """
    device = model.model.device
    tokens = pad_sequence([tokens.long() for tokens in sequences], batch_first=True).to(device)
    lengths = torch.tensor([len(tokens) for tokens in sequences], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    # Only the backbone: its last_hidden_state is the last of output_hidden_states, without all the others.
    backbone: Any = model.model.base_model
    states = backbone(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return [row[:length] for row, length in zip(states, lengths.tolist(), strict=True)]


def collect_states(
    model: ThinkingModel,
    sequences: Sequence[Tensor],
    folder: Path,
    *,
    batch_size: int = 16,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the missing shards of ``folder`` that are assigned to this process.

    :func:`write_index` completes the folder once every process is done.

    Args:
        sequences: Token ids [length] each, in the order of the files.
        batch_size: Sequences per forward pass of the model.
        process, processes: This process makes every ``processes``-th shard, starting with ``process``.
        progress: Called with the number of tokens that this process has done, and has to do.

    Raises:
        InputError: The model returns NaN or runs out of memory, or the folder cannot be written.
    """
    writable_folder(folder)
    plan = _plan([len(tokens) for tokens in sequences])
    mine = range(process, len(plan), processes)
    total = sum(len(tokens) for number in mine for tokens in sequences[slice(*plan[number])])
    done = 0
    for number in mine:
        share = sequences[slice(*plan[number])]
        path = _shard_path(folder, number)
        lengths = [len(tokens) for tokens in share]
        if not path.exists():
            states: list[Tensor] = [torch.empty(0)] * len(share)
            # Sequences of similar length share a batch, so that there is little padding.
            order = sorted(range(len(share)), key=lengths.__getitem__, reverse=True)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                for i, rows in zip(chosen, _read(model, [share[i] for i in chosen]), strict=True):
                    states[i] = rows.cpu()
                progress(done + sum(len(rows) for rows in states), total)
            write_tensors(path, {"states": torch.cat(states), "lengths": torch.tensor(lengths)})
        done += sum(lengths)
        progress(done, total)


def is_complete(sequences: Sequence[Tensor], folder: Path) -> bool:
    """Whether ``folder`` has its index and all shards."""
    shards = len(_plan([len(tokens) for tokens in sequences]))
    return (folder / INDEX).exists() and all(_shard_path(folder, number).exists() for number in range(shards))


def write_index(model: ThinkingModel, sequences: Sequence[Tensor], folder: Path) -> None:
    """Write the index of ``folder``, with the SHA-256 of each shard, once all its shards exist."""
    lengths = [len(tokens) for tokens in sequences]
    shards = [
        {
            "rows": sum(lengths[a:b]),
            "sequences": b - a,
            "sha256": file_digest(_shard_path(folder, number)),
        }
        for number, (a, b) in enumerate(_plan(lengths))
    ]
    write_json(folder / INDEX, {"model": model.name, "width": model.hidden_size, "shards": shards})


def remove_states(folder: Path) -> None:
    """Remove the files of a folder of states, and the folder too if nothing else is in it."""
    for path in (folder / INDEX, *folder.glob(_SHARDS)):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # missing, not empty, or a link
        folder.rmdir()


@dataclass
class StateFiles:
    """Hidden states in files, read shard by shard; up to 1 GiB in total is read only once.

    Attributes:
        folder: Folder of the files.
        width: D.
        shards: Number of rows and sequences in each shard.
        checksums: SHA-256 of each shard's file, or None in the index of an older version.
    """

    folder: Path
    width: int
    shards: list[tuple[int, int]]
    checksums: list[str | None]
    _kept: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path) -> StateFiles:
        """Read the index of ``folder``; InputError if it is missing or broken."""
        path = folder / INDEX
        index = read_json(path, _again(folder))
        try:
            shards = [(shard["rows"], shard["sequences"]) for shard in index["shards"]]
            for count in (count for shard in shards for count in shard):
                require_in(PLACE, "a number of states", count)
            require_in(WIDTH, "width", index["width"])
            checksums = [shard.get("sha256") for shard in index["shards"]]
            return cls(folder, index["width"], shards, checksums)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{path} is not an index of states: {_again(folder)}") from None

    @property
    def rows(self) -> int:
        """Number of states in all shards."""
        return sum(rows for rows, _ in self.shards)

    @property
    def sequences(self) -> int:
        """Number of sequences in all shards."""
        return sum(sequences for _, sequences in self.shards)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Every state once, in order: [rows, D] with at most ``size`` rows, as stored."""
        for number in range(len(self.shards)):
            yield from torch.cat(self.shard(number)).split(size)

    def shuffled_rows(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Every state once, in an order drawn from ``generator``: [size, D]; a smaller remainder is dropped.

        If there are fewer states than ``size``, they are the only batch.
        """
        size = min(size, self.rows)
        rest = torch.empty(0)
        for pool in self._pools(generator):
            rows = torch.cat([*([rest] if len(rest) else []), *pool])
            order = torch.randperm(len(rows), generator=generator)
            whole = len(rows) // size * size
            for chosen in order[:whole].split(size):
                yield rows[chosen]
            rest = rows[order[whole:]]

    def shuffled_sequences(self, size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Every sequence once, in an order drawn from ``generator``: ``size`` x [length, D], no remainder."""
        size = min(size, self.sequences)
        rest: list[Tensor] = []
        for pool in self._pools(generator):
            found = rest + pool
            order = torch.randperm(len(found), generator=generator).tolist()
            whole = len(found) // size * size
            for start in range(0, whole, size):
                yield [found[i] for i in order[start : start + size]]
            rest = [found[i] for i in order[whole:]]

    def shard(self, number: int) -> list[Tensor]:
        """The sequences of a shard, [length, D] each.

        Raises:
            InputError: The file is missing or broken, or contains NaN.
        """
        if number in self._kept:
            return self._kept[number]
        path, remedy = _shard_path(self.folder, number), _again(self.folder)
        tensors = read_tensors(path, remedy)
        rows, sequences = self.shards[number]
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"states": (rows, self.width), "lengths": (sequences,)}:
            raise InputError(f"{path} does not contain {rows} states of width {self.width}: {remedy}")
        states, lengths = tensors["states"], tensors["lengths"].tolist()
        if min(lengths) < 1 or sum(lengths) != rows:
            raise InputError(f"{path}: its lengths do not add up to {rows} states: {remedy}")
        require_unchanged(path, self.checksums[number], remedy)
        split = list(states.split(lengths))
        if self.rows * self.width * states.element_size() <= _KEPT_BYTES:
            self._kept[number] = split
        return split

    def _pools(self, generator: torch.Generator) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        for start in range(0, len(order), _POOL):
            yield [rows for number in order[start : start + _POOL] for rows in self.shard(number)]


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [length, D] as one right-padded batch [B, L, D], and its mask [B, L] (True = valid)."""
    lengths = torch.tensor([len(states) for states in sequences])
    batch = pad_sequence(list(sequences), batch_first=True)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


def _read(model: ThinkingModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    try:
        states = final_states(model, sequences)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"model {model.name} runs out of memory on {len(sequences)} sequences of up to "
            f"{max(map(len, sequences))} tokens: choose a smaller --lm-batch-size or --max-length"
        ) from error
    for tokens, rows in zip(sequences, states, strict=True):
        if not rows.isfinite().all():
            text = model.tokenizer.decode(tokens[:20].tolist())
            raise InputError(
                f"model {model.name} returns NaN or infinite states for the text that starts with "
                f"{shown(text, 60)}: leave it out, or use another model"
            )
    return states


def _plan(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of sequences, one per shard."""
    plan, start, rows = [], 0, 0
    for i, length in enumerate(lengths):
        rows += length
        if rows >= _SHARD_ROWS or i == len(lengths) - 1:
            plan.append((start, i + 1))
            start, rows = i + 1, 0
    return plan


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"states-{number:05d}.safetensors"


def _again(folder: Path) -> str:
    return f"delete {folder} and run the same command again"
