"""``llm-trm train phase2``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.settings import settings_options
from llm_trm.train.phase2.config import Phase2Config

if TYPE_CHECKING:
    from llm_trm.train.phase2.report import Phase2Result


@click.command(short_help="Train a recursion that predicts the state after thinking.")
@settings_options(Phase2Config)
def phase2(given: dict[str, Any]) -> None:
    """Train a SequenceTRM, a recursion that predicts the state after thinking from a context.

    The frozen compressor compresses the states before <think>. The recursion refines an appended reasoning
    token, supervision step by supervision step, towards the compressed state at </think>. Each step has its
    own loss and update. A halting head learns how good the state is, so that every sample can stop early
    at inference. At the end of each epoch, the averaged weights are validated on held-out pairs, and a
    checkpoint is written. An interrupted run continues with --resume, on a CPU bit for bit.

    \b
    On the arithmetic world, on a CPU:
      llm-trm train phase1 -o runs/phase1
      llm-trm datagen --min-operations 1 --operations 3 --max-operand 2 --num-samples 10000
      llm-trm train phase2 -n 2 -T 1 --supervision-steps 2 --batch-size 128 --learning-rate 4e-3 --epochs 30

    \b
    SmolLM3-3B on a GPU, as the original did:
      llm-trm train phase1 --model HuggingFaceTB/SmolLM3-3B -o runs/smollm3-phase1
      llm-trm datagen --model HuggingFaceTB/SmolLM3-3B --data gsm8k -o data/smollm3-gsm8k
      llm-trm train phase2 --data data/smollm3-gsm8k --compressor runs/smollm3-phase1 \\
          -o runs/smollm3-phase2 --patience 10 --track wandb

    \b
    Variants:
      llm-trm train phase2 --steps-per-update 8    one update per batch
      llm-trm train phase2 --halt-loss bce         halt above a threshold that adapts
      llm-trm train phase2 --resume                continue an interrupted run
      accelerate launch --num_processes 8 --no_python llm-trm train phase2 ...    on 8 GPUs
    """
    from llm_trm.extras import require

    require("train", "accelerate")
    from llm_trm.cli.train.phase2_progress import ConsoleReport
    from llm_trm.train.phase2.trainer import TRMSequenceTrainer
    from llm_trm.train.run.interruption import advising

    config = Phase2Config(**given)
    with advising(config), ConsoleReport() as report:
        trainer = TRMSequenceTrainer(config, report)
        result = trainer.train()
    if trainer.accelerator.is_main_process:
        _summarise(config.output, result)


def _summarise(output: Path, result: Phase2Result) -> None:
    from llm_trm.cli.train.console import show_curves
    from llm_trm.train.phase2.curves import plot_curves
    from llm_trm.train.phase2.report import best_record

    best = result.history[best_record(result.history)]
    held_out = best["validation"]
    if result.stopped_early:
        click.echo(f"Stopped early: no lower validation loss after epoch {best['epoch']}.")
    if result.skipped:
        click.echo(f"{result.skipped} updates were skipped, as their gradients were not finite.")
    click.echo(
        f"Best: epoch {best['epoch']}, held-out MSE {held_out['mse']:.6f}, cosine {held_out['cosine']:.4f}, "
        f"relative error {held_out['relative_error']:.4f}; halting sample by sample: cosine "
        f"{held_out['halted_cosine']:.4f} after {held_out['halt_steps']:.2f} steps."
    )
    click.echo(f"The model is in {result.best}.")
    show_curves(plot_curves, result.history, output)
    click.echo(f"Next: llm-trm eval phase2 --checkpoint {output} --data HELD_OUT_PAIRS")
