"""The parts of a LLaMA block without attention: linear, RMSNorm, RoPE.

A module built with `layers=L` holds the parameters of L identical layers, stacked on
axis 0. It is never called in that form: the decoder scans over the slices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.distributed.sharding import gather_for_compute
from manifold_lora.models.config import LlamaConfig


def _stacked(layers: int | None, *shape: int) -> tuple[int, ...]:
    """The shape of a parameter, with a leading layer axis if it is stacked."""
    return shape if layers is None else (layers, *shape)


class Linear(nnx.Module):
    """y = x W (+ b), with the kernel W stored (in, out).

    `kernel` is ((layers,) in, out) and `bias` ((layers,) out) or None. Kernels are
    initialised from a normal distribution with standard deviation 0.02, biases with
    zeros. `axes` are the logical axes of inputs and outputs, which decide how the
    parameters are sharded on a mesh.

    >>> linear = Linear(4, 3, rngs=nnx.Rngs(0))
    >>> linear(jnp.ones((2, 4))).shape
    (2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layers: int | None = None,
        bias: bool = False,
        axes: tuple[str | None, str | None] = (None, None),
        dtype: jnp.dtype | type = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.axes = axes
        before = () if layers is None else ("layers",)
        shape = _stacked(layers, in_features, out_features)
        kernel = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
        self.kernel = nnx.Param(kernel, axes=(*before, *axes))
        zeros = jnp.zeros(_stacked(layers, out_features), dtype) if bias else None
        named = (*before, axes[1])
        self.bias = None if zeros is None else nnx.Param(zeros, axes=named)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out).

        `key` is a dropout key, ignored here; a module that replaces this one may use
        it. None means no dropout.
        """
        del key
        y = x @ self.gathered_kernel()
        return y if self.bias is None else y + self.bias[...]

    def gathered_kernel(self) -> jax.Array:
        """The kernel, ((layers,) in, out), all-gathered over fsdp for compute."""
        kernel = self.kernel[...]
        return gather_for_compute(kernel, (None,) * (kernel.ndim - 2) + self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel, ((layers,) in, out)."""
        return self.kernel.shape

    def map_kernel(self, f: Callable[..., Any], *arrays: jax.Array) -> Any:
        """f(kernel, *arrays), also where the kernel is not stored as one array."""
        return f(self.kernel[...], *arrays)

    def with_kernel(self, kernel: jax.Array) -> "Linear":
        """This layer with another kernel, rounded to the dtype of its own."""
        self.kernel.set_value(kernel.astype(self.kernel.dtype))
        return self

    def sample(self) -> jax.Array:
        """Some rows of the kernel, by which its model is known again."""
        return sampled_rows(self.kernel[...])


def sampled_rows(kernel: jax.Array) -> jax.Array:
    """Eight rows of a kernel (…, in, out), or as many as it has."""
    return kernel[..., :: -(-kernel.shape[-2] // 8), :]


class Embedding(nnx.Module):
    """A row of a table for each token id.

    `table` is (vocab, d), initialised from a normal distribution with standard
    deviation 0.02.

    >>> Embedding(5, 4, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
    (1, 3, 4)
    """

    axes = ("vocab", "embed")

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        dtype: jnp.dtype | type = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (vocab_size, features)
        table = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
        self.table = nnx.Param(table, axes=self.axes)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the rows."""
        return self.table.dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integers (…) to rows (…, d), NaN where an id is outside the table."""
        return jnp.take(self.gathered_table(), ids, axis=0, mode="fill")

    def gathered_table(self) -> jax.Array:
        """The table, (vocab, d), all-gathered over fsdp for compute."""
        return gather_for_compute(self.table[...], self.axes)

    def sample(self) -> jax.Array:
        """Some rows of the table, by which its model is known again."""
        return self.table[...][:64]


class RMSNorm(nnx.Module):
    """y = w · x / sqrt(mean(x²) + ε), over the last axis.

    Computed in float32 and rounded to the dtype of `x` before the product with w, in
    the order of Hugging Face, which determines the last bits in bfloat16.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        layers: int | None = None,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(_stacked(layers, features), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, features) to (…, features)."""
        h = x.astype(jnp.float32)
        mean_square = jnp.mean(h * h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(mean_square + self.epsilon)
        return self.scale[...] * h.astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """RoPE frequencies, radians per position of each pair, (head_dim / 2,) float32.

    f_i = theta^(-2i / head_dim). "linear" divides f by the factor; "llama3" does so
    for wavelengths 2π/f above original/low, keeps f below original/high, and
    interpolates in between with weight s = (original/wavelength - low) / (high - low).

    Every operation is rounded to float32 as in Hugging Face: one bit of f is 0.006
    radians at position 100,000, where a more accurate f would be a different model.
    """
    f32 = np.float32
    exponents = np.arange(0, config.head_dim, 2, dtype=f32) / f32(config.head_dim)
    # float32 powers differ between libraries: use the correctly rounded one
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    f = f32(1) / powers.astype(f32)
    rope = config.rope_scaling
    if rope is None:
        return f
    scaled = f / f32(rope.factor)
    if rope.rope_type == "linear":
        return scaled
    low, high = rope.low_freq_factor, rope.high_freq_factor
    original = rope.original_max_position_embeddings
    # PyTorch computes number / tensor as number times reciprocal
    wavelength = f32(1) / f * f32(2 * np.pi)
    s = (f32(1) / wavelength * f32(original) - f32(low)) / f32(high - low)
    interpolated = (f32(1) - s) * f / f32(rope.factor) + s * f
    f = np.where(wavelength < original / high, f, interpolated)
    return np.where(wavelength > original / low, scaled, f).astype(f32)


def rope_angles(
    frequencies: np.ndarray, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency, in float32 for any model dtype.

    Shapes: (f,) and (b, t) to two of (b, t, 1, f), which broadcast over heads.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + d/2}) by their angles.

    This is the half-split pairing of Hugging Face, not Meta's interleaved one. Shapes:
    x is (b, t, h, d), cos and sin (b, t, 1, d/2). Rounded once, to the dtype of x.
    """
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (left * cos - right * sin, right * cos + left * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
