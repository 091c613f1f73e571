"""Rematerialisation policies: what of a layer is kept for the backward pass."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "dots", "block", "offload"]
LAYER_INPUT, ATTENTION = "layer_input", "attention"
_policies = jax.checkpoint_policies


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of a scan over layers, with what it keeps for its backward pass.

    From fast and large to slow and small:

    - "none": everything that the backward pass needs;
    - "dots": the results of matrix products and of attention; the elementwise
      operations between them are computed again;
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
        return _policies.save_from_both_policies(
            _policies.dots_with_no_batch_dims_saveable,
            _policies.save_only_these_names(ATTENTION),
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


def attention_output(x: jax.Array) -> jax.Array:
    """Name what the backward pass of attention needs, for "dots"."""
    return checkpoint_name(x, ATTENTION)
