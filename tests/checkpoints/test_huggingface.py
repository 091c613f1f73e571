"""Hugging Face directories: round trips, and errors for everything else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama, save_llama
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from tests.models import reference

CONFIG = reference.CONFIGS["llama-3"]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good model directory, in one file."""
    tensors = reference.random_tensors(CONFIG)
    return reference.write_checkpoint(tmp_path / "model", CONFIG, tensors)


def edit(path: Path, change: Callable[[reference.Tensors], object]) -> None:
    """Rewrite the weights with `change` applied to the dict of tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.smoke
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama-3", "llama-3.2", "v5-llama3"])
def test_tensors_survive_reading_and_writing(name: str, shards: int, tmp_path: Path):
    config = reference.CONFIGS[name]
    tensors = reference.random_tensors(config)
    source = reference.write_checkpoint(tmp_path / "in", config, tensors, shards)
    model = load_llama(source)
    got = hf_tensors(model)
    assert got.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(got[key], tensor)

    save_llama(model, tmp_path / "deeper" / "out")
    saved = tmp_path / "deeper" / "out"
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert os.listdir(saved.parent) == ["out"]
    assert len({(saved / file).stat().st_mode for file in os.listdir(saved)}) == 1
    again = load_llama(saved)
    assert again.config == model.config == LlamaConfig.from_hf(config)
    for key, tensor in hf_tensors(again).items():
        np.testing.assert_array_equal(tensor, tensors[key])
    with safe_open(saved / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("file_dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_files_of_every_float_dtype(file_dtype: type, tmp_path: Path):
    tensors = reference.random_tensors(CONFIG)
    tensors = {name: x.astype(file_dtype) for name, x in tensors.items()}
    model = load_llama(reference.write_checkpoint(tmp_path / "in", CONFIG, tensors))
    for name, tensor in hf_tensors(model).items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_are_rounded_once(dtype: type, path: Path, tmp_path: Path):
    needed = load_file(path / "model.safetensors")
    loaded = load_llama(path, dtype)
    save_llama(load_llama(path), tmp_path / "rounded", dtype)
    save_llama(loaded, tmp_path / "as_loaded")
    name = jnp.dtype(dtype).name
    for directory in ("rounded", "as_loaded"):
        written = json.loads((tmp_path / directory / "config.json").read_text())
        assert written["torch_dtype"] == written["dtype"] == name
        for key, tensor in load_file(
            tmp_path / directory / "model.safetensors"
        ).items():
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor, needed[key].astype(dtype))


def test_leaves_are_stacked_and_transposed(path: Path):
    model, tensors = load_llama(path), load_file(path / "model.safetensors")
    kernel = model.layers.mlp.down_proj.kernel[...]
    assert kernel.shape == (3, 48, 32)
    for n in range(3):
        name = f"model.layers.{n}.mlp.down_proj.weight"
        np.testing.assert_array_equal(kernel[n], tensors[name].T)


def test_redundant_tensors_are_ignored(tmp_path: Path):
    config = reference.CONFIGS["llama-3.2"]
    tensors = reference.random_tensors(config)
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    source = reference.write_checkpoint(tmp_path / "in", config, tensors | extra)
    assert hf_tensors(load_llama(source)).keys() == tensors.keys()


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_llama(path)
    for word in words:
        assert word in str(caught.value)


def test_one_error_names_every_bad_tensor(path: Path):
    def damage(tensors: reference.Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors[Q] = np.zeros((32, 16), np.float32)
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    edit(path, damage)
    refused(
        path,
        "model.norm.weight: missing, needed (32,)",
        f"{Q}: found (32, 16), needed (32, 32)",
        "model.layers.3.mlp.up_proj.weight: unexpected",
        "model.layers.1.mlp.up_proj.weight: found I8",
    )


@pytest.mark.parametrize("extra", ["lm_head.weight", "model.layers.0.mlp.up_proj.bias"])
def test_tied_and_biased_must_agree_with_the_config(extra: str, path: Path):
    if extra == "lm_head.weight":
        edit(path, lambda tensors: tensors.pop(extra))
        refused(path, "lm_head.weight: missing, needed (61, 32)")
    else:
        edit(path, lambda tensors: tensors.update({extra: np.zeros(48, np.float32)}))
        refused(path, f"{extra}: unexpected")


def test_paths_that_are_not_model_directories(path: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere does not exist", "config.json")
    refused(path / "config.json", "is a file", "model directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty has no config.json")


def test_bad_config_files(path: Path):
    config = path / "config.json"
    config.write_text('{"model_type": "llama",')
    refused(path, str(config), "not valid JSON", "again")
    config.write_bytes(b"\xff\xfe\x00")
    refused(path, str(config), "not valid JSON")
    config.write_text("[]")
    refused(path, str(config), "object")
    config.write_text(json.dumps(CONFIG | {"model_type": "qwen2"}))
    refused(path, str(config), "model_type must be 'llama', got 'qwen2'")
    config.write_text(json.dumps(CONFIG | {"rope_scaling": {"type": "dynamic"}}))
    refused(path, str(config), "rope_type 'dynamic'", "Known: default, linear, llama3")


def test_missing_or_corrupt_weights(path: Path):
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(path, str(weights), "truncated", "again")
    weights.write_bytes(b"not safetensors at all")
    refused(path, str(weights), "not a safetensors file")
    weights.write_bytes(b"")
    refused(path, str(weights))
    weights.rename(path / "pytorch_model.bin")
    refused(path, "neither model.safetensors nor", ".bin or .pth", "converted")


def test_an_index_must_name_existing_shards(tmp_path: Path):
    tensors = reference.random_tensors(CONFIG)
    path = reference.write_checkpoint(tmp_path / "model", CONFIG, tensors, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(path, "lacks model-00002-of-00003.safetensors", "download")
    index = path / "model.safetensors.index.json"
    index.write_text("{}")
    refused(path, str(index), "weight_map")


def test_saving_is_atomic(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_llama(path)
    with pytest.raises(InputError, match="already exists"):
        save_llama(model, path)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("manifold_lora.checkpoints.atomic.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_llama(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_model_with_adapters_is_not_saved(path: Path, tmp_path: Path):
    model: Llama = load_llama(path)
    model.layers.mlp.up_proj.kernel = nnx.LoRAParam(jnp.zeros((3, 32, 48)))
    with pytest.raises(InputError, match="merge first"):
        save_llama(model, tmp_path / "out")
