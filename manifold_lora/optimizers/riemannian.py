"""Any Optax optimiser, made Riemannian."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from manifold_lora.errors import InputError, check_choice
from manifold_lora.manifolds import Euclidean, Manifold
from manifold_lora.manifolds.linalg import at_least_float32
from manifold_lora.optimizers import moments
from manifold_lora.optimizers.checks import checked
from manifold_lora.optimizers.tree import (
    Manifolds,
    check_points,
    map_points,
    map_together,
    resolve,
)

Gradient = Literal["riemannian", "euclidean"]


def riemannian(
    inner: optax.GradientTransformation,
    manifolds: Manifolds,
    *,
    gradient: Gradient = "riemannian",
    transport: bool = False,
    update_scale: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep parameters on their manifolds while any Optax optimiser moves them.

    For every parameter x with Euclidean gradient g, on its manifold:

        g ← grad f(x)          the Riemannian gradient (unless gradient="euclidean")
        d ← inner(g)           the optimiser's displacement, learning rate included
        d ← d·scale(x)         where an update scale is given
        v ← P_x(d)             projected to the tangent space
        u = R(x, v) − x        retracted, as the additive update Optax applies
        m ← T_{x→x+u}(m)       first moments of the inner state, where transport=True

    Euclidean leaves get d itself: with `Euclidean()` everywhere this is `inner`
    bit for bit.

    This must be the last member of a chain: scaling, weight decay, clipping or
    averaging after it leaves the manifold. Clip before it; give the learning rate
    and decay to `inner`. For the method of a paper use its recipe, such as
    `stiefel_lora`.

    Args:
        inner: any transformation whose output is meant to be added to the
            parameters, such as `optax.adam(1e-3)`. Its state is ambient and
            element-wise.
        manifolds: a prefix tree of the parameters with a `Manifold` on each leaf or
            sub-tree, or a function from the parameters to such a tree. A nested
            dict also fits an `nnx.State`.
        gradient: "riemannian" feeds `inner` the Riemannian gradient (StelLA, LoRAM);
            "euclidean" feeds it the plain one, so that the moments are Euclidean
            and only the displacement is projected (Stiefel-LoRA).
        transport: transport the first moments along with the points (LoRAM). They
            are the fields named mu, trace, m, m1, m2 or ema of any state within
            the inner state; second moments are not tangents and do not change.
        update_scale: factor on the displacement of a constrained point, as a
            function of the point, for example StelLA's √(d/rows). Euclidean leaves
            are never scaled.

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the parameters. Geometry is computed in at least float32, and any finite
        step stays on the manifold: gradients and displacements are shortened where
        float32 ends, see the `retract` of each manifold. `optax.inject_hyperparams`
        works with trees of manifolds; it takes every function for a schedule, so that
        functions, such as one that makes the tree, must be named in its `static_args`.

    Raises:
        InputError: for an unknown `gradient`; at `init`, for a tree that does not
            fit, a point of impossible shape or that is not of real floating-point
            numbers, or one that is not on its manifold, and for `transport` where the
            inner state has no first moment; at `update`, for gradients of other shapes
            and for a state of other parameters.

    References:
        Absil, Mahony & Sepulchre, "Optimization Algorithms on Matrix Manifolds",
        2008, section 4.1; Bécigneul & Ganea, "Riemannian adaptive optimization
        methods", 2019, arXiv:1810.00760.

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> stiefel = ml.Stiefel()
        >>> params = {"b": stiefel.random_point(jax.random.key(0), (64, 4))}
        >>> tx = ml.riemannian(optax.adam(1e-2), {"b": stiefel})
        >>> state = tx.init(params)
        >>> grads = {"b": jnp.ones((64, 4))}
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool(stiefel.residual(params["b"]) < 1e-6)
        True
    """
    check_choice("riemannian", "gradient", gradient, Gradient)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        if transport and jax.tree.leaves(params) and not moments.has_any(state):
            raise InputError(
                "transport=True, but the inner state has no first moment: no field "
                f"named {', '.join(moments.NAMES)}. Leave transport out, or rename "
                "the field of the moment."
            )
        return state

    def update(updates, state, params=None, **extra_args):
        tree = resolve(manifolds, params)
        if gradient == "riemannian":
            updates = map_points(_gradient, tree, params, updates)
        updates, state = inner.update(updates, state, params, **extra_args)
        if update_scale is not None:
            scale = functools.partial(_scaled, update_scale)
            updates = map_points(scale, tree, params, updates)
        updates = map_together(displacements, tree, params, updates)
        if transport:
            transport_all = functools.partial(
                map_points, _transport, tree, params, updates
            )
            state = moments.replace(transport_all, state)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(init, update)
    return checked(
        "riemannian",
        tx,
        manifolds,
        lambda params: check_points(resolve(manifolds, params), params),
    )


def _gradient(manifold: Manifold, x: Any, g: Any) -> Any:
    return cast_like(g, manifold.riemannian_gradient(x, promoted(g)))


def _scaled(update_scale: Callable[[Any], Any], manifold: Manifold, x: Any, d: Any):
    if isinstance(manifold, Euclidean):
        return d
    return cast_like(d, jax.tree.map(lambda leaf: update_scale(x) * leaf, d))


def displacements(manifold: Manifold, xs: list[Any], ds: list[Any]) -> list[Any]:
    """The additive updates R(x, P_x(d)) − x, rounded to the dtype of x first."""
    if isinstance(manifold, Euclidean):
        return ds
    ys = manifold.step([promoted(x) for x in xs], [promoted(d) for d in ds])
    return [
        jax.tree.map(lambda y, x: y.astype(x.dtype) - x, y, x)
        for y, x in zip(ys, xs, strict=True)
    ]


def _transport(manifold: Manifold, x: Any, u: Any, m: Any) -> Any:
    y = jax.tree.map(lambda x, u: x + u, x, u)
    return cast_like(m, manifold.transport(promoted(x), promoted(y), promoted(m)))


def promoted(tree: Any) -> Any:
    """The arrays in at least float32."""
    return jax.tree.map(lambda x: at_least_float32(x)[0], tree)


def cast_like(old: Any, new: Any) -> Any:
    """The new arrays, in the dtypes of the old ones."""
    return jax.tree.map(lambda o, n: n.astype(o.dtype), old, new)
