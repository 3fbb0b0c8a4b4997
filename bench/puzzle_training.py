"""Trains the tiny preset on generated Sudokus from scratch: ``python -m bench.puzzle_training``.

Does the same as ``llm-trm data sudoku``, ``train puzzle`` and ``eval puzzle`` with default settings, except
for the number of puzzles. Measures the accuracy on held-out puzzles, none of which is a training puzzle under
any symmetry, against minutes of training, and the time saved by halting. One line of JSON per run is appended
to bench/results/puzzle_training.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_trm.benchmark.environment import device_name, run_record
from llm_trm.benchmark.results import append
from llm_trm.data.puzzles.dataset import read_split, write_puzzles
from llm_trm.data.puzzles.sudoku import SHAPES
from llm_trm.data.puzzles.sudoku_splits import generated_splits, sudoku_info
from llm_trm.evaluate.puzzle_modes import Mode, ModeResult, evaluate_mode
from llm_trm.models.puzzle.loading import load_puzzle
from llm_trm.train.puzzle.config import configure
from llm_trm.train.puzzle.trainer import PuzzleTrainer

RESULTS = Path(__file__).resolve().parent / "results" / "puzzle_training.jsonl"

#: Number of training puzzles, and of clues, by size. There are 2,218 different 4x4 puzzles with 4 to 8 clues.
_TRAINING = {4: 1500, 6: 4000, 9: 10_000}
_CLUES = {4: (4, 8), 6: (9, 18), 9: (24, 36)}
HELD_OUT = 500
#: Halting thresholds: the training's, and a higher one.
THRESHOLDS = (0.5, 0.9)
_ROUNDS = 3


def train(
    size: int,
    seed: int,
    device: torch.device,
    *,
    puzzles: int | None = None,
    held_out: int = HELD_OUT,
    **options: Any,
) -> dict[str, Any]:
    """Generate puzzles, train and evaluate.

    Args:
        size: 4, 6 or 9.
        seed: Seed of puzzles and training.
        puzzles: Number of training puzzles.
        held_out: Number of held-out puzzles.
        **options: Options of :func:`~llm_trm.train.puzzle.config.configure`.

    Returns:
        A line for a results file without metadata of the run: the ``history`` of the training, and for each
        of the ``modes`` (without halting, and with two thresholds) the result of ``llm-trm eval puzzle
        -o`` on all held-out puzzles, with the best time of several rounds.
    """
    shape = SHAPES[size]
    with tempfile.TemporaryDirectory() as name:
        data, output = Path(name) / "data", Path(name) / "run"
        splits = generated_splits(shape, puzzles or _TRAINING[size], held_out, _CLUES[size], seed)
        write_puzzles(data, sudoku_info(shape, {"seed": seed}), splits)
        config = configure(
            "tiny", "sudoku", data=data, output=output, seed=seed, device=device.type, **options
        )
        start = time.perf_counter()
        trainer = PuzzleTrainer(config)
        result = trainer.train()
        seconds = time.perf_counter() - start
        # The last checkpoint, because the best one is selected on these held-out puzzles.
        model, _ = load_puzzle(trainer.run.checkpoints.last)
        test = read_split(data, "test").to(device)
        modes = _modes(model.to(device), test, config.max_steps, config.batch_size)
    return {
        "name": f"puzzle training sudoku {size}x{size} tiny seed{seed}",
        "size": size,
        "seed": seed,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "puzzles": len(splits["train"]),
        "held_out": len(splits["test"]),
        "config": config.record(),
        "seconds": seconds,
        "history": result.history,
        "modes": [mode.to_json() for mode in modes],
    }


def _modes(model: Any, test: Any, max_steps: int, batch_size: int) -> list[ModeResult]:
    """Evaluate all modes in interleaved rounds."""
    modes = [Mode(False, max_steps), *(Mode(True, max_steps, threshold=limit) for limit in THRESHOLDS)]
    found: dict[str, ModeResult] = {}
    for _ in range(_ROUNDS):
        for mode in modes:
            now = evaluate_mode(model, test, mode, batch_size)
            if mode.name not in found or now.seconds < found[mode.name].seconds:
                found[mode.name] = now
    return list(found.values())


def speedup(line: Mapping[str, Any], index: int) -> float:
    """Speedup of mode ``index`` over the mode without halting."""
    modes = line["modes"]
    return float(modes[0]["seconds_per_puzzle"] / modes[index]["seconds_per_puzzle"])


def describe(line: Mapping[str, Any]) -> str:
    """A line of a results file as text."""
    parts = [f"{line['name']}: {line['puzzles']} puzzles, {line['seconds'] / 60:.1f} minutes"]
    for record in line["history"]:
        parts.append(
            f"  {record['seconds'] / 60:5.1f} min  step {record['step']:>5}  loss "
            f"{record['train']['loss']:.4f}  held out: exact {record['test']['exact']:.4f}"
        )
    for mode in line["modes"]:
        low, high = mode["exact_interval"]
        parts.append(
            f"  {mode['name']}: {mode['exact']:.2%} ({low:.2%} to {high:.2%}) of {mode['puzzles']}, "
            f"{mode['steps']:.2f} steps, {1e3 * mode['seconds_per_puzzle']:.2f} ms per puzzle"
        )
    parts.append(f"  halting: {', '.join(f'{speedup(line, index):.2f}x' for index in (1, 2))}")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.puzzle_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES, default=[4, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="Training steps (default: the preset's).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Results file to append to.")
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    device = torch.device(options.device)
    record = run_record(device, options.commit)
    for size in options.sizes:
        for seed in options.seeds:
            line = record | train(size, seed, device, steps=options.steps)
            print(describe(line), flush=True)
            append(options.out, line)


if __name__ == "__main__":
    main()
