"""The device mesh: its three axes, parsed from text and checked against a model.

Only the functions that need devices import JAX, so that configurations are checked
without it.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from manifold_lora.errors import InputError, nearest, shortened

if TYPE_CHECKING:
    from jax.sharding import Mesh

# data: shards the batch and replicates the model;
# fsdp: shards the batch and the weights, which are all-gathered layer by layer;
# tensor: shards heads, hidden units of the MLP and the vocabulary.
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes that shard the rows of a batch
_PACKAGES = {"cuda": "jax[cuda12]", "gpu": "jax[cuda12]", "tpu": "jax[tpu]"}
_SIZE = re.compile("[1-9][0-9]{0,5}")


def read_mesh(text: str | None) -> dict[str, int] | None:
    """Parse axis sizes such as "data=2,fsdp=4,tensor=2".

    Axes that are not named have size 1; None, which stands for all devices on fsdp, is
    returned as None.

    Raises:
        InputError: an unknown axis, a size that is not a positive integer, or an axis
            given twice.

    >>> read_mesh("fsdp=4,tensor=2")
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    if text is None:
        return None
    sizes: dict[str, int] = {}
    given = f"--mesh {shortened(text)}"
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise InputError(
                f"{given}: unknown axis {shortened(name)!r}. {nearest(name, AXES)} "
                "Write sizes as in data=2,fsdp=4,tensor=2."
            )
        if name in sizes:
            raise InputError(f"{given}: {name} is given twice.")
        if not _SIZE.fullmatch(size):
            raise InputError(
                f"{given}: the size of {name} must be a positive integer up to "
                f"999999, got {shortened(size)!r}."
            )
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(sizes: dict[str, int] | None = None, devices: Any = None) -> "Mesh":
    """A mesh of the devices over `AXES`, with `Auto` axis types.

    Neighbouring devices are placed along the last axes, which communicate most. A
    physical axis of a TPU slice is split where the sizes do not match whole ones.

    Args:
        sizes: of every axis; None puts all devices on fsdp.
        devices: default: all devices of all processes.

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
            f"--mesh {shown} needs {math.prod(shape)} devices, but {count} "
            f"{'is' if count == 1 else 'are'} available: the product of the sizes must "
            f"be {count}. Omit --mesh to put all devices on fsdp."
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # the sizes do not match whole physical axes
        from jax.experimental import mesh_utils

        array = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(array, AXES, axis_types=auto)


def all_devices() -> Any:
    """The devices of all processes.

    Raises:
        InputError: JAX_PLATFORMS names what is not there, or no platform starts.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        # JAX asserts without a message where a platform has no plugin.
        lines = str(error).removeprefix("Unable to initialize backend ").splitlines()
        reason = f" JAX reports: {lines[0]}." if lines else ""
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if not platforms:
            raise InputError(f"JAX finds no device to run on.{reason}") from error
        package = _PACKAGES.get(platforms.partition(",")[0])
        install = f"install {package}, or " if package else ""
        raise InputError(
            f"JAX finds no {platforms} ({install}unset JAX_PLATFORMS).{reason}"
        ) from error


def group_count(sizes: Any) -> int:
    """The number of groups that the rows of a batch are sharded over, data × fsdp."""
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def divisibility_errors(
    sizes: Any, config: Any, rows: int | None = None, block: int = 1
) -> list[str]:
    """One message for each dimension that its mesh axis does not divide.

    Args:
        sizes: of the axes, such as `mesh.shape`.
        config: a `LlamaConfig`.
        rows: of a global micro-batch; None leaves the batch unchecked.
        block: inputs of a layer that stay on one device, as those with one scale.

    Returns:
        Messages that name the sizes that would divide; empty if all do.
    """
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    heads = config.num_attention_heads
    sharded = [
        ("tensor", tensor, "num_attention_heads", heads, 1),
        ("tensor", tensor, "num_key_value_heads", config.num_key_value_heads, 1),
        ("tensor", tensor, "intermediate_size", config.intermediate_size, block),
        ("fsdp", fsdp, "hidden_size", config.hidden_size, block),
    ]
    if block > 1:
        width = heads * config.head_dim
        sharded.append(("tensor", tensor, "the width of all heads", width, block))
    into = {block: f" into whole blocks of {block}"} | {1: ""}
    errors = [
        f"{axis}={size} does not divide {name} {dimension}{into[unit]}: {axis} may be "
        f"{_divisors(dimension // unit)}"
        for axis, size, name, dimension, unit in sharded
        if dimension // unit % size
    ]
    groups = group_count(sizes)
    if rows is not None and rows % groups:
        errors.append(
            f"data × fsdp = {groups} does not divide the {rows} rows of a micro-batch "
            "(--batch-size over --accumulate): make --batch-size a multiple of "
            f"{groups} × --accumulate, or move devices to the tensor axis"
        )
    return errors


def _divisors(number: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    shown = divisors if len(divisors) <= 12 else [*divisors[:11], "…", divisors[-1]]
    return ", ".join(map(str, shown))
