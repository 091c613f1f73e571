"""PEFT's LoRA directories: exact copies of ours, and any other one as W + s B A."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters import METHODS, AdapterConfig, adapters, attach
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.tolerances import LOGITS

CONFIG, WEIGHTS, EXTRA = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifold_lora.json",
)
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


@pytest.mark.parametrize(
    "config",
    [PLAIN, AdapterConfig("lora", rank=2, alpha=5), VARIED],
    ids=["stiefel", "lora", "varied"],
)
def test_an_adapter_survives_saving_and_loading(config: AdapterConfig, tmp_path: Path):
    model = attached(config)
    save_adapter(model, tmp_path / "deep" / "adapter")
    load_adapter(again := tiny.base(), tmp_path / "deep" / "adapter")
    same(ml.factors(again), ml.factors(model))
    assert ml.manifolds(again) == ml.manifolds(model)
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))
    for name, module in adapters(model).items():
        got = adapters(again)[name]
        assert type(got) is type(module)
        for field in ("rank", "alpha", "rslora", "dropout"):
            assert getattr(got, field) == getattr(module, field), (name, field)

    save_adapter(again, tmp_path / "again")
    for file in (CONFIG, WEIGHTS, EXTRA):
        old = (tmp_path / "deep" / "adapter" / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == old


def test_the_plain_config_has_the_keys_that_every_peft_accepts(tmp_path: Path):
    save_adapter(attached(PLAIN), tmp_path / "a", base_id="meta-llama/Llama-3.2-1B")
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
    assert read(tmp_path / "a" / EXTRA) == {"method": "stiefel"}


def test_further_keys_are_written_where_they_are_used(tmp_path: Path):
    save_adapter(attached(VARIED), tmp_path / "a")
    config = read(tmp_path / "a" / CONFIG)
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7, 0.25)
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert config["use_rslora"] is True
    assert config["rank_pattern"] == {"mlp.down_proj": 2}
    assert config["alpha_pattern"] == {"mlp.down_proj": 5, "mlp.up_proj": 2.5}
    assert read(tmp_path / "a" / EXTRA) == {"method": "lora"}


def test_tensors_are_those_of_peft(tmp_path: Path):
    model = attached(PLAIN)
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    needed = {}
    for name, (inputs, outputs) in tiny.SIZES.items():
        a, b = (
            np.asarray(x[...])
            for x in (adapters(model)[name].a, adapters(model)[name].b)
        )
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


def test_the_directory_holds_three_readable_files(tmp_path: Path):
    before = os.umask(0o022)
    try:
        save_adapter(attached(PLAIN), tmp_path / "a")
    finally:
        os.umask(before)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()}
    assert modes == {CONFIG: 0o644, WEIGHTS: 0o644, EXTRA: 0o644}


def test_factors_that_are_not_finite_are_saved_as_they_are(tmp_path: Path):
    model = attached(PLAIN)
    ml.set_factors(model, jax.tree.map(lambda x: x * np.nan, ml.factors(model)))
    save_adapter(model, tmp_path / "a")
    load_adapter(again := tiny.base(), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))


def test_a_bfloat16_base_has_float32_factors(tmp_path: Path):
    model = tiny.base(jnp.bfloat16)
    attach(model, PLAIN)
    save_adapter(tiny.randomize(model), tmp_path / "a")
    load_adapter(again := tiny.base(jnp.bfloat16), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))
    assert {x.dtype for x in load_file(tmp_path / "a" / WEIGHTS).values()} == {
        np.dtype(np.float32)
    }


# Adapters of others ---------------------------------------------------------


def pairs(ranks: dict[str, int], layers: tuple[int, ...] = (0, 1, 2)) -> tiny.Matrices:
    """Random A and B of the named projections in some layers."""
    rng, found = np.random.default_rng(3), {}
    for name, rank in ranks.items():
        inputs, outputs = tiny.SIZES[name]
        for n in layers:
            a = rng.normal(size=(rank, inputs)) / math.sqrt(inputs)
            b = rng.normal(size=(outputs, rank)) / math.sqrt(4 * rank)
            full = f"model.layers.{n}.{name}"
            found[full] = (a.astype(np.float32), b.astype(np.float32))
    return found


def write(path: Path, found: tiny.Matrices, dtype: Any = np.float32, **config: Any):
    """A directory as PEFT writes it, without our own file."""
    path.mkdir()
    tensors = {
        f"base_model.model.{full}.lora_{side}.weight": x.astype(dtype)
        for full, pair in found.items()
        for side, x in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    given = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": sorted({full.rpartition(".")[2] for full in found}),
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "bias": "none",
        "use_dora": False,
        "layer_replication": None,
        "eva_config": None,
        "qalora_group_size": 16,
    }
    (path / CONFIG).write_text(json.dumps(given | config))
    return path


def test_without_our_own_file_it_is_lora(tmp_path: Path):
    found = pairs({"self_attn.q_proj": 2, "mlp.up_proj": 2})
    path = write(tmp_path / "a", found, lora_dropout=0.5, use_rslora=True)
    load_adapter(model := tiny.base(), path)
    assert {type(m) for m in adapters(model).values()} == {METHODS["lora"]}
    assert {m.dropout for m in adapters(model).values()} == {0.5}
    got = tiny.matrices(model)
    assert got.keys() == found.keys()
    for full, (a, b) in found.items():
        np.testing.assert_array_equal(got[full][0], a)
        np.testing.assert_array_equal(got[full][1], b)
    needed = tiny.needed_logits(tiny.updated(found, 3 / math.sqrt(2)))
    assert tiny.error(tiny.logits(model), needed) < LOGITS


RANKS = {"self_attn.q_proj": 2, "self_attn.v_proj": 2, "mlp.down_proj": 2}


def wider(found: tiny.Matrices, rank: int, *fulls: str) -> tiny.Matrices:
    """The same with another rank in some modules."""
    other = pairs({name: rank for name in RANKS})
    return found | {full: other[full] for full in fulls}


DOWN1, Q0, V2 = (
    "model.layers.1.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.2.self_attn.v_proj",
)


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize(
    ("found", "config", "rank_of", "alpha_of"),
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
def test_layers_that_differ_become_one_lora_of_the_same_function(
    found: tiny.Matrices,
    config: dict[str, Any],
    rank_of: dict[str, int],
    alpha_of: dict[str, float],
    rslora: bool,
    tmp_path: Path,
):
    path = write(tmp_path / "a", found, **config, use_rslora=rslora)
    (path / EXTRA).write_text('{"method": "stiefel"}')  # which it can be no more
    load_adapter(model := tiny.base(), path)

    scales = {}
    for full in found:
        rank = rank_of.get(full, 2)
        scales[full] = alpha_of.get(full, 3) / (math.sqrt(rank) if rslora else rank)
    weights = tiny.updated(found, scales)
    modules = adapters(model)
    assert {type(m) for m in modules.values()} == {METHODS["lora"]}
    for name, module in modules.items():
        update = np.asarray(module.weight(), np.float64)
        for n in range(3):
            full = f"model.layers.{n}.{name}"
            needed = weights[f"{full}.weight"] - tiny.TENSORS[f"{full}.weight"]
            assert tiny.error(update[n].T, needed) < 1e-6, full
            assert update[n].any() == (full in found)
    assert tiny.error(tiny.logits(model), tiny.needed_logits(weights)) < LOGITS

    # and it is an adapter like any other from here on
    save_adapter(model, tmp_path / "b")
    load_adapter(again := tiny.base(), tmp_path / "b")
    same(ml.factors(again), ml.factors(model))
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_rounded_files_are_read_exactly(dtype: Any, tmp_path: Path):
    found = pairs({"self_attn.q_proj": 2})
    load_adapter(model := tiny.base(), write(tmp_path / "a", found, dtype))
    for full, pair in tiny.matrices(model).items():
        for got, x in zip(pair, found[full], strict=True):
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))


# What is refused ------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good adapter of another's hand."""
    return write(tmp_path / "adapter", pairs({"self_attn.q_proj": 2}))


