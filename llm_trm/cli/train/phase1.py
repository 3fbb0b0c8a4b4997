"""``llm-trm train phase1``."""

from __future__ import annotations

from typing import Any

import click

from llm_trm.cli.options.settings import settings_options
from llm_trm.train.phase1.config import Phase1Config


@click.command(short_help="Train a compressor of a language model's hidden states.")
@settings_options(Phase1Config)
def phase1(given: dict[str, Any]) -> None:
    """Train a compressor of a frozen language model's hidden states that loses as little as possible.

    The states are computed once and kept on disk. Then the compressor learns to reconstruct them: a linear
    compressor with its own transposed weights, a latent one through an auxiliary decoder. Results are
    measured on held-out texts. A linear compressor is compared with PCA, which no linear compressor can beat
    on its training states. Run the same command again after an interruption: it continues where it stopped.

    \b
    Examples:
      llm-trm train phase1
      llm-trm train phase1 --sweep 16,32,64,96 -o runs/sweep
      llm-trm train phase1 --compressor latent --num-latents 8 -o runs/latents
      llm-trm train phase1 --model HuggingFaceTB/SmolLM3-3B --d-compressed 256 -o runs/smollm3
      accelerate launch --num_processes 8 --no_python llm-trm train phase1 ...    on 8 GPUs
    """
    from rich.console import Console

    from llm_trm.cli.train.phase1_progress import ConsoleProgress, result_table
    from llm_trm.train.phase1.trainer import SWEEP_FILE, SWEEP_PLOT, CompressorPretrainer
    from llm_trm.train.run.interruption import advising

    config = Phase1Config(**given)
    with advising(config), ConsoleProgress() as progress:
        trainer = CompressorPretrainer(config, progress)
        results = trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    latent = config.compressor == "latent"
    console = Console(highlight=False, soft_wrap=True)
    console.print(result_table(results, latent))
    if latent:
        click.echo("On held-out states, next to the mean of the training states.")
    else:
        click.echo(
            "On held-out states. PCA was computed on the training states: there, no linear compressor has a "
            "lower MSE. It is not a bound for other states or for the cosine."
        )
    written = [config.output / SWEEP_FILE, config.output / SWEEP_PLOT] if config.sweep else []
    click.echo("Written: " + ", ".join(map(str, [*written, *(result.folder for result in results)])))
    if not latent:
        click.echo(f"Next: llm-trm datagen --model {config.model}")
        click.echo(f"      llm-trm train phase2 --compressor {results[-1].folder}")
