"""A base in int8 or nf4: the rounding, loading, training, saving and merging."""

import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, attach, split
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama
from manifold_lora.checkpoints.peft import fingerprint, load_adapter, save_adapter
from manifold_lora.distributed.arrays import shard_module
from manifold_lora.methods import METHODS
from manifold_lora.models import Llama
from manifold_lora.models.layers import Linear
from manifold_lora.models.quantised import (
    NF4_LEVELS,
    BaseDtype,
    QuantisedEmbedding,
    QuantisedLinear,
    base_dtype_of,
    dequantise,
    quantised_parts,
)
from tests.cases import slow_but
from tests.distributed.cases import MESHES, build_mesh
from tests.models import reference
from tests.tolerances import FLOAT32

KINDS: tuple[BaseDtype, ...] = get_args(BaseDtype)
# Of 64 inputs and more, in blocks that a mesh of two does not split.
CONFIG = reference.CONFIGS["llama-3"] | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
TENSORS = reference.random_tensors(CONFIG)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 9)))


def nearest(w: np.ndarray, kind: BaseDtype) -> np.ndarray:
    """The weights (out, in) rounded to int8 or nf4, in NumPy."""
    blocks = w.astype(np.float64).reshape(len(w), -1, 64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scales = (largest / (127.5 if kind == "int8" else 1)).astype(np.float32)
    ratio = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    if kind == "int8":
        values = np.rint(ratio).clip(-127, 127)
    else:
        levels = np.array(NF4_LEVELS)
        values = levels[np.abs(ratio[..., None] - levels).argmin(-1)]
    stored = scales.astype(ml_dtypes.bfloat16).astype(np.float64)
    return (values * stored).reshape(w.shape)


def expected(kind: BaseDtype) -> dict[str, np.ndarray]:
    """All weights of the model as it computes with them."""
    rounded = {n: nearest(w, kind) for n, w in TENSORS.items() if "_proj" in n}
    return TENSORS | rounded | {EMBEDDING: nearest(TENSORS[EMBEDDING], "int8")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "base"
    return reference.write_checkpoint(path, CONFIG, TENSORS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[BaseDtype, Llama]:
    """Models whose weights are the rounded ones, not quantised."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        kind: load_llama(
            reference.write_checkpoint(
                folder / kind,
                CONFIG,
                {n: np.asarray(w, np.float32) for n, w in expected(kind).items()},
            )
        )
        for kind in KINDS
    }


def test_nf4_is_that_of_bitsandbytes():
    # quantize_4bit(w, blocksize=64, quant_type="nf4") of bitsandbytes 0.50.2
    w = np.sin(np.arange(128, dtype=np.float32) ** 2).reshape(2, 64)
    codes = np.frombuffer(
        bytes.fromhex(
            "7e1c4600f12f22f0073a0f9f092901f45f65f10c140fef030e14ecdbddd84f00"
            "2cfb301fbe5ff1ff2fec71d170e4d5fe08514419c0fee204bfe020c00f11f008"
        ),
        np.uint8,
    )
    largest = [0.9999908804893494, 0.9999943971633911]
    values, scales, _ = quantised_parts(jnp.asarray(w).T, "nf4")
    assert (values.dtype, scales.dtype) == (jnp.uint4, jnp.bfloat16)
    high_first = np.stack([codes >> 4, codes & 15], -1).reshape(w.shape)
    np.testing.assert_array_equal(values.astype(jnp.int32).T, high_first)
    np.testing.assert_array_equal(scales, np.asarray([largest], ml_dtypes.bfloat16))
    got = dequantise(values, jnp.asarray([largest], jnp.float32), "nf4").T
    levels = np.asarray(NF4_LEVELS, np.float32)[high_first]
    np.testing.assert_array_equal(
        got, levels * np.asarray(largest, np.float32)[:, None]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_nearest_in_float64(kind: BaseDtype):
    rng = np.random.default_rng(0)
    linear = Linear(128, 6, bias=True, rngs=nnx.Rngs(0))
    w = rng.normal(size=(6, 128)).astype(np.float32)
    w[0, :64] = 0  # a block without a scale
    linear.kernel.set_value(jnp.asarray(w.T))
    quantised = QuantisedLinear(linear, kind)
    np.testing.assert_allclose(
        quantised.dequantised(), nearest(w, kind).T, rtol=FLOAT32
    )
    x = rng.normal(size=(3, 128))
    y = quantised(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x @ nearest(w, kind).T, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_has_the_rounded_weights(kind: BaseDtype, base: Path):
    model = load_llama(base, base_dtype=kind)
    assert base_dtype_of(model) == kind
    got, needed = hf_tensors(model), expected(kind)
    assert got.keys() == needed.keys()
    for name, w in needed.items():
        np.testing.assert_allclose(got[name], w, rtol=FLOAT32, err_msg=name)
    assert fingerprint(model) == fingerprint(load_llama(base))
    assert jnp.isnan(model(jnp.array([[10**6]]))).all()  # as in any model


def test_a_tied_embedding_stays(tmp_path: Path):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = {n: w for n, w in TENSORS.items() if n != HEAD}
    path = reference.write_checkpoint(tmp_path / "tied", config, tensors)
    model = load_llama(path, base_dtype="nf4")
    assert not isinstance(model.embed_tokens, QuantisedEmbedding)
    np.testing.assert_array_equal(model.embed_tokens.table[...], tensors[EMBEDDING])


def trained_like(model: Llama, like: Any, method: str) -> tuple[Any, Any]:
    """Logits and the gradients of the factors, with an adapter."""
    attach(model, AdapterConfig(method, rank=4), 1)
    rebuild, factors, frozen = split(model)
    rng = np.random.default_rng(0)
    factors = jax.tree.map(lambda x: x + rng.normal(size=x.shape) / 8, factors)
    factors = jax.tree.map(lambda x: x.astype(jnp.float32), factors)

    @jax.jit
    def loss(factors: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        logits = rebuild(factors, frozen)(IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, like).sum(), (
            logits
        )

    gradients, logits = jax.grad(loss, has_aux=True)(factors, frozen)
    return logits, gradients


@pytest.mark.parametrize("method", slow_but(["stella"], METHODS))
@pytest.mark.parametrize("kind", slow_but(["nf4"], KINDS))
def test_methods_train_as_on_a_plain_base_of_rounded_weights(
    kind: BaseDtype, method: str, base: Path, plain: dict[BaseDtype, Llama]
):
    got = trained_like(load_llama(base, base_dtype=kind), IDS, method)
    needed = trained_like(nnx.clone(plain[kind]), IDS, method)
    for x, y in zip(*map(jax.tree.leaves, (got, needed)), strict=True):
        size = float(jnp.abs(y).max())
        np.testing.assert_allclose(x, y, atol=10 * FLOAT32 * max(size, 1e-3))


@pytest.mark.mesh
@pytest.mark.parametrize("kind", slow_but(["nf4"], KINDS))
def test_a_mesh_computes_the_same(kind: BaseDtype, base: Path):
    one = load_llama(base, base_dtype=kind)(IDS)
    with jax.set_mesh(build_mesh(MESHES[2])):
        model = load_llama(base, base_dtype=kind)
        shard_module(model)
        linear = model.layers.self_attn.q_proj
        assert isinstance(linear, QuantisedLinear)
        shards = {s.data.shape for s in linear.values[...].addressable_shards}
        assert shards == {(2, 64, 64)}
        logits = jax.jit(lambda ids: model(ids))(IDS)
    np.testing.assert_allclose(logits, one, atol=FLOAT32 * float(jnp.abs(one).max()))


def adapter(base: Path, path: Path, kind: BaseDtype | None) -> Llama:
    """A model with an adapter that is not zero, which is saved."""
    model = load_llama(base, base_dtype=kind)
    attach(model, AdapterConfig("lora", rank=4, targets=["q_proj", "down_proj"]))
    for variable in jax.tree.leaves(
        nnx.state(model, nnx.LoRAParam), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        shape = variable.shape
        values = np.random.default_rng(len(shape)).normal(size=shape) / 8
        variable.set_value(jnp.asarray(values, jnp.float32))
    nnx.update(model, nnx.state(model, nnx.LoRAParam))
    save_adapter(model, path, base_id="base")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_rounded_base_and_the_update(
    kind: BaseDtype, base: Path, tmp_path: Path
):
    model = adapter(base, tmp_path / "a", kind)
    config = ml.MergeConfig(
        model=base, adapters=(str(tmp_path / "a"),), out=tmp_path / "merged"
    )
    result = ml.merge_files(config)
    assert result["base_dtype"] == kind
    assert result["largest_logit_difference"] < 1e-5 * result["largest_logit"]
    pairs = load_file(tmp_path / "a" / "adapter_model.safetensors")
    merged = hf_tensors(load_llama(tmp_path / "merged"))
    needed = expected(kind)
    changed = 0
    for name, w in merged.items():
        delta: Any = 0.0
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in pairs:
            a, b = (pairs[f"{prefix}.lora_{x}.weight"] for x in "AB")
            delta, changed = b.astype(np.float64) @ a, changed + 1
        size = np.abs(needed[name]).max()
        np.testing.assert_allclose(w, needed[name] + delta, atol=FLOAT32 * size)
    assert changed == 4
    got = load_llama(tmp_path / "merged")(IDS)
    logits = model(IDS)
    size = float(jnp.abs(logits).max())
    np.testing.assert_allclose(got, logits, atol=10 * FLOAT32 * size)


def test_an_adapter_belongs_to_the_base_as_it_was_stored(base: Path, tmp_path: Path):
    model = adapter(base, tmp_path / "a", "nf4")
    assert '"base_dtype": "nf4"' in (tmp_path / "a" / "manifold_lora.json").read_text()
    assert "--base-dtype nf4" in (tmp_path / "a" / "README.md").read_text()
    again = load_llama(base, base_dtype="nf4")
    load_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(again(IDS), model(IDS))
    for kind in (None, "int8"):
        other = load_llama(base, base_dtype=kind)
        with pytest.raises(ml.InputError, match=r"trained on the base in nf4.*merge"):
            load_adapter(other, tmp_path / "a")
        load_adapter(other, tmp_path / "a", check_base=False)
    settings = tmp_path / "a" / "manifold_lora.json"
    settings.write_text(settings.read_text().replace('"nf4"', '"nf3"'))
    with pytest.raises(ml.InputError, match="base_dtype must be int8 or nf4"):
        load_adapter(load_llama(base), tmp_path / "a")


def test_a_base_that_has_no_blocks_of_64(tmp_path: Path):
    config = reference.CONFIGS["llama-3"]
    tensors = reference.random_tensors(config)
    path = reference.write_checkpoint(tmp_path / "base", config, tensors)
    with pytest.raises(ml.InputError, match=r"_proj.*multiple of 64.*got 32"):
        load_llama(path, base_dtype="nf4")


def test_without_qwix(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ml.InputError, match=r"manifold-lora\[quantised\]"):
        load_llama(base, base_dtype="int8")
