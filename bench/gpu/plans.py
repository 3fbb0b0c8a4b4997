"""The tasks on a GPU, their order and time limits.

A machine is available for 15 minutes. The first plan checks correctness, speed and the effect of tuning. The
second plan runs the device tests and users' commands, independently of the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_trm.benchmark.suites import Group, suite
from llm_trm.benchmark.workloads import Case, Mode

#: Rows of the first plan: the baselines and the default backends. Others are measured if time is left.
SHIPPED = ("eager", "compile", "triton", "eager+graph", "compile+graph", "triton+graph")
#: Rows after tuning: only those that a table affects, and the reference.
TUNED = ("eager", "triton", "triton+graph")


@dataclass(frozen=True)
class Task:
    """A task of a child process.

    Attributes:
        name: Name in results, unique within a plan.
        kind: Kind of task, which selects the runner in ``child.py``.
        argument: Argument of the runner, as JSON values.
        seconds: Maximum duration, if its stage has more time.
        least: Minimum remaining time in its stage to start it.
    """

    name: str
    kind: str
    argument: dict[str, Any]
    seconds: float
    least: float


@dataclass(frozen=True)
class Stage:
    """Tasks with a common deadline.

    Attributes:
        until: Hard deadline of all tasks, in seconds after the start of the plan. A stage can use time that
            earlier stages leave.
        processes: Number of parallel child processes.
        alone: Whether each task has its own process; otherwise one process runs them in turn.
        stops: Whether a failed task ends the plan after its stage.
    """

    name: str
    until: float
    tasks: tuple[Task, ...]
    processes: int = 1
    alone: bool = False
    stops: bool = False


@dataclass(frozen=True)
class Plan:
    """Stages in order, and the hard time limit of the plan in wall-clock seconds."""

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
    """A task for a case of the benchmark.

    Args:
        names: Rows to measure; None for all rows of the group.
        timed: Seconds of timed rounds.
        tuned: Whether it is measured again with the plan's tuning tables. Its result goes to a separate file,
            since it has few rows and would hide the first one.
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
    """Whether ``step`` of a task is a candidate that it can continue without."""
    if task.kind != "case" or step == "eager":  # eager is the reference for all others
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


#: The names of ``smoke.CHECKS``, which only children import: a supervisor must not have a CUDA context.
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

#: The task that identifies the device; without it, nothing is measured.
PROBE = "probe"
#: Time limit of the first import on a new machine, which reads torch from a cold disk.
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

#: Device tests, most informative first: those that need a GPU, then the tolerance grids of the kernels.
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
                # Without a budget, it would compile for one minute per case.
                _command(
                    "llm-trm bench",
                    *("llm_trm", "bench", "--latents", "256", "--d-model", "256", "--budget", "16"),
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
    """Limit the plan to ``wall`` seconds: no stage ends later, and the last stage uses all remaining time."""
    *stages, last = plan.stages
    cut = [replace(stage, until=min(stage.until, wall)) for stage in stages]
    return Plan((*cut, replace(last, until=wall)), wall)
