"""Dropout of attention weights in the ``native`` backend, compared to the masks that its generator draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native.common import (
    INSTRUCTION_SETS,
    add_all,
    instruction_set,
    kernels_of,
    lengths_mask,
    network,
    states,
    threads,
)
from trm_kernels import (
    NetworkConfig,
    TinyRecursiveNetwork,
    deep_recursion,
    latent_recursion,
    native_module,
    reference,
)
from trm_kernels.testing import SEEDS, ToleranceRule

SHAPE = NetworkConfig(16, 1, 2)


def drawn(
    probability: float,
    seed: int,
    call: int,
    head: int,
    first_row: int,
    rows: int,
    name: str = INSTRUCTION_SETS[0],
) -> Tensor:
    """Return which attention weights [rows, rows] of a sample are kept; ``call`` includes the block index."""
    recursion = native_module.module().Recursion(0, 0, 0, 0, 0, -1.0, probability, seed, False)
    mask = torch.full((rows, rows), math.nan)
    kernels_of(SHAPE, name).dropout_mask(recursion, call, head, first_row, rows, mask.data_ptr())
    return mask


def keeps(net: TinyRecursiveNetwork, seed: int, call: int, lengths: list[int], length: int) -> list[Tensor]:
    """Return the masks [B, H, L, L] of one call, one per block; row numbers continue across samples."""
    config, masks = net.config, []
    for block in range(config.n_layers):
        keep = torch.ones(len(lengths), config.n_heads, length, length)
        for head in range(config.n_heads):
            first = 0
            for sample, rows in enumerate(lengths):
                drawn_here = drawn(config.dropout, seed, call * config.n_layers + block, head, first, rows)
                keep[sample, head, :rows, :rows] = drawn_here
                first += rows
        masks.append(keep)
    return masks


def run(net: Any, given: list[Tensor], recursion: Any) -> dict[str, Tensor]:
    net.zero_grad()
    leaves = [state.clone().requires_grad_() for state in given]
    y, z = recursion(*leaves)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in (y, z)]
    torch.autograd.backward((y, z), directions)
    found = {"new y": y.detach(), "new z": z.detach()}
    found |= {name: leaf.grad for name, leaf in zip("xyz", leaves, strict=True)}
    return found | {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["seed", "scratch"])
def test_forward_and_backward_use_the_drawn_masks(family: str, count: int, masked: bool, memory: str) -> None:
    """The tolerance rule with the same masks in the reference: one seed per recursion, by call and block."""
    n, length = 2, 19
    lengths = [19, 0, 1, 12] if masked else [19] * 4
    mask = lengths_mask(tuple(lengths), length) if masked else None
    rule = ToleranceRule(torch.float32)
    for seed in range(SEEDS // 2):
        torch.manual_seed(seed)
        net = network(family, 20, 2, layers=2, dropout=0.3).train()
        eager = reference.TinyRecursiveNetwork(net.config)
        eager.load_state_dict(net.state_dict())
        given = states(4, length, 20)
        torch.manual_seed(seed + 100)
        drawn_seed = int(torch.randint(2**62, (1,)).item())
        masks = [keeps(net, drawn_seed, call, lengths, length) for call in range(n + 1)]

        def expected(
            x: Tensor, y: Tensor, z: Tensor, masks: Any = masks, eager: Any = eager
        ) -> tuple[Tensor, Tensor]:
            for call in range(n):
                z = eager(x + y + z, mask, keeps=masks[call])
            return eager(y + z, mask, keeps=masks[n]), z

        torch.manual_seed(seed + 100)
        with threads(count):
            ours = run(net, given, lambda *s, net=net: latent_recursion(net, *s, n, mask=mask, memory=memory))
        theirs = run(eager, given, expected)
        truth = run(eager.double(), [state.double() for state in given], expected)
        add_all(rule, ours, theirs, truth)
    rule.check()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_rate_and_independence_of_dropout(probability: float) -> None:
    """1.2 million draws: sums of draws and of products of two, by row, key, head, call and seed."""
    size = 256
    draws = torch.stack(
        [
            drawn(probability, seed, call, head, 0, size)
            for seed in (0, 2**40 + 3, 2**61 + 7)
            for call in (0, 1)
            for head in (0, 1, 5)
        ]
    )
    assert ((draws == 0) | (draws == 1)).all()
    dropped = 1.0 - draws.double() - probability

    def held(sums: Tensor, terms: int, deviation: float) -> None:
        # A maximum over many normal deviates: among 10^5 sums, 5 deviations occur once in a hundred thousand.
        assert sums.abs().max() <= 5.5 * deviation * math.sqrt(terms)

    deviation = math.sqrt(probability * (1.0 - probability))
    held(dropped.sum(), dropped.numel(), deviation)
    for dim in (1, 2):
        held(dropped.sum(dim), size, deviation)
    # Products of two draws that differ in only one of row, key, head, call and seed.
    flat = dropped.flatten(1)
    correlations = flat @ flat.T
    held(correlations - correlations.diag().diag(), size * size, deviation**2)
    for lag in (1, 2, 3, 8, 16, 32, 64):
        held((dropped[:, lag:] * dropped[:, :-lag]).sum((1, 2)), (size - lag) * size, deviation**2)
        held((dropped[:, :, lag:] * dropped[:, :, :-lag]).sum((1, 2)), (size - lag) * size, deviation**2)
        diagonal = dropped[:, lag:, lag:] * dropped[:, :-lag, :-lag]
        held(diagonal.sum((1, 2)), (size - lag) ** 2, deviation**2)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_drops_the_same(name: str) -> None:
    for rows in (1, 7, 33):
        assert torch.equal(drawn(0.4, 11, 3, 1, 5, rows, name), drawn(0.4, 11, 3, 1, 5, rows, "portable"))
    net = network(layers=2, dropout=0.4).train()
    given = states(2, 9)
    runs = []
    for other in (name, "portable"):
        torch.manual_seed(3)
        with instruction_set(other):
            runs.append(latent_recursion(net, *given, 1)[0])
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_dropout_counts_rows_across_the_batch() -> None:
    assert torch.equal(drawn(0.5, 1, 0, 0, 3, 8), drawn(0.5, 1, 0, 0, 0, 11)[3:, :8])
    assert not torch.equal(drawn(0.5, 1, 0, 0, 0, 8), drawn(0.5, 1, 0, 0, 8, 8))


@pytest.mark.parametrize("count", [1, 2])
def test_torchs_seed_reproduces_it(count: int) -> None:
    net, given = network(dropout=0.5).train(), states(3, 12)
    runs = []
    with threads(count):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(run(net, given, lambda *s: latent_recursion(net, *s, 2)))
        again = latent_recursion(net, *given, 2)[0]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["new y"], runs[2]["new y"])
    assert not torch.equal(runs[2]["new y"], again)


def test_every_latent_recursion_draws_its_own_dropout() -> None:
    """With n = 0 a recursion is one call, so the second might otherwise reuse the mask of the first."""
    net, given = network(dropout=0.5).train(), states(2, 9)
    torch.manual_seed(3)
    seeds = [int(torch.randint(2**62, (1,)).item()) for _ in range(2)]
    assert seeds[0] != seeds[1]
    eager = reference.TinyRecursiveNetwork(net.config)
    eager.load_state_dict(net.state_dict())
    _, y, z = given
    with torch.no_grad():
        torch.manual_seed(3)
        found, _ = deep_recursion(net, *given, 0, 2)
        for seed in seeds:
            y = eager(y + z, keeps=keeps(net, seed, 0, [9, 9], 9))
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)


def test_no_dropout_in_evaluation() -> None:
    net, given = network(dropout=0.5), states(2, 9)
    plain = network()
    plain.load_state_dict(net.state_dict())
    net.eval()
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(latent_recursion(net, *given, 1)[0], latent_recursion(plain, *given, 1)[0])
        assert torch.equal(torch.get_rng_state(), state)
        net.train()
        assert not torch.equal(latent_recursion(net, *given, 1)[0], latent_recursion(plain, *given, 1)[0])


@pytest.mark.parametrize("probability", [0.99999999, 1.0 - 2.0**-24, 1e-12])
def test_probabilities_at_the_edges_stay_finite(probability: float) -> None:
    """The first probability rounds to 1 in float32, and kept weights are divided by 1 - p."""
    net, given = network(dropout=probability).train(), states(2, 9)
    assert net.selected_backend(given[0]).name == "native"
    found = run(net, given, lambda *s: latent_recursion(net, *s, 1))
    for name, value in found.items():
        assert value.isfinite().all(), name
    torch.manual_seed(0)
    with torch.no_grad():
        found_here = net(given[0])
        if probability > 0.5:  # all weights are dropped
            block = net.layers[0]
            h = given[0] + block.self_attn.out_proj.bias
            torch.testing.assert_close(found_here, h + block.mlp(block.norm2(h)), rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(found_here, net.eval()(given[0]))
