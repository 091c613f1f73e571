"""The exception for invalid user input, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args


class InputError(ValueError):
    """Invalid user input: a file, key, name or value.

    The message states what was given, what is required and how to fix it. The command
    prints it without a traceback and exits with code 2; any other exception is a bug
    in this library and keeps its traceback.
    """


def shortened(text: str, length: int = 80) -> str:
    """A text, or the beginning of a long one, for messages.

    >>> shortened("9" * 1000, 5)
    '99999… (1000 characters)'
    """
    if len(text) <= length:
        return text
    return f"{text[:length]}… ({len(text)} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known name, and all known ones.

    >>> nearest("q_porj", ["q_proj", "k_proj"])
    'Did you mean q_proj? Known: k_proj, q_proj.'
    """
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    suggestion = f"Did you mean {matches[0]}? " if matches else ""
    return f"{suggestion}Known: {', '.join(known)}."


def check_choice(owner: str, field: str, value: Any, literal: Any) -> None:
    """Raise `InputError` unless the value is a member of the `Literal`."""
    if value not in get_args(literal):
        hint = nearest(str(value), get_args(literal))
        raise InputError(f"{owner} has no {field} {value!r}. {hint}")
