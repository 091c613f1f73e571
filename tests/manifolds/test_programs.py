"""Lowered programs, for properties that numbers on a CPU cannot show."""

import jax
import numpy as np
import pytest

from tests.manifolds.table import PRODUCTS_ONLY, RETRACTIONS, ROWS, cast, over


def program(row, platform):
    """The lowered text of all operations."""
    rng = np.random.default_rng(8)
    x = row.draw(rng, row.stacked)
    x, v = cast((x, row.tangent(rng, x)), "float32")
    m = row.manifold

    def maps(x, v):
        gradient = m.riemannian_gradient(x, m.project(x, v))
        y = m.retract(x, gradient)
        return y, m.transport(x, y, v), m.inner(x, v, v), m.residual(y)

    lowered = jax.jit(maps).trace(x, v).lower(lowering_platforms=(platform,))
    return lowered.as_text()


@over(PRODUCTS_ONLY)
def test_no_operation_calls_lapack(row):
    assert "custom_call" not in program(row, "cpu")


@pytest.mark.parametrize(
    ("default", "platform"), [("bfloat16", "tpu"), ("tensorfloat32", "cuda")]
)
def test_precision_is_highest_whatever_the_default(default, platform):
    # A CPU computes everything in float32, so inspect the lowered program.
    with jax.default_matmul_precision(default):
        texts = [program(ROWS[name], platform) for name in RETRACTIONS]
    lines = [line for text in texts for line in text.splitlines()]
    products = [line for line in lines if "dot_general" in line]
    assert len(products) > 50 and all("HIGHEST" in line for line in products)