def refused(path: Path, *words: str, model: Llama | None = None) -> None:
    model = tiny.base() if model is None else model
    before = adapters(model)
    with pytest.raises(InputError) as caught:
        load_adapter(model, path)
    for word in words:
        assert word in str(caught.value)
    assert adapters(model) == before


def edit(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def test_files_that_are_absent(path: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere has no adapter_config.json", "PEFT LoRA")
    refused(path / CONFIG, "has no adapter_config.json")
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    refused(path, "has no adapter_model.safetensors")


def test_files_that_are_damaged(path: Path):
    content = (path / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no tensors at all"):
        (path / WEIGHTS).write_bytes(damaged)
        refused(path, str(path / WEIGHTS), "truncated", "again")
    (path / WEIGHTS).write_bytes(content)
    (path / EXTRA).write_text("{")
    refused(path, str(path / EXTRA), "not valid JSON")
    (path / EXTRA).write_text('{"method": "stiefle"}')
    refused(path, str(path / EXTRA), "unknown method 'stiefle'", "mean stiefel")
    (path / EXTRA).write_text("{}")
    load_adapter(tiny.base(), path)  # no method: lora
    (path / CONFIG).write_text('{"r": 2')
    refused(path, str(path / CONFIG), "not valid JSON", "again")
    (path / CONFIG).write_text("[1]")
    refused(path, str(path / CONFIG), "JSON object")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, ["peft_type 'LOHA'", "only LORA"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"use_dora": True}, ["use_dora=True", "merge that"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save=['lm_head']"]),
        ({"bias": "lora_only"}, ["bias='lora_only'"]),
        ({"lora_bias": True}, ["lora_bias=True"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out=True"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication=[[0, 2]]"]),
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens=[1, 2]"]),
        ({"kasa_config": {}}, ["kasa_config={}"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights='pissa_niter_4'"]),
        ({"init_lora_weights": "OLoRA"}, ["init_lora_weights='OLoRA'"]),
        (
            {"use_dora": True, "bias": "all"},
            ["bias='all', use_dora=True", "merge that adapter into its base"],
        ),
    ],
)
def test_settings_that_would_be_another_function(
    config: dict[str, Any], words: list[str], path: Path
):
    (path / CONFIG).write_text(json.dumps(read(path / CONFIG) | config))
    refused(path, str(path / CONFIG), *words)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(start: Any, path: Path):
    config = read(path / CONFIG) | {"init_lora_weights": start}
    (path / CONFIG).write_text(json.dumps(config))
    load_adapter(tiny.base(), path)


def test_a_config_without_rank_or_alpha(path: Path):
    (path / CONFIG).write_text('{"peft_type": "LORA"}')
    refused(path, str(path / CONFIG), "r (got None), lora_alpha (got None)")


def test_every_bad_tensor_is_named_once(path: Path):
    stem = "base_model.model.model.layers"

    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{stem}.0.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 32), "f4")
        del tensors[f"{stem}.1.self_attn.q_proj.lora_B.weight"]
        tensors[f"{stem}.2.self_attn.q_proj.lora_B.weight"] = np.zeros((16, 2), "f4")
        tensors[f"{stem}.3.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 32), "f4")
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 32), "f4")

    edit(path, damage)
    complaints = [
        f"{stem}.0.self_attn.q_proj.lora_A.weight: found (3, 32), needed (2, 32)",
        f"{stem}.1.self_attn.q_proj.lora_B.weight: missing",
        f"{stem}.2.self_attn.q_proj.lora_B.weight: found (16, 2), needed (32, 2)",
        f"{stem}.3.self_attn.q_proj.lora_A.weight: unexpected",
        "base_model.model.lm_head.lora_A.weight: unexpected",
    ]
    refused(path, str(path), "does not fit", "base it was trained on", *complaints)
    with pytest.raises(InputError) as caught:
        load_adapter(tiny.base(), path)
    for complaint in complaints:
        assert str(caught.value).count(complaint.partition(":")[0]) == 1
    assert str(caught.value).count("lora_") == len(complaints)


def test_an_adapter_of_another_base(path: Path):
    edit(path, lambda t: t.update({k: np.zeros((2, 64), "f4") for k in t if "_A" in k}))
    stem = "base_model.model.model.layers"
    fits = [
        f"{stem}.{n}.self_attn.q_proj.lora_A.weight: found (2, 64), needed (2, 32)"
        for n in range(3)
    ]
    refused(path, *fits)


def test_the_rank_of_the_config_must_be_that_of_the_tensors(path: Path):
    config = read(path / CONFIG) | {"r": 4}
    (path / CONFIG).write_text(json.dumps(config))
    refused(path, "lora_A.weight: found (2, 32), needed (4, 32)")
    config["rank_pattern"] = {"q_proj": 2}
    (path / CONFIG).write_text(json.dumps(config))
    load_adapter(tiny.base(), path)


def test_a_file_without_tensors(path: Path):
    save_file({}, path / WEIGHTS)
    refused(path, "it holds no tensor")


def test_a_model_takes_one_adapter(path: Path):
    load_adapter(model := tiny.base(), path)
    refused(path, "already (self_attn.q_proj)", "merge", model=model)


def test_nothing_to_save(tmp_path: Path):
    with pytest.raises(InputError, match="no adapter to save: attach"):
        save_adapter(tiny.base(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Replacing ------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_an_older_adapter_is_replaced(tmp_path: Path):
    save_adapter(attached(VARIED), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("as PEFT writes")
    model = attached(PLAIN, seed=1)
    save_adapter(model, tmp_path / "a")
    load_adapter(again := tiny.base(), tmp_path / "a")
    same(ml.factors(again), ml.factors(model))
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert contents(tmp_path / "a").keys() == {CONFIG, WEIGHTS, EXTRA}


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
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("manifold_lora.checkpoints.peft.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(attached(PLAIN, seed=1), path)
    assert os.listdir(tmp_path) == (["a"] if older else [])
    assert not older or contents(path) == before


def test_a_disk_that_changes_bytes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def damaged(tensors: dict[str, np.ndarray], filename: Path, **_: Any) -> None:
        first = next(iter(tensors))
        save_file(tensors | {first: tensors[first] * (1 + 1e-6)}, filename)

    monkeypatch.setattr("manifold_lora.checkpoints.peft.save_file", damaged)
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
        with pytest.raises(InputError, match="is no adapter.*choose another"):
            save_adapter(model, path)
    assert (tmp_path / "directory" / "thesis.tex").exists()
    assert (tmp_path / "file").is_file()
    (tmp_path / "empty").mkdir()
    save_adapter(model, tmp_path / "empty")
