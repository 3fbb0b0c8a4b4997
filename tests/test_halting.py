"""Per-sample halting: compaction changes no result, and the carry matches the paper's code."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from trm_kernels import AsyncCount, Carry, GraphCache, TinyRecursiveNetwork, deep_recursion, halting_recursion
from trm_kernels.carry import exploration_steps
from trm_kernels.graphs import eighths, graphed, multiple_of, power_of_two
from trm_kernels.host_reads import HostReads


def test_counts_come_one_push_late() -> None:
    count = AsyncCount()
    assert [count.push(torch.tensor(value)) for value in (5, 3, 0)] == [None, 5, 3]
    assert count.last() == 0 and count.last() is None


def test_a_count_has_its_value_at_push_time() -> None:
    count, value = AsyncCount(), torch.tensor(5)
    count.push(value)
    value.zero_()
    assert count.push(value) == 5


def test_reads_keep_order_and_tags() -> None:
    reads = HostReads()
    for number in range(3):
        reads.push(torch.full((2,), float(number)), tag=number)
    assert reads.take()[0] == 0
    assert [(tag, values.tolist()) for tag, values in reads.poll()] == [(1, [1.0, 1.0]), (2, [2.0, 2.0])]
    assert not reads.poll() and not reads.drain() and len(reads) == 0


def elementwise_step(x: Tensor, y: Tensor, limit: Tensor, count: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Compute each row independently of the batch size; a row halts when its count reaches its limit."""
    y = torch.sin(3.0 * y + x) + 0.25 * y
    return {"y": y, "count": count + 1}, count + 1 >= limit


@given(
    limits=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    max_steps=st.integers(1, 10),
    bucket=st.sampled_from([power_of_two, eighths, multiple_of(3)]),
)
def test_compaction_changes_no_bit(limits: list[int], max_steps: int, bucket: object) -> None:
    batch = len(limits)
    x, y = torch.randn(2, batch, 3, 2).unbind()
    state = {"x": x, "y": y, "limit": torch.tensor(limits), "count": torch.zeros(batch, dtype=torch.int64)}
    before = {name: member.clone() for name, member in state.items()}
    plain = halting_recursion(elementwise_step, state, max_steps, compact=False)
    compacted = halting_recursion(elementwise_step, state, max_steps, bucket=bucket)  # type: ignore[arg-type]
    expected = torch.tensor(limits).clamp(max=max_steps).to(torch.int32)
    for result in (plain, compacted):
        assert torch.equal(result.exit_steps, expected)
        assert torch.equal(result.halted, torch.tensor(limits) <= max_steps)
        assert torch.equal(result.state["count"], expected.long())
    for name, member in plain.state.items():
        assert torch.equal(compacted.state[name], member), name
    for name, member in before.items():
        assert torch.equal(state[name], member), "the caller's tensors are unchanged"
    # Step a single row by hand.
    row = int(torch.randint(batch, ()))
    alone = y[row]
    for _ in range(int(expected[row])):
        alone = torch.sin(3.0 * alone + x[row]) + 0.25 * alone
    assert torch.equal(compacted.state["y"][row], alone)
    assert len(plain.calls) == len(compacted.calls) and sum(compacted.calls) <= sum(plain.calls)


def test_compaction_saves_work_one_step_late() -> None:
    limits = torch.tensor([1, 9, 1, 3, 1, 3, 1, 1])
    state = {
        "x": torch.zeros(8, 1),
        "y": torch.zeros(8, 1),
        "limit": limits,
        "count": torch.zeros(8, dtype=torch.int64),
    }
    result = halting_recursion(elementwise_step, state, 20)
    # Five halt at step 1, which the host knows after step 2; the remaining three fit into 4; one runs from
    # step 3 on.
    assert result.calls == (8, 8, 4, 4, 1, 1, 1, 1, 1, 1)
    assert result.exit_steps.tolist() == limits.tolist()


def test_a_batch_that_halts_together() -> None:
    def step(y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"y": y + 1.0}, (y.mean() > 1.5).expand(len(y))

    result = halting_recursion(step, {"y": torch.tensor([0.0, 1.0, 2.0])}, 10)
    assert result.exit_steps.tolist() == [2, 2, 2]
    assert result.state["y"].tolist() == [2.0, 3.0, 4.0]


