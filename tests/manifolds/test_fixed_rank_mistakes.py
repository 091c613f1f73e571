"""Known mistakes, each of which must break the law that is meant to find it."""

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


def transposed_inverse(right):
    def wrong(kernel, xs, cs, ds, qs, es):
        return right(kernel, xs, cs, ds, [qs[0], qs[1].mT], es)

    return wrong


def start_for_sum(right):
    s = jnp.asarray(draw(ONE)[0]["s"], "float32")
    results = iter([s])  # the first matrix to be inverted is C

    def wrong(a):
        return right(next(results, a).astype(a.dtype))

    return wrong


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("orthonormalise", transposed_inverse), ("inverse", start_for_sum)],
)
def test_mistakes_in_the_orthographic_retraction_are_found(name, mistake, monkeypatch):
    x, d, _ = draw(ONE)
    d = scaled(0.2, d)
    monkeypatch.setattr(fixed_rank, name, mistake(getattr(fixed_rank, name)))
    with precision("float64"):
        y = jax.jit(lambda x, d: ORTHOGRAPHIC.retract(x, d))(x, d)
    assert (
        reference.orthographic_error(x, dense_tangent(x, d), dense(y) - dense(x)) > 1e-3
    )


def test_transport_without_vp_is_found():
    r, _ = everything(ONE, "float64")
    x, y, d = r["x"], r["orthographic"], r["d"]
    with precision("float64"):
        wrong = TRANSPORT(x, y, d | {"v": 0 * d["v"]})
    right = reference.dense_projection(dense(y), dense_tangent(x, d), 3)
    assert np.abs(dense_tangent(y, wrong) - right).max() > 1e-3


def test_gradients_of_the_factors_in_place_of_the_pair_are_found():
    r, _ = everything(ONE, "float64")
    x, g = r["x"], r["g"]
    chain = {"u": g @ x["v"] @ x["s"].T, "v": g.T @ x["u"] @ x["s"], "s": x["s"]}
    with precision("float64"):
        wrong = dense_tangent(x, GRADIENT(x, chain))
    assert np.abs(wrong - reference.dense_projection(dense(x), g, 3)).max() > 1e-3


def test_projection_without_the_fold_is_found(monkeypatch):
    x, d, _ = draw(ONE)
    right = fixed_rank._normal

    def without_fold(x, d):
        u, _, v = right(x, d)
        return u, d[1], v

    monkeypatch.setattr(fixed_rank, "_normal", without_fold)
    with precision("float64"):
        p = jax.jit(lambda x, d: ORTHOGRAPHIC.project(x, d))(x, d)
    assert np.abs(dense_tangent(x, p) - reference.projection(x, d)).max() > 1e-3
