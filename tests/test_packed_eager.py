"""The eager backend's packed recursion compared to the padded reference: outputs, gradients, conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.backend_double import alter
from trm_kernels import (
    NetworkConfig,
    Packing,
    TinyRecursiveNetwork,
    TrainingStep,
    backends,
    deep_recursion,
    halting_recursion,
    reference,
)
from trm_kernels.backends import Recursion, packed, packed_attention
from trm_kernels.backends.packed import SortedRows
from trm_kernels.testing import SEEDS, ToleranceRule, relative_error

FAMILIES = ("seed", "scratch", "paper")
MASKS = {
    # 120 is long enough for torch's attention kernel; the others use that for short sequences
    "ragged, with an empty sample and one of length 1": [
        [1] * n + [0] * (130 - n) for n in (5, 0, 1, 120, 17)
    ],
    "one length": [[1] * 4 + [0] * 2] * 3,
    "a token after the padding": [[1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
    "one sample": [[1, 1, 1, 0]],
}
Named = dict[str, Tensor]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of rows of each packed recursion."""
    counts: list[int] = []
    of = SortedRows.of

    def counting(*args: Any) -> SortedRows:
        rows = of(*args)
        counts.append(rows.rows)
        return rows

    monkeypatch.setattr(SortedRows, "of", counting)
    return counts


def network(family: str = "seed", **options: Any) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(16, 2, 2, backend="eager", family=family, **options)  # type: ignore[arg-type]


def states(mask: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*mask.shape, 16, dtype=dtype) for _ in range(3)]


def reference_recursion(
    net: TinyRecursiveNetwork, x: Tensor, y: Tensor, z: Tensor, n: int, T: int, mask: Tensor, norm: Any
) -> tuple[Tensor, Tensor]:
    """Run the reference's schedule over its padded network, with the outputs at padding replaced by zeros."""

    def call(h: Tensor) -> Tensor:
        out = reference.TinyRecursiveNetwork.forward(net, h, mask)
        return out if norm is None else norm(out)

    y, z = reference.deep_recursion(call, x, y, z, n, T)
    return y.masked_fill(mask[..., None] == 0, 0.0), z.masked_fill(mask[..., None] == 0, 0.0)


