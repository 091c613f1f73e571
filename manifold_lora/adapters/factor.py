"""What an adapter declares of each of its arrays, and what follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from manifold_lora.manifolds import Euclidean, Manifold

Axis = Literal["in", "out", "rank"]


@dataclasses.dataclass(frozen=True)
class Factor:
    """One array of an adapter: its axes, its manifold, and whether it is trained.

    Sharding, padding to the largest rank of a stack, the trees for Optax, and the
    reading and writing of files all follow from this; nothing depends on the name.

    Args:
        axes: of the array of one layer. ("in", "rank") and ("out", "rank") are tall
            factors, ("rank", "rank") is a core, ("rank",) its diagonal, and ("out",)
            a number for every output.
        manifold: of this array alone.
        part_of: the manifold of which several factors together are one point. Each of
            them names it, and they are called as its parts are.
        trained: False for an array that stays as it is initialised.
        padding: of a layer whose rank is less than the largest in its stack. Zeros,
            or the identity where columns of zeros are not on the manifold. Tall
            factors get rows of their own for it, so that no input or output has a
            part in them.
        peft: the tensor that holds this array as it is in a file of PEFT, if any does.

    Examples:
        >>> from manifold_lora.manifolds import Stiefel
        >>> b = Factor(("out", "rank"), Stiefel("qr"), padding="identity")
        >>> b.shape({"in": 4, "out": 3, "rank": 1})
        (3, 1)
        >>> b.padded(np.ones((3, 1)), rank=1, ranks=(1, 2)).tolist()
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """

    axes: tuple[Axis, ...]
    manifold: Manifold = Euclidean()
    part_of: Manifold | None = None
    trained: bool = True
    padding: Literal["zeros", "identity"] = "zeros"
    peft: str | None = None

    @property
    def tag(self) -> Manifold:
        """The manifold that the optimiser sees: of the point, if this is a part."""
        return self.manifold if self.part_of is None else self.part_of

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the array of one layer, without padding."""
        return tuple(sizes[axis] for axis in self.axes)

    def unpadded(self, x: Any, sizes: Mapping[str, int]) -> Any:
        """The array without what pads it along the axes in `sizes`.

        Args:
            x: the array of one layer, or of several along leading axes.
            sizes: by axis; an axis that is not in it stays as it is.
        """
        return x[..., *(slice(sizes.get(axis)) for axis in self.axes)]

    def padded(self, x: np.ndarray, rank: int, ranks: Sequence[int]) -> np.ndarray:
        """The first `rank` columns of one layer's array, padded to the largest rank.

        Args:
            x: the array of one layer, with at least `rank` columns.
            rank: of this layer.
            ranks: of all layers of the stack, which get one shape.

        Returns:
            float32. With "identity" the ones are on the diagonal that begins where
            the array ends.
        """
        x = self.unpadded(x, {"rank": rank})
        missing = max(ranks) - rank
        identity = self.padding == "identity"
        rows = max(ranks) - min(ranks) if identity else 0
        added = (missing if axis == "rank" else rows for axis in self.axes)
        full = np.zeros(
            [n + k for n, k in zip(x.shape, added, strict=True)], np.float32
        )
        full[tuple(map(slice, x.shape))] = x
        if identity:
            diagonal = np.arange(missing)
            full[tuple(n + diagonal for n in x.shape)] = 1
        return full


def tags(factors: Mapping[str, Factor]) -> dict[str, Manifold]:
    """The manifold of every trained factor; the parts of one point share theirs."""
    return {name: factor.tag for name, factor in factors.items() if factor.trained}
