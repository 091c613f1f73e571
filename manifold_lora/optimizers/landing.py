"""Any Optax optimiser, attracted to the manifold instead of retracted to it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold, Oblique, Stiefel
from manifold_lora.manifolds.linalg import bounded, matmul, stacked
from manifold_lora.optimizers.checks import checked
from manifold_lora.optimizers.riemannian import cast_like, promoted
from manifold_lora.optimizers.tree import (
    Manifolds,
    check_points,
    is_manifold,
    map_points,
    map_together,
    resolve,
)

# The constraint violation allowed at init: the paper's ⅛, here of max |XᵀX − I|.
_REGION = 1 / 8
_TOO_FAR = (
    f"Landing needs at most {_REGION}. It never leaves zero, LoRA's initialisation, "
    "where the gradient of the penalty vanishes: initialise the other factor as zero."
)


def landing(
    inner: optax.GradientTransformation,
    manifolds: Manifolds,
    *,
    attraction: optax.ScalarOrSchedule | None = None,
    simultaneous: bool = False,
    max_step: float | None = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Let parameters land on their manifolds while any Optax optimiser updates them.

    For every parameter X on `Stiefel` with Euclidean gradient G:

        g ← G − X sym(XᵀG)         the projected gradient
        d ← inner(g)               the optimiser's displacement, learning rate included
        v ← d − X sym(Xᵀd)         projected, and rescaled to ‖v‖₂ ≤ max_step
        Y ← X + v
        X ← Y − μ Y(YᵀY − I)       attracted: the gradient of φ = ¼‖YᵀY − I‖²

    and on `Oblique` the same with diag(·) in place of sym(·) and of the Gram matrix,
    column by column. The attraction multiplies the constraint violation by 1 − 2μ.
    With μ = ½ that is 0: a step equals the polar retraction to fourth order in ‖v‖₂,
    with a violation of ¾‖v‖₂⁴. With `simultaneous=True` the penalty is that at X, as in
    equation 3 of the paper: X ← X + v − μ X(XᵀX − I), with a violation of ‖v‖₂².

    It needs matrix products only: no inverse root and no factorisation. On CPU that is
    not faster than `riemannian` with the polar retraction of this library. To be on
    the manifold after every step use `riemannian`. Euclidean leaves get d
    itself: with `Euclidean()` everywhere this is `inner` bit for bit. It must be the
    last member of a chain: clip before it, and give the learning rate to `inner`.
    Weight decay in `inner` has next to no effect: it is projected away.

    Args:
        inner: any transformation whose output is meant to be added to the
            parameters, such as `optax.adam(1e-3)`. Its state is ambient and
            element-wise.
        manifolds: a prefix tree of the parameters with `Stiefel`, `Oblique` or
            `Euclidean` on each leaf or sub-tree, or a function from the parameters to
            such a tree. Retraction and metric of `Stiefel` are not used.
        attraction: μ, between 0 and 1, or a schedule of it; by default ½, and the
            paper's ⅓ with `simultaneous`.
        simultaneous: take the penalty at X instead of at the new point.
        max_step: the largest ‖v‖₂, of every column on `Oblique`. At the default ½ the
            violation after a step is 4e-2 at most; from 2 on it diverges. None: no
            limit.

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the parameters. Geometry is computed in at least float32.

    Raises:
        InputError: for an attraction or a largest step out of range; at `init`, for
            another manifold, a tree that does not fit, a point of impossible shape,
            or a constraint violation above ⅛. LoRA's initialisation B = 0 never
            lands, since the gradient of the penalty vanishes there.

    References:
        "Retraction-free optimization over the Stiefel manifold with application to
        the LoRA fine-tuning" (Manifold-LoRA), 2024, equation 3, lemma 2, theorem 1;
        Ablin & Peyré, "Fast and accurate optimization on the orthogonal manifold
        without retraction", 2022.

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> stiefel = ml.Stiefel()
        >>> params = {"b": stiefel.random_point(jax.random.key(0), (64, 4))}
        >>> tx = ml.landing(optax.adam(1e-2), {"b": stiefel})
        >>> state = tx.init(params)
        >>> grads = {"b": jnp.ones((64, 4))}
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool(stiefel.residual(params["b"]) < 1e-3)
        True
    """
    if attraction is None:
        attraction = 1 / 3 if simultaneous else 1 / 2
    check_attraction("landing", attraction)
    check_positive("landing", "max_step", max_step)
    tx = optax.chain(
        projected("landing", manifolds),
        inner,
        land(manifolds, attraction, simultaneous=simultaneous, max_step=max_step),
    )
    return checked("landing", tx, manifolds)


def check_attraction(owner: str, attraction: Any) -> None:
    """Raise `InputError` for a number μ that is not between 0 and 1."""
    if isinstance(attraction, int | float) and not 0 < attraction < 1:
        raise InputError(
            f"{owner} needs an attraction between 0 and 1, got {attraction}. A step "
            "multiplies the constraint violation by 1 − 2·attraction, which diverges "
            "from 1 on; ½ lands fastest."
        )


def check_positive(owner: str, field: str, value: Any) -> None:
    """Raise `InputError` for a number that is not above 0."""
    if isinstance(value, int | float) and not value > 0:
        raise InputError(f"{owner} needs {field} above 0, got {value}.")


