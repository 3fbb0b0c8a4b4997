"""torch.compile: full graphs through the drop-in modules, and recompilations of the ``compile`` backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trm_kernels import TinyRecursiveNetwork, backends, deep_recursion, patch, reference, use_backend
from trm_kernels.backends import compiled

FAMILIES: dict[str, dict[str, Any]] = {
    "seed": {},
    "scratch": {"family": "scratch"},
    "paper": {"family": "paper"},
    "tokens": {"family": "paper", "mixer": "tokens", "seq_len": 7},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    torch.compiler.reset()
    compiled._compiled.cache_clear()
    compiled._compiled_rows.cache_clear()


def build(**options: Any) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(32, 1, 4, **options)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Run the ``compile`` backend without inductor, and collect its graphs."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **{**options, "backend": record}))
    return graphs


@pytest.mark.parametrize(
    ("options", "backend"),
    [*((options, "auto") for options in FAMILIES.values()), ({}, "eager"), ({}, "compile")],
    ids=[*FAMILIES, "seed-eager", "seed-compile"],
)
def test_fullgraph_with_every_choice_of_backend(options: dict[str, Any], backend: str) -> None:
    net, x = build(backend=backend, **options), torch.randn(2, 7, 32)
    oracle = reference.TinyRecursiveNetwork(net.config)
    oracle.load_state_dict(net.state_dict())
    mask = None if "mixer" in options else torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 1]])
    whole = torch.compile(net, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    out = whole(leaf, mask)
    torch.testing.assert_close(out, oracle(x, mask), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert leaf.grad is not None and all(p.grad.norm() > 0.0 for p in net.parameters())


def test_fullgraph_follows_the_context_and_the_input() -> None:
    """The backend set outside the graph is guarded: a change recompiles, and refusals still raise."""
    net, x = build(), torch.randn(2, 7, 32)
    whole = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected = net(x)
    torch.testing.assert_close(whole(x), expected)
    with use_backend("eager"):
        torch.testing.assert_close(whole(x), expected)
    with use_backend("native"), pytest.raises(Exception, match="cannot trace the kernels"):
        whole(x)
    torch.testing.assert_close(whole(x), expected)


def test_fullgraph_of_a_complete_recursion() -> None:
    net, (x, y, z) = build(), torch.randn(3, 2, 7, 32)
    whole = torch.compile(deep_recursion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        whole(net, x, y, z, 1, 2), deep_recursion(net, x, y, z, 1, 2), rtol=1e-4, atol=1e-4
    )


def test_fullgraph_of_a_patched_model() -> None:
    from tests.foreign import official, scratch, seed

    x, y, z = torch.randn(3, 2, 9, 32)
    for model, loop in (
        (seed.SequenceTRM(), lambda m: m._latent_recursion_with_mask(x, y, z, torch.ones(2, 9))[0]),
        (scratch.TinyRecursiveModel(), lambda m: m.one_recursion_cycle(x, y, z)[0]),
        (official.Inner(official.Config(seq_len=7)), lambda m: m.L_level(x, y, cos_sin=m.rotary_emb())),
    ):
        model.n_latent_steps = model.n_recursions = 1
        patch(model)
        with torch.no_grad():
            whole = torch.compile(loop, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(whole(model), loop(model), rtol=1e-4, atol=1e-4)


def train_step(net: TinyRecursiveNetwork, batch: int = 2, length: int = 7, T: int = 3) -> None:
    """Run two supervision steps, in which grad mode and the inputs' requires_grad change."""
    x, y, z = torch.randn(3, batch, length, 32)
    for _ in range(2):
        y, z = deep_recursion(net, x, y, z, 2, T)
        y.square().sum().backward()
        y, z = y.detach(), z.detach()


def test_no_recompile_within_a_recursion(traced: list[torch.fx.GraphModule]) -> None:
    net = build(backend="compile")
    train_step(net)
    assert len(traced) == 2  # with gradients, and without
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_step(net)
        with torch.no_grad():
            deep_recursion(net, *torch.randn(3, 2, 7, 32), 2, 2)  # type: ignore[misc]
        train_step(net)


def test_recompiles_over_shapes_are_bounded(traced: list[torch.fx.GraphModule]) -> None:
    """Batch sizes and lengths become symbols once they change, so their number does not matter."""
    net = build(backend="compile")
    for batch, length in [(2, 7), (3, 9), (4, 12), (5, 15)]:
        train_step(net, batch, length)
    warm = len(traced)
    assert warm <= 6
    for batch, length in [(6, 17), (2, 31), (9, 5), (3, 3)]:
        train_step(net, batch, length)
    assert len(traced) == warm


