"""Factors with other names and orientations: where they are, and a tall view of them.

Inside this library a factor is tall, (…, rows, r), and called "a" or "b". Other
trees call it `w_lora_b` and shape it (r, heads, head_dim): a `FactorSpec` says so once.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import FlattenedIndexKey, GetAttrKey, tree_map_with_path

from manifold_lora.errors import InputError
from manifold_lora.manifolds import Euclidean, Manifold, Stiefel

_EUCLIDEAN, _STIEFEL = Euclidean(), Stiefel()


class Site(NamedTuple):
    """Where a factor is: `pair` is the same for the two factors of one ΔW."""

    pair: tuple[str | None, ...]
    side: Literal["a", "b"]
    name: str

    @property
    def partner(self) -> tuple[tuple[str | None, ...], str]:
        """The pair and the side of the other factor."""
        return self.pair, "b" if self.side == "a" else "a"


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """The names and axes of the two factors of ΔW = s·B Aᵀ in a tree of parameters.

    Use it where the parameters are not this library's: `NNX_LORA` and `QWIX_LORA`
    are ready-made. `tall` lets any transformation see the factors as tall arrays,
    `manifolds` puts them on manifolds, and `scaled_gd` and `lora_plus` find the two
    factors of a pair with it. The default describes this library's own factors.

    A name is matched with the end of a path, written "layers/0/attn/lora_a"; it may
    hold "/" and "*", which stands for the same text in both names ("*_lora_a" and
    "*_lora_b" pair w_lora_a with w_lora_b). Dicts (nested, or flat with paths as
    keys), NamedTuples, dataclasses, `nnx.State` and `nnx.FlatState` all have such
    paths. Leaves of other names are left alone.

    Args:
        a: name of the factor of the inputs.
        b: name of the factor of the outputs.
        a_rank_axis: axis of the rank in a, counted without the layer axes.
        b_rank_axis: axis of the rank in b, counted without the layer axes.
        layer_axes: axes that stack layers. None: every axis before the last two.
            All other axes but the rank, such as (heads, head_dim), are rows
            together. For factors scanned over axis 0:
            `dataclasses.replace(ml.QWIX_LORA, layer_axes=(0,))`.

    Raises:
        InputError: for two names that match the same leaves, or that differ in
            their number of "*".

    Examples:
        >>> import jax, optax
        >>> import jax.numpy as jnp
        >>> import manifold_lora as ml
        >>> spec = ml.QWIX_LORA
        >>> params = {"w_lora_a": jnp.zeros((8, 2)), "w_lora_b": jnp.zeros((2, 4, 3))}
        >>> params = spec.start(jax.random.key(0), params)  # b orthonormal, a zero
        >>> tx = spec.tall(ml.riemannian(optax.adam(1e-2), spec.manifolds()))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> updates["w_lora_b"].shape, spec.to_tall(params)["w_lora_b"].shape
        ((2, 4, 3), (12, 2))
    """

    a: str = "a"
    b: str = "b"
    a_rank_axis: int = -1
    b_rank_axis: int = -1
    layer_axes: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.a == self.b or self.a.count("*") != self.b.count("*"):
            raise InputError(
                f"The names {self.a!r} and {self.b!r} make no pairs. Give two names "
                "that differ, with the same number of *."
            )

    def manifolds(
        self, a: Manifold = _EUCLIDEAN, b: Manifold = _STIEFEL
    ) -> Callable[[Any], Any]:
        """The `manifolds` argument of an optimiser: a and b there, Euclidean elsewhere.

        Manifolds need tall factors: use it inside `tall`, unless they are tall already.
        """
        of_side = {"a": a, "b": b}

        def tree(params: Any) -> Any:
            self._require_some(params)

            def one(path: tuple, _: Any) -> Manifold:
                site = self._site(_name(params, path))
                return of_side[site.side] if site else _EUCLIDEAN

            return tree_map_with_path(one, params)

        return tree

    def tall(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation `tx`, which sees every factor as (…, rows, r).

        Parameters and updates are laid out for it and its updates turned back; its
        state stays tall. At `init`, `InputError` if nothing matches or a factor lacks
        the axes.
        """
        inner = optax.with_extra_args_support(tx)

        def init(params: optax.Params) -> optax.OptState:
            self._require_some(params)
            return inner.init(self.to_tall(params))

        def update(updates, state, params=None, **extra_args):
            tall_params = None if params is None else self.to_tall(params)
            moved, state = inner.update(
                self.to_tall(updates), state, tall_params, **extra_args
            )
            return self.from_tall(moved, updates), state

        return optax.GradientTransformationExtraArgs(init, update)

    def start(
        self,
        key: Array,
        params: Any,
        a: Manifold = _EUCLIDEAN,
        b: Manifold = _STIEFEL,
    ) -> Any:
        """Factors to start from: a random point each, and 0 where Euclidean.

        LoRA's usual start, B = 0, is off the Stiefel manifold; with B orthonormal and
        A = 0 the update ΔW is 0 as well. Shapes, dtypes and all other leaves are those
        of `params`. For sharded parameters call it under `jit` with `out_shardings`.
        """
        of_side, count = {"a": a, "b": b}, itertools.count()
        self._require_some(params)

        def one(site: Site, x: Any) -> Any:
            manifold = of_side[site.side]
            if isinstance(manifold, Euclidean):
                return jnp.zeros_like(x)
            _, shape = self._layout(site, np.shape(x))
            own = jax.random.fold_in(key, next(count))
            return self._original(site, manifold.random_point(own, shape, x.dtype), x)

        return self.map(one, params)

    def to_tall(self, tree: Any) -> Any:
        """The tree with every factor as (…, rows, r).

        An `nnx.Variable` becomes its array: its sharding names are those of other axes.
        """

        def one(path: tuple, x: Any) -> Any:
            site = self._site(_name(tree, path))
            if site is None or not jax.tree.leaves(x):
                return x
            return self._tall(site, x.get_value() if _is_variable(x) else x)

        return tree_map_with_path(one, tree, is_leaf=_is_variable)

    def from_tall(self, tree: Any, like: Any) -> Any:
        """The tree of tall factors with the shapes that they have in `like`."""
        tall = iter(jax.tree.leaves(tree))

        def one(path: tuple, x: Any) -> Any:
            site, y = self._site(_name(like, path)), next(tall)
            return y if site is None else self._original(site, y, x)

        return tree_map_with_path(one, like)

    def pairs(self, params: Any) -> list[tuple[str, str]]:
        """The paths of the two factors of every pair, checked.

        Raises:
            InputError: if nothing matches, a partner is missing, or the ranks or
                layers of a pair differ.
        """
        self._require_some(params)
        sites: dict[tuple, tuple[Site, tuple[int, ...]]] = {}

        def collect(site: Site, x: Any) -> Any:
            _, shape = self._layout(site, np.shape(x))
            sites[site.pair, site.side] = site, shape
            return x

        self.map(collect, params)
        pairs, problems = [], []
        for site, shape in sites.values():
            if site.partner not in sites:
                wanted = self.b if site.side == "a" else self.a
                problems.append(
                    f"{site.name} has no partner {wanted!r} beside it. Both factors "
                    "must be in one transformation: partition by module, not by factor."
                )
            elif site.side == "a":
                other, its_shape = sites[site.partner]
                pairs.append((site.name, other.name))
                if (shape[:-2], shape[-1]) != (its_shape[:-2], its_shape[-1]):
                    problems.append(
                        f"{site.name} has layers {shape[:-2]} and rank {shape[-1]}, "
                        f"{other.name} has {its_shape[:-2]} and {its_shape[-1]}. "
                        f"Correct the axes of {self}."
                    )
        if problems:
            raise InputError("\n".join(problems))
        return pairs

    def map(self, f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
        """Call f(site, *leaves) for every factor; other leaves stay as in `tree`."""

        def one(path: tuple, x: Any, *others: Any) -> Any:
            site = self._site(_name(tree, path))
            return x if site is None else f(site, x, *others)

        return tree_map_with_path(one, tree, *rest)

    def _require_some(self, params: Any) -> None:
        names = []
        tree_map_with_path(lambda path, _: names.append(_name(params, path)), params)
        # No leaves: a placeholder, or all masked out.
        if names and not any(map(self._site, names)):
            few = ", ".join(names[:8]) + (", …" if names[8:] else "")
            raise InputError(
                f"No leaf is named {self.a!r} or {self.b!r}. The leaves are {few}. "
                "Give a FactorSpec with their names."
            )

    def _site(self, name: str) -> Site | None:
        if match := _regex(self.a).fullmatch(name):
            return Site(match.groups(), "a", name)
        if match := _regex(self.b).fullmatch(name):
            return Site(match.groups(), "b", name)
        return None

    def _layout(
        self, site: Site, shape: tuple[int, ...]
    ) -> tuple[list[int], tuple[int, ...]]:
        """The order of the axes, layers first and rank last, and the tall shape."""
        axes = list(range(len(shape)))
        stacked = axes[:-2] if self.layer_axes is None else self.layer_axes
        rank = self.a_rank_axis if site.side == "a" else self.b_rank_axis
        try:
            layers = [axes[k] for k in stacked]
            rows = [k for k in axes if k not in layers]
            last = rows.pop(rank)
        except IndexError:
            layers, rows, last = [], [], 0
        if not rows:
            raise InputError(
                f"{site.name} of shape {tuple(shape)} has no rank axis {rank} and rows "
                f"beside the layer axes {self.layer_axes}. Correct the axes of {self}, "
                "or its names."
            )
        n = math.prod(shape[k] for k in rows)
        tall = (*(shape[k] for k in layers), n, shape[last])
        return [*layers, *rows, last], tall

    def _tall(self, site: Site, x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.eval_shape(functools.partial(self._tall, site), x)
        order, shape = self._layout(site, np.shape(x))
        return jnp.transpose(x, order).reshape(shape)

    def _original(self, site: Site, y: Any, x: Any) -> Any:
        order, _ = self._layout(site, np.shape(x))
        y = y.reshape([np.shape(x)[k] for k in order])
        return jnp.transpose(y, np.argsort(order).tolist())


NNX_LORA = FactorSpec("lora_a", "lora_b", b_rank_axis=0)
"""`flax.nnx.LoRA`: lora_a (in, r) and lora_b (r, out), under leading axes of `vmap`."""

QWIX_LORA = FactorSpec("*_lora_a", "*_lora_b", b_rank_axis=0, layer_axes=())
"""Qwix and Tunix: w_lora_a (in…, r) and w_lora_b (r, out…), any number of in and out.

Scanned over axis 0: `dataclasses.replace(ml.QWIX_LORA, layer_axes=(0,))`.
"""


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """The pattern at the end of a path, "*" within one part of it."""
    return re.compile("(.*/)?" + "([^/]*)".join(map(re.escape, pattern.split("*"))))


def _is_variable(node: Any) -> bool:
    """True for an `nnx.Variable`, which this room knows by what it can do."""
    return hasattr(node, "get_value") and hasattr(node, "get_metadata")


def _name(tree: Any, path: tuple) -> str:
    """The path of a leaf of the tree, such as "layers/0/attn/lora_a".

    An `nnx.State` holds variables at `init` and arrays at `update`: the ".value" of a
    variable is left out.
    """
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    parts: list[Any] = []
    for key in path:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
        if isinstance(key, FlattenedIndexKey) and hasattr(tree, "paths"):
            part = tree.paths[part]  # an nnx.FlatState counts its leaves
        parts.extend(part if isinstance(part, tuple) else [part])
    return "/".join(map(str, parts))
