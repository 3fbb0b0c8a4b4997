"""``llm-trm eval lm``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from llm_trm.choices import DeviceName
from llm_trm.cli.bars import progress_bar
from llm_trm.cli.eval.lm_tables import group_table, mode_table, remarks
from llm_trm.cli.options.language_model import ModelChoice, chosen_checkpoint, memory_advice
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options, was_given
from llm_trm.cli.options.world import SAME_DIFFICULTY, refuse_world_options, set_difficulty
from llm_trm.cli.tables import table_console
from llm_trm.data.arithmetic import Split, World
from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.evaluate.decoding import MODES, Decoding, Mode
from llm_trm.extras import require, require_plot
from llm_trm.ranges import BATCH, COUNT, LENGTH, SEED, shown
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite

_ARITHMETIC = "arithmetic"
#: Tokens that suffice for the traces of arithmetic problems, and for most of written-out thinking.
_FEW_TOKENS, _MANY_TOKENS = 256, 2048


@dataclass(frozen=True)
class EvalLanguageModelSettings(Settings):
    """Options of ``llm-trm eval lm``."""

    choice: ModelChoice = field(default_factory=ModelChoice)
    mode: str = setting(
        ",".join(MODES),
        "Comma-separated modes to compare. no-think: the plain model answers immediately. think: it writes "
        "its thinking first. latent: the trained model recurs instead.",
        metavar="MODES",
    )
    data: str = setting(
        _ARITHMETIC,
        "Problems: arithmetic, gsm8k, math, aime, or a .jsonl or .json file with the columns question and "
        "answer. Separate several by commas for equal shares.",
        was=("--dataset",),
    )
    split: Split = setting(
        "test", "Split of a data set on the hub, or of arithmetic, whose test split is held out."
    )
    num_samples: int = setting(1000, "Maximum number of problems.", COUNT)
    world: World = field(default_factory=World)
    seed: int = setting(0, "Seed for arithmetic problems.", SEED)
    batch_size: int = setting(
        32, "Problems per batch in every mode; 1 measures the latency for a single user.", BATCH
    )
    max_new_tokens: int | None = setting(
        None,
        "Maximum number of tokens per answer, including thinking; an answer that is cut off counts as wrong.",
        LENGTH,
        unset=f"{_FEW_TOKENS} for arithmetic, {_MANY_TOKENS} for others",
    )
    by: str | None = setting(
        None,
        "Group the problems by a field of their records, for example operations. Numbers with many different "
        "values are grouped by quartiles.",
        metavar="FIELD",
    )
    output: Path | None = output_file("JSON file for the results.")
    plot: Path | None = output_file("Draw accuracy against time as .png, .svg or .pdf.", "--plot")
    overwrite: bool = overwrite("Replace the files of --output and --plot if they exist.")
    write_card: bool = setting(False, "Put the results into the checkpoint's folder and its model card.")
    device: DeviceName = device()

    @property
    def modes(self) -> list[Mode]:
        """The modes to compare, in their usual order."""
        names = {name.strip() for name in self.mode.split(",") if name.strip()}
        if not names or names - set(MODES):
            raise InputError(f"--mode {shown(self.mode)}: name one or more of {', '.join(MODES)}")
        return [mode for mode in MODES if mode in names]

    @property
    def limit(self) -> int:
        """Maximum number of tokens per answer."""
        return self.max_new_tokens or (_FEW_TOKENS if self.data == _ARITHMETIC else _MANY_TOKENS)

    @property
    def problems(self) -> str:
        """The problems as text."""
        from llm_trm.data.problems import is_file

        if self.data != _ARITHMETIC:
            return self.data if is_file(self.data) else f"{self.data} ({self.split})"
        low, high = self.world.min_operations, self.world.max_operations
        count = f"{high}" if low == high else f"{low} to {high}"
        largest = self.world.modulus - 1 if self.world.max_operand is None else self.world.max_operand
        noun = "operation" if high == 1 else "operations"
        return (
            f"the arithmetic world ({'held out, ' if self.split == 'test' else ''}{count} {noun}, operands "
            f"up to {largest}, seed {self.seed})"
        )


@click.command(short_help="Compare a recursion with written-out thinking and with immediate answers.")
@settings_options(EvalLanguageModelSettings, SAME_DIFFICULTY, config_file=False)
@click.pass_context
def lm(context: click.Context, /, given: dict[str, Any]) -> None:
    """Let a language model answer the same problems immediately, after thinking, and after a recursion.

    An answer follows #### or is in \\boxed{}, or is the last number; numbers are compared as numbers.
    Decoding is greedy. The modes take turns on every batch, so that a machine that slows down affects all of
    them. Each mode warms up before the clock starts.

    no-think and think use the base model of the checkpoint, without its adapters and its recursion, or the
    model that --model names.

    \b
    Examples:
      llm-trm eval lm --checkpoint runs/lora
      llm-trm eval lm --min-operations 1 --max-operand 2 --by operations --plot lm.png -o lm.json
      llm-trm eval lm --checkpoint runs/gsm8k --data gsm8k --batch-size 8 --write-card
      llm-trm eval lm --model arithmetic --mode no-think,think
    """
    set_difficulty(context, given)
    asked = EvalLanguageModelSettings(**given)
    modes = asked.modes
    refuse_world_options(context, asked.data, "seed")
    require("train", "transformers")
    if asked.plot is not None:
        require_plot(asked.plot)
    outputs = {"--output": asked.output, "--plot": asked.plot}
    inputs = [Path(name.strip()) for name in asked.data.split(",")]
    require_new_files(outputs, overwrite=asked.overwrite, inputs=inputs)
    from llm_trm.benchmark.environment import run_record
    from llm_trm.data.problems import load_questions
    from llm_trm.evaluate.language_model import evaluate_language_model, require_graded
    from llm_trm.evaluate.language_model_modes import load_responders

    where = resolve_device(asked.device)
    choice = asked.choice
    checkpoint = chosen_checkpoint(choice.checkpoint, choice.model)
    if asked.write_card:
        _require_card(checkpoint, modes)
    loaded = load_questions(
        asked.data, asked.num_samples, split=asked.split, seed=asked.seed, world=asked.world
    )
    questions = require_graded(loaded)
    ungraded = len(loaded) - len(questions)
    responders, missing = load_responders(
        modes, checkpoint, choice.model, where, trust_remote_code=choice.trust_remote_code
    )
    _report_missing(missing, modes, named=was_given(context, "mode"))
    if "latent" in responders:
        texts = [question.text for question in loaded]
        _report_trained_on(responders["latent"].model, asked.data, asked.split, texts)
    batches = -(-len(questions) // asked.batch_size) * len(responders)
    with memory_advice(), progress_bar("batches", batches) as advance:
        found = evaluate_language_model(
            responders,
            questions,
            Decoding(asked.limit),
            batch_size=asked.batch_size,
            by=asked.by,
            progress=advance,
        )
    plain = next((responder.name for mode, responder in responders.items() if mode != "latent"), None)
    record = run_record(where) | {
        "checkpoint": checkpoint,
        "model": plain,
        "data": asked.data,
        "data_words": asked.problems,
        "split": asked.split,
        "seed": asked.seed,
        "ungraded": ungraded,
        "batch_size": asked.batch_size,
        "max_new_tokens": asked.limit,
        "missing": missing,
        **found.to_json(),
    }
    if asked.output is not None:
        from llm_trm.files import write_json

        write_json(asked.output, record)
    title = f"{len(questions)} problems of {asked.problems}, {asked.batch_size} at a time"
    if asked.plot is not None:
        from llm_trm.evaluate.language_model_plot import plot_modes

        plot_modes(found.modes, asked.plot, title)
    if ungraded:
        click.echo(f"{ungraded} problems have no answer to compare with", err=True)
    console = table_console()
    console.print(mode_table(found.modes, title))
    if found.groups:
        console.print(group_table(found))
    console.print("\n".join(remarks(found, asked.limit, plain)), soft_wrap=True, markup=False)
    if asked.write_card:
        _write_card(responders["latent"].model, Path(str(checkpoint)), record)


def _report_missing(missing: Mapping[Mode, str], modes: list[Mode], *, named: bool) -> None:
    """Raise InputError if a mode that the user named cannot run, or none can; print the others."""
    if missing and (named or len(missing) == len(modes)):
        raise InputError("; ".join(f"mode {mode} cannot run: {reason}" for mode, reason in missing.items()))
    for mode, reason in missing.items():
        click.echo(f"left out {mode}: {reason}", err=True)


def _report_trained_on(model: Any, data: str, split: str, asked: list[str]) -> None:
    """Print which problems the model was trained on, as far as its folder records it."""
    from llm_trm.data.problems import is_file, read_questions
    from llm_trm.models.causal.card import about
    from llm_trm.text import normalise_spaces

    facts = about(model).facts
    # Older versions recorded it as dataset.
    phase3 = facts.get("phase3", {})
    sources = (str(facts.get("data")), str(phase3.get("data", phase3.get("dataset"))))
    trained = {name.strip() for source in sources for name in source.split(",")}
    files = {Path(name).resolve() for name in trained if is_file(name)}
    named = {name.strip() for name in data.split(",")}
    for name in sorted(named):
        if Path(name).resolve() in files if is_file(name) else name in trained and split == "train":
            click.echo(f"{name} is what the model was trained on, not held out from it", err=True)
    for file in sorted(files - {Path(name).resolve() for name in named}):
        # It may be gone, or no longer what it was.
        with suppress(InputError):
            learned = {normalise_spaces(question.text) for question in read_questions(file)}
            if shared := sum(normalise_spaces(text) in learned for text in asked):
                click.echo(
                    f"{shared} of the {len(asked)} problems are in {file}, which the model was trained on",
                    err=True,
                )


def _require_card(checkpoint: str | None, modes: list[Mode]) -> None:
    from llm_trm.files import require_writable

    if checkpoint is None or not Path(checkpoint).is_dir():
        raise click.UsageError("--write-card needs a --checkpoint that is a folder here")
    if "latent" not in modes:
        raise click.UsageError("--write-card needs the mode latent, which the card describes")
    require_writable(Path(checkpoint))


def _write_card(model: Any, folder: Path, record: dict[str, Any]) -> None:
    from llm_trm.models.causal.card import CARD_FILE, write_evaluation

    if write_evaluation(model, folder, record):
        click.echo(f"The results are in {folder / CARD_FILE}.")
    else:
        click.echo(f"{folder / CARD_FILE} was written by hand and is left unchanged.", err=True)