def test_states_may_change_their_dtype() -> None:
    def step(y: Tensor, limit: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"y": y.double() + 1.0}, y[:, 0] + 1.0 >= limit

    state = {"y": torch.zeros(4, 1), "limit": torch.tensor([1.0, 2.0, 5.0, 1.0])}
    result = halting_recursion(step, state, 9)
    assert result.state["y"].dtype == torch.float64
    assert result.state["y"][:, 0].tolist() == [1.0, 2.0, 5.0, 1.0]


def test_an_empty_batch_and_refusals() -> None:
    empty = halting_recursion(elementwise_step, {"y": torch.zeros(0, 2)}, 3)
    assert empty.state["y"].shape == (0, 2) and empty.calls == ()
    with pytest.raises(ValueError, match="max_steps"):
        halting_recursion(elementwise_step, {"y": torch.zeros(1, 2)}, 0)
    with pytest.raises(ValueError, match="same batch size"):
        halting_recursion(elementwise_step, {"y": torch.zeros(1, 2), "x": torch.zeros(2, 2)}, 1)
    with pytest.raises(ValueError, match="halting flag"):
        halting_recursion(lambda y: ({}, torch.tensor(True)), {"y": torch.zeros(2, 2)}, 1)
    with pytest.raises(ValueError, match="changed its shape"):
        halting_recursion(lambda y: ({"y": y[:, :1]}, y[:, 0] > 0), {"y": torch.zeros(2, 2)}, 1)


