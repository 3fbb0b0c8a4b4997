"""What is done on a GPU, in which order, and how long it may take.

A machine is lent for 15 minutes. The first plan asks whether it is right, how fast it is, and what tuning
brings; the second runs the device tests and what users type, and does not depend on the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_trm.benchmark.suites import Group, suite
from llm_trm.benchmark.workloads import Case, Mode

#: Rows of the first plan: the baselines, and what is shipped. The others are measured where time is left.
SHIPPED = ("eager", "compile", "triton", "eager+graph", "compile+graph", "triton+graph")
#: After tuning: only what a table changes, beside the one that all are held to.
TUNED = ("eager", "triton", "triton+graph")


@dataclass(frozen=True)
class Task:
    """One thing to do in a child process.

    Attributes:
        name: What results call it; one of a plan.
        kind: Which function of ``child.py`` does it.
        argument: What that function is given; plain values.
        seconds: Most that it may take, where its stage has more.
        least: With less left in its stage it is not begun.
    """

    name: str
    kind: str
    argument: dict[str, Any]
    seconds: float
    least: float


@dataclass(frozen=True)
class Stage:
    """Tasks that share an end.

    Attributes:
        until: Seconds after the plan's beginning at which all of them have ended, whatever happens. What an
            earlier stage leaves is this one's.
        processes: Child processes at a time.
        alone: Whether each task has a process of its own; else one process takes them in turn.
        stops: Whether a task that fails ends the plan after its stage.
    """

    name: str
    until: float
    tasks: tuple[Task, ...]
    processes: int = 1
    alone: bool = False
    stops: bool = False


@dataclass(frozen=True)
class Plan:
    """Stages in order, and the wall-clock seconds after which nothing of it runs any more."""

    stages: tuple[Stage, ...]
    wall: float

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, in order."""
        return tuple(task for stage in self.stages for task in stage.tasks)


def measured(
    case: Case,
    names: tuple[str, ...] | None = None,
    *,
    group: Group = "main",
    seconds: float,
    least: float = 12.0,
    timed: float = 2.0,
    tuned: bool = False,
) -> Task:
    """A case of the benchmark.

    Args:
        names: Its rows; None for all of the group's.
        timed: Seconds of timed rounds.
        tuned: Whether it is measured again on the tables that the plan has made: its result goes to a file of
            its own, as it has few rows and would hide the first one.
    """
    argument = {
        "case": case.to_json(),
        "group": group,
        "names": names,
        "timed": timed,
        "tuned": tuned,
    }
    title = case.name if group == "main" else f"{group}: {case.name}"
    return Task(f"{title}, tuned" if tuned else title, "case", argument, seconds, least)


def excludable(task: Task, step: str) -> bool:
    """Whether ``step`` of a task is a candidate that it can go on without."""
    if task.kind != "case" or step == "eager":  # all others are held to eager
        return False
    names = task.argument["names"]
    return step in names if names else step not in ("float64", task.name) and not step.startswith("timing")


def _cases(name: str, mode: Mode, dtype: str = "bfloat16") -> list[Case]:
    return suite(name, "cuda", dtype, (mode,))


def _forward() -> list[Case]:
    return [*_cases("phase2", "forward"), *_cases("latents", "forward"), *_cases("paper", "forward")]


def _steps() -> list[Case]:
    phase2_8, phase2_32, paper = _cases("train", "step")
    return [paper, phase2_8, phase2_32]


#: The names of ``smoke.CHECKS``: its imports are the children's, as a supervisor must hold no CUDA context.
CHECKS = (
    "seed",
    "paper",
    "paper-tokens",
    "scratch",
    "scratch-tokens",
    "inference",
    "autocast",
    "output norm",
    "masked",
    "packed",
    "dropout",
    "fp8",
    "graph",
    "training",
    "repeats",
)

#: Without it nothing is known of the device, and nothing is measured.
PROBE = "probe"
#: A machine that was just started reads torch from its disk for the first time.
_FIRST_IMPORT = 90.0
_PROBE = Stage(PROBE, _FIRST_IMPORT, (Task(PROBE, "probe", {}, _FIRST_IMPORT, 1.0),), stops=True)

