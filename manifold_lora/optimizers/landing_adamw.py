"""The optimiser of Manifold-LoRA: AdamW with landing instead of retraction."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from manifold_lora.errors import InputError, check_choice
from manifold_lora.manifolds import Euclidean
from manifold_lora.optimizers.checks import check_hyperparameters, checked
from manifold_lora.optimizers.landing import (
    check_attraction,
    check_positive,
    land,
    projected,
    spectral_norms,
)
from manifold_lora.optimizers.riemannian import promoted
from manifold_lora.optimizers.tree import Manifolds, map_points, resolve

NormRule = Literal["inverse_square", "literal"]


def landing_adamw(
    learning_rate: optax.ScalarOrSchedule,
    manifolds: Manifolds,
    *,
    penalty_weight: float = 1.0,
    attraction: optax.ScalarOrSchedule | None = None,
    norm_rule: NormRule = "inverse_square",
    lower: float = 0.5,
    upper: float = 4.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_step: float | None = 0.5,
    inner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Landing AdamW, with rates balanced between the two factors of a pair.

    For ΔW = s·B Aᵀ with B on `Stiefel()` or `Oblique()` and A free:

        g ← G − B sym(BᵀG)                      for B; A's gradient as it is
        d ← AdamW(g) · clip(1/‖other‖₂², lower, upper)
        A ← A + d
        B ← B + v,   v = d − B sym(Bᵀd)         rescaled to ‖v‖₂ ≤ max_step
        B ← B − lr·ω·4 B(BᵀB − I)               the gradient of ω‖BᵀB − I‖²

    Use it to reproduce the paper's numbers; `landing` with μ = ½ stays closer to the
    manifold, and `stiefel_lora` on it. The steps of each factor shrink as the
    other grows, as the Lipschitz constants of the two gradients do. Two leaves are a
    pair where they are siblings: the only constrained leaf of a node of the tree, and
    the only Euclidean one there of the same rank and layers. All others get AdamW
    itself. Inside `optax.partition` both must have one label.

    The paper's algorithm 1 is ambiguous and no public code settles it. As printed it

    - clips in the order (norm, upper, lower), steps by η = clip(norm) without a
      learning rate, and does not say that a larger partner needs smaller steps. Here
      the clipped inverse square multiplies the learning rate;
    - steps by ω∇‖BᵀB − I‖² with ω near 1, which multiplies the constraint violation
      by 1 − 8ω and diverges. Here the learning rate multiplies this step;
    - adds Adam's direction as it is, whose normal part makes the violation some ten
      times larger (3e-2 against 2e-3 at a rate of 3e-3). Here it is projected, as in
      `landing`;
    - decays both factors by λ, not by lr·λ. Here AdamW decays the free leaves, at
      their own rate; on B the decay would be projected away.

    Args:
        learning_rate: of all leaves; the paper's 2e-4 to 3e-3.
        manifolds: prefix tree of the parameters with `Stiefel`, `Oblique` and
            `Euclidean`, or a function to one.
        penalty_weight: ω > 0 of the penalty ‖BᵀB − I‖², the paper's μ; its tables
            have 0.8 to 1.2. The step 4·lr·ω B(BᵀB − I) is limited to half of
            B(BᵀB − I), beyond which it overshoots.
        attraction: μ as in `landing`: step by μ B(BᵀB − I) whatever the learning rate;
            penalty_weight is then unused. ½ lands fastest.
        norm_rule: "inverse_square", clip(1/‖other‖₂², lower, upper), by the
            Lipschitz constants; or "literal", clip(‖other‖₂, lower, upper).
        lower: the smallest multiple of the learning rate.
        upper: the largest multiple; a partner at zero gives it.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of free leaves, decoupled, times their rate.
        max_step: the largest ‖v‖₂; see `landing`.
        inner: another optimiser than AdamW, as a function of the learning rate,
            for example `optax.sgd`; b1, b2, eps and weight_decay are then unused.

    Returns:
        A transformation; see `landing` for its place in a chain.

    Raises:
        InputError: for an unknown `norm_rule`, a weight, an attraction, bounds or a
            largest step out of range; at `init` as `landing`.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, algorithm 1 and tables 4 to 6.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> manifolds = {"a": ml.Euclidean(), "b": ml.Stiefel()}
        >>> b = ml.Stiefel().random_point(jax.random.key(0), (64, 4))
        >>> params = {"a": jnp.zeros((32, 4)), "b": b}
        >>> tx = ml.landing_adamw(2e-4, manifolds, weight_decay=0.01)
        >>> state = tx.init(params)
    """
    check_hyperparameters(
        "landing_adamw",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        inner=inner,
    )
    check_choice("landing_adamw", "norm_rule", norm_rule, NormRule)
    if isinstance(lower, int | float) and isinstance(upper, int | float):
        if not 0 < lower <= upper:
            raise InputError(
                "landing_adamw needs bounds 0 < lower ≤ upper, got "
                f"lower={lower} and upper={upper}."
            )
    check_positive("landing_adamw", "max_step", max_step)
    check_positive("landing_adamw", "penalty_weight", penalty_weight)
    check_attraction("landing_adamw", attraction)
    mu: Any = attraction
    if attraction is None:
        mu = _attraction_of_penalty(penalty_weight, learning_rate)

    def free(params: Any) -> Any:
        tree = resolve(manifolds, params)
        return map_points(lambda m, _: isinstance(m, Euclidean), tree, params)

    def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=free)

    tx = optax.chain(
        projected("landing_adamw", manifolds),
        (inner or adamw)(learning_rate),
        _balanced(manifolds, norm_rule, lower, upper),
        land(manifolds, mu, simultaneous=False, max_step=max_step),
    )
    return checked("landing_adamw", tx, manifolds)


