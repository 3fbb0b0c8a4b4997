"""The reference compared to independent oracles: torch's modules, and the models of tests/foreign."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.foreign import official, scratch, seed
from trm_kernels import NetworkConfig, reference

LENGTH, WIDTH, HEADS = 11, 32, 4


def official_network(**options: object) -> nn.Module:
    """Return the official ``L_level`` as a function of only its input, with its parameter names."""
    model = official.Inner(official.Config(**options))  # type: ignore[arg-type]
    tables = model.rotary_emb() if hasattr(model, "rotary_emb") else None
    network = model.L_level
    call = network.forward
    network.forward = lambda x: call(x, torch.zeros_like(x), cos_sin=tables)  # type: ignore[method-assign]
    return network


class ScratchNetwork(nn.Module):
    """The from-scratch stack, with the parameter names of the reference."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.layers = scratch.TinyRecursiveModel(seq_len=LENGTH, **options).network  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


#: A config, and an independent module with the same parameters.
ORACLES: dict[str, tuple[NetworkConfig, Callable[[], nn.Module]]] = {
    "seed": (NetworkConfig(WIDTH, 2, HEADS), lambda: seed.TinyRecursiveNetwork(WIDTH, 2, HEADS)),
    "scratch": (NetworkConfig(WIDTH, 2, HEADS, family="scratch"), ScratchNetwork),
    "scratch-tokens": (
        NetworkConfig(WIDTH, 2, family="scratch", mixer="tokens", seq_len=LENGTH),
        lambda: ScratchNetwork(use_mlp_mixer=True),
    ),
    "paper": (NetworkConfig(WIDTH, 2, HEADS, family="paper"), official_network),
    "paper-theta": (
        NetworkConfig(WIDTH, 2, HEADS, family="paper", rope_theta=300.0),
        lambda: official_network(rope_theta=300.0),
    ),
    "paper-learned": (
        NetworkConfig(WIDTH, 2, HEADS, family="paper", rope=False),
        lambda: official_network(pos_encodings="learned"),
    ),
    "paper-tokens": (
        NetworkConfig(WIDTH, 2, family="paper", mixer="tokens", seq_len=LENGTH),
        lambda: official_network(mlp_t=True),
    ),
}


