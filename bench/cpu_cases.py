"""The cases of ``bench/cpu.py``: a latent recursion, with or without backward, on fixed or ragged rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_trm.benchmark.workloads import Case, Mode


@dataclass(frozen=True)
class CpuCase:
    """A latent recursion over a batch, padded to L.

    Attributes:
        case: The shape. ``recursions`` is 1, so ``train`` is one latent recursion forward and backward.
        ragged: Whether lengths are uniform in [L/3, L] (with at least one L) instead of L.
        seed: Seed of weights, inputs and lengths.
    """

    case: Case
    ragged: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Identifies the case in a results file."""
        seed = f" seed{self.seed}" if self.seed else ""
        return f"{self.case.name} {'ragged' if self.ragged else 'fixed'}{seed}"

    def lengths(self) -> list[int]:
        """Number of valid positions of each sample [B]."""
        case = self.case
        if not self.ragged:
            return [case.latents] * case.batch
        generator = torch.Generator().manual_seed(self.seed)
        shortest = -(-case.latents // 3)
        lengths = torch.randint(shortest, case.latents + 1, (case.batch,), generator=generator).tolist()
        lengths[0] = case.latents
        return lengths

    def mask(self) -> Tensor | None:
        """True at valid positions [B, L], or None if all are valid."""
        if not self.ragged:
            return None
        return torch.arange(self.case.latents) < torch.tensor(self.lengths())[:, None]

    @property
    def padding(self) -> float:
        """Ratio of all rows, including padding, to valid rows."""
        return self.case.batch * self.case.latents / sum(self.lengths())

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products on valid rows, two per multiply-add.

        A backward pass counts as twice its forward pass. Norms, activations and softmax are not counted.
        """
        config, lengths = self.case.config(), self.lengths()
        d = config.d_model
        weights = 4 * d * d + (3 if config.gated else 2) * d * config.d_ff
        products = 2 * sum(lengths) * weights
        attention = 4 * sum(length**2 for length in lengths) * d
        return self.case.in_all_calls(config.n_layers * (products + attention))


#: Cases for ``--cases``, most informative first.
SHAPES: dict[str, Case] = {
    "d256": Case("forward", 256, 256, recursions=1),
    "d256-b8": Case("forward", 256, 256, batch=8, recursions=1),
    "d512": Case("forward", 512, 97, recursions=1),
    "d512-b8": Case("forward", 512, 97, batch=8, recursions=1),
    "d2048": Case("forward", 2048, 256, recursions=1),
    "d64": Case("forward", 64, 32, batch=64, recursions=1),
    "d32": Case("forward", 32, 24, batch=256, heads=4, recursions=1),
    "scratch": Case("forward", 256, 256, batch=8, family="scratch", recursions=1),
    "paper": Case("forward", 256, 256, batch=8, family="paper", recursions=1),
    "bf16": Case("forward", 256, 256, batch=8, dtype="bfloat16", recursions=1),
}

#: Cases for ``--quick``: fixed and ragged lengths, two families, two dtypes.
QUICK = ("d256", "d256-b8", "paper", "bf16")


def cases(names: Sequence[str], modes: Sequence[Mode], ragged: Sequence[bool], seed: int) -> list[CpuCase]:
    """All shapes of ``names`` in all modes and kinds of lengths; a single sample has no padding."""
    return [
        CpuCase(replace(SHAPES[name], mode=mode), padded, seed)
        for name in names
        for padded in ragged
        for mode in modes
        if SHAPES[name].batch > 1 or not padded
    ]


def quick(work: CpuCase) -> CpuCase:
    """The case, reduced to test the command in seconds."""
    case = work.case
    small = replace(
        case,
        hidden_size=min(case.hidden_size, 32),
        latents=min(case.latents, 12),
        batch=min(case.batch, 3),
        heads=4,
    )
    return replace(work, case=small)
