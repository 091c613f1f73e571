"""The optimiser of Stiefel-LoRA."""

from collections.abc import Callable

import jax
import optax

from manifold_lora.manifolds import Euclidean
from manifold_lora.optimizers.checks import check_hyperparameters
from manifold_lora.optimizers.riemannian import riemannian
from manifold_lora.optimizers.tree import Manifolds, is_manifold, resolve


def stiefel_lora(
    learning_rate: optax.ScalarOrSchedule,
    manifolds: Manifolds,
    *,
    free_learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in Euclidean space, projected and retracted, with two learning rates.

    For a factor B on the Stiefel manifold with Euclidean gradient G:

        M ← m̂/(√v̂ + ε)          Adam's direction from the moments of G
        ξ = M − B sym(BᵀM)        projected to the tangent space
        B ← qr(B − lr·ξ)          when its manifold is `Stiefel("qr")`, as in the paper

    It is meant for a B whose partner A is free: only then are its fixed points
    stationary, since A's gradient is GᵀB. For a factor without a partner
    use `riemannian` with the Riemannian gradient.

    Free factors get plain Adam at their own rate. Weight decay does nothing to B,
    where it is normal to the manifold and projected away.

    Args:
        learning_rate: rate of the constrained factors; the paper's 0.1 to 0.3
            (an orthonormal factor has to turn by angles of order 1).
        manifolds: prefix tree of the parameters, or a function to one.
        free_learning_rate: rate of all Euclidean leaves, as for AdamW.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        inner: another optimiser than AdamW, as a function of the learning rate,
            for example `optax.sgd`; b1, b2, eps and weight_decay are then unused.

    Returns:
        A transformation; see `riemannian` for its place in a chain and its errors.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901, algorithm 1.

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> manifolds = {"a": ml.Euclidean(), "b": ml.Stiefel("qr")}
        >>> b = ml.Stiefel().random_point(jax.random.key(0), (64, 4))
        >>> params = {"a": jnp.zeros((32, 4)), "b": b}
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0), ml.stiefel_lora(0.2, manifolds)
        ... )
        >>> state = tx.init(params)
    """
    check_hyperparameters(
        "stiefel_lora",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        free_learning_rate=free_learning_rate,
        inner=inner,
    )

    def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)

    def labels(params):
        return jax.tree.map(
            lambda m: "free" if isinstance(m, Euclidean) else "constrained",
            resolve(manifolds, params),
            is_leaf=is_manifold,
        )

    rates = {"constrained": learning_rate, "free": free_learning_rate}
    by_kind = optax.partition(
        {k: (inner or adamw)(rate) for k, rate in rates.items()}, labels
    )
    return riemannian(by_kind, manifolds, gradient="euclidean")
