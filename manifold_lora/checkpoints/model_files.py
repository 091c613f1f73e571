"""The safetensors files of a Hugging Face model directory, and their index."""

import os
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError, shortened

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_ERRORS = 8  # shown


def model_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or those of its index."""
    weight_map = _weight_map(path)
    names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    return [path / name for name in names]


def _weight_map(path: Path) -> dict[str, str] | None:
    """The file of each tensor by the index; None where one file has them all."""
    if (path / WEIGHTS).is_file():
        return None
    file = path / INDEX
    if not file.is_file():
        raise InputError(
            f"{path} has neither {WEIGHTS} nor {INDEX}. "
            "Weights in .bin or .pth files must be converted to safetensors first."
        )
    weight_map = read_json(file, _Index).weight_map
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        name = shortened(repr(outside[0]))
        raise InputError(f"{file} names {name}, which is not a file beside it.")
    here = set(os.listdir(path))
    if missing := [shortened(name) for name in names if name not in here]:
        raise InputError(
            f"{path} lacks {', '.join(missing)}, named by {INDEX}: download them."
        )
    return weight_map


class _Index(msgspec.Struct):
    """What is read of the index."""

    weight_map: dict[str, str]


def open_tensors(path: Path) -> dict[str, Any]:
    """The open file of each tensor; only the headers are read."""
    weight_map = _weight_map(path)
    tensors, errors = {}, []
    for file in model_files(path):
        name = file.name
        try:
            reader = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is truncated or not a safetensors file ({error}): "
                "copy or download it again."
            ) from error
        for key in reader.keys():  # noqa: SIM118, it is not a dict
            if key in tensors:
                errors.append(f"{key} is in two files, {name} and another")
            elif weight_map is not None and weight_map.get(key) != name:
                where = weight_map.get(key, "none")
                errors.append(f"{key} is in {name}, by the index in {where}")
            tensors[key] = reader
    errors += [
        f"{key} is not in {weight_map[key]}"
        for key in weight_map or ()
        if (weight_map is not None and key not in tensors)
    ]
    if errors:
        raise InputError(
            f"{path / INDEX} does not fit the files:\n  "
            + "\n  ".join(errors[:_MAX_ERRORS])
            + "\nDownload the model again."
        )
    return tensors
