"""LoRA+: two learning rates for the two factors."""

from collections.abc import Callable
from typing import Any

import optax

from manifold_lora.errors import InputError
from manifold_lora.optimizers.checks import check_hyperparameters, checked
from manifold_lora.optimizers.factor_tree import Factor, factor_tree


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    pairs: Any,
    *,
    ratio: float = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a larger learning rate for B than for A: a baseline.

    For ΔW = s·B Aᵀ the displacement of B is multiplied by the ratio λ:

        A ← A − lr·AdamW(g_A)
        B ← B − λ·lr·AdamW(g_B)

    Leaves that are not factors get AdamW itself: with λ = 1 this is `optax.adamw` bit
    for bit. Use it to compare with plain LoRA at no cost; `scaled_gd` adapts the
    balance to the factors, `stiefel_lora` fixes the scale of B altogether.

    PEFT's `create_loraplus_optimizer` has no default ratio, and gives two more groups
    rates of their own: λ·lr for every 1-D parameter (biases, DoRA's magnitudes), 1e-6
    for LoRA on embeddings. Here they get lr; use `optax.partition` for others.

    Args:
        learning_rate: of A and of all other leaves; a number or a schedule.
        pairs: a `FactorTree` or a tree of `FactorDims`; `FactorSpec()` for this
            library's factors.
        ratio: λ > 0, the rate of B divided by that of A; the paper's 16.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate of the leaf.
        inner: another optimiser than AdamW, as a function of the learning rate,
            for example `optax.sgd`; b1, b2, eps and weight_decay are then unused.

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the gradients.

    Raises:
        InputError: for a ratio that is not positive; at `init`, if there are no
            factors, a partner is missing, or a pair differs in rank or layers.

    References:
        Hayou, Ghosh & Yu, "LoRA+: Efficient low rank adaptation of large models",
        2024, arXiv:2402.12354.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> params = {"lora_a": jnp.ones((16, 2)), "lora_b": jnp.zeros((2, 8))}
        >>> tx = ml.lora_plus(1e-4, ml.NNX_LORA)
        >>> updates, _ = tx.update(params, tx.init(params), params)
    """
    check_hyperparameters(
        "lora_plus",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        inner=inner,
    )
    if isinstance(ratio, int | float) and not ratio > 0:
        raise InputError(
            f"lora_plus needs a ratio above 0, got {ratio}. The paper's is 16; "
            "1 is plain LoRA."
        )

    def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)

    factors = factor_tree(pairs)
    optimizer = optax.with_extra_args_support((inner or adamw)(learning_rate))

    def init(params: optax.Params) -> optax.OptState:
        factors.pairs(params)
        return optimizer.init(params)

    def scaled(factor: Factor, u: Any) -> Any:
        return (ratio * u).astype(u.dtype) if factor.dims.side == "b" else u

    def update(updates, state, params=None, **extra_args):
        updates, state = optimizer.update(updates, state, params, **extra_args)
        return factors.map(scaled, updates), state

    return checked("lora_plus", optax.GradientTransformationExtraArgs(init, update))