FIRST = Plan(
    (
        _PROBE,
        Stage(
            "smoke",
            130.0,
            tuple(Task(f"smoke: {name}", "smoke", {"check": name}, 30.0, 5.0) for name in CHECKS),
            processes=5,
            alone=True,
            stops=True,
        ),
        Stage("forward", 180.0, tuple(measured(case, SHIPPED, seconds=25.0) for case in _forward())),
        Stage("steps", 275.0, tuple(measured(case, SHIPPED, seconds=50.0, least=15.0) for case in _steps())),
        Stage(
            "tune",
            360.0,
            (
                Task(
                    "tune",
                    "tune",
                    {"cases": [case.to_json() for case in (*_cases("latents", "forward"), *_forward())]},
                    100.0,
                    15.0,
                ),
            ),
        ),
        Stage(
            "tuned",
            405.0,
            tuple(measured(case, TUNED, seconds=12.0, least=5.0, tuned=True) for case in _forward()),
        ),
        Stage(
            "trainer", 460.0, (Task("puzzle trainer", "puzzle", {"case": 0, "seconds": 15.0}, 55.0, 25.0),)
        ),
    ),
    wall=470.0,
)

#: Device tests, most telling first: what only a GPU shows, then the tolerance grids of the kernels.
TEST_FILES = (
    "tests/test_races.py",
    "tests/test_streams.py",
    "tests/test_frozen.py",
    "tests/test_weight_changes.py",
    "tests/test_graphs.py",
    "tests/test_training.py",
    "tests/test_halting.py",
    "tests/puzzle/test_optimizers.py",
    "tests/puzzle/test_augment.py",
    "tests/benchmark/test_candidates.py",
    "tests/test_fused_recursion.py",
    "tests/ops/test_recursion_op.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_weight_gradient.py",
    "tests/test_fp8.py",
    "tests/test_fused.py",
)


def _command(name: str, *arguments: str, seconds: float, least: float) -> Task:
    return Task(f"command: {name}", "command", {"arguments": list(arguments)}, seconds, least)


SECOND = Plan(
    (
        _PROBE,
        Stage("tests", 125.0, (Task("tests", "tests", {"files": TEST_FILES}, 115.0, 20.0),)),
        Stage(
            "commands",
            185.0,
            (
                # Without a budget it would compile for a minute a case.
                _command(
                    "llm-trm bench",
                    *("llm_trm", "bench", "--latents", "256", "--hidden-size", "256", "--budget", "16"),
                    seconds=28.0,
                    least=20.0,
                ),
                Task("phase 2", "phase2", {}, 30.0, 10.0),
                Task("SmolLM3-3B", "smollm3", {}, 45.0, 15.0),
            ),
            alone=True,
        ),
        Stage(
            "rest",
            235.0,
            (
                Task("puzzle trainer", "puzzle", {"case": 0, "seconds": 15.0}, 45.0, 25.0),
                Task("trainer", "trainer", {"case": 0, "seconds": 10.0}, 45.0, 25.0),
                *(measured(case, SHIPPED, seconds=25.0) for case in _steps()),
                *(measured(case, seconds=45.0, timed=3.0) for case in _forward()),
                *(
                    measured(case, seconds=60.0, timed=3.0)
                    for name in ("phase2", "paper", "latents")
                    for case in _cases(name, "train")
                ),
                *(
                    measured(case, group="peers", seconds=120.0, timed=3.0)
                    for case in suite("peers", "cuda", "bfloat16")
                ),
                *(
                    measured(case, group="scaling", seconds=45.0, timed=3.0)
                    for case in suite("scaling", "cuda", "bfloat16")
                ),
                *(
                    measured(case, seconds=60.0, timed=3.0)
                    for dtype in ("float32", "float16")
                    for name in ("phase2", "paper", "latents")
                    for mode in ("forward", "train")
                    for case in _cases(name, mode, dtype)
                ),
            ),
        ),
    ),
    wall=240.0,
)

PLANS = {"first": FIRST, "second": SECOND}


def within(plan: Plan, wall: float) -> Plan:
    """The plan within ``wall`` seconds: stages end at it at the latest, and the last one lasts until then."""
    *stages, last = plan.stages
    cut = [replace(stage, until=min(stage.until, wall)) for stage in stages]
    return Plan((*cut, replace(last, until=wall)), wall)
