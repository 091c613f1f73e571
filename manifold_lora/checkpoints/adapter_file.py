"""Read adapter directories, our own, PEFT's and StelLA's, without a model.

A directory of `adapter_config.json` and `adapter_model.safetensors`, in PEFT's format.
What only this library needs is beside it: the settings in `manifold_lora.json`, and
in `factors.safetensors` the factors of methods that have others than A and B.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from manifold_lora.adapters.config import (
    AdapterConfig,
    lookup,
)
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.options import adapter_class, fields_by_option
from manifold_lora.checkpoints.adapter_writer import (
    CONFIG,
    EXTRA,
    FACTORS,
    PREFIX,
    WEIGHTS,
    Format,
    unfolded,
)
from manifold_lora.checkpoints.agreement import check_same
from manifold_lora.checkpoints.peft_config import is_adapted, read_peft_config
from manifold_lora.checkpoints.tensors import load_tensors
from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError, nearest
from manifold_lora.manifolds import Manifold
from manifold_lora.models.quantised import BaseDtype

_PICKLES = (".bin", ".pt", ".pth")
Tensors = Mapping[str, np.ndarray]
Sizes = Mapping[str, tuple[int, int]]
_LORA = {"lora_A.weight": ("r", "in"), "lora_B.weight": ("out", "r")}
_MAGNITUDE = {"lora_magnitude_vector": ("out",)}
_STELLA = {
    "stella_U.weight": ("out", "r"),
    "stella_S.weight": ("r", "r"),
    "stella_Vt.weight": ("r", "in"),
}


# What manifold_lora.json holds beside the settings of the adapter.
_NO_SETTINGS = {"base", "base_dtype", "format"}


class ModuleFactors(NamedTuple):
    """The adapter of one linear layer."""

    a: np.ndarray  # (in, k) float32
    b: np.ndarray  # (out, k) float32: ΔW = scale · b aᵀ (of DoRA, what it normalises)
    scale: float
    factors: dict[str, np.ndarray]  # the arrays of the method, by name
    manifolds: dict[str, Manifold]  # of each trained factor alone
    rank: int
    alpha: float


class AdapterFile(NamedTuple):
    """What an adapter directory holds."""

    method: str  # "lora", "dora" or "stella" where the directory is not our own
    config: AdapterConfig
    modules: dict[str, ModuleFactors]  # by full name
    base: str | None  # fingerprint of the base, in our own
    peft: Mapping[str, Any] = {}  # adapter_config.json
    base_dtype: BaseDtype | None = None  # what the base was quantised to in training
    own: bool = False  # read from a directory of this library, with manifold_lora.json


def adapter_directory(path: Path) -> Path:
    """The directory of an adapter, given that or the run that wrote it.

    Raises:
        InputError: there is no such directory.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: pass the directory of an adapter or a run.")
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_adapter(path: Any, sizes: Sizes | None = None) -> AdapterFile:
    """Read the directory of an adapter of this library, of PEFT's LoRA or of StelLA.

    Args:
        path: the directory.
        sizes: inputs and outputs of every linear layer of a model, by full name, for
            an adapter that must fit it.

    Raises:
        InputError: files missing or broken, another kind of adapter, tensors that are
            missing, unexpected or wrongly shaped, all named.
    """
    path = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise InputError(f"{path} has no {file}. {_remedy(path)}")
    config = read_peft_config(path / CONFIG)
    tensors = load_tensors(path / WEIGHTS)
    needed = _needed(config, tensors)
    by_module = _by_module(path, config, tensors, needed, sizes)
    extra = read_json(path / EXTRA) if (path / EXTRA).is_file() else {}
    if not isinstance(extra.get("base", ""), str):
        raise InputError(f"{path / EXTRA}: base must be text, got {extra['base']!r}.")
    if extra.get("base_dtype") not in (None, *typing.get_args(BaseDtype)):
        raise InputError(
            f"{path / EXTRA}: base_dtype must be int8 or nf4, got "
            f"{extra['base_dtype']!r}."
        )
    format = extra.get("format", "peft")  # which earlier files do not name
    if format not in typing.get_args(Format):
        raise InputError(
            f"{path / EXTRA}: format must be portable or peft, got {format!r}."
        )
    folded = format == "portable"
    settings = _settings(path, config, tensors, sorted(by_module), extra)
    declared = adapter_class(settings.method).factors(settings)
    stored = load_tensors(path / FACTORS) if (path / FACTORS).is_file() else {}
    modules = {
        full: _module(settings, declared, config, full, parts, stored, folded)
        for full, parts in by_module.items()
    }
    if extra or stored:
        scales = {full: peft_scale(config, full) for full in modules}
        check_same(path, settings, declared, modules, by_module, scales, folded)
    base, base_dtype = extra.get("base"), extra.get("base_dtype")
    return AdapterFile(
        settings.method, settings, modules, base, config, base_dtype, own=bool(extra)
    )


