"""Writes docs/options.md, the settings of every training: ``python -m bench.option_tables``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import ROOT
from llm_trm.ranges import Real, Whole
from llm_trm.settings import Setting, settings_of
from llm_trm.train.lm.config import LanguageModelConfig
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.phase1.config import Phase1Config
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.puzzle.config import PuzzleConfig, preset_texts

if TYPE_CHECKING:
    from llm_trm.train.run.settings import RunSettings

PAGE = Path("docs/options.md")
#: Ranges up to here, or beyond, only keep out nonsense: the tables name their lower end alone.
_UNLIMITED = 10_000

_CONFIGS: tuple[type[RunSettings], ...] = (
    PuzzleConfig,
    LanguageModelConfig,
    Phase1Config,
    Phase2Config,
    LoraTrainingConfig,
    Phase3Config,
)
_INTRODUCTION = """\
# Options of the trainings

`python -m bench.option_tables` writes this page from the settings dataclasses. `llm-trm train COMMAND --help`
shows the same.

Every `train` command accepts `--config FILE`: a TOML or JSON file with settings by name. A run saves its
settings in its folder, in the file named below:
`llm-trm train phase2 --config runs/phase2/config.json -o again` repeats a run. Options on the command line
take precedence. In a file, dashes and underscores are equivalent, and settings of the arithmetic world or
of the reasoner may be in a table `[world]` or `[reasoner]`. A run is resumed (`--resume`) with the settings
that it was started with, except those marked with *."""


def page() -> str:
    """The text of docs/options.md."""
    return "\n\n".join([_INTRODUCTION, *(_section(config) for config in _CONFIGS)]) + "\n"


def _section(config: type[RunSettings]) -> str:
    texts: dict[str, str] = {}
    if config is PuzzleConfig:
        texts = {"data": "data/TASK", "output": "runs/TASK"} | preset_texts()
    lines = [
        f"## train {config.COMMAND}",
        "",
        f"Settings of a run: `{config.FILE}`.",
        "",
        "| option | default | values | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(one, texts.get(one.name)) for one in settings_of(config))])


def _row(one: Setting, text: str | None) -> str:
    options = ", ".join(f"`{option}`" for option in one.options)
    free = "" if one.critical or one.action else "*"
    cells = (options + free, text or _default(one), _values(one), one.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(one: Setting) -> str:
    if one.default is ...:
        return "required"
    if one.default is None or one.default == ():
        return one.unset or "none"
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    return _number(one.default) if isinstance(one.default, (int, float)) else str(one.default)


def _values(one: Setting) -> str:
    within = one.within
    if within is None:
        return ", ".join(one.choices) or {bool: "flag", Path: "folder"}.get(one.kind, "text")
    if within.most >= _UNLIMITED:
        more = isinstance(within, Real) and within.least_open
        return f"{'above' if more else 'at least'} {_number(within.least)}"
    if isinstance(within, Whole):
        return f"{within.least} to {within.most}"
    begin, end = "(" if within.least_open else "[", ")" if within.most_open else "]"
    return f"{begin}{_number(within.least)}, {_number(within.most)}{end}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def main(root: Path = ROOT) -> None:
    """Write the page."""
    (root / PAGE).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
