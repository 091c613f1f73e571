"""Mistakes of users raise an error when the optimiser is created or initialised."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.tolerances import FLOAT32, RESIDUAL

STIEFEL, FREE = ml.Stiefel(), ml.Euclidean()
MAKERS = {
    "riemannian": lambda manifolds: ml.riemannian(optax.adam(0.1), manifolds),
    "stiefel_lora": lambda manifolds: ml.stiefel_lora(0.1, manifolds),
    "stella": lambda manifolds: ml.stella(0.1, manifolds, hidden_size=8),
    "loram": lambda manifolds: ml.loram(0.1, manifolds),
    "landing": lambda manifolds: ml.landing(optax.adam(0.1), manifolds),
    "landing_adamw": lambda manifolds: ml.landing_adamw(0.1, manifolds),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def point(*shape, dtype="float32"):
    x = np.random.default_rng(0).normal(size=shape)
    return np.linalg.qr(x)[0].astype(dtype)


@each
@pytest.mark.parametrize(
    ("manifolds", "params", "messages"),
    [
        ({"b": STIEFEL}, {"b": np.ones(4)}, [r"\['b'\]", r"\(4,\)", r"Euclidean\(\)"]),
        (STIEFEL, np.ones(()), ["the parameter", "rows, columns"]),
        ({"b": STIEFEL}, {"b": np.ones((3, 4))}, ["rows ≥ columns", "Transpose"]),
        ({"b": STIEFEL}, {"b": np.ones((2, 3, 4))}, [r"\(2, 3, 4\)", "rows ≥"]),
        ({"b": STIEFEL}, {"c": point(4, 2)}, ["not a prefix", "'b'", "'c'"]),
        ({"b": STIEFEL, "c": FREE}, {"b": point(4, 2)}, ["not a prefix", "'b'", "'c'"]),
        ({"b": [STIEFEL]}, {"b": point(4, 2)}, ["not a prefix", r"\[\*\]|\{'b': \*\}"]),
        ({"b": None}, {"b": point(4, 2)}, ["not a prefix", "None"]),
        (
            {"b": "stiefel"},
            {"b": point(4, 2)},
            [r"\['b'\]", "'stiefel' is not a manif"],
        ),
        ({"b": ml.Stiefel}, {"b": point(4, 2)}, [r"\['b'\]", "an instance"]),
    ],
)
def test_manifolds_that_do_not_fit(make, manifolds, params, messages):
    with pytest.raises(ml.InputError) as error:
        make(manifolds).init(params)
    for message in messages:
        assert error.match(message)


BOUNDED = ml.BoundedRank()


@pytest.mark.parametrize("name", ["riemannian", "loram"])
@pytest.mark.parametrize(
    ("manifolds", "params", "messages"),
    [
        (BOUNDED, {"x": point(5, 2)}, [r"\['x'\]", "a dict of a, v", "sub-tree"]),
        ({"a": BOUNDED, "v": BOUNDED}, {"a": point(5, 2), "v": point(4, 2)},
         [r"\['a'\]", r"\['v'\]", "a dict of a, v"]),
        ({"x": BOUNDED}, {"x": {"a": point(5, 2), "v": point(4, 3)}},
         [r"\['x'\]", "one rank", r"\(5, 2\)", r"\(4, 3\)"]),
        ({"x": BOUNDED}, {"x": {"a": point(5, 2), "v": 2 * point(4, 2)}},
         [r"\['x'\]", "violation of 3 on BoundedRank"]),
        ({"x": STIEFEL}, {"x": {"a": point(5, 2), "v": np.ones((2, 4))}},
         [r"\['x'\]\['v'\]", "rows ≥"]),
        ({"x": ml.FixedRank("orthographic")},
         {"x": {"u": point(5, 2), "s": np.ones((2, 3)), "v": point(4, 2)}},
         [r"\['x'\]", "s needs"]),
    ],
)  # fmt: skip
def test_coupled_points_that_do_not_fit(name, manifolds, params, messages):
    with pytest.raises(ml.InputError) as error:
        MAKERS[name](manifolds).init(params)
    for message in messages:
        assert error.match(message)


@pytest.mark.parametrize("manifold", [BOUNDED, ml.FixedRank()], ids=str)
def test_a_drifted_coupled_point_is_repaired_as_the_message_says(manifold):
    x = manifold.random_point(jax.random.key(0), (9, 7, 2))
    noise = 0.1 * jax.random.normal(jax.random.key(1), (7, 2))
    drifted = {**x, "v": x["v"] + noise}
    tx = ml.loram(0.1, manifold)
    with pytest.raises(ml.InputError, match="nearest_point"):
        tx.init(drifted)
    repaired = manifold.nearest_point(drifted)
    tx.init(repaired)

    def dense(x):
        x = {k: np.asarray(part, "float64") for k, part in x.items()}
        return (x["a"] if "a" in x else x["u"] @ x["s"]) @ x["v"].T

    np.testing.assert_allclose(dense(repaired), dense(drifted), atol=FLOAT32)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_point_that_is_not_on_its_manifold(kind):
    good, bad = point(8, 3), kind(2 * point(2, 8, 3))
    tx = ml.stiefel_lora(0.1, {"layers": STIEFEL, "a": FREE})
    params = {"layers": {"q": good, "k": bad}, "a": np.ones((4, 3), "float32")}
    with pytest.raises(ml.InputError) as error:
        tx.init(params)
    assert error.match(r"\['layers'\]\['k'\]: .* constraint violation of 3 on Stiefel")
    assert error.match("random_point") and error.match("nearest_point")
    assert "['q']" not in str(error.value) and "['a']" not in str(error.value)
    params["layers"]["k"] = jax.jit(STIEFEL.nearest_point)(bad)
    assert (STIEFEL.residual(params["layers"]["k"]) < RESIDUAL).all()
    tx.init(params)


@each
def test_all_problems_are_reported_at_once(make):
    params = {"p": np.ones(3), "q": np.ones((2, 3)), "r": np.ones((3, 2))}
    with pytest.raises(ml.InputError) as error:
        make(STIEFEL).init(params)
    assert [line[:5] for line in str(error.value).splitlines()] == [
        "['p']",
        "['q']",
        "['r']",
    ]


@pytest.mark.parametrize(
    ("dtype", "noise", "accepted"),
    [
        ("float32", 1e-6, True),
        ("float32", 1e-3, False),
        ("bfloat16", 1e-3, True),
        ("bfloat16", 0.1, False),
        ("float32", np.nan, False),
    ],
)
def test_tolerated_constraint_violation(dtype, noise, accepted):
    x = jnp.asarray(point(16, 3) * (1 + noise), dtype)
    tx = ml.riemannian(optax.sgd(0.1), STIEFEL)
    if accepted:
        tx.init(x)
    else:
        with pytest.raises(ml.InputError, match="on Stiefel"):
            tx.init(x)


@each
def test_init_under_jit_and_eval_shape(make):
    tx, off = make(STIEFEL), jnp.ones((5, 2))
    plain = tx.init(jnp.asarray(point(5, 2)))
    # The values of traced points are unknown; their shapes are checked all the same.
    for state in (jax.jit(tx.init)(off), jax.eval_shape(tx.init, off)):
        assert jax.tree.structure(state) == jax.tree.structure(plain)
    for trace in (jax.jit(tx.init), lambda x: jax.eval_shape(tx.init, x)):
        with pytest.raises(ml.InputError, match="rows ≥ columns"):
            trace(jnp.ones((2, 5)))
    # The values of a constant are known while tracing.
    jax.eval_shape(lambda: tx.init(jnp.asarray(point(5, 2))))
    with pytest.raises(ml.InputError, match="on Stiefel"):
        jax.eval_shape(lambda: tx.init(off))


@each
def test_parameters_are_needed(make):
    x = jnp.asarray(point(5, 2))
    tx = make(STIEFEL)
    with pytest.raises(ValueError, match="update\\(grads, state, params\\)"):
        tx.update(x, tx.init(x))


@pytest.mark.parametrize("gradient", ["reimannian", "natural", None])
def test_unknown_gradient(gradient):
    with pytest.raises(ml.InputError, match="Known: euclidean, riemannian") as error:
        ml.riemannian(optax.sgd(0.1), STIEFEL, gradient=gradient)
    assert error.match(f"no gradient {gradient!r}")
    assert ("Did you mean riemannian" in str(error.value)) == (gradient == "reimannian")
