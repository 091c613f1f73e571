"""Factors recognised by their names, and the names of other libraries."""

import dataclasses
import functools
import re
from typing import Any

from jax.tree_util import tree_map_with_path

from manifold_lora.errors import InputError
from manifold_lora.optimizers.factor_tree import FactorDims, FactorTree, Side
from manifold_lora.optimizers.tree import leaf_name


@dataclasses.dataclass(frozen=True)
class FactorSpec(FactorTree):
    """A `FactorTree` from the names of the two factors of ΔW = s B Aᵀ.

    It has the methods of `FactorTree`; where names do not tell factors apart, or their
    axes differ, use that with `FactorDims` on each leaf. `NNX_LORA` and `QWIX_LORA` are
    ready-made. The default describes this library's own factors.

    A name is matched with the end of a path, written "layers/0/attn/lora_a"; it may
    hold "/" and "*", which stands for the same text in both names ("*_lora_a" and
    "*_lora_b" pair w_lora_a with w_lora_b). Dicts (nested, or flat with paths as
    keys), NamedTuples, dataclasses, `nnx.State` and `nnx.FlatState` all have such
    paths. Leaves of other names are not factors.

    Args:
        a: name of the factor of the inputs.
        b: name of the factor of the outputs.
        a_rank_axis: `FactorDims.rank_axis` of a.
        b_rank_axis: `FactorDims.rank_axis` of b.
        layer_axes: `FactorDims.layer_axes` of both. For factors scanned over axis 0:
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
        >>> spec.dims(params)["w_lora_b"]
        FactorDims(side='b', rank_axis=0, layer_axes=(), pair=(None, 'w'))
        >>> params = spec.init(jax.random.key(0), params)  # b orthonormal, a zero
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
                f"The names {self.a!r} and {self.b!r} do not form pairs. Give two "
                "names that differ, with the same number of *."
            )

    def dims(self, params: Any) -> Any:
        """The tree of the `FactorDims` of leaves with these names, and None."""
        sides: list[tuple[Side, str, int]] = [
            ("a", self.a, self.a_rank_axis),
            ("b", self.b, self.b_rank_axis),
        ]

        def one(path: tuple, _: Any) -> FactorDims | None:
            name = leaf_name(params, path)
            for side, pattern, rank_axis in sides:
                if match := _regex(pattern).fullmatch(name):
                    return FactorDims(side, rank_axis, self.layer_axes, match.groups())
            return None

        return tree_map_with_path(one, params)

    def _called(self, side: Side) -> str:
        return repr(self.a if side == "a" else self.b)


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
