"""Any Optax optimiser, made Riemannian."""

from typing import Literal, get_args

import optax
from jax import Array

from manifold_lora.errors import InputError, nearest
from manifold_lora.manifolds import Euclidean, Manifold
from manifold_lora.manifolds.linalg import at_least_float32
from manifold_lora.optimizers.tree import Manifolds, check_points, map_points, resolve

Gradient = Literal["riemannian", "euclidean"]


def riemannian(
    inner: optax.GradientTransformation,
    manifolds: Manifolds,
    *,
    gradient: Gradient = "riemannian",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep parameters on their manifolds while any Optax optimiser moves them.

    For every parameter x with Euclidean gradient g, on its manifold:

        g ← grad f(x)          the Riemannian gradient (unless gradient="euclidean")
        d ← inner(g)           the optimiser's displacement, learning rate included
        v ← P_x(d)             projected to the tangent space
        u = R(x, v) − x        retracted, as the additive update Optax applies

    Euclidean leaves get d itself: with `Euclidean()` everywhere this is `inner`
    bit for bit.

    This must be the last member of a chain: scaling, weight decay, clipping or
    averaging after it leaves the manifold. Clip before it; give the learning rate
    and decay to `inner`. For the method of a paper use its recipe, for example
    `stiefel_lora`.

    Args:
        inner: any transformation whose output is meant to be added to the
            parameters, such as `optax.adam(1e-3)`. Its state is ambient and
            element-wise.
        manifolds: a prefix tree of the parameters with a `Manifold` on each leaf or
            sub-tree, or a function from the parameters to such a tree.
        gradient: "riemannian" feeds `inner` the Riemannian gradient (StelLA, LoRAM);
            "euclidean" feeds it the plain one, so that the moments are Euclidean
            and only the displacement is projected (Stiefel-LoRA).

    Returns:
        A transformation whose `update` needs `params`, with updates in the dtype of
        the parameters. Geometry is computed in at least float32.

    Raises:
        InputError: for an unknown `gradient`; at `init`, for a tree that does not
            fit, a point of impossible shape, or one that is off its manifold.

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
    if gradient not in get_args(Gradient):
        hint = nearest(str(gradient), get_args(Gradient))
        raise InputError(f"riemannian has no gradient {gradient!r}. {hint}")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        check_points(resolve(manifolds, params), params)
        return inner.init(params)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "riemannian needs the parameters: call update(grads, state, params)."
            )
        tree = resolve(manifolds, params)
        if gradient == "riemannian":
            updates = map_points(_gradient, tree, params, updates)
        updates, state = inner.update(updates, state, params, **extra_args)
        return map_points(displacement, tree, params, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _gradient(manifold: Manifold, x: Array, g: Array) -> Array:
    return manifold.riemannian_gradient(x, g).astype(g.dtype)


def displacement(manifold: Manifold, x: Array, d: Array) -> Array:
    """The additive update R(x, P_x(d)) − x, rounded to the dtype of x first."""
    if isinstance(manifold, Euclidean):
        return d
    point, d = at_least_float32(x, d)
    y = manifold.retract(point, manifold.project(point, d))
    return y.astype(x.dtype) - x
