"""``llm-trm import official`` and ``llm-trm export official``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import DEPTH, FOLDER, LENGTH, NO_OR_LENGTH, ROPE_THETA, WIDTH, Grid


@click.group("import")
def import_() -> None:
    """Take over models that other programs trained."""


@click.group()
def export() -> None:
    """Write models for other programs."""


@import_.command("official", short_help="A checkpoint of SamsungSAILMontreal/TinyRecursiveModels.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    required=True,
    help="Folder to write the model into; empty, or not there yet.",
)
@click.option(
    "--task",
    type=click.Choice(["sudoku", "maze", "arc"]),
    help="Kind of puzzle. [default: by its vocabulary]",
)
@click.option("--grid", metavar="ROWSxCOLUMNS", type=Grid(), help="Rows and columns of a puzzle, as 9x9.")
@click.option("--seq-len", type=LENGTH, help="Cells of a puzzle, where --grid and --task do not tell.")
@click.option(
    "--positions",
    type=click.Choice(["rope", "learned", "none"]),
    help="How attention knows where a cell is. Learned positions and mlp_t are recognised.",
)
@click.option("--heads", type=WIDTH, help="Attention heads (num_heads; 8 in the official trm.yaml).")
@click.option("--rope-theta", type=ROPE_THETA, help="Base of RoPE. [default: 10000]")
@click.option(
    "--puzzle-len",
    type=NO_OR_LENGTH,
    help="Positions of the puzzle embedding (puzzle_emb_len; 16 in the official trm.yaml).",
)
@click.option(
    "-n", "--latent-steps", "n_latent_steps", type=DEPTH, help="L_cycles; 6 for Sudoku, 4 for others."
)
@click.option("-T", "--deep-recursions", "n_deep_recursions", type=DEPTH, help="H_cycles; 3 officially.")
@click.option("--max-steps", type=DEPTH, help="Supervision steps (halt_max_steps; 16 officially).")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the residual stream. [default: as in training]",
)
def import_official(path: Path, output: Path, **options: Any) -> None:
    """Turn an official checkpoint (step_N) into a folder that eval puzzle and solve take.

    Its tensors do not tell everything. What they leave open comes from the options, or from the
    all_config.yaml that the official code writes beside its checkpoints; what neither says is asked for.
    """
    from llm_trm.errors import InputError
    from llm_trm.files import writable_folder
    from llm_trm.models.puzzle.official import read_official
    from llm_trm.models.puzzle.paper import save_puzzle_model

    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: choose another folder")
    model, facts = read_official(path, **options)
    lacking = [option for option, fact in (("--task", "task"), ("--grid", "rows")) if fact not in facts]
    if lacking:
        raise InputError(
            f"{path} ({model.config.vocab_size} tokens, {model.config.seq_len} cells) is of no official data "
            f"set: give {' and '.join(lacking)}"
        )
    writable_folder(output)
    save_puzzle_model(model, output, **facts)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{path}: {facts['task']} {facts['rows']}x{facts['columns']}, {parameters:,} parameters.")
    for origin in dict.fromkeys(facts["origins"].values()):
        names = [name for name, its in facts["origins"].items() if its == origin]
        said = ", ".join(f"{name} {getattr(model.config, name)}" for name in names)
        click.echo(f"  From {origin}: {said}.")
    click.echo(f"It is in {output}.")


@export.command("official", short_help="A checkpoint for SamsungSAILMontreal/TinyRecursiveModels.")
@click.argument("folder", type=FOLDER)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    callback=output_file,
    metavar="FILE",
    help="File to write, officially named step_N.",
)
def export_official(folder: Path, output: Path) -> None:
    """Turn a run of train puzzle (its best checkpoint), or an imported model, into an official checkpoint.

    An all_config.yaml with what a checkpoint does not say is written beside it, unless there is one already.
    """
    from llm_trm.models.puzzle.loading import load_puzzle
    from llm_trm.models.puzzle.official import write_official
    from llm_trm.models.puzzle.official_config import CONFIG_FILE, write_config

    model, facts = load_puzzle(folder)
    described = write_config(output, model.config, facts)
    wide = write_official(model, output, facts)
    click.echo(f"{output} is an official checkpoint.")
    if described:
        click.echo(f"{output.parent / CONFIG_FILE} says what it does not.")
    if wide:
        click.echo(f"{', '.join(wide)} do not fit {model.config.dtype} and are in float32.")
