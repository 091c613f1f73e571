"""Arrays onto the devices of all processes, and back to the host."""

import bisect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from manifold_lora.distributed.mesh import GROUPS
from manifold_lora.distributed.sharding import follow, kept, names, shardings


def place(module: Any) -> None:
    """Put every variable of a module where its axes say, on the mesh in use.

    What is there already stays; all processes must hold the same values.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return
    state = nnx.state(module)
    for _, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        spec = kept(names(variable), value.shape, mesh)
        variable.set_value(_put(value, NamedSharding(mesh, spec)))
    nnx.update(module, state)


def _put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    if x.is_fully_addressable and not sharding.is_fully_addressable:
        host = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, host.__getitem__)
    return jax.device_put(x, sharding)


def initialised(init: Callable[[Any], Any], params: Any, axes: Any) -> Any:
    """`init(params)`, such as an optimiser's state, placed as the parameters are."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.jit(init)(params)
    specs = follow(jax.eval_shape(init, params), params, axes, mesh)
    return jax.jit(init, out_shardings=shardings(specs, mesh))(params)


def to_host(tree: Any) -> Any:
    """Whole arrays in the memory of every process, as NumPy arrays.

    All processes must call it, though only one may need the result.
    """

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            everywhere = NamedSharding(x.sharding.mesh, P())  # pyright: ignore[reportAttributeAccessIssue]
            x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


class Feed:
    """Batches onto the devices: each process reads the rows that its devices need.

    Args:
        mesh: of the devices.
        batch_size: rows of a batch of all processes together.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.size = batch_size
        self.sharding = NamedSharding(mesh, P(GROUPS))
        places = self.sharding.addressable_devices_indices_map((batch_size,))
        needed = {
            row
            for index in places.values()
            if index is not None
            for row in range(*index[0].indices(batch_size))
        }
        # Numbers of the rows of a batch that this process reads, in order.
        self.rows = sorted(needed)

    def __call__(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch whose rows of this process are given, as global arrays."""

        def put(x: np.ndarray) -> jax.Array:
            def rows(index: Any) -> np.ndarray:
                first, *_ = index[0].indices(self.size)
                start = bisect.bisect_left(self.rows, first)
                count = len(range(*index[0].indices(self.size)))
                return x[start : start + count]

            shape = (self.size, *x.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, rows)

        return jax.tree.map(put, local)
