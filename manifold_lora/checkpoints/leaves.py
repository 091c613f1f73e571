"""The leaves of a training state as Orbax stores them: arrays by name."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, so that the file does not depend on containers."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe_leaf(leaf: Any) -> str:
    """Dtype and shape, as in `float32[16,4]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_to_data(leaf: Any) -> Any:
    """A typed PRNG key as its integers; any other leaf unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def data_to_key(like: Any, array: jax.Array) -> jax.Array:
    """The inverse of `key_to_data`, for a leaf with the dtype of `like`."""
    if not _is_key(like):
        return array
    # `like` may be a ShapeDtypeStruct, of which JAX does not tell the implementation
    impl = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(array, impl=impl)


def abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of `key_to_data(leaf)`."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(key_to_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
