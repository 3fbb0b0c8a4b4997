"""Settings that are declared once: a dataclass field with its default, help text and range.

Everything else is derived from the field: the option of the command and its help, the key in a config file,
the table in the docs, the range check, the record that a run keeps, and the check that a resumed run has the
same settings::

    epochs: int = setting(100, "Number of passes over the data.", COUNT)

dataclass-click builds options from dataclasses too, but repeats the default in the option and knows neither
ranges nor config files nor former names; pydanclick needs pydantic. Imports no torch, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from llm_trm.errors import InputError
from llm_trm.ranges import Range, require_in, require_ranges

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """A setting as :func:`setting` and the type of its field declare it.

    Attributes:
        help: One or two sentences.
        within: Range of a number; of each number, if ``many``.
        options: Names of the option on the command line.
        was: Former names of the option.
        unset: Meaning of ``None``, where it is the default.
        metavar: Placeholder for the value in the help.
        critical: Whether a run can be resumed only with the same value.
        action: Whether the option is an instruction for this run, and not a setting of it: such an option is
            neither recorded nor read from a file.
        file: Whether a path is that of a file to read or to write; None for a folder.
        name: Name of the field.
        group: Field with the nested dataclass that declares the setting; ``""`` if it is not nested.
        kind: ``int``, ``float``, ``bool``, ``str`` or ``Path``: the type of the value, or of its items.
        many: Whether the value is a tuple.
        choices: Allowed strings; empty if any string is allowed.
        optional: Whether ``None`` is allowed.
        default: Default value; ``...`` if a value must be given.
    """

    help: str
    within: Range | None = None
    options: tuple[str, ...] = ()
    was: tuple[str, ...] = ()
    unset: str = ""
    metavar: str | None = None
    critical: bool = True
    action: bool = False
    file: Literal["read", "write"] | None = None
    name: str = ""
    group: str = ""
    kind: type = str
    many: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    default: Any = ...

    @property
    def keys(self) -> Iterator[str]:
        """Its names in a config file: that of the field, and those of the option, former ones included."""
        yield self.name
        for option in (*self.options, *self.was):
            if option.startswith("--"):
                yield option[2:].partition("/")[0].replace("-", "_")


def setting(
    default: Any,
    help: str,
    within: Range | None = None,
    *options: str,
    was: tuple[str, ...] = (),
    unset: str = "",
    metavar: str | None = None,
    critical: bool = True,
    action: bool = False,
    file: Literal["read", "write"] | None = None,
    kw_only: bool = False,
) -> Any:
    """The field of a settings dataclass; see :class:`Setting`.

    Args:
        default: Default value; ``...`` if a value must be given.
        options: Names of the option; by default ``--`` and the name of the field.
        kw_only: Whether the field is keyword-only, and last in the help; it always is in a class that is
            declared so.
    """
    declared = Setting(help, within, options, was, unset, metavar, critical, action, file)
    return field(
        default=MISSING if default is ... else default, kw_only=kw_only or MISSING, metadata={_KEY: declared}
    )


def settings_of(kind: type[DataclassInstance]) -> tuple[Setting, ...]:
    """The settings of a dataclass, including those of nested ones, in the order of the fields.

    Keyword-only fields come last: a base class declares them.
    """
    hints = get_type_hints(kind)
    found: list[Setting] = []
    for one in _ordered(kind):
        if is_dataclass(hints[one.name]):
            found += [replace(inner, group=one.name) for inner in settings_of(hints[one.name])]
        elif _KEY in one.metadata:
            found.append(_typed(one.metadata[_KEY], one, hints[one.name]))
    return tuple(found)


def _ordered(kind: type[DataclassInstance]) -> list[Field[Any]]:
    return sorted(fields(kind), key=lambda one: bool(one.kw_only))


def _typed(declared: Setting, one: Field[Any], hint: Any) -> Setting:
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return replace(
        declared,
        options=declared.options or ("--" + one.name.replace("_", "-"),),
        name=one.name,
        kind=str if choices else hint,
        many=many,
        choices=choices,
        optional=optional,
        default=... if one.default is MISSING else one.default,
    )


def flat(kind: type[DataclassInstance], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a config file or a record by field name, and the keys that are no settings of ``kind``.

    A key is the name of a field or an option, with dashes or underscores. Settings of a nested dataclass may
    be in a table of its name, or at the top level.
    """
    known = {key: one.name for one in settings_of(kind) for key in one.keys}
    groups = {one.group for one in settings_of(kind)}
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in values.items():
        plain = key.replace("-", "_")
        if plain in groups and isinstance(value, Mapping):
            inner, strange = flat(kind, value)
            found |= inner
            unknown += [f"{key}.{name}" for name in strange]
        elif plain in known:
            found[known[plain]] = value
        else:
            unknown.append(key)
    return found, unknown


def nested(kind: type[DataclassInstance], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``kind`` from values by field name, those of nested dataclasses put together."""
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for one in settings_of(kind):
        if one.name in values:
            (groups.setdefault(one.group, {}) if one.group else arguments)[one.name] = values[one.name]
    return arguments | {group: hints[group](**inner) for group, inner in groups.items()}


@dataclass(frozen=True)
class Settings:
    """Base class of settings dataclasses.

    Raises:
        InputError: A value out of its range, or not one of its choices.
    """

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        for one in settings_of(type(self)):
            value = None if one.group else getattr(self, one.name)
            if one.within is not None and value is not None:
                for number in value if one.many else (value,):
                    require_in(one.within, one.name, number, InputError)

    def record(self) -> dict[str, Any]:
        """The settings as JSON values by name, without actions such as ``resume``."""
        actions = {one.name for one in settings_of(type(self)) if one.action}
        values = asdict(self)
        names = [one.name for one in _ordered(type(self)) if one.name not in actions]
        return {name: _plain(values[name]) for name in names}

    @property
    def critical(self) -> dict[str, Any]:
        """The settings by name that a resumed run must share with the run that it resumes."""
        recorded, _ = flat(type(self), self.record())
        return {one.name: recorded[one.name] for one in settings_of(type(self)) if _decides(one)}


def _decides(one: Setting) -> bool:
    return one.critical and not one.action


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
