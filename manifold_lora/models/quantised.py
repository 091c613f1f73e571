"""Frozen projections and embeddings that are stored in int8 or nf4."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.distributed.sharding import gather_for_compute
from manifold_lora.errors import InputError
from manifold_lora.models.layers import Embedding, Linear, sampled_rows

BaseDtype = Literal["int8", "nf4"]
BLOCK = 64  # inputs that share a scale, as in bitsandbytes
# The quantiles of the normal distribution of Dettmers et al. 2023, "QLoRA",
# arXiv:2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class QuantisedLinear(Linear):
    """y = x W̃ (+ b), where W̃ is a kernel rounded to int8 or nf4 in blocks.

    `values` ((layers,) in, out) are int8, or uint4 indices of `NF4_LEVELS`, and
    `scales` ((layers,) in/64, out) bfloat16: each output's inputs are in blocks of 64,
    W̃ = scale · value. Frozen: nothing differentiates them. They are de-quantised by
    the layer that is running, in float32, and rounded to the dtype of the model, and
    again in the backward pass instead of being kept for it.

    Args:
        linear: the layer to replace, of which all but the kernel is shared.
        base_dtype: "int8" or "nf4".

    Raises:
        InputError: qwix is not installed, or 64 does not divide the inputs.

    Examples:
        >>> linear = Linear(64, 3, rngs=nnx.Rngs(0))
        >>> quantised = QuantisedLinear(linear, "int8")
        >>> error = quantised(jnp.eye(64)) - linear(jnp.eye(64))
        >>> bool(jnp.abs(error).max() < 0.01 * jnp.abs(linear.kernel[...]).max())
        True
    """

    def __init__(self, linear: Linear, base_dtype: BaseDtype):
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.axes, self.bias = linear.axes, linear.bias
        self.dtype = jnp.dtype(linear.kernel.dtype)
        self.base_dtype: BaseDtype = base_dtype
        axes = linear.kernel.get_metadata()["axes"]
        values, scales, sample = quantised_parts(linear.kernel[...], base_dtype)
        self.values = nnx.Param(values, axes=axes)
        self.scales = nnx.Param(scales, axes=axes)
        # Of the kernel before it was rounded: the fingerprint is that of its file.
        self.sample_rows = nnx.Variable(sample, axes=(*axes[:-2], None, axes[-1]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel, ((layers,) in, out)."""
        return self.values.shape

    @property
    def parts(self) -> tuple[nnx.Variable, ...]:
        """The variables that hold what `quantised_parts` gives."""
        return self.values, self.scales, self.sample_rows

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); see `Linear`."""
        del key

        def product(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
            return x @ self._dequantised(values, scales)

        # Without it, the backward pass would store the kernels of all layers.
        y = jax.checkpoint(product, prevent_cse=False)(x, *self._gathered())
        return y if self.bias is None else y + self.bias[...]

    def gathered_kernel(self) -> jax.Array:
        """The kernel, ((layers,) in, out), de-quantised after the all-gather."""
        return self._dequantised(*self._gathered())

    def map_kernel(self, f: Callable[..., Any], *arrays: jax.Array) -> Any:
        """f(kernel, *arrays), compiled: of the kernel only what f uses is computed."""

        @jax.jit
        def of_parts(values: jax.Array, scales: jax.Array, *arrays: jax.Array) -> Any:
            return f(self._dequantised(values, scales), *arrays)

        return of_parts(self.values[...], self.scales[...], *arrays)

    def dequantised(self) -> jax.Array:
        """The kernel, ((layers,) in, out), compiled."""
        return self.map_kernel(lambda kernel: kernel)

    def with_kernel(self, kernel: jax.Array) -> Linear:
        """A plain layer with that kernel."""
        layers = None if kernel.ndim == 2 else kernel.shape[0]
        make = partial(Linear, self.in_features, self.out_features, axes=self.axes)
        linear = nnx.eval_shape(
            lambda: make(layers=layers, dtype=self.dtype, rngs=nnx.Rngs(0))
        )
        linear.bias = self.bias
        return linear.with_kernel(kernel)

    def sample(self) -> jax.Array:
        """Some rows of the kernel before it was rounded."""
        return self.sample_rows[...]

    def _gathered(self) -> tuple[jax.Array, jax.Array]:
        axes = (None,) * (len(self.shape) - 2) + self.axes
        values, scales = self.values[...], self.scales[...]
        return gather_for_compute(values, axes), gather_for_compute(scales, axes)

    def _dequantised(self, values: jax.Array, scales: jax.Array) -> jax.Array:
        return dequantise(values, scales, self.base_dtype).astype(self.dtype)


class QuantisedEmbedding(Embedding):
    """The rows of a table that is stored in int8 in blocks.

    `values` (vocab, d) are int8 and `scales` (vocab, d/64) bfloat16, see
    `QuantisedLinear`. Only the rows that are looked up are de-quantised.

    Args:
        embedding: the one to replace.

    Raises:
        InputError: qwix is not installed, or 64 does not divide d.

    Examples:
        >>> embedding = Embedding(5, 64, rngs=nnx.Rngs(0))
        >>> error = QuantisedEmbedding(embedding)(jnp.arange(5)) - embedding.table[...]
        >>> bool(jnp.abs(error).max() < 0.01 * jnp.abs(embedding.table[...]).max())
        True
    """

    base_dtype: BaseDtype = "int8"

    def __init__(self, embedding: Embedding):
        self.table_dtype = jnp.dtype(embedding.dtype)
        values, scales, sample = quantised_rows(embedding.table[...])
        self.values = nnx.Param(values, axes=self.axes)
        self.scales = nnx.Param(scales, axes=self.axes)
        self.sample_rows = nnx.Variable(sample, axes=(None, self.axes[1]))

    @property
    def dtype(self) -> jnp.dtype:
        """Of the rows."""
        return self.table_dtype

    @property
    def parts(self) -> tuple[nnx.Variable, ...]:
        """The variables that hold what `quantised_rows` gives."""
        return self.values, self.scales, self.sample_rows

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integers (…) to rows (…, d), NaN where an id is outside the table."""
        values, scales = (
            gather_for_compute(x[...], self.axes) for x in (self.values, self.scales)
        )
        rows = jnp.take(values, ids, axis=0, mode="clip")
        of_rows = jnp.take(scales, ids, axis=0, mode="fill")
        return dequantise(rows.mT, of_rows.mT, "int8").mT.astype(self.dtype)

    def gathered_table(self) -> jax.Array:
        """The table, (vocab, d), de-quantised after the all-gather."""
        return self(jnp.arange(self.values.shape[0]))

    def dequantised(self) -> jax.Array:
        """The table, (vocab, d), compiled."""
        return jax.jit(self.gathered_table)()

    def sample(self) -> jax.Array:
        """The first rows of the table before it was rounded."""
        return self.sample_rows[...]


