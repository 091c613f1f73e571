"""Read adapters of other tools and write them as adapters of this library."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    ModuleFactors,
    Sizes,
    adapter_directory,
    read_adapter,
)
from manifold_lora.checkpoints.adapter_writer import CONFIG
from manifold_lora.checkpoints.peft import linear_sizes
from manifold_lora.checkpoints.tensors import load_tensors
from manifold_lora.console import make_console
from manifold_lora.conversion.base import Base
from manifold_lora.conversion.config import ImportConfig
from manifold_lora.conversion.convert import report
from manifold_lora.conversion.write import check_output, write_adapter
from manifold_lora.decoding import read_json
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.errors import InputError

MLX_WEIGHTS = "adapters.safetensors"


def import_adapter(
    config: ImportConfig, console: Console | None = None
) -> dict[str, Any]:
    """Write an adapter of PEFT, StelLA or mlx-lm as one of this library.

    PEFT's LoRA, rsLoRA and DoRA, with rank and alpha patterns, become "lora" or "dora",
    StelLA's own files "stella". `convert_adapter` then turns it into a manifold
    adapter. `load_adapter` reads all but mlx-lm's without being imported.

    Args:
        config: what to import, and where to write it.
        console: where it is reported.

    Returns:
        As `convert_adapter`.

    Raises:
        InputError: it cannot be read, or is of another base; all that is wrong is
            named.
        OSError: the files cannot be written, or read back as something else.
    """
    console = console or make_console()
    all_devices()  # reports a platform that is not there
    assert config.adapter is not None and config.out is not None  # ImportConfig
    path = adapter_directory(config.adapter)
    check_output(config.out, config.overwrite, [path])
    base = None if config.model is None else Base.open(config.model)
    if (path / MLX_WEIGHTS).is_file():
        source = read_mlx(path, None if base is None else linear_sizes(base.model))
    else:
        source = read_adapter(path) if base is None else base.read_adapter(path)
    if base is not None:
        source = source._replace(base=base.fingerprint())
    if config.base_id is not None:
        source = source._replace(
            peft={**source.peft, "base_model_name_or_path": config.base_id}
        )
    write_adapter(config.out, source)
    return report(console, config.out, source, base)


class _Parameters(msgspec.Struct):
    """The `lora_parameters` of mlx-lm, as far as they are read."""

    rank: int
    scale: float
    dropout: float = 0.0


class _Config(msgspec.Struct):
    """The adapter_config.json of mlx-lm, as far as it is read.

    `num_layers`, the last layers of the model that are adapted, and `keys` follow from
    the names of the tensors.
    """

    lora_parameters: _Parameters
    fine_tune_type: str = "lora"
    model: str | None = None


def read_mlx(path: Path, sizes: Sizes | None = None) -> AdapterFile:
    """Read an adapter of mlx-lm: ΔW = scale (lora_a lora_b)ᵀ, with DoRA's m or not.

    Args:
        path: the directory, with adapter_config.json and adapters.safetensors.
        sizes: inputs and outputs of every linear layer of a model, by full name, for
            an adapter that must fit it.

    Raises:
        InputError: files missing or broken, a fine-tuning that is not low-rank, or
            tensors that are missing, unexpected or wrongly shaped, all named.
    """
    file = path / CONFIG
    if not file.is_file():
        raise InputError(
            f"{path} has no {CONFIG}, which mlx-lm writes beside {MLX_WEIGHTS}: copy "
            "it as well."
        )
    kind = read_json(file).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{file} has fine_tune_type {kind!r}, which is not an adapter: only lora "
            "and dora can be imported. Fuse the model with mlx_lm.fuse instead."
        )
    config = read_json(file, _Config, "write it again with mlx-lm")
    given = config.lora_parameters
    parts = _by_module(path, config, sizes)
    settings = AdapterConfig(
        kind,
        rank=given.rank,
        alpha=given.scale * given.rank,
        dropout=given.dropout,
        targets=list(parts),
    )
    modules = {}
    for full, tensors in parts.items():
        factors = {"a": tensors["lora_a"], "b": tensors["lora_b"].T}
        factors |= {"m": tensors["m"]} if kind == "dora" else {}
        factors = {k: np.ascontiguousarray(x, np.float32) for k, x in factors.items()}
        modules[full] = ModuleFactors(
            factors["a"], factors["b"], given.scale, factors, {}, given.rank,
            given.scale * given.rank,
        )  # fmt: skip
    peft = {"base_model_name_or_path": config.model}
    return AdapterFile(kind, settings, modules, None, peft)


def _by_module(
    path: Path, config: _Config, sizes: Sizes | None
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of every module; all errors are raised at once."""
    ends = ["lora_a", "lora_b"] + ["m"] * (config.fine_tune_type == "dora")
    by_module: dict[str, dict[str, np.ndarray]] = {}
    errors = []
    for key, tensor in load_tensors(path / MLX_WEIGHTS).items():
        match = re.fullmatch(rf"(model\.layers\.\d+\..+)\.({'|'.join(ends)})", key)
        if not match or (sizes is not None and match[1] not in sizes):
            errors.append(f"{key}: unexpected")
        else:
            by_module.setdefault(match[1], {})[match[2]] = tensor
    for full, parts in by_module.items():
        inputs, outputs = sizes[full] if sizes else _own_sizes(parts)
        rank = config.lora_parameters.rank
        shapes = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
        for end in ends:
            if end not in parts:
                errors.append(f"{full}.{end}: missing")
            elif parts[end].shape != shapes[end]:
                errors.append(
                    f"{full}.{end}: found {parts[end].shape}, needed {shapes[end]}"
                )
    if errors or not by_module:
        raise InputError(
            f"The adapter in {path} does not fit {'this model and ' if sizes else ''}"
            f"its {CONFIG}:\n  "
            + "\n  ".join(errors or ["it holds no tensor"])
            + "\nImport an adapter of the linear layers of a LLaMA, with its own files."
        )
    return by_module


def _own_sizes(parts: dict[str, np.ndarray]) -> tuple[int, int]:
    """Inputs and outputs by the tensors themselves; 0 where they are missing."""
    a, b = parts.get("lora_a", np.empty(0)), parts.get("lora_b", np.empty(0))
    return (a.shape or (0,))[0], (b.shape or (0,))[-1]
