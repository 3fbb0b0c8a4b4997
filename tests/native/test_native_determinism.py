"""For a given number of threads, ``native`` results are bitwise equal, however work is distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.native.common import MIXERS, Named, lengths_mask, network, results, states, threads

LENGTHS = (40, 3, 0, 27, 1, 33, 16)
RUNS = 20


def mask_for(family: str) -> Tensor | None:
    return None if "tokens" in family else lengths_mask(LENGTHS, 40)


def differing(first: Named, second: Named) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(("count", "memory"), [(2, "fast"), (3, "small")])
@pytest.mark.parametrize("family", MIXERS)
def test_runs_repeat_bit_for_bit(family: str, count: int, memory: str) -> None:
    """A ragged batch of 120 rows, with attention and weight gradients distributed dynamically."""
    norm = None if "paper" in family else nn.RMSNorm(40, eps=1e-6)
    net, given, mask = network(family, 40, 2, layers=2, length=40), states(7, 40, 40), mask_for(family)
    with threads(count):
        first = results(net, norm, given, n=2, T=1, mask=mask, memory=memory)
        for _ in range(RUNS - 1):
            again = results(net, norm, given, n=2, T=1, mask=mask, memory=memory)
            assert not differing(first, again)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", MIXERS)
def test_recomputed_calls_change_no_bit(family: str, count: int, dropout: float) -> None:
    if dropout and family not in ("seed", "scratch"):
        pytest.skip("only attention weights have dropout, and the paper's block has none")
    norm = None if "paper" in family else nn.RMSNorm(40, eps=1e-6)
    net = network(family, 40, 2, layers=2, length=40, dropout=dropout).train()
    given, mask = states(7, 40, 40), mask_for(family)
    found = []
    for memory in ("fast", "balanced", "small"):
        torch.manual_seed(1)
        with threads(count):
            found.append(results(net, norm, given, n=2, T=2, mask=mask, memory=memory))
    assert not differing(found[0], found[1])
    assert not differing(found[0], found[2])


@pytest.mark.parametrize("family", MIXERS)
def test_a_sample_does_not_depend_on_its_neighbours(family: str) -> None:
    """Alone or anywhere in a batch, results are bitwise equal for any number of threads."""
    net, mask = network(family, 40, 2, layers=2, length=40), mask_for(family)
    x = torch.randn(7, 40, 40)
    with torch.no_grad():
        whole = net(x, mask)
        for sample, length in enumerate(LENGTHS):
            if mask is None:
                length = 40
            if length:
                alone = net(x[sample : sample + 1, :length])
                assert torch.equal(alone[0], whole[sample, :length])
        for count in (2, 3, 4):
            with threads(count):
                assert torch.equal(net(x, mask), whole)
