"""Floating-point operations of a traced program."""

import math
import re
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# bfloat16 passes into which the TPU compiler splits a float32 product, by precision.
_PASSES = {"HIGHEST": 6, "HIGH": 3}


def matmul_flops(jaxpr: Jaxpr | ClosedJaxpr, passes: bool = False) -> int:
    """FLOPs of all matrix products over all devices, two per multiply-add.

    XLA's cost analysis counts the body of a loop once. Here a scan is multiplied by its
    length, and recomputation in the backward pass is included. A loop of data-dependent
    length counts as often as the scope around it says, such as `at_most_8_trips`, or
    once; a conditional as its most expensive branch; a kernel once for each point of
    its grid.

    Args:
        jaxpr: the traced program.
        passes: count a float32 product as the bfloat16 passes that a TPU needs.

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
        inner = [matmul_flops(j, passes) for j in _inner_jaxprs(eqn.params.values())]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                operand, result = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
                depth = math.prod(operand[axis] for axis in contracted)
                factor = _passes(eqn) if passes else 1
                total += factor * 2 * depth * math.prod(result)
            case "scan":
                total += eqn.params["length"] * sum(inner)
            case "cond":
                total += max(inner, default=0)
            case "while":
                bound = re.search(
                    r"at_most_(\d+)_trips", str(eqn.source_info.name_stack)
                )
                total += (int(bound[1]) if bound else 1) * sum(inner)
            case "pallas_call":
                total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
            case "shard_map":  # the inner shapes are those of one device
                sizes = dict(eqn.params["mesh"].shape)
                manual = eqn.params["newly_manual_axes"]
                copies = math.prod(sizes[name] for name in manual)
                total += copies * sum(inner)
            case _:
                total += sum(inner)
    return total


def _passes(eqn: Any) -> int:
    precision = eqn.params["precision"]
    if precision is None or any(v.aval.dtype != "float32" for v in eqn.invars):
        return 1
    precisions = precision if isinstance(precision, tuple) else (precision,)
    return max(_PASSES.get(getattr(p, "name", ""), 1) for p in precisions)


def _inner_jaxprs(values: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in values:
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner_jaxprs(value)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