def test_networks_of_one_config_share_code_below_the_limit(traced: list[torch.fx.GraphModule]) -> None:
    """Ten networks with one configuration, trained alternately, stay below the recompile limit."""
    for _ in range(10):
        train_step(build(backend="compile"), T=2)
    assert len(traced) <= 16


def test_masks_and_modes_stay_below_the_limit(traced: list[torch.fx.GraphModule]) -> None:
    net = build(backend="compile", dropout=0.1)
    x = torch.randn(2, 7, 32)
    for mask in (None, torch.ones(2, 7), torch.ones(2, 7, dtype=torch.bool)):
        for training in (True, False):
            net.train(training)
            net(x, mask).sum().backward()
            with torch.no_grad():
                net(x, mask)
    assert len(traced) <= 12


def test_the_compile_backend_computes_the_reference() -> None:
    """Outputs and gradients through inductor, once."""
    net = TinyRecursiveNetwork(16, 1, 2, backend="compile")
    x = torch.randn(2, 5, 16)
    if (reason := backends.refusal("compile", net, x)) is not None:
        pytest.skip(reason)
    oracle = reference.TinyRecursiveNetwork(net.config)
    oracle.load_state_dict(net.state_dict())
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((net, oracle), leaves, strict=True):
        module(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(net.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


def ragged(*lengths: int) -> Tensor:
    """Return a mask [B, L]."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def results(net: TinyRecursiveNetwork, mask: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Return y, z and all gradients of a recursion on a padded batch."""
    torch.manual_seed(0)
    like = next(net.parameters())
    states = [torch.randn(*mask.shape, net.config.d_model).to(like).requires_grad_() for _ in range(3)]
    net.zero_grad()
    with use_backend(backend):
        y, z = deep_recursion(net, *states, 2, 2, mask=mask, **options)
    (y.square().sum() + z.square().sum()).backward()
    return [y, z, *(tensor.grad for tensor in (*states, *net.parameters()) if tensor.grad is not None)]


@pytest.mark.parametrize("options", [{}, {"family": "scratch"}, {"family": "paper"}], ids=str)
def test_padding_is_not_computed(options: dict[str, Any], traced: list[torch.fx.GraphModule]) -> None:
    """The rows before and after attention are compiled, in each grad mode."""
    net, mask = build(**options).double(), ragged(7, 3, 5)
    for memory in ("fast", "small"):
        ours, expected = (results(net, mask, name, memory=memory) for name in ("compile", "eager"))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        assert len(traced) == 4
    assert {graph_rows(graph) for graph in traced} == {15}


def graph_rows(graph: torch.fx.GraphModule) -> int:
    """Return the number of stream rows in a graph's input."""
    shapes = [node.meta["example_value"].shape for node in graph.graph.nodes if node.op == "placeholder"]
    return next(int(shape[0]) for shape in shapes if len(shape) == 2 and shape[1] == 32)


def test_new_lengths_do_not_recompile(traced: list[torch.fx.GraphModule]) -> None:
    net = build()
    for lengths in ((7, 3), (9, 4, 2), (5, 8)):
        results(net, ragged(*lengths), "compile")
    warm = len(traced)
    assert warm <= 8
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((12, 1), (3, 2, 2, 6), (31, 7, 7)):
            results(net, ragged(*lengths), "compile")
    assert len(traced) == warm


def test_frozen_networks_compile_no_backward(traced: list[torch.fx.GraphModule]) -> None:
    net, mask = build().requires_grad_(False), ragged(7, 3)
    states = torch.randn(3, 2, 7, 32)
    with use_backend("compile"):
        y, _ = deep_recursion(net, *states, 1, 1, mask=mask)  # type: ignore[misc]
    assert not y.requires_grad
    assert len(traced) == 2


@pytest.mark.slow
def test_packed_rows_through_inductor() -> None:
    net, mask = TinyRecursiveNetwork(16, 1, 2), ragged(5, 2)
    if (reason := backends.refusal("compile", net, torch.randn(2, 5, 16))) is not None:
        pytest.skip(reason)
    for ours, expected in zip(results(net, mask, "compile"), results(net, mask, "eager"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
