"""The mesh of devices: its three axes, read from text and checked against a model.

Only `make_mesh` imports JAX, so that a configuration can be checked without it.
"""

import math
from typing import TYPE_CHECKING, Any

from manifold_lora.errors import InputError, nearest

if TYPE_CHECKING:
    from jax.sharding import Mesh

# data: copies of the model, each with rows of the batch of its own;
# fsdp: rows of the batch too, and the weights in parts, gathered layer by layer;
# tensor: heads, hidden units of the MLP and words of the vocabulary in parts.
AXES = ("data", "fsdp", "tensor")
GROUPS = ("data", "fsdp")  # the axes that divide the rows of a batch


def read_mesh(text: str | None) -> dict[str, int] | None:
    """The sizes in "data=2,fsdp=4,tensor=2"; None, for all devices on fsdp, from None.

    Axes that are not named have size 1.

    Raises:
        InputError: an unknown axis, a size that is no positive number, or a repetition.

    >>> read_mesh("fsdp=4,tensor=2")
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise InputError(
                f"--mesh {text}: unknown axis {name!r}. {nearest(name, AXES)} Write "
                "sizes as in data=2,fsdp=4,tensor=2."
            )
        if name in sizes:
            raise InputError(f"--mesh {text}: {name} is given twice.")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"--mesh {text}: the size of {name} must be a positive number, got "
                f"{size!r}."
            )
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(sizes: dict[str, int] | None = None, devices: Any = None) -> "Mesh":
    """The devices as a mesh of `AXES`, with automatic partitioning.

    Neighbours in the hardware become neighbours on the last axes, which exchange most;
    sides of a TPU slice are divided where an axis is no whole side.

    Args:
        sizes: of every axis; None puts all devices on fsdp.
        devices: by default all devices of all processes.

    Raises:
        InputError: the product of the sizes is not the number of devices.
    """
    import jax

    devices = list(all_devices() if devices is None else devices)
    count = len(devices)
    sizes = sizes or {"data": 1, "fsdp": count, "tensor": 1}
    shape = tuple(sizes[axis] for axis in AXES)
    if math.prod(shape) != count:
        shown = ",".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise InputError(
            f"--mesh {shown} has {math.prod(shape)} devices, and there "
            f"{'is' if count == 1 else 'are'} {count}: the product of the sizes must "
            f"be {count}. Leave --mesh out to put all on fsdp."
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # an axis is no whole side of a TPU slice
        from jax.experimental import mesh_utils

        array = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(array, AXES, axis_types=auto)


def all_devices() -> Any:
    """The devices of all processes."""
    import jax

    return jax.devices()


def group_count(sizes: Any) -> int:
    """Parts that the rows of a batch are divided into, by sizes of axes."""
    return math.prod(sizes.get(axis, 1) for axis in GROUPS)


def problems(sizes: Any, config: Any, rows: int | None = None) -> list[str]:
    """What the sizes of the axes do not divide, each with the sizes that would do.

    Args:
        sizes: of the axes, such as `mesh.shape`.
        config: a `LlamaConfig`.
        rows: of a micro-batch, all devices together.
    """
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    needed = [
        ("tensor", tensor, "num_attention_heads", config.num_attention_heads),
        ("tensor", tensor, "num_key_value_heads", config.num_key_value_heads),
        ("tensor", tensor, "intermediate_size", config.intermediate_size),
        ("fsdp", fsdp, "hidden_size", config.hidden_size),
    ]
    found = [
        f"{axis}={size} does not divide {name} {dimension}: {axis} may be "
        f"{_divisors(dimension)}"
        for axis, size, name, dimension in needed
        if dimension % size
    ]
    groups = group_count(sizes)
    if rows is not None and rows % groups:
        found.append(
            f"data × fsdp = {groups} does not divide the {rows} rows of a micro-batch "
            "(--batch-size over --accumulate): make --batch-size a multiple of "
            f"{groups} × --accumulate, or move devices to the tensor axis"
        )
    return found


def _divisors(number: int) -> str:
    found = [n for n in range(1, number + 1) if number % n == 0]
    shown = found if len(found) <= 12 else [*found[:11], "…", found[-1]]
    return ", ".join(map(str, shown))
