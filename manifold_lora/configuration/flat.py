"""Configurations by flat names: flags and TOML keys in, TOML out.

A command's configuration is a frozen dataclass of parts and of settings of its own.
Outside of Python every setting has one flat name, whatever part it is in: `--rank` is
`config.adapter.rank`. The options of all methods have flat names as well; they become
the field `options` of the adapter's part or, in a comparison, of the configuration.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.options import (
    MethodOptions,
    fields_by_option,
    options_class,
)
from manifold_lora.errors import InputError, nearest, shortened
from manifold_lora.settings import RENAMED, decode, raise_all, read_path, type_hints

Config = TypeVar("Config")
OPTIONS = "options"


class Entry(NamedTuple):
    """A setting by its flat name."""

    name: str
    fields: dict[str, dataclasses.Field[Any]]  # of an option by method; else one
    hint: Any  # its type
    group: str  # the field of the configuration that is its part; "" for its own
    owner: type  # the class that declares it
    option: bool = False  # of some methods only


class Source(NamedTuple):
    """Values by flat name, and where they come from."""

    values: Mapping[str, Any]
    label: Callable[[str], str] = str  # how messages call a setting
    from_text: bool = False  # numbers are still text
    problems: tuple[str, ...] = ()  # with the source itself


def part(kind: Any, **metadata: Any) -> Any:
    """A field of a configuration that is a part of that class.

    Of an adapter's part, `roles` names the options of methods that the command has.
    """
    return dataclasses.field(default_factory=kind, metadata=metadata | {"part": kind})


def parts(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a configuration that are parts."""
    fields = dataclasses.fields(kind)
    return {field.name: field for field in fields if "part" in field.metadata}


def entries(kind: type) -> dict[str, Entry]:
    """Every setting of a configuration by its flat name, in the order of the fields."""
    by_name: dict[str, Entry] = {}

    def add(owner: Any, group: str) -> None:
        hints = type_hints(owner)
        for field in _fields(owner):
            if "help" in field.metadata:
                name = flat_name(field)
                hint = hints[field.name]
                by_name[name] = Entry(name, {"": field}, hint, group, owner)

    add(kind, "")
    roles = _option_roles(kind)
    for group, field in parts(kind).items():
        add(field.metadata["part"], group)
        options = fields_by_option() if group == "adapter" else {}
        for name, fields in options.items():
            if next(iter(fields.values())).metadata["role"] in roles:
                hint = _joint_hint(name, list(fields))
                by_name[name] = Entry(name, fields, hint, group, MethodOptions, True)
    return by_name


def _fields(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields, positional ones first, such as the adapter's method."""
    return sorted(dataclasses.fields(config), key=lambda field: bool(field.kw_only))


def _option_roles(kind: type) -> Sequence[str]:
    """The roles of the method options that a command has; none without an adapter."""
    declared = (field.metadata.get("roles", ()) for field in _fields(kind))
    return next(filter(None, declared), ())


def flat_name(field: dataclasses.Field[Any]) -> str:
    """The flag and TOML key of a field."""
    return field.metadata["name"] or field.name


def _joint_hint(option: str, methods: Sequence[str]) -> Any:
    """The type of an option over all methods that have it."""
    hints = [type_hints(options_class(method))[option] for method in methods]
    if all(typing.get_origin(hint) is Literal for hint in hints):
        choices = [value for hint in hints for value in typing.get_args(hint)]
        return Literal[tuple(dict.fromkeys(choices))]  # pyright: ignore[reportReturnType]
    return hints[0]


def compose(kind: Callable[..., Config], *sources: Source) -> Config:
    """The configuration with these values; later sources override earlier ones.

    A class with a function `inherited` takes what that makes of the values below all.

    Args:
        kind: the class of the configuration.
        sources: values by flat name; all others keep their defaults.

    Raises:
        InputError: unknown names (with the nearest known ones), values of the wrong
            type or out of range, and settings that exclude each other, in one message.
    """
    known = entries(typing.cast(type, kind))
    if inherited := getattr(kind, "inherited", None):
        given = {name: x for source in sources for name, x in source.values.items()}
        sources = (Source(inherited(given)), *sources)
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {name: {} for name in ("", *parts(kind))}
    options: dict[str, Any] = {}
    for source in sources:
        problems += source.problems
        for name, value in source.values.items():
            if name not in known:
                where = source.label(shortened(name))
                problems.append(f"{where}: {_unknown(name, known)}")
                continue
            entry = known[name]
            try:
                value = decode(value, entry.hint, from_text=source.from_text)
            except ValueError as error:
                problems.append(f"{source.label(name)} {error}")
                continue
            if entry.option:
                options[name] = value
                continue
            field = entry.fields[""]
            if field.metadata.get("single") and len(value) == 1:
                (value,) = value
            values[entry.group][field.name] = value
    own = values.pop("")
    holder = own
    for name, field in parts(kind).items():
        if field.metadata["part"] is AdapterConfig:
            holder = values[name]
    if options:
        holder[OPTIONS] = options

    def make(build: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        try:
            return build(**arguments)
        except InputError as error:
            problems.append(str(error))

    for name, field in parts(kind).items():
        if (made := make(field.metadata["part"], values[name])) is not None:
            own[name] = made
    config = make(kind, own)
    raise_all(dict.fromkeys(problems))
    return config


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    if name in RENAMED:
        return f"{name!r} is now called {RENAMED[name]!r}."
    return f"unknown key {shortened(repr(name))}. {nearest(name, known)}"


def read_toml(path: Path, kind: type) -> Source:
    """The values of a TOML file, flat or in tables with the names of the parts.

    A key in the table of another part is one of its problems.

    Raises:
        InputError: no such file, or broken TOML.
    """
    path = read_path(path, "--config")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"--config {path} cannot be read: {error.strerror}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--config {path} is not valid TOML: {_reason(error)}."
        ) from error
    flat: dict[str, Any] = {}
    problems = []
    known = entries(kind)

    def add(name: str, value: Any) -> None:
        if name in flat:
            problems.append(f"{path}: {name} is given twice")
        flat[name] = value

    for key, value in values.items():
        if not (isinstance(value, dict) and key in parts(kind)):
            add(key, value)
            continue
        for name, inner in value.items():
            group = known[name].group if name in known else key
            if group != key:
                where = (
                    f"belongs in [{group}]" if group else "belongs before all tables"
                )
                problems.append(f"{path}: {name} stands in [{key}] and {where}")
            add(name, inner)
    return Source(flat, lambda name: f"{path}: {name}", problems=tuple(problems))


def _reason(error: Exception) -> str:
    """Why a text is not TOML."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not a text in UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if str(error).startswith("Exceeds the limit"):
        return "an integer has more than 4300 digits"
    return str(error)


def flatten(config: Any) -> dict[str, Any]:
    """The settings that make a configuration what it is, as TOML can hold them."""
    values: dict[str, Any] = {}
    for field in _fields(config):
        value = getattr(config, field.name)
        if "part" in field.metadata or field.name == OPTIONS:
            if dataclasses.is_dataclass(value):
                values |= flatten(value)
        elif field.metadata.get("saved", True) and value is not None:
            values[flat_name(field)] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], kind: type
) -> list[str]:
    """The settings in which two flattened configurations are different runs."""
    may_change = {
        name
        for name, entry in entries(kind).items()
        if any(field.metadata.get("may_change") for field in entry.fields.values())
    }
    return [
        f"{name} was {before.get(name, 'unset')}, is {now.get(name, 'unset')}"
        for name in sorted({*before, *now} - may_change)
        if before.get(name) != now.get(name)
    ]