def _remedy(path: Path) -> str:
    """What to do about a directory that lacks a file."""
    if (path / "adapters.safetensors").is_file():
        return "It is an adapter of mlx-lm: use `manifold-lora import`."
    if pickles := [p.name for p in sorted(path.glob("*")) if p.suffix in _PICKLES]:
        return (
            f"{pickles[0]} is a pickle, which can run any program when it is loaded, "
            "and is not read: load the adapter with PEFT where you trust it, and save "
            "it again with save_pretrained, which writes safetensors."
        )
    return "Give the directory of a PEFT LoRA adapter, such as the adapter/ of a run."


def _needed(config: Mapping[str, Any], tensors: Tensors) -> dict[str, tuple]:
    """The tensors of a module by the ends of their names, with their axes."""
    if config["peft_type"] == "STELLA":
        dense = all(x.ndim == 2 for k, x in tensors.items() if "stella_S" in k)
        return _STELLA if dense else _STELLA | {"stella_S.weight": ("r",)}
    return _LORA | _MAGNITUDE if config.get("use_dora") else _LORA


def _by_module(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    needed: Mapping[str, tuple],
    sizes: Sizes | None,
) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of every module; all errors are raised at once."""
    ends = "|".join(map(re.escape, needed))
    by_module: dict[str, dict[str, np.ndarray]] = {}
    errors = []
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({ends})", key)
        if not match or (sizes is not None and match[1] not in sizes):
            errors.append(f"{key}: unexpected")
        else:
            by_module.setdefault(match[1], {})[match[2]] = tensor
    for full, parts in by_module.items():
        axes = {"r": _setting(config, full)[0]}
        if sizes is not None:
            axes |= dict(zip(("in", "out"), sizes[full], strict=True))
        for end, names in needed.items():
            key = f"{PREFIX}{full}.{end}"
            if end not in parts:
                errors.append(f"{key}: missing")
                continue
            got = parts[end].shape
            if sizes is None and len(got) == len(names):
                for name, size in zip(names, got, strict=True):
                    axes.setdefault(name, size)
            shape = tuple(axes.get(name, 0) for name in names)
            if got != shape:
                errors.append(f"{key}: found {got}, needed {shape}")
    if by_module:
        errors += _other_modules(config, by_module, sizes or {})
    if errors or not by_module:
        raise InputError(
            f"The adapter in {path} does not fit {'this model and ' if sizes else ''}"
            f"its {CONFIG}:\n  "
            + "\n  ".join(errors or ["it holds no tensor"])
            + "\nLoad it into the base it was trained on."
        )
    return by_module


def _other_modules(
    config: Mapping[str, Any], by_module: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    """Modules of a model that are targets without a tensor, or the reverse."""
    if config["target_modules"] is None:
        return []
    absent = [
        f"{name}: missing, though target_modules names it"
        for name in names
        if name not in by_module and is_adapted(config, name)
    ]
    return absent + [
        f"{name}: unexpected, as {CONFIG} does not name it"
        for name in by_module
        if not is_adapted(config, name)
    ]


def _setting(config: Mapping[str, Any], full: str) -> tuple[int, float]:
    """Rank and alpha of the module of that full name, by PEFT's file."""
    rank = lookup(config["rank_pattern"], full, config["r"])
    return rank, lookup(config["alpha_pattern"], full, config["lora_alpha"])


