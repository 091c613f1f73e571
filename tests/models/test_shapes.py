"""Published configurations by name, against the published parameter counts."""

import json

import jax
import pytest
from flax import nnx

from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from manifold_lora.models.shapes import SHAPES, model_shape, parameter_count
from tests.tiny import CONFIG

# Billions of parameters, from the model cards and the papers.
PUBLISHED = {
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "llama-3.1-405b": 405.853,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.3-70b": 70.554,
}


def count_parameters(config):
    """The number of parameters of the module itself, from shapes alone."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def test_parameter_counts_are_the_published_ones():
    counts = {name: round(parameter_count(c) / 1e9, 3) for name, c in SHAPES.items()}
    assert counts == PUBLISHED


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.2-1b", "llama-3.1-405b"])
def test_parameter_count_equals_that_of_the_module(name):
    assert parameter_count(SHAPES[name]) == count_parameters(SHAPES[name])


def test_biases_are_counted():
    biased = {**CONFIG.to_hf(), "attention_bias": True, "mlp_bias": True}
    config = type(CONFIG).from_hf(biased)
    assert parameter_count(config) == count_parameters(config)


def test_model_shape_reads_a_file_or_a_directory_without_weights(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPES["llama-3.1-8b"].to_hf()))
    assert model_shape(file) == model_shape(tmp_path) == SHAPES["llama-3.1-8b"]


def test_unknown_names_and_invalid_files(tmp_path):
    with pytest.raises(InputError, match=r"Did you mean llama-3\.1-8b\?"):
        model_shape("llama-3.1-8B")
    with pytest.raises(InputError, match="not a known model name"):
        model_shape(tmp_path)  # no config.json in it
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        model_shape(tmp_path)
    file.write_text("[]")
    with pytest.raises(InputError, match="object"):
        model_shape(file)
    file.write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(InputError, match=r"config\.json: LLaMA config.*mistral"):
        model_shape(file)
