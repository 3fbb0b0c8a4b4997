"""Times phase 2 training against a reimplementation of the original trainer: ``python -m bench.training``.

Both train on the same ragged contexts (lengths uniform in [L/3, L]) in one process in interleaved rounds: the
trainer of ``llm-trm train phase2``, and ``bench/plain_trainer.py``. First their results from the same weights
must agree, otherwise no times are reported. One line of JSON per case is appended to
bench/results/training.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.plain_trainer import PlainSequenceTRM, PlainTrainer
from llm_trm.benchmark.environment import device_name, run_record
from llm_trm.benchmark.protocol import Call, Timing, interleave, synchronize, timer_for
from llm_trm.benchmark.results import append
from llm_trm.benchmark.table import number
from llm_trm.data.pairs import Pair, write_index, write_shard
from llm_trm.errors import InputError
from llm_trm.models.compression import DimensionCompressor, save_compressor
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase2.trainer import TRMSequenceTrainer

RESULTS = Path(__file__).resolve().parent / "results" / "training.jsonl"
PLAIN, OURS = "plain", "llm-trm"

_LEARNING_RATE = 1e-4
#: Long enough to make the cosine schedule constant in float32 over any run here.
_EPOCHS = 10**7
#: Number of supervision steps over which both trainers must agree, twice on one batch. On CUDA the second
#: time is a replay of the step, which is captured after the first.
_CHECKED_STEPS = 3
#: Decay of the averages in the check; at 0.999 they would change by little more than their rounding.
_CHECKED_DECAY = 0.5
#: Maximum relative difference of metrics and updates between the trainers in float32.
_METRIC_TOLERANCE, _UPDATE_TOLERANCE = 1e-4, 1e-3
#: Maximum relative difference of metrics with bf16 autocast, whose unit roundoff is 4e-3.
_BF16_METRIC_TOLERANCE = 2e-2


class DisagreementError(RuntimeError):
    """The trainers' results differ."""


@dataclass(frozen=True)
class TrainingCase:
    """A training workload.

    Attributes:
        width: Width D' of the compressed states.
        length: Length L of the longest context; the shortest is a third of it.
        batch: Batch size B.
        batches: Number of batches per timed pass.
        supervision_steps: Updates per batch.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        dropout: Dropout of attention weights during timing.
    """

    width: int
    length: int
    batch: int
    batches: int = 4
    supervision_steps: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """Identifies the case in a results file."""
        short = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype]
        dropout = f" dropout{self.dropout:g}" if self.dropout else ""
        return f"phase2 trainer d{self.width} L{self.length} B{self.batch} {short}{dropout}"

    @property
    def samples(self) -> int:
        """Number of samples per timed pass."""
        return self.batch * self.batches


#: The last CPU case has the size of the arithmetic world. All supervision steps cost the same, so on a CPU,
#: where one takes seconds, only one per batch is timed.
CASES: dict[str, tuple[TrainingCase, ...]] = {
    "cpu": (
        TrainingCase(256, 256, 8, supervision_steps=1),
        TrainingCase(256, 96, 32, supervision_steps=1),
        TrainingCase(32, 24, 256, supervision_steps=1),
    ),
    "cuda": (
        TrainingCase(256, 256, 8, batches=16, dtype="bfloat16"),
        TrainingCase(256, 256, 32, batches=16, dtype="bfloat16"),
    ),
}


def quick(case: TrainingCase) -> TrainingCase:
    """The case, reduced to test the command in seconds."""
    return replace(
        case,
        width=min(case.width, 32),
        length=min(case.length, 24),
        batch=min(case.batch, 4),
        batches=2,
        supervision_steps=1,
    )


