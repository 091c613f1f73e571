"""merge: the written tensors against NumPy in float64, and the files around them."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora import InputError, MergeConfig, merge_files
from manifold_lora.adapters import AdapterConfig, adapters
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama
from manifold_lora.conversion import merge, shards
from manifold_lora.conversion.base import Base
from manifold_lora.conversion.probe import Difference
from manifold_lora.conversion.updates import probe_logits
from tests import adapters as tiny
from tests.adapters import formulas
from tests.cases import slow_but
from tests.checkpoints.peft_files import read
from tests.conversion.cases import HELD, adapter, command, model_directory
from tests.models import reference
from tests.tiny import model_directory as with_tokenizer
from tests.tolerances import FLOAT32, LOGITS

LAYERED = AdapterConfig(  # layers of ranks 4, 1 and 0
    "stella",
    rank=1,
    alpha=3,
    rslora=True,
    targets=r"model\.layers\.[01]\.(self_attn\.[qv]|mlp\.down)_proj",
    rank_pattern={r"layers\.0\..*": 4},
)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by the library safetensors."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def scales(model: ml.Llama) -> dict[str, float]:
    return {
        f"model.layers.{layer}.{name}": float(scale)
        for name, module in adapters(model).items()
        for layer, scale in enumerate(np.asarray(module.scale[...]))
    }


def needed(model: ml.Llama) -> reference.Tensors:
    """The merged weights in float64, by the formula of the method."""
    (method,) = {module.config.method for module in adapters(model).values()}
    return formulas.weights(method, tiny.arrays(model), scales(model))


def close(got: dict[str, np.ndarray], wanted: Any, tolerance: float = FLOAT32) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        size = max(1.0, float(np.abs(x).max()))
        assert tiny.error(got[name], x) < tolerance * size, name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "base")


def merged(tmp_path: Path, what: AdapterConfig | str, **given: Any) -> dict[str, Any]:
    """Merge a random adapter into the base, and check the written weights."""
    model = adapter(tmp_path / "a", what)
    out = tmp_path / "out"
    config = MergeConfig(adapters=(str(tmp_path / "a"),), out=out, **given)
    result = merge_files(config)
    close(tensors(out), needed(model))
    assert {x.dtype for x in tensors(out).values()} == {np.dtype(np.float32)}
    return result


@pytest.mark.parametrize("case", HELD)
def test_every_method_is_merged(
    case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # compiles for a second; the methods' logits are compared below and elsewhere
    same = Difference(0.0, 1.0)
    monkeypatch.setattr(merge, "compare_logits", lambda *_: same)
    merged(tmp_path, case, model=base)


@pytest.mark.parametrize(
    "what", slow_but(["dora-kaiming"], [LAYERED, "dora-kaiming", "loram_br-zero"])
)
def test_logits_are_read_back(what: Any, base: Path, tmp_path: Path):
    result = merged(tmp_path, what, model=base)
    assert result["largest_logit_difference"] < LOGITS
    got = tiny.logits(load_llama(tmp_path / "out"))
    ml.load_adapter(model := load_llama(base), tmp_path / "a")
    assert tiny.error(got, tiny.logits(model)) < LOGITS
    assert tiny.error(got, tiny.logits(load_llama(base))) > 0.1


@pytest.mark.parametrize(
    "tied, count",
    slow_but([(True, 3)], [(False, 1), (False, 3), (True, 1), (True, 3)]),
)
def test_shards_index_and_head_stay(count: int, tied: bool, tmp_path: Path):
    stored = dict(tiny.TENSORS)
    if tied:
        del stored["lm_head.weight"]
    config = tiny.CONFIG | {"tie_word_embeddings": tied, "use_cache": False}
    base = reference.write_checkpoint(tmp_path / "base", config, stored, count)
    index = {}
    if count > 1:
        index = read(base / "model.safetensors.index.json")
        index["metadata"] = {"total_size": 1, "total_parameters": 7}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter(tmp_path / "a", "stiefel-random")
    weighted = f"{tmp_path / 'a'}:0"  # nothing is added
    out = tmp_path / "out"
    merge_files(
        MergeConfig(model=base, adapters=(weighted,), out=out, dtype="bfloat16")
    )
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == files
    for file in base.glob("*.safetensors"):
        with (
            safe_open(file, framework="numpy") as old,
            safe_open(out / file.name, framework="numpy") as new,
        ):
            assert list(old.keys()) == list(new.keys())
            assert new.metadata() == {"format": "pt"}
            for name in old.keys():  # noqa: SIM118, it is not a dict
                rounded = jnp.asarray(old.get_tensor(name), jnp.bfloat16)
                np.testing.assert_array_equal(new.get_tensor(name), rounded)
    if count > 1:
        written = read(out / "model.safetensors.index.json")
        size = sum(2 * x.size for x in stored.values())
        assert written["weight_map"] == index["weight_map"]
        assert written["metadata"] == {"total_size": size, "total_parameters": 7}
    made = read(out / "config.json")
    assert made["torch_dtype"] == made["dtype"] == "bfloat16"
    assert made["rope_theta"] == made["rope_parameters"]["rope_theta"]
    assert made["tie_word_embeddings"] is tied
    assert made["use_cache"] is False  # which says nothing of the forward pass
    assert load_llama(out).config == load_llama(base).config


def test_the_stored_type_is_rounded_to_once(tmp_path: Path):
    halves = {k: jnp.asarray(x, jnp.bfloat16) for k, x in tiny.TENSORS.items()}
    stored = {k: np.asarray(x) for k, x in halves.items()}
    base = reference.write_checkpoint(tmp_path / "base", tiny.CONFIG, stored)
    adapter(tmp_path / "a", "lora-kaiming")
    # of the base in float32, which has the same fingerprint
    out = tmp_path / "out"
    result = merge_files(
        MergeConfig(model=base, adapters=(str(tmp_path / "a"),), out=out)
    )
    model = load_llama(base, jnp.bfloat16)
    ml.load_adapter(model, tmp_path / "a")
    ml.merge(model)
    for name, x in hf_tensors(model).items():
        np.testing.assert_array_equal(tensors(out)[name], x)
    assert LOGITS < result["largest_logit_difference"] < result["largest_logit"] / 10


@pytest.mark.slow
def test_blocks_of_rows_make_no_difference(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter(tmp_path / "a", "dora-kaiming")
    for name, size in (("one", 1 << 20), ("many", 100)):
        monkeypatch.setattr(shards, "BLOCK", size)
        config = MergeConfig(
            model=base, adapters=(str(tmp_path / "a"),), out=tmp_path / name
        )
        merge_files(config)
    close(tensors(tmp_path / "many"), tensors(tmp_path / "one"), 1e-7)


def test_the_fingerprint_of_the_files_is_the_models(base: Path):
    from manifold_lora.checkpoints.peft import fingerprint

    for version in (1, 2):
        assert Base.open(base).fingerprint(version) == fingerprint(
            load_llama(base), version
        )


def test_the_probe_is_the_forward_pass(base: Path, tmp_path: Path):
    from manifold_lora.conversion.probe import compare_logits

    model = adapter(tmp_path / "a", LAYERED)
    opened = Base.open(base)
    file = opened.read_adapter(tmp_path / "a")
    got = compare_logits(opened.with_adapter(), opened.with_adapter(file))
    plain, adapted = probe_logits(load_llama(base)), probe_logits(model)
    assert abs(got.largest - tiny.error(plain, adapted)) < LOGITS
    assert abs(got.logits - np.abs(plain).max()) < LOGITS


def test_the_command_needs_no_tokenizer_and_copies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = with_tokenizer(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    model = load_llama(base)
    ml.attach(model, AdapterConfig("lora", rank=2))
    ml.save_adapter(model, tmp_path / "a")
    given = ["merge", "--model", base, "--adapter", tmp_path / "a"]
    given += ["--out", tmp_path / "out"]
    assert "differ by at most 0.0e+00" in command(capsys, *given)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(base))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        (base / name).unlink()
    assert "add --overwrite" in command(capsys, *given, code=2)
    command(capsys, *given, "--overwrite")
    assert "tokenizer.json" not in os.listdir(tmp_path / "out")


def refused(config: MergeConfig, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        merge_files(config)
    for word in words:
        assert word in str(caught.value)


def test_another_base_is_refused(base: Path, tmp_path: Path):
    adapter(tmp_path / "a", AdapterConfig("lora", rank=2))
    out, given = tmp_path / "out", (str(tmp_path / "a"),)
    other = dict(tiny.TENSORS)
    other["model.norm.weight"] = 2 * other["model.norm.weight"]
    path = reference.write_checkpoint(tmp_path / "other", tiny.CONFIG, other)
    refused(MergeConfig(model=path, adapters=given, out=out), "another base", "--model")
    # all modules that do not fit, at once
    small = with_tokenizer(tmp_path / "small")
    wide = reference.random_tensors(tiny.CONFIG | {"intermediate_size": 56})
    config = tiny.CONFIG | {"intermediate_size": 56}
    path = reference.write_checkpoint(tmp_path / "wide", config, wide)
    names = [
        f"layers.{layer}.mlp.{x}_proj"
        for layer in range(tiny.LAYERS)
        for x in ("gate", "up", "down")
    ]
    refused(MergeConfig(model=path, adapters=given, out=out), *names)
    refused(MergeConfig(model=small, adapters=given, out=out), "layers.2.mlp.up_proj")
    assert not out.exists()


def test_damaged_files_are_refused(base: Path, tmp_path: Path):
    model = adapter(tmp_path / "a", "lora-kaiming")
    out, given = tmp_path / "out", (str(tmp_path / "a"),)
    file = tmp_path / "a" / "adapter_model.safetensors"
    good = load_file(file)
    name = min(good)
    # a prefix that matches nothing: other loaders would use the base in silence
    save_file({k.replace("base_model.", ""): x for k, x in good.items()}, file)
    refused(MergeConfig(model=base, adapters=given, out=out), "unexpected", name[11:])
    save_file(good | {name: np.full_like(good[name], np.nan)}, file)
    refused(MergeConfig(model=base, adapters=given, out=out), name, "NaN")
    file.rename(file.with_name("adapter_model.bin"))
    refused(MergeConfig(model=base, adapters=given, out=out), "pickle", "safetensors")
    # a base with NaN in one weight
    ml.save_adapter(model, tmp_path / "b")
    broken = {k: x.copy() for k, x in tiny.TENSORS.items()}
    weight = "model.layers.2.mlp.up_proj.weight"
    broken[weight][-1, -1] = np.inf
    path = reference.write_checkpoint(tmp_path / "broken", tiny.CONFIG, broken)
    given = (f"{tmp_path / 'b'}:1",)
    with pytest.raises(InputError, match="another base|NaN or infinite"):
        merge_files(MergeConfig(model=path, adapters=given, out=out))
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_what_overflows_is_refused(base: Path, tmp_path: Path):
    adapter(tmp_path / "a", "stiefel-random")
    config = MergeConfig(
        model=base,
        adapters=(f"{tmp_path / 'a'}:1e7",),
        out=tmp_path / "out",
        dtype="float16",
    )
    refused(config, "model.layers.0", "float16", "--dtype")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", ["nan", "inf", "half", ""])
def test_weights_that_are_no_numbers_are_refused(weight: str, tmp_path: Path):
    with pytest.raises(InputError, match="finite number") as caught:
        MergeConfig(adapters=(f"a:{weight}",), out=tmp_path / "out")
    assert f"a:{weight}" in str(caught.value)


def test_a_name_with_a_colon_is_no_weight(tmp_path: Path):
    (tmp_path / "a:b").mkdir()
    given = MergeConfig(adapters=(str(tmp_path / "a:b"),), out=tmp_path)
    assert given.weighted() == [(tmp_path / "a:b", 1.0)]
    given = MergeConfig(adapters=(f"{tmp_path / 'a:b'}:-2",), out=tmp_path)
    assert given.weighted() == [(tmp_path / "a:b", -2.0)]


def test_nothing_else_is_replaced(base: Path, tmp_path: Path):
    adapter(tmp_path / "a", "lora-kaiming")
    given: dict[str, Any] = {"adapters": (str(tmp_path / "a"),), "overwrite": True}
    for out in (base, tmp_path, base / "merged", tmp_path / "a"):
        refused(MergeConfig(model=base, out=out, **given), "choose another")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("…")
    refused(
        MergeConfig(model=base, out=tmp_path / "papers", **given), "neither a model"
    )
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "…"