def peft_scale(config: Mapping[str, Any], full: str) -> float:
    """The s of the module of that full name, by PEFT's file."""
    rank, alpha = _setting(config, full)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_settings(
    config: AdapterConfig, base: str | None, base_dtype: BaseDtype | None
) -> dict[str, Any]:
    """The settings of an adapter and its base as `manifold_lora.json` holds them."""
    settings = {"method": config.method} | dataclasses.asdict(config)
    del settings["options"]
    known = {"base": base, "base_dtype": base_dtype}
    known = {name: value for name, value in known.items() if value is not None}
    return settings | config.options.values("adapter") | known


def _settings(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    targets: list[str],
    extra: Mapping[str, Any],
) -> AdapterConfig:
    """The adapter's own settings, or those that PEFT's file amounts to."""
    # The initialisation was called "start" in earlier files.
    extra = {"init" if key == "start" else key: x for key, x in extra.items()}
    shared = {field.name for field in dataclasses.fields(AdapterConfig)} - {"options"}
    names = shared | fields_by_option().keys()
    if unknown := sorted(extra.keys() - names - _NO_SETTINGS):
        raise InputError(
            f"{path / EXTRA}: unknown key {unknown[0]!r}. {nearest(unknown[0], names)} "
            "It may be of a newer version."
        )
    stella = config["peft_type"] == "STELLA"
    given: dict[str, Any] = {
        "method": "stella" if stella else "dora" if config.get("use_dora") else "lora",
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "rslora": bool(config.get("use_rslora")),
        "dropout": config["lora_dropout"],
        "targets": targets,
        "rank_pattern": config["rank_pattern"],
        "alpha_pattern": config["alpha_pattern"],
    }
    options: dict[str, Any] = {}
    if stella:
        diagonal = any(x.ndim == 1 for k, x in tensors.items() if "stella_S" in k)
        options["diagonal_s"] = diagonal
    given |= {
        key: value
        for key, value in extra.items()
        if key in shared and value is not None
    }
    # Earlier files name the options of all methods, unset where they do not apply.
    options |= {
        key: value
        for key, value in extra.items()
        if key not in shared | _NO_SETTINGS and value is not None and value is not False
    }
    try:
        return AdapterConfig(**given, options=options)
    except (InputError, TypeError) as error:
        raise InputError(f"{path / (EXTRA if extra else CONFIG)}: {error}") from error


def _module(
    settings: AdapterConfig,
    declared: Mapping[str, Factor],
    config: Mapping[str, Any],
    full: str,
    parts: Mapping[str, np.ndarray],
    stored: Tensors,
    folded: bool,
) -> ModuleFactors:
    rank = lookup(settings.rank_pattern, full, settings.rank)
    alpha = lookup(settings.alpha_pattern, full, settings.alpha or 0.0)
    scale = settings.scale(rank, alpha) if folded else peft_scale(config, full)
    wide = {end: np.asarray(x, np.float32) for end, x in parts.items()}
    if config["peft_type"] == "STELLA":
        u, s, vt = (wide[end] for end in _STELLA)
        a, b = vt.T, u * s if s.ndim == 1 else u @ s
        factors = {"u": u, "s": s, "v": vt.T}
    else:
        a, b = wide["lora_A.weight"].T, wide["lora_B.weight"]
        if folded:
            width = _width(settings, declared, rank, len(a), len(b))
            a, b = unfolded(wide, width, scale)
        own = f"{full}."
        factors = {
            key.removeprefix(own): x for key, x in stored.items() if key.startswith(own)
        }
        if not factors:
            factors = {"a": a, "b": b} | {
                name: wide[factor.peft]
                for name, factor in declared.items()
                if factor.peft in wide
            }
    return ModuleFactors(
        a=a,
        b=b,
        scale=scale,
        factors=factors,
        manifolds={k: f.manifold for k, f in declared.items() if f.trained},
        rank=rank,
        alpha=alpha,
    )


def _width(
    settings: AdapterConfig,
    declared: Mapping[str, Factor],
    rank: int,
    inputs: int,
    outputs: int,
) -> int:
    """The columns of A and B of a module: its rank, or twice that with a correction."""
    sizes = {"in": inputs, "out": outputs, "rank": rank}
    shapes = {
        name: jax.ShapeDtypeStruct(factor.shape(sizes), jnp.float32)
        for name, factor in declared.items()
    }
    a, _ = jax.eval_shape(adapter_class(settings.method).product, shapes)
    return a.shape[1]
