"""Damaged models and adapters, and those of others: named and refused."""

import json
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters.config import is_target
from manifold_lora.checkpoints.companions import copy_companions, stop_tokens
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.checkpoints.tensors import all_finite
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.errors import InputError
from tests import adapters as tiny
from tests.tiny import model_directory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path):
    model = tiny.base()
    ml.attach(model, ml.AdapterConfig("lora", rank=2, targets="q_proj"))
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "manifold_lora.json").unlink()
    return tmp_path / "a"


@pytest.fixture
def model(tmp_path):
    return model_directory(tmp_path / "m")


def change(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content))


def refused(read, *words):
    with pytest.raises(InputError) as caught:
        read()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 0),
        ("lora_alpha", "8"),
        ("lora_alpha", 10**400),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("lora_dropout", 1.5),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", 3),
        ("target_modules", 7),
        ("use_rslora", "yes"),
        ("exclude_modules", 3),
        ("layers_to_transform", ["0"]),
        ("bias", 0),
        ("fan_in_fan_out", 0),
    ],
)
def test_values_of_an_adapter_config(adapter, key, value):
    change(adapter / CONFIG, **{key: value})
    refused(lambda: load_adapter(tiny.base(), adapter), CONFIG, key)


@pytest.mark.parametrize("text", ["[" * 100000, '{"r": NaN}', '{"r": ' + "9" * 5000])
def test_json_that_is_not_json(adapter, text):
    (adapter / CONFIG).write_text(text)
    refused(lambda: load_adapter(tiny.base(), adapter), CONFIG)


@pytest.mark.parametrize(
    ("kind", "word"),
    [(np.int32, "I32"), (np.bool_, "BOOL"), (np.complex64, "C64"),
     (ml_dtypes.float8_e4m3fn, "F8_E4M3")],
)  # fmt: skip
def test_tensors_of_other_types(adapter, kind, word):
    tensors = load_file(adapter / WEIGHTS)
    tensors[KEY] = np.ones_like(tensors[KEY]).astype(kind)
    save_file(tensors, adapter / WEIGHTS)
    refused(lambda: load_adapter(tiny.base(), adapter), KEY, word, "needed one of F64")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(adapter, value):
    tensors = load_file(adapter / WEIGHTS)
    tensors[KEY] = tensors[KEY].copy()
    tensors[KEY][1, 3] = value
    save_file(tensors, adapter / WEIGHTS)
    refused(lambda: load_adapter(tiny.base(), adapter), KEY, "NaN or infinity")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_finite(kind):
    x = np.array([[0, 1, -65000, 6e-8], [3, 4, 5, 6]]).astype(kind)
    assert all_finite(x) and all_finite(x[:, 1:3])
    for value in (np.nan, np.inf, -np.inf):
        x[1, 2] = value
        assert not all_finite(x) and not all_finite(x[:, 2:]) and all_finite(x[:1])


def test_a_module_that_is_missing_whole(adapter):
    tensors = load_file(adapter / WEIGHTS)
    save_file({k: x for k, x in tensors.items() if "layers.1." not in k},
              adapter / WEIGHTS)  # fmt: skip
    name = "model.layers.1.self_attn.q_proj: missing"
    refused(lambda: load_adapter(tiny.base(), adapter), name)
    change(adapter / CONFIG, layers_to_transform=[0, 2])
    load_adapter(tiny.base(), adapter)
    change(adapter / CONFIG, layers_to_transform=[0])
    name = "model.layers.2.self_attn.q_proj: unexpected"
    refused(lambda: load_adapter(tiny.base(), adapter), name)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_modules": ["k_proj"]}, ["0.self_attn.q", "1.self_attn.k_proj: miss"]),
        ({"exclude_modules": ["q_proj"]}, ["2.self_attn.q_proj: unexpected"]),
        (
            {"target_modules": r".*[02]\.self_attn\.q_proj"},
            ["1.self_attn.q_proj: unex"],
        ),
        ({"layers_to_transform": 1}, ["0.self_attn", "2.self_attn.q_proj: unexpected"]),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, ["1.self_attn.q"]),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]}, []),
        ({"layers_to_transform": []}, []),
    ],
)
def test_modules_that_peft_does_not_adapt(adapter, settings, names):
    """By PEFT's rules; `tests/checkpoints/test_peft_parity.py` compares them."""
    change(adapter / CONFIG, **settings)
    if names:
        refused(lambda: load_adapter(tiny.base(), adapter), *names)
    else:
        load_adapter(tiny.base(), adapter)


