"""Random damage to directories, and what a reader makes of it.

`mutate` changes one file of a directory as transfers, editors and other tools do;
`judge` calls a reader on it. `tests/readers.py` is the table of readers.
"""

import json
import re
import shutil
import signal
import struct
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import numpy as np
import tomli_w

from manifold_lora.errors import InputError

SECONDS, BYTES = 5, 1 << 30  # what a reader may take
_RAW = "\0raw\0"  # marks a text that is to stand in JSON as it is
RAW = [
    *("NaN", "Infinity", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000),
    *("[" * 5000, '{"a":' * 5000, '"\\ud800"', '{"a": 1, "a": 2}', "1.0", "1e3"),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, 10**9, 2**31, 2**63, 1e300, 1e-300),
    *("", "8", "x", "\0", "../x", "a" * 5000, "(a|aa)+", "[", "é😀", "float8_e4m3fn"),
    *([], {}, [1], ["x"], [[]], {"x": 1}, [None], {"": None}),
]


class Reader(NamedTuple):
    """What is read, from a directory that `make` fills."""

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]  # gives a tree of arrays and values
    keys: dict[str, set[str]] = {}  # of JSON and TOML files, those that mean something
    several: frozenset[str] = frozenset()  # keys that may hold values of several types
    optional: frozenset[str] = frozenset()  # names of files that mean nothing
    exact: bool = False  # whether every byte means something


class Verdict(NamedTuple):
    """What happened: "refused", "read", or one of `FAULTS`."""

    kind: str
    detail: str = ""


FAULTS = ("traceback", "hang", "memory", "silent")


