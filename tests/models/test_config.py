"""Reading config.json of transformers 4 and 5, and rejecting unsupported ones."""

from typing import Any

import pytest

from manifold_lora.errors import InputError
from manifold_lora.models import LlamaConfig, RopeScaling
from tests.models import reference


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_config_round_trip(name: str):
    config = LlamaConfig.from_hf(reference.CONFIGS[name])
    written = config.to_hf("bfloat16")
    assert LlamaConfig.from_hf(written) == config
    v4 = {k: v for k, v in written.items() if k != "rope_parameters"}
    v5 = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert LlamaConfig.from_hf(v4) == LlamaConfig.from_hf(v5) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_config_defaults_and_values():
    llama2 = LlamaConfig.from_hf(reference.CONFIGS["llama-2"])
    assert (llama2.rope_theta, llama2.num_key_value_heads, llama2.head_dim) == (
        10000.0,
        4,
        8,
    )
    assert (llama2.eos_token_id, llama2.rope_scaling) == ((2,), None)
    llama31 = LlamaConfig.from_hf(reference.CONFIGS["llama-3.1"])
    assert llama31.eos_token_id == (2, 5, 9)
    assert llama31.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    no_eos = LlamaConfig.from_hf(reference.CONFIGS["llama-2"] | {"eos_token_id": None})
    assert no_eos.eos_token_id == () and no_eos.to_hf()["eos_token_id"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, ["model_type", "'llama'", "'mistral'"]),
        ({"model_type": "t5", "hidden_act": "gelu"}, ["'t5'", "'gelu'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, ["'yarn'", "llama3"]),
        ({"rope_scaling": {"rope_type": "lama3"}}, ["'lama3'", "Did you mean llama3"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "linear"]),
        ({"rope_scaling": {"factor": 2.0}}, ["'missing'", "llama3"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, ["low_freq", "original_"]),
        ({"num_attention_heads": 5}, ["hidden_size 32", "num_attention_heads 5"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "3"]),
        ({"vocab_size": "61", "hidden_size": -1}, ["vocab_size", "'61'", "-1"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"head_dim": 7}, ["even", "7"]),
        ({"mlp_bias": "no"}, ["mlp_bias", "'no'"]),
        ({"eos_token_id": ["</s>"]}, ["eos_token_id", "'</s>'"]),
        ({"eos_token_id": True}, ["eos_token_id", "True"]),
        ({"hidden_size": True}, ["hidden_size", "an integer", "True"]),
        (
            {"hidden_size": None, "vocab_size": None},
            ["hidden_size is missing", "vocab"],
        ),
        ({"vocab_size": 10**30}, ["vocab_size", "at most 2147483647"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most 10000"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
        ({"rope_theta": "x"}, ["rope_theta", "'x'"]),
        ({"rope_scaling": "linear"}, ["rope_scaling must be an object", "'linear'"]),
        ({"rope_scaling": {"rope_type": {}}}, ["rope_type {}", "linear"]),
        (
            {"rope_scaling": {"type": "linear"}},
            ["factor of the rope scaling is missing"],
        ),
        (
            {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 4.0}},
            ["rope_theta is 3 in the file, 4 in rope_parameters"],
        ),
    ],
)
def test_invalid_configs_name_the_values(change: dict[str, Any], words: list[str]):
    with pytest.raises(InputError) as caught:
        LlamaConfig.from_hf(reference.CONFIGS["llama-2"] | change)
    for word in words:
        assert word in str(caught.value)


def test_all_missing_keys_are_reported_at_once():
    with pytest.raises(InputError, match="hidden_size.*num_hidden_layers.*vocab_size"):
        LlamaConfig.from_hf({"model_type": "llama"})


def test_rope_scaling_validates_its_arguments():
    for kind in ("default", "yarn"):
        with pytest.raises(InputError, match=f"'{kind}' is not supported"):
            RopeScaling(kind, 2.0)
    with pytest.raises(InputError, match="low_freq_factor must be below"):
        RopeScaling("llama3", 8.0, low_freq_factor=4.0)


def test_lengths_that_the_model_does_not_know():
    config = LlamaConfig.from_hf(reference.CONFIGS["llama-2"])
    assert config.length_warning(4096) == ""
    warning = config.length_warning(4097)
    assert "4097 tokens" in warning and "max_position_embeddings 4096" in warning
