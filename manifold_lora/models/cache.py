"""The keys and values of earlier tokens, so that each token is computed once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from manifold_lora.distributed.sharding import ambient_mesh, compute_spec, constrain
from manifold_lora.models.config import LlamaConfig

_AXES = ("layers", "batch", None, "heads", None)


class Cache(NamedTuple):
    """Keys and values of all layers, in slots of which the first `end` are filled.

    Its size is fixed, so that a program that extends it is compiled once. Rows are
    sharded like the batch and heads like those of the model.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ...     head_dim=4)
    >>> Cache.empty(config, rows=3, length=16, dtype=jnp.float32).keys.shape
    (2, 3, 16, 1, 4)
    """

    keys: jax.Array  # (layers, b, length, kv, head_dim)
    values: jax.Array  # (layers, b, length, kv, head_dim)
    real: jax.Array  # (b, length), True where the slot holds a token, not padding
    end: jax.Array  # (), the number of filled slots

    @classmethod
    def empty(
        cls, config: LlamaConfig, *, rows: int, length: int, dtype: jnp.dtype | type
    ) -> "Cache":
        """A cache without tokens, for so many rows and slots."""
        heads = (config.num_key_value_heads, config.head_dim)
        zeros = jnp.zeros((config.num_hidden_layers, rows, length, *heads), dtype)
        real = jnp.zeros((rows, length), bool)
        return cls(_sharded(zeros), _sharded(zeros), real, jnp.zeros((), jnp.int32))

    def add_tokens(self, real: jax.Array) -> tuple["Cache", jax.Array, jax.Array]:
        """Slots for further tokens, their positions, and what they attend to.

        Args:
            real: (b, t), False for padding.

        Returns:
            The cache with `real` and `end` as they are after the tokens; the positions
            (b, t), which count the real tokens; the mask (b, 1, t, length).
        """
        t = real.shape[1]
        before = self.real.sum(1, keepdims=True)
        positions = jnp.maximum(before + jnp.cumsum(real, axis=1) - 1, 0)
        slots = jax.lax.dynamic_update_slice(self.real, real, (0, self.end))
        query = self.end + jnp.arange(t)
        causal = query[:, None] >= jnp.arange(slots.shape[1])[None, :]  # (t, length)
        mask = (causal[None] & slots[:, None, :])[:, None]
        return self._replace(real=slots, end=self.end + t), positions, mask

    def gather_rows(self, rows: jax.Array) -> "Cache":
        """The cache of these rows, (n,) indices, in that order."""
        keys, values = (jnp.take(x, rows, axis=1) for x in (self.keys, self.values))
        real = jnp.take(self.real, rows, axis=0)
        return Cache(_sharded(keys), _sharded(values), real, self.end)


class LayerCache(NamedTuple):
    """The cache as one layer reads and extends it."""

    keys: jax.Array  # of all layers, as in `Cache`
    values: jax.Array
    layer: jax.Array  # (), which of them
    start: jax.Array  # (), the slot of the first new token

    def extend(
        self, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, "LayerCache"]:
        """Write keys and values (b, t, kv, head_dim) of new tokens.

        Returns the layer's keys and values of all slots, (b, length, kv, head_dim), and
        the cache. It is updated in place where it is carried through a loop.
        """
        # Fused with what computes them, XLA on CPU would copy the cache in every layer.
        k, v = jax.lax.optimization_barrier((k, v))
        at = (self.layer, 0, self.start, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, k[None], at)
        values = jax.lax.dynamic_update_slice(self.values, v[None], at)
        k, v = (
            jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
            for x in (keys, values)
        )
        return k, v, self._replace(keys=keys, values=values)


def _sharded(x: jax.Array) -> jax.Array:
    mesh = ambient_mesh()
    return x if mesh is None else constrain(x, compute_spec(_AXES, x.shape, mesh))