def mutate(folder: Path, rng: Random) -> str:
    """Change one file of a directory; what was done."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    kinds = {
        ".json": _json,
        ".jsonl": _lines,
        ".toml": _toml,
        ".safetensors": _tensors,
    }
    change = kinds.get(file.suffix)
    if change and rng.random() < 0.7:
        try:
            return f"{file.relative_to(folder)}: {change(file, rng)}"
        except Exception:
            pass  # an earlier mutation left nothing to change
    what = _bytes(file, files, rng)
    return f"{file.relative_to(folder)}: {what}"


def _bytes(file: Path, files: list[Path], rng: Random) -> str:
    data = bytearray(file.read_bytes())
    size = max(len(data), 1)
    kind = rng.choice(
        "truncate flip flip flip insert cut zero swap empty delete".split()
    )
    at = rng.randrange(size)
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        for _ in range(rng.choice([1, 1, 4, 64])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[at:at] = rng.choice([b"\0", b"\xff\xfe", b"{", b'"', b"\n", b"9" * 5000])
    elif kind == "cut":
        del data[at : at + rng.choice([1, 8, 100])]
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "swap":
        other = rng.choice(files)
        data, theirs = other.read_bytes(), bytes(data)
        other.write_bytes(theirs)
        at = other.name
    elif kind == "empty":
        data = b""
    else:
        file.unlink()
        return kind
    file.write_bytes(data)
    return f"{kind} at {at} of {size}"


def _json(file: Path, rng: Random) -> str:
    text, what = mutate_json(file.read_text(), rng)
    file.write_text(text)
    return what


def _toml(file: Path, rng: Random) -> str:
    text, what = mutate_json(json.dumps(tomllib.loads(file.read_text())), rng)
    file.write_text(tomli_w.dumps(json.loads(text)))
    return what


def _lines(file: Path, rng: Random) -> str:
    lines = file.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at], what = mutate_json(lines[at], rng)
    file.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}: {what}"


def mutate_json(text: str, rng: Random) -> tuple[str, str]:
    """JSON in which one value or key is another, and what was done."""
    value = json.loads(text)
    holder, key, path = _place(value, rng)
    kind = rng.choice(["value", "value", "value", "raw", "delete", "rename", "swap"])
    new = rng.choice(RAW if kind == "raw" else VALUES)
    if key is None:
        value = _RAW if kind == "raw" else new
    elif kind in ("value", "raw"):
        holder[key] = _RAW if kind == "raw" else new
    elif kind == "delete":
        holder.pop(key)
    elif kind == "rename" and isinstance(holder, dict):
        new = rng.choice([key.upper(), key + "x", "", "__metadata__", "a" * 5000])
        holder[new] = holder.pop(key)
    else:
        other, at, _ = _place(value, rng)
        if at is not None:
            new = other[at]
            if not isinstance(new, dict | list):
                other[at], holder[key] = holder[key], new
    try:
        changed = json.dumps(value)
    except (ValueError, RecursionError):  # a value put into itself
        return "[]", "replaced"
    changed = changed.replace(json.dumps(_RAW), str(new))
    return changed, f"{kind} {path} {str(new)[:40]!r}"


def _place(value: Any, rng: Random) -> tuple[Any, Any, str]:
    """A random place in JSON: what holds it, its key there, and its path."""
    holder, key, path = None, None, "$"
    while isinstance(value, dict | list) and value:
        if holder is not None and rng.random() < 0.25:
            break
        holder = value
        key = rng.choice(
            sorted(value) if isinstance(value, dict) else range(len(value))
        )
        path += f".{key}"[:80]
        value = value[key]
        if rng.random() < 0.02:
            return None, None, "$"
    return holder, key, path


def _tensors(file: Path, rng: Random) -> str:
    """Change the header of a safetensors file, or values behind it."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size].decode(), bytearray(data[8 + size :])
    kind = rng.choice(["header", "header", "dtype", "nan", "exchange", "length"])
    what = ""
    if kind == "header":
        header, what = mutate_json(header, rng)
    elif kind == "nan":
        at = rng.randrange(0, len(body), 4)
        body[at : at + 4] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff"])
    elif kind == "length":
        size = rng.choice([0, 1, size - 1, size + 1, 2**40, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"header of {size} bytes"
    else:
        tensors = json.loads(header)
        names = [name for name in tensors if name != "__metadata__"]
        one, other = rng.choice(names), rng.choice(names)
        if kind == "dtype":
            tensors[one]["dtype"] = rng.choice(
                ["I32", "F16", "BF16", "U8", "C64", "F8"]
            )
        else:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        header, what = json.dumps(tensors), f"{one} {other}"
    text = header.encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"{kind} {what}"


def judge(reader: Reader, folder: Path, original: Path, expected: Any) -> Verdict:
    """Read a mutated directory, and compare with what was read of the original."""
    start, memory = time.perf_counter(), _reset_peak()
    try:
        with _alarm(2 * SECONDS):
            got = fingerprint(reader.read(folder))
        verdict = Verdict("read")
        if reason := _silent(reader, folder, original, got == expected):
            verdict = Verdict("silent", reason)
    except InputError as error:
        verdict = Verdict("refused", str(error))
    except _Alarm:
        return Verdict("hang", "interrupted")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Verdict("traceback", f"{type(error).__name__}: {str(error)[:300]}")
    if (seconds := time.perf_counter() - start) > SECONDS:
        return Verdict("hang", f"{seconds:.1f} s")
    if (used := _peak() - memory) > BYTES:
        return Verdict("memory", f"{used / BYTES:.1f} GiB")
    return verdict


def fingerprint(tree: Any) -> Any:
    """A tree of arrays and values as something to compare with `==`."""
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), [
        (str(x.dtype), x.shape, x.tobytes()) if isinstance(x, np.ndarray) else repr(x)
        for x in (np.asarray(x) if hasattr(x, "dtype") else x for x in leaves)
    ]


def _silent(reader: Reader, folder: Path, original: Path, same: bool) -> str:
    """What is accepted though it says something else, or is no JSON; "" if nothing."""
    for file in sorted(file for file in original.rglob("*") if file.is_file()):
        name = str(file.relative_to(original))
        changed = folder / name
        if file.name in reader.optional:
            continue
        if not changed.is_file():
            if same:
                return f"{name} is missing"
            continue
        before, after = file.read_bytes(), changed.read_bytes()
        if before == after:
            continue
        reason = ""
        if file.suffix in (".json", ".jsonl", ".toml"):
            reason = _differs(reader, file, changed, same)
        elif file.suffix == ".safetensors" and _content(before) != _content(after):
            reason = "another tensor" if same else ""
        elif same and reader.exact:
            reason = "another content"
        if reason:
            return f"{name}: {reason}"
    return ""


def _differs(reader: Reader, file: Path, changed: Path, same: bool) -> str:
    try:
        one, other = _parse(file), _parse(changed)
    except (ValueError, RecursionError) as error:
        return f"no {file.suffix[1:]} ({str(error)[:60]})"
    if type(one) is not type(other):
        return "another type of JSON"
    if reader.exact and one != other:
        return "another content" if same else ""
    if not isinstance(one, dict):
        return ""
    for key in reader.keys.get(file.name, set()) & one.keys() & other.keys():
        x, y = one[key], other[key]
        if x is None or y is None or x == y:
            continue
        if _type(x) is not _type(y) and key not in reader.several:
            return f"{key} is {str(y)[:40]!r}"
        reordered = isinstance(x, list) and isinstance(y, list) and {*x} == {*y}
        if same and y != [x] and not reordered:
            return f"{key} was {str(x)[:40]}, is {str(y)[:40]}"
    return ""


def _parse(file: Path) -> Any:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".toml":
        return tomllib.loads(text)
    if file.suffix == ".jsonl":
        return [_loads(line) for line in text.splitlines() if line.strip()]
    return _loads(text)


def _loads(text: str) -> Any:
    # Python itself reads integers of 4300 digits at most
    return json.loads(text, parse_int=lambda x: int(x) if len(x) < 400 else float(x))


def _type(value: Any) -> type:
    return float if type(value) is int else type(value)


def _content(data: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, as far as they can be read."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        header.pop("__metadata__", None)
        return {
            name: (x["dtype"], x["shape"], body[slice(*x["data_offsets"])])
            for name, x in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        return {}


class _Alarm(BaseException):
    pass


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise _Alarm

    before = signal.signal(signal.SIGALRM, ring)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest)  # of pytest-timeout


def _reset_peak() -> int:
    """Forget the peak of this process's memory, where Linux lets it; the size now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 1 << 62
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) * 1024 if found else 0


def try_one(reader: Reader, original: Path, folder: Path, expected: Any, rng: Random):
    """Mutate a copy of a directory and read it: what was done, and the verdict."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    what = mutate(folder, rng)
    if rng.random() < 0.15 and any(file.is_file() for file in folder.rglob("*")):
        what += f"; {mutate(folder, rng)}"
    return what, judge(reader, folder, original, expected)
