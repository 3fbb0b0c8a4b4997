"""Tests of the paper's optimizers against plain loops, and in the training step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.train.run.training_state import restore_training, training_tensors
from llm_trm.weights import write_tensors
from tests.graph_double import RecordingCapturer
from tests.no_host_reads import NoHostReads
from trm_kernels import (
    AdamATan2,
    GraphCache,
    JointOptimizer,
    ParameterAverage,
    SparseEmbedding,
    SparseSignSGD,
    TinyRecursiveNetwork,
    TrainingStep,
    capturable_adam_atan2,
    deep_recursion,
)
from trm_kernels.optim import capturable

WIDTH, BATCH, LENGTH, VOCABULARY, PUZZLES = 8, 4, 6, 5, 7


def give_gradients(parameters: list[Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (scale * drawn).to(parameter.dtype)


def some_parameters(dtype: torch.dtype = torch.float64, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (2, 1, 3)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


# AdamATan2.


def plain_adam_atan2(
    value: float,
    gradients: list[float],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    a: float,
    b: float,
) -> float:
    """The values of one parameter over the steps."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        mean, square = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        value = value - lr * weight_decay * value - lr * a * math.atan2(mean, b * math.sqrt(square))
    return value


@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_adam_atan2_equals_a_plain_loop(lr_is_tensor: bool) -> None:
    parameters = some_parameters()
    start = [p.detach().clone() for p in parameters]
    common = {"a": 4 / math.pi, "b": 0.75}
    settings = [
        {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {"lr": 0.01, "betas": (0.0, 0.999), "weight_decay": 0.0},
    ]
    groups: list[dict[str, Any]] = [
        {"params": parameters[:2], **settings[0]},
        {"params": parameters[2:], **settings[1]},
    ]
    if lr_is_tensor:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    optimizer = AdamATan2(groups, **common)
    given: list[list[Tensor]] = []
    for number in range(12):
        give_gradients(parameters, number, scale=10.0 ** (number % 5 - 2))
        assert parameters[0].grad is not None
        parameters[0].grad[0] = 0.0  # 0 / 0 must be 0, as atan2(0, 0) is
        given.append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.step()
    for index, (parameter, first) in enumerate(zip(parameters, start, strict=True)):
        histories = torch.stack([step[index].flatten() for step in given]).T.tolist()
        expected = [
            plain_adam_atan2(value, history, **settings[index // 2], **common)  # type: ignore[arg-type]
            for value, history in zip(first.flatten().tolist(), histories, strict=True)
        ]
        torch.testing.assert_close(
            parameter.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        assert not torch.equal(parameter.detach(), first)


def test_defaults_match_the_paper() -> None:
    (group,) = AdamATan2(some_parameters()).param_groups
    assert (group["betas"], group["a"], group["b"]) == ((0.9, 0.95), 1.0, 1.0)


def train_scaled(scale: float, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    parameters = some_parameters(dtype)
    optimizer = AdamATan2(parameters, lr=0.1, weight_decay=0.2)
    for number in range(6):
        give_gradients(parameters, seed + number, scale)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_the_scale_of_gradients_does_not_matter() -> None:
    for dtype, scales, tolerance in (
        (torch.float64, (1e-60, 1e-6, 3.0, 1e90), 1e-13),
        (torch.float32, (1e-9, 7.0, 1e12), 1e-6),
    ):
        expected = train_scaled(1.0, dtype)
        for scale in scales:
            for ours, theirs in zip(train_scaled(scale, dtype), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(train_scaled(2.0**-20, dtype), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_squares_that_underflow_give_the_largest_update() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([1e-30, -1e-30, 0.0])
    AdamATan2([parameter], lr=1.0, weight_decay=0.0).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-math.pi / 2, math.pi / 2, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_atan2_in_low_precision_stays_near(dtype: torch.dtype) -> None:
    for ours, theirs in zip(train_scaled(1.0, dtype), train_scaled(1.0, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05)


def test_parameters_without_gradient_stay_and_do_not_count() -> None:
    one, two = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = AdamATan2([one, two], lr=0.1)
    give_gradients([one], 0)
    optimizer.step()
    assert torch.equal(two.detach(), torch.ones(2)) and two not in optimizer.state
    give_gradients([one, two], 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (one, two)] == [2, 1]
    # The first step with a gradient moves a parameter by lr * pi / 4, for any gradient.
    assert two.grad is not None
    expected = 0.999 - 0.1 * math.pi / 4 * two.grad.sign()
    torch.testing.assert_close(two.detach(), expected)


def saved_and_loaded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def test_adam_atan2_resumes_bit_for_bit(tmp_path: Path) -> None:
    parameters = some_parameters(torch.float32)
    optimizer = AdamATan2(parameters, lr=0.1, betas=(0.8, 0.9), capturable=True)
    for number in range(3):
        give_gradients(parameters, number)
        optimizer.step()
    others = [p.detach().clone().requires_grad_() for p in parameters]
    resumed = AdamATan2(others, lr=0.5)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict(), tmp_path / "state"))
    for number in range(3, 6):
        for one, owned in ((optimizer, parameters), (resumed, others)):
            give_gradients(owned, number)
            one.step()
    for ours, theirs in zip(others, parameters, strict=True):
        assert torch.equal(ours, theirs)
        assert resumed.state[ours]["step"].item() == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"a": 0.0}, "a and b"),
    ],
)
def test_numbers_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamATan2(some_parameters(), **options)
    if set(options) <= {"lr", "weight_decay"}:
        embedding = SparseEmbedding(2, 2)
        embedding.allocate(1)
        with pytest.raises(ValueError, match=message):
            SparseSignSGD([embedding], **options)


def test_capturable_adam_atan2_takes_groups() -> None:
    one, two, *_ = some_parameters()
    optimizer = capturable_adam_atan2(
        [{"params": [one]}, {"params": [two], "lr": 0.5}], lr=0.25, weight_decay=0.1
    )
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.5]
    assert all(group["capturable"] and group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    assert capturable.refusal(optimizer) is None
    with pytest.raises(ValueError, match="no parameters"):
        capturable_adam_atan2([], 0.1)


# SparseEmbedding and SparseSignSGD.


def filled(batch_size: int, rows: int = PUZZLES, width: int = 3) -> SparseEmbedding:
    embedding = SparseEmbedding(rows, width)
    embedding.weights.copy_(torch.randn(rows, width))
    embedding.allocate(batch_size)
    return embedding


def test_embedding_is_a_zero_buffer() -> None:
    embedding = SparseEmbedding(5, 3)
    embedding.allocate(2)
    assert not list(embedding.parameters())
    assert {name: (value.shape, value.dtype) for name, value in embedding.state_dict().items()} == {
        "weights": ((5, 3), torch.float32)
    }
    assert not embedding.weights.any()
    assert not any(buffer.requires_grad for buffer in embedding.buffers())


def test_in_evaluation_it_is_a_lookup() -> None:
    embedding = filled(2).eval()
    before, ids = embedding.rows, torch.tensor([[3, 0, 3]], dtype=torch.int32)
    out = embedding(ids)
    assert not out.requires_grad and torch.equal(out, embedding.weights[ids.long()])
    assert embedding.rows is before and not embedding.ids.any()  # type: ignore[union-attr]


def test_in_training_it_gives_the_same_leaf_each_time() -> None:
    embedding = SparseEmbedding(PUZZLES, 3)
    embedding.weights.copy_(torch.randn(PUZZLES, 3))
    for dtype in (torch.int32, torch.int64, torch.uint8):
        ids = torch.randint(PUZZLES, (4,)).to(dtype)
        out = embedding(ids)
        assert out is embedding.rows and out.is_leaf and out.requires_grad
        assert torch.equal(out, embedding.weights[ids.long()])
    with pytest.raises(ValueError, match=r"ids have shape \[3\], but \[4\] was allocated"):
        embedding(torch.zeros(3, dtype=torch.int64))
    copied = copy.deepcopy(embedding)
    assert copied.rows is not embedding.rows and copied.rows is not None and copied.rows.is_leaf


def test_moving_the_module_keeps_the_leaf_that_the_optimizer_holds() -> None:
    embedding = filled(2)
    rows, optimizer = embedding.rows, SparseSignSGD([embedding], lr=0.1)
    embedding.double()
    assert embedding.rows is rows and rows is not None and rows.dtype == torch.float64 and rows.is_leaf
    before = embedding.weights.clone()
    embedding(torch.tensor([1, 5])).sum().backward()
    optimizer.step()
    assert (embedding.weights != before).any(dim=1).tolist() == [k in (1, 5) for k in range(PUZZLES)]


@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_sign_sgd_equals_a_plain_loop(lr_is_tensor: bool) -> None:
    embedding, lr, decay = filled(9, width=5), 0.25, 0.5
    optimizer = SparseSignSGD(
        [embedding], lr=torch.tensor(lr) if lr_is_tensor else lr, weight_decay=decay, capturable=True
    )
    expected = embedding.weights.clone()
    for ids in ([3, 0, 3, 6, 0, 3, 1, 1, 6], [2] * 9, [0, 1, 2, 3, 4, 5, 6, 0, 0]):
        out = embedding(torch.tensor(ids))
        scale = torch.randn_like(out)
        scale[0, 0] = 0.0
        if ids[0] == 3:
            # Sums that are zero, and sums whose sign differs from their parts.
            scale[[0, 2, 5], 1] = torch.tensor([1.0, -0.5, -0.5])
            scale[[0, 2, 5], 2] = torch.tensor([1.0, 1.0, -3.0])
        (out * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert embedding.rows is not None and embedding.rows.grad is None
        for row in sorted(set(ids)):
            total = torch.zeros(5, dtype=torch.float64)
            for position, identity in enumerate(ids):
                if identity == row:
                    total += scale[position].double()
            expected[row] = expected[row] * (1 - lr * decay) - lr * total.sign().float()
        torch.testing.assert_close(embedding.weights, expected, rtol=1e-6, atol=1e-7)


def test_sign_sgd_leaves_other_rows_as_they_are() -> None:
    embedding = filled(3)
    before = embedding.weights.clone()
    optimizer = SparseSignSGD([embedding], lr=0.1)
    embedding(torch.tensor([4, 4, 2]))
    optimizer.step()
    assert torch.equal(embedding.weights, before), "without a gradient there is no step"
    embedding(torch.tensor([4, 4, 2])).square().sum().backward()
    optimizer.step()
    used = torch.tensor([k in (2, 4) for k in range(PUZZLES)])
    assert torch.equal(embedding.weights[~used], before[~used])
    assert (embedding.weights[used] != before[used]).all()


def test_the_sum_of_near_opposites_has_the_right_sign() -> None:
    embedding = SparseEmbedding(1, 1)
    embedding.allocate(4)
    optimizer = SparseSignSGD([embedding], lr=1.0, weight_decay=0.0)
    out = embedding(torch.zeros(4, dtype=torch.int64))
    # In float32 the sum of these is 0, or -1e-8 if the two large ones come first.
    out.backward(torch.tensor([[1.0], [-1e-8], [-1.0], [2e-9]]))
    optimizer.step()
    assert embedding.weights.item() == 1.0


def test_reallocated_rows_need_a_new_optimizer() -> None:
    embedding = SparseEmbedding(4, 2)
    with pytest.raises(ValueError, match="allocate"):
        SparseSignSGD([embedding])
    embedding.allocate(2)
    optimizer = SparseSignSGD([embedding])
    embedding.allocate(3)
    with pytest.raises(RuntimeError, match="build it again"):
        optimizer.step()
    with pytest.raises(ValueError, match="empty"):
        SparseSignSGD([])


# JointOptimizer, and all of it in a training step.


class Puzzler(nn.Module):
    """The answer is the puzzle's identifier at every position, which only its embedding encodes."""

    def __init__(self, batch: int = BATCH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.puzzle = SparseEmbedding(PUZZLES, WIDTH)
        self.puzzle.allocate(batch)
        self.net = TinyRecursiveNetwork(WIDTH, 1, 2, backend="eager")
        self.output_norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, tokens: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return self.embedding(tokens) + self.puzzle(ids)[:, None]

    def loss(
        self, y: Tensor, z: Tensor, tokens: Tensor, labels: Tensor, ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten()), {}


def batches(device: str = "cpu") -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        # The last two of 7 puzzles are never seen; some of the other 5 occur twice in 4 slots.
        ids = torch.randint(PUZZLES - 2, (BATCH,), generator=generator, dtype=torch.int32)
        labels = ids.long()[:, None].repeat(1, LENGTH)
        yield tokens.to(device), labels.to(device), ids.to(device)


def joint(model: Puzzler, lr: float = 1e-2, rows_lr: float = 0.5) -> JointOptimizer:
    device = model.head.weight.device
    sparse = SparseSignSGD(
        [model.puzzle], lr=torch.tensor(rows_lr, device=device), weight_decay=0.25, capturable=True
    )
    return JointOptimizer([sparse, capturable_adam_atan2(model.parameters(), lr, weight_decay=0.1)])


def step_of(model: Puzzler, optimizer: torch.optim.Optimizer, **options: Any) -> TrainingStep:
    options = {"n": 1, "T": 2, "max_steps": 2, "read_every": 1} | options
    return TrainingStep(
        model.net,
        model.loss,
        optimizer,
        embed=model.embed,
        output_norm=model.output_norm,
        modules=[model],
        **options,
    )


def recorded() -> GraphCache:
    return GraphCache(capturer=RecordingCapturer(traced=False))


def train(step: TrainingStep, steps: int, device: str = "cpu") -> list[float]:
    stream = batches(device)
    for _ in range(steps):
        step(*next(stream))
    return [window.values["loss"] for window in step.drain()]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("captured", [False, True])
def test_steps_with_both_optimizers_equal_a_loop_with_the_whole_table(captured: bool) -> None:
    """One deep recursion per batch; the table gets a dense gradient, and used rows a plain update."""
    model = Puzzler()
    other = copy.deepcopy(model)
    table = torch.zeros(PUZZLES, WIDTH, requires_grad=True)
    adam = AdamATan2(other.parameters(), lr=1e-2, weight_decay=0.1)
    expected, stream = [], batches()
    for _ in range(12):
        tokens, labels, ids = next(stream)
        x = other.embedding(tokens) + table[ids][:, None]
        zeros = torch.zeros_like(x)
        y, z = deep_recursion(other.net, x, zeros, zeros, 1, 2, output_norm=other.output_norm)
        loss, _ = other.loss(y, z, tokens, labels, ids)
        (gradient,) = torch.autograd.grad(loss, table, retain_graph=True)
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert gradient[ids].any(dim=1).all()
        with torch.no_grad():
            for row in set(ids.tolist()):
                table[row] = table[row] * (1 - 0.5 * 0.25) - 0.5 * gradient[row].sign()
        expected.append(loss.item())
    cache = recorded() if captured else GraphCache()
    before = copy.deepcopy(model)
    losses = train(step_of(model, joint(model), max_steps=1, cache=cache, capture=captured), 12)
    # The learning rate is a Python float there and a float32 tensor here.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.puzzle.weights, table.detach())
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(ours, theirs), name
    assert model.puzzle.weights[:-2].any(dim=1).all() and not model.puzzle.weights[-2:].any()
    status = cache.status()
    assert (status.captures, status.replays) == ((1, 9) if captured else (0, 0))


def test_rows_get_a_gradient_in_each_supervision_step() -> None:
    model, seen = Puzzler(), []
    assert model.puzzle.rows is not None
    model.puzzle.rows.register_hook(lambda gradient: seen.append(gradient.clone()))
    train(step_of(model, joint(model), supervision_steps=2, capture=False), 3)
    assert len(seen) == 6 and all(gradient.any(dim=1).all() for gradient in seen)


def test_captured_steps_are_the_plain_ones() -> None:
    model, cache = Puzzler(), recorded()
    other = copy.deepcopy(model)
    plain = train(step_of(other, joint(other, rows_lr=0.05), capture=False, clip_norm=1.0), 60)
    losses = train(step_of(model, joint(model, rows_lr=0.05), cache=cache, clip_norm=1.0), 60)
    assert losses == plain
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), "it must learn, or agreement says nothing"
    assert_same(model, other)
    status = cache.status()
    assert (status.captures, status.replays) == (1, 57)
    assert status.fallbacks == {"warming up for a capture": 3}


def test_only_the_device_prevents_a_capture() -> None:
    model = Puzzler()
    optimizer = joint(model)
    assert capturable.refusal(optimizer) is None
    step = step_of(model, optimizer)
    assert step._refusal(torch.device("cpu")) == step.cache.capturer.unavailable(torch.device("cpu"))
    hash(capturable.settings(optimizer))


def _hook_of_a_part(optimizer: JointOptimizer) -> None:
    optimizer.optimizers[1].register_step_post_hook(lambda *_: None)


def _number(optimizer: JointOptimizer) -> None:
    optimizer.optimizers[0].param_groups[0]["lr"] = 0.1


def _not_capturable(optimizer: JointOptimizer) -> None:
    optimizer.optimizers[0].param_groups[0]["capturable"] = False


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_hook_of_a_part, "has hooks"),
        (_number, "learning rate is not a tensor"),
        (_not_capturable, "without capturable"),
    ],
)
def test_joint_optimizer_follows_the_parts_restrictions(
    spoil: Callable[[JointOptimizer], None], reason: str
) -> None:
    optimizer = joint(Puzzler())
    spoil(optimizer)
    assert reason in str(capturable.refusal(optimizer))


