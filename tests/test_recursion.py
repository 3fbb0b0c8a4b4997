"""The recursion compared to the reference's schedule, and gradient flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.foreign import seed
from trm_kernels import RecursionMixin, TinyRecursiveNetwork, deep_recursion, latent_recursion, reference

FAMILIES = {
    "seed": {},
    "scratch": {"family": "scratch"},
    "paper": {"family": "paper"},
    "tokens": {"family": "paper", "mixer": "tokens", "seq_len": 7},
}


def states(batch: int = 2, length: int = 7, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, batch, length, width).unbind())  # type: ignore[return-value]


class Counting(nn.Module):
    """A network that records its inputs and whether each call recorded gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.inputs: list[Tensor] = []
        self.recorded: list[bool] = []

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        out = torch.tanh(self.weight * h)
        self.inputs.append(h.detach())
        self.recorded.append(out.requires_grad)
        return out


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("n", "T"), [(1, 1), (3, 2), (2, 3)])
def test_agrees_with_the_reference_schedule(options: dict[str, object], n: int, T: int) -> None:
    net = TinyRecursiveNetwork(32, 2, 4, backend="eager", **options)
    oracle = reference.TinyRecursiveNetwork(net.config)
    oracle.load_state_dict(net.state_dict())
    x, y, z = states()
    for ours, theirs in (
        (latent_recursion(net, x, y, z, n), reference.latent_recursion(oracle, x, y, z, n)),
        (deep_recursion(net, x, y, z, n, T), reference.deep_recursion(oracle, x, y, z, n, T)),
    ):
        for mine, truth in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)
    net.zero_grad()
    sum(s.square().sum() for s in deep_recursion(net, x, y, z, n, T)).backward()  # type: ignore[union-attr]
    sum(s.square().sum() for s in reference.deep_recursion(oracle, x, y, z, n, T)).backward()  # type: ignore[union-attr]
    for (name, mine_), truth_ in zip(net.named_parameters(), oracle.parameters(), strict=True):
        bound = 1e-4 * truth_.grad.abs().max().item()
        torch.testing.assert_close(mine_.grad, truth_.grad, rtol=1e-3, atol=bound, msg=name)


def test_the_schedule_call_by_call() -> None:
    """net(x + y + z) n times, then net(y + z), in 3 recursions, of which only the last records gradients."""
    net, (x, y, z) = Counting(), states()
    deep_recursion(net, x, y, z, n=2, T=3)
    assert net.recorded == [False] * 6 + [True] * 3
    torch.testing.assert_close(net.inputs[0], x + y + z)
    first = torch.tanh(net.weight.detach() * net.inputs[0])
    torch.testing.assert_close(net.inputs[1], x + y + first)
    second = torch.tanh(net.weight.detach() * net.inputs[1])
    torch.testing.assert_close(net.inputs[2], y + second)
    answer = torch.tanh(net.weight.detach() * net.inputs[2])
    torch.testing.assert_close(net.inputs[3], x + answer + second)


def test_without_gradients_nothing_is_recorded() -> None:
    net, (x, y, z) = Counting(), states()
    out = deep_recursion(net, x, y, z, 2, 2, with_gradients=False)
    assert not any(net.recorded) and not any(state.requires_grad for state in out)
    with torch.no_grad():
        deep_recursion(net, x, y, z, 2, 2)
    assert not any(net.recorded)
    assert torch.is_grad_enabled()


def test_a_negative_number_of_steps_is_refused() -> None:
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="n must be"):
        latent_recursion(torch.nn.Identity(), x, x, x, -1)


@pytest.mark.parametrize("T", [0, -1])
def test_a_deep_recursion_without_recursions_is_rejected(T: int) -> None:
    with pytest.raises(ValueError, match="T must be at least 1"):
        deep_recursion(Counting(), *states(), 2, T)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("T", [1, 3])
def test_gradients_reach_every_parameter(options: dict[str, object], T: int) -> None:
    net = TinyRecursiveNetwork(32, 2, 4, **options)
    x, y, z = (state.requires_grad_() for state in states())
    new_y, _ = deep_recursion(net, x, y, z, n=2, T=T)
    new_y.square().mul(torch.rand_like(new_y)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0.0, name
    assert x.grad is not None and x.grad.norm() > 0.0
    # The initial states get a gradient only if T = 1, without earlier recursions.
    assert (y.grad is not None, z.grad is not None) == (T == 1, T == 1)


def test_gradients_are_those_of_only_the_last_recursion() -> None:
    net, (x, y, z) = TinyRecursiveNetwork(32, 2, 4), states()
    deep_recursion(net, x, y, z, n=2, T=3)[0].square().sum().backward()
    deep = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            y, z = latent_recursion(net, x, y, z, n=2)
    latent_recursion(net, x, y, z, n=2)[0].square().sum().backward()
    for expected, parameter in zip(deep, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_masked_recursion_with_output_norm_agrees_with_the_seed() -> None:
    """SequenceTRM: a reasoning token after the padding, and a norm after every call."""
    oracle = seed.SequenceTRM()
    net = TinyRecursiveNetwork(32, 2, 4)
    net.load_state_dict(oracle.net.state_dict())
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 1]])
    x, y, z = states()
    theirs = oracle._deep_recursion_with_mask(x, y, z, mask)
    ours = deep_recursion(net, x, y, z, 2, 3, mask=mask, output_norm=oracle.output_norm)
    valid = mask.bool()
    for mine, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[valid], truth[valid], rtol=1e-4, atol=1e-4)
        assert not mine[~valid].any()


class Model(nn.Module, RecursionMixin):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.net = TinyRecursiveNetwork(32, 2, 4)
        self.n_latent_steps, self.n_deep_recursions = 2, 3
        if norm:
            self.output_norm = nn.RMSNorm(32)


@pytest.mark.parametrize("norm", [False, True])
def test_the_mixin_runs_the_functions(norm: bool) -> None:
    model, (x, y, z) = Model(norm), states()
    applied = model.output_norm if norm else None
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 1]])
    for ours, truth in (
        (model.latent_recursion(x, y, z), latent_recursion(model.net, x, y, z, 2, output_norm=applied)),
        (
            model.deep_recursion(x, y, z, mask),
            deep_recursion(model.net, x, y, z, 2, 3, mask=mask, output_norm=applied),
        ),
    ):
        torch.testing.assert_close(ours, truth)
    assert not model.deep_recursion(x, y, z, with_gradients=False)[0].requires_grad
