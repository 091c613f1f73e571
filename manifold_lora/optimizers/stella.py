"""The optimiser of StelLA."""

from collections.abc import Callable
from typing import Any

import optax

from manifold_lora.optimizers.checks import check_hyperparameters
from manifold_lora.optimizers.riemannian import riemannian
from manifold_lora.optimizers.tree import Manifolds


def stella(
    learning_rate: optax.ScalarOrSchedule,
    manifolds: Manifolds,
    *,
    hidden_size: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the factors of ΔW = s U S Vᵀ, with U and V orthonormal.

    For X = U and X = V on `Stiefel()`, with Euclidean gradient G:

        g ← G − X GᵀX               the gradient in the canonical metric
        D ← AdamW(g)                the displacement, learning rate included
        D ← D √(hidden_size/rows)   when a hidden size is given
        D ← D − X sym(XᵀD)          projected to the tangent space
        X ← polar(X + D)

    S and every other Euclidean leaf get AdamW itself. The scale makes factors
    with different numbers of rows turn by the same angle. The paper clips the gradients
    of U, S and V together at norm 1 before this: chain
    `optax.clip_by_global_norm(1.0)`. For ΔW = s B Aᵀ with one orthonormal factor use
    `stiefel_lora`.

    Args:
        learning_rate: of all factors; the paper's 5e-4 for LLaMA.
        manifolds: prefix tree of the parameters, or a function to one.
        hidden_size: the model's width d; None: no update scale.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate. It acts on S only: on U and
            V it is normal to the manifold and projected away.
        inner: another optimiser than AdamW, as a function of the learning rate,
            for example `optax.sgd`; b1, b2, eps and weight_decay are then unused.

    Returns:
        A transformation; see `riemannian` for its place in a chain and its errors.

    References:
        Li, Sajadmanesh, Li & Lyu, "StelLA: Subspace learning in low-rank adaptation
        using Stiefel manifold", 2025, arXiv:2510.01938, algorithm 1.

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> stiefel = ml.Stiefel()
        >>> manifolds = {"u": stiefel, "s": ml.Euclidean(), "v": stiefel}
        >>> u, v = (stiefel.random_point(jax.random.key(i), (64, 4)) for i in (0, 1))
        >>> params = {"u": u, "s": jnp.eye(4), "v": v}
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0),
        ...     ml.stella(5e-4, manifolds, hidden_size=64),
        ... )
        >>> state = tx.init(params)
    """
    check_hyperparameters(
        "stella",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        inner=inner,
    )

    def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)

    def scale(x: Any) -> Any:
        return (hidden_size / x.shape[-2]) ** 0.5

    return riemannian(
        (inner or adamw)(learning_rate),
        manifolds,
        update_scale=None if hidden_size is None else scale,
    )