def test_a_changed_schedule_and_loading_reach_a_captured_step() -> None:
    model, cache = Puzzler(), recorded()
    optimizer = joint(model)
    step = step_of(model, optimizer, cache=cache)
    train(step, 5)
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"].zero_()
    train(step, 2)
    assert_same(model, before)
    assert cache.status().captures == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(step, 5)
    assert cache.status().captures == 2


def test_an_update_that_is_not_finite_is_skipped() -> None:
    model, cache = Puzzler(), recorded()
    optimizer, bad = joint(model), torch.tensor(torch.inf)

    def loss(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = model.loss(*arguments)
        return value + bad * value, metrics

    step = step_of(model, optimizer, cache=cache, skip_nonfinite=True)
    step._loss = loss
    stream = batches()
    start = copy.deepcopy(model)
    step(*next(stream))
    assert_same(model, start)
    bad.zero_()
    for _ in range(4):
        step(*next(stream))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    assert {moments["step"].item() for moments in state.values()} == {4.0}
    bad.fill_(torch.nan)
    step(*next(stream))
    assert_same(model, before)
    for number, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state[number][name]), name
    bad.zero_()
    step(*next(stream))
    assert not torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.puzzle.weights, before.puzzle.weights)
    assert [window.values["skipped"] for window in step.drain()] == [1, 0, 0, 0, 0, 1, 0]
    assert not any(hasattr(one, "found_inf") for one in (optimizer, *optimizer.optimizers))


