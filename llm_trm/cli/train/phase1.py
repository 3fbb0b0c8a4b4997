"""``llm-trm train phase1``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_trm.cli.options.device import device_option, resolve_device
from llm_trm.cli.options.language_model import trust_option
from llm_trm.cli.options.types import (
    BATCH,
    COUNT,
    FOLDER,
    LEARNING_RATE,
    LENGTH,
    SEED,
    SHARE_WITHIN,
    TOKENS,
    WIDTH,
    WIDTHS,
)

if TYPE_CHECKING:
    from llm_trm.train.phase1.config import Phase1Config


@click.command(short_help="Train a compressor of a language model's hidden states.")
@click.option(
    "--model",
    default="arithmetic",
    show_default=True,
    help="arithmetic, which ships with this package, a folder in Hugging Face format, or a name on the hub.",
)
@click.option(
    "--stage",
    type=click.Choice(["1a", "1b", "both"]),
    default="both",
    show_default=True,
    help="1a learns on text; 1b goes on from there on thinking traces.",
)
@click.option(
    "--compressor",
    type=click.Choice(["dimension", "latent"]),
    default="dimension",
    show_default=True,
    help="dimension narrows every state, linearly; latent gathers a sequence of states in a few.",
)
@click.option(
    "--d-compressed",
    type=WIDTH,
    help="Width D' that states are narrowed to. [default: D/4 for D up to 512, else 256]",
)
@click.option(
    "--num-latents",
    type=LENGTH,
    help="Latents of --compressor latent. [default: 8 for D up to 512, else 256]",
)
@click.option(
    "--sweep", type=WIDTHS, default=(), metavar="WIDTHS", help="Train one compressor a width: 32,64,96."
)
@click.option(
    "--text",
    help="What stage 1a reads: a .txt or .jsonl file, or a dataset on the hub, NAME or NAME:SUBSET. "
    "[default: arithmetic problems for --model arithmetic, else "
    "HuggingFaceFW/fineweb-edu:sample-10BT]",
)
@click.option(
    "--traces",
    help="What stage 1b reads: a .jsonl file with question, thinking and answer, a folder of llm-trm "
    "datagen, or chats on the hub. [default: worked problems for --model arithmetic, else "
    "open-r1/OpenR1-Math-220k]",
)
@click.option(
    "--from",
    "start",
    type=FOLDER,
    help="Compressor that --stage 1b starts from. [default: stage 1a in --output]",
)
@click.option(
    "--num-tokens",
    type=TOKENS,
    help="States to learn from and to validate on, a stage. [default: 100000 for D up to 512, else 1000000]",
)
@click.option(
    "--max-length",
    type=LENGTH,
    help="Longest text, in tokens; a longer one is cut into several. [default: 512, or the model's context]",
)
@click.option(
    "--lm-batch-size",
    type=BATCH,
    default=16,
    show_default=True,
    help="Texts that the language model reads at once.",
)
@click.option(
    "--held-out",
    type=SHARE_WITHIN,
    default=0.1,
    show_default=True,
    help="Share of the texts that only validates.",
)
@click.option("--epochs", type=COUNT, default=20, show_default=True, help="Most passes over the states.")
@click.option(
    "--patience",
    type=COUNT,
    default=5,
    show_default=True,
    help="Stop after so many epochs without a better validation error.",
)
@click.option(
    "--batch-size",
    type=BATCH,
    help="Of an optimizer step, over all processes. [default: 1024 states, or 32 sequences for latent]",
)
@click.option(
    "--learning-rate",
    type=LEARNING_RATE,
    help="Peak of warm-up and cosine. [default: 0.2/sqrt(D), or 0.03/sqrt(D) for latent]",
)
@click.option(
    "--init",
    type=click.Choice(["orthogonal", "pca"]),
    default="orthogonal",
    show_default=True,
    help="Start of stage 1a; pca is the optimum itself, of a linear compressor.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights and order.")
@click.option(
    "--track",
    type=click.Choice(["wandb", "tensorboard", "jsonl"]),
    help="Where the curves go; jsonl writes metrics.jsonl in --output. [default: nowhere]",
)
@click.option(
    "--states",
    type=FOLDER,
    help="Folder of the hidden states, for this run and others. [default: states in --output]",
)
@click.option(
    "--keep-states/--drop-states",
    default=True,
    show_default=True,
    help="Whether the states stay on disk, so that another run need not compute them.",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("runs/phase1"),
    show_default=True,
    help="Folder of the compressors: 1a and 1b in it, or d32/1a and so on of a sweep.",
)
@click.option("--overwrite", is_flag=True, help="Replace compressors that other settings made.")
@trust_option
@device_option
def phase1(
    model: str,
    stage: str,
    compressor: str,
    d_compressed: int | None,
    num_latents: int | None,
    sweep: tuple[int, ...],
    text: str | None,
    traces: str | None,
    start: Path | None,
    num_tokens: int | None,
    max_length: int | None,
    lm_batch_size: int,
    held_out: float,
    epochs: int,
    patience: int,
    batch_size: int | None,
    learning_rate: float | None,
    init: str,
    seed: int,
    track: str | None,
    states: Path | None,
    keep_states: bool,
    output: Path,
    overwrite: bool,
    trust_remote_code: bool,
    device: str,
) -> None:
    """Train a compressor of a frozen language model's hidden states, to lose as little as it can.

    The states are computed once and kept on disk. Then the compressor learns to bring them back: the linear
    one with its own weights transposed, and beside it stands what PCA reaches, which no linear compressor can
    beat on the states that it learned from; the latent one through a decoder that is thrown away. The figures
    are of texts that were held out. The same command runs on several processes under `accelerate launch`.

    \b
    Examples:
      llm-trm train phase1
      llm-trm train phase1 --sweep 16,32,64,96 -o runs/sweep
      llm-trm train phase1 --compressor latent --num-latents 8 -o runs/latents
      llm-trm train phase1 --model HuggingFaceTB/SmolLM3-3B --d-compressed 256 -o runs/smollm3
      accelerate launch --num_processes 8 --no_python llm-trm train phase1 ...    on 8 GPUs
    """
    from llm_trm.train.phase1.config import Phase1Config

    resolve_device(device)
    config = Phase1Config(
        output=output,
        model=model,
        stage=stage,  # type: ignore[arg-type]
        compressor=compressor,  # type: ignore[arg-type]
        d_compressed=d_compressed,
        num_latents=num_latents,
        sweep=sweep,
        text=text,
        traces=traces,
        start=start,
        num_tokens=num_tokens,
        max_length=max_length,
        lm_batch_size=lm_batch_size,
        held_out=held_out,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        init=init,  # type: ignore[arg-type]
        seed=seed,
        device=device,
        track=track,  # type: ignore[arg-type]
        states=states,
        keep_states=keep_states,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    _run(config)


def _run(config: Phase1Config) -> None:
    from rich.console import Console

    from llm_trm.cli.train.phase1_progress import ConsoleProgress, result_table
    from llm_trm.train.phase1.trainer import SWEEP_FILE, SWEEP_PLOT, CompressorPretrainer

    with ConsoleProgress() as progress:
        trainer = CompressorPretrainer(config, progress)
        results = trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    latent = config.compressor == "latent"
    console = Console(highlight=False, soft_wrap=True)
    console.print(result_table(results, latent))
    if latent:
        click.echo("On held-out states, beside what the mean of the training states reaches.")
    else:
        click.echo(
            "On held-out states. PCA is that of the training states: on those, no linear compressor has a "
            "lower MSE; it bounds neither other states nor the cosine."
        )
    written = [config.output / SWEEP_FILE, config.output / SWEEP_PLOT] if config.sweep else []
    click.echo("Written: " + ", ".join(map(str, [*written, *(result.folder for result in results)])))
    if not latent:
        click.echo(f"Next: llm-trm datagen --model {config.model}")
        click.echo(f"      llm-trm train phase2 --compressor {results[-1].folder}")
