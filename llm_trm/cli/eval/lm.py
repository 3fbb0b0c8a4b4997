"""``llm-trm eval lm``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.language_model import chosen_checkpoint, memory_advice, model_options
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import BATCH, COUNT, LENGTH, SEED
from llm_trm.cli.options.world import refuse_world_options, world_from, world_options
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.evaluate.language_model import LanguageModelEvaluation, ModeScores
    from llm_trm.evaluate.language_model_modes import Mode

_MODES = "no-think,think,latent"
_ARITHMETIC = "arithmetic"
_OUTPUT = click.Path(path_type=Path, dir_okay=False)
#: Tokens that suffice for the traces of arithmetic problems, and for most of written-out thinking.
_FEW_TOKENS, _MANY_TOKENS = 256, 2048


def _modes(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    known = _MODES.split(",")
    if not names or set(names) - set(known):
        raise click.BadParameter(f"{value!r}: name one or more of {_MODES}, with commas between")
    return [name for name in known if name in names]


@click.command(short_help="Compare a recursion with written-out thinking, and with none.")
@model_options
@click.option(
    "--mode",
    "modes",
    default=_MODES,
    show_default=True,
    callback=_modes,
    help="What to compare. no-think: the plain model answers at once. think: it writes its thinking first. "
    "latent: the trained model recurs instead.",
)
@click.option(
    "--data",
    "--dataset",
    "data",
    default=_ARITHMETIC,
    show_default=True,
    help="arithmetic, gsm8k, math, aime, or a .jsonl or .json file with the columns question and answer. "
    "Several, with commas between, give equal shares.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="test",
    show_default=True,
    help="Of arithmetic, which holds its test split out, and of data sets on the hub.",
)
@click.option(
    "--num-samples",
    type=COUNT,
    default=1000,
    show_default=True,
    help="Problems; fewer if there are no more.",
)
@world_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of arithmetic problems.")
@click.option(
    "--batch-size",
    type=BATCH,
    default=32,
    show_default=True,
    help="Problems at a time, in every mode; 1 is what a single user waits for.",
)
@click.option(
    "--max-new-tokens",
    type=LENGTH,
    help="Most tokens of an answer, thinking included; one that does not end counts as wrong. "
    f"[default: {_FEW_TOKENS} for arithmetic, {_MANY_TOKENS} for others]",
)
@click.option(
    "--by",
    metavar="FIELD",
    help="Group the problems by a field of their records, for instance operations. Many different numbers "
    "are grouped by quartiles.",
)
@click.option(
    "-o", "--output", type=_OUTPUT, callback=output_file, metavar="FILE", help="JSON file for the figures."
)
@click.option(
    "--plot",
    type=_OUTPUT,
    callback=output_file,
    metavar="FILE",
    help="Draw accuracy against time: .png, .svg or .pdf.",
)
@click.option(
    "--write-card", is_flag=True, help="Put the figures into the checkpoint's folder and its model card."
)
@device_option
@click.pass_context
def lm(
    context: click.Context,
    /,
    checkpoint: str | None,
    model: str | None,
    modes: list[Mode],
    data: str,
    split: str,
    num_samples: int,
    seed: int,
    batch_size: int,
    max_new_tokens: int | None,
    by: str | None,
    output: Path | None,
    plot: Path | None,
    write_card: bool,
    trust_remote_code: bool,
    device: str,
    **drawn: Any,
) -> None:
    """Let a language model answer the same problems at once, after thinking, and after a recursion.

    An answer stands behind #### or in \\boxed{}, or is the last number; numbers are compared as numbers. Each
    answer takes the likeliest tokens. Every mode answers the same batches, one mode after the other, so that
    a machine that slows down slows all of them; each has written a few tokens before the clock starts.

    no-think and think are the language model that the checkpoint was made of, without its adapters and its
    recursion, or the one that --model names.

    \b
    Examples:
      llm-trm eval lm --checkpoint runs/lora
      llm-trm eval lm --min-operations 1 --max-operand 2 --by operations --plot lm.png -o lm.json
      llm-trm eval lm --checkpoint runs/gsm8k --data gsm8k --batch-size 8 --write-card
      llm-trm eval lm --model arithmetic --mode no-think,think
    """
    refuse_world_options(context, data, "seed")
    from llm_trm.extras import require

    require("train", "transformers")
    from rich.console import Console

    from llm_trm.cli.bars import progress_bar
    from llm_trm.data.problems import load_questions
    from llm_trm.evaluate.language_model import evaluate_language_model, require_graded
    from llm_trm.evaluate.language_model_modes import Decoding, load_responders

    where = resolve_device(device)
    if plot is not None:
        from llm_trm.evaluate.language_model_plot import require_plot

        require_plot(plot)
    checkpoint = chosen_checkpoint(checkpoint, model)
    if write_card:
        _require_card(checkpoint, modes)
    world = world_from(context, drawn)
    asked = load_questions(data, num_samples, split=split, seed=seed, world=world)  # type: ignore[arg-type]
    questions = require_graded(asked)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False)  # a pipe has no width
    responders, missing = load_responders(
        modes, checkpoint, model, where, trust_remote_code=trust_remote_code
    )
    _tell_missing(missing, modes, named=_named(context, "modes"))
    if "latent" in responders:
        _tell_trained(responders["latent"].model, data, split, [question.text for question in asked])
    limit = max_new_tokens or (_FEW_TOKENS if data == _ARITHMETIC else _MANY_TOKENS)
    batches = -(-len(questions) // batch_size) * len(responders)
    with memory_advice(), progress_bar("batches", batches) as advance:
        found = evaluate_language_model(
            responders, questions, Decoding(limit), batch_size=batch_size, by=by, progress=advance
        )
    from llm_trm.benchmark.environment import run_record

    plain = next((responder.name for mode, responder in responders.items() if mode != "latent"), None)
    words = _data_words(data, split, seed, world)
    record = run_record(where) | {
        "checkpoint": checkpoint,
        "model": plain,
        "data": data,
        "data_words": words,
        "split": split,
        "seed": seed,
        "ungraded": len(asked) - len(questions),
        "batch_size": batch_size,
        "max_new_tokens": limit,
        "missing": missing,
        **found.to_json(),
    }
    if output is not None:
        from llm_trm.files import write_json

        write_json(output, record)
    if plot is not None:
        from llm_trm.evaluate.language_model_plot import plot_modes

        plot_modes(found.modes, plot, f"{len(questions)} problems of {words}, {batch_size} at a time")
    if len(asked) > len(questions):
        click.echo(f"{len(asked) - len(questions)} problems have no answer to compare with", err=True)
    console.print(_table(found.modes, f"{len(questions)} problems of {words}, {batch_size} at a time"))
    if found.groups:
        console.print(_groups_table(found))
    console.print("\n".join(_words(found, limit, plain)), soft_wrap=True, markup=False)
    if write_card:
        _write_card(responders["latent"].model, Path(str(checkpoint)), record)


def _named(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _tell_missing(missing: Mapping[Mode, str], modes: list[Mode], *, named: bool) -> None:
    """A mode that somebody named must run; of those that nobody did, one must."""
    from llm_trm.errors import InputError

    if missing and (named or len(missing) == len(modes)):
        raise InputError("; ".join(f"mode {mode} cannot run: {reason}" for mode, reason in missing.items()))
    for mode, reason in missing.items():
        click.echo(f"left out {mode}: {reason}", err=True)


def _tell_trained(model: Any, data: str, split: str, asked: list[str]) -> None:
    """Say so where problems are among those that the model was trained on, as far as its folder tells."""
    from llm_trm.data.problems import is_file, read_questions
    from llm_trm.errors import InputError
    from llm_trm.models.causal.card import about
    from llm_trm.text import normalise_spaces

    facts = about(model).facts
    # Named dataset by versions before this one.
    phase3 = facts.get("phase3", {})
    sources = (str(facts.get("data")), str(phase3.get("data", phase3.get("dataset"))))
    trained = {name.strip() for source in sources for name in source.split(",")}
    files = {Path(name).resolve() for name in trained if is_file(name)}
    named = {name.strip() for name in data.split(",")}
    for name in sorted(named):
        if Path(name).resolve() in files if is_file(name) else name in trained and split == "train":
            click.echo(f"{name} is what the model was trained on, not held out from it", err=True)
    for file in sorted(files - {Path(name).resolve() for name in named}):
        # Gone, or no longer what it was: then nobody can tell.
        with suppress(InputError):
            learned = {normalise_spaces(question.text) for question in read_questions(file)}
            if shared := sum(normalise_spaces(text) in learned for text in asked):
                click.echo(
                    f"{shared} of the {len(asked)} problems are in {file}, which the model was trained on",
                    err=True,
                )


def _require_card(checkpoint: str | None, modes: list[Mode]) -> None:
    from llm_trm.files import writable_folder

    if checkpoint is None or not Path(checkpoint).is_dir():
        raise click.UsageError("--write-card needs a --checkpoint that is a folder here")
    if "latent" not in modes:
        raise click.UsageError("--write-card needs the mode latent, which the card is about")
    writable_folder(Path(checkpoint))


def _write_card(model: Any, folder: Path, record: dict[str, Any]) -> None:
    from llm_trm.models.causal.card import CARD_FILE, write_evaluation

    if write_evaluation(model, folder, record):
        click.echo(f"The figures are in {folder / CARD_FILE}.")
    else:
        click.echo(f"{folder / CARD_FILE} was written by hand and stays as it is.", err=True)


def _data_words(data: str, split: str, seed: int, world: Any) -> str:
    if data != _ARITHMETIC:
        return data if data.endswith((".json", ".jsonl")) else f"{data} ({split})"
    low, high = world.min_operations, world.max_operations
    count = f"{high}" if low == high else f"{low} to {high}"
    largest = world.modulus - 1 if world.max_operand is None else world.max_operand
    noun = "operation" if high == 1 else "operations"
    return (
        f"the arithmetic world ({'held out, ' if split == 'test' else ''}{count} {noun}, operands up to "
        f"{largest}, seed {seed})"
    )


def _table(modes: Mapping[Mode, ModeScores], title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("mode")
    for header in (
        "exact match [95%]",
        "tokens",
        "time a problem [p20, p80]",
        "TRM steps",
        "soft tokens",
        "cut",
    ):
        table.add_column(escape(header), justify="right", no_wrap=True)
    for mode, scores in modes.items():
        latent = mode == "latent"
        table.add_row(
            mode,
            escape(_accuracy(scores)),
            f"{scores.tokens:.1f}",
            escape(_time(scores)),
            f"{scores.steps:.2f}" if latent else "-",
            f"{scores.soft_tokens:.1f}" if latent else "-",
            f"{scores.cut:.1%}",
        )
    return table


def _groups_table(found: LanguageModelEvaluation) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"by {found.by}"), title_justify="left")
    table.add_column(escape(str(found.by)))
    table.add_column("problems", justify="right")
    for mode in found.modes:
        table.add_column(escape(f"{mode} [95%]"), justify="right", no_wrap=True)
        table.add_column("tokens", justify="right")
    if "latent" in found.modes:
        table.add_column("TRM steps", justify="right")
    for label, modes in found.groups.items():
        cells = [
            cell for scores in modes.values() for cell in (escape(_accuracy(scores)), f"{scores.tokens:.1f}")
        ]
        if "latent" in modes:
            cells.append(f"{modes['latent'].steps:.2f}")
        table.add_row(escape(label), str(next(iter(modes.values())).problems), *cells)
    return table


def _words(found: LanguageModelEvaluation, limit: int, plain: str | None) -> list[str]:
    """How the recursion stands, and what the columns mean."""
    lines = []
    ratios = found.ratios
    if ratios is not None:
        if ratios.gap_closed is None:
            lines.append("Thinking gains nothing over answering at once here: there is no gap to close.")
        else:
            interval = ratios.gap_closed_interval
            bounds = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
            lines.append(
                f"latent closes {ratios.gap_closed:.1%}{bounds} of the gap between no-think and think."
            )
        lines.append(
            f"It takes {ratios.tokens:.1%} of the tokens that thinking takes, and {ratios.seconds:.1%} of "
            "its time."
        )
    latent = found.modes.get("latent")
    if latent is not None and latent.thoughts < 1:
        lines.append(
            f"The model recurs {latent.thoughts:.2f} times a problem: it does not always write <think>."
        )
    if any(scores.cut for scores in found.modes.values()):
        lines.append(
            f"cut: answers that did not end within {limit} tokens (--max-new-tokens), held for wrong."
        )
    if plain is not None:
        lines.append(f"no-think and think are {plain}.")
    return lines


def _accuracy(scores: ModeScores) -> str:
    low, high = scores.interval
    return f"{scores.accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _time(scores: ModeScores) -> str:
    if scores.seconds is None or scores.spread is None:
        return "-"
    factor, unit = (1000.0, "ms") if scores.seconds < 1 else (1.0, "s")
    low, high = scores.spread
    return f"{factor * scores.seconds:.2f} {unit} [{factor * low:.2f}, {factor * high:.2f}]"
