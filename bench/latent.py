"""Records the results of an arithmetic world run: ``python -m bench.latent runs/arithmetic --seed 0``.

Reads the metrics that ``llm-trm eval lm`` wrote in ``examples/arithmetic.sh``, after LoRA (lora.json) and
after phase 3 (phase3.json), and appends one line for each to bench/results/latent.jsonl. With ``--learning
NAME`` the folder is an output of ``llm-trm train lora``, whose held-out accuracy at each evaluation is
appended to bench/results/latent_learning.jsonl. ``python -m bench.report`` updates docs/latent.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_trm.benchmark.environment import run_record
from llm_trm.benchmark.results import append
from llm_trm.files import read_json

RESULTS = Path(__file__).parent / "results" / "latent.jsonl"
LEARNING = RESULTS.with_name("latent_learning.jsonl")
_LEFT_OUT = ("batch_seconds", "checkpoint", "model", "seed")
#: Stages of the script that end in an evaluation, and the file of each.
STAGES = {"lora": "lora.json", "phase3": "phase3.json"}


def line(stage: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """One evaluation as a line of the results file, without batches, folders and the seed of the problems."""
    kept = {name: value for name, value in found.items() if name not in _LEFT_OUT}
    name = f"latent arithmetic {stage} seed{seed}"
    return {"name": name, "device": found["machine"]["device"], "stage": stage, "seed": seed, **kept}


def learning(name: str, run: Path) -> dict[str, Any]:
    """The held-out accuracy over a run of ``llm-trm train lora``, as a line of the results file."""
    remedy = "name a folder that llm-trm train lora wrote"
    settings = read_json(run / "lora.json", remedy)
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=run)
    history = read_json(last / "trainer_state.json", remedy)["log_history"]
    curve = {entry["step"]: entry["eval_answer_accuracy"] for entry in history if "eval_loss" in entry}
    record = run_record(torch.device(settings["device"]))
    details = {
        "device": record["machine"]["device"],
        "seed": settings["seed"],
        "problems": settings["eval_samples"],
    }
    return {**record, "name": f"{name} seed{settings['seed']}", "start": name, **details, "right": curve}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and append."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="Output folder of examples/arithmetic.sh or train lora.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the run (default: 0).")
    parser.add_argument("--learning", metavar="NAME", help="Record the learning curve under this name.")
    parser.add_argument("--out", type=Path, help="Results file to append to (default: in bench/results).")
    options = parser.parse_args(arguments)
    if options.learning is not None:
        append(options.out or LEARNING, learning(options.learning, options.run))
        return
    remedy = "run examples/arithmetic.sh to completion"
    found = {stage: read_json(options.run / file, remedy) for stage, file in STAGES.items()}
    for stage, record in found.items():
        append(options.out or RESULTS, line(stage, options.seed, record))


if __name__ == "__main__":
    main()
