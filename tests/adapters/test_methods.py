"""Every method against its formula in float64 NumPy: the model, its merged weights."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.adapters.options import inits
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama, save_llama
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.models import Linear
from tests import adapters as tiny
from tests.adapters import formulas
from tests.adapters.cases import ALPHA, CASES, FEW, RANK, config
from tests.tolerances import FLOAT32, LOGITS

# One of every form of y; all cases are compared layer by layer in test_gradients.
FORMS = [f"{method}-{inits(method)[0]}" for method in METHODS]
FORMS += ["lora-pissa", "lora-diagonal_scaling=True", "stella-diagonal_s=True"]


@pytest.mark.smoke
@pytest.mark.parametrize("case", FORMS)
def test_logits_are_those_of_the_formula(case: str, tmp_path: Path):
    targets = "all-linear" if case in ("lora-kaiming", "stiefel-random") else FEW
    model = tiny.base()
    model.remat = "none"  # compiles faster; it is compared below
    attach(model, config(case, targets=targets))
    found = tiny.arrays(tiny.randomize(model))
    assert len(found) == tiny.LAYERS * (7 if targets == "all-linear" else 3)
    method, diagonals = CASES[case]["method"], formulas.diagonals(model)
    assert bool(diagonals) == case.endswith("diagonal_scaling=True")
    weights = formulas.weights(method, found, ALPHA / RANK, diagonals)
    needed = tiny.needed_logits(weights)
    assert tiny.error(needed, tiny.needed_logits(tiny.TENSORS)) > 0.5
    got = tiny.logits(model)
    assert tiny.error(got, needed) < LOGITS

    ml.merge(model)
    plain = tiny.base()
    plain.remat = "none"
    assert str(nnx.graphdef(model)) == str(nnx.graphdef(plain))
    assert tiny.error(tiny.logits(model), got) < LOGITS
    for name, tensor in hf_tensors(model).items():
        assert tiny.error(tensor, weights[name]) < FLOAT32, name
    save_llama(model, tmp_path / "merged")
    again = hf_tensors(load_llama(tmp_path / "merged"))
    for name, tensor in hf_tensors(model).items():
        np.testing.assert_array_equal(again[name], tensor)


@pytest.mark.parametrize("method", ["lora", "dora", "stiefel"])
def test_rslora_scales_by_the_root(method: str):
    attach(model := tiny.base(), AdapterConfig(method, rank=2, alpha=5, rslora=True))
    found = tiny.arrays(tiny.randomize(model))
    needed = tiny.needed_logits(formulas.weights(method, found, 5 / math.sqrt(2)))
    assert tiny.error(tiny.logits(model), needed) < LOGITS


@pytest.mark.parametrize("method", ["lora", "stiefel"])
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


def layer(dropout: float = 0.0, rank: int = 2) -> Any:
    """One adapted layer, 6 to 5, without a layer axis and with a nonzero ΔW."""
    linear = Linear(6, 5, bias=True, rngs=nnx.Rngs(0))
    given = AdapterConfig("lora", rank=rank, alpha=3, dropout=dropout)
    module = LoRALinear(linear, given, key=jax.random.key(0))
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
    modules: dict[str, Any] = adapters(model)
    for name, module in modules.items():
        kernel, update = np.asarray(module.base.kernel[...]), module.weight()
        a, b = (np.asarray(x[...], np.float64) for x in (module.a, module.b))
        assert update.dtype == jnp.float32
        assert tiny.error(update, 5 / 2 * a @ b.swapaxes(1, 2)) < FLOAT32, name
        needed = kernel.astype(np.float32) + np.asarray(update)
        fused = module.merge()
        assert fused is module.base and type(fused) is Linear
        got = np.asarray(fused.kernel[...])
        assert got.dtype == (ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype)
        np.testing.assert_array_equal(got, needed.astype(got.dtype))


def test_the_rank_must_fit_the_layer():
    with pytest.raises(InputError, match="1 to 5.*--rank-pattern"):
        layer(rank=6)
