"""``llm-trm import official`` and ``llm-trm export official``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from llm_trm.choices import Positions, Task
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.types import FOLDER, PATH, Grid
from llm_trm.errors import InputError
from llm_trm.ranges import DEPTH, LENGTH, NO_OR_LENGTH, ROPE_THETA, WIDTH
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import REPLACE_FILE


@click.group("import")
def import_() -> None:
    """Import models that other programs trained."""


@click.group()
def export() -> None:
    """Export models for other programs."""


@dataclass(frozen=True)
class Unrecorded(Settings):
    """What the tensors of an official checkpoint may not determine."""

    task: Task | None = setting(None, "Kind of puzzle.", unset="from its vocabulary")
    seq_len: int | None = setting(None, "Number of cells, if --grid and --task do not determine it.", LENGTH)
    positions: Positions | None = setting(
        None, "Position encoding. Learned positions and mlp_t are recognised."
    )
    heads: int | None = setting(
        None, "Number of attention heads (num_heads; 8 in the official trm.yaml).", WIDTH
    )
    rope_theta: float | None = setting(None, "Base of RoPE.", ROPE_THETA, unset="10000")
    puzzle_len: int | None = setting(
        None, "Positions of the puzzle embedding (puzzle_emb_len; 16 in the official trm.yaml).", NO_OR_LENGTH
    )
    n_latent_steps: int | None = setting(
        None, "L_cycles; 6 for Sudoku, 4 for others.", DEPTH, "-n", "--latent-steps"
    )
    n_deep_recursions: int | None = setting(None, "H_cycles; 3 officially.", DEPTH, "-T", "--deep-recursions")
    max_steps: int | None = setting(
        None, "Maximum number of supervision steps (halt_max_steps; 16 officially).", DEPTH
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "Precision of the residual stream.", unset="as in training"
    )


@import_.command("official", short_help="Import a checkpoint of SamsungSAILMontreal/TinyRecursiveModels.")
@click.argument("path", type=PATH)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    required=True,
    help="Folder for the model; must be empty or not exist, unless --overwrite is given.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model in --output. Other files there stay.")
@click.option(
    "--grid", metavar="ROWSxCOLUMNS", type=Grid(), help="Rows and columns of a puzzle, for example 9x9."
)
@settings_options(Unrecorded, config_file=False)
def import_official(
    path: Path, output: Path, overwrite: bool, grid: tuple[int, int] | None, given: dict[str, Any]
) -> None:
    """Convert an official checkpoint (step_N) to a folder for eval puzzle and solve.

    Its tensors do not determine all settings. The others come from options, or from the all_config.yaml that
    the official code writes next to its checkpoints. An error names those that are still missing. If the file
    has an exponential moving average (ema) next to the model, its weights are taken.
    """
    from llm_trm.claims import claimed
    from llm_trm.models.puzzle.official import read_official
    from llm_trm.models.puzzle.paper import save_puzzle_model

    _require_free(output, overwrite=overwrite)
    model, facts = read_official(path, grid=grid, **given)
    lacking = [option for option, fact in (("--task", "task"), ("--grid", "rows")) if fact not in facts]
    if lacking:
        raise InputError(
            f"{path} ({model.config.vocab_size} tokens, {model.config.seq_len} cells) belongs to no official "
            f"data set: give {' and '.join(lacking)}"
        )
    with claimed(output):
        _require_free(output, overwrite=overwrite)  # another process may have written meanwhile
        save_puzzle_model(model, output, **facts)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{path}: {facts['task']} {facts['rows']}x{facts['columns']}, {parameters:,} parameters.")
    if "averaged" in facts:
        click.echo("  The weights are the exponential moving average in it (ema), not the last ones.")
    for origin in dict.fromkeys(facts["origins"].values()):
        names = [name for name, its in facts["origins"].items() if its == origin]
        values = ", ".join(f"{name} {getattr(model.config, name)}" for name in names)
        click.echo(f"  From {origin}: {values}.")
    click.echo(f"The model is in {output}.")


def _require_free(folder: Path, *, overwrite: bool) -> None:
    from llm_trm.claims import LOCK_FILE
    from llm_trm.models.run_folder import INDEX_FILE

    if not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{folder} is not empty: replace its model with --overwrite, or choose another folder"
        )
    if (folder / INDEX_FILE).exists():  # readers would still find the run's own checkpoint
        raise InputError(f"{folder} is not empty, but contains a training run: choose another folder")


@export.command("official", short_help="Export a checkpoint for SamsungSAILMontreal/TinyRecursiveModels.")
@click.argument("folder", type=FOLDER)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    callback=output_file,
    metavar="FILE",
    help="File to write, officially named step_N.",
)
@click.option("--overwrite", is_flag=True, help=REPLACE_FILE)
def export_official(folder: Path, output: Path, overwrite: bool) -> None:
    """Convert a run of train puzzle (its best checkpoint), or an imported model, to an official checkpoint.

    An all_config.yaml with the settings that a checkpoint does not contain is written next to it, unless
    one exists.
    """
    from llm_trm.models.puzzle.loading import load_puzzle
    from llm_trm.models.puzzle.official import write_official
    from llm_trm.models.puzzle.official_config import CONFIG_FILE, write_config

    inputs = folder.rglob("*") if folder.is_dir() else ()
    require_new_files({"--output": output}, overwrite=overwrite, inputs=inputs)
    model, facts = load_puzzle(folder)
    described = write_config(output, model.config, facts)
    try:
        wide = write_official(model, output, facts)
    except BaseException:
        if described:  # settings of a checkpoint that is not there
            (output.parent / CONFIG_FILE).unlink(missing_ok=True)
        raise
    click.echo(f"{output} is an official checkpoint.")
    if described:
        click.echo(f"{output.parent / CONFIG_FILE} has the settings that it does not contain.")
    if wide:
        click.echo(f"{', '.join(wide)} cannot be stored exactly in {model.config.dtype} and are in float32.")
