"""The suites: named lists of cases. Does not import torch, so that help is fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_trm.benchmark.workloads import Case, Mode

#: The rows of a table: ``main`` has the backends and the baselines of the ratio columns, ``peers`` adds
#: alternative implementations, and ``scaling`` has only the candidates to plot.
Group = Literal["main", "peers", "scaling"]

#: Above this width a training step takes many seconds on a CPU, so the suites omit it there.
CPU_TRAIN_WIDTH = 512

#: Above this many operations, a point of the scaling suite takes minutes on 2 CPU cores (0.2 TFLOP/s).
CPU_SCALING_FLOPS = 10**12

#: Description of each suite, in the order of ``--help``.
SUITES = {
    "quick": "d 64, L 32, batch 2: a smoke test",
    "default": "d 256 and d 2048 at L 256, batch 1",
    "phase2": "d 256, L 256, batch 1 and 32 (CPU: 1 and 4): the recursion over compressed states",
    "latents": "d 2048, L 256, batch 1 and 8 (CPU: 1, forward only): over SmolLM3's own width",
    "paper": "d 512, L 97, batch 768 (CPU: 4), the paper's block: Sudoku with 16 puzzle positions; and peers",
    "train": "whole training steps: phase2 at batch 8 and 32 (CPU: 1), the paper's (CPU: 2)",
    "peers": "phase2 and paper against other implementations (optional: llm-trm[peers])",
    "scaling": "cost against batch 1..1024, length 32..4096 and width 256..2048, one at a time",
    "all": "phase2, latents, paper and train",
}

_ALL = ("phase2", "latents", "paper", "train")

_PHASE2 = Case("forward", 256, 256)
_LATENTS = Case("forward", 2048, 256)
_PAPER = Case("forward", 512, 97, family="paper")

#: Default modes of suites; the others measure forward and train.
_MODES: dict[str, tuple[Mode, ...]] = {
    "train": ("step",),
    "peers": ("forward", "train", "step"),
    "scaling": ("forward",),
}


def group_of(suite_name: str | None) -> Group:
    """The group of rows in the tables of a suite."""
    if suite_name == "paper":
        return "peers"  # to compare with the official code
    return suite_name if suite_name in ("peers", "scaling") else "main"  # type: ignore[return-value]


def suite(name: str, device: str, dtype: str, modes: Sequence[Mode] | None = None) -> list[Case]:
    """The cases of a suite on a device type, most informative first.

    Args:
        name: One of :data:`SUITES`.
        device: ``"cuda"``, ``"cpu"`` or ``"mps"``.
        dtype: Dtype of all cases.
        modes: Modes to measure; None for the suite's default. ``train`` and ``scaling`` only have cases of
            one mode.
    """
    if name == "all":
        return [case for part in _ALL for case in suite(part, device, dtype, modes)]
    cpu = device == "cpu"
    own = _MODES.get(name, ("forward", "train"))
    if dtype == "float16":
        own = tuple(mode for mode in own if mode != "step")  # it would need loss scaling
    if modes is not None:
        own = tuple(mode for mode in modes if mode in own or (_MODES.get(name) is None and mode == "step"))
    return [
        replace(shape, mode=mode, dtype=dtype)
        for shape in _shapes(name, cpu)
        for mode in own
        if not (cpu and mode != "forward" and shape.hidden_size > CPU_TRAIN_WIDTH)
    ]


def _shapes(name: str, cpu: bool) -> list[Case]:
    if name == "scaling":
        points = (point for axis in scaling_axes(cpu) for point in axis.points() if _cheap(point, cpu))
        return sorted(points, key=lambda point: point.flops)  # so that most are done when time runs out
    phase2, latents, paper = (
        [replace(case, batch=batch) for batch in batches]
        for case, batches in (
            (_PHASE2, (1, 4) if cpu else (1, 32)),
            (_LATENTS, (1,) if cpu else (1, 8)),
            (_PAPER, (4,) if cpu else (768,)),
        )
    )
    return {
        "quick": [Case("forward", 64, 32, batch=2, heads=4)],
        "default": [_PHASE2, _LATENTS],
        "phase2": phase2,
        "latents": latents,
        "paper": paper,
        "train": [_PHASE2, replace(_PAPER, batch=2)]
        if cpu
        else [replace(_PHASE2, batch=8), replace(_PHASE2, batch=32), *paper],
        "peers": [*paper, phase2[0]] if cpu else [*paper, *phase2],
    }[name]


@dataclass(frozen=True)
class Axis:
    """One axis of the scaling suite: a field of :class:`Case`, its values, and the base point."""

    field: Literal["batch", "latents", "hidden_size"]
    label: str
    values: tuple[int, ...]
    base: Case

    def points(self) -> Iterator[Case]:
        """Yield the cases along the axis; only the first axis includes the base point."""
        for value in self.values:
            if self.field == "batch" or value != getattr(self.base, self.field):
                yield self._at(value, self.base)

    def value(self, case: Case) -> int | None:
        """The value of ``case`` on this axis, ignoring its dtype; None if it is not on the axis."""
        value: int = getattr(case, self.field)
        on_axis = self._at(value, replace(self.base, dtype=case.dtype))
        return value if on_axis == case and value in self.values else None

    def _at(self, value: int, base: Case) -> Case:
        changes: dict[str, Any] = {self.field: value}
        return replace(base, **changes)


def scaling_axes(cpu: bool) -> tuple[Axis, ...]:
    """Batch, length and width axes through one base point (batch 16; on a CPU 1)."""
    base = replace(_PHASE2, batch=1 if cpu else 16)
    return (
        Axis("batch", "batch size", (1, 4, 16, 64, 256, 1024), base),
        Axis("latents", "sequence length", (32, 64, 256, 1024, 4096), base),
        Axis("hidden_size", "hidden size", (256, 512, 1024, 2048), base),
    )


def _cheap(case: Case, cpu: bool) -> bool:
    return not cpu or case.flops <= CPU_SCALING_FLOPS


def left_out(name: str, device: str) -> str | None:
    """One line about the cases that a suite omits on a device type, or None."""
    if name != "scaling" or device != "cpu":
        return None
    missing = [
        f"{axis.label} {axis.value(point)}"
        for axis in scaling_axes(cpu=True)
        for point in axis.points()
        if not _cheap(point, cpu=True)
    ]
    return f"omitted on a CPU, over {CPU_SCALING_FLOPS:.0e} operations per call: {', '.join(missing)}"


def shrunk(cases: Sequence[Case]) -> list[Case]:
    """The cases reduced to at most d 64, L 32, 4 heads and batch 2, to test a command quickly."""
    small = (
        replace(
            case,
            hidden_size=min(case.hidden_size, 64),
            latents=min(case.latents, 32),
            batch=min(case.batch, 2),
            heads=4,
        )
        for case in cases
    )
    return list(dict.fromkeys(small))
