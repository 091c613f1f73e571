"""Write adapter directories: PEFT's files, portable or literal, and our own beside.

`portable`: the scale s is multiplied into B, and every module has the largest rank,
padded with zeros, with `lora_alpha = r`. The scale that a loader computes is then 1,
whether or not it knows rsLoRA and patterns. `peft`: rank and alpha as they are, with
`use_rslora`, `rank_pattern` and `alpha_pattern` where they are used.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from manifold_lora.checkpoints.atomic import save_tensors

Format = Literal["portable", "peft"]
CONFIG, WEIGHTS, EXTRA, FACTORS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifold_lora.json",
    "factors.safetensors",
)
PREFIX = "base_model.model."  # of PEFT's names
_A, _B = "lora_A.weight", "lora_B.weight"


class Exported(NamedTuple):
    """What is exported of one linear layer: ΔW = scale · lora_B lora_A."""

    tensors: dict[str, np.ndarray]  # by the ends of PEFT's names
    scale: float
    alpha: float  # that gives the scale with the rank of the tensors
    factors: dict[str, np.ndarray]  # of the method, by name; none of another tool's

    @property
    def rank(self) -> int:
        """The number of columns of lora_B."""
        return self.tensors[_A].shape[0]


def folded(modules: Mapping[str, Exported]) -> dict[str, Exported]:
    """The same updates with a scale of 1, all at the largest rank."""
    rank = max(module.rank for module in modules.values())
    result = {}
    for full, module in modules.items():
        missing = rank - module.rank
        with np.errstate(over="ignore"):  # the infinity is refused where it is read
            b = (module.scale * module.tensors[_B].astype(np.float64)).astype("f4")
        pair = {
            _A: np.pad(module.tensors[_A], ((0, missing), (0, 0))),
            _B: np.pad(b, ((0, 0), (0, missing))),
        }
        result[full] = Exported(module.tensors | pair, 1.0, rank, module.factors)
    return result


def unfolded(tensors: Mapping[str, np.ndarray], width: int, scale: float) -> Any:
    """The tall A and B of which `folded` made these tensors, up to one rounding.

    Exact where the scale is a power of two.
    """
    b = tensors[_B][:, :width].astype(np.float64) / scale
    return tensors[_A][:width].T, b.astype(np.float32)


def write_files(
    directory: Path,
    modules: Mapping[str, Exported],
    config: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    format: Format,
) -> None:
    """Write the files of an adapter and compare what is read back.

    Args:
        directory: where they are written.
        modules: by full name, as they were trained.
        config: of PEFT, but for what follows from the modules: see `peft_config`.
        settings: of manifold_lora.json; None for an adapter of another tool.
        format: of PEFT's files.

    Raises:
        OSError: the files cannot be written, or differ as they are read back.
    """
    written = folded(modules) if format == "portable" else modules
    if format == "portable":
        config = {**config, "use_rslora": False}
    texts: dict[str, Any] = {CONFIG: peft_config(written, config)}
    if settings is not None:
        texts[EXTRA] = {**settings, "format": format}
    for file, content in texts.items():
        text = json.dumps(content, indent=2) + "\n"
        (directory / file).write_text(text, encoding="utf-8")
    tensors = {
        f"{PREFIX}{full}.{end}": x
        for full, module in written.items()
        for end, x in module.tensors.items()
    }
    factors = {
        f"{full}.{name}": x
        for full, module in modules.items()
        if settings is not None and not _recoverable(module, written[full])
        for name, x in module.factors.items()
    }
    for file, content in ((WEIGHTS, tensors), (FACTORS, factors)):
        if content:
            save_tensors(content, directory / file)
            _check_written(content, directory / file)


def _recoverable(module: Exported, written: Exported) -> bool:
    """Whether the factors follow from PEFT's tensors bit for bit."""
    if module.factors.keys() != {"a", "b"}:
        return False
    scale = module.scale if written is not module else 1.0
    pair = unfolded(written.tensors, module.rank, scale)
    return all(
        x.tobytes() == module.factors[name].tobytes()
        for name, x in zip("ab", map(np.ascontiguousarray, pair), strict=True)
    )


def _check_written(tensors: dict[str, np.ndarray], file: Path) -> None:
    written = load_file(file)
    if not all(tensors[key].tobytes() == written[key].tobytes() for key in tensors):
        raise OSError(f"{file.name} read back differs from what was written")


def peft_config(
    modules: Mapping[str, Exported], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Only keys that every PEFT since 0.7 accepts, the rest only where they are used.

    Args:
        modules: by full name; rank, alpha and patterns follow from them.
        given: `target_modules`, `base_model_name_or_path`, `lora_dropout`, `use_dora`
            and `use_rslora`.
    """
    names = _pattern_names(modules, given["target_modules"])
    rank, alpha = (
        Counter(column).most_common(1)[0][0]
        for column in zip(*((m.rank, m.alpha) for m in modules.values()), strict=True)
    )
    optional = {
        "use_dora": given["use_dora"],
        "use_rslora": given["use_rslora"],
        "rank_pattern": {
            names[f]: m.rank for f, m in modules.items() if m.rank != rank
        },
        "alpha_pattern": {
            names[f]: m.alpha for f, m in modules.items() if m.alpha != alpha
        },
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": given["base_model_name_or_path"],
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": given["lora_dropout"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(given["target_modules"]),
    } | {key: value for key, value in optional.items() if value}


def kind(full: str) -> str:
    """The name of a module in its layer: self_attn.q_proj."""
    return re.sub(r"^model\.layers\.\d+\.", "", full)


def _pattern_names(
    modules: Mapping[str, Exported], targets: Collection[str]
) -> dict[str, str]:
    """By full name, the key of a pattern: one for all layers, where they are alike."""
    settings: dict[str, set[tuple[int, float]]] = {}
    for full, module in modules.items():
        settings.setdefault(kind(full), set()).add((module.rank, module.alpha))
    return {
        full: kind(full)
        if len(settings[kind(full)]) == 1 and full.rpartition(".")[2] in targets
        else full
        for full in modules
    }