def _finite_squares(manifold: Manifold, g: Any) -> Any:
    """The vector, shortened where its products would overflow."""
    if isinstance(manifold, Euclidean):
        return g
    return bounded(promoted(g))[0]


def projected(owner: str, manifolds: Manifolds) -> optax.GradientTransformation:
    """Every gradient G − X sym(XᵀG), for points near their manifolds."""

    def project(manifold: Manifold, x: Any, g: Any) -> Any:
        return cast_like(g, manifold.project(x, _finite_squares(manifold, g)))

    def init(params: optax.Params) -> optax.EmptyState:
        _check(owner, resolve(manifolds, params), params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        tree = resolve(manifolds, params)
        return map_points(project, tree, params, updates), state

    return optax.GradientTransformation(init, update)


def land(
    manifolds: Manifolds,
    attraction: optax.ScalarOrSchedule,
    *,
    simultaneous: bool,
    max_step: float | None,
) -> optax.GradientTransformation:
    """Displacements d, projected, rescaled, and attracted to the manifold.

    The last of a chain: it returns the additive updates.
    """

    def init(params: optax.Params) -> Any:
        del params
        if callable(attraction):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(updates, state, params=None):
        mu: Any = attraction
        if callable(attraction):
            mu = attraction(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        step = functools.partial(
            _land, mu=mu, simultaneous=simultaneous, max_step=max_step
        )
        tree = resolve(manifolds, params)
        return map_together(step, tree, params, updates), state

    return optax.GradientTransformation(init, update)


def _land(
    manifold: Any,
    xs: list[Array],
    ds: list[Array],
    *,
    mu: Any,
    simultaneous: bool,
    max_step: float | None,
) -> list[Array]:
    if isinstance(manifold, Euclidean):
        return ds
    olds, xs = xs, [promoted(x) for x in xs]
    ds = [_finite_squares(manifold, d) for d in ds]
    vs = [manifold.project(x, d) for x, d in zip(xs, ds, strict=True)]
    if max_step is not None:
        sizes = _sizes(manifold, vs)
        # Not max_step/size, which is NaN for a zero step.
        vs = [
            v * (max_step / jnp.maximum(size, max_step))
            for v, size in zip(vs, sizes, strict=True)
        ]
    ys = [x + v for x, v in zip(xs, vs, strict=True)]
    penalties = [manifold.penalty_gradient(p) for p in (xs if simultaneous else ys)]
    # Rounded to the dtype of x first, in which the point is stored.
    return [
        (y - mu * penalty).astype(x.dtype) - x
        for x, y, penalty in zip(olds, ys, penalties, strict=True)
    ]


def _sizes(manifold: Manifold, vs: list[Array]) -> list[Array]:
    """The norms that `max_step` limits: ‖v‖₂, or those of the columns on `Oblique`."""
    if isinstance(manifold, Oblique):
        return [jnp.linalg.norm(v, axis=-2, keepdims=True) for v in vs]
    return spectral_norms(vs)


def spectral_norms(xs: list[Array]) -> list[Array]:
    """‖X‖₂ of tall matrices, (…, 1, 1): an upper bound, at most 0.1 % too large.

    With G = XᵀX that is ‖G^(2^k)‖^(1/2^(k+1)) in the Frobenius norm, from k = 10
    squarings, where it is too large by at most the factor r^(1/2^(k+2)).
    """

    def largest(g: Array) -> Array:
        def norm(a: Array) -> Array:
            return jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)

        def square(_: Any, carry: tuple) -> tuple:
            a, total, weight = carry
            a = matmul(a, a)
            size = norm(a)
            size = jnp.where(size > 0, size, 1)
            return a / size, total + weight * jnp.log(size), weight / 2

        start = norm(g)
        a = g / jnp.where(start > 0, start, 1)
        carry = a, jnp.zeros_like(start), jnp.asarray(0.25, g.dtype)
        _, total, _ = jax.lax.fori_loop(0, 10, square, carry)
        return jnp.sqrt(start) * jnp.exp(total)

    return stacked(largest, [matmul(x.mT, x) for x in xs])


def _check(owner: str, manifolds: Any, params: Any) -> None:
    """Raise `InputError` for manifolds without a penalty and points too far off."""
    unknown = [
        m
        for m in jax.tree.leaves(manifolds, is_leaf=is_manifold)
        if is_manifold(m) and not isinstance(m, Stiefel | Oblique | Euclidean)
    ]
    if unknown:
        names = ", ".join(sorted({str(m) for m in unknown}))
        raise InputError(
            f"{owner} needs Stiefel, Oblique or Euclidean, got {names}. These have "
            "retractions: use riemannian."
        )
    near, far = (_problems(manifolds, params, r) for r in (_REGION, math.inf))
    if near:  # explain those that only the violation rules out
        raise InputError("\n".join(p if p in far else f"{p} {_TOO_FAR}" for p in near))


def _problems(manifolds: Any, params: Any, within: float) -> list[str]:
    try:
        check_points(manifolds, params, within)
    except InputError as error:
        return str(error).splitlines()
    return []
