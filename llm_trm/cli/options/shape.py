"""The shape of a network, for ``llm-trm bench`` and ``llm-trm tune``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

from llm_trm.benchmark.workloads import Case, Mode
from llm_trm.cli.options.combinations import reject_given
from llm_trm.ranges import BATCH, LAYERS, LENGTH, WIDTH
from llm_trm.settings import Settings, setting, settings_of

Dtype = Literal["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def full_name(dtype: Dtype) -> str:
    """torch's name of a dtype."""
    return _DTYPES.get(dtype, dtype)


@dataclass(frozen=True)
class Shape(Settings):
    """Sizes of a :class:`~llm_trm.benchmark.workloads.Case`; None is the default of the case."""

    latents: int | None = setting(None, "Sequence length.", LENGTH, metavar="L", unset="256")
    hidden_size: int | None = setting(
        None, "Width.", WIDTH, "--d-model", was=("--hidden-size",), metavar="D", unset="256"
    )
    batch: int | None = setting(
        None, "Batch size.", BATCH, "--batch-size", was=("--batch",), metavar="B", unset="1"
    )
    layers: int | None = setting(None, "Number of blocks in the network.", LAYERS, unset="2")
    heads: int | None = setting(None, "Number of attention heads; must divide D.", WIDTH, unset="8")
    family: Literal["seed", "scratch", "paper"] | None = setting(None, "Kind of block.", unset="seed")

    def case(self, mode: Mode, dtype: str, **sizes: Any) -> Case:
        """The case of a mode.

        Args:
            sizes: Replace sizes that are not given.

        Raises:
            click.UsageError: Sizes that describe no network.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        case = Case(mode, **{"hidden_size": 256, "latents": 256, "dtype": dtype, **sizes, **given})
        try:
            case.config()
        except ValueError as error:
            message = str(error)
            for field, option in (("d_model", "--d-model"), ("n_heads", "--heads"), ("n_layers", "--layers")):
                message = message.replace(field, option)
            raise click.UsageError(message) from error
        return case


def reject_shape(context: click.Context) -> None:
    """Raise click.UsageError if the command line has a shape in addition to a suite."""
    names = [one.name for one in settings_of(Shape)]
    reject_given(context, names, "and --suite cannot be used together: a suite fixes its shapes")
