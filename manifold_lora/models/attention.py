"""Causal self-attention without the t × t matrix, by backend.

    TPU             splash attention, a Pallas kernel with segment ids
    NVIDIA GPU      cuDNN where rows hold one sequence, else a Pallas kernel with
                    segment ids; in float32 as elsewhere
    elsewhere       blocks of queries and keys with a running softmax

`blockwise_attention` runs everywhere; the kernels of `attention_kernels` compute the
same.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from manifold_lora.models import attention_kernels
from manifold_lora.models.precision import matmul
from manifold_lora.models.remat import attention_output

_BLOCK = 128  # queries and keys of one block; fastest on CPUs from 64 to 256
# Blocks of a row whose loops are written out, which is faster, but computes all blocks:
# with one segment to a row, and with several.
_UNROLLED = (4, 2)
_MASKED = -1e30  # finite, so that a block without any key gives no NaN


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """softmax(Q Kᵀ / √d) V over the tokens before and at each query, in its segment.

    The form is chosen by the platform of the ambient mesh, or of the default backend
    without one, so that a program compiled for a TPU on another machine is a TPU's.

    Args:
        q: queries, (b, t, h, d).
        k: keys, (b, t, n, d), where n divides h.
        v: values, (b, t, n, d).
        segment_ids: (b, t) integers; None if all tokens of a row are one segment.

    Returns:
        (b, t, h, d), in the dtype of q.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> causal_attention(x, x, x).shape
    (1, 5, 2, 4)
    """
    platform = _platform()
    if platform == "tpu":
        return attention_kernels.splash(q, k, v, segment_ids)
    if platform in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        if segment_ids is None:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation="cudnn"
            )
        return attention_kernels.triton(q, k, v, segment_ids)
    return blockwise_attention(q, k, v, segment_ids)


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


class _Blocks(NamedTuple):
    """Queries, keys and values in blocks of B tokens, grouped by key head."""

    q: jax.Array  # (blocks, b, n, h/n · B, d), times 1/√d
    k: jax.Array  # (blocks, b, n, B, d)
    v: jax.Array  # (blocks, b, n, B, d)
    segment_ids: jax.Array  # (blocks, b, B)


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`causal_attention` in blocks, for any backend, dtype and length.

    A block of queries visits the blocks of keys up to its own with a running maximum m
    and total of its softmax, in float32. Saved for the backward pass are O and the
    log-sum-exp L of each query; the weights P are computed again. Memory is
    O(b h B²) beside the arguments.

    References:
        Dao, "FlashAttention-2", 2023, arXiv:2307.08691, Algorithms 1 and 2.
    """
    b, t, _, _ = q.shape
    count = -(-t // _BLOCK)
    size = -(-t // count)
    unrolled = count <= _UNROLLED[segment_ids is not None]
    if segment_ids is None:
        segment_ids = jnp.zeros((b, t), jnp.int32)
    if padding := count * size - t:  # after all queries, which do not attend to it
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v)
        )
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    y: Any = _blockwise(size, unrolled, q, k, v, segment_ids)
    return y[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(size: int, unrolled: bool, q, k, v, segment_ids):
    return _forward(size, unrolled, q, k, v, segment_ids)[0]


def _forward(size: int, unrolled: bool, q, k, v, segment_ids):
    group = q.shape[2] // k.shape[2]
    blocks = _split(size, q, k, v, segment_ids)

    def queries(i):
        q_i = blocks.q[i]

        def keys(j, carry):
            m, total, o = carry
            s = _scores(blocks, i, j, q_i, group)
            m_next = jnp.maximum(m, s.max(-1, keepdims=True))
            p, shrink = jnp.exp(s - m_next), jnp.exp(m - m_next)
            o = shrink * o + matmul(p.astype(q.dtype), blocks.v[j])
            return m_next, shrink * total + p.sum(-1, keepdims=True), o

        start = _first_keys(blocks, i)
        zero = jnp.zeros((*q_i.shape[:-1], 1), jnp.float32)
        o = jnp.zeros(q_i.shape, jnp.float32)
        m, total, o = _loop(start, i + 1, keys, (zero + _MASKED, zero, o))
        return (o / total).astype(q.dtype), m + jnp.log(total)

    o, log_sum_exp = _map(queries, len(blocks.q), unrolled)
    o, log_sum_exp = attention_output(o), attention_output(log_sum_exp)
    return _join(o, group), (q, k, v, segment_ids, o, log_sum_exp)


def _backward(size: int, unrolled: bool, saved, cotangent):
    *arguments, o, log_sum_exp = saved
    q, k, v, _ = arguments
    group = q.shape[2] // k.shape[2]
    blocks = _split(size, *arguments)
    do = _split_heads(cotangent, size, k.shape[2])
    d = _row_sums(do, o)

    def queries(carry, i):
        q_i, do_i, d_i, log_sum_exp_i = blocks.q[i], do[i], d[i], log_sum_exp[i]

        def keys(j, carry):
            dq_i, dk, dv = carry
            p = jnp.exp(_scores(blocks, i, j, q_i, group) - log_sum_exp_i)
            dv = dv.at[j].add(matmul(p.astype(q.dtype).mT, do_i))
            ds = p * (matmul(do_i, blocks.v[j].mT) - d_i)
            ds = ds.astype(q.dtype)
            dk = dk.at[j].add(matmul(ds.mT, q_i))
            return dq_i + matmul(ds, blocks.k[j]), dk, dv

        dq_i = jnp.zeros(q_i.shape, jnp.float32)
        start = _first_keys(blocks, i)
        dq_i, *carry = _loop(start, i + 1, keys, (dq_i, *carry))
        return tuple(carry), dq_i

    zero = jnp.zeros(blocks.k.shape, jnp.float32)
    (dk, dv), dq = _scan(queries, (zero, zero), len(blocks.q), unrolled)
    dq = _join(dq, group) / math.sqrt(q.shape[-1])
    dk, dv = _join(dk, 1), _join(dv, 1)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _first_keys(blocks: _Blocks, i) -> Any:
    """The first block of keys that block i of queries may share a segment with.

    Two blocks whose ranges of ids are disjoint in every row share none: of rows with
    many packed sequences only the blocks at the diagonal are computed. Not on a mesh,
    where the groups of devices would have to agree on it.
    """
    if isinstance(i, int) or jax.sharding.get_abstract_mesh().size > 1:
        return 0
    ids = blocks.segment_ids  # (blocks, b, B)
    low, high = ids.min(-1), ids.max(-1)  # (blocks, b)
    shared = (low <= high[i]) & (high >= low[i])
    return jnp.argmax(shared.any(-1))


def _loop(start, stop, body, carry):
    """`fori_loop`, unrolled where the ends are known."""
    if not isinstance(stop, int):
        return jax.lax.fori_loop(start, stop, body, carry)
    for j in range(start, stop):
        carry = body(j, carry)
    return carry


def _scan(body, carry, count: int, unrolled: bool):
    """`scan` over the indices of blocks."""
    if not unrolled:
        return jax.lax.scan(body, carry, jnp.arange(count))
    results = []
    for i in range(count):
        carry, result = body(carry, i)
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def _map(f, count: int, unrolled: bool):
    return _scan(lambda carry, i: (carry, f(i)), (), count, unrolled)[1]


def _split(size: int, q, k, v, segment_ids) -> _Blocks:
    b, t, n, d = k.shape
    scaled = q * jnp.asarray(1 / math.sqrt(d), q.dtype)
    return _Blocks(
        _split_heads(scaled, size, n),
        _split_heads(k, size, n),
        _split_heads(v, size, n),
        segment_ids.reshape(b, t // size, size).swapaxes(0, 1),
    )


def _split_heads(x: jax.Array, size: int, n: int) -> jax.Array:
    """(b, t, h, d) to (t / size, b, n, h/n · size, d)."""
    b, t, h, d = x.shape
    x = x.reshape(b, t // size, size, n, h // n, d).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(t // size, b, n, h // n * size, d)


def _join(x: jax.Array, group: int) -> jax.Array:
    """The inverse of `_split_heads`."""
    count, b, n, rows, d = x.shape
    size = rows // group
    x = x.reshape(count, b, n, group, size, d).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, count * size, n * group, d)


def _scores(blocks: _Blocks, i, j, q_i: jax.Array, group: int) -> jax.Array:
    """S = Q Kᵀ / √d of block i of queries and j of keys, (b, n, h/n · B, B) float32."""
    s = matmul(q_i, blocks.k[j].mT)
    size = s.shape[-1]
    time = jnp.arange(size)
    causal = i * size + time[:, None] >= j * size + time
    same = blocks.segment_ids[i][:, :, None] == blocks.segment_ids[j][:, None, :]
    mask = (causal & same)[:, None, None]  # (b, 1, 1, B, B)
    by_head = s.reshape(*s.shape[:2], group, size, size)
    return jnp.where(mask, by_head, _MASKED).reshape(s.shape)


def _row_sums(x: jax.Array, y: jax.Array) -> jax.Array:
    product = x.astype(jnp.float32) * y.astype(jnp.float32)
    return product.sum(-1, keepdims=True)
