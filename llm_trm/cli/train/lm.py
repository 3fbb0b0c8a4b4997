"""``llm-trm train lm``."""

from __future__ import annotations

from pathlib import Path

import click

from llm_trm.cli.options.device import device_option, resolve_device
from llm_trm.cli.options.types import (
    BATCH,
    COUNT,
    FOLDER,
    LEARNING_RATE,
    MODULUS,
    OPERATIONS,
    SHARE,
    TRAINER_SEED,
)


@click.command(short_help="Train a tiny language model that thinks before it answers.")
@click.option("--preset", type=click.Choice(["tiny"]), default="tiny", show_default=True, help="Size.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("runs/lm"),
    show_default=True,
    help="Folder of the model, in Hugging Face format, and of its checkpoints.",
)
@click.option(
    "--operations",
    type=OPERATIONS,
    default=5,
    show_default=True,
    help="Most operations of a problem; fewer occur as often.",
)
@click.option(
    "--modulus",
    type=MODULUS,
    default=10,
    show_default=True,
    help="Totals are taken modulo this number.",
)
@click.option("--steps", type=COUNT, default=1200, show_default=True, help="Optimizer steps.")
@click.option(
    "--batch-size",
    type=BATCH,
    default=128,
    show_default=True,
    help="Samples a step, of one process.",
)
@click.option(
    "--learning-rate",
    type=LEARNING_RATE,
    default=2e-3,
    show_default=True,
    help="Peak of warm-up and cosine.",
)
@click.option(
    "--thinking-share",
    type=SHARE,
    default=0.6,
    show_default=True,
    help="Share of the samples with a worked trace; the others learn to answer at once.",
)
@click.option(
    "--eval-samples",
    type=COUNT,
    default=400,
    show_default=True,
    help="Held-out problems for the accuracy at the end.",
)
@click.option("--seed", type=TRAINER_SEED, default=0, show_default=True, help="Of weights and samples.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output.")
@device_option
def lm(
    preset: str,
    output: Path,
    operations: int,
    modulus: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    thinking_share: float,
    eval_samples: int,
    seed: int,
    resume: bool,
    device: str,
) -> None:
    """Train a SmolLM3-architecture language model of 0.8 M parameters on the arithmetic world.

    It learns to write a worked trace between <think> and </think> and then the answer, and, from samples
    with an empty trace, to answer at once. At the end both ways are measured on held-out problems. The
    model that ships with the package, `--model arithmetic` of the other commands, was made by this command
    with its defaults.

    \b
    Examples:
      llm-trm train lm                             the model that ships, in runs/lm
      llm-trm train lm --operations 3 --steps 600  an easier world
      llm-trm datagen --model runs/lm              its states before and after thinking
    """
    from llm_trm.extras import require

    require("train", "transformers", "accelerate")
    from llm_trm.data.arithmetic import World
    from llm_trm.data.problems import require_problems
    from llm_trm.evaluate.answers import accuracy
    from llm_trm.files import writable_folder
    from llm_trm.memory import require_memory
    from llm_trm.train.language_model import LanguageModelConfig, train_language_model

    config = LanguageModelConfig(
        output=output,
        preset=preset,
        world=World(1, operations, modulus),
        thinking_share=thinking_share,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        resume=resume,
        device=resolve_device(device).type,
    )
    if not resume and (output / "config.json").exists():
        raise click.UsageError(f"--output: {output} holds a model; choose another folder, or --resume")
    # The problems at the end, and the order of all samples, which is drawn at once.
    require_problems(eval_samples)
    require_memory(8 * steps * batch_size, f"{steps * batch_size:,} samples", "choose fewer --steps")
    writable_folder(output)
    model, tokenizer = train_language_model(config)

    problems = list(World(operations, operations, modulus).problems(eval_samples, "test", seed))
    longest = max(len(problem.thinking) for problem in problems)
    click.echo(f"{eval_samples} held-out problems of {operations} operations:")
    for thinking in (True, False):
        found = accuracy(
            model, tokenizer, problems, thinking=thinking, max_new_tokens=longest + 16 if thinking else 16
        )
        label = "with thinking" if thinking else "without"
        click.echo(f"  {label:<14} {found.share:7.1%}  {found.generated:5.1f} tokens written")
    click.echo(f"The model is in {output}. Next: llm-trm datagen --model {output}")