def test_a_flag_that_is_not_set_changes_nothing() -> None:
    model = Puzzler()
    other = copy.deepcopy(model)
    flagged = train(step_of(model, joint(model), skip_nonfinite=True, capture=False), 6)
    assert flagged == train(step_of(other, joint(other), capture=False), 6)
    assert_same(model, other)


def test_steps_do_not_synchronise_with_the_host() -> None:
    model = Puzzler()
    step = step_of(model, joint(model), skip_nonfinite=True, supervision_steps=2, capture=False)
    data = next(batches())
    with NoHostReads():
        for _ in range(4):
            step(*data)


def test_the_joint_optimizer_has_the_groups_and_states_of_its_parts() -> None:
    model = Puzzler()
    optimizer = joint(model)
    sparse, adam = optimizer.optimizers
    assert optimizer.param_groups[0] is sparse.param_groups[0]
    assert optimizer.param_groups[1] is adam.param_groups[0]
    assert model.puzzle.rows in capturable.parameters_of(optimizer)[:1]
    state = optimizer.state
    train(step_of(model, optimizer, capture=False), 1)
    assert optimizer.state is state and len(state) == len(list(model.parameters()))
    assert state[model.head.weight] is adam.state[model.head.weight]
    assert state.get(model.puzzle.rows, {}) == {} and model.puzzle.rows not in sparse.state
    adam.load_state_dict(adam.state_dict())
    assert optimizer.state is not state and optimizer.param_groups[1] is adam.param_groups[0]
    with pytest.raises(ValueError, match="more than one"):
        JointOptimizer([adam, adam])
    with pytest.raises(ValueError, match="no joined optimizer"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(ValueError, match="number of parameter groups"):
        optimizer.load_state_dict(adam.state_dict())


def test_a_closure_is_called_once() -> None:
    model = Puzzler()
    optimizer, calls = joint(model), []

    def closure() -> Tensor:
        calls.append(None)
        optimizer.zero_grad()
        loss = model.embed(*next(batches())).square().mean()
        loss.backward()
        return loss

    before = copy.deepcopy(model)
    loss = optimizer.step(closure)
    assert len(calls) == 1 and loss.item() > 0.0
    assert not torch.equal(model.embedding.weight, before.embedding.weight)
    assert model.puzzle.weights.any()


def test_a_scheduler_drives_all_parts() -> None:
    optimizer = joint(Puzzler(), lr=0.25, rows_lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
    optimizer.step()
    scheduler.step()
    assert [one.param_groups[0]["lr"].item() for one in optimizer.optimizers] == [0.25, 0.125]


@pytest.mark.parametrize("captured", [False, True])
def test_the_joint_optimizer_resumes_bit_for_bit(captured: bool, tmp_path: Path) -> None:
    model = Puzzler()
    optimizer, cache = joint(model), recorded()
    stream = batches()
    options = {"cache": cache, "capture": captured, "max_steps": 1}
    step = step_of(model, optimizer, **options)
    for _ in range(5):
        step(*next(stream))
    torch.manual_seed(9)
    other = Puzzler()
    other.load_state_dict(saved_and_loaded(model.state_dict(), tmp_path / "model"))
    resumed = joint(other, lr=1.0, rows_lr=1.0)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict(), tmp_path / "optimizer"))
    second = step_of(other, resumed, **options)
    for _ in range(5):
        batch = next(stream)
        step(*batch)
        second(*batch)
    assert_same(other, model)
    for number, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, resumed.state_dict()["state"][number][name]), name


