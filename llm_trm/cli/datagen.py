"""``llm-trm datagen``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.language_model import trust_option
from llm_trm.cli.options.types import (
    BATCH,
    COUNT,
    FOLDER,
    LENGTH,
    NO_OR_LENGTH,
    NO_OR_SPREAD,
    SEED,
    SHARE_ABOVE_ZERO,
)
from llm_trm.cli.options.world import refuse_world_options, world_from, world_options
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from llm_trm.data.generation import GenerationProgress
    from llm_trm.data.pairs import PairFiles

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
#: Between two lines about the progress, where there is no terminal for a bar.
_SECONDS_BETWEEN_LINES = 30.0


@click.command(short_help="Let a language model think, and keep its states before and after.")
@click.option(
    "--model",
    default="arithmetic",
    show_default=True,
    help="A model that thinks: a folder in Hugging Face format, a name on the hub, or the one that ships.",
)
@click.option(
    "--dataset",
    default="arithmetic",
    show_default=True,
    help="arithmetic, gsm8k, math, aime, humaneval, mbpp, apps, or a .jsonl or .json file with the columns "
    "question (or problem, prompt, text) and, where there is one, answer (or solution). Several, with commas "
    "between, give equal shares.",
)
@click.option(
    "--num-samples",
    type=COUNT,
    default=1000,
    show_default=True,
    help="Problems to think about.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="Of the data set; one that has a single split gives that.",
)
@world_options
@click.option(
    "--batch-size",
    type=BATCH,
    default=32,
    show_default=True,
    help="Problems at a time, on each device; halved where memory runs out.",
)
@click.option(
    "--max-new-tokens",
    type=LENGTH,
    default=1024,
    show_default=True,
    help="Most tokens up to </think>; a problem that takes more gives no pair.",
)
@click.option(
    "--max-prompt-tokens",
    type=LENGTH,
    default=2048,
    show_default=True,
    help="Problems with a longer prompt give no pair.",
)
@click.option(
    "--answer-tokens",
    type=NO_OR_LENGTH,
    default=32,
    show_default=True,
    help="Most tokens of the answer, which is recorded and graded; 0 leaves it out.",
)
@click.option(
    "--temperature",
    type=NO_OR_SPREAD,
    default=0.7,
    show_default=True,
    help="Of the thinking; 0 takes the likeliest token. The answer always does.",
)
@click.option(
    "--top-p",
    type=SHARE_ABOVE_ZERO,
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Of sampling and of arithmetic problems."
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("data/pairs"),
    show_default=True,
    help="Folder of the pairs. One that holds a part of them is finished.",
)
@click.option(
    "--shard-size",
    type=COUNT,
    default=512,
    show_default=True,
    help="Problems a file: what an interruption loses at most, and what one process takes at a time.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    help="Of the stored states. [default: the model's, bf16 on CUDA and fp32 elsewhere]",
)
@click.option("--fresh", is_flag=True, help="Start over, and remove the pairs that --output holds.")
@trust_option
@device_option
@click.pass_context
def datagen(
    context: click.Context,
    /,
    model: str,
    dataset: str,
    num_samples: int,
    split: str,
    batch_size: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    answer_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    output: Path,
    shard_size: int,
    dtype: str | None,
    fresh: bool,
    trust_remote_code: bool,
    device: str,
    **drawn: Any,
) -> None:
    """Let a language model think about problems, and keep its hidden states before and after.

    A pair is what `llm-trm train phase2` learns from: the final-norm states of every position before <think>,
    and the state at </think>. They are written shard by shard. Run the same command again after an
    interruption, and it goes on from the last whole shard, with the samples that it would have had.

    \b
    Examples:
      llm-trm datagen
      llm-trm datagen --operations 3 --split test --num-samples 200 -o data/held_out
      llm-trm datagen --model HuggingFaceTB/SmolLM3-3B --dataset gsm8k,math --max-new-tokens 4096
      accelerate launch --num_processes 8 --no_python llm-trm datagen --num-samples 100000
    """
    chosen = resolve_device(device)
    refuse_world_options(context, dataset)
    from llm_trm.data.decoding import Limits
    from llm_trm.data.generation import DataGenConfig, ThinkingDataGenerator
    from llm_trm.data.processes import launched_processes
    from llm_trm.data.sampling import Sampling

    config = DataGenConfig(
        output=output,
        model=model,
        dataset=dataset,
        split=split,  # type: ignore[arg-type]
        world=world_from(context, drawn),
        num_samples=num_samples,
        sampling=Sampling(temperature, top_p, seed),
        limits=Limits(max_prompt_tokens, max_new_tokens, answer_tokens),
        batch_size=batch_size,
        shard_size=shard_size,
        dtype=None if dtype is None else _DTYPES[dtype],
        device=chosen,
        fresh=fresh,
        trust_remote_code=trust_remote_code,
    )
    is_main = launched_processes().is_main
    try:
        with _Display(shown=is_main) as display:
            pairs = ThinkingDataGenerator(config, on_progress=display.update).run()
    except KeyboardInterrupt:
        click.echo("stopped: the same command goes on from the last whole shard", err=True)
        sys.exit(130)
    if is_main:
        _print(pairs, num_samples)


class _Display:
    """A progress bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._as_lines = shown and not console.is_terminal
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("problems"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=None, text="")

    def __enter__(self) -> _Display:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def update(self, progress: GenerationProgress) -> None:
        """Show where the generation is."""
        now = time.monotonic()
        generated = progress.pairs + progress.failures.total()
        if generated == 0:
            self._started = now
        rate = generated / max(now - self._started, 1e-9)
        text = f"{rate:.1f}/s, {progress.failures.total()} without a pair, batch {progress.batch_size}"
        self._bar.update(self._task, total=progress.total, completed=progress.done, text=text)
        if self._as_lines and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            click.echo(f"{progress.done} of {progress.total} problems, {text}", err=True)


def _print(pairs: PairFiles, asked: int) -> None:
    from llm_trm.data.decoding import REASONS

    failed = sum(pairs.failures.values())
    problems = pairs.samples + failed
    fewer = f" ({asked} were asked for; there are no more)" if problems < asked else ""
    click.echo(f"{pairs.samples} pairs of {problems} problems{fewer}: {pairs.folder}")
    for reason, count in sorted(pairs.failures.items(), key=lambda item: -item[1]):
        click.echo(f"  {count} without: {REASONS.get(reason, reason)}")
    if not pairs.samples:
        click.echo("Phase 2 needs pairs: use a model that thinks, or raise the limits above.")
        return
    thinking = graded = correct = 0
    for record in pairs.records():
        thinking += record["thinking_tokens"]
        graded += record["correct"] is not None
        correct += record["correct"] is True
    size = sum(entry.bytes for entry in pairs.entries)
    click.echo(
        f"context {pairs.rows / pairs.samples:.1f} tokens on average, thinking {thinking / pairs.samples:.1f}"
        f"; states of {pairs.hidden_size} {pairs.dtype}, {size / 2**20:.1f} MiB in {len(pairs.entries)} files"
    )
    if graded:
        click.echo(f"accuracy with thinking {correct / graded:.1%} of {graded} answers that could be graded")
    click.echo(f"Next: llm-trm train phase2 --data {pairs.folder}")
