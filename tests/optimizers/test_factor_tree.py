"""Factors with other names, containers and orientations.

The products ΔW of the layouts are NumPy's einsum on the arrays as their owners write
them; the tall view must give the same numbers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from jax.sharding import AxisType

import manifold_lora as ml
from manifold_lora import NNX_LORA, QWIX_LORA, FactorSpec
from tests.optimizers.factor_layouts import LAYOUTS, assert_product, layouts, scanned
from tests.tolerances import BFLOAT16, FLOAT32, RESIDUAL

close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=FLOAT32)
equal = chex.assert_trees_all_equal


def names(spec):
    return spec.a.replace("*", "w"), spec.b.replace("*", "w")


def drawn(layout, seed=0):
    """A tree with two pairs of factors and another leaf."""
    spec, a, b, *_ = LAYOUTS[layout]
    rng = np.random.default_rng(seed)

    def nested(name, x):
        return functools.reduce(lambda x, k: {k: x}, reversed(name.split("/")), x)

    def module():
        pair = zip(names(spec), (a, b), strict=True)
        parts = [nested(n, rng.normal(size=s).astype("float32")) for n, s in pair]
        return {**parts[0], **parts[1], "scale": np.ones(3, "float32")}

    return {"q": module(), "k": [module()]}


def factor(module, name):
    return functools.reduce(lambda node, k: node[k], name.split("/"), module)


@layouts
def test_tall_factors_have_the_product_of_their_layout(layout):
    spec = LAYOUTS[layout][0]
    params = drawn(layout)
    tall = spec.to_tall(params)
    a, b = names(spec)
    assert set(spec.pairs(params)) == {(f"{p}/{a}", f"{p}/{b}") for p in ("q", "k/0")}
    for old, new in ((params["q"], tall["q"]), (params["k"][0], tall["k"][0])):
        a, b = (factor(old, n) for n in names(spec))
        assert_product(layout, a, b, *(factor(new, n) for n in names(spec)))
        assert new["scale"] is old["scale"]
    equal(spec.from_tall(tall, params), params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes(spec.to_tall(shapes), tall)


def test_the_product_depends_on_the_axes():
    spec, *_, product, _ = LAYOUTS["qwix-output"]
    module = drawn("qwix-output")["q"]
    a, b = (np.float64(module[n]) for n in names(spec))
    wrong = dataclasses.replace(spec, a_rank_axis=0).to_tall(module)["w_lora_a"]
    assert wrong.shape == (6, 4) != (8, 3)
    swapped = spec.to_tall({**module, "w_lora_a": np.swapaxes(a, 0, 1)})
    delta = np.float64(b.T @ np.asarray(swapped["w_lora_a"]).T)
    assert np.max(np.abs(delta - np.einsum(product, a, b).reshape(9, 8))) > 0.1


@pytest.mark.parametrize("layout", ["scan-1"])
def test_an_optimiser_within_tall_is_the_one_on_tall_arrays(layout):
    spec, *_ = LAYOUTS[layout]
    oblique, free = ml.Oblique(), ml.Euclidean()
    params = jax.jit(lambda p: spec.init(jax.random.key(0), p, b=oblique))(
        drawn(layout)
    )
    tree = {"w_lora_a": free, "w_lora_b": oblique, "scale": free}

    def step(tx, params, state, grads):
        updates, state = tx.update(grads, state, params, an_unknown_argument=1)
        return optax.apply_updates(params, updates), state

    def run(manifolds, wrapped, view):
        tx = wrapped(ml.riemannian(optax.adam(0.1), manifolds))
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        x, step_of = view(params), jax.jit(functools.partial(step, tx))
        state = tx.init(x)
        for seed in (1, 2):
            x, state = step_of(x, state, view(drawn(layout, seed)))
        return x, state

    point, state = run(spec.manifolds(b=oblique), spec.tall, lambda tree: tree)
    expected = run({"q": tree, "k": [tree]}, lambda tx: tx, spec.to_tall)
    close((spec.to_tall(point), state), expected)
    assert jax.tree.structure(point) == jax.tree.structure(params)
    assert np.max(np.abs(point["q"]["w_lora_a"])) > 0.1
    for module in (point["q"], point["k"][0]):
        b = np.float64(spec.to_tall(module)["w_lora_b"])
        assert np.max(np.abs(np.linalg.norm(b, axis=-2) - 1)) < RESIDUAL


def test_init():
    spec, *_ = LAYOUTS["scan-1"]  # Stiefel b, Euclidean a
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn("scan-1"))
    initial = jax.jit(lambda p: spec.init(jax.random.key(0), p))(params)
    for old, new in ((params["q"], initial["q"]), (params["k"][0], initial["k"][0])):
        chex.assert_trees_all_equal_shapes_and_dtypes(old, new)
        assert not new["w_lora_a"].any() and (new["scale"] == 1).all()
        b = np.asarray(spec.to_tall(new)["w_lora_b"], np.float64)
        gram = b.swapaxes(-1, -2) @ b
        assert np.max(np.abs(gram - np.eye(3))) < BFLOAT16
    assert np.max(np.abs(initial["q"]["w_lora_b"] - initial["k"][0]["w_lora_b"])) > 0.1


class Factors(NamedTuple):
    lora_a: Any
    lora_b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Adapter:
    lora_a: Any
    lora_b: Any


class Model(nnx.Module):
    def __init__(self, a, b, **metadata):
        lora = nnx.LoRA(5, 3, 8, rngs=nnx.Rngs(0), **metadata)
        self.layers = nnx.List([lora])
        self.layers[0].lora_a[...], self.layers[0].lora_b[...] = a, b


def state_of(a, b):
    return nnx.state(Model(a, b), nnx.LoRAParam)


def dict_of(a, b):
    return {"layers": [{"lora_a": a, "lora_b": b}]}


CONTAINERS = {
    "dict": dict_of,
    "NamedTuple": lambda a, b: {"q": Factors(a, b), "norm": jnp.ones(3)},
    "dataclass": lambda a, b: [Adapter(a, b), None],
    "nnx.State": state_of,
    "nnx pure": lambda a, b: nnx.to_pure_dict(state_of(a, b)),
    "nnx.FlatState": lambda a, b: nnx.to_flat_state(state_of(a, b)),
    "flat dict": lambda a, b: traverse_util.flatten_dict(
        {"q": Factors(a, b)._asdict()}
    ),
    "joined": lambda a, b: {"q/lora_a": a, "q/lora_b": b},
}


def recipe(spec=NNX_LORA):
    manifolds = spec.manifolds(b=ml.Oblique())
    return spec.tall(ml.riemannian(optax.sgd(0.1), manifolds))


@functools.cache
def pair():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(3, 8))
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    return jnp.asarray(a, "float32"), jnp.asarray(b, "float32")


@functools.cache
def moved():
    """The pair after a step on its own, with itself as the gradient."""
    params = dict(zip(("lora_a", "lora_b"), pair(), strict=True))
    grads = jax.tree.map(lambda x: x + 1, params)
    tx = recipe()
    with jax.disable_jit():
        updates, _ = tx.update(grads, tx.init(params), params)
    return list(jax.tree.leaves(optax.apply_updates(params, updates)))


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(build):
    params = build(*pair())
    tx = recipe()
    ((a, b),) = NNX_LORA.pairs(params)
    assert a.endswith("lora_a") and b.endswith("lora_b")
    with jax.disable_jit():
        state = tx.init(params)
        params = nnx.as_pure(params)  # what nnx.Optimizer gives to `update`
        grads = jax.tree.map(lambda x: x + 1, params)
        updates, _ = tx.update(grads, state, params)
        point = optax.apply_updates(params, updates)
    assert jax.tree.structure(point) == jax.tree.structure(params)
    factors = [x for x in jax.tree.leaves(point) if x.ndim == 2]
    equal(factors, moved())


def test_nnx_optimizer():
    """On a mesh nnx shards variables eagerly, by names that are not of tall axes."""
    with jax.set_mesh(jax.make_mesh((2,), ("tp",), (AxisType.Auto,))):
        names = {"out_sharding": (None, "tp")}
        module = Model(*pair(), b_metadata=names)
        grads = jax.tree.map(lambda x: x + 1, nnx.state(module, nnx.LoRAParam))
        tx = NNX_LORA.tall(optax.trace(0.9))
        optimizer = nnx.Optimizer(module, optax.chain(tx, recipe()), wrt=nnx.LoRAParam)
        optimizer.update(module, grads)
    layer = module.layers[0]
    points = [layer.lora_a[...], layer.lora_b[...]]
    close(points, moved())


def test_variables_stay_variables():
    params = state_of(*pair())
    tx = NNX_LORA.tall(optax.adam(0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    expected = optax.adam(0.1).update(params, optax.adam(0.1).init(params))[0]
    close(updates, expected)


def test_masks_placeholders_and_other_wrappings():
    params = {"adapter": dict_of(*pair()), "head": jnp.ones(3)}
    grads = jax.tree.map(lambda x: x + 1, params)
    labels = {"adapter": "ours", "head": "sgd"}
    tx = optax.partition({"ours": recipe(), "sgd": optax.sgd(1.0)}, labels)
    once = optax.MultiSteps(recipe(), 1).gradient_transformation()
    with jax.disable_jit():
        updates, _ = tx.update(grads, tx.init(params), params)
        point: Any = optax.apply_updates(params, updates)
        equal(jax.tree.leaves(point["adapter"]), moved())
        np.testing.assert_array_equal(point["head"], -1)
        adapter, g = params["adapter"], grads["adapter"]
        updates, _ = once.update(g, once.init(adapter), adapter)
        jax.tree.map(
            close, jax.tree.leaves(optax.apply_updates(adapter, updates)), moved()
        )
    momentum = NNX_LORA.tall(optax.sgd(0.1, momentum=0.9))
    state = momentum.init(params)
    mapped = optax.tree.map_params(momentum, lambda x: x + 1, state)
    equal(jax.tree.map(lambda x: x + 1, state), mapped)
    shapes = jax.eval_shape(lambda: params)
    tall = jax.eval_shape(momentum.init, shapes)
    assert {x.shape for x in jax.tree.leaves(tall)} == {(5, 3), (8, 3), (3,)}
    assert jax.tree.structure(momentum.init(shapes)) == jax.tree.structure(state)


def test_without_parameters():
    a, b = pair()
    plain = NNX_LORA.tall(optax.sgd(1.0))
    grads = dict_of(a, b)
    updates, _ = plain.update(grads, plain.init(grads))
    equal(updates, jax.tree.map(lambda g: -g, grads))
    constrained = recipe()
    with pytest.raises(ValueError, match="needs the parameters"):
        constrained.update(grads, constrained.init(grads))


ONES = np.ones


@pytest.mark.parametrize(
    ("spec", "params", "messages"),
    [
        (NNX_LORA, {"w": ONES((3, 2))}, ["'lora_a' or 'lora_b'", "leaves are w"]),
        (FactorSpec(), {"alpha": ONES((3, 2))}, ["No leaf matches 'a' or 'b'"]),
        (NNX_LORA, {"q": {"lora_a": ONES((3, 2))}}, ["q/lora_a has no partner"]),
        (QWIX_LORA, {"v_lora_a": ONES((3, 2)), "w_lora_b": ONES((2, 3))},
         ["v_lora_a has no partner", "w_lora_b has no partner", "by module"]),
        (NNX_LORA, {"q": {"lora_a": ONES((3, 2))}, "k": {"lora_b": ONES((2, 3))}},
         ["q/lora_a has", "k/lora_b has"]),
        (NNX_LORA, {"lora_a": ONES((3, 2)), "lora_b": ONES((3, 2))},
         [r"rank 2, lora_b has \(\) and 3", "Correct their rank_axis"]),
        (FactorSpec(), {"a": ONES((3, 2)), "b": ONES((4, 5, 2))},
         [r"a has layers \(\) and rank 2, b has \(4,\) and 2"]),
        (FactorSpec(), {"a": ONES(3), "b": ONES((5, 2))}, [r"a of shape \(3,\)"]),
        (scanned(layer_axes=(3,)), {"w_lora_a": ONES((3, 2))}, [r"axes \(3,\)"]),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit(spec, params, messages):
    with pytest.raises(ml.InputError) as error:
        spec.pairs(params)
    for message in messages:
        assert error.match(message)


def test_a_tree_without_factors_is_refused_everywhere():
    params = {"w": jnp.ones((4, 2))}
    makers = [
        lambda: NNX_LORA.tall(optax.sgd(0.1)).init(params),
        lambda: ml.riemannian(optax.sgd(0.1), NNX_LORA.manifolds()).init(params),
        lambda: NNX_LORA.init(jax.random.key(0), params),
    ]
    for make in makers:
        with pytest.raises(ml.InputError, match="Give a FactorSpec"):
            make()


@pytest.mark.parametrize(("a", "b"), [("a", "a"), ("*_a", "b")])
def test_names_that_do_not_form_pairs(a, b):
    with pytest.raises(ml.InputError, match="do not form pairs"):
        FactorSpec(a, b)


def test_an_initial_point_that_is_not_on_the_manifold():
    tx = QWIX_LORA.tall(ml.riemannian(optax.sgd(0.1), QWIX_LORA.manifolds()))
    params = {"w_lora_a": jnp.ones((5, 3)), "w_lora_b": jnp.zeros((3, 4, 2))}
    with pytest.raises(ml.InputError, match=r"\['w_lora_b'\]: .* violation of 1"):
        tx.init(params)


def test_a_wide_factor_needs_tall():
    params = dict_of(*pair())
    tx = ml.riemannian(optax.sgd(0.1), NNX_LORA.manifolds())
    with pytest.raises(ml.InputError, match=r"\['lora_b'\]: .* rows ≥ columns"):
        tx.init(params)