def quantised_parts(
    kernel: jax.Array, base_dtype: BaseDtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values, scales and sampled rows of `QuantisedLinear`, of (…, in, out).

    The scale is the largest |w| of a block, of int8 that over 127.5, and the value the
    nearest level to w over it. Zeros stay zeros. The scale is rounded to bfloat16 after
    that, 2⁻⁹ of it at most, where the levels are 1/255 to 1/7 of it apart.

    Raises:
        InputError: qwix is not installed, or 64 does not divide the inputs.
    """
    *others, axis, last = range(kernel.ndim)
    if kernel.shape[axis] % BLOCK:
        raise InputError(
            f"--base-dtype {base_dtype} needs layers whose inputs are a multiple of "
            f"{BLOCK}, the block that shares a scale, got {kernel.shape[axis]}: leave "
            "--base-dtype out."
        )
    array = _qwix(base_dtype).quantize(
        kernel.astype(jnp.float32),
        jnp.int8 if base_dtype == "int8" else base_dtype,
        channelwise_axes=(*others, last),
        tiled_axes={axis: BLOCK},
    )
    sample = sampled_rows(kernel).astype(jnp.bfloat16)
    values = array.qvalue
    if base_dtype == "int8":  # -127.5 may have been rounded to -128
        values = jnp.maximum(values, -127)
    return values, array.scale.astype(jnp.bfloat16), sample


def quantised_rows(table: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The values, scales and sampled rows of `QuantisedEmbedding`, of (vocab, d)."""
    values, scales, _ = quantised_parts(table.T, "int8")
    return values.T, scales.T, table[:64].astype(jnp.bfloat16)


def dequantise(
    values: jax.Array, scales: jax.Array, base_dtype: BaseDtype
) -> jax.Array:
    """The kernel in float32, (…, in, out), of values and scales (…, in/64, out)."""
    if base_dtype == "nf4":
        # `qwix.dequantize` flattens the array, which would gather it from all devices.
        values = jnp.asarray(NF4_LEVELS, jnp.float32)[values.astype(jnp.int32)]
    *batch, _, outputs = values.shape
    blocks = values.astype(jnp.float32).reshape(*batch, -1, BLOCK, outputs)
    return (blocks * scales[..., None, :].astype(jnp.float32)).reshape(values.shape)


@partial(jax.jit, static_argnames="base_dtype")
def rounded(kernel: jax.Array, base_dtype: BaseDtype) -> jax.Array:
    """The kernel as `QuantisedLinear` computes with it, in float32."""
    values, scales, _ = quantised_parts(kernel, base_dtype)
    return dequantise(values, scales, base_dtype)


def quantise(model: Any, base_dtype: BaseDtype) -> Any:
    """The model with all plain projections of its layers quantised, in place.

    An embedding that is not the head too is stored in int8, with nf4 as well: it is
    looked up, and need not be de-quantised as a whole. The head, a tied embedding and
    the norms stay as they are.

    Raises:
        InputError: as in `QuantisedLinear`, naming the projection.
    """
    for path, module in list(nnx.iter_modules(model.layers)):
        for attribute, child in list(vars(module).items()):
            if type(child) is Linear:
                try:
                    setattr(module, attribute, QuantisedLinear(child, base_dtype))
                except InputError as error:
                    name = ".".join([*map(str, path), attribute])
                    raise InputError(f"{name}: {error}") from error
    if not model.config.tie_word_embeddings:
        model.embed_tokens = QuantisedEmbedding(model.embed_tokens)
    return model


def base_dtype_of(model: Any) -> BaseDtype | None:
    """What the projections of a model are stored in, None if they are not quantised."""
    for _, module in nnx.iter_modules(model.layers):
        if isinstance(module, QuantisedLinear):
            return module.base_dtype
    return None


def _qwix(base_dtype: str) -> Any:
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            f"--base-dtype {base_dtype} needs qwix, which is not installed: pip "
            "install 'manifold-lora[quantised]'."
        ) from error
    return qwix


def rounded_rows(rows: np.ndarray, base_dtype: BaseDtype | None) -> np.ndarray:
    """Rows of a weight (out, in) of a file, as the model computes with them."""
    if base_dtype is None:
        return rows
    return np.asarray(rounded(jnp.asarray(rows, jnp.float32).T, base_dtype)).T
