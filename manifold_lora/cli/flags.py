"""The flags of a command, made from the settings of its configuration.

tyro parses flags as text, into dataclasses that are built here; `configuration.flat`
turns the text into values, as it does with TOML, so that both are checked alike.
"""

import dataclasses
import inspect
import keyword
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from manifold_lora.adapters.options import by_method
from manifold_lora.configuration.flat import (
    Entry,
    Source,
    compose,
    entries,
    read_toml,
)
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.settings import MAX_INT, default_text, flag

Config = TypeVar("Config")


class _NotGiven(int):
    """Default of a flag with a --no- counterpart, told from False by its identity.

    tyro makes such a pair only for a default that equals True or False.
    """


_NOT_GIVEN: Any = _NotGiven(0)


# tyro parses the source of a class's module for comments; classes made here have none.
_NO_SOURCE = "builtins"
_OPTIONS = "Options of some methods only, which stand in brackets."


@dataclasses.dataclass(frozen=True)
class CommandFlags:
    """Flags of every command with a configuration."""

    __module__ = _NO_SOURCE

    config: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="PATH",
            help="TOML file of settings, with underscores",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    debug: Annotated[
        bool,
        tyro.conf.arg(help="show tracebacks", help_behavior_hint="(default: no)"),
    ] = False
    compile_cache: Annotated[
        bool,
        tyro.conf.arg(
            help="keep compiled programs in the user's cache directory, or where "
            "JAX_COMPILATION_CACHE_DIR says",
            help_behavior_hint="(default: yes)",
        ),
    ] = True


def flags_class(kind: type) -> type[CommandFlags]:
    """The class that tyro parses: a group of flags for every part of a configuration.

    Its fields are dataclasses whose fields are text, or None where a flag is not given.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries(kind).values():
        group = entry.group or kind.__name__.removesuffix("Config").lower()
        group += "_" * keyword.iskeyword(group)  # import is no name of a field
        groups.setdefault("method" if entry.option else group, []).append(entry)
    fields: list[tuple[str, Any, Any]] = []
    for group, members in groups.items():
        made: Any = dataclasses.make_dataclass(
            group, [_flag(entry) for entry in members], frozen=True
        )
        text = _OPTIONS if members[0].option else members[0].owner.__doc__ or ""
        made.__doc__ = inspect.cleandoc(text).split("\n\n")[0]
        made.__module__ = _NO_SOURCE
        title = tyro.conf.arg(name=group.removesuffix("_"))
        fields.append((group, Annotated[made, title], made()))
    made = dataclasses.make_dataclass(
        kind.__name__, fields, bases=(CommandFlags,), frozen=True
    )
    made.__doc__ = ""
    made.__module__ = _NO_SOURCE
    return made


def read_flags(kind: type[Config], flags: CommandFlags) -> Config:
    """The configuration of these flags, which override the file of --config.

    Raises:
        InputError: all that is wrong with either, in one message.
    """
    values = {}
    for field in dataclasses.fields(flags):
        group = getattr(flags, field.name)
        if dataclasses.is_dataclass(group):
            values |= {
                f.name: getattr(group, f.name) for f in dataclasses.fields(group)
            }
    known = entries(typing.cast(type, kind))
    given = {
        name: _pairs(name, value) if _is_mapping(known[name].hint) else value
        for name, value in values.items()
        if value is not None and value is not _NOT_GIVEN
    }
    # An empty variable of the shell must not mean the default.
    empty = tuple(
        f"{flag(name)} needs at least one value"
        for name, value in given.items()
        if value == ()
    )
    sources = [Source(given, flag, from_text=True, problems=empty)]
    if flags.config is not None:
        sources.insert(0, read_toml(flags.config, typing.cast(type, kind)))
    return compose(kind, *sources)


def join_repeated(kind: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with all values of a flag, if it takes several, in one place.

    Otherwise of `--adapter A --adapter B` only the last would count.
    """
    several = {flag(name) for name, e in entries(kind).items() if _several(e.hint)}
    chunks: list[list[str]] = []  # each a flag with its values
    by_flag: dict[str, list[str]] = {}
    current: list[str] = []  # what values belong to
    for argument in ["", *arguments]:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in by_flag:
            current = by_flag[name]
        elif argument.startswith("--") or not chunks:
            current = [name if name in several else argument]
            chunks.append(current)
        else:
            current.append(argument)
        if name in several:
            by_flag[name] = current
            current += [value] if equals else []
    return [argument for chunk in chunks for argument in chunk][1:]


def _pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    if len(texts) % 2:
        raise InputError(
            f"{flag(name)} needs names with a value each, as in q_proj 8 mlp.* 32, got "
            f"{' '.join(texts)}."
        )
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _flag(entry: Entry) -> tuple[str, Any, Any]:
    """Name, type and default of a field of the class that tyro parses."""
    hint = _without_none(entry.hint)
    argument = tyro.conf.arg(
        help=_help(entry),
        help_behavior_hint=f"(default: {_default(entry)})",
        metavar=None if hint is bool else _metavar(hint),
    )
    if hint is bool:
        return entry.name, Annotated[bool, argument], _NOT_GIVEN
    kind: Any = (tuple[str, ...] if _several(entry.hint) else str) | None
    if any(field.metadata.get("positional") for field in entry.fields.values()):
        kind = tyro.conf.Positional[kind]
    return entry.name, Annotated[kind, argument], None


def _help(entry: Entry) -> str:
    """What a setting is; of an option, for which methods."""
    texts = {method: f.metadata["help"] for method, f in entry.fields.items()}
    text = by_method(texts)
    if entry.option and len({*texts.values()}) == 1:
        text += f" ({_names(list(texts))})"
    hint = _without_none(entry.hint)
    if typing.get_origin(hint) is Annotated:
        base, limits = typing.get_args(hint)
        if base is int and limits.le != MAX_INT:  # the limit of any number
            text += f" ({limits.ge} to {limits.le})"
    return text


def _names(methods: Sequence[str]) -> str:
    if len(methods) > len(METHODS) / 2:
        others = [name for name in METHODS if name not in methods]
        return "all but " + ", ".join(others) if others else "all"
    return ", ".join(methods)


def _default(entry: Entry) -> str:
    return by_method({method: default_text(f) for method, f in entry.fields.items()})


def _without_none(hint: Any) -> Any:
    if _is_union(hint):
        args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return args[0] if len(args) == 1 else typing.Union[tuple(args)]  # noqa: UP007
    return hint


def _several(hint: Any) -> bool:
    """Whether a flag takes several values."""
    hint = _without_none(hint)
    return typing.get_origin(hint) is tuple or _is_mapping(hint) or _is_union(hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


def _metavar(hint: Any) -> str:
    """The value of a flag as the help shows it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _metavar(args[0])
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if _is_mapping(hint):
        return f"[NAME {_metavar(args[1])} ...]"
    if _is_union(hint):
        return _metavar(args[-1])
    if origin in (tuple, Sequence):
        if args[1:] in ((...,), ()):
            return f"[{_metavar(args[0])} ...]"
        return " ".join(map(_metavar, args))
    return _METAVARS[hint]
