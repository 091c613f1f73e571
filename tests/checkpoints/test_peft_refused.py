"""Invalid PEFT directories: the errors name the problem and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from manifold_lora.adapters import adapters
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.checkpoints.peft_files import CONFIG, EXTRA, WEIGHTS, pairs, read, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A valid adapter, as another tool writes it."""
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


def test_missing_files(path: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere has no adapter_config.json", "PEFT LoRA")
    refused(path / CONFIG, "has no adapter_config.json")
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    refused(path, "has no adapter_model.safetensors")


def test_corrupt_files(path: Path):
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
    refused(path, str(path / CONFIG), "object")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, ["peft_type 'LOHA'", "only LORA and STELLA"]),
        ({"peft_type": None}, ["peft_type None"]),
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
            {"lora_bias": True, "bias": "all"},
            ["bias='all', lora_bias=True", "merge that adapter into its base"],
        ),
    ],
)
def test_unsupported_settings(config: dict[str, Any], words: list[str], path: Path):
    (path / CONFIG).write_text(json.dumps(read(path / CONFIG) | config))
    refused(path, str(path / CONFIG), *words)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone(init: Any, path: Path):
    config = read(path / CONFIG) | {"init_lora_weights": init}
    (path / CONFIG).write_text(json.dumps(config))
    load_adapter(model := tiny.base(), path)
    assert adapters(model)


def test_a_config_without_rank_or_alpha(path: Path):
    (path / CONFIG).write_text('{"peft_type": "LORA"}')
    refused(path, str(path / CONFIG), "a number for r, lora_alpha")


def test_one_error_names_every_bad_tensor_once(path: Path):
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


def test_dora_needs_its_magnitudes(path: Path):
    config = read(path / CONFIG) | {"use_dora": True}
    (path / CONFIG).write_text(json.dumps(config))
    stem = "base_model.model.model.layers"
    missing = [f"{stem}.{n}.self_attn.q_proj.lora_mag" for n in range(3)]
    refused(path, *missing, "nitude_vector: missing")


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