def network_step(net: TinyRecursiveNetwork, run: object) -> object:
    def step(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        y, z = run(x, y, z, mask=mask)  # type: ignore[operator]
        return {"y": y, "z": z}, y[:, 0, 0] > 0.3

    return step


def test_a_network_returns_the_same_exits_and_states(device: str) -> None:
    """Equal within rounding: a matrix product may sum in another order for another batch size."""
    net = TinyRecursiveNetwork(16, 1, 2, backend="eager").eval().to(device)
    norm = torch.nn.RMSNorm(16, device=device)
    x, y, z = torch.randn(3, 12, 5, 16, device=device).unbind()
    mask = torch.ones(12, 5, device=device)
    mask[3:6, 3:] = 0

    def run(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return deep_recursion(net, x, y, z, 2, 2, mask=mask, output_norm=norm, with_gradients=False)

    state = {"x": x, "y": y, "z": z, "mask": mask}
    step = network_step(net, run)
    plain = halting_recursion(step, state, 8, compact=False)  # type: ignore[arg-type]
    compacted = halting_recursion(step, state, 8)  # type: ignore[arg-type]
    assert len(set(plain.exit_steps.tolist())) > 1, "the samples must halt at different steps"
    assert torch.equal(plain.exit_steps, compacted.exit_steps)
    assert torch.equal(plain.halted, compacted.halted)
    for name in ("y", "z"):
        torch.testing.assert_close(plain.state[name], compacted.state[name], rtol=1e-4, atol=1e-5)
    assert sum(compacted.calls) < sum(plain.calls)


@pytest.mark.gpu
def test_gpu_compaction_never_waits_and_replays_graphs() -> None:
    net = TinyRecursiveNetwork(64, 1, 4).eval().cuda()
    norm = torch.nn.RMSNorm(64, device="cuda")
    cache = GraphCache()
    fast = graphed(net, 2, 2, output_norm=norm, cache=cache)
    x, y, z = torch.randn(3, 64, 32, 64, device="cuda").unbind()
    state = {"x": x, "y": y, "z": z, "mask": torch.ones(64, 32, device="cuda")}
    step = network_step(net, fast)
    expected = halting_recursion(step, state, 8, compact=False)  # type: ignore[arg-type]
    halting_recursion(step, state, 8)  # type: ignore[arg-type]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = halting_recursion(step, state, 8)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result.exit_steps, expected.exit_steps)
    torch.testing.assert_close(result.state["y"], expected.state["y"], rtol=1e-3, atol=1e-3)
    assert not cache.status().fallbacks
    cache.clear()


# The carry.


def test_a_carry_refills_only_halted_slots() -> None:
    carry = Carry([torch.zeros(3, 2), None, torch.zeros(3, dtype=torch.int64)])
    assert carry.halted.all()
    first = (torch.ones(3, 2), None, torch.tensor([1, 2, 3]))
    carry.refill(first)
    y, z = carry.states(torch.zeros(3, 1, 2), torch.zeros(3, 1, 2))
    carry.advance(y + 1, z + 2, torch.tensor([False, True, False]), max_steps=3)
    assert carry.steps.tolist() == [1, 1, 1] and carry.halted.tolist() == [False, True, False]
    kept = carry.y
    carry.refill((torch.full((3, 2), 5.0), None, torch.tensor([7, 8, 9])))
    assert carry.data[0] is not None and carry.data[0][:, 0].tolist() == [1.0, 5.0, 1.0]
    assert carry.data[1] is None
    assert carry.data[2] is not None and carry.data[2].tolist() == [1, 8, 3]
    assert carry.steps.tolist() == [1, 0, 1]
    y, z = carry.states(torch.full((3, 1, 2), -1.0), torch.full((3, 1, 2), -2.0))
    assert y[:, 0, 0].tolist() == [1.0, -1.0, 1.0] and z[:, 0, 0].tolist() == [2.0, -2.0, 2.0]
    carry.advance(y, z, max_steps=2)
    assert carry.halted.tolist() == [True, False, True] and carry.steps.tolist() == [2, 1, 2]
    assert carry.y is kept, "the address of states must not change, because graphs use it"
    carry.restart()
    assert carry.halted.all()


def test_gradients_reach_only_the_initial_states_of_new_samples() -> None:
    carry = Carry([torch.zeros(2, 1)])
    carry.advance(torch.ones(2, 1, 2), torch.ones(2, 1, 2), torch.tensor([True, False]))
    initial = torch.zeros(2, 1, 2, requires_grad=True)
    y, _ = carry.states(initial, torch.zeros(2, 1, 2))
    y.sum().backward()
    assert initial.grad is not None and initial.grad[:, 0, 0].tolist() == [1.0, 0.0]
    assert carry.y is not None and not carry.y.requires_grad


@given(seed=st.integers(0, 1000), batch=st.integers(1, 6), max_steps=st.integers(1, 5))
def test_a_carry_loses_and_doubles_no_sample(seed: int, batch: int, max_steps: int) -> None:
    """Compare to a carry of Python lists, sample by sample."""
    generator = torch.Generator().manual_seed(seed)
    carry = Carry([torch.zeros(batch, dtype=torch.int64)])
    slots: list[tuple[int, int] | None] = [None] * batch
    finished: list[tuple[int, int]] = []
    for number in range(12):
        fresh = torch.arange(number * batch, (number + 1) * batch)
        carry.refill([fresh])
        slots = [(int(fresh[i]), 0) if slot is None else slot for i, slot in enumerate(slots)]
        halt = torch.rand(batch, generator=generator) < 0.3
        states = carry.data[0]
        assert states is not None
        carry.advance(states.view(-1, 1, 1).float(), states.view(-1, 1, 1).float(), halt, max_steps=max_steps)
        for i, slot in enumerate(slots):
            assert slot is not None and slot[0] == states[i]
            steps = slot[1] + 1
            done = bool(halt[i]) or steps >= max_steps
            assert steps == carry.steps[i] and done == carry.halted[i]
            if done:
                finished.append((slot[0], steps))
            slots[i] = None if done else (slot[0], steps)
    assert len({sample for sample, _ in finished}) == len(finished)


def test_exploration_makes_samples_continue() -> None:
    steps = exploration_steps(torch.zeros(4000), 6, 0.25)
    drawn = steps[steps > 0]
    assert 0.2 < len(drawn) / 4000 < 0.3
    assert set(drawn.tolist()) == {2, 3, 4, 5, 6}
    carry = Carry([torch.zeros(3)])
    states = torch.zeros(3, 1, 1)
    carry.advance(
        states, states, torch.tensor([True, True, False]), max_steps=4, min_steps=torch.tensor([0, 2, 0])
    )
    assert carry.halted.tolist() == [True, False, False]


def test_samples_with_states_that_are_not_finite_start_again() -> None:
    carry = Carry([torch.zeros(3)])
    y, z = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    y[0, 1, 1], z[2, 0, 0] = torch.nan, torch.inf
    carry.advance(y, z)
    carry.restart_nonfinite()
    assert carry.halted.tolist() == [True, False, True]


def test_a_carry_rejects_mismatched_data() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Carry([None])
    with pytest.raises(ValueError, match="batch sizes"):
        Carry([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="wherever the carry"):
        Carry([torch.zeros(2), None]).refill([torch.zeros(2), torch.zeros(2)])
