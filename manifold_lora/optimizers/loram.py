"""The optimiser of LoRAM: Riemannian Adam with transported momentum."""

from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from manifold_lora.errors import InputError, check_choice
from manifold_lora.manifolds import BoundedRank, Euclidean, Manifold
from manifold_lora.optimizers.checks import check_hyperparameters
from manifold_lora.optimizers.riemannian import promoted, riemannian
from manifold_lora.optimizers.tree import Manifolds, is_manifold, map_points, resolve

SecondMoment = Literal["row", "coordinate", "scalar"]


def loram(
    learning_rate: optax.ScalarOrSchedule,
    manifolds: Manifolds,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    second_moment: SecondMoment = "row",
    bias_correction: bool = False,
    weight_decay: float = 0.0,
    nuclear_decay: float = 0.0,
    nuclear_decay_scaled_by_learning_rate: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian AdamW for update matrices of fixed or bounded rank.

    For a point x on `FixedRank("orthographic")` or `BoundedRank()`:

        g ← grad f(x)
        m ← β₁ m + (1 − β₁) g
        v ← β₂ v + (1 − β₂) g²          g² averaged as `second_moment` says
        x⁺ ← R(x, −lr·m/(√v + ε))       projected to the tangent space first
        m ← T_{x→x⁺}(m)                 transported, unlike v
        σ(x⁺) ← max(σ(x⁺) − λ, 0)       nuclear decay, `BoundedRank` only

    Other leaves get plain AdamW. At fixed rank the gradients are the pair
    (G V, UᵀG V, GᵀU) that `FixedRank.riemannian_gradient` asks for.

    Args:
        learning_rate: of all leaves; the paper's 3e-5 to 1e-4.
        manifolds: prefix tree of the parameters, or a function to one.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        second_moment: "row", one number per row of a tall factor and one for the whole
            of s: n floats instead of n·r, and the same trajectory whatever
            rotation of the columns represents the point (the default); "coordinate",
            the paper's; "scalar", one number per matrix.
        bias_correction: divide m and v by 1 − βᵗ as Adam does. The paper does not.
        weight_decay: decoupled, times the learning rate, of ΔW itself: on a and s.
        nuclear_decay: λ, taken off every singular value after each step.
        nuclear_decay_scaled_by_learning_rate: take off λ times the learning rate.
            The paper's algorithm 7 takes off λ, and only then does its 1e-3 have an
            effect of the reported size.

    Returns:
        A transformation; see `riemannian` for its place in a chain and its errors.

    Raises:
        InputError: for an unknown `second_moment`; at `init`, for nuclear decay
            without a point on `BoundedRank`.

    References:
        Jiang, Wang & Stich, "LoRAM: Low-rank adaptation of large language models on
        manifold", 2025, algorithms 1 and 5.

    Examples:
        >>> import jax
        >>> import manifold_lora as ml
        >>> manifold = ml.BoundedRank()
        >>> x = manifold.random_point(jax.random.key(0), (32, 64, 4))
        >>> tx = ml.loram(1e-4, {"layer": manifold}, nuclear_decay=1e-3)
        >>> state = tx.init({"layer": x})
    """
    check_hyperparameters(
        "loram",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    check_choice("loram", "second_moment", second_moment, SecondMoment)
    if isinstance(nuclear_decay, float | int) and nuclear_decay < 0:
        raise InputError(f"loram needs nuclear_decay ≥ 0, got {nuclear_decay}.")

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda m: "free" if isinstance(m, Euclidean) else "constrained",
            resolve(manifolds, params),
            is_leaf=is_manifold,
        )

    def carries_weight(params: Any) -> Any:
        return map_points(_carries_weight, resolve(manifolds, params), params)

    moments: dict[Hashable, optax.GradientTransformation] = {
        "constrained": scale_by_mean_adam(
            b1, b2, eps, second_moment, bias_correction=bias_correction
        ),
        "free": optax.scale_by_adam(b1, b2, eps),
    }
    adamw = optax.chain(
        optax.partition(moments, labels),
        optax.add_decayed_weights(weight_decay, carries_weight),
        optax.scale_by_learning_rate(learning_rate),
    )
    step = riemannian(adamw, manifolds, transport=True)
    if isinstance(nuclear_decay, float | int) and nuclear_decay == 0:
        return step
    decay = _shrink(
        nuclear_decay,
        learning_rate if nuclear_decay_scaled_by_learning_rate else 1.0,
        manifolds,
    )
    return optax.with_extra_args_support(optax.chain(step, decay))


def scale_by_mean_adam(
    b1: float, b2: float, eps: float, second_moment: SecondMoment, *, bias_correction
) -> optax.GradientTransformation:
    """m/(√v + ε), with v averaged over rows or matrices, or per coordinate."""

    def mean_square(g: Array) -> Array:
        if second_moment == "coordinate":
            return g**2
        # For FixedRank's square s only the mean of all entries is gauge-invariant.
        by_row = second_moment == "row" and g.shape[-2] > g.shape[-1]
        return jnp.mean(g**2, -1 if by_row else (-2, -1), keepdims=True)

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        mu = optax.tree.zeros_like(params)
        nu = jax.tree.map(mean_square, mu)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        squares = jax.tree.map(mean_square, updates)
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(squares, state.nu, b2, 1)
        m, v = mu, nu
        if bias_correction:
            m = optax.tree.bias_correction(mu, b1, count)
            v = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _carries_weight(manifold: Manifold, x: Any) -> Any:
    """True for free leaves and for the parts of a point that scale with ΔW."""
    if isinstance(manifold, Euclidean):
        return True
    return {key: key in ("a", "s") for key in x} if manifold.parts else False


def _shrink(
    threshold: Any, rate: optax.ScalarOrSchedule, manifolds: Manifolds
) -> optax.GradientTransformation:
    """The proximal step of the nuclear norm, after the retraction."""

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        tree = resolve(manifolds, params)
        kinds = jax.tree.leaves(tree, is_leaf=is_manifold)
        if (
            isinstance(threshold, float | int)
            and jax.tree.leaves(params)
            and not any(isinstance(m, BoundedRank) for m in kinds)
        ):
            raise InputError(
                "nuclear_decay needs a point on BoundedRank, got "
                f"{', '.join(sorted({str(m) for m in kinds}))}. Set it to 0."
            )
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        value = threshold * (rate(state.count) if callable(rate) else rate)

        def shrink(manifold: Manifold, x: Any, u: Any) -> Any:
            if not isinstance(manifold, BoundedRank):
                return u
            y = manifold.shrink(jax.tree.map(jnp.add, promoted(x), promoted(u)), value)
            return jax.tree.map(lambda y, x: y.astype(x.dtype) - x, y, x)

        updates = map_points(shrink, resolve(manifolds, params), params, updates)
        count = optax.safe_increment(state.count)
        return updates, optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)