def randomised(module: nn.Module) -> nn.Module:
    """Change every parameter from its initial value, so that biases and norm weights matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(("config", "build"), ORACLES.values(), ids=ORACLES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_agrees_with_an_independent_oracle(
    config: NetworkConfig, build: Callable[[], nn.Module], scale: float
) -> None:
    # At scale 1e-3 the mean square is close to the families' epsilons, so a wrong epsilon shows.
    oracle = randomised(build())
    net = reference.TinyRecursiveNetwork(config)
    net.load_state_dict(oracle.state_dict(), strict=True)
    oracle.load_state_dict(net.state_dict(), strict=True)
    x = scale * torch.randn(3, LENGTH, WIDTH)
    sides = []
    for module in (net, oracle):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        sides.append({"out": out, "x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
    ours, theirs = sides
    for name, tensor in theirs.items():
        bound = 2e-5 * tensor.abs().max().item()
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 0]],
        [[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0]],
    ],
    ids=["holes", "single"],
)
def test_a_masked_seed_network_agrees_at_valid_positions(mask: list[list[int]]) -> None:
    oracle = randomised(seed.TinyRecursiveNetwork(WIDTH, 2, HEADS))
    net = reference.TinyRecursiveNetwork(NetworkConfig(WIDTH, 2, HEADS))
    net.load_state_dict(oracle.state_dict())
    valid = torch.tensor(mask)
    x = torch.randn(3, 7, WIDTH)
    out = net(x, valid)
    torch.testing.assert_close(out[valid.bool()], oracle(x, valid)[valid.bool()], rtol=1e-4, atol=1e-5)
    assert not out[~valid.bool()].any()


@pytest.mark.parametrize("family", ["seed", "scratch", "paper"])
def test_padding_changes_nothing(family: str) -> None:
    """A padded sample gives the same result as the sample alone, on either side because RoPE is relative."""
    net = reference.TinyRecursiveNetwork(NetworkConfig(WIDTH, 2, HEADS, family=family))  # type: ignore[arg-type]
    x = torch.randn(1, 5, WIDTH)
    padded = torch.cat((torch.full((1, 3, WIDTH), 1e4), x, torch.full((1, 2, WIDTH), -1e4)), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(net(padded, mask)[:, 3:8], net(x), rtol=1e-4, atol=1e-5)


def test_a_fully_masked_row_returns_zeros_and_finite_gradients() -> None:
    net = reference.TinyRecursiveNetwork(NetworkConfig(WIDTH, 2, HEADS))
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    out = net(x, mask)
    out.square().sum().backward()
    assert not out[1].any() and out[0, 0].all()
    assert x.grad is not None and not x.grad[1].any() and x.grad[0, 0].all()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters())


def test_keep_masks_replace_dropout() -> None:
    """An injected keep mask of ones only scales; one of zeros leaves only the output bias."""
    config = NetworkConfig(WIDTH, 1, HEADS, dropout=0.5)
    net = randomised(reference.TinyRecursiveNetwork(config))
    x = torch.randn(2, 6, WIDTH)
    block = net.layers[0]
    q, k, v = torch.randn(3, 2, HEADS, 6, 8)
    ones = torch.ones(2, HEADS, 6, 6)
    torch.testing.assert_close(
        reference.attention(q, k, v, None, 0.5, ones), 2.0 * reference.attention(q, k, v, None)
    )
    after = x + block.self_attn.out_proj.bias
    torch.testing.assert_close(net(x, keeps=[0.0 * ones]), after + block.mlp(block.norm2(after)))


def test_sampled_dropout_has_the_statistics_of_the_keep_mask() -> None:
    """The mean over samples is the output without dropout, and the variance that of Bernoulli keep masks."""
    rate, samples = 0.25, 4000
    q, k, v = (torch.randn(1, 1, 5, 8).expand(samples, 1, 5, 8) for _ in range(3))
    drawn = reference.attention(q, k, v, None, rate)
    keep = (torch.rand(samples, 1, 5, 5) >= rate).float()
    injected = reference.attention(q, k, v, None, rate, keep)
    plain = reference.attention(q[:1], k[:1], v[:1], None)
    spread = injected.std(dim=0) / math.sqrt(samples)
    for out in (drawn, injected):
        assert ((out.mean(dim=0) - plain[0]).abs() < 5.0 * spread).all()
    ratio = drawn.var(dim=0) / injected.var(dim=0)
    assert (ratio > 0.8).all() and (ratio < 1.25).all()


def test_dropout_acts_in_training_only() -> None:
    net = reference.TinyRecursiveNetwork(NetworkConfig(WIDTH, 2, HEADS, dropout=0.5))
    x = torch.randn(2, 6, WIDTH)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@settings(max_examples=25)
@given(
    family=st.sampled_from(["seed", "scratch", "paper"]),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([8, 10, 24]),
    seed_=st.integers(0, 2**16),
)
def test_any_shape_and_mask(
    family: str, batch: int, length: int, heads: int, head_dim: int, seed_: int
) -> None:
    """Results equal those of the oracle, computed row by row, for masks of any pattern."""
    generator = torch.Generator().manual_seed(seed_)
    config = NetworkConfig(heads * head_dim, 1, heads, family=family)  # type: ignore[arg-type]
    net = reference.TinyRecursiveNetwork(config)
    x = torch.randn(batch, length, config.d_model, generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    out = net(x, mask)
    assert out.shape == x.shape and torch.isfinite(out).all() and not out[~mask].any()
    for row, keep, sample in zip(out, mask, x, strict=True):
        if not keep.any():
            continue
        first, last = int(keep.nonzero()[0]), int(keep.nonzero()[-1]) + 1
        alone = net(sample[None, first:last], keep[None, first:last])[0]
        torch.testing.assert_close(row[first:last], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "other"}, "family must be one of"),
        ({"mixer": "other"}, "mixer must be one of"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"n_heads": 5}, "not a multiple of n_heads"),
        ({"mixer": "tokens"}, "no token mixer"),
        ({"mixer": "tokens", "family": "paper"}, "needs seq_len"),
        ({"family": "paper", "d_model": 12, "n_heads": 4}, "even head size"),
    ],
)
def test_an_invalid_config_is_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**{"d_model": 32, "n_heads": 4, **options})  # type: ignore[arg-type]


def test_inner_widths() -> None:
    assert NetworkConfig(512, family="paper").d_ff == 1536
    assert NetworkConfig(512, family="paper", mixer="tokens", seq_len=97).token_ff == 512
    assert NetworkConfig(256).d_ff == NetworkConfig(256, family="scratch").d_ff == 1024
