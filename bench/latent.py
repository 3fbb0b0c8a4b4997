"""Keeps what a run of the arithmetic world found: ``python -m bench.latent runs/arithmetic --seed 0``.

Reads the figures that ``llm-trm eval lm`` wrote in ``examples/arithmetic.sh``, after LoRA (lora.json) and
after phase 3 (phase3.json), and appends a line of each to bench/results/latent.jsonl; ``python -m
bench.report`` draws docs/latent.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_trm.files import read_json

RESULTS = Path(__file__).parent / "results" / "latent.jsonl"
#: Stages of the script that end in an evaluation, and the file of each.
STAGES = {"lora": "lora.json", "phase3": "phase3.json"}


def line(stage: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """One evaluation as a line of the results file: all but the times of single batches."""
    kept = {name: value for name, value in found.items() if name != "batch_seconds"}
    name = f"latent arithmetic {stage} seed{seed}"
    return {"name": name, "device": found["machine"]["device"], "stage": stage, "seed": seed, **kept}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and append."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.latent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder that examples/arithmetic.sh wrote")
    parser.add_argument("--seed", type=int, default=0, help="that it was given (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file to append to")
    options = parser.parse_args(arguments)
    remedy = "run examples/arithmetic.sh to its end"
    found = {stage: read_json(options.run / file, remedy) for stage, file in STAGES.items()}
    with options.out.open("a", encoding="utf-8") as file:
        for stage, record in found.items():
            file.write(json.dumps(line(stage, options.seed, record)) + "\n")


if __name__ == "__main__":
    main()