class OurTrainer:
    """The trainer of ``llm-trm train phase2`` on random contexts in its own folder.

    Args:
        folder: An empty folder for pairs and compressor.
        device: ``"cpu"`` or the accelerator of this machine.
        ema_decay: Decay of the weight average.
        seed: Seed of data and weights.
    """

    def __init__(
        self,
        case: TrainingCase,
        folder: Path,
        device: torch.device,
        *,
        ema_decay: float = 0.999,
        seed: int = 0,
    ) -> None:
        pairs, compressor = folder / "pairs", folder / "compressor"
        write_data(case, pairs, compressor, seed)
        config = Phase2Config(
            data=pairs,
            compressor=compressor,
            output=folder / "run",
            val_fraction=1e-9,  # one sample, the minimum
            dropout=case.dropout,
            supervision_steps=case.supervision_steps,
            batch_size=case.batch,
            epochs=_EPOCHS,
            learning_rate=_LEARNING_RATE,
            warmup_ratio=0.0,
            ema_decay=ema_decay,
            precision="bf16" if case.dtype == "bfloat16" else "fp32",
            seed=seed,
            device="cpu" if device.type == "cpu" else "auto",
        )
        self.trainer = TRMSequenceTrainer(config)
        self.trainer.model.train()
        self.order = self.trainer.order.batches(0)

    def run(self, batches: Sequence[Sequence[int]]) -> None:
        """Train on batches of sample indices, as in an epoch."""
        for samples in batches:
            self.trainer.train_batch(samples)
            self.trainer.take_metrics(self.trainer.step.poll())

    def metrics(self) -> dict[str, float]:
        """Mean metrics since the last call; synchronises with the device."""
        windows = self.trainer.step.drain()
        steps = sum(window.steps for window in windows)
        return {
            name: sum(window.values[name] * window.steps for window in windows) / steps
            for name in windows[0].values
        }

    def samples(self, numbers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Contexts [L_i, D'] and targets [D'] of samples, on the CPU."""
        contexts = self.trainer.inputs.contexts
        offsets, rows, targets = contexts.offsets.tolist(), contexts.rows.cpu(), contexts.targets.cpu()
        return [rows[offsets[i] : offsets[i + 1]] for i in numbers], [targets[i] for i in numbers]


def write_data(
    case: TrainingCase, pairs: Path, compressor: Path, seed: int, hidden_size: int | None = None
) -> None:
    """Write random pairs for ``case``, one of them to hold out, and a compressor."""
    generator = torch.Generator().manual_seed(seed)
    hidden_size = hidden_size or case.width + 1  # a compressor must reduce the width
    count = case.samples + 1
    lengths = torch.randint(-(-case.length // 3), case.length + 1, (count,), generator=generator).tolist()
    lengths[0] = case.length

    def pair(index: int, length: int) -> Pair:
        record = {
            "index": index,
            "problem": str(index),
            "answer": None,
            "thinking": "",
            "context_length": length,
            "thinking_tokens": 1,
            "next_token": 0,
            "response": "",
            "correct": None,
        }
        states = torch.randn(length + 1, hidden_size, generator=generator)
        return Pair(states[:-1], states[-1], record)

    pairs.mkdir(parents=True)
    members = [pair(index, length) for index, length in enumerate(lengths)]
    write_shard(pairs, 0, members, {}, hidden_size, "float32")
    write_index(pairs, 1, model="random", seed=seed, settings={"seed": seed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_compressor(DimensionCompressor(hidden_size, case.width), compressor)


def plain_of(ours: OurTrainer, case: TrainingCase) -> PlainTrainer:
    """The original trainer with the current weights of ``ours``."""
    model = PlainSequenceTRM(ours.trainer.model.config)
    model.load_state_dict(ours.trainer.model.state_dict())
    return PlainTrainer(
        model.to(ours.trainer.device),
        supervision_steps=case.supervision_steps,
        learning_rate=_LEARNING_RATE,
        ema_decay=ours.trainer.config.ema_decay,
        autocast_dtype=torch.bfloat16 if case.dtype == "bfloat16" else None,
    )


def check(case: TrainingCase, device: torch.device, folder: Path) -> dict[str, float]:
    """Train both on one batch for three supervision steps, twice, without dropout, and compare.

    Metrics must agree in the case's precision. In float32, the updates of weights and averages must agree as
    well.

    Returns:
        The maximum relative differences: ``metrics`` and, in float32, ``updates`` and ``averages``.

    Raises:
        DisagreementError: The trainers' results differ.
    """
    case = replace(case, batches=1, supervision_steps=_CHECKED_STEPS, dropout=0.0)
    ours = OurTrainer(case, folder, device, ema_decay=_CHECKED_DECAY)
    plain = plain_of(ours, case)
    before = {name: value.detach().clone() for name, value in plain.model.named_parameters()}
    numbers = ours.order[0]
    ours.run([numbers, numbers])
    steps = [step for _ in range(2) for step in plain.train_batch(*ours.samples(numbers))]
    found = ours.metrics()
    differences = {
        name: abs(found[name] - mean) / max(abs(mean), 1e-3)
        for name, mean in ((name, sum(step[name] for step in steps) / len(steps)) for name in _COMPARED)
    }
    exact = case.dtype == "float32"
    agreement = {"metrics": max(differences.values())}
    tolerances = {"metrics": _METRIC_TOLERANCE if exact else _BF16_METRIC_TOLERANCE}
    if exact:
        own = dict(ours.trainer.model.named_parameters())
        agreement["updates"] = _difference(before, dict(plain.model.named_parameters()), own)
        averages = dict(zip(own, ours.trainer.average.averages, strict=True))
        agreement["averages"] = _difference(before, plain.average.shadow, averages)
        tolerances |= {"updates": _UPDATE_TOLERANCE, "averages": _UPDATE_TOLERANCE}
    # Negated, so that NaN fails.
    broken = [name for name, value in agreement.items() if not value <= tolerances[name]]
    if broken:
        raise DisagreementError(
            f"{case.name}: after {len(steps)} supervision steps the trainers differ in "
            + ", ".join(f"{name} by {agreement[name]:.2g} (at most {tolerances[name]:g})" for name in broken)
        )
    return agreement


#: Metrics that both trainers compute.
_COMPARED = ("loss", "mse", "cosine", "halt_loss")


def _difference(
    before: Mapping[str, Tensor], expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> float:
    """Norm of ``found - expected`` relative to the norm of ``expected - before``, over all tensors."""

    def norm(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
        parts = [_determined(name, (left[name] - right[name]).detach().double()) for name in before]
        return torch.stack([part.square().sum() for part in parts]).sum().sqrt()

    return float(norm(found, expected) / norm(expected, before))


def _determined(name: str, value: Tensor) -> Tensor:
    """``value`` without key biases: softmax cancels them, and AdamW turns their noise into full steps."""
    if not name.endswith("in_proj_bias"):
        return value
    query, _, rest = value.chunk(3)
    return torch.cat((query, rest))


def run_case(
    case: TrainingCase,
    device: torch.device,
    seconds: float,
    progress: Callable[[str], object] = lambda _: None,
    *,
    compare: bool = True,
) -> dict[str, Any]:
    """Check one case in float32 and in its own precision, and time it.

    Args:
        seconds: Duration of the timed passes; there are at least three of each.
        progress: Called with a description of each activity.
        compare: Whether to compare the trainers first.

    Returns:
        A line for a results file without metadata of the run: ``agreement`` of the checks; for each of the
        ``trainers`` median, p20 and p80 of a pass in milliseconds, samples (with all their supervision steps)
        per second and updates per second; and the ``ratio`` of the medians.

    Raises:
        DisagreementError: The trainers' results differ, so they were not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        agreement: dict[str, float] = {}
        for dtype in dict.fromkeys(("float32", case.dtype)) if compare else ():
            progress(f"check in {dtype}")
            found = check(replace(case, dtype=dtype), device, Path(folder) / dtype)
            agreement |= {f"{dtype} {name}": difference for name, difference in found.items()}
        progress("warm-up")
        ours = OurTrainer(case, Path(folder) / "timed", device)
        plain = plain_of(ours, case)
        shuffled = torch.randperm(case.samples, generator=torch.Generator().manual_seed(0)).tolist()
        numbers = [ours.trainer.order.samples[index] for index in shuffled]
        data = [
            ours.samples(numbers[start : start + case.batch]) for start in range(0, len(numbers), case.batch)
        ]

        def plain_pass(_: int) -> None:
            for contexts, targets in data:
                plain.train_batch(contexts, targets)

        calls = {PLAIN: plain_pass, OURS: lambda _: ours.run(ours.order)}
        expected = {name: _warm(call, device) for name, call in calls.items()}
        progress("timing")
        timings, failures = interleave(calls, timer_for(device), expected, seconds)
        for error in failures.values():
            raise error
        status = ours.trainer.step.cache.status()
    return {
        "name": case.name,
        "case": asdict(case),
        "device": device_name(device),
        "agreement": agreement,
        "trainers": {name: _figures(timing, case) for name, timing in timings.items()},
        "ratio": timings[PLAIN].median / timings[OURS].median,
        "replays": status.replays,
        "fallbacks": dict(status.fallbacks),
    }


def _warm(call: Call, device: torch.device) -> float:
    """Seconds of the second of two passes; on CUDA, the first warms up and captures."""
    call(0)
    synchronize(device)
    start = time.perf_counter()
    call(0)
    synchronize(device)
    return time.perf_counter() - start


def _figures(timing: Timing, case: TrainingCase) -> dict[str, Any]:
    return {
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "rounds": len(timing.samples),
        "samples_per_s": case.samples / timing.median,
        "updates_per_s": case.batches * case.supervision_steps / timing.median,
    }


def describe(line: Mapping[str, Any]) -> str:
    """A line of a results file as text."""
    case = TrainingCase(**line["case"])
    parts = [f"{line['name']} ({case.batches} batches per pass, {case.supervision_steps} updates each):"]
    for name, figures in line["trainers"].items():
        parts.append(
            f"  {name:<8} {number(figures['samples_per_s'])} samples/s, a pass "
            f"{number(figures['median_ms'])} ms [{number(figures['p20_ms'])}, {number(figures['p80_ms'])}], "
            f"{figures['rounds']} rounds"
        )
    agreement = ", ".join(f"{name} {value:.1g}" for name, value in line["agreement"].items())
    parts.append(f"  {line['ratio']:.2f}x; relative differences: {agreement}")
    if line["fallbacks"]:
        parts.append("  not captured: " + "; ".join(f"{k} ({n})" for k, n in line["fallbacks"].items()))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run. The exit code is 1 if the trainers disagree, 2 for bad input."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description=f"{description}\n\n{rest}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="Run tiny cases as a test; results are saved only with --out."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"Results file to append to (default: {RESULTS.relative_to(RESULTS.parents[2])}).",
    )
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    parser.add_argument("--case", type=int, help="Run only case number N of the device, from 1.")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="Seconds of timed passes per case (default: %(default)g)."
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="Dropout during timing (default: 0).")
    options = parser.parse_args(arguments)
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CASES[kind]
    out: Path | None = options.out or (None if options.quick else RESULTS)
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if options.case is not None and not 1 <= options.case <= len(cases):
        parser.error(f"--case {options.case}: {kind} has cases 1 to {len(cases)}")
    if options.seconds <= 0:
        parser.error("--seconds must be positive")
    if not 0.0 <= options.dropout < 1.0:
        parser.error("--dropout must be in [0, 1)")
    if out is not None and not out.parent.is_dir():
        parser.error(f"--out: the folder {out.parent} does not exist; create it first")
    device = torch.device(kind)
    record = run_record(device, options.commit)
    print(f"{record['machine']['device']}, torch {record['versions']['torch']}", flush=True)
    chosen = cases if options.case is None else (cases[options.case - 1],)
    if options.quick:
        chosen = tuple(dict.fromkeys(map(quick, chosen)))
    for case in chosen:
        case = replace(case, dropout=options.dropout)
        try:
            line = record | run_case(case, device, 1.0 if options.quick else options.seconds)
        except (DisagreementError, InputError) as error:
            print(f"bench.training: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)
        print(describe(line), flush=True)
        if out is not None:
            append(out, line)


_EXAMPLES = """\
examples:
  python -m bench.training                  the three CPU cases, or the two GPU cases
  python -m bench.training --case 3         one case
  python -m bench.training --quick          a quick test of the command
  python -m bench.training --dropout 0.1    the original's dropout
"""

if __name__ == "__main__":
    main()
