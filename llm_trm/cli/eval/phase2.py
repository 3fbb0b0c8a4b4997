"""``llm-trm eval phase2``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.language_model import trust_option
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import BATCH, DEPTH, FOLDER
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.choices import Halting
    from llm_trm.data.pairs import PairFiles
    from llm_trm.evaluate.phase2 import Phase2Evaluation, Scores


@click.command(short_help="Compare a trained recursion with the true states and with baselines.")
@click.option(
    "--checkpoint",
    type=FOLDER,
    default=Path("runs/phase2"),
    show_default=True,
    help="Folder of a run, whose best checkpoint is taken, or a single checkpoint.",
)
@click.option(
    "--data",
    type=FOLDER,
    required=True,
    help="Pairs to evaluate on, of problems that were not trained on.",
)
@click.option(
    "--train-data",
    type=FOLDER,
    help="Pairs that the baselines are fitted on. [default: those that the checkpoint was trained on]",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Language model whose head makes tokens of states. [default: the one that made the pairs]",
)
@click.option(
    "--max-steps",
    type=DEPTH,
    help="Supervision steps at most. [default: what the checkpoint says]",
)
@click.option(
    "--halting",
    type=click.Choice(["sample", "batch", "none"]),
    help="Whose confidence stops a context: its own, the mean of its batch, nobody's. "
    "[default: what the checkpoint says]",
)
@click.option("--batch-size", type=BATCH, default=64, show_default=True, help="Contexts at a time.")
@click.option(
    "--by",
    metavar="FIELD",
    help="Group the pairs by a field of their records: thinking_tokens, context_length, correct, or "
    "operations of arithmetic problems. Many different numbers are grouped by quartiles.",
)
@click.option("--no-baselines", is_flag=True, help="Leave the baselines out.")
@click.option(
    "--allow-training-data", is_flag=True, help="Evaluate on problems that were trained on, if it must be."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    metavar="FILE",
    help="JSON file for the figures.",
)
@trust_option
@device_option
def phase2(
    checkpoint: Path,
    data: Path,
    train_data: Path | None,
    model: str | None,
    max_steps: int | None,
    halting: Halting | None,
    batch_size: int,
    by: str | None,
    no_baselines: bool,
    allow_training_data: bool,
    output: Path | None,
    trust_remote_code: bool,
    device: str,
) -> None:
    """Measure how well a recursion predicts the state after thinking, on pairs it has not seen.

    Each prediction is compared with the state that the language model had after it really thought: in the
    compressed space that the recursion lives in, decompressed, and by the rank of the next token under the
    language model's head. Three baselines that do not think are measured beside it, and the true state,
    compressed and decompressed, which is the ceiling that the compressor leaves.

    \b
    Examples:
      llm-trm datagen --split test --num-samples 1000 -o runs/held_out
      llm-trm eval phase2 --checkpoint runs/phase2 --data runs/held_out
      llm-trm eval phase2 --data runs/held_out --by operations -o phase2.json
      llm-trm eval phase2 --data runs/held_out --by thinking_tokens --halting none
    """
    from llm_trm.extras import require

    require("train", "transformers")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from llm_trm.data.pairs import open_pairs
    from llm_trm.evaluate.held_out import require_held_out, shared_problems
    from llm_trm.evaluate.phase2 import evaluate_phase2, load_head, require_evaluable
    from llm_trm.models.phase2 import load_phase2

    where = resolve_device(device)
    trm, compressor, facts = load_phase2(checkpoint)
    pairs = open_pairs(data, compressor.d_model)
    trained_on = _training_pairs(facts, compressor.d_model)
    if not allow_training_data:
        require_held_out(pairs, facts.get("pairs", {}), trained_on, otherwise="pass --allow-training-data")
    fitted_on = None
    if not no_baselines:
        fitted_on = trained_on if train_data is None else open_pairs(train_data, compressor.d_model)
        if fitted_on is None:
            raise click.UsageError(
                f"the baselines need the pairs that {checkpoint} was trained on, and "
                f"{facts.get('data') or 'it does not say where they are'} is not there: name pairs with "
                "--train-data, or pass --no-baselines"
            )
        if not allow_training_data and (shared := shared_problems(pairs, fitted_on)):
            raise click.UsageError(
                f"{shared} of the {pairs.samples} problems in {data} are in {fitted_on.folder}, which the "
                "baselines are fitted on: name others with --train-data, or pass --allow-training-data"
            )
    require_evaluable(pairs, by, fitted_on)
    head = load_head(model or pairs.model, where, compressor.d_model, trust_remote_code=trust_remote_code)
    steps = max_steps or facts["max_steps"]
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        total = pairs.samples + (fitted_on.samples if fitted_on else 0)
        task = bar.add_task("pairs", total=total)
        found = evaluate_phase2(
            trm.to(where),
            compressor.to(where),
            pairs,
            head=head,
            train_pairs=fitted_on,
            max_steps=steps,
            halting=halting or facts["halting"],
            batch_size=batch_size,
            by=by,
            progress=lambda done: bar.advance(task, done),
        )
    if output is not None:
        from llm_trm.benchmark.environment import run_record
        from llm_trm.files import write_json

        about = {
            "checkpoint": str(checkpoint),
            "data": str(data),
            "train_data": str(fitted_on.folder) if fitted_on else None,
            "model": model or pairs.model,
            "max_steps": steps,
            "halting": halting or facts["halting"],
        }
        write_json(output, run_record(where) | about | found.to_json())
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False)  # a pipe has no width
    console.print(_table(found, pairs))
    if found.groups:
        console.print(_groups_table(found))
    console.print("\n".join(_words(found, compressor.d_compressed, compressor.d_model)), soft_wrap=True)


def _training_pairs(facts: dict[str, Any], hidden_size: int) -> PairFiles | None:
    """The pairs that the checkpoint was trained on, if they are still where they were."""
    from llm_trm.data.pairs import INDEX, open_pairs

    folder = facts.get("data")
    if folder is None or not (Path(folder) / INDEX).exists():
        return None
    return open_pairs(Path(folder), hidden_size)


def _table(found: Phase2Evaluation, pairs: PairFiles) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{pairs.folder}: {pairs.samples} pairs"), title_justify="left")
    table.add_column("prediction")
    for header in (
        "cosine",
        "MSE",
        "relative error",
        "full cosine",
        "rank 1 [95%]",
        "top 5",
        "1 / rank",
        "steps",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for name, scores in found.rows.items():
        table.add_row(
            name,
            f"{scores.cosine:.4f}",
            f"{scores.mse:.5f}",
            f"{scores.relative_error:.3f}",
            f"{scores.full_cosine:.4f}",
            _rank1(scores),
            _share(scores.top5),
            "-" if scores.reciprocal_rank is None else f"{scores.reciprocal_rank:.3f}",
            "-" if scores.steps is None else f"{scores.steps:.2f}",
            style=None if name == "TRM" else "dim",
        )
    return table


def _groups_table(found: Phase2Evaluation) -> Table:
    from rich.table import Table

    from llm_trm.evaluate.phase2 import TRM

    names = list(found.rows)
    table = Table()
    table.add_column(f"by {found.by}")
    for header in ("pairs", "cosine", *(f"rank 1, {name}" for name in names), "steps"):
        table.add_column(header, justify="right")
    for group, rows in found.groups.items():
        trm = rows[TRM]
        shares = [_rank1(rows[name]) if name == TRM else _share(rows[name].rank1) for name in names]
        table.add_row(group, str(trm.pairs), f"{trm.cosine:.4f}", *shares, f"{trm.steps:.2f}")
    return table


def _words(found: Phase2Evaluation, width: int, full_width: int) -> list[str]:
    """What the rows and columns mean, and how the recursion stands."""
    from llm_trm.evaluate.baselines import LAST_STATE, RIDGE, TRAINING_MEAN
    from llm_trm.evaluate.phase2 import TRM, TRUE_STATE

    meanings = {
        TRM: "the recursion's reasoning state where it halted",
        LAST_STATE: "the context's last state as it is: no thinking at all",
        TRAINING_MEAN: "the mean state after thinking, whatever the context",
        RIDGE: "the best linear map from the last and the mean context state "
        f"(regularisation {found.ridge_strength:g}, chosen on every fifth training pair)"
        if found.ridge_strength is not None
        else "",
        TRUE_STATE: "the state after real thinking, compressed and decompressed: what compression leaves",
    }
    lines = [f"{name}: {meanings[name]}." for name in found.rows]
    lines += [
        f"cosine, MSE and relative error: against the true state in the compressed space ({width} numbers); "
        f"full cosine: decompressed, against the language model's own state ({full_width} numbers).",
        "rank 1, top 5, 1 / rank: where the language model's head puts the token that it ranked first after "
        "thinking, given the decompressed prediction.",
    ]
    baselines = [name for name in found.rows if name not in (TRM, TRUE_STATE)]
    if baselines:
        best = max(baselines, key=lambda name: found.rows[name].rank1 or 0.0)
        lines.append(
            f"The next token comes first for {_share(found.rows[TRM].rank1)} of the recursion's predictions, "
            f"and for {_share(found.rows[best].rank1)} of the best baseline's ({best})."
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _rank1(scores: Scores) -> str:
    if scores.rank1_interval is None:
        return "-"
    low, high = scores.rank1_interval
    # A backslash keeps rich from reading the brackets as markup.
    return f"{_share(scores.rank1)} \\[{100 * low:.1f}, {100 * high:.1f}]"
