"""LoRA and Stiefel-LoRA against W + s B A in float64 NumPy, and how they start."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from manifold_lora.adapters import METHODS, AdapterConfig, adapters, attach, factors
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.errors import InputError
from manifold_lora.models import Linear
from tests import adapters as tiny
from tests.tolerances import FLOAT32, LOGITS, RESIDUAL

RANK, ALPHA = 2, 5
SCALES = {False: 5 / 2, True: 5 / math.sqrt(2)}  # by rslora


@pytest.mark.parametrize("rslora", SCALES, ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_updated_weights(method: str, rslora: bool):
    model = tiny.base()
    attach(model, AdapterConfig(method, rank=RANK, alpha=ALPHA, rslora=rslora))
    pairs = tiny.matrices(tiny.randomize(model))
    assert len(pairs) == len(tiny.SIZES) * tiny.LAYERS
    needed = tiny.needed_logits(tiny.updated(pairs, SCALES[rslora]))
    assert tiny.error(needed, tiny.needed_logits(tiny.TENSORS)) > 1
    assert tiny.error(tiny.logits(model), needed) < LOGITS


@pytest.mark.parametrize("method", METHODS)
def test_rank_and_alpha_may_differ_between_projections(method: str):
    config = AdapterConfig(
        method,
        rank=7,
        alpha=3,
        rank_pattern={"q_proj": 2, ".*_proj": 5},  # the first hit wins
        alpha_pattern={"mlp.*": 7, "gate_proj": 100},
        targets=["q_proj", "gate_proj", "up_proj"],
    )
    attach(model := tiny.base(), config)
    pairs = tiny.matrices(tiny.randomize(model))
    ranks = {"self_attn.q_proj": 2, "mlp.gate_proj": 5, "mlp.up_proj": 5}
    assert {n: m.rank for n, m in adapters(model).items()} == ranks
    scales = {"self_attn.q_proj": 3 / 2, "mlp.gate_proj": 7 / 5, "mlp.up_proj": 7 / 5}
    tensors = tiny.updated(pairs, lambda full: scales[full.split(".", 3)[3]])
    assert tiny.error(tiny.logits(model), tiny.needed_logits(tensors)) < LOGITS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
def test_the_model_starts_as_its_base_bit_for_bit(remat: bool, dtype: type):
    plain = tiny.base(dtype)
    plain.remat = remat
    needed = tiny.logits(plain)
    for method in METHODS:
        model = tiny.base(dtype)
        model.remat = remat
        attach(model, AdapterConfig(method, rank=RANK, alpha=ALPHA))
        np.testing.assert_array_equal(tiny.logits(model), needed)


@pytest.mark.parametrize("method", METHODS)
def test_starts(method: str):
    attach(model := tiny.base(jnp.bfloat16), AdapterConfig(method, rank=RANK))
    found = adapters(model)
    assert found.keys() == tiny.SIZES.keys()
    drawn = []
    for name, (inputs, outputs) in tiny.SIZES.items():
        a, b = (np.asarray(x[...]) for x in (found[name].a, found[name].b))
        assert a.shape == (tiny.LAYERS, inputs, RANK)
        assert b.shape == (tiny.LAYERS, outputs, RANK)
        assert a.dtype == b.dtype == np.float32  # also on a bfloat16 base
        if method == "lora":
            assert not b.any()
            bound = 1 / math.sqrt(inputs)
            assert 0.9 * bound < np.abs(a).max() <= bound
            assert a.min() < -0.9 * bound
            # standard deviation of the mean of n uniform numbers
            assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.size)
            drawn += list(a)
        else:
            assert not a.any()
            gram = b.astype(np.float64).swapaxes(1, 2) @ b
            assert tiny.error(gram, np.eye(RANK)[None]) < RESIDUAL
            drawn += list(b)
    # no two layers or projections share their numbers
    assert len({float(x[0, 0]) for x in drawn}) == len(drawn)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_start(method: str):
    def start(seed: int) -> list[np.ndarray]:
        config = AdapterConfig(method, rank=2, targets=["q_proj", "down_proj"])
        attach(model := tiny.base(), config, seed=seed)
        return [np.asarray(x) for x in jax.tree.leaves(factors(model)) if x.any()]

    first, again, other = start(0), start(0), start(1)
    assert len(first) == 2
    for one, same, changed in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != changed).any(axis=(1, 2)).all()


def layer(dropout: float = 0.0, rank: int = 2) -> LoRALinear:
    """One adapted layer, 6 to 5, without a layer axis and with a nonzero ΔW."""
    linear = Linear(6, 5, bias=True, rngs=nnx.Rngs(0))
    module = LoRALinear(
        linear, rank=rank, alpha=3, dropout=dropout, key=jax.random.key(0)
    )
    module.b.set_value(jax.random.normal(jax.random.key(1), (5, rank)))
    return module


def test_dropout_keeps_the_mean_and_has_its_variance():
    p, n = 0.3, 20_000
    module, x = layer(p), jax.random.normal(jax.random.key(2), (6,))
    outputs = jax.jit(jax.vmap(lambda key: module(x, key)))(
        jax.random.split(jax.random.key(3), n)
    )
    got = np.asarray(outputs, np.float64)
    a, b, w, x64 = (
        np.asarray(v, np.float64) for v in (module.a, module.b, module.base.kernel, x)
    )
    update = 3 / 2 * b @ a.T  # (out, in)
    variance = p / (1 - p) * (update**2 @ x64**2)  # of each output
    deviation = np.sqrt(variance / n)
    assert (np.abs(got.mean(0) - (x64 @ w + update @ x64)) < 4.5 * deviation).all()
    np.testing.assert_allclose(got.var(0), variance, rtol=0.1)


def test_dropout_without_a_key_is_none_and_with_one_it_is_of_that_key():
    module, x = layer(0.5), jax.random.normal(jax.random.key(2), (3, 6))
    np.testing.assert_array_equal(module(x), layer(0.0)(x))
    keys = jax.random.split(jax.random.key(4))
    np.testing.assert_array_equal(module(x, keys[0]), module(x, keys[0]))
    assert (module(x, keys[0]) != module(x, keys[1])).any()
    np.testing.assert_array_equal(layer(0.0)(x, keys[0]), layer(0.0)(x))


def test_the_base_is_never_dropped():
    module, x = layer(0.9), jax.random.normal(jax.random.key(2), (3, 6))
    module.b.set_value(jnp.zeros((5, 2)))
    np.testing.assert_array_equal(module(x, jax.random.key(0)), module.base(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fuse_rounds_once(dtype: type):
    attach(model := tiny.base(dtype), AdapterConfig("lora", rank=RANK, alpha=ALPHA))
    tiny.randomize(model)
    for name, module in adapters(model).items():
        kernel, update = np.asarray(module.base.kernel[...]), module.weight()
        a, b = (np.asarray(x[...], np.float64) for x in (module.a, module.b))
        assert update.dtype == jnp.float32
        assert tiny.error(update, 5 / 2 * a @ b.swapaxes(1, 2)) < FLOAT32, name
        needed = kernel.astype(np.float32) + np.asarray(update)
        fused = module.fuse()
        assert fused is module.base and type(fused) is Linear
        got = np.asarray(fused.kernel[...])
        assert got.dtype == (ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype)
        np.testing.assert_array_equal(got, needed.astype(got.dtype))


@pytest.mark.parametrize("rank", [0, 6])
def test_the_rank_must_fit_the_layer(rank: int):
    with pytest.raises(InputError, match="1 to 5.*--rank-pattern"):
        layer(rank=rank)


def test_a_factor_carries_its_manifold():
    kinds: dict[str, Any] = {
        name: [type(method.manifolds[factor]).__name__ for factor in "ab"]
        for name, method in METHODS.items()
    }
    assert kinds == {
        "lora": ["Euclidean", "Euclidean"],
        "stiefel": ["Euclidean", "Stiefel"],
    }
