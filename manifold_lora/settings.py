"""Settings: fields of configurations with type, range, default and help in one place.

Configurations are frozen dataclasses whose fields are made by `setting`. Flags, TOML
keys, checks and help follow from these declarations. Imports no JAX.
"""

import dataclasses
import itertools
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from manifold_lora.errors import InputError, shortened

# Steps, rows and lengths are counted in int32 on devices.
MAX_INT = 2**31 - 1
# Its square is finite in float32.
MAX_FLOAT = 10**18
PositiveInt = Annotated[int, Meta(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, Meta(ge=0, le=MAX_INT)]
PositiveFloat = Annotated[float, Meta(gt=0, le=MAX_FLOAT)]
# Integers stay integers, in files as well.
PositiveNumber = Annotated[int, Meta(gt=0, le=MAX_FLOAT)] | PositiveFloat
NonNegativeFloat = Annotated[float, Meta(ge=0, le=MAX_FLOAT)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
# `jax.random.key` ignores all bits but the last 32, without a word.
MAX_SEED = 2**32 - 1
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
# Beyond any matrix of a model, and any context and batch that devices hold.
Rank = Annotated[int, Meta(ge=1, le=2**16)]
BatchSize = Annotated[int, Meta(ge=1, le=2**20)]
SequenceLength = Annotated[int, Meta(ge=2, le=2**24)]

# The default of a setting that the other settings decide, such as 2·rank for alpha.
UNSET: Any = None

# Settings that are refused with their new name, for one release.
RENAMED = {"start": "init", "attraction": "penalty_weight"}


def setting(
    default: Any,
    help: str,
    *,
    default_text: str | Callable[[], str] = "",
    name: str = "",
    **metadata: Any,
) -> Any:
    """A field of a configuration.

    Args:
        default: its default; `UNSET` where other settings decide it.
        help: one line for `--help` and the documentation.
        default_text: the default in words, where the value does not say it.
        name: of the flag and the TOML key; by default the field's own.
        metadata: what else others ask for: `saved=False`, `may_change=True`, or
            `positional=True` for an argument without a flag.
    """
    metadata |= {"help": help, "default_text": default_text, "name": name}
    if isinstance(default, dict):  # left out of the hash: a dict has none
        return dataclasses.field(
            default_factory=lambda: dict(default), hash=False, metadata=metadata
        )
    return dataclasses.field(default=default, metadata=metadata)


def type_hints(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with their ranges."""
    return typing.get_type_hints(kind, include_extras=True)


def decode(value: Any, hint: Any, *, from_text: bool = False) -> Any:
    """The value as the type says, strictly: 1 is a float, "1" and True are not.

    Text or a path alone is a list of one item.

    Args:
        value: from TOML, Python or, as text, from the command line.
        hint: a type, possibly with a range.
        from_text: whether text is read as numbers and truth values.

    Raises:
        ValueError: what the value must be, in words.

    Examples:
        >>> decode(3, PositiveFloat), decode("lora", tuple[str, ...])
        (3.0, ('lora',))
        >>> decode(0, PositiveInt)
        Traceback (most recent call last):
        ValueError: must be at least 1, got 0
    """
    if _is_mapping(hint) and isinstance(value, Mapping):
        return _decode_items(value, typing.get_args(hint)[1], from_text)
    if isinstance(value, str | Path) and typing.get_args(hint)[1:] == (...,):
        value = (value,)
    try:
        return msgspec.convert(value, hint, strict=not from_text, dec_hook=_path)
    except msgspec.ValidationError as error:
        number = _number(value) if from_text else value
        if number is not value:
            return decode(number, hint)
        if isinstance(error.__cause__, _PathError):
            raise ValueError(str(error.__cause__)) from error
        needed = requirement(hint, value)
        raise ValueError(f"must be {needed}, got {_shown(value)}") from error


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _decode_items(
    values: Mapping[str, Any], hint: Any, from_text: bool
) -> dict[str, Any]:
    decoded = {}
    for key, value in values.items():
        try:
            decoded[key] = decode(value, hint, from_text=from_text)
        except ValueError as error:
            raise ValueError(f"for {key} {error}") from error
    return decoded


def _number(value: Any) -> Any:
    """The number that a text stands for, or else the text."""
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            pass
    return value


def _shown(value: Any) -> str:
    try:
        return shortened(repr(value))
    except ValueError:  # Python's limit
        return "an integer of more than 4300 digits"


class _PathError(ValueError):
    """A path that no file can have."""


_MAX_NAME, _MAX_PATH = 255, 4095  # bytes, on all common file systems and on Linux


def _path(kind: type, value: Any) -> Any:
    if kind is not Path or not isinstance(value, str | Path):
        raise ValueError(value)
    shown = _shown(str(value))
    if not str(value):
        raise _PathError("must be a path, got an empty text")
    try:
        path = Path(value).expanduser()
        # In a locale without UTF-8, undecodable bytes are surrogates.
        names = [os.fsencode(name.encode().decode()) for name in path.parts]
    except RuntimeError as error:
        raise _PathError(
            f"starts with the home of a user who does not exist: {shown} (write ./~ "
            "for a file whose name starts with ~)"
        ) from error
    except UnicodeError as error:
        raise _PathError(
            f"must be a path in UTF-8, got {shown}: rename it, or set a locale with "
            "UTF-8, such as LC_ALL=C.UTF-8"
        ) from error
    if b"\0" in b"".join(names):
        raise _PathError(f"must be a path without NUL characters, got {shown}")
    if max(map(len, names), default=0) > _MAX_NAME:
        raise _PathError(
            f"must be a path whose names have at most {_MAX_NAME} bytes, got {shown}"
        )
    if sum(map(len, names)) + len(names) > _MAX_PATH:
        raise _PathError(f"must be a path of at most {_MAX_PATH} bytes, got {shown}")
    return path


def read_path(value: Any, name: str) -> Path:
    """A path that a user gives: `~` is their home.

    Args:
        value: the path.
        name: of what it is, for the message.

    Raises:
        InputError: no file can have this path.
    """
    try:
        return decode(Path(value) if isinstance(value, os.PathLike) else value, Path)
    except ValueError as error:
        raise InputError(f"{name} {error}.") from error


def validate(config: Any, also: Iterable[str] = ()) -> None:
    """Check every field of a dataclass instance and store it as its type, in place.

    Args:
        config: the instance, in its `__post_init__`.
        also: further problems to report in the same message.

    Raises:
        InputError: all values of a wrong type or out of range.
    """
    problems = []
    hints = type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is UNSET or dataclasses.is_dataclass(value):
            continue
        try:
            value = decode(value, hints[field.name])
            object.__setattr__(config, field.name, value)
        except ValueError as error:
            problems.append(f"{field.name} {error}")
    raise_all([*problems, *also])


def raise_all(problems: Iterable[str]) -> None:
    """Raise one `InputError` for all problems, if there are any."""
    if problems := list(problems):
        raise InputError("; ".join(problem.rstrip(".") for problem in problems) + ".")


def fill(config: Any, **defaults: Any) -> Any:
    """The configuration with these values in place of those that are not set."""
    unset = {k: v for k, v in defaults.items() if getattr(config, k) is UNSET}
    return dataclasses.replace(config, **unset) if unset else config


def requirement(hint: Any, value: Any = None) -> str:
    """What a value of a type must be, in words.

    >>> requirement(Probability, 2.0), requirement(int | None)
    ('in [0, 1)', 'an integer')
    >>> requirement(dict[str, PositiveInt])
    'a table of names, each value at least 1'
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and args[1].description:
        return args[1].description
    if origin is Annotated:
        numbers = int if args[0] is int else int | float
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        is_number |= value == math.inf  # what integers of many digits are as text
        return _range(args[1], value) if is_number else requirement(args[0])
    if origin in (typing.Union, types.UnionType):
        types_of = {arg: (*typing.get_args(arg), arg)[0] for arg in args}
        if float in types_of.values():  # integers are numbers
            types_of = {arg: kind for arg, kind in types_of.items() if kind is not int}
        choices = [requirement(a, value) for a in types_of if a is not type(None)]
        return " or ".join(dict.fromkeys(choices))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, Sequence):
        if args[1:] in ((...,), ()):
            return f"a list, each item {requirement(args[0], 0)}"
        return f"{len(args)} items, each {requirement(args[0], 0)}"
    if _is_mapping(hint):
        return f"a table of names, each value {requirement(args[1], 0)}"
    return _WORDS.get(hint, str(hint))


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def _range(meta: Meta, value: int | float = 0) -> str:
    if meta.ge is not None and meta.lt is not None:
        return f"in [{meta.ge:g}, {meta.lt:g})"
    least = "a positive number" if meta.ge is None else f"at least {meta.ge:g}"
    if meta.le is None or not value > meta.le:  # or it is NaN
        return least
    most = number(float(meta.le)) if meta.le == MAX_FLOAT else meta.le
    return f"{least}, at most {most}"


def flag(name: str) -> str:
    """The flag of a setting.

    >>> flag("rank_pattern")
    '--rank-pattern'
    """
    return "--" + name.replace("_", "-")


def check_renamed(arguments: Sequence[str]) -> None:
    """Raise `InputError` for a flag that is written otherwise now."""
    for argument, value in itertools.zip_longest(arguments, arguments[1:]):
        for old, new in RENAMED.items():
            if argument.partition("=")[0] == flag(old):
                raise InputError(f"{flag(old)} is now called {flag(new)}.")
        if argument == "--packing" and value in ("True", "False", "None"):
            raise InputError(
                "--packing takes no value now; its opposite is --no-packing."
            )


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a field made by `setting`, in words."""
    text: str | Callable[[], str] = field.metadata["default_text"]
    if text:
        return text() if callable(text) else text
    default = field.default
    if default is UNSET or default is dataclasses.MISSING:
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(map(number, default)) or "none"
    return number(default)


def number(value: Any) -> str:
    """A value in as few characters as say it.

    >>> number(0.0002), number(5e-05), number("adamw")
    ('2e-4', '5e-5', 'adamw')
    """
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    mantissa, _, exponent = f"{value:e}".partition("e")
    short = f"{float(mantissa):g}e{int(exponent)}"
    return min(f"{value:g}", short, key=len)
