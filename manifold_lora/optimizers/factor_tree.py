"""Which leaves of a tree of parameters are factors, and a tall view of them.

Inside this library a factor is tall, (…, rows, r), and called "a" or "b". Other
libraries shape it (r, heads, head_dim): `FactorDims` on each leaf says so.
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import tree_leaves_with_path

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold, Stiefel
from manifold_lora.optimizers.tree import (
    flatten_prefix,
    leaf_name,
    with_containers_of,
)

Side = Literal["a", "b"]
_EUCLIDEAN, _STIEFEL = Euclidean(), Stiefel()


class FactorDims(NamedTuple):
    """Dimension numbers of one factor of ΔW = s B Aᵀ: which one it is, and its axes.

    The counterpart of `optax.contrib.MuonDimensionNumbers`. All axes but the rank and
    the layers, such as (heads, head_dim), are rows together.

    Args:
        side: "a" for the factor of the inputs, "b" for that of the outputs.
        rank_axis: axis of the rank, counted without the layer axes.
        layer_axes: axes that stack layers. None: every axis before the last two.
        pair: the same value for the two factors of one ΔW. None: the two are
            siblings, the only factors of their node of the tree.
    """

    side: Side
    rank_axis: int = -1
    layer_axes: tuple[int, ...] | None = None
    pair: Hashable = None


class Factor(NamedTuple):
    """One leaf with `FactorDims`, its pair being unique in the tree."""

    name: str
    dims: FactorDims

    @property
    def key(self) -> tuple[Hashable, Side]:
        """The pair and the side."""
        return self.dims.pair, self.dims.side

    @property
    def partner(self) -> tuple[Hashable, Side]:
        """The pair and the side of the other factor."""
        return self.dims.pair, "b" if self.dims.side == "a" else "a"


class FactorTree:
    """The factors in a tree of parameters, described leaf by leaf.

    Use it where the parameters are not this library's. `tall` lets any transformation
    see the factors as tall arrays, `manifolds` puts them on manifolds, `init` draws
    them, and `scaled_gd` and `lora_plus` find the two factors of a pair with it. To
    describe them by their names instead, use `FactorSpec`, which has the same methods.

    Args:
        dims: a prefix tree of the parameters with `FactorDims` on factors and None on
            all else, or a function from the parameters to such a tree (it may look at
            structure and shapes only). `FactorDims` on a sub-tree describes every
            leaf of it; leaves pair with those of the same path in the sub-tree of
            their partner.

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> params = {  # scanned over axis 1, as in MaxText
        ...     "down": jnp.zeros((8, 6, 2)),
        ...     "up": jnp.zeros((2, 6, 4, 3)),
        ...     "scale": jnp.ones(8),
        ... }
        >>> factors = ml.FactorTree({
        ...     "down": ml.FactorDims("a", layer_axes=(1,)),
        ...     "up": ml.FactorDims("b", rank_axis=0, layer_axes=(1,)),
        ...     "scale": None,
        ... })
        >>> params = factors.init(jax.random.key(0), params)  # b orthonormal, a zero
        >>> tx = factors.tall(ml.riemannian(optax.adam(1e-2), factors.manifolds()))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> updates["up"].shape, factors.to_tall(params)["up"].shape
        ((2, 6, 4, 3), (6, 12, 2))
    """

    def __init__(self, dims: Any):
        self._dims = dims

    def dims(self, params: Any) -> Any:
        """The prefix tree of `FactorDims` and None for these parameters."""
        return self._dims(params) if callable(self._dims) else self._dims

    def manifolds(
        self, a: Manifold = _EUCLIDEAN, b: Manifold = _STIEFEL
    ) -> Callable[[Any], Any]:
        """The `manifolds` argument of an optimiser; leaves that are not factors: free.

        Manifolds need tall factors: use it inside `tall`, unless they are tall already.
        """
        of_side = {"a": a, "b": b}

        def tree(params: Any) -> Any:
            structure = jax.tree.structure(params)
            return structure.unflatten(
                of_side[factor.dims.side] if factor else _EUCLIDEAN
                for factor in self._factors(params)
            )

        return tree

    def tall(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation `tx`, which sees every factor as (…, rows, r).

        Parameters and updates are laid out for it and its updates turned back; its
        state stays tall. At `init`, `InputError` if there are no factors or one lacks
        the axes.
        """
        inner = optax.with_extra_args_support(tx)

        def init(params: optax.Params) -> optax.OptState:
            return inner.init(self.to_tall(params))

        def update(updates, state, params=None, **extra_args):
            tall_params = None if params is None else self.to_tall(params)
            tall_updates, state = inner.update(
                self.to_tall(updates), state, tall_params, **extra_args
            )
            return self.from_tall(tall_updates, updates), state

        return optax.GradientTransformationExtraArgs(init, update)

    def init(
        self,
        key: Array,
        params: Any,
        a: Manifold = _EUCLIDEAN,
        b: Manifold = _STIEFEL,
    ) -> Any:
        """Initial factors: a random point on its manifold each, and 0 where Euclidean.

        LoRA's usual initialisation, B = 0, is not on the Stiefel manifold; with B
        orthonormal and A = 0 the update ΔW is 0 as well. Shapes, dtypes and all other
        leaves are those of `params`. For sharded parameters call it under `jit` with
        `out_shardings`.
        """
        of_side, count = {"a": a, "b": b}, itertools.count()

        def one(factor: Factor, x: Any) -> Any:
            manifold = of_side[factor.dims.side]
            if isinstance(manifold, Euclidean):
                return jnp.zeros_like(x)
            _, shape = _layout(factor, np.shape(x))
            own_key = jax.random.fold_in(key, next(count))
            point = manifold.random_point(own_key, shape, x.dtype)
            return _from_tall(factor, point, x)

        return self.map(one, params)

    def to_tall(self, tree: Any) -> Any:
        """The tree with every factor as (…, rows, r).

        An `nnx.Variable` becomes its array: its sharding names are those of other axes.
        """
        factors = iter(self._factors(tree))

        def one(x: Any) -> Any:
            leaves = jax.tree.leaves(x)
            if not leaves:  # a variable whose array is masked out
                return x
            factor = next(factors)
            return x if factor is None else _to_tall(factor, *leaves)

        return jax.tree.map(one, tree, is_leaf=_is_variable)

    def from_tall(self, tree: Any, like: Any) -> Any:
        """The tree of tall factors with the shapes that they have in `like`."""
        tall = iter(jax.tree.leaves(tree))
        leaves, structure = jax.tree.flatten(like)
        return structure.unflatten(
            y if factor is None else _from_tall(factor, y, x)
            for factor, y, x in zip(self._factors(like), tall, leaves, strict=True)
        )

    def pairs(self, params: Any) -> list[tuple[str, str]]:
        """The paths of the two factors of every pair, checked.

        Raises:
            InputError: if there are no factors, a partner is missing, or the ranks or
                layers of a pair differ.
        """
        groups: dict[tuple, list[Factor]] = {}
        layers_and_rank = {}
        leaves = jax.tree.leaves(params)
        for factor, x in zip(self._factors(params), leaves, strict=True):
            if factor is not None:
                groups.setdefault(factor.key, []).append(factor)
                _, (*layers, _, rank) = _layout(factor, np.shape(x))
                layers_and_rank[factor.name] = tuple(layers), rank
        pairs, problems = [], []
        for group in groups.values():
            factor = group[0]
            name, side = factor.name, factor.dims.side
            partners = groups.get(factor.partner, [])
            if len(group) > 1:
                problems.append(
                    f"{', '.join(factor.name for factor in group)} are all "
                    f"{self._called(side)} of one pair. Give each pair a `pair` of its "
                    "own in FactorDims."
                )
            elif not partners:
                problems.append(
                    f"{name} has no partner {self._called(factor.partner[1])}. Both "
                    "factors must be in one transformation: partition by module, not "
                    "by factor."
                )
            elif side == "a":
                partner = partners[0].name
                pairs.append((name, partner))
                ours, others = layers_and_rank[name], layers_and_rank[partner]
                if ours != others:
                    problems.append(
                        f"{name} has layers {ours[0]} and rank {ours[1]}, {partner} "
                        f"has {others[0]} and {others[1]}. Correct their rank_axis or "
                        "layer_axes."
                    )
        if problems:
            raise InputError("\n".join(problems))
        return pairs

    def map(self, f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
        """Call f(factor, *leaves) for every factor; other leaves stay as in `tree`."""
        leaves, structure = jax.tree.flatten(tree)
        others = [structure.flatten_up_to(other) for other in rest]
        rows = zip(self._factors(tree), leaves, *others, strict=True)
        return structure.unflatten(
            x if factor is None else f(factor, x, *more) for factor, x, *more in rows
        )

    def _factors(self, params: Any) -> list[Factor | None]:
        """What each leaf is, in the order of `jax.tree.leaves`."""
        dims_tree = with_containers_of(params, self.dims(params))
        factors: list[Factor | None] = []
        names = []
        for path, dims, subtree in flatten_prefix(
            "factor dimensions", dims_tree, params, _is_dims
        ):
            if dims is not None and getattr(dims, "side", None) not in get_args(Side):
                raise InputError(
                    f"{leaf_name(params, path)}: {dims!r} does not describe a factor. "
                    'Give FactorDims("a") or FactorDims("b") to factors, None to all '
                    "other leaves."
                )
            for below, _ in tree_leaves_with_path(subtree):
                names.append(leaf_name(params, path + below))
                if dims is None:
                    factors.append(None)
                    continue
                pair = dims.pair
                if pair is None:
                    pair = "siblings", leaf_name(params, path[:-1])
                unique = dims._replace(pair=(pair, leaf_name(subtree, below)))
                factors.append(Factor(names[-1], unique))
        if names and not any(factors):  # no names: a placeholder, or all masked out
            few = ", ".join(names[:8]) + (", …" if names[8:] else "")
            raise InputError(
                f"No leaf matches {self._called('a')} or {self._called('b')}. The "
                f"leaves are {few}. Give a FactorSpec with their names, or FactorDims "
                "leaf by leaf."
            )
        return factors

    def _called(self, side: Side) -> str:
        """What a factor of that side is recognised by."""
        return f'FactorDims("{side}")'


def factor_tree(dims: Any) -> FactorTree:
    """A `FactorTree` as it is, or one of a tree of `FactorDims` or a function to it."""
    return dims if isinstance(dims, FactorTree) else FactorTree(dims)


def _layout(
    factor: Factor, shape: tuple[int, ...]
) -> tuple[list[int], tuple[int, ...]]:
    """The order of the axes, layers first and rank last, and the tall shape."""
    _, rank, layer_axes, _ = factor.dims
    axes = list(range(len(shape)))
    try:
        layers = [axes[k] for k in (axes[:-2] if layer_axes is None else layer_axes)]
        rows = [k for k in axes if k not in layers]
        last = rows.pop(rank)
    except IndexError:
        layers, rows, last = [], [], 0
    if not rows:
        raise InputError(
            f"{factor.name} of shape {tuple(shape)} does not have rank axis {rank} and "
            f"rows beside the layer axes {layer_axes}. Correct its rank_axis or "
            "layer_axes."
        )
    n = math.prod(shape[k] for k in rows)
    return [*layers, *rows, last], (*(shape[k] for k in layers), n, shape[last])


def _to_tall(factor: Factor, x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(_to_tall, factor), x)
    order, shape = _layout(factor, np.shape(x))
    return jnp.transpose(x, order).reshape(shape)


def _from_tall(factor: Factor, y: Any, like: Any) -> Any:
    order, _ = _layout(factor, np.shape(like))
    y = y.reshape([np.shape(like)[k] for k in order])
    return jnp.transpose(y, np.argsort(order).tolist())


def _is_dims(node: Any) -> bool:
    """True for the leaves of a tree of dimension numbers."""
    return node is None or isinstance(node, FactorDims)


def _is_variable(node: Any) -> bool:
    """True for an `nnx.Variable`, recognised by its methods: Flax is not imported."""
    return hasattr(node, "get_value") and hasattr(node, "get_metadata")
