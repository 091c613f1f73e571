"""Reading LoRA directories written by PEFT: each one is W + s B A."""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.adapters import adapters
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from tests import adapters as tiny
from tests.checkpoints.peft_files import pairs, same, write
from tests.tolerances import LOGITS


def test_without_our_own_file_it_is_lora(tmp_path: Path):
    matrices = pairs({"self_attn.q_proj": 2, "mlp.up_proj": 2})
    path = write(tmp_path / "a", matrices, lora_dropout=0.5, use_rslora=True)
    load_adapter(model := tiny.base(), path)
    assert {type(m) for m in adapters(model).values()} == {LoRALinear}
    assert {m.config.dropout for m in adapters(model).values()} == {0.5}
    got = tiny.matrices(model)
    assert got.keys() == matrices.keys()
    for full, (a, b) in matrices.items():
        np.testing.assert_array_equal(got[full][0], a)
        np.testing.assert_array_equal(got[full][1], b)
    needed = tiny.needed_logits(tiny.updated(matrices, 3 / math.sqrt(2)))
    assert tiny.error(tiny.logits(model), needed) < LOGITS


RANKS = {"self_attn.q_proj": 2, "self_attn.v_proj": 2, "mlp.down_proj": 2}


def wider(matrices: tiny.Matrices, rank: int, *fulls: str) -> tiny.Matrices:
    """The same matrices with another rank in some modules."""
    other = pairs({name: rank for name in RANKS})
    return matrices | {full: other[full] for full in fulls}


DOWN1, Q0, V2 = (
    "model.layers.1.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.2.self_attn.v_proj",
)


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize(
    ("matrices", "config", "rank_of", "alpha_of"),
    [
        pytest.param(
            wider(pairs(RANKS), 5, DOWN1, Q0),
            {"rank_pattern": {"layers.1.mlp.down_proj": 5, "layers.0.*q_proj": 5}},
            {DOWN1: 5, Q0: 5},
            {},
            id="ranks",
        ),
        pytest.param(
            wider(pairs(RANKS), 1, V2),
            {"rank_pattern": {r"model\.layers\.2\.self_attn\.v_proj": 1}},
            {V2: 1},
            {},
            id="narrower",
        ),
        pytest.param(
            pairs(RANKS),
            {"alpha_pattern": {"layers.1.mlp.*": 7, ".*down_proj": 3, V2: 0.5}},
            {},
            {DOWN1: 7, V2: 0.5},
            id="alphas",
        ),
        pytest.param(
            pairs(RANKS, layers=(1, 2)),
            {"layers_to_transform": [1, 2]},
            {},
            {},
            id="without-layer-0",
        ),
        pytest.param(
            pairs(RANKS, (0,)) | pairs({"mlp.up_proj": 2}, (2,)),
            {"layers_to_transform": None},
            {},
            {},
            id="each-in-one-layer",
        ),
        pytest.param(
            wider(pairs(RANKS, layers=(0, 1)), 4, DOWN1),
            {"rank_pattern": {DOWN1: 4}, "alpha_pattern": {Q0: 9}},
            {DOWN1: 4},
            {Q0: 9},
            id="all-of-it",
        ),
    ],
)
def test_layers_of_different_ranks_and_scales(
    matrices: tiny.Matrices,
    config: dict[str, Any],
    rank_of: dict[str, int],
    alpha_of: dict[str, float],
    rslora: bool,
    tmp_path: Path,
):
    path = write(tmp_path / "a", matrices, **config, use_rslora=rslora)
    load_adapter(model := tiny.base(), path)

    scales = {}
    for full in matrices:
        rank = rank_of.get(full, 2)
        scales[full] = alpha_of.get(full, 3) / (math.sqrt(rank) if rslora else rank)
    weights = tiny.updated(matrices, scales)
    modules = adapters(model)
    assert {type(m) for m in modules.values()} == {LoRALinear}
    for name, module in modules.items():
        fulls = [f"model.layers.{n}.{name}" for n in range(3)]
        needed = [rank_of.get(full, 2) if full in matrices else 0 for full in fulls]
        assert module.ranks == tuple(needed)
        update = np.asarray(module.weight(), np.float64)
        for n in range(3):
            full = f"model.layers.{n}.{name}"
            needed = weights[f"{full}.weight"] - tiny.TENSORS[f"{full}.weight"]
            assert tiny.error(update[n].T, needed) < 1e-6, full
            assert update[n].any() == (full in matrices)
    assert tiny.error(tiny.logits(model), tiny.needed_logits(weights)) < LOGITS

    # and it is an adapter like any other from here on
    save_adapter(model, tmp_path / "b")
    load_adapter(again := tiny.base(), tmp_path / "b")
    same(ml.factors(again), ml.factors(model))
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_rounded_files_are_read_exactly(dtype: Any, tmp_path: Path):
    matrices = pairs({"self_attn.q_proj": 2})
    load_adapter(model := tiny.base(), write(tmp_path / "a", matrices, dtype))
    for full, pair in tiny.matrices(model).items():
        for got, x in zip(pair, matrices[full], strict=True):
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))
