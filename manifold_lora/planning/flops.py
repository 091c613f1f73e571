"""Floating-point operations of a traced program."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Passes in bfloat16 that TPU's compiler makes of a float32 product, by its precision.
_PASSES = {"HIGHEST": 6, "HIGH": 3}


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr, passes: bool = False) -> int:
    """Those of all matrix products, over all devices: two for each multiply-add.

    XLA's own count takes the body of a loop once; here a scan counts as often as it
    runs, and what a layer computes again in the backward pass counts again. A loop
    whose length depends on data counts once, of a condition the longest branch.

    Args:
        jaxpr: the traced program.
        passes: count a product as often as a TPU makes it in bfloat16.

    Examples:
        >>> import jax
        >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
        >>> matmul_flops(jax.make_jaxpr(lambda x: x @ x)(x)) == 2 * 8**3
        True
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    total = 0
    for eqn in jaxpr.eqns:
        inside = [matmul_flops(inner, passes) for inner in _inner(eqn.params.values())]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                operand, result = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
                depth = math.prod(operand[axis] for axis in contracted)
                times = _passes(eqn) if passes else 1
                total += times * 2 * depth * math.prod(result)
            case "scan":
                total += eqn.params["length"] * sum(inside)
            case "cond":
                total += max(inside, default=0)
            case "shard_map":  # shapes inside are those of one device
                sizes = dict(eqn.params["mesh"].shape)
                manual = eqn.params["newly_manual_axes"]
                copies = math.prod(sizes[name] for name in manual)
                total += copies * sum(inside)
            case _:
                total += sum(inside)
    return total


def _passes(eqn: Any) -> int:
    precision = eqn.params["precision"]
    if precision is None or any(v.aval.dtype != "float32" for v in eqn.invars):
        return 1
    given = precision if isinstance(precision, tuple) else (precision,)
    return max(_PASSES.get(getattr(p, "name", ""), 1) for p in given)


def _inner(values: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in values:
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
