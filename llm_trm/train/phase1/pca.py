"""The optimum of a linear compressor.

Among all linear maps of rank D', with or without tied weights but without a bias, the projection on the D'
leading eigenvectors of the uncentred second moment E[h h^T] has the lowest mean squared error (Eckart and
Young, 1936): the sum of the other eigenvalues, over D. The bound has two limits. It holds on the states whose
second moment was computed; on others, a learned compressor may be better by chance. And it holds for the
squared error, and so for the relative error, but not for the mean cosine similarity, where each state counts
the same whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of states h, in float64 on the CPU.

    Attributes:
        rows: Number of states.
        mean: E[h], [D].
        second: E[h h^T], [D, D].
    """

    rows: int
    mean: Tensor
    second: Tensor

    @property
    def power(self) -> float:
        """Mean square of a state's elements, E[|h|^2] / D."""
        return float(self.second.trace()) / len(self.mean)


@dataclass(frozen=True)
class PrincipalComponents:
    """Eigenvectors of the uncentred second moment.

    Attributes:
        values: Eigenvalues, largest first [D].
        vectors: Eigenvector i as row i [D, D], float64.
    """

    values: Tensor
    vectors: Tensor

    def projection(self, width: int) -> Tensor:
        """The ``width`` leading eigenvectors, float32 [width, D]: weights of the best tied compressor."""
        return self.vectors[:width].float()

    def mse(self, width: int) -> float:
        """Mean squared error of the best linear compressor to ``width`` on these states."""
        return float(self.values[width:].sum()) / len(self.values)


def moments(batches: Iterable[Tensor]) -> Moments:
    """Moments of batches of states [rows, D], in one pass; products in float32, sums in float64."""
    rows = 0
    total = second = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        states = batch.float()
        rows += len(states)
        total = total + states.sum(0).cpu().double()
        second = second + (states.t() @ states).cpu().double()
    if not rows:
        raise ValueError("moments of no states")
    return Moments(rows, total / rows, second / rows)


def principal_components(second: Tensor) -> PrincipalComponents:
    """Principal components of states with second moment E[h h^T] ``second`` [D, D]."""
    values, vectors = torch.linalg.eigh(second.double())
    return PrincipalComponents(values.flip(0).clamp(min=0), vectors.flip(1).t().contiguous())
