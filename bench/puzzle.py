"""Times puzzle training against a reimplementation of the official trainer: ``python -m bench.puzzle``.

All trainers run on the same grids in one process in interleaved rounds: the step of ``llm-trm train puzzle``
(replayed as a graph on CUDA), and ``bench/plain_puzzle.py``, eager and with torch.compile. First their losses
must agree over several steps, otherwise no times are reported. Hours are for 65,100 steps, the official run
on Sudoku-Extreme (50,000 epochs of 1,000 puzzles, 768 per step), computed from the median step. One line of
JSON per case is appended to bench/results/puzzle.jsonl; ``python -m bench.report`` updates docs/puzzles.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.plain_puzzle import PlainPuzzleTrainer
from llm_trm.benchmark.environment import device_name, run_record
from llm_trm.benchmark.protocol import Call, Timing, interleave, synchronize, timer_for
from llm_trm.benchmark.results import append
from llm_trm.benchmark.table import number
from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit, write_puzzles
from llm_trm.train.puzzle.config import PuzzleConfig, configure
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from trm_kernels.config import Mixer, NetworkConfig

RESULTS = Path(__file__).resolve().parent / "results" / "puzzle.jsonl"
PLAIN, COMPILED, OURS = "official, eager", "official, compiled", "llm-trm"
#: Number of steps of the official Sudoku-Extreme run.
STEPS = 65_100

#: Number of steps over which the trainers' losses must agree, and tolerances: sign updates amplify rounding.
_CHECKED_STEPS = 3
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_PUZZLES = 4096


@dataclass(frozen=True)
class PuzzleCase:
    """One model on one kind of grid.

    Attributes:
        preset: Preset of the settings.
        side: Number of rows and columns of the grid.
        batch: Batch size.
        mixer: Mixer of positions.
        dtype: Dtype of the residual stream.
        embeddings: Whether there are puzzle embeddings and positions for them.
        fp8: Whether this library runs the recursions without gradients in fp8.
    """

    preset: Literal["paper", "tiny"]
    side: int
    batch: int
    mixer: Mixer = "tokens"
    dtype: Literal["float32", "bfloat16"] = "float32"
    embeddings: bool = True
    fp8: bool = False

    @property
    def name(self) -> str:
        """Identifies the case in a results file."""
        short = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype]
        rest = "" if self.embeddings else " without puzzle embeddings"
        return (
            f"puzzle step {self.preset} {self.side}x{self.side} {self.mixer} B{self.batch} {short}{rest}"
            f"{' fp8-nograd' if self.fp8 else ''}"
        )


CASES: dict[str, tuple[PuzzleCase, ...]] = {
    "cpu": (
        PuzzleCase("tiny", 4, 128),
        PuzzleCase("tiny", 6, 128),
        PuzzleCase("paper", 9, 4),
    ),
    "cuda": (
        PuzzleCase("paper", 9, 768, dtype="bfloat16"),
        PuzzleCase("paper", 9, 768, dtype="bfloat16", embeddings=False),
        PuzzleCase("paper", 9, 768, dtype="bfloat16", embeddings=False, fp8=True),
        PuzzleCase("paper", 9, 768, "attention", dtype="bfloat16"),
    ),
}


def quick(case: PuzzleCase) -> PuzzleCase:
    """The case, reduced to test the command in seconds."""
    return replace(case, preset="tiny", side=4, batch=4)


def settings(case: PuzzleCase, data: Path, output: Path) -> PuzzleConfig:
    """The trainer's configuration."""
    options: dict[str, Any] = {}
    if not case.embeddings:
        options = {"puzzle_len": 0, "puzzle_dim": 0}
    elif case.preset == "tiny":
        options = {"puzzle_len": 1, "puzzle_dim": 8}
    return configure(
        case.preset,
        "sudoku",
        data=data,
        output=output,
        mixer=case.mixer,
        positions="none" if case.mixer == "tokens" else "rope",
        batch_size=case.batch,
        # The same arithmetic in both: no clipping, no schedule and no augmentation.
        optimizer="adam-atan2",
        schedule="constant",
        warmup_steps=0,
        weight_decay=1.0,
        augment=False,
        precision="bf16" if case.dtype == "bfloat16" else "fp32",
        nograd_precision="fp8" if case.fp8 else None,
        log_every=10,
        **options,
    )


