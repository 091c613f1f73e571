"""Adapters in PEFT's format: what Hugging Face, vLLM and llama.cpp read.

A directory of `adapter_config.json` and `adapter_model.safetensors`. Only keys that
every PEFT since 0.7 accepts are written, the rest only where they are used; what
this library alone needs stands beside it in `manifold_lora.json`.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from manifold_lora.adapters.attach import (
    METHODS,
    adapters,
    attach,
    check_bare,
    full_names,
    projections,
)
from manifold_lora.adapters.config import AdapterConfig, lookup
from manifold_lora.checkpoints.atomic import save_tensors, whole_directory
from manifold_lora.checkpoints.huggingface import read_json
from manifold_lora.errors import InputError, nearest
from manifold_lora.models import Llama

CONFIG, WEIGHTS, EXTRA = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifold_lora.json",
)
# Settings of PEFT's LoRA that change the model, with the value that does not.
_PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
}
# Starts that took B A out of the base: such an adapter belongs to another base.
_CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def save_adapter(
    model: Llama, path: str | os.PathLike[str], *, base_id: str | None = None
) -> None:
    """Write the model's adapter as a PEFT LoRA directory, replacing an older one.

    ΔW = s B Aᵀ becomes lora_A = Aᵀ (r, in) and lora_B = B (out, r) in float32 with
    the same alpha and rank, so that `load_adapter` gives back the very same factors.
    The directory appears complete or not at all, and is read back and compared
    before it takes the place of an older one.

    Args:
        model: a model with adapters.
        path: the directory to write.
        base_id: name or path of the base model, for `base_model_name_or_path`.

    Raises:
        InputError: the model has no adapters, or `path` holds other files, which
            would be deleted.
        OSError: the files cannot be written; an older adapter is then untouched.
    """
    modules = adapters(model)
    if not modules:
        raise InputError("The model has no adapter to save: attach one first.")
    _check_replaceable(Path(path))
    tensors: dict[str, np.ndarray] = {}
    for name, module in modules.items():
        a, b = np.asarray(module.a[...]), np.asarray(module.b[...])
        for layer, full in enumerate(full_names(model, name)):
            a_key, b_key = _keys(full)
            tensors[a_key] = np.ascontiguousarray(a[layer].T)
            tensors[b_key] = np.ascontiguousarray(b[layer])
    method = next(
        k for k, v in METHODS.items() if v is type(next(iter(modules.values())))
    )
    with whole_directory(path) as partial:
        config = _peft_config(modules, base_id)
        for file, content in ((CONFIG, config), (EXTRA, {"method": method})):
            text = json.dumps(content, indent=2) + "\n"
            (partial / file).write_text(text, encoding="utf-8")
        save_tensors(tensors, partial / WEIGHTS)
        written = load_file(partial / WEIGHTS)
        if not all(tensors[key].tobytes() == written[key].tobytes() for key in tensors):
            raise OSError(
                f"{path}: the adapter read back differs from what was written"
            )


def _check_replaceable(path: Path) -> None:
    """Only an adapter may be replaced, whose directory holds these files alone."""
    if path.exists():
        there = {path.name} if path.is_file() else set(os.listdir(path))
        if others := there - {CONFIG, WEIGHTS, EXTRA, "README.md"}:
            raise InputError(
                f"{path} exists and is no adapter (it holds {', '.join(sorted(others))}"
                "): choose another directory."
            )


def _keys(full: str) -> tuple[str, str]:
    """PEFT's names of the two factors of a module."""
    stem = f"base_model.model.{full}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _peft_config(modules: dict[str, Any], base_id: str | None) -> dict[str, Any]:
    rank, alpha = (
        Counter(getattr(m, field) for m in modules.values()).most_common(1)[0][0]
        for field in ("rank", "alpha")
    )
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(name.rpartition(".")[2] for name in modules),
    }
    optional = {
        "use_rslora": first.rslora,
        "rank_pattern": {n: m.rank for n, m in modules.items() if m.rank != rank},
        "alpha_pattern": {n: m.alpha for n, m in modules.items() if m.alpha != alpha},
    }
    return config | {key: value for key, value in optional.items() if value}


