"""``llm-trm datagen``."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.bars import passing_bar
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.world import SAME_DIFFICULTY, refuse_world_options, set_difficulty
from llm_trm.data.generation_config import DataGenConfig
from llm_trm.errors import Interrupted

if TYPE_CHECKING:
    from llm_trm.data.generation import GenerationProgress
    from llm_trm.data.pairs import PairFiles

#: Seconds between two lines of progress, if there is no terminal for a bar.
_SECONDS_BETWEEN_LINES = 30.0


@click.command(short_help="Let a language model think, and save its states before and after.")
@settings_options(DataGenConfig, SAME_DIFFICULTY)
@click.pass_context
def datagen(context: click.Context, /, given: dict[str, Any]) -> None:
    """Let a language model think about problems, and save its hidden states before and after.

    `llm-trm train phase2` learns from pairs: the final-norm states of all positions before <think>, and the
    state at </think>. They are written shard by shard. After an interruption, run the same command again: it
    continues after the last complete shard and draws the same samples.

    \b
    Examples:
      llm-trm datagen
      llm-trm datagen --operations 3 --split test --num-samples 200 -o data/held_out
      llm-trm datagen --model HuggingFaceTB/SmolLM3-3B --data gsm8k,math --max-new-tokens 4096
      accelerate launch --num_processes 8 --no_python llm-trm datagen --num-samples 100000
    """
    set_difficulty(context, given)
    config = DataGenConfig(**given)
    refuse_world_options(context, config.data)
    from llm_trm.data.generation import ThinkingDataGenerator
    from llm_trm.data.processes import launched_processes

    is_main = launched_processes().is_main
    display = _Display(shown=is_main)
    generator = ThinkingDataGenerator(config, on_progress=display.update)
    try:
        with display:
            pairs = generator.run()
    except KeyboardInterrupt as error:
        replaced = generator.started or not config.overwrite
        raise Interrupted.during(error, _advice() if replaced else "stopped: nothing was replaced") from error
    if is_main:
        _print(pairs, config.num_samples)


def _advice() -> str:
    """How to continue. Another --overwrite would start over."""
    again = [word for word in sys.argv[1:] if word not in ("--overwrite", "--fresh")]
    same = "the same command" + (" without --overwrite" if len(again) < len(sys.argv[1:]) else "")
    return f"stopped: {same} continues after the last complete shard: {shlex.join(['llm-trm', *again])}"


class _Display:
    """A progress bar on a terminal, and an occasional line elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._bar = passing_bar(disable=not shown)
        self._as_lines = shown and self._bar.disable
        self._started = self._last_line = time.monotonic()
        self._task = self._bar.add_task("problems", total=None, numbers="")

    def __enter__(self) -> _Display:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def update(self, progress: GenerationProgress) -> None:
        """Show the progress of the generation."""
        now = time.monotonic()
        generated = progress.pairs + progress.failures.total()
        if generated == 0:
            self._started = now
        rate = generated / max(now - self._started, 1e-9)
        text = f"{rate:.1f}/s, {progress.failures.total()} without a pair, batch {progress.batch_size}"
        self._bar.update(self._task, total=progress.total, completed=progress.done, numbers=text)
        if self._as_lines and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            click.echo(f"{progress.done} of {progress.total} problems, {text}", err=True)


def _print(pairs: PairFiles, asked: int) -> None:
    from llm_trm.data.decoding import REASONS

    failed = sum(pairs.failures.values())
    problems = pairs.samples + failed
    fewer = f" ({asked} were requested; there are no more)" if problems < asked else ""
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
