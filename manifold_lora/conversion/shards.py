"""Safetensors files read and rewritten in blocks of rows, never a tensor at once.

A file is an 8-byte length, a JSON header of that length, and the tensors' bytes one
after the other, so that a header made of names, types and shapes can be written before
any tensor is. The library `safetensors` writes from memory only (`serialize_file` takes
all tensors), and reads by mapping the file, which keeps every page that was read.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from manifold_lora.checkpoints.tensors import all_finite
from manifold_lora.errors import InputError

# Numbers of a block: a few megabytes, above which nothing becomes faster.
BLOCK = 1 << 20
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What the files call a type of NumPy.
KINDS = {dtype.name: kind for kind, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
Rows = tuple[int, int]  # first and end


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    kind: str  # of its numbers, such as BF16
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes

    @property
    def dtype(self) -> np.dtype:
        """The type of its numbers; raw bytes if that is not a float type."""
        return _DTYPES.get(self.kind, np.dtype(np.uint8))

    def blocks(self) -> Iterator[Rows]:
        """The rows of the first axis in blocks."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, BLOCK * rows // max(1, math.prod(self.shape)))
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def read(self, rows: Rows | None = None) -> np.ndarray:
        """The tensor, or some of its rows."""
        length = self.shape[0] if self.shape else 1
        first, end = (0, length) if rows is None else rows
        row = self.size // max(1, length)
        x = np.fromfile(
            self.file,
            self.dtype,
            count=(end - first) * row // self.dtype.itemsize,
            offset=self.start + first * row,
        )
        if self.kind not in _DTYPES or not self.shape:
            return x
        return x.reshape(end - first, *self.shape[1:])


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file, in the order of their bytes.

    The file must have been opened by `safetensors` before, which checks the header.
    """
    header, start = _header(file)
    header.pop(_METADATA, None)
    return {
        name: Stored(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in sorted(
            header.items(), key=lambda item: item[1]["data_offsets"]
        )
    }


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[str, Rows, np.ndarray], np.ndarray],
    dtype: str | None,
) -> int:
    """Write a safetensors file again with other numbers of other types.

    Args:
        source: the file.
        target: the new file, with the same tensors in the same order.
        change: from the name of a tensor, the first and the end of some of its rows,
            and these in at least float32, makes the new ones.
        dtype: of the new file, as NumPy calls it; None: of each tensor as it is.
            Tensors that are no weights, such as `inv_freq`, keep theirs.

    Returns:
        The bytes of all new tensors.

    Raises:
        InputError: a tensor has numbers that are NaN or infinite, or too large for the
            type; it is named.
        OSError: the file cannot be read or written.
    """
    tensors = stored_tensors(source)
    kinds = {name: _new_kind(name, x.kind, dtype) for name, x in tensors.items()}
    with target.open("wb") as stream:
        size = _write_header(stream, tensors, kinds)
        for name, stored in tensors.items():
            for rows in stored.blocks():
                x = stored.read(rows)
                if stored.kind in _DTYPES:
                    x = _changed(name, rows, x, change, kinds[name])
                stream.write(np.ascontiguousarray(x).view(np.uint8).data)
    return size


def _new_kind(name: str, kind: str, dtype: str | None) -> str:
    weight = kind in _DTYPES and not name.endswith("inv_freq")
    return KINDS[dtype] if weight and dtype is not None else kind


def _changed(
    name: str,
    rows: Rows,
    x: np.ndarray,
    change: Callable[[str, Rows, np.ndarray], np.ndarray],
    kind: str,
) -> np.ndarray:
    if not all_finite(x):
        raise InputError(
            f"{name} has values that are NaN or infinite: the model is damaged. Copy "
            "or download it again."
        )
    new = change(name, rows, x)
    if new is x and kind == KINDS[x.dtype.name]:
        return x
    with np.errstate(over="ignore"):  # found below
        new = new.astype(_DTYPES[kind])
    if not all_finite(new):
        raise InputError(
            f"{name} has values beyond the range of {_DTYPES[kind].name} after "
            "merging: give another --dtype, or a smaller weight of the adapter."
        )
    return new


def _header(file: Path) -> tuple[dict[str, dict], int]:
    """The header, and where the tensors begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return header, 8 + length


def _write_header(
    stream: BinaryIO, tensors: dict[str, Stored], kinds: dict[str, str]
) -> int:
    """Write the header of these tensors; returns the bytes that are to follow."""
    header: dict[str, object] = {_METADATA: {"format": "pt"}}  # as transformers needs
    end = 0
    for name, stored in tensors.items():
        size = stored.size
        if kinds[name] != stored.kind:
            size = math.prod(stored.shape) * _DTYPES[kinds[name]].itemsize
        header[name] = {
            "dtype": kinds[name],
            "shape": stored.shape,
            "data_offsets": (end, end + size),
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    stream.write(len(text).to_bytes(8, "little") + text)
    return end
