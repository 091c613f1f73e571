"""Rematerialisation policies: what of a layer is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "block", "offload"]
RematSetting = Literal["auto", "none", "dots", "block", "offload"]
LAYER_INPUT, PROJECTION, ATTENTION = "layer_input", "projection", "attention"
_policies = jax.checkpoint_policies
# Operations whose results are those of GPU kernels, which no name reaches: the one in
# Triton, within a derivative rule, and cuDNN's. A TPU's, whose results are padded to
# 128 lanes, take less memory computed again.
_ATTENTION_KERNELS = ("custom_vjp_call", "dot_product_attention_fwd_wrapper")


def candidates(setting: RematSetting, platform: str) -> tuple[Remat, ...]:
    """The policies to try, fastest first, until one fits into memory.

    They are several for "auto". On a CPU "none" is slower than "dots": what it keeps
    has to be written to memory and read again.

    >>> candidates("auto", "cpu"), candidates("block", "cpu")
    (('dots', 'block'), ('block',))
    """
    for remat in get_args(Remat):
        if remat == setting:
            return (remat,)
    return ("dots", "block") if platform == "cpu" else ("none", "dots", "block")


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of a scan over layers, with what it keeps for its backward pass.

    From fast and large to slow and small:

    - "none": everything that the backward pass needs;
    - "dots": the results of projections and of attention; the elementwise operations
      between them are computed again;
    - "block": the input of the layer, which is computed again as a whole;
    - "offload": the same, kept in the memory of the host.

    Args:
        layer: (carry, x) → (carry, y), whose input passes through `layer_input`.
        remat: one of these.
    """
    if remat == "none":
        return layer
    # Inside a scan, XLA cannot undo the recomputation by CSE.
    return jax.checkpoint(layer, policy=_policy(remat), prevent_cse=False)


def _policy(remat: Remat) -> Callable[..., Any] | None:
    if remat == "dots":
        named: Any = _policies.save_only_these_names(PROJECTION, ATTENTION)
        return lambda op, *args, **params: (
            op.name in _ATTENTION_KERNELS or named(op, *args, **params)
        )
    if remat == "offload":
        return _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None


def layer_input(x: jax.Array) -> jax.Array:
    """Name the input of a layer, for "offload"."""
    return checkpoint_name(x, LAYER_INPUT)


def projection_output(x: jax.Array) -> jax.Array:
    """Name the result of a projection, for "dots".

    Of an adapted layer that is the sum of two products, which is kept, not they.
    """
    return checkpoint_name(x, PROJECTION)


def attention_output(x: jax.Array) -> jax.Array:
    """Name what the backward pass of attention needs, for "dots"."""
    return checkpoint_name(x, ATTENTION)
