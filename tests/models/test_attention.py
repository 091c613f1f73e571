"""Attention in blocks and by kernels, against the plain form in float64 NumPy."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.models import attention_kernels
from manifold_lora.models.attention import blockwise_attention, causal_attention
from manifold_lora.models.remat import rematerialised
from tests.cases import slow_but
from tests.tolerances import BFLOAT16, FLOAT32

# The kernels for accelerators run as what they lower from, in interpret mode.
FORMS: dict[str, Callable[..., jax.Array]] = {
    "blocks": blockwise_attention,
    "splash": lambda *args: attention_kernels.splash(*args, interpret=True),
    "triton": lambda *args: attention_kernels.triton(*args, interpret=True),
}
B, H, N, D = 2, 4, 2, 16


def arrays(t: int, segments: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Queries, keys, values, the cotangent and sorted segment ids."""
    rng = np.random.default_rng(t)
    shapes = [(B, t, heads, D) for heads in (H, N, N, H)]
    q, k, v, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    ids = np.sort(rng.integers(0, segments, (B, t)))
    return q, k, v, w, jnp.asarray(ids, jnp.int32)


def reference(q, k, v, w, ids) -> list[np.ndarray]:
    """The output and the gradients of ⟨w, output⟩, restated by softmax's derivative."""
    q, k, v, w = (np.asarray(x, np.float64) for x in (q, k, v, w))
    t, group = q.shape[1], H // N
    ids = np.asarray(ids)
    k_of, v_of = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s = np.einsum("bthd,bshd->bhts", q, k_of) / np.sqrt(D)
    mask = np.tril(np.ones((t, t), bool)) & (ids[:, :, None] == ids[:, None])
    p = np.where(mask[:, None], np.exp(s - s.max(-1, keepdims=True)), 0)
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bshd->bhts", w, v_of)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(D)
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthd->bshd", p, w)
    shape = (B, t, N, group, D)
    return [
        np.einsum("bhts,bshd->bthd", p, v_of),
        np.einsum("bhts,bshd->bthd", ds, k_of),
        dk.reshape(shape).sum(3),
        dv.reshape(shape).sum(3),
    ]


def computed(form: Callable[..., jax.Array], *given: Any) -> list[jax.Array]:
    """The output and the gradients of ⟨w, output⟩."""
    q, k, v, w, ids = given
    y, pull = jax.vjp(lambda q, k, v: form(q, k, v, ids), q, k, v)
    return [y, *pull(w)]


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("form", "t"),
    slow_but(
        [("blocks", 600), ("blocks", 131), *itertools.product(FORMS, (5, 128))],
        [("blocks", 600), *itertools.product(FORMS, (1, 5, 128, 131, 300))],
    ),
)
def test_outputs_and_gradients_are_those_of_softmax(form: str, t: int, segments: int):
    given = arrays(t, segments)
    for actual, expected in zip(
        computed(FORMS[form], *given), reference(*given), strict=True
    ):
        size = np.abs(expected).max() + 1
        np.testing.assert_allclose(actual, expected, atol=2 * FLOAT32 * size)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rounds_its_results_only(form: str):
    given = arrays(131, 2, jnp.bfloat16)
    for actual, expected in zip(
        computed(FORMS[form], *given), reference(*given), strict=True
    ):
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float64) - expected).max()
        assert error < 2 * BFLOAT16 * (np.abs(expected).max() + 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_row_equals_its_segments_alone(form: str):
    q, k, v, w, _ = arrays(140, 1)
    lengths = (50, 90)
    ids = jnp.repeat(jnp.arange(2), jnp.array(lengths), total_repeat_length=140)
    packed = computed(FORMS[form], q, k, v, w, jnp.broadcast_to(ids, (B, 140)))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = computed(FORMS[form], *(x[:, part] for x in (q, k, v, w)), None)
        for actual, expected in zip(packed, alone, strict=True):
            np.testing.assert_allclose(actual[:, part], expected, atol=4 * FLOAT32)
        start += length


@pytest.mark.parametrize("order", ["interleaved", "falling", "padding first"])
def test_ids_need_not_rise_along_a_long_row(order: str):
    *given, ids = arrays(650, 5)
    ids = {
        "interleaved": ids[:, np.random.default_rng(0).permutation(650)],
        "falling": ids[:, ::-1],
        "padding first": jnp.where(jnp.arange(650) < 300, 0, 7),
    }[order]
    ids = jnp.broadcast_to(ids, (B, 650))
    for actual, expected in zip(
        computed(blockwise_attention, *given, ids),
        reference(*[*given, ids]),
        strict=True,
    ):
        size = np.abs(expected).max() + 1
        np.testing.assert_allclose(actual, expected, atol=2 * FLOAT32 * size)


def test_blocks_of_other_segments_are_not_computed():
    q, k, v, w, _ = arrays(1024, 1)
    ids = jnp.broadcast_to(jnp.arange(1024) // 200, (B, 1024))
    # Computed and masked, 0 · NaN would be NaN.
    k, v = (x.at[:, :512].set(jnp.nan) for x in (k, v))
    results = computed(blockwise_attention, q, k, v, w, ids)
    assert all(np.isfinite(x[:, 768:]).all() for x in results)


def test_dots_keeps_what_the_kernel_in_triton_computed():
    def kernels(remat: Any) -> int:
        def layer(x, _):
            q = x.reshape(1, 128, 2, 64)
            ids = jnp.zeros((1, 128), jnp.int32)
            return x + FORMS["triton"](q, q, q, ids).reshape(x.shape), None

        def loss(x):
            return jax.lax.scan(rematerialised(layer, remat), x, length=2)[0].sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 128, 128)))
        return str(jaxpr).count("pallas_call[")

    assert kernels("dots") == kernels("none") == kernels("block") - 1


def test_no_segment_ids_are_one_segment():
    q, k, v, w, ids = arrays(20, 1)
    for one, other in zip(
        computed(causal_attention, q, k, v, w, None),
        computed(causal_attention, q, k, v, w, ids),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporary(t: int) -> int:
        q, k, v, w, ids = arrays(t, 1)
        f = jax.jit(lambda q, k, v: computed(blockwise_attention, q, k, v, w, ids))
        analysis = f.lower(q, k, v).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(4096) < 4.5 * temporary(1024)