def outputs_and_gradients(
    recursion: Callable[..., tuple[Tensor, Tensor]],
    net: nn.Module,
    given: list[Tensor],
    norm: nn.Module | None,
) -> Named:
    """Return y, z and every gradient of a recursion, for output gradients that depend only on the shape."""
    leaves = [state.detach().clone().requires_grad_() for state in given]
    for module in (net, norm):
        if module is not None:
            module.zero_grad(set_to_none=True)
    found = recursion(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in found]
    torch.autograd.backward(found, weights)
    named = dict(zip("yz", (out.detach() for out in found), strict=True))
    gradients = {f"d{name}": leaf.grad for name, leaf in zip("xyz", leaves, strict=True)}
    gradients |= {name: p.grad for name, p in net.named_parameters()}
    if norm is not None:
        gradients |= {f"norm.{name}": p.grad for name, p in norm.named_parameters()}
    return named | {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def compare(
    net: TinyRecursiveNetwork, mask: Tensor, norm: nn.Module | None, n: int, T: int, **options: Any
) -> None:
    """Check that the packed recursion equals the padded reference within 1e-9, in float64."""
    net, given = net.double(), states(mask)
    norm = None if norm is None else norm.double()
    ours = outputs_and_gradients(
        lambda x, y, z: deep_recursion(net, x, y, z, n, T, mask=mask, output_norm=norm, **options),
        net,
        given,
        norm,
    )
    truth = outputs_and_gradients(
        lambda x, y, z: reference_recursion(net, x, y, z, n, T, mask, norm), net, given, norm
    )
    assert ours.keys() == truth.keys()
    # In a sample of one position, queries and keys have no gradient; that of the reference is rounding.
    rounding = 1e-14 * max(expected.norm().item() for expected in truth.values())
    for name, expected in truth.items():
        assert (ours[name] - expected).norm() <= 1e-9 * expected.norm() + rounding, name
    padding = mask == 0
    assert not ours["y"][padding].any() and not ours["z"][padding].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_agrees_with_the_padded_reference(family: str, mask: list[list[int]], ran: list[int]) -> None:
    valid = torch.tensor(mask)
    norm = None if family == "paper" else nn.RMSNorm(16, eps=1e-6)
    compare(network(family), valid, norm, n=2, T=1)
    assert ran == [int(valid.sum())]


@pytest.mark.parametrize("options", [{"memory": "small"}, {"memory": "fast"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_recursions_without_gradient(family: str, options: dict[str, Any], ran: list[int]) -> None:
    compare(network(family), torch.tensor(MASKS["a token after the padding"]), None, n=1, T=3, **options)
    assert ran


def test_learned_positions_and_one_head_of_an_odd_size(ran: list[int]) -> None:
    mask = torch.tensor(MASKS["holes"])
    compare(network("scratch", rope=False), mask, None, n=1, T=1)
    net = TinyRecursiveNetwork(15, 1, 1, backend="eager").double()
    x = torch.randn(3, 5, 15, dtype=torch.float64)
    y, z = deep_recursion(net, x, x, x, 1, 1, mask=mask)
    truth = reference_recursion(net, x, x, x, 1, 1, mask, None)
    torch.testing.assert_close((y, z), truth, rtol=1e-9, atol=1e-9)
    assert len(ran) == 2


@settings(max_examples=15)
@given(batch=st.integers(1, 4), length=st.integers(1, 20), family=st.sampled_from(FAMILIES), data=st.data())
def test_any_mask(batch: int, length: int, family: str, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    compare(network(family), mask, None, n=1, T=1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tolerance_rule(
    family: str, autocast: bool, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, and with bfloat16 operands under autocast, compared to padded eager in the same mode."""
    dtype = torch.bfloat16 if autocast else torch.float32
    rule = ToleranceRule(dtype)
    monkeypatch.setattr(packed_attention, "_SHORT", 10)  # both kinds of attention, and little work
    mask = torch.tensor([[1] * n + [0] * (24 - n) for n in (9, 24, 1, 11)])
    for _ in range(SEEDS):
        net, given = network(family), states(mask, torch.float32)
        norm = None if family == "paper" else nn.RMSNorm(16, eps=1e-6)

        def run(*states: Tensor, net: Any = net, norm: Any = norm) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and states[0].dtype == torch.float32):
                return deep_recursion(net, *states, 2, 1, mask=mask, output_norm=norm)

        ours = outputs_and_gradients(run, net, given, norm)
        with monkeypatch.context() as patch:
            alter(patch, "eager", "packed", refuses=lambda *_: "padded, for comparison")
            eager = outputs_and_gradients(run, net, given, norm)
            for module in (net, norm):
                if module is not None:
                    module.double()
            truth = outputs_and_gradients(run, net, [state.double() for state in given], norm)
        for name, expected in truth.items():
            rule.add(name, ours[name], eager[name], expected)
    rule.check()
    assert len(ran) == SEEDS


def test_dropout_of_attention_weights(ran: list[int]) -> None:
    """Random in training, repeatable from a seed, and absent in eval mode."""
    net, mask = network(dropout=0.5), torch.tensor(MASKS["a token after the padding"])
    given = states(mask, torch.float32)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(deep_recursion(net, *given, 1, 1, mask=mask)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    net.eval()
    truth = reference_recursion(net, *given, 1, 1, mask, None)
    torch.testing.assert_close(deep_recursion(net, *given, 1, 1, mask=mask), truth, rtol=1e-4, atol=1e-5)
    assert len(ran) == 4


def test_dropped_weights_keep_their_mean() -> None:
    attend = packed_attention.PackedAttention([(500, 3), (250, 7)], 2, None)
    samples = [torch.randn(1, length, 12).expand(count, -1, -1) for count, length in attend.groups]
    qkv = torch.cat([sample.reshape(-1, 12) for sample in samples]).requires_grad_()
    out, expected = attend(qkv, 0.3), attend(qkv, 0.0)
    for found, truth in zip(out.split([1500, 1750]), expected.split([1500, 1750]), strict=True):
        length = 3 if len(truth) == 1500 else 7
        mean, deviation = found.view(-1, length, 4).mean(0), found.view(-1, length, 4).std(0)
        bound = 5.0 * deviation / (len(truth) // length) ** 0.5
        assert ((mean - truth.view(-1, length, 4)[0]).abs() < bound).all() and (deviation > 0.0).all()
    out.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


def test_read_positions_and_no_latent_steps(ran: list[int]) -> None:
    net, mask = network(), torch.tensor(MASKS["a token after the padding"])
    x, y, z = states(mask, torch.float32)
    whole, new_z = deep_recursion(net, x, y, z, 2, 2, mask=mask)
    read = torch.tensor([[5, 0], [2, 2], [1, 5]])
    some, same_z = deep_recursion(net, x, y, z, 2, 2, mask=mask, read=read)
    assert torch.equal(some, whole.gather(1, read[..., None].expand(-1, -1, 16))) and torch.equal(
        new_z, same_z
    )
    assert not some[2, 0].any(), "a masked position must be zero"
    assert deep_recursion(net, x, y, z, 0, 1, mask=mask)[1] is z
    assert not deep_recursion(net, x, y, z, 1, 2, mask=mask, with_gradients=False)[0].requires_grad
    assert len(ran) == 4


def test_states_that_broadcast(ran: list[int]) -> None:
    net, mask = network(), torch.tensor(MASKS["holes"])
    x, y, z = (state[:batch] for state, batch in zip(states(mask, torch.float32), (3, 1, 1), strict=True))
    ours = deep_recursion(net, x, y[:, :1], z, 1, 1, mask=mask)
    theirs = deep_recursion(net, x, y[:, :1].expand(3, 5, 16), z.expand(3, 5, 16), 1, 1, mask=mask)
    torch.testing.assert_close(ours, theirs)
    assert len(ran) == 2


def test_padding_may_contain_anything(ran: list[int]) -> None:
    """Even NaN has no effect there, although the padded recursion needs finite values."""
    net, mask = network(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = states(mask, torch.float32)
    clean = deep_recursion(net, *given, 1, 1, mask=mask)
    for state in given:
        state[0, 2] = float("nan")
    assert all(map(torch.equal, deep_recursion(net, *given, 1, 1, mask=mask), clean))
    assert len(ran) == 2


class Hooked(nn.Linear):
    """A wrapper that the packed recursion does not support."""


def refusals() -> Iterator[Any]:
    def hook(net: TinyRecursiveNetwork) -> None:
        net.layers[0].register_forward_hook(lambda *_: None)

    def wrap(net: TinyRecursiveNetwork) -> None:
        net.layers[0].self_attn.out_proj = Hooked(16, 16)

    def hook_network(net: TinyRecursiveNetwork) -> None:
        net.register_forward_pre_hook(lambda *_: None)

    ragged, full = [[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]
    yield pytest.param(None, full, "there is no padding", id="unpadded")
    yield pytest.param(None, [[0, 0, 0], [0, 0, 0]], "there is only padding", id="all masked")
    yield pytest.param(hook, ragged, "hooks", id="hooked block")
    yield pytest.param(hook_network, ragged, "hooks", id="hooked network")
    yield pytest.param(wrap, ragged, "out_proj is a Hooked", id="wrapped layer")


@pytest.mark.parametrize(("change", "mask", "reason"), list(refusals()))
def test_conditions_for_the_padded_recursion(
    change: Callable[[TinyRecursiveNetwork], None] | None, mask: list[list[int]], reason: str, ran: list[int]
) -> None:
    net, valid = network(), torch.tensor(mask)
    if change is not None:
        change(net)
    given = states(valid, torch.float32)
    refused = packed.refuses(net, given, Recursion(1, mask=valid))
    assert refused is not None and reason in refused
    y, z = deep_recursion(net, *given, 1, 1, mask=valid)
    truth = reference_recursion(net, *given, 1, 1, valid, None)
    torch.testing.assert_close((y, z), truth)
    assert not ran


def test_transforms_and_fake_tensors_run_padded(ran: list[int]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, mask = network(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    x, y, z = states(mask, torch.float32)

    def norm(x: Tensor) -> Tensor:
        return deep_recursion(net, x, y, z, 1, 1, mask=mask)[0].square().sum()

    assert torch.func.grad(norm)(x).shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert deep_recursion(net, x, y, z, 1, 1, mask=mask)[0].shape == x.shape
    assert not ran


@pytest.mark.parametrize("name", ["triton", "native"])
def test_other_backends_have_none(name: str) -> None:
    assert backends.BACKENDS[name].packed is None


def test_a_packing_whose_lengths_the_host_knows(ran: list[int]) -> None:
    net, mask = network(), torch.tensor(MASKS["holes"])
    given = states(mask, torch.float32)
    expected = deep_recursion(net, *given, 1, 1, mask=mask)
    packing = Packing.of(mask, lengths=[3, 1, 1])
    assert packing.rows == 5 and packing.lengths == (3, 1, 1)
    for known in (packing, Packing.of(mask)):
        assert all(map(torch.equal, deep_recursion(net, *given, 1, 1, mask=known), expected))
    assert ran == [5, 5, 5]
    for wrong in ([3, 1], [6, 0, 0], [-1, 3, 3]):
        with pytest.raises(ValueError, match="lengths"):
            Packing.of(mask, lengths=wrong)


def test_lengths_on_another_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors a read would fail."""
    # Meta tensors have no autocast state, which the check queries.
    monkeypatch.setattr(packed, "refuses_modules", lambda *_: None)
    with torch.device("meta"):
        net, mask = network(), torch.ones(2, 3)
        given = [torch.empty(2, 3, 16) for _ in range(3)]
    reason = packed.refuses(net, given, Recursion(1, mask=mask))
    assert reason is not None and "Packing with lengths" in reason
    assert packed.refuses(net, given, Recursion(1, mask=Packing.of(mask, lengths=[3, 2]))) is None
    y, _ = deep_recursion(net, *given, 1, 2, mask=Packing.of(mask, lengths=[3, 2]))
    assert y.shape == (2, 3, 16)


def test_rows_are_sorted_by_length() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    rows = SortedRows.of(mask, [3, 0, 1, 3])
    assert rows.groups == ((1, 1), (2, 3))
    assert rows.index.tolist() == [9, 0, 1, 3, 12, 13, 14]
    assert rows.positions().tolist() == [1, 0, 1, 3, 0, 1, 2]
    x = torch.randn(4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(rows.unpack(rows.pack(x)), x.masked_fill(mask[..., None] == 0, 0.0))
    assert torch.autograd.gradcheck(lambda x: rows.unpack(rows.pack(x).sin()), (x,))


@pytest.mark.parametrize("rope", [False, True])
def test_gradients_of_attention_by_finite_differences(rope: bool) -> None:
    groups = [(2, 1), (1, 3), (1, 17)]
    rotary = torch.rand(2, 22, 1, dtype=torch.float64).unbind() if rope else None
    attend = packed_attention.PackedAttention(groups, 2, rotary)  # type: ignore[arg-type]
    qkv = torch.randn(22, 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: attend(qkv, 0.0), (qkv,), fast_mode=True)


def test_halting_runs_packed(ran: list[int]) -> None:
    net, mask = network().eval(), torch.ones(12, 5)
    mask[3:6, 3:] = 0
    x, y, z = states(mask, torch.float32)
    norm = nn.RMSNorm(16)

    def step(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        y, z = deep_recursion(net, x, y, z, 2, 2, mask=mask, output_norm=norm, with_gradients=False)
        return {"y": y, "z": z}, y[:, 0, 0] > 0.3

    state = {"x": x, "y": y, "z": z, "mask": mask}
    plain = halting_recursion(step, state, 8, compact=False)
    assert len(ran) == len(plain.calls)
    compacted = halting_recursion(step, state, 8)
    assert torch.equal(plain.exit_steps, compacted.exit_steps)
    for name in ("y", "z"):
        torch.testing.assert_close(plain.state[name], compacted.state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_packing", [False, True])
def test_a_training_step_runs_packed(
    as_packing: bool, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters after two steps are those of padded steps."""
    lengths = [5, 2, 0, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x = torch.randn(4, 5, 16, dtype=torch.float64)

    def train() -> list[Tensor]:
        torch.manual_seed(1)
        net = network().double()
        step = TrainingStep(
            net,
            lambda y, z, x, mask: (y.square().mean() + z.square().mean(), {}),
            torch.optim.SGD(net.parameters(), lr=0.1),
            n=2,
            T=2,
            mask=lambda x, mask: Packing.of(mask, lengths=lengths) if as_packing else mask,
        )
        for _ in range(2):
            step(x, mask)
        return [parameter.detach().clone() for parameter in net.parameters()]

    ours = train()
    assert ran == [10, 10]
    with monkeypatch.context() as patch:
        alter(patch, "eager", "packed", refuses=lambda *_: "padded, for comparison")
        padded = train()
    assert len(ran) == 2
    for found, expected in zip(ours, padded, strict=True):
        assert relative_error(found, expected) < 1e-9


def test_token_mixers_still_take_no_mask() -> None:
    config = NetworkConfig(16, 1, family="paper", mixer="tokens", seq_len=4)
    net = TinyRecursiveNetwork.from_config(config, backend="eager")
    x = torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match="accepts no mask"):
        deep_recursion(net, x, x, x, 1, 1, mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
