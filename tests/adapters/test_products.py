"""Products with tall factors and their gradients, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.adapters.products import (
    sum_over_tokens,
    tall_product,
    wide_product,
)
from tests.tolerances import BFLOAT16, FLOAT32

N, R = 24, 3


@pytest.mark.parametrize("batch", [(), (5,), (2, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tall", "wide"])
def test_products_and_gradients(name: str, dtype: str, batch: tuple[int, ...]):
    rng = np.random.default_rng(len(batch))
    tall = name == "tall"
    columns, results = (N, R) if tall else (R, N)
    x = jnp.asarray(rng.normal(size=(*batch, columns)), dtype)
    w = jnp.asarray(rng.normal(size=(N, R)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(*batch, results)), dtype)
    product = tall_product if tall else wide_product
    y, pull = jax.vjp(product, x, w)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, jnp.float32)

    x64, dy64 = (np.asarray(a, np.float64) for a in (x, dy))
    w64 = np.asarray(w.astype(dtype), np.float64)  # rounded for the product
    flat_x, flat_dy = x64.reshape(-1, columns), dy64.reshape(-1, results)
    expected = flat_x.T @ flat_dy if tall else flat_dy.T @ flat_x
    matrix = w64 if tall else w64.T
    rounding = FLOAT32 if dtype == "float32" else BFLOAT16
    for actual, needed, tolerance in (
        (y, x64 @ matrix, rounding),
        (dx, dy64 @ matrix.T, rounding),
        (dw, expected, FLOAT32),
    ):
        size = np.abs(needed).max()
        error = np.abs(np.asarray(actual, np.float64) - needed).max()
        assert error < 2 * tolerance * size


def test_sums_over_tokens_do_not_transpose_activations():
    x, g = jnp.ones((4, 64, 96)), jnp.ones((4, 64, R))
    program = jax.jit(lambda x, g: sum_over_tokens(jnp.sin(x), g)).lower(x, g)
    text = program.compile().as_text()
    assert text is not None and "f32[96,256]" not in text
