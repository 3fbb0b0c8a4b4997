"""What phase 2 reads before it trains: pairs, their held-out part, and a compressor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_trm.data.pairs import PairFiles, open_pairs
from llm_trm.errors import InputError
from llm_trm.evaluate.held_out import require_held_out
from llm_trm.models.compression import (
    DimensionCompressor,
    compressor_facts,
    load_compressor,
    require_width,
)
from llm_trm.models.contexts import Contexts, read_contexts
from llm_trm.text import normalise_spaces
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase2.order import split

#: Fraction of a GPU's free memory that the contexts may take; larger ones stay on the host.
_MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class Inputs:
    """What phase 2 learns from.

    Attributes:
        compressor: Frozen, on the device.
        compressor_facts: What its file records in addition to kind, sizes and hash.
        contexts: Compressed contexts and targets to learn from, and where nothing else is given, to validate.
        held_out: Those to validate on.
        training, validated: Indices of the samples in ``contexts`` and ``held_out``.
        repeated: Number of held-out samples of a problem that is trained on too.
        heads: Number of attention heads of the network.
        facts: Language model and settings of the pairs, for the files of the model.
        digests: Hashes of both parts.
    """

    compressor: DimensionCompressor
    compressor_facts: dict[str, Any]
    contexts: Contexts
    held_out: Contexts
    training: list[int]
    validated: list[int]
    repeated: int
    heads: int
    facts: dict[str, Any]
    digests: dict[str, str]


def read_inputs(config: Phase2Config, device: torch.device, processes: int) -> Inputs:
    """Read the compressor and the pairs.

    Args:
        device: For compressor and contexts; the contexts stay on the CPU if they take much of its memory.
        processes: Number of processes that share a batch.

    Raises:
        InputError: A folder that cannot be read, parts that do not fit together, or too few samples.
    """
    compressor, compressor_facts = _load_compressor(config.compressor)
    pairs = _open(config.data, compressor, config.compressor)
    if config.val_data is not None:
        others = _open(config.val_data, compressor, config.compressor)
        require_held_out(others, pairs.settings, pairs, otherwise="leave --val-data out")
    heads = _heads(compressor.d_compressed, config.n_heads)
    compressor = compressor.to(device)
    contexts = held_out = read_contexts(pairs, compressor, device)
    repeated = 0
    if config.val_data is None:
        training, validated = split(len(contexts), config.val_fraction, config.seed)
        problems = [normalise_spaces(str(record["problem"])) for record in pairs.records()]
        learned = {problems[number] for number in training}
        repeated = sum(problems[number] in learned for number in validated)
    else:
        held_out = read_contexts(others, compressor, device)
        training, validated = [*range(len(contexts))], [*range(len(held_out))]
        if not validated:
            raise InputError(f"{config.val_data} has no samples: name other pairs, or leave --val-data out")
    if len(training) < config.batch_size * processes:
        raise InputError(
            f"{config.data} has {len(training)} samples to train on, without the held-out ones, but a "
            f"batch needs {config.batch_size * processes}: choose a --batch-size of at most "
            f"{len(training) // processes}, or make more pairs"
        )
    return Inputs(
        compressor=compressor,
        compressor_facts=compressor_facts,
        contexts=_to_gpu(contexts, device),
        held_out=_to_gpu(held_out, device),
        training=training,
        validated=validated,
        repeated=repeated,
        heads=heads,
        facts={
            "language_model": pairs.model,
            "data": str(config.data.resolve()),
            "pairs": pairs.settings,
        },
        digests={"data": contexts.digest(), "val_data": held_out.digest()},
    )


def _load_compressor(folder: Path) -> tuple[DimensionCompressor, dict[str, Any]]:
    compressor = load_compressor(folder)
    if not isinstance(compressor, DimensionCompressor):
        raise InputError(
            f"{folder} contains a compressor that pools states: phase 2 needs one that narrows each, from "
            "llm-trm train phase1 --compressor dimension"
        )
    identity = ("kind", "sizes", "weights_sha256")
    facts = {name: value for name, value in compressor_facts(folder).items() if name not in identity}
    return compressor.eval().requires_grad_(False), facts


def _open(path: Path, compressor: DimensionCompressor, folder: Path) -> PairFiles:
    pairs = open_pairs(path)
    require_width(compressor, pairs.hidden_size, folder, f"the pairs in {path}")
    return pairs


def _heads(width: int, heads: int | None) -> int:
    """The number of attention heads: ``heads`` if it divides D', by default 8 or fewer of 8 dimensions."""
    if heads is None:
        return next(count for count in (8, 4, 2, 1) if width % count == 0 and width // count >= min(width, 8))
    if width % heads:
        raise InputError(
            f"--heads {heads} does not divide the compressor's width {width}: choose a divisor, or leave it "
            "out"
        )
    return heads


def _to_gpu(contexts: Contexts, device: torch.device) -> Contexts:
    if device.type != "cuda":
        return contexts
    free, _ = torch.cuda.mem_get_info(device)
    fits = contexts.rows.nbytes + contexts.targets.nbytes <= _MEMORY_SHARE * free
    return contexts.to(device) if fits else contexts
