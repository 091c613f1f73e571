"""Arrays from the host to the devices of all processes, and back."""

import bisect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from manifold_lora.distributed.mesh import BATCH_AXES
from manifold_lora.distributed.sharding import (
    logical_axes,
    named_shardings,
    specs_like,
    storage_spec,
)


def shard_module(module: Any) -> None:
    """Shard every variable of a module in place, by its logical axes.

    On the mesh of `jax.set_mesh`; without one, nothing happens. Arrays that are
    sharded so already are not copied. All processes must hold the same values.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return
    state = nnx.state(module)
    for _, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        spec = storage_spec(logical_axes(variable), value.shape, mesh)
        variable.set_value(_reshard(value, NamedSharding(mesh, spec)))
    nnx.update(module, state)


def _reshard(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    if x.is_fully_addressable and not sharding.is_fully_addressable:
        host = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, host.__getitem__)
    return jax.device_put(x, sharding)


def init_sharded(init: Callable[[Any], Any], params: Any, axes: Any) -> Any:
    """`init(params)`, such as an optimiser's state, sharded as the parameters are."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.jit(init)(params)
    specs = specs_like(jax.eval_shape(init, params), params, axes, mesh)
    return jax.jit(init, out_shardings=named_shardings(specs, mesh))(params)


def to_host(tree: Any) -> Any:
    """The arrays as NumPy arrays, gathered into the memory of every process.

    All processes must call it, even if only one needs the result.
    """

    def gathered(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            replicated = NamedSharding(x.sharding.mesh, P())  # pyright: ignore[reportAttributeAccessIssue]
            x = jax.jit(lambda x: x, out_shardings=replicated)(x)
        return np.asarray(x)

    return jax.tree.map(gathered, tree)


class BatchSharder:
    """Makes global arrays of batches of which each process has its own rows only.

    Args:
        mesh: of the devices.
        batch_size: rows of the global batch.

    Attributes:
        local_rows: indices of the rows that this process has to read, in order.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.batch_size = batch_size
        self.sharding = NamedSharding(mesh, P(BATCH_AXES))
        indices = self.sharding.addressable_devices_indices_map((batch_size,))
        self.local_rows = sorted(
            {
                row
                for index in indices.values()
                if index is not None
                for row in range(*index[0].indices(batch_size))
            }
        )

    def __call__(self, local_batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch from this process's rows, (local rows, …) to (rows, …)."""

        def to_global(x: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                first, stop, _ = index[0].indices(self.batch_size)
                start = bisect.bisect_left(self.local_rows, first)
                return x[start : start + stop - first]

            shape = (self.batch_size, *x.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, shard)

        return jax.tree.map(to_global, local_batch)
