"""Adapters into a model and out of it: targets, trees, gradients and merging."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach, split
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama, save_llama
from manifold_lora.errors import InputError
from manifold_lora.manifolds import (
    BoundedRank,
    Euclidean,
    FixedRank,
    Oblique,
    Stiefel,
)
from manifold_lora.methods import METHODS
from tests import adapters as tiny
from tests.adapters.cases import FEW
from tests.models import reference
from tests.tolerances import LOGITS

A, B = Euclidean(), Euclidean()
FIXED, BOUNDED = FixedRank("orthographic"), BoundedRank()
MANIFOLDS = {
    "lora": {"a": A, "b": B},
    "dora": {"a": A, "b": B, "m": Euclidean()},
    "stiefel": {"a": A, "b": Stiefel("qr")},
    "stiefel_dora": {"a": A, "b": Stiefel("qr"), "m": Euclidean()},
    "stella": {"u": Stiefel(), "s": Euclidean(), "v": Stiefel()},
    "loram_fr": {"u": FIXED, "s": FIXED, "v": FIXED},
    "loram_br": {"a": BOUNDED, "v": BOUNDED},
    "landing_stiefel": {"a": A, "b": Stiefel()},
    "landing_oblique": {"a": A, "b": Oblique()},
}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("targets", "needed"),
    [
        ("all-linear", set(tiny.SIZES)),
        ("q_proj", {"self_attn.q_proj"}),
        ("mlp.up_proj", {"mlp.up_proj"}),
        (["q_proj", "down_proj"], {"self_attn.q_proj", "mlp.down_proj"}),
        (r"model\.layers\.\d+\.mlp\..*", MLP),
        (r".*\.(k|v)_proj", {"self_attn.k_proj", "self_attn.v_proj"}),
        (
            [f"model.layers.{n}.self_attn.o_proj" for n in range(3)],
            {"self_attn.o_proj"},
        ),
    ],
)
def test_targets_are_what_is_adapted(targets: str | Sequence[str], needed: set[str]):
    model = tiny.base()
    attach(model, AdapterConfig("lora", rank=2, targets=targets))
    assert adapters(model).keys() == needed
    ml.merge(model)  # of a ΔW of zero: every base weight is as and where it was
    for name, tensor in hf_tensors(model).items():
        np.testing.assert_array_equal(tensor, tiny.TENSORS[name])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": "q_porj"}, ["target 'q_porj'", "Did you mean q_proj", "k_proj"]),
        ({"targets": ["q_proj", "v_prj"]}, ["'v_prj'", "Did you mean v_proj"]),
        ({"targets": "q_pro."}, ["'q_pro.'", "whole name, such as model.layers.0."]),
        ({"targets": ["q_proj", "v_pro."]}, ["'v_pro.' matches no module"]),
        ({"targets": ["all-linear"]}, ["'all-linear' matches no module"]),
        ({"targets": "(q_proj"}, ["(q_proj", "not a regular expression"]),
        ({"rank_pattern": {"q_porj": 4}}, ["rank_pattern 'q_porj'", "mean q_proj"]),
        ({"rank_pattern": {"all-linear": 4}}, ["rank_pattern 'all-linear' matches no"]),
        ({"alpha_pattern": {"mlp": 4}}, ["alpha_pattern 'mlp' matches no module"]),
        ({"alpha_pattern": {"q_proj)": 4}}, ["q_proj)", "not a regular expression"]),
        (
            {"rank": 17},
            ["self_attn.k_proj: rank 17", "32 inputs and 16 outputs", "1 to 16"],
        ),
        ({"rank_pattern": {"down_proj": 33}}, ["mlp.down_proj: rank 33", "1 to 32"]),
        ({"method": "stiefle"}, ["unknown method 'stiefle'", "mean stiefel"]),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(
    config: dict[str, Any], words: list[str]
):
    model = tiny.base()
    before = str(nnx.graphdef(model))
    with pytest.raises(InputError) as caught:
        attach(model, AdapterConfig(**({"method": "lora", "rank": 2} | config)))
    for word in words:
        assert word in str(caught.value)
    assert str(nnx.graphdef(model)) == before and not adapters(model)


def test_layers_may_differ_in_what_is_adapted_in_rank_and_in_alpha():
    config = AdapterConfig(
        "stiefel",
        rank=2,
        alpha=6,
        targets=r"model\.layers\.[01]\.mlp\..*|.*\.2\.self_attn\.q_proj",
        rank_pattern={r"layers\.1\.mlp\.up_proj": 4},
        alpha_pattern={r"layers\.[12]\..*(up|q)_proj": 3},
    )
    attach(model := tiny.base(), config)
    found = adapters(model)
    assert {name: module.ranks for name, module in found.items()} == {
        "self_attn.q_proj": (0, 0, 2),
        "mlp.gate_proj": (2, 2, 0),
        "mlp.up_proj": (2, 4, 0),
        "mlp.down_proj": (2, 2, 0),
    }
    scales = {name: np.asarray(m.scale[...]).tolist() for name, m in found.items()}
    assert scales == {
        "self_attn.q_proj": [0, 0, 3 / 2],
        "mlp.gate_proj": [3, 3, 0],
        "mlp.up_proj": [3, 3 / 4, 0],
        "mlp.down_proj": [3, 3, 0],
    }


def test_a_model_takes_one_adapter():
    model = tiny.base()
    attach(model, AdapterConfig("lora", rank=2, targets="q_proj"))
    before = str(nnx.graphdef(model))
    with pytest.raises(InputError, match=r"already \(self_attn.q_proj\): merge"):
        attach(model, AdapterConfig("lora", rank=2, targets="v_proj"))
    assert str(nnx.graphdef(model)) == before
    ml.merge(model)
    attach(model, AdapterConfig("lora", rank=2, targets="v_proj"))
    assert adapters(model).keys() == {"self_attn.v_proj"}


@pytest.mark.parametrize("method", METHODS)
def test_manifolds_are_a_prefix_of_factors(method: str):
    attach(model := tiny.base(), AdapterConfig(method, rank=2, targets=FEW))
    factors, manifolds = ml.factors(model), ml.manifold_tree(model)
    seen = {}

    def note(path: Any, manifold: Any, below: Any) -> None:
        names = [key.key for key in path]
        leaves = below if manifold.parts else {names.pop(): below}
        for factor, leaf in leaves.items():
            assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
            seen[".".join(names[-2:]), factor] = manifold

    # a manifold has no leaves, so that a prefix tree is one to JAX only if all fit
    jax.tree_util.tree_map_with_path(
        note, manifolds, factors, is_leaf=lambda node: not isinstance(node, dict)
    )
    assert seen == {
        (name, factor): manifold
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for factor, manifold in MANIFOLDS[method].items()
    }


def test_a_model_without_adapters_has_no_factors():
    model = tiny.base()
    assert ml.factors(model) == {} == ml.manifold_tree(model)
    rebuild, factors, frozen = split(model)
    np.testing.assert_array_equal(
        tiny.logits(rebuild(factors, frozen)), tiny.logits(model)
    )


def test_set_factors_puts_them_where_they_came_from():
    attach(model := tiny.base(), AdapterConfig("stiefel", rank=2))
    numbered = {
        path: np.full(leaf.shape, n, np.float32)
        for n, (path, leaf) in enumerate(
            jax.tree_util.tree_leaves_with_path(ml.factors(model))
        )
    }
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(numbered[path]), ml.factors(model)
    )
    ml.set_factors(model, tree)
    for path, needed in numbered.items():
        _, part, name, factor = (getattr(key, "key", None) for key in path)
        module = adapters(model)[f"{part}.{name}"]
        np.testing.assert_array_equal(getattr(module, str(factor))[...], needed)
    assert jax.tree.structure(ml.factors(model)) == jax.tree.structure(tree)


def test_factors_of_another_model_are_refused():
    attach(model := tiny.base(), AdapterConfig("lora", rank=2, targets=["q_proj"]))
    before = ml.factors(model)
    q = before["layers"]["self_attn"]["q_proj"]
    other = {"b": q["b"][..., :1], "c": q["a"]}
    with pytest.raises(InputError) as caught:
        ml.set_factors(model, {"layers": {"self_attn": {"q_proj": other}}})
    for words in (
        "['a']: found None, needed (3, 32, 2)",
        "['b']: found (3, 32, 1), needed (3, 32, 2)",
        "['c']: found (3, 32, 2), needed None",
    ):
        assert words in str(caught.value)
    for got, needed in zip(
        jax.tree.leaves(ml.factors(model)), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(got, needed)


@pytest.mark.parametrize("method", METHODS)
def test_a_split_model_is_its_factors_and_its_frozen_rest(method: str):
    model = tiny.base()
    model.remat = "none"
    attach(model, AdapterConfig(method, rank=2, alpha=5, targets=FEW))
    rebuild, factors, frozen = split(tiny.randomize(model))
    variables = jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert not any(isinstance(x, nnx.LoRAParam) for x in variables)
    # the whole base, the scale of every projection, and of DoRA its first lengths
    own = len(FEW) * (2 if "dora" in method else 1)
    count = len(jax.tree.leaves(frozen)) - own
    assert count == len(jax.tree.leaves(nnx.state(tiny.base())))
    again = nnx.to_flat_state(nnx.state(rebuild(factors, frozen)))
    for (path, got), (same, needed) in zip(
        again, nnx.to_flat_state(nnx.state(model)), strict=True
    ):
        assert path == same
        np.testing.assert_array_equal(got[...], needed[...])
    if method in ("dora", "stiefel"):
        np.testing.assert_array_equal(
            tiny.logits(rebuild(factors, frozen)), tiny.logits(model)
        )


def test_layers_and_projections_drop_differently():
    """An input that is dropped at all positions leaves its row of A no gradient."""
    logits = []
    for dropout in (0.0, 0.5):
        config = AdapterConfig("lora", rank=2, alpha=5, dropout=dropout)
        attach(model := tiny.base(), config)
        logits.append(tiny.logits(tiny.randomize(model)))
    np.testing.assert_array_equal(*logits)  # without a key there is no dropout
    rebuild, factors, frozen = split(model)

    @jax.jit
    def gradient(key: jax.Array) -> Any:
        def loss(factors: Any) -> jax.Array:
            tokens = jnp.asarray(tiny.IDS[:1, :2])
            return jnp.sum(rebuild(factors, frozen)(tokens, key=key)[..., :9])

        return jax.grad(loss)(factors)

    def patterns(key: jax.Array) -> list[bytes]:
        found = []
        for modules in gradient(key)["layers"].values():
            for pair in modules.values():
                silent = (np.asarray(pair["a"]) == 0).all(axis=2)  # (layers, in)
                assert 0.05 < silent.mean() < 0.7
                found += [row.tobytes() for row in silent]
        return found

    first, again, other = (patterns(jax.random.key(seed)) for seed in (0, 0, 1))
    assert len(first) == len(set(first)) == len(tiny.SIZES) * tiny.LAYERS
    assert first == again and not set(first) & set(other)


def test_merge_is_the_same_function(tmp_path: Path):
    config = AdapterConfig("stiefel", rank=2, alpha=5, targets=[*MLP, "q_proj"])
    attach(model := tiny.base(), config)
    needed = tiny.logits(tiny.randomize(model))
    weights = tiny.updated(tiny.matrices(model), 5 / 2)

    with pytest.raises(InputError, match="merge first"):
        save_llama(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    ml.merge(model)
    assert not adapters(model) and ml.factors(model) == {}
    assert str(nnx.graphdef(model)) == str(nnx.graphdef(tiny.base()))
    assert tiny.error(tiny.logits(model), needed) < LOGITS
    save_llama(model, tmp_path / "merged")
    again = load_llama(tmp_path / "merged")
    np.testing.assert_array_equal(tiny.logits(again), tiny.logits(model))
    for name, tensor in hf_tensors(again).items():
        adapted = re.search("(gate|up|down|q)_proj", name)
        if not adapted:
            np.testing.assert_array_equal(tensor, tiny.TENSORS[name])
        # half a unit in the last place of numbers up to 2, and of the product
        assert tiny.error(tensor, weights[name]) < (2e-6 if adapted else 1e-30), name
    merged: reference.Tensors = hf_tensors(model)
    assert tiny.error(tiny.logits(model), tiny.needed_logits(merged)) < LOGITS


def test_merge_rounds_bfloat16_weights_once():
    attach(model := tiny.base(jnp.bfloat16), AdapterConfig("stiefel", rank=2))
    tiny.randomize(model)
    updates = {name: np.asarray(m.weight()) for name, m in adapters(model).items()}
    ml.merge(model)
    got = hf_tensors(model)
    for name in tiny.SIZES:
        for n in range(tiny.LAYERS):
            full = f"model.layers.{n}.{name}.weight"
            w = tiny.TENSORS[full].astype(got[full].dtype).astype(np.float32)
            needed = (w + updates[name][n].T).astype(got[full].dtype)
            np.testing.assert_array_equal(got[full], needed)


ORDERS = """
import importlib, sys

