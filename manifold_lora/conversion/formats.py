"""The formats that an adapter can be exported to, one row each.

Every format writes files and reads them back by the formula of its loaders.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    adapter_settings,
    peft_scale,
)
from manifold_lora.checkpoints.adapter_writer import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Exported,
    Format,
    folded,
    kind,
    peft_config,
    write_files,
)
from manifold_lora.checkpoints.atomic import save_tensors
from manifold_lora.checkpoints.peft_config import read_peft_config
from manifold_lora.checkpoints.tensors import load_tensors
from manifold_lora.conversion import gguf_lora
from manifold_lora.conversion.updates import MAGNITUDE, Update, updates
from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError
from manifold_lora.models import LlamaConfig


class Source(NamedTuple):
    """What is exported."""

    adapter: AdapterFile
    peft: dict[str, Any]  # the keys of PEFT's file that do not follow from the modules
    model: LlamaConfig | None  # of the base, where it is known
    license: str | None = None  # of the adapter

    @property
    def dora(self) -> bool:
        """Whether the adapter has DoRA's lengths."""
        return self.adapter.config.options.export == "DoRA"

    def modules(self) -> dict[str, Exported]:
        """What is exported of every module, by full name."""
        config = self.adapter.config
        modules = {}
        for full, u in updates(self.adapter).items():
            own = self.adapter.modules[full]
            tensors = {
                "lora_A.weight": u.a,
                "lora_B.weight": u.b,
            }
            if u.magnitude is not None:
                tensors[MAGNITUDE] = u.magnitude
            times = u.a.shape[0] // own.rank  # 2 with a fixed correction
            alpha = own.alpha * (times**0.5 if config.rslora else times)
            factors = own.factors if self.adapter.own else {}
            modules[full] = Exported(tensors, u.scale, alpha, factors)
        return modules


class ExportFormat(NamedTuple):
    """One format.

    Args:
        write: writes a source into a new directory, or as a new file.
        read: what its loaders compute from that, by full name.
        refuse: why it cannot hold the source; empty if it can.
        is_file: whether it is a single file.
        library: that loads it, by the Hub's name.
    """

    write: Callable[[Path, Source], None]
    read: Callable[[Path, Source], Mapping[str, Update]]
    refuse: Callable[[Source], str] = lambda source: ""
    is_file: bool = False
    library: str = "peft"


def _write_peft(path: Path, source: Source, format: Format) -> None:
    adapter = source.adapter
    settings = None
    if adapter.own:  # it can be trained further
        settings = adapter_settings(adapter.config, adapter.base, adapter.base_dtype)
    write_files(path, source.modules(), source.peft, settings, format)


def read_peft(path: Path) -> dict[str, Update]:
    """What PEFT computes from an adapter directory, by full name."""
    config = read_peft_config(path / CONFIG)
    tensors = load_tensors(path / WEIGHTS)
    return {
        full: Update(
            tensors[key],
            tensors[f"{PREFIX}{full}.lora_B.weight"],
            peft_scale(config, full),
            tensors.get(f"{PREFIX}{full}.{MAGNITUDE}"),
        )
        for key in tensors
        if key.endswith(".lora_A.weight")
        for full in [key.removeprefix(PREFIX).removesuffix(".lora_A.weight")]
    }


def _write_mlx(path: Path, source: Source) -> None:
    """The files of mlx-lm: one rank and scale, and names of modules in a layer."""
    modules = folded(source.modules())
    tensors = {}
    for full, module in modules.items():
        a, b = (module.tensors[f"lora_{x}.weight"] for x in "AB")
        tensors[f"{full}.lora_a"] = a.T
        tensors[f"{full}.lora_b"] = b.T
        if MAGNITUDE in module.tensors:
            tensors[f"{full}.m"] = module.tensors[MAGNITUDE]
    save_tensors(tensors, path / MLX_WEIGHTS)
    content = {
        "fine_tune_type": "dora" if source.dora else "lora",
        "model": source.peft["base_model_name_or_path"],
        "num_layers": _layers(source),
        "lora_parameters": {
            "keys": sorted({kind(full) for full in modules}),
            "rank": next(iter(modules.values())).rank,
            "scale": 1.0,
            "dropout": source.peft["lora_dropout"],
        },
    }
    _write_json(path / CONFIG, content)


def _layers(source: Source) -> int | None:
    """The number of layers of the base, if it is known.

    mlx-lm counts the layers to adapt from the last one.
    """
    if source.model is not None:
        return source.model.num_hidden_layers
    if any("." in name for name in source.peft["target_modules"]):
        return None  # some layers are not adapted: perhaps the last ones
    return 1 + max(int(full.split(".")[2]) for full in source.adapter.modules)


