"""What all adapters share: a frozen linear layer and an update of low rank."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.distributed.arrays import to_host
from manifold_lora.errors import InputError
from manifold_lora.manifolds import Manifold, Oblique, Stiefel
from manifold_lora.models import Linear

Arrays = dict[str, jax.Array]


class LowRankLinear(nnx.Module):
    """y = W x + ΔW x, with W frozen and ΔW = s · (a product of tall factors).

    A method is a subclass in a file of its own with these members, in this order:

    - `manifolds(config)`: the names of its trained factors, and where each lives.
    - `start(key, kernel, rank, config)`: all its arrays before the first step.
    - `delta(x)`: ΔW x.
    - `pair()`: tall A and B with ΔW = s B Aᵀ, for merging and export.

    Factors are float32 and tall, ((layers,) rows, r), whatever the dtype of the base;
    products with x are computed in the dtype of x. Layers of one module may have
    ranks of their own: all are stored with the largest, filled up so that nothing
    flows through what is added. A column that must have length 1 gets its 1 in a row
    of its own below the matrix, where no optimiser ever sees a gradient.

    Args:
        base: the linear layer that is adapted; shared, not copied or changed.
        config: the adapter's settings.
        key: of the random start.
        ranks: of every layer; 0 for one that is not adapted. By default all are the
            config's.
        alphas: of every layer, likewise.
        arrays: the arrays to begin with instead of the start, layer by layer and not
            filled up, by name.

    Raises:
        InputError: for a rank larger than the layer.
    """

    # The rows of these are the layer's inputs or outputs; S and its diagonal have none.
    sides: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("a", "a0", "v"), "in"),
        **dict.fromkeys(("b", "b0", "u", "m"), "out"),
    }

    def __init__(
        self,
        base: Linear,
        config: AdapterConfig,
        *,
        key: jax.Array | None = None,
        ranks: Sequence[int] | None = None,
        alphas: Sequence[float] | None = None,
        arrays: Mapping[str, Sequence[np.ndarray]] | None = None,
    ):
        batch = base.kernel.shape[:-2]
        count = math.prod(batch)
        self.base = base
        self.config = config
        self.ranks = tuple(ranks or [config.rank] * count)
        assert config.alpha is not None
        self.alphas = tuple(alphas or [config.alpha] * count)
        self.rank = max(self.ranks)
        limit = min(base.in_features, base.out_features)
        if not 1 <= self.rank <= limit:
            raise InputError(
                f"rank {self.rank} does not fit a layer of {base.in_features} inputs "
                f"and {base.out_features} outputs: it may be 1 to {limit}. Lower "
                "--rank, or give this module its own in --rank-pattern."
            )
        root = math.sqrt if config.rslora else float
        scales = [
            alpha / root(rank) if rank else 0.0
            for rank, alpha in zip(self.ranks, self.alphas, strict=True)
        ]
        # The s of ΔW, one number a layer.
        self.scale = nnx.Variable(jnp.asarray(scales, jnp.float32).reshape(batch))
        if arrays is None:
            assert key is not None
            values = self._started(key)
        else:
            values = self._filled(arrays)
        tags = self.manifolds(config)
        for name, value in values.items():
            axes = self._named(name, value.ndim)
            # The tag beside the factor is all that the optimiser needs to know.
            if name in tags:
                factor = nnx.LoRAParam(value, manifold=tags[name], axes=axes)
            else:
                factor = nnx.Variable(value, axes=axes)
            setattr(self, name, factor)
        self.names = tuple(values)

    def _named(self, name: str, ndim: int) -> tuple[str | None, ...]:
        """The names of the axes of an array, which decide where it is on a mesh."""
        before = ("layers",) * len(self.scale.shape)
        side = self.sides.get(name)
        own = () if side is None else (self.base.axes[side == "out"],)
        return (*before, *own, *("rank",) * (ndim - len(before) - len(own)))

    @staticmethod
    @abc.abstractmethod
    def manifolds(config: AdapterConfig) -> dict[str, Manifold]:
        """The manifold of every trained factor; coupled factors share one."""

    @staticmethod
    @abc.abstractmethod
    def start(
        key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Every array before the first step, from the kernel ((layers,) in, out).

        Those without a manifold stay as they are: they are not trained.
        """

    @abc.abstractmethod
    def delta(self, x: jax.Array) -> jax.Array:
        """ΔW x, (…, in) to (…, out), in the dtype of x."""

    @abc.abstractmethod
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """A ((layers,) in, k) and B ((layers,) out, k) with ΔW = s B Aᵀ."""

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); `key` switches dropout on."""
        return self.base(x) + self.delta(self.dropped(x, key))

    def dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The inputs of the update: some of them zero where there is a key."""
        p = self.config.dropout
        if key is None or p == 0:
            return x
        if key.ndim == 0:
            left = jax.random.bernoulli(key, 1 - p, x.shape)
        else:  # row by row, so that a row drops the same on any mesh
            each = partial(jax.random.bernoulli, p=1 - p, shape=x.shape[1:])
            left = jax.vmap(each)(key)
        return jnp.where(left, x / (1 - p), 0)

    def weight(self) -> jax.Array:
        """ΔW in float32, laid out as the kernel: ((layers,) in, out)."""
        a, b = self.pair()
        product = jnp.matmul(a, b.mT, precision="highest")
        return self.scale[...][..., None, None] * product

    def fuse(self) -> Linear:
        """The plain layer with W + ΔW, summed in float32 and rounded once."""
        kernel = self.base.kernel
        fused = kernel[...].astype(jnp.float32) + self.weight()
        kernel.set_value(fused.astype(kernel.dtype))
        return self.base

    def inputs(self, name: str) -> jax.Array:
        """The factor of that name on the side of the inputs, ((layers,) in, r)."""
        return getattr(self, name)[...][..., : self.base.in_features, :]

    def outputs(self, name: str) -> jax.Array:
        """The factor of that name on the side of the outputs, ((layers,) out, r)."""
        return getattr(self, name)[...][..., : self.base.out_features, :]

    def export(self) -> list[dict[str, np.ndarray]]:
        """What PEFT's file holds of every layer, by the ends of the tensors' names.

        All processes must call it; each gets everything.
        """
        pair = [x.reshape(-1, *x.shape[-2:]) for x in to_host(self.pair())]
        exported = []
        for a, b, rank in zip(*pair, self.ranks, strict=True):
            # A fixed correction makes the pair twice as wide as the factors.
            kept = np.arange(a.shape[1]) % self.rank < rank
            exported.append(
                {
                    "lora_A.weight": np.ascontiguousarray(a[:, kept].T),
                    "lora_B.weight": np.ascontiguousarray(b[:, kept]),
                }
            )
        return exported

    def arrays(self) -> list[dict[str, np.ndarray]]:
        """Every array of every layer at that layer's own rank, by name.

        All processes must call it; each gets everything.
        """
        found: list[dict[str, np.ndarray]] = [{} for _ in self.ranks]
        for name in self.names:
            x = to_host(getattr(self, name)[...])
            layers = x.reshape(-1, *x.shape[len(self.scale.shape) :])
            for arrays, one, rank in zip(found, layers, self.ranks, strict=True):
                rows = one.shape[0] - (self._added_rows if self._is_unit(name) else 0)
                columns = _columns(name, one.ndim, rank)
                arrays[name] = np.ascontiguousarray(one[:rows][columns])
        return found

    def _started(self, key: jax.Array) -> Arrays:
        kernel = self.base.kernel[...]
        if len({*zip(self.ranks, self.alphas, strict=True)}) == 1:
            config = dataclasses.replace(self.config, alpha=self.alphas[0])
            return self.start(key, kernel, self.rank, config)
        layers: list[Arrays] = []
        least = min(rank for rank in self.ranks if rank)
        for layer, rank in enumerate(self.ranks):
            own = jax.random.fold_in(key, layer)
            config = dataclasses.replace(self.config, alpha=self.alphas[layer])
            arrays = self.start(own, kernel[layer], rank or least, config)
            layers.append(arrays)
        return self._filled({k: [arrays[k] for arrays in layers] for k in layers[0]})

    def _filled(self, arrays: Mapping[str, Sequence[Any]]) -> Arrays:
        """Arrays of all layers, filled up to the largest rank and stacked."""
        stacks = {}
        for name, layers in arrays.items():
            full = [
                self._fill(name, to_host(x), rank)
                for x, rank in zip(layers, self.ranks, strict=True)
            ]
            stacked = np.stack(full).reshape(*self.scale.shape, *full[0].shape)
            stacks[name] = jnp.asarray(stacked)
        return stacks

    def _fill(self, name: str, x: np.ndarray, rank: int) -> np.ndarray:
        x = x[_columns(name, x.ndim, rank)]
        added, shape = self.rank - rank, list(x.shape)
        for axis in range(x.ndim)[_axes(name)]:
            shape[axis] += added
        if self._is_unit(name):
            shape[0] += self._added_rows
        full = np.zeros(shape, np.float32)
        full[tuple(map(slice, x.shape))] = x
        diagonal = np.arange(added)
        if self._is_unit(name):
            full[x.shape[0] + diagonal, rank + diagonal] = 1
        elif name == "s" and self.manifolds(self.config)[name].parts:
            full[rank + diagonal, rank + diagonal] = 1  # S must stay regular
        return full

    @property
    def _added_rows(self) -> int:
        """Rows below the matrix, for the 1 of every column that may be added."""
        return self.rank - min(self.ranks)

    def _is_unit(self, name: str) -> bool:
        """Whether the columns of that factor have length 1."""
        manifold = self.manifolds(self.config).get(name)
        if isinstance(manifold, Stiefel | Oblique):
            return True
        return manifold is not None and bool(manifold.parts) and name in ("u", "v")


# Which axes of one layer's array count columns: all of s, none of m, else the last.
_AXES = {"s": slice(None), "m": slice(0, 0)}


def _axes(name: str) -> slice:
    return _AXES.get(name, slice(-1, None))


def _columns(name: str, ndim: int, rank: int) -> tuple[slice, ...]:
    """The index of the first columns, as many as the rank."""
    index = [slice(None)] * ndim
    for axis in range(ndim)[_axes(name)]:
        index[axis] = slice(rank)
    return tuple(index)