def test_a_checkpoint_of_phase_2_holds_the_moments_of_the_joint_optimizer(tmp_path: Path) -> None:
    model = Puzzler()
    optimizer = joint(model)
    train(step_of(model, optimizer, capture=False), 3)
    average = ParameterAverage(model.parameters())
    tensors = training_tensors(model, optimizer, average=average.averages)
    # The table is a buffer: a trainer adds it.
    assert not any(tensor is model.puzzle.weights for tensor in tensors.values())
    write_tensors(tmp_path / "state.safetensors", tensors)
    torch.manual_seed(9)
    other = Puzzler()
    resumed = joint(other)
    restore_training(tmp_path, other, resumed, average=ParameterAverage(other.parameters()).averages)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        for moment, value in optimizer.state[theirs].items():
            assert torch.equal(resumed.state[ours][moment], value), (name, moment)
    assert len(resumed.state) == len(optimizer.state)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "clip_norm": 0.5}])
def test_gpu_captured_steps_are_the_plain_ones(options: dict[str, Any]) -> None:
    model, cache = Puzzler().cuda(), GraphCache()
    other = copy.deepcopy(model)
    plain = train(step_of(other, joint(other), capture=False, **options), 40, "cuda")
    captured = train(step_of(model, joint(model), cache=cache, **options), 40, "cuda")
    status = cache.status()
    assert (status.captures, status.replays) == (1, 37)
    assert status.fallbacks == {"warming up for a capture": 3}
    assert captured == plain
    assert_same(model, other)
    cache.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("flagged", [False, True])
def test_gpu_optimizers_do_not_synchronise(flagged: bool) -> None:
    model = Puzzler().cuda()
    optimizer = joint(model)
    if flagged:
        optimizer.found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
    data = next(batches("cuda"))
    for number in range(3):
        model.head(model.embed(*data)).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    assert model.puzzle.weights.any()
