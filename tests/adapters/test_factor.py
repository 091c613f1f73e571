"""What a method declares of its arrays is all that the library knows of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach, axes, split
from manifold_lora.adapters.attach import adapter_class
from manifold_lora.adapters.factor import Factor, tags
from manifold_lora.adapters.lora import LoRAOptions
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.methods import METHODS
from manifold_lora.training.step import largest_residual
from tests import adapters as tiny
from tests.adapters.cases import CASES, config
from tests.checkpoints.peft_files import FACTORS
from tests.tolerances import FLOAT32, LOGITS, RESIDUAL

RANKS = {"self_attn.q_proj": (3, 2, 0), "mlp.down_proj": (3, 2, 0)}
GIVEN: dict[str, Any] = {
    "rank": 2,
    "alpha": 5,
    "targets": r"model\.layers\.[01]\.(self_attn\.q|mlp\.down)_proj",
    "rank_pattern": {r"layers\.0\..*": 3},
}


class OtherNames(LowRankLinear):
    """y = W x + s (L C)(D R)ᵀ x + s L₀ R₀ᵀ x, in names that no other method has."""

    options = LoRAOptions

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """L is orthonormal, R has unit columns, and `still` is not trained."""
        del config
        return {
            "left": Factor(("out", "rank"), ml.Stiefel("qr"), padding="identity"),
            "core": Factor(("rank", "rank")),
            "gains": Factor(("rank",)),
            "right": Factor(("in", "rank"), ml.Oblique(), padding="identity"),
            "still": Factor(("in", "rank"), trained=False),
            "shift": Factor(("out",), trained=False),
        }

    @classmethod
    def init(cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig):
        """Random, and nothing is zero."""
        del config
        *batch, n, m = kernel.shape
        keys = jax.random.split(key, 6)
        return {
            "left": ml.Stiefel("qr").random_point(keys[0], (*batch, m, rank)),
            "core": jax.random.normal(keys[1], (*batch, rank, rank)),
            "gains": jax.random.normal(keys[2], (*batch, rank)),
            "right": ml.Oblique().random_point(keys[3], (*batch, n, rank)),
            "still": jax.random.normal(keys[4], (*batch, n, rank)),
            "shift": jax.random.normal(keys[5], (*batch, m)),
        }

    def delta(self, x: jax.Array) -> jax.Array:
        """The update, by its product."""
        a, b = self.pair()
        return self.scale[...] * (x @ a) @ b.mT

    @staticmethod
    def product(arrays: Any) -> tuple[jax.Array, jax.Array]:
        """[R D + still] and [diag(shift) L C]."""
        a = arrays["right"] * arrays["gains"][..., None, :] + arrays["still"]
        b = jnp.matmul(arrays["left"], arrays["core"], precision="highest")
        return a, arrays["shift"][..., None] * b


def update(x: dict[str, np.ndarray]) -> np.ndarray:
    """ΔW/s of one layer in float64."""
    x = {name: array.astype(np.float64) for name, array in x.items()}
    a = x["right"] @ np.diag(x["gains"]) + x["still"]
    return np.diag(x["shift"]) @ x["left"] @ x["core"] @ a.T


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    """With an adapter of other names, of ranks 3, 2 and 0, in place of LoRA's."""
    monkeypatch.setattr("manifold_lora.adapters.lora.LoRALinear", OtherNames)
    attach(model := tiny.base(), AdapterConfig("lora", **GIVEN))
    assert {n: m.ranks for n, m in adapters(model).items()} == RANKS
    return model


def needed_logits(model: ml.Llama) -> np.ndarray:
    """The logits with W + ΔW in float64, from the arrays at their own ranks."""
    tensors = {name: np.asarray(x, np.float64) for name, x in tiny.TENSORS.items()}
    for name, module in adapters(model).items():
        for layer, rank in enumerate(module.ranks[:2]):
            x = module.arrays()[layer]
            n, m = tiny.SIZES[name]
            assert {k: v.shape for k, v in x.items()} == {
                "left": (m, rank),
                "core": (rank, rank),
                "gains": (rank,),
                "right": (n, rank),
                "still": (n, rank),
                "shift": (m,),
            }
            full = f"model.layers.{layer}.{name}.weight"
            tensors[full] = tensors[full] + 5 / rank * update(x)
    return tiny.needed_logits(tensors)


