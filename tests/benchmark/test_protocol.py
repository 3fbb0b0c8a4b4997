"""Tests of timing candidates: interleaved, within a budget, and robust to failures."""

from __future__ import annotations

import pytest

from llm_trm.benchmark.protocol import MIN_ROUNDS, Call, Timing, interleave
from llm_trm.benchmark.runner import Budget


class FakeMachine:
    """A clock that candidates advance; with ``pace`` the machine becomes slower over time."""

    def __init__(self, pace: float = 0.0) -> None:
        self.now = 0.0
        self.pace = pace
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float) -> Call:
        def call(i: int) -> None:
            self.order.append(name)
            self.now += seconds * (1.0 + self.pace * self.now)

        return call

    def timer(self, call: Call, first: int, count: int) -> float:
        begin = self.now
        for i in range(first, first + count):
            call(i)
        return (self.now - begin) / count


def test_candidates_take_turns_and_the_first_place_rotates() -> None:
    machine = FakeMachine()
    costs = {"a": 1.0, "b": 2.0, "c": 3.0}
    calls = {name: machine.candidate(name, cost) for name, cost in costs.items()}
    timings, failures = interleave(calls, machine.timer, costs, budget=18.0, clock=machine.clock)
    assert not failures
    assert "".join(machine.order) == "abc" + "bca" + "cab"
    assert {name: timing.samples for name, timing in timings.items()} == {
        name: (cost,) * 3 for name, cost in costs.items()
    }


def test_drift_of_the_machine_affects_all_candidates() -> None:
    machine = FakeMachine(pace=0.02)  # three times slower at the end than at the start
    calls = {name: machine.candidate(name, 1.0) for name in ("a", "b")}
    timings, _ = interleave(calls, machine.timer, {"a": 1.0, "b": 1.0}, budget=100.0, clock=machine.clock)
    assert len(timings["a"].samples) > 10
    assert timings["a"].samples[-1] > 2 * timings["a"].samples[0]
    assert timings["a"].median == pytest.approx(timings["b"].median, rel=0.05)


def test_rounds_stop_at_the_budget_but_never_below_the_least() -> None:
    machine = FakeMachine()
    calls = {"slow": machine.candidate("slow", 50.0)}
    timings, _ = interleave(calls, machine.timer, {"slow": 50.0}, budget=1.0, clock=machine.clock)
    assert len(timings["slow"].samples) == MIN_ROUNDS
    quick = {"quick": machine.candidate("quick", 1.0)}
    timings, _ = interleave(
        quick, machine.timer, {"quick": 1.0}, budget=1e9, clock=machine.clock, max_rounds=7
    )
    assert len(timings["quick"].samples) == 7


def test_quick_candidates_are_repeated_within_a_sample_and_warmed() -> None:
    machine = FakeMachine()
    calls = {"quick": machine.candidate("quick", 1e-4)}
    timings, _ = interleave(
        calls, machine.timer, {"quick": 1e-4}, budget=10.0, clock=machine.clock, max_rounds=5
    )
    assert len(machine.order) == 20 * (1 + 5)
    assert timings["quick"].median == pytest.approx(1e-4)


def test_inputs_rotate_through_all_rounds() -> None:
    seen: list[int] = []
    interleave({"a": seen.append}, FakeMachine().timer, {"a": 1.0}, budget=0.0, clock=lambda: 0.0)
    assert seen == list(range(MIN_ROUNDS))


def test_candidate_that_fails_in_timing_does_not_affect_others() -> None:
    machine = FakeMachine()

    def fails(i: int) -> None:
        raise RuntimeError("gone")

    timings, failures = interleave(
        {"bad": fails, "good": machine.candidate("good", 1.0)},
        machine.timer,
        {"bad": 1.0, "good": 1.0},
        budget=5.0,
        clock=machine.clock,
    )
    assert list(timings) == ["good"]
    assert str(failures["bad"]) == "gone"


def test_quantiles() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert timing.median == 3.5
    assert timing.p20 == 2.0
    assert timing.p80 == 5.0
    assert Timing((7.0,)).p80 == 7.0


def test_budget_rejects_work_that_does_not_fit() -> None:
    now = [0.0]
    budget = Budget(100.0, 5.0, clock=lambda: now[0])
    assert budget.refuses(99.0) is None
    now[0] = 95.0
    assert budget.refuses(4.0) is None
    reason = budget.refuses(20.0)
    assert reason is not None
    assert "20 s" in reason
    assert "5 s of --budget 100" in reason
