"""Attention kernels of JAX for TPUs and NVIDIA GPUs, wrapped for `causal_attention`."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from manifold_lora.distributed.sharding import ambient_mesh, compute_spec

_LANES = 128  # a TPU kernel's blocks are multiples of it
_LARGEST_BLOCK = 512


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention on a TPU; shapes as in `causal_attention`.

    Heads are sharded over the mesh's tensor axis where it divides the key heads. Rows
    are padded to a multiple of 128 tokens.
    """
    t, d = q.shape[1], q.shape[-1]
    q, k, v, segment_ids = _padded(q, k, v, segment_ids)
    q = q * jnp.asarray(1 / math.sqrt(d), q.dtype)
    attend = partial(_splash, interpret=interpret)
    if (mesh := ambient_mesh()) is not None:
        # The compiler cannot partition a kernel by itself.
        heads = compute_spec(("heads",), k.shape[2:3], mesh)
        spec = P(None, None, *heads)
        attend = jax.shard_map(
            attend, in_specs=(spec, spec, spec, P()), out_specs=spec, check_vma=False
        )
    return attend(q, k, v, segment_ids)[:, :t]


def _splash(q, k, v, segment_ids, interpret: bool):
    # Imported here, since it takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    t, heads = q.shape[1], q.shape[2]
    size = next(n for n in range(_LARGEST_BLOCK, 0, -_LANES) if t % n == 0)
    mask = library.MultiHeadMask([library.CausalMask((t, t))] * heads)
    kernel = library.make_splash_mha(
        mask,
        block_sizes=library.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (b, heads, t, d)
    ids = library.SegmentIds(segment_ids, segment_ids)
    y: Any = jax.vmap(kernel)(q, k, v, ids)
    return y.swapaxes(1, 2)


def triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """A Pallas kernel on an NVIDIA GPU; shapes as in `causal_attention`.

    Its keys and values are repeated for every head of queries. Rows are padded to a
    multiple of 128 tokens.
    """
    from jax.experimental.pallas.ops.gpu import attention as library

    t, d = q.shape[1], q.shape[-1]
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    q, k, v, segment_ids = _padded(q, k, v, segment_ids)
    y: Any = library.mha(
        q,
        k,
        v,
        segment_ids,
        sm_scale=1 / math.sqrt(d),
        causal=True,
        interpret=interpret,
    )
    return y[:, :t]


def _padded(q, k, v, segment_ids):
    """Rows padded to a multiple of 128 tokens, after those that attend."""
    b, t = q.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.zeros((b, t), jnp.int32)
    padding = -t % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    return q, k, v, jnp.pad(segment_ids, ((0, 0), (0, padding)))
