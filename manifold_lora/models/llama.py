"""LLaMA as one stacked block under `jax.lax.scan`.

The decoder's parameters have a leading layer axis, so that compile time does not grow
with depth and a checkpoint has one leaf per kind of matrix.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.models.attention import causal_attention
from manifold_lora.models.cache import Cache, LayerCache
from manifold_lora.models.config import LlamaConfig
from manifold_lora.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    apply_rope,
    rope_angles,
    rope_frequencies,
)
from manifold_lora.models.precision import matmul
from manifold_lora.models.remat import (
    Remat,
    layer_input,
    projection_output,
    rematerialised,
)

Dtype = jnp.dtype | type
Rope = tuple[jax.Array, jax.Array]


def _fold(key: jax.Array | None, index: int) -> jax.Array | None:
    """A separate key for each projection; None stays None."""
    if key is None or key.ndim == 0:
        return None if key is None else jax.random.fold_in(key, index)
    return jax.vmap(lambda row: jax.random.fold_in(row, index))(key)


def _split(key: jax.Array, count: int) -> jax.Array:
    """Split a key, () to (count,), or a key per row, (b,) to (count, b)."""
    if key.ndim == 0:
        return jax.random.split(key, count)
    return jax.vmap(lambda row: jax.random.split(row, count), out_axes=1)(key)


class Attention(nnx.Module):
    """Causal attention with grouped key and value heads, stacked over layers."""

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim

        def linear(
            in_features: int, out_features: int, axes: tuple[str, str]
        ) -> Linear:
            return Linear(
                in_features,
                out_features,
                axes=axes,
                layers=config.num_hidden_layers,
                bias=config.attention_bias,
                dtype=dtype,
                rngs=rngs,
            )

        inwards = ("embed", "heads")
        self.q_proj = linear(config.hidden_size, width, inwards)
        self.k_proj = linear(config.hidden_size, kv_width, inwards)
        self.v_proj = linear(config.hidden_size, kv_width, inwards)
        self.o_proj = linear(width, config.hidden_size, ("heads", "embed"))

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        mask: jax.Array | None,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """(b, t, d) to (b, t, d), and the cache with the keys and values of x.

        Without a cache, the mask is the segment ids of x, (b, t), or None; with one it
        is (b, 1, t, slots), True where attended.
        """
        b, t, _ = x.shape
        heads = (b, t, -1, self.head_dim)
        q = projection_output(self.q_proj(x, _fold(key, 0)))
        k = projection_output(self.k_proj(x, _fold(key, 1)))
        v = projection_output(self.v_proj(x, _fold(key, 2)))
        q = q.reshape(heads)  # (b, t, h, head_dim)
        k, v = k.reshape(heads), v.reshape(heads)  # (b, t, kv, head_dim)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is None:
            y = causal_attention(q, k, v, mask)  # (b, t, h, head_dim)
        else:
            k, v, cache = cache.extend(k, v)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        y = self.o_proj(y.reshape(b, t, -1), _fold(key, 3))
        return projection_output(y), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x)), stacked over layers."""

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        def linear(
            in_features: int, out_features: int, axes: tuple[str, str]
        ) -> Linear:
            return Linear(
                in_features,
                out_features,
                axes=axes,
                layers=config.num_hidden_layers,
                bias=config.mlp_bias,
                dtype=dtype,
                rngs=rngs,
            )

        d, m, inwards = config.hidden_size, config.intermediate_size, ("embed", "mlp")
        self.gate_proj = linear(d, m, inwards)
        self.up_proj = linear(d, m, inwards)
        self.down_proj = linear(m, d, ("mlp", "embed"))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """(b, t, d) to (b, t, d)."""
        gate = projection_output(self.gate_proj(x, _fold(key, 4)))
        up = projection_output(self.up_proj(x, _fold(key, 5)))
        return self.down_proj(jax.nn.silu(gate) * up, _fold(key, 6))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), stacked over layers."""

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(
                config.hidden_size,
                epsilon=config.rms_norm_eps,
                layers=config.num_hidden_layers,
                dtype=dtype,
            )

        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        mask: jax.Array | None,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """(b, t, d) to (b, t, d), and the cache; see `Attention`."""
        y, cache = self.self_attn(self.input_layernorm(x), rope, mask, key, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), key), cache


class Llama(nnx.Module):
    """A LLaMA decoder: token ids in, float32 logits out.

    `layers` is one `Block` in which every variable has a leading layer axis. A
    projection in it may be replaced by any module that is called the same way,
    `(x, key)`, and whose variables have that axis too. `remat`, which may be set at any
    time, says what a layer keeps for its backward pass; see `remat.rematerialised`.

    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ...     head_dim=4)
    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[1, 2, 3]])).shape
    (1, 3, 32)
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.remat: Remat = "block"
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(*shape, dtype=dtype, rngs=rngs)
        self.layers = Block(config, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype
        )
        # assigned once: flax treats a None that is replaced later as static data
        tied = config.tie_word_embeddings
        head = None
        if not tied:
            axes = ("embed", "vocab")
            head = Linear(*shape[::-1], axes=axes, dtype=dtype, rngs=rngs)
        self.lm_head = head

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, (b, t, vocab) float32; see `hidden_states`."""
        return self.unembed(
            self.hidden_states(
                input_ids,
                attention_mask,
                positions=positions,
                segment_ids=segment_ids,
                key=key,
            )
        )

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The last layer's output after the final norm, (b, t, d).

        Args:
            input_ids: (b, t). An id outside the vocabulary turns its row into NaN.
            attention_mask: (b, t), nonzero for real tokens; padding may be on either
                side. Outputs at padding are meaningless.
            positions: (b, t). By default they count the real tokens.
            segment_ids: (b, t) integers for rows with several packed sequences: a token
                attends to its own segment only. Padding is 0.
            key: dropout key, one for all rows or one per row, (b,); None disables
                dropout.
        """
        if positions is None:
            positions = _positions(input_ids, attention_mask)
        segment_ids = _segments(attention_mask, segment_ids)
        return self._run_layers(input_ids, positions, segment_ids, key)[0]

    def extend(
        self,
        input_ids: jax.Array,
        cache: Cache,
        attention_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The hidden states of further tokens, (b, t, d), and the cache with them.

        For generation: the tokens attend to those in the cache and to each other, and
        their positions follow. Without gradients; for training see `hidden_states`.

        Args:
            input_ids: (b, t).
            cache: with t free slots or more.
            attention_mask: (b, t), nonzero for real tokens; by default all are.
        """
        real = jnp.ones(input_ids.shape, bool)
        if attention_mask is not None:
            real = attention_mask.astype(bool)
        start = cache.end
        cache, positions, mask = cache.add_tokens(real)
        first = LayerCache(cache.keys, cache.values, jnp.zeros((), jnp.int32), start)
        h, last = self._run_layers(input_ids, positions, mask, None, first)
        assert last is not None
        return h, cache._replace(keys=last.keys, values=last.values)

    def _run_layers(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        key: jax.Array | None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The last layer's output after the final norm, and the cache if there is one.

        The cache is carried through the scan, so that no layer copies it.
        """
        rope = rope_angles(rope_frequencies(self.config), positions)
        keys = key
        if key is not None:  # one key per layer, scanned alongside its parameters
            keys = _split(key, self.config.num_hidden_layers)
        graph, state = nnx.split(self.layers)

        def layer(carry, scanned):
            (x, cache), (layer_state, layer_key) = carry, scanned
            block = nnx.merge(graph, layer_state)
            x, cache = block(layer_input(x), rope, mask, layer_key, cache)
            if cache is not None:
                cache = cache._replace(layer=cache.layer + 1)
            return (x, cache), None

        if cache is None:
            layer = rematerialised(layer, self.remat)
        with self._precision():
            x = self.embed_tokens(input_ids)  # (b, t, d)
            (x, cache), _ = jax.lax.scan(layer, (x, cache), (state, keys))
            return self.norm(x), cache

    def head(self) -> jax.Array:
        """The kernel of `unembed`, (d, vocab), all-gathered over fsdp for compute."""
        if self.lm_head is None:
            return self.embed_tokens.gathered_table().T
        return self.lm_head.gathered_kernel()

    def unembed(self, h: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """Logits of hidden states, (…, d) to (…, vocab), accumulated in float32.

        A caller that unembeds in chunks passes `head()`, computed once, so that the
        kernel is not all-gathered for every chunk.
        """
        return matmul(h, self.head() if head is None else head)

    def _precision(self) -> AbstractContextManager[object]:
        """Full precision for float32 models; accelerators use less by default."""
        if self.embed_tokens.dtype == jnp.float32:
            return jax.default_matmul_precision("highest")
        return nullcontext()


def _segments(
    attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array | None:
    """The segments of a row, of which padding is one, 0; None if there is only one."""
    if attention_mask is None:
        return segment_ids
    real = attention_mask.astype(bool)
    return jnp.where(real, 1 if segment_ids is None else segment_ids, 0)


def _positions(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Positions that count real tokens only, so that padding may be on either side."""
    if attention_mask is None:
        return jnp.arange(input_ids.shape[1])[None]  # (1, t)
    real = attention_mask.astype(bool).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)  # (b, t)
