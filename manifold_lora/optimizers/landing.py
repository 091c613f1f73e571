"""Any Optax optimiser, pulled back to the manifold instead of retracted to it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold, Oblique, Stiefel
from manifold_lora.manifolds.linalg import matmul, stacked
from manifold_lora.optimizers.riemannian import like, wide
from manifold_lora.optimizers.tree import (
    Manifolds,
    check_points,
    check_update,
    is_manifold,
    map_points,
    map_together,
    resolve,
)

# A point may start this far off: the paper's ⅛, here of the largest entry of XᵀX − I.
_REGION = 1 / 8
_TOO_FAR = (
    f"It would have to be within {_REGION} to land, and from zero, where LoRA starts, "
    "it never does: the pull vanishes there. Its partner may start at zero."
)


def landing(
    inner: optax.GradientTransformation,
    manifolds: Manifolds,
    *,
    attraction: optax.ScalarOrSchedule | None = None,
    simultaneous: bool = False,
    max_step: float | None = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Let parameters land on their manifolds while any Optax optimiser moves them.

    For every parameter X on `Stiefel` with Euclidean gradient G:

        g ← G − X sym(XᵀG)         the projected gradient
        d ← inner(g)               the optimiser's displacement, learning rate included
        v ← d − X sym(Xᵀd)         projected, and shortened to ‖v‖₂ ≤ max_step
        Y ← X + v
        X ← Y − μ Y(YᵀY − I)       pulled: the gradient of φ = ¼‖YᵀY − I‖²

    and on `Oblique` the same with diag(·) in place of sym(·) and of the Gram matrix,
    column by column. The pull takes what is off the manifold times 1 − 2μ. With
    μ = ½ that is 0: a step equals the polar retraction to fourth order in ‖v‖₂, and
    ends ¾‖v‖₂⁴ off. With `simultaneous=True` the pull is taken at X, as in equation 3
    of the paper: X ← X + v − μ X(XᵀX − I), which ends ‖v‖₂² off.

    It costs products only: no inverse root and no factorisation. On a CPU that is no
    less time than `riemannian` takes with the polar retraction of this library.
    To be on the manifold after every step use `riemannian`. Euclidean leaves get d
    itself: with `Euclidean()` everywhere this is `inner` bit for bit. It must be the
    last member of a chain: clip before it, and give the learning rate to `inner`.
    Weight decay in `inner` all but vanishes: it is projected away.

    Args:
        inner: any transformation whose output is meant to be added to the
            parameters, such as `optax.adam(1e-3)`. Its state is ambient and
            element-wise.
        manifolds: a prefix tree of the parameters with `Stiefel`, `Oblique` or
            `Euclidean` on each leaf or sub-tree, or a function from the parameters to
            such a tree. Retraction and metric of `Stiefel` are not used.
        attraction: μ, between 0 and 1, or a schedule of it; by default ½, and the
            paper's ⅓ with `simultaneous`.
        simultaneous: pull at X instead of at the new point.
        max_step: the largest ‖v‖₂, of every column on `Oblique`. Half is as far as
            the pull reaches well: it ends 4e-2 off there, and diverges from 2 on.
            None: no limit.

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the parameters. Geometry is computed in at least float32.

    Raises:
        InputError: for an attraction or a largest step out of range; at `init`, for
            another manifold, a tree that does not fit, a point of impossible shape,
            or one with an entry of XᵀX − I above ⅛. LoRA's start at zero never lands,
            for the pull vanishes there.

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
    return optax.chain(
        projected("landing", manifolds),
        inner,
        land(manifolds, attraction, simultaneous=simultaneous, max_step=max_step),
    )


def check_attraction(owner: str, attraction: Any) -> None:
    """Raise `InputError` unless a number μ is between 0 and 1."""
    if isinstance(attraction, int | float) and not 0 < attraction < 1:
        raise InputError(
            f"{owner} needs an attraction between 0 and 1, got {attraction}. A step "
            "takes the distance from the manifold times 1 − 2·attraction, which "
            "diverges from 1 on; ½ lands fastest."
        )


def check_positive(owner: str, field: str, value: Any) -> None:
    """Raise `InputError` for a number that is not above 0."""
    if isinstance(value, int | float) and not value > 0:
        raise InputError(f"{owner} needs {field} above 0, got {value}.")


def projected(owner: str, manifolds: Manifolds) -> optax.GradientTransformation:
    """Every gradient G − X sym(XᵀG), for points near their manifolds."""

    def project(manifold: Manifold, x: Any, g: Any) -> Any:
        return like(g, manifold.project(x, g))

    def init(params: optax.Params) -> optax.EmptyState:
        _check(owner, resolve(manifolds, params), params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_update(owner, updates, params)
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
    """Displacements d, projected, shortened, and pulled to the manifold.

    The last of a chain: what it returns are the additive updates.
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
    olds, xs = xs, [wide(x) for x in xs]
    vs = [manifold.project(x, d) for x, d in zip(xs, ds, strict=True)]
    if max_step is not None:
        sizes = _sizes(manifold, vs)
        # Not a quotient of the two, which is NaN for no step at all.
        vs = [
            v * (max_step / jnp.maximum(size, max_step))
            for v, size in zip(vs, sizes, strict=True)
        ]
    ys = [x + v for x, v in zip(xs, vs, strict=True)]
    pulls = [manifold.penalty_gradient(p) for p in (xs if simultaneous else ys)]
    # Rounded to the dtype of x first, as what will be stored.
    return [
        (y - mu * pull).astype(x.dtype) - x
        for x, y, pull in zip(olds, ys, pulls, strict=True)
    ]


def _sizes(manifold: Manifold, vs: list[Array]) -> list[Array]:
    """What `max_step` limits: ‖v‖₂, or the length of every column on `Oblique`."""
    if isinstance(manifold, Oblique):
        return [jnp.linalg.norm(v, axis=-2, keepdims=True) for v in vs]
    return spectral_norms(vs)


def spectral_norms(xs: list[Array]) -> list[Array]:
    """‖X‖₂ of tall matrices, (…, 1, 1), from above and by at most 1 in 1000 too large.

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
    """Raise `InputError` for manifolds without a pull, and points it cannot reach."""
    unknown = [
        m
        for m in jax.tree.leaves(manifolds, is_leaf=is_manifold)
        if is_manifold(m) and not isinstance(m, Stiefel | Oblique | Euclidean)
    ]
    if unknown:
        names = ", ".join(sorted({str(m) for m in unknown}))
        raise InputError(
            f"{owner} knows Stiefel, Oblique and Euclidean, got {names}. These have "
            "retractions: use riemannian."
        )
    near, far = (_problems(manifolds, params, r) for r in (_REGION, math.inf))
    if near:  # what only the distance rules out gets a word more
        raise InputError("\n".join(p if p in far else f"{p} {_TOO_FAR}" for p in near))


def _problems(manifolds: Any, params: Any, within: float) -> list[str]:
    try:
        check_points(manifolds, params, within)
    except InputError as error:
        return str(error).splitlines()
    return []
