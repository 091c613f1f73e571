"""The tensors of safetensors files: their types, and whether they are finite."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from manifold_lora.errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")  # quantised weights are not supported
# The bits of the exponent, which are all set in NaN and infinity.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


def all_finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite.

    >>> all_finite(np.array([1.0, np.nan]))
    False
    """
    if x.dtype.name not in _EXPONENT:
        return bool(np.isfinite(x).all())
    kind, exponent = _EXPONENT[x.dtype.name]  # NumPy is slow with 16-bit floats
    bits = np.ascontiguousarray(x).view(kind)
    return not bool(((bits & exponent) == exponent).any())


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, which must be finite numbers of a float type.

    Raises:
        InputError: the file is damaged, or tensors of it are something else; all are
            named.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            kinds = {name: tensors.get_slice(name).get_dtype() for name in names}
            errors = [
                f"{name}: found {kind}, needed one of {', '.join(FLOATS)}"
                for name, kind in kinds.items()
                if kind not in FLOATS
            ]
            names = [] if errors else names
            loaded = {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({error}): copy or "
            "export it again."
        ) from error
    errors += [
        f"{n}: has NaN or infinity" for n, x in loaded.items() if not all_finite(x)
    ]
    if errors:
        shown = errors[:8] + [f"... and {len(errors) - 8} more"] * (len(errors) > 8)
        raise InputError(
            f"{file} cannot be used:\n  " + "\n  ".join(shown) + "\nExport it again."
        )
    return loaded
