"""The ``llm-trm`` command."""

from __future__ import annotations

import click

from llm_trm.cli.group import Group


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import llm_trm

        click.echo(f"llm-trm {llm_trm.__version__}")
        context.exit()


@click.group(
    cls=Group,
    commands_at={
        "bench": "llm_trm.cli.bench:bench",
        "data": "llm_trm.cli.data:data",
        "datagen": "llm_trm.cli.datagen:datagen",
        "env": "llm_trm.cli.env:env",
        "eval": "llm_trm.cli.eval:evaluate",
        "export": "llm_trm.cli.official:export",
        "generate": "llm_trm.cli.generate:generate",
        "import": "llm_trm.cli.official:import_",
        "solve": "llm_trm.cli.solve:solve",
        "train": "llm_trm.cli.train:train",
        "tune": "llm_trm.cli.tune:tune",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def main() -> None:
    """Language models that think with a Tiny Recursive Model.

    \b
    To start:
      llm-trm env                   print versions, devices and working backends
      llm-trm bench --latents 256   measure the speed and error of the recursion
      llm-trm tune                  find the fastest tile for each matrix product on this GPU
    \b
    Puzzles, solved by recursion:
      llm-trm data sudoku --size 4  write puzzles to train on; also data maze, data arc
      llm-trm train puzzle --task sudoku
      llm-trm solve "1... ..3. .4.. ...2"
    \b
    A recursion instead of written-out thinking, offline on the bundled tiny language model:
      llm-trm train phase1          train a compressor of hidden states
      llm-trm datagen               write the hidden states before and after thinking
      llm-trm train phase2          train a recursion that predicts the state after thinking
      llm-trm eval phase2 --help    measure it on held-out problems
      llm-trm train lora --help     train the language model and the recursion together
      llm-trm train phase3          train only the recursion, on rewards for answers
      llm-trm eval lm               compare immediate answers, thinking, and recursion
      llm-trm generate "3+1*2"      answer a question
    """