@pytest.mark.parametrize("targets", [["q_proj", "x"], "k_proj", ["k_proj"]])
def test_targets_of_our_own_file(tmp_path, targets):
    model = tiny.base()
    ml.attach(model, ml.AdapterConfig("stella", rank=2, targets="q_proj"))
    save_adapter(model, tmp_path / "a")
    change(tmp_path / "a" / "manifold_lora.json", targets=targets)
    refused(lambda: load_adapter(tiny.base(), tmp_path / "a"), "manifold_lora.json")


def test_a_regular_expression_that_backtracks_for_ever():
    started = time.perf_counter()
    refused(lambda: is_target("(a|aa)+c", "a" * 60), "takes more than 1 seconds")
    assert time.perf_counter() - started < 30  # not for ever, on a busy machine too


def test_weights_of_a_model_that_are_not_finite(model):
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 3] = np.nan
    save_file(tensors, file)
    refused(lambda: load_llama(model), name, "NaN or infinite")


def test_a_billion_layers_take_no_memory(model):
    change(model / "config.json", num_hidden_layers=10**9)
    refused(lambda: load_llama(model), "config.json", "1000000000")


def sharded(model, **where):
    """The model in two files, with the index."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    parts = {"x.safetensors": {}, "y.safetensors": {}}
    weight_map = {}
    for number, (name, x) in enumerate(sorted(tensors.items())):
        weight_map[name] = sorted(parts)[number % 2]
        parts[weight_map[name]][name] = x
    index = {"weight_map": weight_map | where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, part in parts.items():
        save_file(part, model / name)
    return parts


def test_the_index_decides_where_a_tensor_is(model):
    expected = load_llama(model)
    parts = sharded(model)
    np.testing.assert_array_equal(
        load_llama(model).embed_tokens.table[...], expected.embed_tokens.table[...]
    )
    name = "model.norm.weight"
    home = next(part for part, tensors in parts.items() if name in tensors)
    other = next(part for part in parts if part != home)
    save_file(parts[other] | {name: parts[home][name] * 2}, model / other)
    refused(lambda: load_llama(model), f"{name} is in two files")
    save_file(parts[other], model / other)
    del parts[home][name]
    save_file(parts[home], model / home)
    refused(lambda: load_llama(model), f"{name} is not in {home}")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "absent"])
def test_shards_that_are_not_beside_the_index(model, name):
    sharded(model, **{"model.norm.weight": name})
    refused(lambda: load_llama(model), name)


def test_a_tied_model_with_a_head_of_its_own(model):
    """transformers 5 ties the head only if the file's is the embedding."""
    change(model / "config.json", tie_word_embeddings=True)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert load_llama(model).config.tie_word_embeddings
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, file)
    loaded = load_llama(model)
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head is not None
    head = np.asarray(loaded.lm_head.kernel[...])
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].T)


def test_companions(model, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    for name in ("chat_template.jinja", "special_tokens_map.json", "merges.txt"):
        (model / name).write_text(name)
    (tmp_path / "merged").mkdir()
    copy_companions(model, tmp_path / "merged")
    copied = {p.name for p in (tmp_path / "merged").iterdir()}
    assert copied >= {"tokenizer.json", "chat_template.jinja", "merges.txt"}
    assert "model.safetensors" not in copied and "config.json" not in copied
    for path in (tmp_path / "merged").rglob("*.j*"):
        original = model / path.relative_to(tmp_path / "merged")
        assert path.read_bytes() == original.read_bytes()


def test_stop_tokens_of_all_three_files(model):
    tokenizer = load_tokenizer(model)
    change(model / "config.json", eos_token_id=7)
    (model / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    eos = int(str(tokenizer.eos_token_id))
    assert stop_tokens(model, tokenizer) == tuple(sorted({7, 8, 9, eos}))
    (model / "generation_config.json").write_text('{"eos_token_id": "x"}')
    refused(lambda: stop_tokens(model, tokenizer), "generation_config.json", "'x'")
