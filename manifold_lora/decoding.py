"""JSON files with a schema: decoded strictly, or refused with one clear error."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from manifold_lora.errors import InputError

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

    NaN and infinity are not JSON and are refused, as are integers beyond 4300 digits.

    Raises:
        ValueError: what is wrong, in words, without the name of a file.

    Examples:
        >>> decode_json('{"rank": 8}', dict[str, int])
        {'rank': 8}
        >>> decode_json('{"rank": NaN}')
        Traceback (most recent call last):
        ValueError: not valid JSON: invalid character (byte 9)
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"not the JSON expected here: {error}") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except (msgspec.DecodeError, UnicodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise ValueError(f"not valid JSON: {reason}") from error
