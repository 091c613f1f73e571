"""Adapter directories of every method: bit-exact round trips for any set of layers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.checkpoints.adapter_writer import Format
from manifold_lora.checkpoints.card import CARD
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from tests import adapters as tiny
from tests.adapters import formulas
from tests.adapters.cases import ALPHA, CASES, FEW, RANK, config
from tests.cases import slow_but
from tests.checkpoints.peft_files import (
    CONFIG,
    EXTRA,
    FACTORS,
    FORMATS,
    WEIGHTS,
    read,
    same,
)
from tests.tolerances import FLOAT32

LAYERS: dict[str, Any] = {  # ranks 3, 2 and 0
    "rank": 2,
    "alpha": 5,
    "targets": r"model\.layers\.[01]\.(self_attn\.[qv]|mlp\.down)_proj",
    "rank_pattern": {r"layers\.0\..*": 3},
    "alpha_pattern": {r"1\.mlp\.down_proj": 1.5},
}
SAVED = {
    case: config(case, targets=FEW)
    for case in CASES
    if not case.endswith("diagonal_scaling=True")
}
SAVED |= {
    f"{method}-layers": AdapterConfig(method, **LAYERS, rslora=method == "stella")
    for method in METHODS
}
SAVED["lora-pissa-layers"] = AdapterConfig("lora", {"init": "pissa"}, **LAYERS)


@pytest.mark.parametrize(
    ("format", "name"),
    slow_but(
        [(f, n) for f in FORMATS for n in SAVED if f == "portable" or "-layers" in n],
        [(format, name) for format in FORMATS for name in SAVED],
    ),
)
def test_every_method_survives_saving_and_loading(
    name: str, format: Format, tmp_path: Path
):
    attach(model := tiny.base(), SAVED[name])
    tiny.randomize(model)
    save_adapter(model, tmp_path / "a", format=format)
    load_adapter(again := tiny.base(), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))
    same(tiny.arrays(again), tiny.arrays(model))  # with those that are not trained
    assert ml.manifold_tree(again) == ml.manifold_tree(model)
    for loaded, module in zip(
        adapters(again).values(), adapters(model).values(), strict=True
    ):
        assert type(loaded) is type(module) and loaded.ranks == module.ranks
        np.testing.assert_array_equal(loaded.scale[...], module.scale[...])
    save_adapter(again, tmp_path / "b", format=format)
    files = sorted(os.listdir(tmp_path / "a"))
    pair = SAVED[name].method in ("lora", "stiefel", "landing_stiefel")
    pair |= SAVED[name].method == "landing_oblique"
    pair &= SAVED[name].options.init not in ("pissa", "olora")
    pair &= format == "peft"  # no scale here is a power of two
    assert files == sorted([CONFIG, WEIGHTS, EXTRA, CARD] + [FACTORS] * (not pair))
    for file in files:
        one, other = ((tmp_path / x / file).read_bytes() for x in "ab")
        assert one == other, file
    check_function(name, tmp_path / "a", tiny.arrays(model))


def check_function(name: str, path: Path, arrays: Any) -> None:
    """W + s B A of the file, rescaled for DoRA, is the weight of the method."""
    file, saved = read_adapter(path), SAVED[name]
    assert file.method == saved.method
    assert file.modules.keys() == arrays.keys()
    written = read(path / CONFIG)
    tensors = load_file(path / WEIGHTS)
    for full, module in file.modules.items():
        w = tiny.TENSORS[f"{full}.weight"].astype(np.float64)
        rank = 3 if "-layers" in name and ".layers.0." in full else 2
        alpha = 1.5 if "-layers" in name and full.endswith("1.mlp.down_proj") else 5
        scale = alpha / (rank**0.5 if saved.rslora else rank)
        assert module.scale == pytest.approx(scale)
        needed = formulas.NEW_WEIGHT[saved.method](w, arrays[full], scale)
        stem = f"base_model.model.{full}"
        a, b = (tensors[f"{stem}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        portable = "use_rslora" not in written and written["lora_alpha"] == written["r"]
        new = w + (1.0 if portable else module.scale) * b @ a
        if written.get("use_dora"):
            lengths = np.linalg.norm(new, axis=1)
            m = tensors[f"{stem}.lora_magnitude_vector"].astype(np.float64)
            new *= (m / lengths)[:, None]
        assert tiny.error(new, needed) < FLOAT32
        width = module.a.shape[1]
        np.testing.assert_array_equal(module.a.T, a[:width])
        if portable:
            assert tiny.error(module.scale * module.b, b[:, :width]) < FLOAT32
            assert not a[width:].any() and not b[:, width:].any()
        else:
            np.testing.assert_array_equal(module.b, b)


def test_other_ranks_are_in_the_pattern(tmp_path: Path):
    attach(model := tiny.base(), SAVED["lora-pissa-layers"])
    save_adapter(model, tmp_path / "a", format="peft")
    written = read(tmp_path / "a" / CONFIG)
    # twice as wide by the correction, and so is alpha
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    by_layer = [
        {f"model.layers.{n}.{name}": rank for name in names}
        for n, rank in enumerate((6, 4))
    ]
    assert {written["r"], *written["rank_pattern"].values()} == {6, 4}
    assert written["rank_pattern"] == by_layer[0 if written["r"] == 4 else 1]
    assert written["lora_alpha"] == 10
    assert written["alpha_pattern"] == {"model.layers.1.mlp.down_proj": 3}
    assert written["target_modules"] == sorted(by_layer[0] | by_layer[1])


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("scaling=True")])
def test_diagonal_scaling_has_no_form_in_peft(case: str, tmp_path: Path):
    attach(model := tiny.base(), config(case, targets="q_proj"))
    with pytest.raises(InputError, match="merge it and save the model"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_scales_of_the_cases():
    assert (RANK, ALPHA) == (2, 5)  # as the patterns above have them
