"""Options of a command from the fields of a settings dataclass, and from a config file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from llm_trm.cli.options.types import FOLDER, RealNumber, WholeNumber, WholeNumbers
from llm_trm.device import resolve_device
from llm_trm.errors import InputError, one_line
from llm_trm.ranges import Real, Whole
from llm_trm.settings import Setting, flat, nested, settings_of
from llm_trm.text import parse_json, read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Command = Callable[..., Any]

#: In a context: the settings that a config file sets to null, which click would take for not given.
_NULLS = f"{__name__}.nulls"
#: What the file that a run keeps has beside its settings; the first two were recorded by older versions.
_BESIDE_SETTINGS = {"resume", "overwrite", "questions_sha256", "problems_sha256"}


class Option(click.Option):
    """An option that also answers to the names it ``was`` known by, which the help does not show."""

    def __init__(self, *args: Any, was: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.was = was

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """See :meth:`click.Parameter.add_to_parser`."""
        shown = self.opts
        self.opts = [*shown, *self.was]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


def settings_options(
    kind: type[DataclassInstance], defaults: Mapping[str, str] | None = None
) -> Callable[[_Command], _Command]:
    """Adds an option for each setting of ``kind``, and ``--config``.

    The command is called with ``given``: arguments of ``kind`` for the settings that the command line or the
    config file gives; the dataclass itself has the defaults of the others. ``device`` is always given, as the
    type of the device that it means.

    Args:
        defaults: Text for the help by field name, where the default is not the dataclass's.
    """
    settings, texts = settings_of(kind), defaults or {}

    def add(command: _Command) -> _Command:
        @click.pass_context
        @wraps(command)
        def wrapped(context: click.Context, /, **options: Any) -> Any:
            values = {one.name: options.pop(one.name) for one in settings}
            given = {name: value for name, value in values.items() if was_given(context, name)}
            given |= {name: None for name in context.meta.get(_NULLS, ()) if name not in given}
            if "device" in values:
                given["device"] = resolve_device(values["device"]).type
            return command(given=nested(kind, given), **options)

        decorated = _config_option(kind)(cast(_Command, wrapped))
        for one in reversed(settings):
            decorated = setting_option(one, texts.get(one.name))(decorated)
        return decorated

    return add


def was_given(context: click.Context, name: str) -> bool:
    """Whether the command line or a config file gives a parameter its value."""
    return context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


def setting_option(one: Setting, text: str | None = None) -> Callable[[_Command], _Command]:
    """The option of a setting; ``text`` describes its default if that is not the field's own."""
    options, flag = list(one.options), one.kind is bool
    if flag and not one.action and "/" not in options[-1]:
        options[-1] += f"/--no-{options[-1].removeprefix('--')}"
    default = None if text is not None or one.default is ... else one.default
    unset = text if text is not None else one.unset
    shown = not unset and default is not None and default is not False and default != ()
    return click.option(
        one.name,
        *options,
        cls=Option,
        was=one.was,
        is_flag=flag,
        type=None if flag else _type(one),
        default=default,
        required=one.default is ... and text is None,
        show_default=shown,
        metavar=one.metavar,
        help=f"{one.help} [default: {unset}]" if unset else one.help,
    )


def _type(one: Setting) -> click.ParamType[Any]:
    if one.choices:
        return click.Choice(one.choices)
    if isinstance(one.within, Whole):
        return WholeNumbers(one.within) if one.many else WholeNumber(one.within)
    if isinstance(one.within, Real):
        return RealNumber(one.within)
    return FOLDER if one.kind is Path else click.STRING


def _config_option(kind: type[DataclassInstance]) -> Callable[[_Command], _Command]:
    optional = {one.name for one in settings_of(kind) if one.optional}

    def read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None or context.resilient_parsing:
            return
        values, others = flat(kind, read_config(path))
        actions = {one.name for one in settings_of(kind) if one.action}
        names = {parameter.name for parameter in context.command.params} - values.keys() - actions
        for key in others:
            if (plain := key.replace("-", "_")) in names:
                values[plain] = read_config(path)[key]
            elif key not in _BESIDE_SETTINGS:
                raise InputError(f"{path}: {key} is no setting of {context.command_path}: remove it")
        values = {name: value for name, value in values.items() if name not in actions}
        nulls = {name for name, value in values.items() if value is None}
        if nulls - optional:
            raise InputError(f"{path}: {min(nulls - optional)} must not be null: remove it, or give a value")
        context.meta[_NULLS] = nulls
        context.default_map = {name: value for name, value in values.items() if value is not None}

    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=read,
        metavar="FILE",
        help="Read settings from a TOML or JSON file, for example the one in the folder of a run. Options on "
        "the command line take precedence.",
    )


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file.

    Raises:
        InputError: The file is missing or broken, or is not a table of settings.
    """
    toml = path.suffix == ".toml"
    try:
        text = read_text(path)
        values = tomllib.loads(text) if toml else parse_json(text)
    except FileNotFoundError:
        raise InputError(f"--config: {path} does not exist: name a TOML or JSON file") from None
    except (OSError, ValueError) as error:
        kind = "TOML" if toml else "JSON"
        raise InputError(f"--config: {path} is not {kind} ({one_line(error)}): correct the file") from error
    if not isinstance(values, dict):
        raise InputError(f"--config: {path} holds no settings by name: write them as a JSON object")
    return values
