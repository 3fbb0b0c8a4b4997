"""The drop-in modules: state dicts, shapes, dtypes, and PyTorch's module operations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trm_kernels import NetworkConfig, TinyRecursiveNetwork, TransformerBlock, backends, reference
from trm_kernels.testing import ToleranceRule, outputs_and_gradients

WIDTH, HEADS = 32, 4

FAMILIES: dict[str, dict[str, Any]] = {
    "seed": {},
    "scratch": {"family": "scratch"},
    "scratch-tokens": {"family": "scratch", "mixer": "tokens", "seq_len": 7},
    "paper": {"family": "paper"},
    "paper-learned": {"family": "paper", "rope": False},
    "paper-tokens": {"family": "paper", "mixer": "tokens", "seq_len": 7},
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def build(options: dict[str, Any], **more: Any) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(WIDTH, 2, HEADS, **{**options, **more})


def supporting_backends(net: TinyRecursiveNetwork, x: Tensor, mask: Tensor | None = None) -> list[str]:
    """Return the backends that support this call here; ``compile`` has its own tests."""
    names = [name for name in backends.BACKENDS if name != "compile"]
    return [name for name in names if backends.refusal(name, net, x, mask) is None]


def test_state_dicts_load_both_ways(options: dict[str, Any]) -> None:
    net = build(options)
    oracle = reference.TinyRecursiveNetwork(net.config)
    net.load_state_dict(oracle.state_dict(), strict=True)
    oracle.load_state_dict(build(options).state_dict(), strict=True)
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in oracle.state_dict().items()
    }


def test_every_backend_here_agrees_with_the_reference(options: dict[str, Any]) -> None:
    masks = [None] if "mixer" in options else [None, torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 1]])]
    net = build(options)
    served = supporting_backends(net, torch.randn(2, 7, WIDTH))
    assert "eager" in served
    for name in served:
        net.backend = name
        rule = ToleranceRule(torch.float32)
        for mask in masks:
            oracle = reference.TinyRecursiveNetwork(net.config)
            oracle.load_state_dict(net.state_dict())
            truth = copy.deepcopy(oracle).double()
            x = torch.randn(2, 7, WIDTH)
            sides = (
                outputs_and_gradients(net, net, x, mask),
                outputs_and_gradients(oracle, oracle, x, mask),
                outputs_and_gradients(truth, truth, x.double(), mask),
            )
            for (what, mine), (_, eager), (_, exact) in zip(*sides, strict=True):
                rule.add(f"{name} {what}", mine, eager, exact)
        rule.check()


@pytest.mark.parametrize("length", [1, 2, 31, 81])
def test_any_length(length: int) -> None:
    for options in ({}, {"family": "scratch"}, {"family": "paper"}):
        net = build(options)
        out = net(torch.randn(2, length, WIDTH))
        assert out.shape == (2, length, WIDTH) and torch.isfinite(out).all()


def test_strides_do_not_matter(options: dict[str, Any]) -> None:
    net = build(options)
    x = torch.randn(2, 7, WIDTH)
    strided = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((x, x), dim=-1)[..., 0],
        x[:1].expand(2, 7, WIDTH),
        torch.cat((x, x), dim=1)[:, ::2],
    ]
    for view in strided:
        assert not view.is_contiguous()
        torch.testing.assert_close(net(view), net(view.contiguous()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    net, x = build({}), torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    out = net(x, mask.to(dtype))
    torch.testing.assert_close(out, net(x, mask))
    assert not out[mask == 0].any() and torch.isfinite(out).all()


def test_a_fully_masked_row_has_no_nan_gradient() -> None:
    net, x = build({}), torch.randn(2, 5, WIDTH, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    net(x, mask).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and not x.grad[1].any()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "x", "mask", "message"),
    [
        ({}, (2, WIDTH), None, "expected an input"),
        ({}, (2, 5, WIDTH + 1), None, "expected an input"),
        ({}, (2, 0, WIDTH), None, "L must be at least 1"),
        ({}, (2, 5, WIDTH), (2, 6), r"expected a mask \[2, 5\]"),
        (FAMILIES["paper-tokens"], (2, 5, WIDTH), None, "needs L = 7, got 5"),
        (FAMILIES["paper-tokens"], (2, 7, WIDTH), (2, 7), "accepts no mask"),
    ],
)
def test_mismatched_shapes_are_rejected(
    options: dict[str, Any], x: tuple[int, ...], mask: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(options)(torch.randn(x), None if mask is None else torch.ones(mask))


def test_a_block_is_a_network_of_one_layer(options: dict[str, Any]) -> None:
    block = TransformerBlock(WIDTH, HEADS, **options)
    net = TinyRecursiveNetwork(WIDTH, 1, HEADS, **options)
    net.load_state_dict({f"layers.0.{key}": value for key, value in block.state_dict().items()})
    x = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(block(x), net(x))


def test_a_block_accepts_a_key_padding_mask() -> None:
    block, x = TransformerBlock(WIDTH, HEADS), torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]])
    torch.testing.assert_close(block(x, key_padding_mask=mask == 0), block(x, mask))
    with pytest.raises(ValueError, match="not both"):
        block(x, mask, key_padding_mask=mask == 0)


def test_to_float64_computes_in_float64(options: dict[str, Any]) -> None:
    net = build(options)
    x = torch.randn(2, 7, WIDTH)
    wide = copy.deepcopy(net).to(torch.float64)
    exact = wide(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(net(x), exact.float(), rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(wide, x[:1, :, :].double().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(options: dict[str, Any], dtype: torch.dtype) -> None:
    net = build(options)
    x = torch.randn(2, 7, WIDTH)
    out = copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), net(x), rtol=0.1, atol=0.1 if dtype is torch.bfloat16 else 0.02)


def test_autocast_is_that_of_the_reference(options: dict[str, Any]) -> None:
    net = build(options)
    oracle = reference.TinyRecursiveNetwork(net.config)
    oracle.load_state_dict(net.state_dict())
    x = torch.randn(2, 7, WIDTH)
    gradients = []
    for module in (net, oracle):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(leaf)
        out.float().square().sum().backward()
        gradients.append(leaf.grad)
        if net.config.pre_norm:
            assert out.dtype == torch.float32  # the residual stream
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(net(x).float(), oracle.double()(x.double()).float())


def test_no_grad_and_inference_mode(options: dict[str, Any]) -> None:
    net, x = build(options), torch.randn(2, 7, WIDTH)
    expected = net(x)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = net(x)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected)


def test_copies_are_independent(options: dict[str, Any]) -> None:
    net, x = build(options, backend="eager"), torch.randn(2, 7, WIDTH)
    expected = net(x).detach()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.config == net.config and twin.backend == "eager"
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("options", [{}, {"family": "paper"}], ids=["seed", "paper"])
def test_a_changed_weight_takes_effect_immediately(options: dict[str, Any]) -> None:
    """Changes by the optimizer, ``.data`` and ``load_state_dict`` take effect without stale copies."""
    net, x = TinyRecursiveNetwork(WIDTH, 1, HEADS, **options), torch.randn(1, 3, WIDTH)
    oracle = reference.TinyRecursiveNetwork(net.config)

    def agree() -> None:
        oracle.load_state_dict(net.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(net(x), oracle(x), rtol=1e-4, atol=1e-4)

    for name in supporting_backends(net, x):
        net.backend = name
        agree()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        net(x).sum().backward()
        optimizer.step()
        agree()
        for parameter in net.parameters():
            parameter.data = parameter.data + 0.1
        agree()
        net.load_state_dict(TinyRecursiveNetwork.from_config(net.config).state_dict())
        agree()
        net.eval()
        agree()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(options: dict[str, Any], reentrant: bool) -> None:
    dropout = {} if "paper" in options.get("family", "") or "mixer" in options else {"dropout": 0.3}
    net = build(options, **dropout)
    x = torch.randn(2, 7, WIDTH)
    gradients = []
    for wrapped in (False, True):
        net.zero_grad()
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = checkpoint(net, leaf, use_reentrant=reentrant) if wrapped else net(leaf)
        out.square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad for parameter in net.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_dropout_is_random_only_in_training() -> None:
    for options in ({}, {"family": "scratch"}):
        net, x = build(options, dropout=0.5), torch.randn(2, 7, WIDTH)
        assert not torch.equal(net(x), net(x))
        torch.manual_seed(5)
        first = net(x)
        torch.manual_seed(5)
        assert torch.equal(net(x), first)
        net.eval()
        assert torch.equal(net(x), net(x))


def test_frozen_parameters_get_no_gradient() -> None:
    net = build({})
    net.layers[0].requires_grad_(False)
    net(torch.randn(2, 7, WIDTH)).sum().backward()
    assert all(parameter.grad is None for parameter in net.layers[0].parameters())
    assert all(parameter.grad is not None for parameter in net.layers[1].parameters())


def test_from_config_and_repr() -> None:
    config = NetworkConfig(WIDTH, 3, HEADS, 0.1, family="scratch", rope_theta=500.0)
    net = TinyRecursiveNetwork.from_config(config, backend="eager")
    assert net.config == config and net.backend == "eager" and len(net.blocks) == 3
    assert "rope_theta=500.0" in repr(net) and "backend='eager'" in repr(net)


def test_hooks_on_the_network_run() -> None:
    net, seen = build({}), []
    net.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    nn.Sequential(net)(torch.randn(2, 7, WIDTH))
    assert seen == [(2, 7, WIDTH)]


def test_an_empty_batch_returns_an_empty_batch() -> None:
    net = TinyRecursiveNetwork(16, 2, 2)
    assert net(torch.randn(0, 5, 16)).shape == (0, 5, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 0.0},
        {"family": "paper", "dropout": 0.1},
        {"n_heads": 3},
        {"family": "seed", "mixer": "tokens"},
    ],
)
def test_invalid_configs_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        NetworkConfig(16, **{"family": "scratch"} | options)
