"""Mutations of FixedRank, each of which must violate a law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.manifolds import fixed_rank
from tests.manifolds import reference_fixed_rank as reference
from tests.manifolds.fixed_rank_case import (
    GRADIENT,
    ONE,
    ORTHOGRAPHIC,
    TRANSPORT,
    draw,
    everything,
    precision,
    scaled,
)
from tests.manifolds.reference_fixed_rank import dense, dense_tangent


def transposed_inverse(original):
    def mutated(kernel, xs, cs, ds, qs, es, grams):
        return original(kernel, xs, cs, ds, [qs[0], qs[1].mT], es, grams)

    return mutated


def s_for_c(original):
    s = jnp.asarray(draw(ONE)[0]["s"], "float32")
    results = iter([s])  # the first matrix to be inverted is C

    def mutated(a):
        return original(next(results, a).astype(a.dtype))

    return mutated


@pytest.mark.parametrize(
    ("name", "mutation"),
    [("orthonormalise", transposed_inverse), ("inverse", s_for_c)],
)
def test_mutations_of_the_orthographic_retraction(name, mutation, monkeypatch):
    x, d, _ = draw(ONE)
    d = scaled(0.2, d)
    monkeypatch.setattr(fixed_rank, name, mutation(getattr(fixed_rank, name)))
    with precision("float64"):
        y = jax.jit(lambda x, d: ORTHOGRAPHIC.retract(x, d))(x, d)
    assert (
        reference.orthographic_error(x, dense_tangent(x, d), dense(y) - dense(x)) > 1e-3
    )


def test_transport_without_vp():
    r, _ = everything(ONE, "float64")
    x, y, d = r["x"], r["orthographic"], r["d"]
    with precision("float64"):
        moved = TRANSPORT(x, y, d | {"v": 0 * d["v"]})
    expected = reference.dense_projection(dense(y), dense_tangent(x, d), 3)
    assert np.abs(dense_tangent(y, moved) - expected).max() > 1e-3


def test_gradients_of_the_factors_instead_of_the_pair():
    r, _ = everything(ONE, "float64")
    x, g = r["x"], r["g"]
    chain = {"u": g @ x["v"] @ x["s"].T, "v": g.T @ x["u"] @ x["s"], "s": x["s"]}
    with precision("float64"):
        gradient = dense_tangent(x, GRADIENT(x, chain))
    assert np.abs(gradient - reference.dense_projection(dense(x), g, 3)).max() > 1e-3


def test_projection_without_the_fold(monkeypatch):
    x, d, _ = draw(ONE)
    original = fixed_rank._normal_form

    def without_fold(x, d):
        u, _, v = original(x, d)
        return u, d[1], v

    monkeypatch.setattr(fixed_rank, "_normal_form", without_fold)
    with precision("float64"):
        p = jax.jit(lambda x, d: ORTHOGRAPHIC.project(x, d))(x, d)
    assert np.abs(dense_tangent(x, p) - reference.projection(x, d)).max() > 1e-3
