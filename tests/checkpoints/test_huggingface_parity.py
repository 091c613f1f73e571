"""Logits agree with transformers' LlamaForCausalLM on the same files."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manifold_lora.checkpoints.huggingface import load_llama, save_llama
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.models.layers import rope_frequencies
from tests.models import reference
from tests.tolerances import LOGITS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf

IDS = np.random.default_rng(1).integers(0, 61, (2, 80))


def load_transformers(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def transformers_logits(
    model: Any, ids: np.ndarray, **inputs: np.ndarray
) -> np.ndarray:
    with torch.no_grad():
        tensors = {name: torch.tensor(x) for name, x in inputs.items()}
        return model(torch.tensor(ids), **tensors).logits.numpy()


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    config = reference.CONFIGS[name]
    tensors = reference.random_tensors(config)
    path = reference.write_checkpoint(tmp_path / "m", config, tensors)
    got = load_llama(path)(jnp.asarray(IDS))
    assert (
        np.abs(got - transformers_logits(load_transformers(path), IDS)).max() < LOGITS
    )


@pytest.mark.parametrize("name", ["llama-2", "llama-3.1", "llama-3.2", "v5-llama3"])
def test_transformers_reads_what_we_save(name: str, tmp_path: Path):
    config = LlamaConfig.from_hf(reference.CONFIGS[name])
    model = Llama(config, rngs=nnx.Rngs(0))
    save_llama(model, tmp_path / "m")
    hf_model = load_transformers(tmp_path / "m")
    needed = transformers_logits(hf_model, IDS)
    assert np.abs(model(jnp.asarray(IDS)) - needed).max() < LOGITS
    hf_model.save_pretrained(tmp_path / "resaved")  # with the keys of version 5
    assert load_llama(tmp_path / "resaved").config == config


@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_a_tied_model_whose_file_has_a_head(factor: float, tmp_path: Path):
    """transformers 5 ties the two only where the head is the embedding."""
    config = reference.CONFIGS["llama-3.2"]
    tensors = reference.random_tensors(config)
    head = tensors["model.embed_tokens.weight"] * np.float32(factor)
    tensors |= {"lm_head.weight": head}
    path = reference.write_checkpoint(tmp_path / "m", config, tensors)
    got = load_llama(path)(jnp.asarray(IDS))
    needed = transformers_logits(load_transformers(path), IDS)
    assert np.abs(got - needed).max() < LOGITS
    tied = reference.CONFIGS["llama-3.2"], reference.random_tensors(config)
    alone = load_llama(reference.write_checkpoint(tmp_path / "tied", *tied))
    equal = np.abs(got - alone(jnp.asarray(IDS))).max() < LOGITS
    assert equal == (factor == 1)


def test_left_padding_and_distant_positions(tmp_path: Path):
    config = reference.CONFIGS["llama-3.1"] | {"max_position_embeddings": 131072}
    tensors = reference.random_tensors(config)
    path = reference.write_checkpoint(tmp_path / "m", config, tensors)
    mask = np.ones_like(IDS)
    mask[1, :30] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    positions[0] *= 1_600  # up to 126,400
    got = load_llama(path)(
        jnp.asarray(IDS), jnp.asarray(mask), positions=jnp.asarray(positions)
    )
    needed = transformers_logits(
        load_transformers(path), IDS, attention_mask=mask, position_ids=positions
    )
    assert np.abs(got - needed)[mask == 1].max() < LOGITS


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_frequencies_are_bitwise_those_of_transformers(
    kind: str, head_dim: int, theta: float
):
    from transformers import LlamaConfig as TransformersConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": kind, "factor": 8.0}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    keys = {"default": 1, "linear": 2, "llama3": 5}[kind]
    rope = dict(list(scaling.items())[:keys]) | {"rope_theta": theta}
    config = reference.CONFIGS["llama-3"] | {
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": rope,
    }
    config.pop("model_type")
    needed = LlamaRotaryEmbedding(TransformersConfig(**config)).inv_freq.numpy()
    got = rope_frequencies(LlamaConfig.from_hf(config | {"model_type": "llama"}))
    np.testing.assert_array_equal(got, needed)