def _attraction_of_penalty(weight: Any, rate: optax.ScalarOrSchedule) -> Any:
    """μ = 4·lr·ω, at most ½; a schedule where the rate is one."""

    def at(rate: Any) -> Any:
        mu = 4 * weight * rate
        return min(mu, 0.5) if isinstance(mu, float) else jnp.minimum(mu, 0.5)

    return (lambda count: at(rate(count))) if callable(rate) else at(rate)


def _balanced(
    manifolds: Manifolds, rule: NormRule, lower: Any, upper: Any
) -> optax.GradientTransformation:
    """Displacements of paired leaves, multiplied by the rule for their partners."""

    def multiple(norm: Array) -> Array:
        if rule == "literal":
            return jnp.clip(norm, lower, upper)
        return 1 / jnp.clip(norm**2, 1 / upper, 1 / lower)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(params)
        ds = structure.flatten_up_to(updates)
        partners = _partners(resolve(manifolds, params), params)
        norms = spectral_norms([promoted(leaves[j]) for j in partners.values()])
        for i, norm in zip(partners, norms, strict=True):
            ds[i] = (ds[i] * multiple(norm)).astype(ds[i].dtype)
        return structure.unflatten(ds), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _partners(manifolds: Any, params: Any) -> dict[int, int]:
    """The index of each leaf that has a partner, and the index of the partner."""
    tree = map_points(
        lambda m, x: jax.tree.map(lambda _: isinstance(m, Euclidean), x),
        manifolds,
        params,
    )
    siblings: dict[tuple, list[tuple[int, bool, Any]]] = {}
    places = tree_flatten_with_path(params)[0]
    for i, ((path, x), free) in enumerate(
        zip(places, jax.tree.leaves(tree), strict=True)
    ):
        # The leaf of a flax variable is its value.
        name = path[:-1] if path[-1:] == (GetAttrKey("value"),) else path
        siblings.setdefault(name[:-1], []).append((i, free, x))
    partners = {}
    for family in siblings.values():
        constrained = [(i, x) for i, free, x in family if not free]
        if len(constrained) != 1:
            continue
        ((i, b),) = constrained
        others = [
            j
            for j, free, a in family
            if free and a.ndim == b.ndim and _layers(a) == _layers(b)
        ]
        if len(others) == 1:
            partners |= {i: others[0], others[0]: i}
    return partners


def _layers(x: Any) -> tuple:
    return *x.shape[:-2], x.shape[-1]
