"""Writing PEFT's LoRA directories: exact copies, standard keys, atomic."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.checkpoints.adapter_writer import Format
from manifold_lora.checkpoints.card import CARD
from manifold_lora.checkpoints.peft import fingerprint, load_adapter, save_adapter
from manifold_lora.errors import InputError
from tests import adapters as tiny
from tests.checkpoints.peft_files import (
    CONFIG,
    EXTRA,
    FACTORS,
    FORMATS,
    PLAIN,
    VARIED,
    WEIGHTS,
    attached,
    read,
    same,
)


@pytest.mark.parametrize(
    "config",
    [PLAIN, AdapterConfig("lora", rank=2, alpha=5), VARIED],
    ids=["stiefel", "lora", "varied"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_survives_saving_and_loading(
    config: AdapterConfig, format: Format, tmp_path: Path
):
    model = attached(config)
    save_adapter(model, tmp_path / "deep" / "adapter", format=format)
    load_adapter(again := tiny.base(), tmp_path / "deep" / "adapter")
    same(ml.factors(again), ml.factors(model))
    assert ml.manifold_tree(again) == ml.manifold_tree(model)
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))
    for name, module in adapters(model).items():
        got = adapters(again)[name]
        assert type(got) is type(module)
        assert (got.ranks, got.alphas) == (module.ranks, module.alphas), name
        assert dataclasses.asdict(got.config) == dataclasses.asdict(module.config)

    save_adapter(again, tmp_path / "again", format=format)
    for file in (CONFIG, WEIGHTS, EXTRA):
        old = (tmp_path / "deep" / "adapter" / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == old


def test_the_plain_config_has_the_keys_that_every_peft_accepts(tmp_path: Path):
    name = "meta-llama/Llama-3.2-1B"
    save_adapter(attached(PLAIN), tmp_path / "a", base_id=name, format="peft")
    assert read(tmp_path / "a" / CONFIG) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": [
            f"{x}_proj" for x in ("down", "gate", "k", "o", "q", "up", "v")
        ],
    }
    assert read(tmp_path / "a" / EXTRA) == {
        "method": "stiefel",
        "rank": 2,
        "alpha": 5,
        "rslora": False,
        "dropout": 0.0,
        "targets": "all-linear",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init": "random",
        "fixed_a": None,
        "base": fingerprint(tiny.base()),
        "format": "peft",
    }


def test_optional_keys_are_written_only_if_used(tmp_path: Path):
    save_adapter(attached(VARIED), tmp_path / "a", format="peft")
    config = read(tmp_path / "a" / CONFIG)
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7, 0.25)
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert config["use_rslora"] is True
    assert config["rank_pattern"] == {"mlp.down_proj": 2}
    assert config["alpha_pattern"] == {"mlp.down_proj": 5, "mlp.up_proj": 2.5}
    own = read(tmp_path / "a" / EXTRA)
    assert own["rank_pattern"] == {"down_proj": 2} and own["rslora"] is True
    assert own["alpha_pattern"] == {"self_attn.*": 7, "up_proj": 2.5}
    assert own["targets"] == ["q_proj", "v_proj", "up_proj", "down_proj"]
    assert (own["method"], own["init"]) == ("lora", "kaiming")


def test_tensors_are_those_of_peft(tmp_path: Path):
    model = attached(PLAIN)
    save_adapter(model, tmp_path / "a", format="peft")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    needed = {}
    for name, (inputs, outputs) in tiny.SIZES.items():
        module: Any = adapters(model)[name]
        a, b = np.asarray(module.a[...]), np.asarray(module.b[...])
        for n in range(3):
            stem = f"base_model.model.model.layers.{n}.{name}"
            needed[f"{stem}.lora_A.weight"] = a[n].T
            needed[f"{stem}.lora_B.weight"] = b[n]
            assert a[n].T.shape == (2, inputs) and b[n].shape == (outputs, 2)
    assert tensors.keys() == needed.keys()
    for key, tensor in needed.items():
        np.testing.assert_array_equal(tensors[key], tensor)
        assert tensors[key].dtype == np.float32
    with safe_open(tmp_path / "a" / WEIGHTS, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_portable_file_is_scaled_by_one_whatever_the_loader(tmp_path: Path):
    model = attached(VARIED)
    save_adapter(model, tmp_path / "a")
    config = read(tmp_path / "a" / CONFIG)
    assert config["r"] == config["lora_alpha"] == 3
    assert not config.keys() & {"use_rslora", "rank_pattern", "alpha_pattern"}
    assert config["lora_dropout"] == 0.25
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    alphas = {"q_proj": 7, "v_proj": 7, "up_proj": 2.5, "down_proj": 5}
    for full, (a, b) in tiny.matrices(model).items():
        last = full.rpartition(".")[2]
        rank = 2 if last == "down_proj" else 3
        scale = alphas[last] / np.sqrt(rank)
        got_a, got_b = (
            tensors[f"base_model.model.{full}.lora_{x}.weight"] for x in "AB"
        )
        assert got_a.shape == (3, a.shape[1]) and got_b.shape == (b.shape[0], 3)
        np.testing.assert_array_equal(got_a[:rank], a)
        np.testing.assert_array_equal(
            got_b[:, :rank], (scale * b.astype("f8")).astype("f4")
        )
        assert not got_a[rank:].any() and not got_b[:, rank:].any()


@pytest.mark.parametrize(("alpha", "kept"), [(4, False), (0.5, False), (5, True)])
def test_factors_are_kept_beside_where_the_scale_cannot_be_taken_out(
    alpha: float, kept: bool, tmp_path: Path
):
    model = attached(AdapterConfig("stiefel", rank=2, alpha=alpha))
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / FACTORS).exists() is kept
    load_adapter(again := tiny.base(), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))


def test_the_directory_holds_readable_files(tmp_path: Path):
    before = os.umask(0o022)
    try:
        save_adapter(attached(PLAIN), tmp_path / "a", format="peft")
    finally:
        os.umask(before)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys((CONFIG, WEIGHTS, EXTRA, CARD), 0o644)


def test_nan_and_infinite_factors_are_saved_and_refused(tmp_path: Path):
    model = attached(PLAIN)
    ml.set_factors(model, jax.tree.map(lambda x: x * np.nan, ml.factors(model)))
    save_adapter(model, tmp_path / "a")
    assert all(np.isnan(x).all() for x in load_file(tmp_path / "a" / WEIGHTS).values())
    with pytest.raises(InputError, match="has NaN or infinity"):
        load_adapter(tiny.base(), tmp_path / "a")


def test_a_bfloat16_base_has_float32_factors(tmp_path: Path):
    model = tiny.base(jnp.bfloat16)
    attach(model, PLAIN)
    save_adapter(tiny.randomize(model), tmp_path / "a")
    load_adapter(again := tiny.base(jnp.bfloat16), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))
    assert {x.dtype for x in load_file(tmp_path / "a" / WEIGHTS).values()} == {
        np.dtype(np.float32)
    }


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_older_adapter_is_replaced(tmp_path: Path):
    save_adapter(attached(VARIED), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("as PEFT writes")
    model = attached(PLAIN, seed=1)
    save_adapter(model, tmp_path / "a", format="peft")
    load_adapter(again := tiny.base(), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert contents(tmp_path / "a").keys() == {CONFIG, WEIGHTS, EXTRA, CARD}


@pytest.mark.parametrize("older", [True, False], ids=["older", "first"])
def test_a_full_disk_leaves_the_older_adapter(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    if older:
        save_adapter(attached(PLAIN), path)
    before = contents(path) if older else {}

    def full(tensors: Any, filename: Path, **_: Any) -> None:
        filename.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("manifold_lora.checkpoints.atomic.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(attached(PLAIN, seed=1), path)
    assert os.listdir(tmp_path) == (["a"] if older else [])
    assert not older or contents(path) == before


def test_a_disk_that_corrupts_bytes_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def damaged(tensors: dict[str, np.ndarray], filename: Path, **_: Any) -> None:
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] * (1 + 1e-6)}, filename)

    monkeypatch.setattr("manifold_lora.checkpoints.atomic.save_file", damaged)
    with pytest.raises(OSError, match="differs from what was written"):
        save_adapter(attached(PLAIN), tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_only_an_adapter_is_replaced(tmp_path: Path):
    model = attached(PLAIN)
    for kind in ("directory", "file"):
        path = tmp_path / kind
        if kind == "directory":
            path.mkdir()
            (path / "thesis.tex").write_text("years of work")
        else:
            path.write_text("years of work")
        with pytest.raises(InputError, match="is not an adapter.*choose another"):
            save_adapter(model, path)
    assert (tmp_path / "directory" / "thesis.tex").exists()
    assert (tmp_path / "file").is_file()
    (tmp_path / "empty").mkdir()
    save_adapter(model, tmp_path / "empty")