def test_other_names_make_the_same_trees(model: ml.Llama):
    factors = ml.factors(model)["layers"]["mlp"]["down_proj"]
    manifolds = ml.manifold_tree(model)["layers"]["mlp"]["down_proj"]
    named = axes(model)["layers"]["mlp"]["down_proj"]
    inputs, outputs = adapters(model)["mlp.down_proj"].base.axes
    assert manifolds == {
        "left": ml.Stiefel("qr"),
        "core": ml.Euclidean(),
        "gains": ml.Euclidean(),
        "right": ml.Oblique(),
    }
    assert named == {
        "left": ("layers", outputs, "rank"),
        "core": ("layers", "rank", "rank"),
        "gains": ("layers", "rank"),
        "right": ("layers", inputs, "rank"),
    }
    # three rows more, where a layer that is not adapted has its ones
    assert {name: x.shape for name, x in factors.items()} == {
        "left": (3, 32 + 3, 3),
        "core": (3, 3, 3),
        "gains": (3, 3),
        "right": (3, 48 + 3, 3),
    }
    np.testing.assert_array_equal(factors["left"][2], np.eye(35, 3, k=-32))
    assert not factors["core"][2].any() and not factors["core"][1, 2].any()


def test_other_names_compute_train_and_merge(model: ml.Llama):
    assert tiny.error(tiny.logits(model), needed_logits(model)) < LOGITS
    rebuild, factors, frozen = split(model)
    manifolds = ml.manifold_tree(model)
    assert largest_residual(manifolds, factors) < RESIDUAL
    tx = ml.riemannian(optax.sgd(1e-2), manifolds)

    def loss(factors: Any) -> jax.Array:
        return jnp.mean(rebuild(factors, frozen)(jnp.asarray(tiny.IDS)) ** 2)

    @jax.jit
    def step(factors: Any) -> Any:
        updates, _ = tx.update(jax.grad(loss)(factors), tx.init(factors), factors)
        return optax.apply_updates(factors, updates)

    after = step(factors)
    assert largest_residual(manifolds, after) < RESIDUAL
    for before, now in zip(*map(jax.tree.leaves, (factors, after)), strict=True):
        moved = np.asarray(before != now).reshape(3, -1).any(axis=1)
        np.testing.assert_array_equal(moved, [True, True, False])
    ml.set_factors(model, after)
    needed = needed_logits(model)
    assert tiny.error(tiny.logits(model), needed) < LOGITS
    ml.merge(model)
    assert tiny.error(tiny.logits(model), needed) < LOGITS


def test_other_names_survive_a_file(model: ml.Llama, tmp_path: Path):
    ml.save_adapter(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / FACTORS)
    assert {key.rpartition(".")[2] for key in stored} == {
        *OtherNames.factors(AdapterConfig())
    }
    ml.load_adapter(again := tiny.base(), tmp_path / "a")
    for one, other in zip(*(adapters(m).values() for m in (model, again)), strict=True):
        assert type(other) is OtherNames and other.ranks == one.ranks
        for name in one.names:
            np.testing.assert_array_equal(
                getattr(one, name)[...][:2], getattr(other, name)[...][:2]
            )
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("case", CASES)
def test_the_declaration_describes_what_is_initialised(case: str):
    given = config(case)
    cls = adapter_class(given.method)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), jnp.float32)
    arrays = cls.init(jax.random.key(0), kernel, 2, given)
    declared = cls.factors(given)
    assert declared.keys() == arrays.keys()
    sizes = {"in": 9, "out": 8, "rank": 2}
    for name, factor in declared.items():
        assert arrays[name].shape == (2, *factor.shape(sizes))
        assert arrays[name].dtype == jnp.float32
        # of coupled factors, each alone
        if len(factor.axes) > 1 and factor.axes != ("rank", "rank"):
            assert factor.manifold.residual(arrays[name]).max() < RESIDUAL
        point = factor.part_of
        if point is not None:
            assert tags(declared) == dict.fromkeys(point.parts, point)


def test_every_method_declares_padding_on_its_manifold():
    for method in METHODS:
        given = AdapterConfig(method)
        for name, factor in adapter_class(method).factors(given).items():
            if len(factor.axes) < 2:
                continue
            sizes = {"in": 9, "out": 8, "rank": 1}
            x = np.eye(*factor.shape(sizes), dtype=np.float32)
            padded = factor.padded(x, 1, (1, 3, 0))
            assert factor.manifold.residual(jnp.asarray(padded)) < FLOAT32, name
            np.testing.assert_array_equal(factor.unpadded(padded, sizes), x)
