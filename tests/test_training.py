"""The training step compared to a handwritten loop, eagerly and as a graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.graph_double import RecordingCapturer
from tests.no_host_reads import NoHostReads
from trm_kernels import (
    GraphCache,
    Packing,
    ParameterAverage,
    TinyRecursiveNetwork,
    TrainingStep,
    capturable_adamw,
    deep_recursion,
)
from trm_kernels.graphs import CaptureError, GraphFallbackWarning
from trm_kernels.graphs import cache as cache_internals
from trm_kernels.metrics import MetricBuffer

WIDTH, BATCH, LENGTH, VOCABULARY = 8, 4, 6, 5


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_internals, "_WARNED", set())


class Sorter(nn.Module):
    """Learns to sort short sequences; samples halt when every answer is right."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, backend: str | None = "eager") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width))
        self.net = TinyRecursiveNetwork(width, 1, 2, dropout, backend=backend)
        self.output_norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.start = nn.Parameter(torch.randn(2, width))

    def initial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.start[0], self.start[1]

    def embed(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return self.embedding(tokens) + self.position[: tokens.shape[1]]

    def mask(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return mask

    def loss(
        self, y: Tensor, z: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        logits = self.head(y)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        right = (logits.argmax(-1) == labels) | (mask == 0)
        return loss, {"accuracy": right.float().mean()}, right.all(dim=1)


class MeanNetwork(nn.Module):
    """A network of two products, for tests of many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.mean = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        valid = mask[..., None]
        mean = (h * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
        return h + torch.tanh(self.own(h) + self.mean(mean))


def batches(device: str = "cpu", length: int = LENGTH, batch: int = BATCH) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
        mask = torch.ones(batch, length)
        mask[-1, -2:] = 0
        labels = tokens.sort(dim=1).values.masked_fill(mask == 0, -100)
        yield tokens.to(device), labels.to(device), mask.to(device)


def step_of(model: Sorter, optimizer: torch.optim.Optimizer, **options: Any) -> TrainingStep:
    options = {"n": 2, "T": 2, "max_steps": 4, "read_every": 1, "clip_norm": 0.5} | options
    return TrainingStep(
        model.net,
        model.loss,
        optimizer,
        output_norm=model.output_norm,
        embed=model.embed,
        mask=model.mask,
        initial=model.initial,
        modules=[model],
        **options,
    )


def by_hand(
    model: Sorter,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    n: int = 2,
    T: int = 2,
    decay: float | None = None,
    schedule: Callable[[int], float] | None = None,
    autocast: bool = False,
) -> tuple[list[float], list[Tensor]]:
    """Run the same training as a plain loop over Python lists: no carry, no buffers, no device flags."""
    device = model.start.device.type
    stream = batches(device)
    slots: list[dict[str, Any] | None] = [None] * BATCH
    average = [p.detach().clone() for p in model.parameters()]
    losses = []
    for number in range(steps):
        fresh = next(stream)
        for i in range(BATCH):
            if slots[i] is None:
                slots[i] = {"data": [t[i] for t in fresh], "y": None, "z": None, "steps": 0}
        data = [torch.stack([slot["data"][k] for slot in slots]) for k in range(3)]  # type: ignore[index]
        with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
            x = model.embed(*data)
            start = [s.expand_as(x) for s in model.initial(x)]
            new = torch.tensor([slot["y"] is None for slot in slots], device=device).view(-1, 1, 1)  # type: ignore[index]
            y, z = (
                torch.where(
                    new,
                    start[k],
                    torch.stack(
                        [x[i] if slot[name] is None else slot[name] for i, slot in enumerate(slots)]
                    ).detach(),
                )  # type: ignore[index]
                for k, name in enumerate(("y", "z"))
            )
            y, z = deep_recursion(model.net, x, y, z, n, T, mask=data[2], output_norm=model.output_norm)
            loss, _, halt = model.loss(y, z, *data)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"].fill_(schedule(number))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if decay is not None:
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1.0 - decay)
        for i, slot in enumerate(slots):
            assert slot is not None
            slot.update(y=y[i].detach(), z=z[i].detach(), steps=slot["steps"] + 1)
            if bool(halt[i]) or slot["steps"] >= 4:
                slots[i] = None
        losses.append(loss.item())
    return losses, average


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    """Build what :func:`capturable_adamw` builds on a GPU, also for the double on a CPU."""
    lr_tensor = torch.tensor(lr, device=next(model.parameters()).device)
    return torch.optim.AdamW(model.parameters(), lr=lr_tensor, fused=True, capturable=True)


def recorded(**bounds: Any) -> GraphCache:
    return GraphCache(capturer=RecordingCapturer(traced=False), **bounds)


def train(step: TrainingStep, steps: int, stream: Iterator[tuple[Tensor, ...]] | None = None) -> list[float]:
    stream = batches() if stream is None else stream
    for _ in range(steps):
        step(*next(stream))
    return [window.values["loss"] for window in step.drain()]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("T", "autocast"), [(2, False), (1, False), (2, True)])
def test_steps_equal_a_handwritten_loop(captured: bool, T: int, autocast: bool) -> None:
    """Losses, parameters and averages are bitwise equal, with a schedule."""

    def schedule(number: int) -> float:
        return 1e-2 / (1 + number / 20)

    model = Sorter()
    other = copy.deepcopy(model)
    expected, expected_average = by_hand(
        other, adamw(other), 60, T=T, decay=0.9, schedule=schedule, autocast=autocast
    )
    optimizer = adamw(model)
    average = ParameterAverage(model.parameters(), 0.9)
    cache = recorded() if captured else GraphCache()
    step = step_of(
        model,
        optimizer,
        T=T,
        average=average,
        cache=cache,
        capture=captured,
        autocast_dtype=torch.bfloat16 if autocast else None,
    )
    stream, losses = batches(), []
    for number in range(60):
        for group in optimizer.param_groups:
            group["lr"].fill_(schedule(number))
        step(*next(stream))
        losses += [window.values["loss"] for window in step.poll()]
    assert losses == expected
    assert_same(model, other)
    for ours, theirs in zip(average.averages, expected_average, strict=True):
        assert torch.equal(ours, theirs)
    status = cache.status()
    assert (status.captures, status.replays) == ((1, 57) if captured else (0, 0))
    assert status.fallbacks == ({"warming up for a capture": 3} if captured else {})


def test_a_thousand_steps_equal_a_handwritten_loop() -> None:
    model = Sorter()
    model.net = MeanNetwork()  # type: ignore[assignment]
    other = copy.deepcopy(model)
    expected, _ = by_hand(other, adamw(other, 3e-3), 1000, n=1)
    losses = train(step_of(model, adamw(model, 3e-3), n=1, cache=recorded()), 1000)
    assert losses == expected
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50]), (
        "the model must learn, otherwise agreement is meaningless"
    )
    assert_same(model, other)


@pytest.mark.parametrize("T", [1, 2])
def test_every_parameter_that_can_gets_a_gradient(T: int) -> None:
    model = Sorter()
    before = copy.deepcopy(model)
    train(step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), T=T, capture=False), 3)
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        # The T - 1 recursions hide the initial states.
        assert torch.equal(ours, theirs) == (name == "start" and T > 1), name
        assert ours.grad is None


def test_by_default_x_is_the_batch_and_states_start_from_zero() -> None:
    net = TinyRecursiveNetwork(WIDTH, 1, 2, backend="eager")
    other = copy.deepcopy(net)
    x, target = torch.randn(2, 3, 4, WIDTH).unbind()

    def loss(y: Tensor, z: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (y - target).square().mean(), {}

    step = TrainingStep(net, loss, torch.optim.SGD(net.parameters(), lr=1e-3), n=1, T=1, capture=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    for _ in range(3):
        y = z = torch.zeros_like(x)
        step.restart()
        for _ in range(2):
            step(x, target)
            y, z = deep_recursion(other, x, y.detach(), z.detach(), 1, 1)
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
        assert step.carry.y is not None and torch.equal(step.carry.y, y.detach())
        assert step.carry.steps.tolist() == [2, 2, 2]
    assert_same(net, other)


def test_several_supervision_steps_average_their_gradients() -> None:
    model = Sorter()
    other = copy.deepcopy(model)
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), supervision_steps=3, capture=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    data = next(batches())
    step(*data)
    x, losses = other.embed(*data), []
    y, z = (s.expand_as(x) for s in other.initial(x))
    for _ in range(3):
        y, z = deep_recursion(
            other.net, other.embed(*data), y, z, 2, 2, mask=data[2], output_norm=other.output_norm
        )
        loss = other.loss(y, z, *data)[0]
        (loss / 3).backward()
        y, z = y.detach(), z.detach()
        losses.append(loss.item())
    nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    optimizer.step()
    (window,) = step.poll()
    assert window.values["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)
    assert step.carry.steps.tolist() == [3] * BATCH


# Graphs.


def test_each_shape_has_its_graph_and_its_samples() -> None:
    model, cache = Sorter(), recorded()
    step = step_of(model, adamw(model), cache=cache)
    long, short = batches(length=6), batches(length=3)
    for _ in range(5):
        step(*next(long))
        assert step.carry.y is not None and step.carry.y.shape == (BATCH, 6, WIDTH)
        step(*next(short))
        assert step.carry.y is not None and step.carry.y.shape == (BATCH, 3, WIDTH)
    assert cache.status().captures == 2


def test_an_evicted_step_continues_with_its_samples() -> None:
    model = Sorter()
    other = copy.deepcopy(model)
    streams = [batches(length=6), batches(length=3)]
    plain, cache = step_of(other, adamw(other), capture=False), recorded(max_graphs=1)
    step = step_of(model, adamw(model), cache=cache)
    for which in [0] * 5 + [1] * 5 + [0, 1] * 4:
        data = next(streams[which])
        step(*data)
        plain(*data)
    assert cache.status().evictions > 0
    assert_same(model, other)


def test_changes_to_fixed_values_are_captured_again() -> None:
    model, cache = Sorter(), recorded()
    optimizer = adamw(model)
    step = step_of(model, optimizer, cache=cache)
    stream = batches()
    changes: list[Callable[[], Any]] = [
        lambda: optimizer.param_groups[0].update(weight_decay=0.1),
        lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda: model.head.weight.requires_grad_(False),
        lambda: model.eval(),
        lambda: setattr(step, "clip_norm", 2.0),
    ]
    for number, change in enumerate([lambda: None, *changes], start=1):
        change()
        for _ in range(5):
            step(*next(stream))
        assert cache.status().captures == number


def test_a_failed_capture_trains_on() -> None:
    model = Sorter()
    other = copy.deepcopy(model)
    expected, _ = by_hand(other, adamw(other), 10)
    cache = recorded()
    capturer = cache.capturer
    assert isinstance(capturer, RecordingCapturer)
    capturer.failure = RuntimeError("not permitted")
    with pytest.warns(GraphFallbackWarning, match="not permitted"):
        losses = train(step_of(model, adamw(model), cache=cache), 10)
    assert losses == expected
    assert_same(model, other)
    assert list(cache.status().fallbacks.values()) == [3, 7]


def test_a_batch_is_written_after_streams_are_ordered() -> None:
    """A replay on another stream may still read the previous batch."""
    seen: list[Tensor] = []

    class Ordering(RecordingCapturer):
        def order(self, device: torch.device) -> None:
            seen.append(fresh().clone())

    model = Sorter()
    step = step_of(model, adamw(model), cache=GraphCache(capturer=Ordering(traced=False)), warmup=1)

    def fresh() -> Tensor:
        (program,) = step._programs.values()
        assert program.fresh[0] is not None
        return program.fresh[0]

    given = [batch[0] for batch, _ in zip(batches(), range(4), strict=False)]
    train(step, 4)
    assert len(seen) == 4, "warm-up and replays alike"
    assert all(torch.equal(found, earlier) for found, earlier in zip(seen[1:], given, strict=False))


def test_lengths_that_a_graph_would_fix_are_rejected() -> None:
    """A later batch may have more rows, which would be lost."""
    model = Sorter()
    capturer = RecordingCapturer(traced=False)
    step = TrainingStep(
        model.net,
        model.loss,
        adamw(model),
        n=1,
        T=1,
        embed=model.embed,
        mask=lambda tokens, labels, mask: Packing.of(mask, lengths=mask.sum(1).int().tolist()),
        modules=[model],
        cache=GraphCache(capturer=capturer),
    )
    step(*next(batches()))
    capturer.is_capturing = True
    with pytest.raises(CaptureError, match="would fix the lengths of one batch"):
        step(*next(batches()))


def _not_capturable(model: Sorter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), fused=True)


def _number(model: Sorter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)


def _optimizer_hook(model: Sorter) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def _gradient_hook(model: Sorter) -> torch.optim.Optimizer:
    model.head.weight.register_hook(lambda grad: None)
    return adamw(model)


def _accumulation_hook(model: Sorter) -> torch.optim.Optimizer:
    model.head.weight.register_post_accumulate_grad_hook(lambda grad: None)
    return adamw(model)


def _module_hook(model: Sorter) -> torch.optim.Optimizer:
    model.net.register_forward_hook(lambda *_: None)
    return adamw(model)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_not_capturable, "without capturable=True"),
        (_number, "learning rate is not a tensor"),
        (_optimizer_hook, "the optimizer has hooks"),
        (_gradient_hook, "gradient hooks"),
        (_accumulation_hook, "gradient hooks"),
        (_module_hook, "a TinyRecursiveNetwork has hooks"),
    ],
)
def test_steps_that_cannot_be_captured_run_and_report_it(
    build: Callable[[Sorter], torch.optim.Optimizer], reason: str
) -> None:
    model, cache = Sorter(), recorded()
    step = step_of(model, build(model), cache=cache)
    with pytest.warns(GraphFallbackWarning, match=reason):
        assert len(train(step, 4)) == 4
    assert list(cache.status().fallbacks.values()) == [4]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, cache = Sorter(), recorded()
    with pytest.warns(GraphFallbackWarning, match="several processes"):
        train(step_of(model, adamw(model), cache=cache), 2)


def test_a_module_that_communicates_is_refused() -> None:
    model, cache = Sorter(), recorded()
    model.register_module("parallel", nn.DataParallel(nn.Linear(1, 1)))
    with pytest.warns(GraphFallbackWarning, match="a DataParallel communicates"):
        train(step_of(model, adamw(model), cache=cache), 2)


def test_reduced_gradients_are_clipped_and_applied() -> None:
    model = Sorter()
    twin = copy.deepcopy(model)
    norms = []

    def halve(gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            gradient.mul_(0.5)

    for trained, reduce, lr in ((model, halve, 0.2), (twin, None, 0.1)):
        optimizer = torch.optim.SGD(trained.parameters(), lr)
        step = step_of(trained, optimizer, clip_norm=1e9, reduce=reduce, capture=False)
        step(*next(batches()))
        norms.append(step.drain()[0].values["grad_norm"])
    assert norms[0] == pytest.approx(norms[1] / 2)
    for halved, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(halved, plain)


def test_a_step_that_reduces_gradients_is_not_captured() -> None:
    model, cache = Sorter(), recorded()
    with pytest.warns(GraphFallbackWarning, match="reduces gradients"):
        train(step_of(model, adamw(model), cache=cache, reduce=lambda gradients: None), 2)
    assert list(cache.status().fallbacks.values()) == [2]


def test_a_step_without_capture_does_not_warn() -> None:
    model = Sorter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(step_of(model, adamw(model), capture=False), 2)


def test_replays_call_global_post_hooks() -> None:
    model, cache = Sorter(), recorded()
    optimizer, heard = adamw(model), []
    handle = register_optimizer_step_post_hook(lambda which, *_: heard.append(which))
    try:
        step = step_of(model, optimizer, cache=cache)
        train(step, 8)
    finally:
        handle.remove()
    assert cache.status().replays == 5
    # Unlike CUDA, the double runs the optimizer's Python code in a replay: 8 calls and 5 hook calls.
    assert heard == [optimizer] * 13


def test_a_step_reads_nothing_on_the_host() -> None:
    model = Sorter()
    # If lr is a tensor, torch's CPU kernel reads it; the CUDA kernel does not.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = step_of(
        model,
        optimizer,
        average=ParameterAverage(model.parameters()),
        autocast_dtype=torch.bfloat16,
        skip_nonfinite=True,
        exploration=0.5,
        supervision_steps=2,
        capture=False,
    )
    data = next(batches())
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        model.loss(torch.zeros(BATCH, LENGTH, WIDTH), torch.zeros(()), *data)[0].item()
    with NoHostReads():
        for _ in range(8):
            step(*data)
    assert len(step.drain()) == 8


# Options.


def test_an_update_with_a_gradient_that_is_not_finite_is_skipped() -> None:
    model = Sorter()
    optimizer = adamw(model)
    bad = torch.zeros(())

    def loss(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        value, metrics, halt = model.loss(*arguments)
        return value + bad * value, metrics, halt

    step = TrainingStep(
        model.net,
        loss,
        optimizer,
        n=1,
        T=1,
        embed=model.embed,
        clip_norm=1.0,
        skip_nonfinite=True,
        read_every=1,
        modules=[model],
        cache=recorded(),
    )
    stream = batches()
    for _ in range(4):
        step(*next(stream))
    before, counts = copy.deepcopy(model), optimizer.state[model.head.weight]["step"].clone()
    bad.fill_(torch.inf)
    step(*next(stream))
    assert_same(model, before)
    assert torch.equal(optimizer.state[model.head.weight]["step"], counts)
    bad.zero_()
    step(*next(stream))
    assert not torch.equal(model.head.weight, before.head.weight)
    assert [window.values["skipped"] for window in step.poll()] == [0.0] * 4 + [1.0, 0.0]


def test_metrics_come_in_windows() -> None:
    model = Sorter()
    step = step_of(model, adamw(model), read_every=3, capture=False)
    every = step_of(copy.deepcopy(model), adamw(model), read_every=1, capture=False)
    del every
    stream, windows = batches(), []
    for _ in range(7):
        step(*next(stream))
        windows += step.poll()
    assert [(window.step, window.steps) for window in windows] == [(3, 3), (6, 3)]
    (last,) = step.drain()
    assert (last.step, last.steps) == (7, 1)
    assert set(last.values) == {"loss", "accuracy", "halted", "grad_norm"}
    assert not step.poll() and not step.drain()


def test_windows_contain_means() -> None:
    buffer = MetricBuffer(read_every=2)
    for value in (1.0, 3.0, 10.0):
        buffer.add({"a": torch.tensor(value), "b": torch.tensor([2 * value], dtype=torch.float64)})
        buffer.count_step()
    assert [window.values for window in buffer.poll()] == [{"a": 2.0, "b": 4.0}]
    assert [window.values for window in buffer.drain()] == [{"a": 10.0, "b": 20.0}]
    with pytest.raises(ValueError, match=r"must be \['a', 'b'\]"):
        buffer.add({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="read_every"):
        MetricBuffer(0)


def test_exploration_keeps_samples_beyond_their_first_step() -> None:
    model = Sorter()
    step = step_of(model, adamw(model), exploration=1.0, capture=False)
    train(step, 3)
    assert step.carry.steps.tolist() == [3] * BATCH or step.carry.steps.max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autocast_dtype": torch.float16}, "bfloat16"),
        ({"supervision_steps": 0}, "supervision_steps"),
        ({"warmup": 0}, "warmup"),
        ({"exploration": 0.1, "max_steps": None}, "set max_steps"),
        ({"read_every": 0}, "read_every"),
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    model = Sorter()
    with pytest.raises(ValueError, match=message):
        step_of(model, adamw(model), **options)


def test_skipping_needs_a_fused_optimizer() -> None:
    model = Sorter()
    with pytest.raises(ValueError, match="fused=True"):
        step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), skip_nonfinite=True)


def test_the_average_follows_and_can_be_applied() -> None:
    linear = nn.Linear(2, 2)
    average = ParameterAverage(linear.parameters(), 0.75)
    start = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight.add_(4.0)
    average.update()
    torch.testing.assert_close(average.averages[0], start + 1.0)
    address = linear.weight.data_ptr()
    with average.applied():
        assert torch.equal(linear.weight, average.averages[0]) and linear.weight.data_ptr() == address
    torch.testing.assert_close(linear.weight.detach(), start + 4.0)
    other = ParameterAverage(linear.parameters(), 0.5)
    other.load_state_dict(average.state_dict())
    assert other.decay == 0.75 and torch.equal(other.averages[0], average.averages[0])
    with pytest.raises(ValueError, match="decay"):
        ParameterAverage(linear.parameters(), 1.0)


def test_the_average_of_bfloat16_parameters_does_not_round_away() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = ParameterAverage([parameter], 0.999)
    parameter.data.fill_(2.0)
    for _ in range(100):
        average.update()
    assert average.averages[0].item() == pytest.approx(2.0 - 0.999**100, rel=1e-4)
    average.copy_to()
    assert parameter.item() == pytest.approx(1.095, rel=1e-2)


def test_capturable_adamw_accepts_groups() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = capturable_adamw(
        [{"params": one.parameters()}, {"params": two.parameters(), "lr": 0.5}], lr=0.25, weight_decay=0.1
    )
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.5]
    assert all(group["fused"] and group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["lr"] is not optimizer.param_groups[1]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
    address = optimizer.param_groups[1]["lr"].data_ptr()
    for parameter in (*one.parameters(), *two.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.125, 0.25]
    assert optimizer.param_groups[1]["lr"].data_ptr() == address
    assert len(capturable_adamw(one.parameters(), 0.1).param_groups) == 1
    with pytest.raises(ValueError, match="no parameters"):
        capturable_adamw([], 0.1)


# On a GPU.


def gpu_train(
    model: Sorter, steps: int, *, capture: bool, T: int = 2, **options: Any
) -> tuple[list[float], GraphCache]:
    cache = GraphCache()
    average = ParameterAverage(model.parameters(), 0.99)
    step = step_of(
        model,
        capturable_adamw(model.parameters(), 3e-3),
        T=T,
        average=average,
        capture=capture,
        cache=cache,
        **options,
    )
    # The backward of other attention kernels may sum in a different order in each run.
    with sdpa_kernel(SDPBackend.MATH):
        return train(step, steps, batches("cuda")), cache


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gpu_a_thousand_captured_steps_follow_the_plain_ones(backend: str) -> None:
    model = Sorter(width=32, backend=backend).cuda()
    other = copy.deepcopy(model)
    plain, _ = gpu_train(other, 1000, capture=False)
    captured, cache = gpu_train(model, 1000, capture=True)
    status = cache.status()
    assert (status.captures, status.replays) == (1, 997)
    assert status.fallbacks == {"warming up for a capture": 3}
    assert sum(plain[-50:]) < 0.7 * sum(plain[:50]), (
        "the model must learn, otherwise agreement is meaningless"
    )
    assert captured == plain
    assert_same(model, other)
    cache.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gpu_dropout_in_captured_steps_follows_the_generator(backend: str) -> None:
    model = Sorter(width=32, dropout=0.2, backend=backend).cuda()
    other = copy.deepcopy(model)
    torch.cuda.manual_seed(5)
    plain, _ = gpu_train(other, 30, capture=False)
    torch.cuda.manual_seed(5)
    captured, cache = gpu_train(model, 30, capture=True)
    assert captured == plain
    assert_same(model, other)
    cache.clear()


@pytest.mark.gpu
def test_gpu_captured_steps_under_autocast_with_all_options() -> None:
    options = {
        "autocast_dtype": torch.bfloat16,
        "skip_nonfinite": True,
        "exploration": 0.2,
        "supervision_steps": 2,
    }
    runs = []
    start = Sorter(width=32, backend=None).cuda()
    for capture in (False, True, True):
        model = copy.deepcopy(start)
        torch.cuda.manual_seed(5)
        losses, cache = gpu_train(model, 40, capture=capture, **options)
        assert not set(cache.status().fallbacks) - {"warming up for a capture"}
        runs.append((losses, model))
        cache.clear()
    for losses, model in runs[1:]:
        assert losses == runs[0][0]
        assert_same(model, runs[0][1])


@pytest.mark.gpu
def test_gpu_the_steady_state_never_waits() -> None:
    model = Sorter(width=32, backend=None).cuda()
    optimizer = capturable_adamw(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
    average = ParameterAverage(model.parameters())
    cache = GraphCache()
    step = step_of(
        model, optimizer, average=average, cache=cache, read_every=4, skip_nonfinite=True, exploration=0.1
    )
    stream = batches("cuda")
    data = [next(stream) for _ in range(30)]
    windows = []
    for number, batch in enumerate(data):
        if number == 10:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(*batch)
            windows += step.poll()
            optimizer.param_groups[0]["lr"].mul_(0.99)
        except RuntimeError:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")
    scheduler.step()
    windows += step.drain()
    assert sum(window.steps for window in windows) == 30
    assert cache.status().captures == 1
    cache.clear()


@pytest.mark.gpu
def test_gpu_weights_written_between_steps_are_seen() -> None:
    model = Sorter(width=32, backend=None).cuda()
    start = copy.deepcopy(model.state_dict())
    cache = GraphCache()
    step = step_of(model, capturable_adamw(model.parameters(), 0.0), cache=cache, max_steps=1)
    data = next(batches("cuda"))
    for _ in range(6):
        step(*data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    step(*data)
    model.load_state_dict(start)
    step(*data)
    *_, before, changed, after = (window.values["loss"] for window in step.drain())
    assert changed != before and after == before
    assert cache.status().captures == 1
    cache.clear()


@pytest.mark.gpu
def test_gpu_inference_after_captured_steps_sees_the_new_weights() -> None:
    """Caches of inference must not survive a replayed step."""
    model = Sorter(width=32, backend="triton").cuda()
    cache = GraphCache()
    step = step_of(model, capturable_adamw(model.parameters(), 1e-2), cache=cache)
    stream = batches("cuda")
    x = torch.randn(2, 6, 32, device="cuda")
    for number in range(10):
        step(*next(stream))
        with torch.no_grad():
            found = model.net(x)
            expected = copy.deepcopy(model.net)(x)
        assert torch.equal(found, expected), number
    cache.clear()
