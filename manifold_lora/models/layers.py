"""The parts of a LLaMA block that hold no attention: products, norms, rotation.

A module built with `layers=L` holds the parameters of L equal layers, stacked on
axis 0. It is never called in that form: the decoder's scan hands it one slice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.distributed.sharding import use
from manifold_lora.models.config import LlamaConfig


def _stacked(layers: int | None, *shape: int) -> tuple[int, ...]:
    """The shape of a parameter, with the layer axis in front where there is one."""
    return shape if layers is None else (layers, *shape)


class Linear(nnx.Module):
    """y = x W (+ b), with the kernel W stored (in, out).

    `kernel` is ((layers,) in, out) and `bias` ((layers,) out) or None. The random
    start is normal with deviation 0.02, biases are zero. `axes` names the axes of
    inputs and outputs, which decide where they are on a mesh.

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

        `key` is a dropout key: a plain layer has no dropout and ignores it, a module
        that takes this one's place may use it. None means no dropout.
        """
        del key
        y = x @ self.gathered()
        return y if self.bias is None else y + self.bias[...]

    def gathered(self) -> jax.Array:
        """The kernel, ((layers,) in, out), as a device computes with it."""
        kernel = self.kernel[...]
        return use(kernel, (None,) * (kernel.ndim - 2) + self.axes)


class RMSNorm(nnx.Module):
    """y = w · x / sqrt(mean(x²) + ε), over the last axis.

    Computed in float32 and rounded to the dtype of `x` before the product with w:
    the order of Hugging Face, which decides the last bits in bfloat16.
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
        """Shapes (…, features) to the same."""
        h = x.astype(jnp.float32)
        mean_square = jnp.mean(h * h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(mean_square + self.epsilon)
        return self.scale[...] * h.astype(x.dtype)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each rotated pair, (head_dim / 2,) float32.

    f_i = theta^(-2i / head_dim); "linear" divides by the factor; "llama3" does so
    for wavelengths 2π/f above original/low, not below original/high, and in between
    mixes both with the weight s = (original/wavelength - low) / (high - low).

    Every step is rounded to float32 as in Hugging Face: one bit of f is 0.006
    radians at position 100,000, so a more exact f is a different model there.
    """
    f32 = np.float32
    exponents = np.arange(0, config.head_dim, 2, dtype=f32) / f32(config.head_dim)
    # float32 powers differ between libraries: take the correctly rounded one
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
    # PyTorch divides a number by a tensor as number times reciprocal
    wavelength = f32(1) / f * f32(2 * np.pi)
    s = (f32(1) / wavelength * f32(original) - f32(low)) / f32(high - low)
    mixed = (f32(1) - s) * f / f32(rope.factor) + s * f
    f = np.where(wavelength < original / high, f, mixed)
    return np.where(wavelength > original / low, scaled, f).astype(f32)


def rope_angles(
    frequencies: np.ndarray, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency, in float32 at any model dtype.

    Shapes: (f,) and (b, t) to two of (b, t, 1, f), ready for every head.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + d/2}) by their angles.

    The half-split pairing of Hugging Face, not Meta's interleaved one. Shapes: x is
    (b, t, h, d), cos and sin (b, t, 1, d/2). Rounded once, to the dtype of x.
    """
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (left * cos - right * sin, right * cos + left * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