def write_data(case: PuzzleCase, folder: Path) -> None:
    """Write random grids; their content only affects when samples halt."""
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, case.side + 2, (2, _PUZZLES, case.side**2), generator=chance).to(torch.uint8)
    ids = torch.zeros(_PUZZLES, dtype=torch.int32)
    split = PuzzleSplit(tokens[0], tokens[1], ids)
    none = PuzzleSplit(*(tensor[:0] for tensor in (split.inputs, split.labels, ids)))
    info = PuzzleInfo("sudoku", case.side, case.side, case.side + 2)
    write_puzzles(folder, info, {"train": split, "test": none})


class Ours(PuzzleTrainer):
    """The trainer with a step that reads its metrics as in training."""

    def one_step(self) -> None:
        """Run one step."""
        self.take_step()
        self._take_metrics(self.step.poll())


def ours(case: PuzzleCase, folder: Path, device: torch.device) -> Ours:
    """A trainer on random grids in ``folder``, which are created if missing."""
    data = folder / "data"
    if not data.exists():
        write_data(case, data)
    config = settings(case, data, Path(tempfile.mkdtemp(dir=folder)))
    trainer = Ours(replace(config, clip_norm=None, device="cuda" if device.type == "cuda" else "cpu"))
    trainer.model.train()
    return trainer


def plain_of(trainer: Ours, *, compiled: bool, exploration: float) -> PlainPuzzleTrainer:
    """The official trainer with the current weights of ``trainer``."""
    config = trainer.config
    return PlainPuzzleTrainer(
        trainer.model,
        compiled=compiled,
        exploration=exploration,
        rates=(config.learning_rate, config.puzzle_learning_rate),
        ema=config.ema_decay,
    )


class DisagreementError(RuntimeError):
    """The trainers' results differ."""


def check(case: PuzzleCase, device: torch.device, folder: Path) -> float:
    """Maximum relative difference of the losses over several steps on the same puzzles.

    Raises:
        DisagreementError: The difference is too large.
    """
    trainer = ours(replace(case, fp8=False), folder, device)
    trainer.step._exploration = 0.0
    plain = plain_of(trainer, compiled=False, exploration=0.0)
    worst = 0.0
    for _ in range(_CHECKED_STEPS):
        expected = plain.step(trainer.feed.batch(trainer.run.step))
        trainer.take_step()
        (window,) = trainer.step.drain()
        # Do not compare counts: a single one of 324 cells that flips by rounding would be 0.3%.
        for name in ("cell_loss", "halt_loss"):
            value = expected[name]
            worst = max(worst, abs(window.values[name] - value) / max(abs(value), 0.05))
    # Negated, so that NaN fails.
    if not worst <= _TOLERANCE[case.dtype]:
        raise DisagreementError(
            f"{case.name}: over {_CHECKED_STEPS} steps the trainers differ by {worst:.2g} (at most "
            f"{_TOLERANCE[case.dtype]:g})"
        )
    return worst


def flops(trainer: PuzzleTrainer) -> int:
    """Operations of the matrix products in a step's network calls; backward counts as twice forward."""
    config = trainer.model.config
    net: NetworkConfig = trainer.model.net.config
    d, length, batch = config.d_model, config.length, trainer.config.batch_size
    channel = 2 * batch * length * 3 * d * net.d_ff
    if net.mixer == "tokens":
        mixing = 2 * batch * d * 3 * length * net.token_ff
    else:
        mixing = 2 * batch * length * 4 * d * d + 4 * batch * length**2 * d
    calls = (config.n_latent_steps + 1) * (config.n_deep_recursions + 2)
    return config.n_layers * (channel + mixing) * calls


