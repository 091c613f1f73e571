"""Scaled gradient descent for pairs of factors."""

from collections.abc import Callable
from typing import Any

import optax

from manifold_lora.errors import InputError
from manifold_lora.manifolds.linalg import (
    at_least_float32,
    eye_like,
    inverse,
    matmul,
    stacked,
    times,
)
from manifold_lora.optimizers.checks import check_hyperparameters, checked
from manifold_lora.optimizers.factor_tree import Factor, FactorTree, factor_tree


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    pairs: Any,
    *,
    damping: float = 1e-2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on gradients preconditioned by the other factor: a baseline.

    For ΔW = s·B Aᵀ with tall A and B and their gradients g:

        g_A ← g_A (BᵀB + δI)⁻¹
        g_B ← g_B (AᵀA + δI)⁻¹

    and then AdamW on these. Up to δ a plain gradient step now changes ΔW in the same
    way however it is split into factors, so that both can share one learning rate; but
    the factors are free and may lose rank. To preserve it use `stiefel_lora` or
    `stella`. Leaves that are not factors get AdamW itself. Numerically this is PEFT's
    `create_riemannian_optimizer` around `torch.optim.AdamW`, with its δ; PyTorch's
    weight decay is 0.01 by default.

    Args:
        learning_rate: of all leaves.
        pairs: a `FactorTree` or a tree of `FactorDims`; `FactorSpec()` for this
            library's factors.
        damping: δ > 0; without it BᵀB is singular at LoRA's initialisation B = 0.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        inner: another optimiser than AdamW, as a function of the learning rate,
            for example `optax.sgd`, which makes it ScaledGD; b1, b2, eps and
            weight_decay are then unused.

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the gradients. The preconditioner is computed in at least float32.

    Raises:
        InputError: for a damping that is not positive; at `init`, if there are no
            factors, a partner is missing, or a pair differs in rank or layers.

    References:
        Zhang & Pilanci, "Riemannian preconditioned LoRA for fine-tuning foundation
        models", 2024, arXiv:2402.02347, section 3; Tong, Ma & Chi, "Accelerating
        ill-conditioned low-rank matrix estimation via scaled gradient descent", 2021.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> params = {"lora_a": jnp.ones((16, 2)), "lora_b": jnp.zeros((2, 8))}
        >>> tx = ml.scaled_gd(1e-4, ml.NNX_LORA)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
    """
    check_hyperparameters(
        "scaled_gd",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        inner=inner,
    )
    if isinstance(damping, int | float) and not damping > 0:
        raise InputError(
            f"scaled_gd needs a damping above 0, got {damping}: BᵀB is singular where "
            "B = 0, at LoRA's initialisation. The default is 0.01."
        )

    def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)

    factors = factor_tree(pairs)
    optimizer = optax.with_extra_args_support((inner or adamw)(learning_rate))

    def init(params: optax.Params) -> optax.OptState:
        factors.pairs(params)
        return optimizer.init(params)

    def update(updates, state, params=None, **extra_args):
        updates = _preconditioned(updates, params, factors, damping)
        return optimizer.update(updates, state, params, **extra_args)

    return checked("scaled_gd", optax.GradientTransformationExtraArgs(init, update))


def _preconditioned(
    updates: Any, params: Any, factors: FactorTree, damping: Any
) -> Any:
    """Every gradient of a factor times the inverse of its partner's Gram matrix."""
    grams = {}

    def gram(factor: Factor, x: Any) -> None:
        (x,) = at_least_float32(x)
        g = matmul(x.mT, x)
        grams[factor.key] = g + (damping * eye_like(g)).astype(g.dtype)

    factors.map(gram, factors.to_tall(params))
    # One call for all matrices of one shape.
    inverses = dict(zip(grams, stacked(inverse, list(grams.values())), strict=True))

    def scaled(factor: Factor, g: Any) -> Any:
        if factor.partner not in inverses:
            return g
        return times(*at_least_float32(g, inverses[factor.partner])).astype(g.dtype)

    return factors.from_tall(factors.map(scaled, factors.to_tall(updates)), updates)