def _refuse_mlx(source: Source) -> str:
    if _layers(source) is None:
        return (
            "not all layers are adapted, and mlx-lm counts them from the last one: "
            "give --model, the base's directory"
        )
    return ""


def _read_mlx(path: Path, source: Source) -> dict[str, Update]:
    del source
    tensors = load_tensors(path / MLX_WEIGHTS)
    scale = read_json(path / CONFIG)["lora_parameters"]["scale"]
    return {
        full: Update(x.T, tensors[f"{full}.lora_b"].T, scale, tensors.get(f"{full}.m"))
        for key, x in tensors.items()
        if key.endswith(".lora_a")
        for full in [key.removesuffix(".lora_a")]
    }


def _write_stella(path: Path, source: Source) -> None:
    """The files of the authors' package for StelLA: U, S and Vᵀ."""
    tensors = {}
    for full, module in source.adapter.modules.items():
        stem, factors = f"{PREFIX}{full}.stella_", module.factors
        tensors[f"{stem}U.weight"] = factors["u"]
        tensors[f"{stem}S.weight"] = factors["s"]
        tensors[f"{stem}Vt.weight"] = factors["v"].T
    save_tensors(tensors, path / WEIGHTS)
    own = {
        "peft_type": "STELLA",
        "stella_diag_s": source.adapter.config.options.diagonal_s,
        "stella_retraction": "polar",
        "stella_grad_scaling": True,
    }
    _write_json(path / CONFIG, peft_config(source.modules(), source.peft) | own)


def _refuse_stella(source: Source) -> str:
    method = source.adapter.method
    if method == "stella":
        return ""
    return (
        f"it holds U S Vᵀ with orthonormal U and V, and this is {method}: run "
        "`manifold-lora convert ADAPTER --to stella` first"
    )


def _read_stella(path: Path, source: Source) -> dict[str, Update]:
    del source
    config = read_peft_config(path / CONFIG)
    tensors = load_tensors(path / WEIGHTS)
    result = {}
    for key, u in tensors.items():
        if key.endswith(".stella_U.weight"):
            stem = key.removesuffix("U.weight")
            s = tensors[f"{stem}S.weight"].astype(np.float64)
            full = key.removeprefix(PREFIX).removesuffix(".stella_U.weight")
            b = u.astype(np.float64) @ (np.diag(s) if s.ndim == 1 else s)
            a = tensors[f"{stem}Vt.weight"]
            result[full] = Update(a, b, peft_scale(config, full))
    return result


def _write_gguf(path: Path, source: Source) -> None:
    assert source.model is not None  # _refuse_gguf
    base_id = source.peft["base_model_name_or_path"]
    modules = folded(source.modules())
    gguf_lora.write(path, modules, source.model, base_id, source.license)


def _refuse_gguf(source: Source) -> str:
    if source.dora:
        return "llama.cpp has no DoRA"
    if source.model is None:
        return (
            "llama.cpp orders the rows of q_proj and k_proj by heads: give --model, "
            "the base's directory, of which config.json is enough"
        )
    return ""


def _read_gguf(path: Path, source: Source) -> dict[str, Update]:
    assert source.model is not None  # _refuse_gguf
    pairs, alpha = gguf_lora.read(path, source.model)
    return {full: Update(a, b, alpha / len(a)) for full, (a, b) in pairs.items()}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


MLX_WEIGHTS = "adapters.safetensors"
FORMATS: dict[str, ExportFormat] = {
    "portable": ExportFormat(
        lambda path, source: _write_peft(path, source, "portable"),
        lambda path, source: read_peft(path),
    ),
    "peft": ExportFormat(
        lambda path, source: _write_peft(path, source, "peft"),
        lambda path, source: read_peft(path),
    ),
    "mlx": ExportFormat(_write_mlx, _read_mlx, _refuse_mlx, library="mlx"),
    "stella": ExportFormat(
        _write_stella, _read_stella, _refuse_stella, library="stella"
    ),
    "gguf-lora": ExportFormat(_write_gguf, _read_gguf, _refuse_gguf, is_file=True),
}


def check_holds(format: str, source: Source) -> None:
    """Raise `InputError` if a format cannot hold the source, naming those that can."""
    if reason := FORMATS[format].refuse(source):
        able = [name for name, other in FORMATS.items() if not other.refuse(source)]
        raise InputError(
            f"--format {format} cannot hold this adapter: {reason}; or choose "
            f"{', '.join(able)}, which can."
        )