def run_case(
    case: PuzzleCase,
    device: torch.device,
    seconds: float,
    progress: Callable[[str], object] = lambda _: None,
    *,
    compiled: bool = True,
    compare: bool = True,
) -> dict[str, Any]:
    """Check and time one case.

    Args:
        seconds: Duration of the timed rounds.
        progress: Called with a description of each activity.
        compiled: Whether to time the official model with torch.compile as well.
        compare: Whether to compare the trainers first.

    Returns:
        A line for a results file without metadata of the run: ``agreement``; for each of the ``trainers``
        median, p20 and p80 of a step in milliseconds, TFLOP/s, and ``hours`` for 65,100 steps; and the
        ``ratio`` of each official median to this library's.

    Raises:
        DisagreementError: The trainers' results differ, so they were not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        agreement: float | None = None
        if compare:
            progress("check")
            agreement = check(case, device, Path(folder))
        trainer = ours(case, Path(folder), device)
        plains = {PLAIN: False, COMPILED: True} if compiled else {PLAIN: False}
        calls: dict[str, Call] = {}
        for name, under in plains.items():
            plain = plain_of(trainer, compiled=under, exploration=trainer.config.exploration)
            calls[name] = _plain_call(plain, trainer)
        calls[OURS] = lambda _: trainer.one_step()
        expected = {}
        for name, call in calls.items():
            progress(f"warm-up of {name}")
            expected[name] = _warm(call, device)
        progress("timing")
        timings, failures = interleave(calls, timer_for(device), expected, seconds)
        for error in failures.values():
            raise error
        work = flops(trainer)
        status = trainer.step.cache.status()
    return {
        "name": case.name,
        "case": asdict(case),
        "device": device_name(device),
        "agreement": agreement,
        "tflop": work * 1e-12,
        "trainers": {name: _figures(timing, work) for name, timing in timings.items()},
        "ratio": {name: timings[name].median / timings[OURS].median for name in timings if name != OURS},
        "replays": status.replays,
        "fallbacks": dict(status.fallbacks),
    }


def _plain_call(plain: PlainPuzzleTrainer, trainer: Ours) -> Call:
    batches: list[tuple[Tensor, Tensor, Tensor]] = [trainer.feed.batch(trainer.run.step)]

    def call(_: int) -> None:
        plain.step(batches[0])

    return call


def _warm(call: Call, device: torch.device) -> float:
    """Seconds of the last of five calls; on CUDA, three calls warm up and the fourth is captured."""
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        call(0)
        synchronize(device)
    return time.perf_counter() - start


def _figures(timing: Timing, work: int) -> dict[str, Any]:
    return {
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "rounds": len(timing.samples),
        "tflops": work / timing.median * 1e-12,
        "hours": STEPS * timing.median / 3600,
    }


def describe(line: Mapping[str, Any]) -> str:
    """A line of a results file as text."""
    work, agreement = number(line["tflop"]), line["agreement"]
    compared = "not compared" if agreement is None else f"losses agree to {agreement:.1g}"
    parts = [f"{line['name']}: {work} TFLOP per step; {compared}"]
    for name, figures in line["trainers"].items():
        ratio = f", {line['ratio'][name]:.2f}x slower" if name in line["ratio"] else ""
        parts.append(
            f"  {name:<20} {number(figures['median_ms'])} ms [{number(figures['p20_ms'])}, "
            f"{number(figures['p80_ms'])}], {number(figures['tflops'])} TFLOP/s, "
            f"{number(figures['hours'])} h for {STEPS} steps{ratio}"
        )
    if line["fallbacks"]:
        parts.append("  not captured: " + "; ".join(f"{k} ({n})" for k, n in line["fallbacks"].items()))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run. The exit code is 1 if the trainers disagree."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.puzzle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--quick", action="store_true", help="Run tiny cases; saved only with --out.")
    parser.add_argument("--out", type=Path, help="Results file to append to.")
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    parser.add_argument("--case", type=int, help="Run only case number N of the device, from 1.")
    parser.add_argument("--seconds", type=float, default=30.0, help="Duration of timed rounds per case.")
    parser.add_argument("--no-compile", action="store_true", help="Skip the compiled official trainer.")
    options = parser.parse_args(arguments)
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    cases = CASES[kind]
    if options.case is not None and not 1 <= options.case <= len(cases):
        parser.error(f"--case {options.case}: {kind} has cases 1 to {len(cases)}")
    if not (options.seconds > 0 and math.isfinite(options.seconds)):
        parser.error("--seconds must be positive")
    out: Path | None = options.out or (None if options.quick else RESULTS)
    device = torch.device(kind)
    record = run_record(device, options.commit)
    chosen = cases if options.case is None else (cases[options.case - 1],)
    if options.quick:
        chosen = tuple(dict.fromkeys(map(quick, chosen)))
    for case in chosen:
        try:
            seconds = 1.0 if options.quick else options.seconds
            line = record | run_case(case, device, seconds, compiled=not options.no_compile)
        except DisagreementError as error:
            print(f"bench.puzzle: {error}", file=sys.stderr)
            sys.exit(1)
        print(describe(line), flush=True)
        if out is not None:
            append(out, line)


if __name__ == "__main__":
    main()
