"""Options of a command from the fields of a settings dataclass, and from a config file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import FILE, FOLDER, NAME, PATH, WholeNumbers, number
from llm_trm.device import resolve_device
from llm_trm.errors import InputError, one_line
from llm_trm.ranges import Whole, shown
from llm_trm.settings import Setting, flat, nested, settings_of
from llm_trm.text import parse_json, read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Command = Callable[..., Any]

#: In a context: the settings that a config file sets to null, which click would take for not given.
_NULLS = f"{__name__}.nulls"
#: Entries of a run's settings file that are not settings; the first two were recorded by older versions.
_BESIDE_SETTINGS = {"resume", "overwrite", "questions_sha256", "problems_sha256"}
#: What a value in a file must be, by the kind of the setting; click takes it for granted.
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    str: (str, "a string"),
    Path: (str, "a string"),
}
#: A parameter of a command that is no setting, such as ``--preset``: one of several strings.
_PARAMETER = Setting("")


class Option(click.Option):
    """An option that also accepts its former names ``was``, which the help does not show."""

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
    kind: type[DataclassInstance], defaults: Mapping[str, str] | None = None, *, config_file: bool = True
) -> Callable[[_Command], _Command]:
    """Adds an option for each setting of ``kind``, and ``--config``.

    The command is called with ``given``: arguments of ``kind`` for the settings that the command line or the
    config file gives; the dataclass itself has the defaults of the others. With a config file, ``device`` is
    always given, as the type of the device that it means, since a run records it.

    Args:
        defaults: Text for the help by field name, where the default is not the dataclass's.
        config_file: Whether the command has ``--config``. Without it, a flag that is off by default needs no
            ``--no-`` form.
    """
    settings, texts = settings_of(kind), defaults or {}

    def add(command: _Command) -> _Command:
        @click.pass_context
        @wraps(command)
        def wrapped(context: click.Context, /, **options: Any) -> Any:
            values = {one.name: options.pop(one.name) for one in settings}
            given = {name: value for name, value in values.items() if was_given(context, name)}
            given |= {name: None for name in context.meta.get(_NULLS, ()) if name not in given}
            if config_file and "device" in values:
                given["device"] = resolve_device(values["device"]).type
            return command(given=nested(kind, given), **options)

        decorated = cast(_Command, wrapped)
        if config_file:
            decorated = _config_option(kind)(decorated)
        for one in reversed(settings):
            decorated = setting_option(one, texts.get(one.name), negatable=config_file)(decorated)
        return decorated

    return add


def was_given(context: click.Context, name: str) -> bool:
    """Whether the value of a parameter comes from the command line or a config file."""
    return context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


def setting_option(
    one: Setting, text: str | None = None, *, negatable: bool = True
) -> Callable[[_Command], _Command]:
    """The option of a setting.

    Args:
        text: Describes the default if that is not the field's own.
        negatable: Whether a flag that is off by default has a ``--no-`` form.
    """
    options, flag = list(one.options), one.kind is bool
    plain = one.action or (not negatable and one.default is False)
    if flag and not plain and "/" not in options[-1]:
        options[-1] += f"/--no-{options[-1].removeprefix('--')}"
    required = one.default is ... and text is None
    default = None if text is not None or one.default is ... else one.default
    unset = text if text is not None else one.unset
    shown = not unset and default is not None and default is not False and default != ()
    return click.option(
        one.name,
        *options,
        cls=Option,
        was=one.was,
        is_flag=flag or None,
        type=None if flag else _type(one),
        required=required,
        show_default=shown,
        metavar=one.metavar,
        callback=output_file if one.file == "write" else None,
        help=f"{one.help} [default: {unset}]" if unset else one.help,
        # click would take an explicit None for the value of a required option.
        **({} if required else {"default": default}),
    )


def _type(one: Setting) -> click.ParamType[Any]:
    if one.choices:
        return click.Choice(one.choices)
    if isinstance(one.within, Whole) and one.many:
        return WholeNumbers(one.within)
    if one.within is not None:
        return number(one.within)
    if one.kind is Path:
        # output_file checks a file to write, with better messages.
        return {"read": FILE, "write": PATH, None: FOLDER}[one.file]
    return NAME


def _config_option(kind: type[DataclassInstance]) -> Callable[[_Command], _Command]:
    settings = {one.name: one for one in settings_of(kind)}
    actions = {name for name, one in settings.items() if one.action}
    example = f", for example {kind.FILE} in the folder of a run" if hasattr(kind, "FILE") else ""

    def apply(context: click.Context, _: click.Parameter, path: Path | None) -> None:
        if path is None or context.resilient_parsing:
            return
        read = read_config(path)
        values, others = flat(kind, read)
        # Eager ones are --config and --help.
        names = {parameter.name for parameter in context.command.params if not parameter.is_eager}
        names -= values.keys() | actions
        for key in others:
            if (plain := key.replace("-", "_")) in names:
                values[plain] = read[key]
            elif key not in _BESIDE_SETTINGS:
                raise InputError(
                    f"{path}: {one_line(key)} is not a setting of {context.command_path}: remove it"
                )
        values = {name: value for name, value in values.items() if name not in actions}
        for name, value in values.items():
            if (fault := _fault(settings.get(name, _PARAMETER), value)) is not None:
                raise InputError(f"{path}: {name} {fault}")
        context.meta[_NULLS] = {name for name, value in values.items() if value is None}
        context.default_map = {name: value for name, value in values.items() if value is not None}

    return click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=apply,
        metavar="FILE",
        help=f"Read settings from a TOML or JSON file{example}. Options on the command line take precedence.",
    )


def _fault(one: Setting, value: Any) -> str | None:
    """What is wrong with the type of a value in a file; None if click can check the value.

    Numbers are left to the ranges, and strings to click, which reads them as it reads the command line.
    """
    if value is None:
        return None if one.optional else "must not be null: remove it, or give a value"
    expected, words = (list, "a list") if one.many else _TYPES.get(one.kind, (object, ""))
    if not isinstance(value, (expected, str)):
        return f"must be {words}, not {shown(value)}"
    if isinstance(value, str) and "\0" in value:
        return f"must not hold the character NUL: {shown(value)}"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file.

    Raises:
        InputError: The file is missing or broken, or is not a table of settings.
    """
    import tomllib  # 2 ms, which --help need not wait for

    toml = path.suffix.lower() == ".toml"
    try:
        text = read_text(path)
        values = tomllib.loads(text) if toml else parse_json(text)
    except FileNotFoundError:
        raise InputError(f"--config: {path} does not exist: name a TOML or JSON file") from None
    except OSError as error:
        raise InputError(
            f"--config: {path} cannot be read ({error.strerror}): change its permissions, or name another"
        ) from error
    except (ValueError, RecursionError) as error:
        kind = "TOML" if toml else "JSON"
        raise InputError(f"--config: {path} is not {kind} ({one_line(error)}): correct the file") from error
    if not isinstance(values, dict):
        raise InputError(f"--config: {path} contains no settings by name: write them as a JSON object")
    return values
