"""The one exception for input that a user can mend, and help with mistyped names."""

import difflib
from collections.abc import Iterable
from typing import Any, get_args


class InputError(ValueError):
    """Something the user gave is wrong: a file, a key, a name or a value.

    The message says what was got, what is needed and the remedy. The command
    prints it without a traceback and exits with code 2; every other exception
    is a defect of this library and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names nearest to `name`.

    >>> nearest("q_porj", ["q_proj", "k_proj"])
    'Did you mean q_proj? Known: k_proj, q_proj.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]}? " if close else ""
    return f"{guess}Known: {', '.join(known)}."


def check_choice(owner: str, field: str, value: Any, literal: Any) -> None:
    """Raise `InputError` unless the value is one of the members of a `Literal`."""
    if value not in get_args(literal):
        hint = nearest(str(value), get_args(literal))
        raise InputError(f"{owner} has no {field} {value!r}. {hint}")
