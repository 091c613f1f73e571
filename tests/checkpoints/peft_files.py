"""Adapters for the tests of PEFT directories."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.models import Llama
from tests import adapters as tiny

CONFIG, WEIGHTS, EXTRA, FACTORS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifold_lora.json",
    "factors.safetensors",
)
FORMATS = ("portable", "peft")
PLAIN = AdapterConfig("stiefel", rank=2, alpha=5)
# every optional key of adapter_config.json at once
VARIED = AdapterConfig(
    "lora",
    rank=3,
    alpha=5,
    rslora=True,
    dropout=0.25,
    targets=["q_proj", "v_proj", "up_proj", "down_proj"],
    rank_pattern={"down_proj": 2},
    alpha_pattern={"self_attn.*": 7, "up_proj": 2.5},
)


def attached(config: AdapterConfig, seed: int = 0) -> Llama:
    attach(model := tiny.base(), config)
    return tiny.randomize(model, seed)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def pairs(ranks: dict[str, int], layers: tuple[int, ...] = (0, 1, 2)) -> tiny.Matrices:
    """Random A and B of the named projections in some layers."""
    rng, matrices = np.random.default_rng(3), {}
    for name, rank in ranks.items():
        inputs, outputs = tiny.SIZES[name]
        for n in layers:
            a = rng.normal(size=(rank, inputs)) / math.sqrt(inputs)
            b = rng.normal(size=(outputs, rank)) / math.sqrt(4 * rank)
            full = f"model.layers.{n}.{name}"
            matrices[full] = (a.astype(np.float32), b.astype(np.float32))
    return matrices


def write(path: Path, matrices: tiny.Matrices, dtype: Any = np.float32, **config: Any):
    """Write a directory as PEFT does, without our own files."""
    path.mkdir()
    tensors = {
        f"base_model.model.{full}.lora_{side}.weight": x.astype(dtype)
        for full, pair in matrices.items()
        for side, x in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    defaults = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": sorted(matrices),
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "bias": "none",
        "use_dora": False,
        "layer_replication": None,
        "eva_config": None,
        "qalora_group_size": 16,
    }
    (path / CONFIG).write_text(json.dumps(defaults | config))
    return path