def fresh():
    for name in [n for n in sys.modules if n.partition(".")[0] == "manifold_lora"]:
        del sys.modules[name]

class Model:
    pass

def check(ml, geo):
    assert geo.Stiefel is ml.Stiefel and geo.Stiefel("qr").retraction == "qr"
    from flax import nnx
    config = ml.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    model = nnx.eval_shape(lambda: ml.Llama(config, rngs=nnx.Rngs(0)))
    assert ml.manifold_tree(model) == {} and not callable(geo)
    assert geo is ml.manifolds is sys.modules["manifold_lora.manifolds"]
    assert type(geo) is type(sys)
    import manifold_lora.manifolds.stiefel
    assert ml.manifolds.stiefel.Stiefel is ml.Stiefel

import manifold_lora as ml
ml.manifolds
import manifold_lora.manifolds as geo
check(ml, geo)
fresh()
import manifold_lora.manifolds as geo
import manifold_lora as ml
check(ml, geo)
fresh()
from manifold_lora import manifolds
import manifold_lora as ml
check(ml, manifolds)
fresh()
from manifold_lora.adapters import attach
import manifold_lora as ml
check(ml, importlib.import_module("manifold_lora.manifolds"))
"""


def test_manifolds_is_the_subpackage_in_every_order():
    subprocess.run([sys.executable, "-W", "error", "-c", ORDERS], check=True)
