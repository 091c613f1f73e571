"""Reading the directories of StelLA's own package: its keys and shapes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters import adapters
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Stiefel
from tests import adapters as tiny
from tests.adapters import formulas
from tests.checkpoints.peft_files import CONFIG, WEIGHTS, read, same
from tests.tolerances import FLOAT32, LOGITS

Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
STEM = "base_model.model"


def factors(ranks: dict[str, int], diagonal: bool) -> dict[str, dict[str, np.ndarray]]:
    """Random S and orthonormal U and V, for the given layers and their ranks."""
    rng, arrays = np.random.default_rng(4), {}
    for full, rank in ranks.items():
        inputs, outputs = tiny.SIZES[full.split(".", 3)[3]]
        u, v = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in (outputs, inputs))
        s = rng.normal(size=rank if diagonal else (rank, rank))
        arrays[full] = {k: x.astype("f4") for k, x in {"u": u, "s": s, "v": v}.items()}
    return arrays


def write(path: Path, arrays: dict[str, dict[str, np.ndarray]], **config: Any) -> Path:
    path.mkdir()
    tensors = {}
    for full, x in arrays.items():
        tensors[f"{STEM}.{full}.stella_U.weight"] = x["u"]  # (out, r)
        tensors[f"{STEM}.{full}.stella_S.weight"] = x["s"]  # (r, r) or (r,)
        tensors[f"{STEM}.{full}.stella_Vt.weight"] = np.ascontiguousarray(x["v"].T)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    defaults = {
        "peft_type": "STELLA",
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.05,
        "target_modules": sorted(arrays),
        "stella_diag_s": any(x["s"].ndim == 1 for x in arrays.values()),
        "stella_retraction": "polar",
        "stella_grad_scaling": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    (path / CONFIG).write_text(json.dumps(defaults | config))
    return path


def everywhere(rank: int) -> dict[str, int]:
    return {f"model.layers.{n}.{name}": rank for n in range(3) for name in (Q, DOWN)}


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])
def test_a_stella_directory_is_the_same_function(
    diagonal: bool, rslora: bool, tmp_path: Path
):
    arrays = factors(everywhere(2), diagonal)
    path = write(tmp_path / "a", arrays, use_rslora=rslora)
    load_adapter(model := tiny.base(), path)
    for module in adapters(model).values():
        given = module.config
        assert (given.method, given.options.diagonal_s) == ("stella", diagonal)
        assert (given.dropout, given.rslora) == (0.05, rslora)
    q = ml.manifold_tree(model)["layers"]["self_attn"]["q_proj"]
    assert q == {"u": Stiefel(), "s": Euclidean(), "v": Stiefel()}
    for full, x in tiny.arrays(model).items():
        for name, part in x.items():
            np.testing.assert_array_equal(part, arrays[full][name])
    scale = 3 / (math.sqrt(2) if rslora else 2)
    wide = {f: {k: a.astype("f8") for k, a in x.items()} for f, x in arrays.items()}
    needed = formulas.weights("stella", wide, scale)
    assert tiny.error(tiny.logits(model), tiny.needed_logits(needed)) < LOGITS
    # saved again, it is plain LoRA to PEFT and the same adapter here
    save_adapter(model, tmp_path / "b")
    assert read(tmp_path / "b" / CONFIG)["peft_type"] == "LORA"
    load_adapter(again := tiny.base(), tmp_path / "b")
    same(ml.factors(again), ml.factors(model))
    assert adapters(again)[Q].config.method == "stella"


def test_layers_of_different_ranks(tmp_path: Path):
    ranks = {f"model.layers.0.{Q}": 4, f"model.layers.2.{Q}": 2}
    arrays = factors(ranks, diagonal=True)
    pattern = {"rank_pattern": {r"layers\.0\..*": 4}, "alpha_pattern": {"q_proj": 6}}
    load_adapter(model := tiny.base(), write(tmp_path / "a", arrays, **pattern))
    module = adapters(model)[Q]
    assert module.ranks == (4, 0, 2)
    updates = np.asarray(module.weight())
    for layer, rank in enumerate((4, 0, 2)):
        needed = np.zeros((32, 32))
        if rank:
            x = arrays[f"model.layers.{layer}.{Q}"]
            needed = 6 / rank * x["u"] * x["s"] @ x["v"].T
        assert tiny.error(updates[layer].T, needed) < FLOAT32


def test_mismatches_are_named(tmp_path: Path):
    path = write(tmp_path / "a", factors(everywhere(2), diagonal=False))
    tensors = load_file(path / WEIGHTS)
    stem = f"{STEM}.model.layers"
    del tensors[f"{stem}.1.{Q}.stella_S.weight"]
    tensors[f"{stem}.0.{Q}.stella_U.weight"] = np.zeros((16, 2), "f4")
    tensors[f"{stem}.2.{Q}.lora_A.weight"] = np.zeros((2, 32), "f4")
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(InputError) as caught:
        load_adapter(tiny.base(), path)
    for words in (
        f"{stem}.1.{Q}.stella_S.weight: missing",
        f"{stem}.0.{Q}.stella_U.weight: found (16, 2), needed (32, 2)",
        f"{stem}.2.{Q}.lora_A.weight: unexpected",
    ):
        assert words in str(caught.value)


def test_dense_and_diagonal_do_not_mix(tmp_path: Path):
    arrays = factors(everywhere(2), diagonal=False)
    arrays[f"model.layers.0.{Q}"]["s"] = np.ones(2, "f4")
    with pytest.raises(InputError, match=r"stella_S.weight: found \(2, 2\), needed"):
        load_adapter(tiny.base(), write(tmp_path / "a", arrays))
