"""JSON files with a schema: decoded strictly, or refused with one clear error."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from manifold_lora.errors import InputError, shortened

T = TypeVar("T")


def read_json(
    file: Path,
    kind: type[T] = dict[str, Any],
    remedy: str = "copy or download it again",
) -> T:
    """The content of a JSON file as a type: a dict, a list or a `msgspec.Struct`.

    Args:
        file: the file, in UTF-8.
        kind: what it must hold; keys that a struct lacks are ignored.
        remedy: what to do about a file that does not, in an imperative.

    Raises:
        InputError: the file is not JSON, is nested too deeply or holds other types;
            it names the file, what is wrong and the remedy.
        OSError: the file cannot be read.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "numbers.json")
        >>> _ = file.write_text("[1, 2]")
        >>> read_json(file, list[int])
        [1, 2]
    """
    try:
        return decode_json(file.read_bytes(), kind)
    except ValueError as error:
        raise InputError(f"{file}: {error}: {remedy}.") from error


def decode_json(text: bytes | str, kind: type[T] = dict[str, Any]) -> T:
    """JSON as a type.

    NaN and infinity are not JSON and are refused, as are integers beyond 4300 digits
    and keys that occur twice.

    Raises:
        ValueError: what is wrong, in words, without the name of a file.

    Examples:
        >>> decode_json('{"rank": 8}', dict[str, int])
        {'rank': 8}
        >>> decode_json('{"rank": NaN}')
        Traceback (most recent call last):
        ValueError: not valid JSON: invalid character (byte 9)
        >>> decode_json('{"rank": 8, "rank": 4}')
        Traceback (most recent call last):
        ValueError: not valid JSON: the key rank occurs twice in an object: keep one
    """
    try:
        value = msgspec.json.decode(text, type=kind)
        # Text for numbers: those of ignored keys may have any length.
        json.loads(text, object_pairs_hook=unique_keys, parse_int=str, parse_float=str)
        return value
    except DuplicateKey as error:
        raise ValueError(f"not valid JSON: {error}") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"not the JSON expected here: {error}") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except ValueError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise ValueError(f"not valid JSON: {reason}") from error


class DuplicateKey(ValueError):
    """A key occurs twice in an object, of which most decoders drop one in silence."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict, for `object_pairs_hook` of Python's decoder.

    Raises:
        DuplicateKey: a key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKey(
            f"the key {shortened(twice)} occurs twice in an object: keep one"
        )
    return value