def load_adapter(model: Llama, path: str | os.PathLike[str]) -> None:
    """Attach the adapter of a PEFT LoRA directory to a model without one, in place.

    Reads what `save_adapter` or PEFT wrote: rsLoRA, rank and alpha patterns. Where
    PEFT's adapter differs between layers, it becomes plain LoRA of the largest rank,
    filled up with zeros, its scale folded into B: the same function.

    Raises:
        InputError: the model has adapters already, files missing or broken, another
            kind of adapter, tensors that are missing, unexpected or wrongly shaped
            for this model (all named).
    """
    path = Path(path)
    check_bare(model)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise InputError(
                f"{path} has no {file}. Give the directory of a PEFT LoRA adapter, "
                "such as the adapter/ of a run."
            )
    config = read_json(path / CONFIG)
    _check_config(path, config)
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path / WEIGHTS} is truncated or no safetensors file ({error}): copy or "
            "export it again."
        ) from error
    kinds = _kinds(path, model, config, tensors)
    extra = read_json(path / EXTRA) if (path / EXTRA).is_file() else {}
    method = extra.get("method", "lora")
    if method not in METHODS:
        raise InputError(
            f"{path / EXTRA}: unknown method {method!r}. {nearest(method, METHODS)}"
        )
    stacks = {name: _stack(model, name, config, tensors) for name in kinds}
    folded = not all(stack.uniform for stack in stacks.values())
    attach(
        model,
        AdapterConfig(
            method="lora" if folded else method,
            rslora=bool(config.get("use_rslora")) and not folded,
            dropout=config["lora_dropout"],
            targets=kinds,
            rank_pattern={name: s.a.shape[-1] for name, s in stacks.items()},
            alpha_pattern={
                name: s.a.shape[-1] if folded else s.alpha for name, s in stacks.items()
            },
        ),
    )
    for name, module in adapters(model).items():
        stack = stacks[name]
        module.a.set_value(jnp.asarray(stack.a))
        module.b.set_value(jnp.asarray(stack.b * stack.scale if folded else stack.b))


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{path / CONFIG} is of peft_type {config.get('peft_type')!r}; only LORA "
            "can be read."
        )
    used = [
        f"{key}={config[key]!r}"
        for key, plain in _PLAIN.items()
        if config.get(key) not in (plain, None, False, [])
    ]
    start = config.get("init_lora_weights")
    if str(start).lower().startswith(_CHANGED_BASE):
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise InputError(
            f"{path / CONFIG} uses {', '.join(used)}, which cannot be read: merge that "
            "adapter into its base with PEFT first."
        )
    config.setdefault("lora_dropout", 0.0)
    bad = [
        f"{key} (got {config.get(key)!r})"
        for key in ("r", "lora_alpha", "lora_dropout")
        if type(config.get(key)) not in (int, float)
    ]
    if bad:
        raise InputError(f"{path / CONFIG} must have a number for {', '.join(bad)}.")


def _setting(config: dict[str, Any], full: str) -> tuple[int, float]:
    """Rank and alpha of the module of that full name."""
    rank = lookup(config.get("rank_pattern") or {}, full, config["r"])
    return rank, lookup(config.get("alpha_pattern") or {}, full, config["lora_alpha"])


def _kinds(
    path: Path, model: Llama, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> list[str]:
    """The projections that the file adapts; every bad tensor is named at once."""
    known = {}
    for name, parent, attribute in projections(model):
        linear = getattr(parent, attribute)
        for full in full_names(model, name):
            rank, _ = _setting(config, full)
            a, b = _keys(full)
            known[a] = (name, b, (rank, linear.in_features))
            known[b] = (name, a, (linear.out_features, rank))
    bad, kinds = [], set()
    for key, tensor in tensors.items():
        if key not in known:
            bad.append(f"{key}: unexpected")
            continue
        name, partner, shape = known[key]
        kinds.add(name)
        if tensor.shape != shape:
            bad.append(f"{key}: found {tensor.shape}, needed {shape}")
        if partner not in tensors:
            bad.append(f"{partner}: missing")
    if bad or not kinds:
        raise InputError(
            f"The adapter in {path} does not fit this model and its {CONFIG}:\n  "
            + "\n  ".join(bad or ["it holds no tensor"])
            + "\nLoad it into the base it was trained on."
        )
    return sorted(kinds)


class _Stack(NamedTuple):
    """One projection's factors, tall and stacked over layers."""

    a: np.ndarray  # (layers, in, r) float32
    b: np.ndarray  # (layers, out, r) float32
    scale: np.ndarray  # (layers, 1, 1) float32, 0 where the file skips a layer
    alpha: float  # of the first layer
    uniform: bool  # all layers have the same rank and alpha


def _stack(
    model: Llama, name: str, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> _Stack:
    names = full_names(model, name)
    settings = [_setting(config, full) for full in names]
    present = [_keys(full)[0] in tensors for full in names]
    widest = max(
        rank for (rank, _), here in zip(settings, present, strict=True) if here
    )
    sides = []
    for side in (0, 1):
        keys = [_keys(full)[side] for full in names]
        matrices = [tensors[k] if k in tensors else None for k in keys]
        rows = next(m.shape[1 - side] for m in matrices if m is not None)
        stacked = np.zeros((len(names), rows, widest), np.float32)
        for layer, matrix in enumerate(matrices):
            if matrix is not None:
                tall = matrix if side else matrix.T
                stacked[layer, :, : tall.shape[1]] = tall
        sides.append(stacked)
    rslora = bool(config.get("use_rslora"))
    scale = [
        here * alpha / (math.sqrt(rank) if rslora else rank)
        for (rank, alpha), here in zip(settings, present, strict=True)
    ]
    return _Stack(
        *sides,
        scale=np.asarray(scale, np.float32)[:, None, None],
        alpha=settings[0][1],
        uniform=all(present) and len(set(settings)) == 1,
    )
