"""``llm-trm eval phase2``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.choices import DeviceName, Halting
from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.tables import new_table, table_console, with_interval
from llm_trm.device import resolve_device
from llm_trm.extras import require
from llm_trm.ranges import BATCH, DEPTH
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite, trust_remote_code

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.data.pairs import PairFiles
    from llm_trm.evaluate.phase2 import Phase2Evaluation, Scores


@dataclass(frozen=True)
class EvalPhase2Settings(Settings):
    """Options of ``llm-trm eval phase2``."""

    data: Path = setting(..., "Folder of pairs to evaluate on, from problems that were not trained on.")
    checkpoint: Path = setting(
        Path("runs/phase2"), "Folder of a run, whose best checkpoint is used, or a single checkpoint."
    )
    train_data: Path | None = setting(
        None,
        "Folder of pairs that the baselines are fitted on.",
        unset="the one that the checkpoint was trained on",
    )
    model: str | None = setting(
        None,
        "Language model whose head turns states into tokens.",
        metavar="NAME",
        unset="the one that produced the pairs",
    )
    max_steps: int | None = setting(
        None, "Maximum number of supervision steps.", DEPTH, unset="that of the checkpoint"
    )
    halting: Halting | None = setting(
        None,
        "What stops a context early: its own confidence, the mean confidence of its batch, or nothing.",
        unset="that of the checkpoint",
    )
    batch_size: int = setting(64, "Contexts per batch.", BATCH)
    by: str | None = setting(
        None,
        "Group the pairs by a field of their records: thinking_tokens, context_length, correct, or "
        "operations for arithmetic problems. Numbers with many different values are grouped by quartiles.",
        metavar="FIELD",
    )
    baselines: bool = setting(True, "Also measure baselines.", None, "--baselines/--no-baselines")
    allow_training_data: bool = setting(False, "Allow problems that were trained on.")
    output: Path | None = output_file("JSON file for the results.")
    overwrite: bool = overwrite()
    trust_remote_code: bool = trust_remote_code()
    device: DeviceName = device()


@click.command(short_help="Compare a trained recursion with the true states and with baselines.")
@settings_options(EvalPhase2Settings, config_file=False)
def phase2(given: dict[str, Any]) -> None:
    """Measure how well a recursion predicts the state after thinking, on pairs it has not seen.

    Each prediction is compared with the state of the language model after it has actually thought: in
    the compressed space of the recursion, decompressed, and by the rank of the next token under the language
    model's head. Three baselines that do not think are also measured. So is the true state, compressed
    and decompressed, which is the upper bound that the compressor sets.

    \b
    Examples:
      llm-trm datagen --split test --num-samples 1000 -o runs/held_out
      llm-trm eval phase2 --checkpoint runs/phase2 --data runs/held_out
      llm-trm eval phase2 --data runs/held_out --by operations -o phase2.json
      llm-trm eval phase2 --data runs/held_out --by thinking_tokens --halting none
    """
    require("train", "transformers")
    from llm_trm.data.pairs import open_pairs
    from llm_trm.evaluate.held_out import require_held_out
    from llm_trm.evaluate.phase2 import evaluate_phase2, load_head, require_evaluable
    from llm_trm.models.phase2 import load_phase2

    asked = EvalPhase2Settings(**given)
    require_new_files({"--output": asked.output}, overwrite=asked.overwrite)
    where = resolve_device(asked.device)
    trm, compressor, facts = load_phase2(asked.checkpoint)
    pairs = open_pairs(asked.data, compressor.d_model)
    trained_on = _training_pairs(facts, compressor.d_model)
    if not asked.allow_training_data:
        require_held_out(pairs, facts.get("pairs", {}), trained_on, otherwise="pass --allow-training-data")
    fitted_on = _baseline_pairs(asked, pairs, trained_on, facts) if asked.baselines else None
    require_evaluable(pairs, asked.by, fitted_on)
    model = asked.model or pairs.model
    head = load_head(model, where, compressor.d_model, trust_remote_code=asked.trust_remote_code)
    steps, halting = asked.max_steps or facts["max_steps"], asked.halting or facts["halting"]
    with progress_bar("pairs", pairs.samples + (fitted_on.samples if fitted_on else 0)) as progress:
        found = evaluate_phase2(
            trm.to(where),
            compressor.to(where),
            pairs,
            head=head,
            train_pairs=fitted_on,
            max_steps=steps,
            halting=halting,
            batch_size=asked.batch_size,
            by=asked.by,
            progress=progress,
        )
    if asked.output is not None:
        from llm_trm.benchmark.environment import run_record
        from llm_trm.files import write_json

        about = {
            "checkpoint": str(asked.checkpoint),
            "data": str(asked.data),
            "train_data": str(fitted_on.folder) if fitted_on else None,
            "model": model,
            "max_steps": steps,
            "halting": halting,
        }
        write_json(asked.output, run_record(where) | about | found.to_json())
    console = table_console()
    console.print(_table(found, pairs))
    if found.groups:
        console.print(_groups_table(found))
    console.print("\n".join(_remarks(found, compressor.d_compressed, compressor.d_model)), soft_wrap=True)


def _baseline_pairs(
    asked: EvalPhase2Settings, pairs: PairFiles, trained_on: PairFiles | None, facts: dict[str, Any]
) -> PairFiles:
    from llm_trm.data.pairs import open_pairs
    from llm_trm.evaluate.held_out import shared_problems

    found = trained_on if asked.train_data is None else open_pairs(asked.train_data, pairs.hidden_size)
    if found is None:
        raise click.UsageError(
            f"the baselines need the pairs that {asked.checkpoint} was trained on, and "
            f"{facts.get('data') or 'it does not say where they are'} is not there: name pairs with "
            "--train-data, or pass --no-baselines"
        )
    if not asked.allow_training_data and (shared := shared_problems(pairs, found)):
        raise click.UsageError(
            f"{shared} of the {pairs.samples} problems in {asked.data} are in {found.folder}, which the "
            "baselines are fitted on: name others with --train-data, or pass --allow-training-data"
        )
    return found


def _training_pairs(facts: dict[str, Any], hidden_size: int) -> PairFiles | None:
    """The pairs that the checkpoint was trained on; None if they are no longer there."""
    from llm_trm.data.pairs import INDEX, open_pairs

    folder = facts.get("data")
    if folder is None or not (Path(folder) / INDEX).exists():
        return None
    return open_pairs(Path(folder), hidden_size)


def _table(found: Phase2Evaluation, pairs: PairFiles) -> Table:
    headers = ["cosine", "MSE", "relative error", "full cosine", "rank 1 [95%]", "top 5", "1 / rank", "steps"]
    table = new_table(f"{pairs.folder}: {pairs.samples} pairs", "prediction", headers)
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
    from llm_trm.evaluate.phase2 import TRM

    names = list(found.rows)
    headers = ("pairs", "cosine", *(f"rank 1, {name}" for name in names), "steps")
    table = new_table(None, f"by {found.by}", headers, wrap=True)
    for group, rows in found.groups.items():
        trm = rows[TRM]
        shares = [_rank1(rows[name]) if name == TRM else _share(rows[name].rank1) for name in names]
        table.add_row(group, str(trm.pairs), f"{trm.cosine:.4f}", *shares, f"{trm.steps:.2f}")
    return table


def _remarks(found: Phase2Evaluation, width: int, full_width: int) -> list[str]:
    """What the rows and columns mean, and how the recursion compares."""
    from llm_trm.evaluate.baselines import LAST_STATE, RIDGE, TRAINING_MEAN
    from llm_trm.evaluate.phase2 import TRM, TRUE_STATE

    meanings = {
        TRM: "the reasoning state of the recursion where it halted",
        LAST_STATE: "the last state of the context, unchanged: no thinking at all",
        TRAINING_MEAN: "the mean state after thinking, the same for every context",
        RIDGE: "the best linear map from the last and the mean context state "
        f"(regularisation {found.ridge_strength:g}, chosen on every fifth training pair)"
        if found.ridge_strength is not None
        else "",
        TRUE_STATE: "the state after real thinking, compressed and decompressed",
    }
    lines = [f"{name}: {meanings[name]}." for name in found.rows]
    lines += [
        "cosine, MSE and relative error: against the true state in the compressed space "
        f"({width} dimensions); full cosine: decompressed, against the language model's own state "
        f"({full_width} dimensions).",
        "rank 1, top 5, 1 / rank: the rank that the language model's head, given the decompressed "
        "prediction, assigns to the token that it ranked first after thinking.",
    ]
    baselines = [name for name in found.rows if name not in (TRM, TRUE_STATE)]
    if baselines:
        best = max(baselines, key=lambda name: found.rows[name].rank1 or 0.0)
        lines.append(
            f"The next token ranks first for {_share(found.rows[TRM].rank1)} of the recursion's predictions, "
            f"and for {_share(found.rows[best].rank1)} of those of the best baseline ({best})."
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _rank1(scores: Scores) -> str:
    if scores.rank1 is None or scores.rank1_interval is None:
        return "-"
    return with_interval(scores.rank1, scores.rank1_interval)
