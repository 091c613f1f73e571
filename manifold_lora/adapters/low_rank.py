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
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.options import MethodOptions
from manifold_lora.distributed.arrays import to_host
from manifold_lora.errors import InputError
from manifold_lora.models import Linear

Arrays = Mapping[str, jax.Array]


class LowRankLinear(nnx.Module):
    """y = W x + ΔW x, with W frozen and ΔW = s · (a product of tall factors).

    A method is a subclass in a file of its own with these members, in this order:

    - `options`: the class of its options, which stands before it.
    - `factors(config)`: what each of its arrays is, by name.
    - `init(key, kernel, rank, config)`: all of them before the first step.
    - `delta(x)`: ΔW x.
    - `product(arrays)`: tall A and B with ΔW = s B Aᵀ, for merging and export.

    Factors are float32 and tall, ((layers,) rows, r), whatever the dtype of the base;
    products with x are computed in the dtype of x. Layers of one module may differ in
    rank: all are stored with the largest, padded so that nothing flows through the
    padding. A column that must have length 1 gets its 1 in a row of its own below the
    matrix, where no optimiser ever sees a gradient.

    Args:
        base: the linear layer that is adapted; shared, not copied or changed.
        config: the adapter's settings.
        key: for the random initialisation.
        ranks: of every layer; 0 for one that is not adapted. By default all are the
            config's.
        alphas: of every layer, likewise.
        arrays: by name, the arrays of every layer at its own rank, to take instead of
            initialising.

    Raises:
        InputError: for a rank larger than the layer.
    """

    options: ClassVar[type[MethodOptions]]

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
        batch = base.shape[:-2]
        count = math.prod(batch)
        self.base = base
        self.config = config
        self.ranks = tuple(ranks or [config.rank] * count)
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
        # The s of ΔW, one number per layer.
        self.scale = nnx.Variable(jnp.asarray(scales, jnp.float32).reshape(batch))
        if arrays is None:
            assert key is not None
            values = self._initialised(key)
        else:
            values = self._stacked(arrays)
        for name, factor in self.factors(config).items():
            axes = self._mesh_axes(factor)
            # The tag beside the factor is all that the optimiser needs to know.
            if factor.trained:
                value = nnx.LoRAParam(values[name], manifold=factor.tag, axes=axes)
            else:
                value = nnx.Variable(values[name], axes=axes)
            setattr(self, name, value)

    @classmethod
    @abc.abstractmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """Every array of the method by name, also those that are not trained."""

    @classmethod
    @abc.abstractmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """Every array before the first step, from the kernel ((layers,) in, out)."""

    @abc.abstractmethod
    def delta(self, x: jax.Array) -> jax.Array:
        """ΔW x, (…, in) to (…, out), in the dtype of x."""

    @staticmethod
    @abc.abstractmethod
    def product(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """A ((layers,) in, k) and B ((layers,) out, k) with ΔW = s B Aᵀ."""

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); `key` switches dropout on."""
        return self.base(x) + self.delta(self.dropped(x, key))

    def dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The inputs of the update, after dropout where there is a key."""
        p = self.config.dropout
        if key is None or p == 0:
            return x
        if key.ndim == 0:
            mask = jax.random.bernoulli(key, 1 - p, x.shape)
        else:  # one key per row, so that a row drops the same on any mesh
            draw = partial(jax.random.bernoulli, p=1 - p, shape=x.shape[1:])
            mask = jax.vmap(draw)(key)
        return jnp.where(mask, x / (1 - p), 0)

    def factor(self, name: str) -> jax.Array:
        """The array of that name without the rows that only pad it."""
        sizes = {"in": self.base.in_features, "out": self.base.out_features}
        declared = self.factors(self.config)[name]
        return declared.unpadded(getattr(self, name)[...], sizes)

    def pair(self) -> tuple[jax.Array, jax.Array]:
        """A and B of this module: the `product` of its factors, at the largest rank."""
        return self.product({name: self.factor(name) for name in self.names})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arrays, also of those that are not trained."""
        return tuple(self.factors(self.config))

    def weight(self) -> jax.Array:
        """ΔW in float32, laid out as the kernel: ((layers,) in, out)."""
        a, b = self.pair()
        product = jnp.matmul(a, b.mT, precision="highest")
        return self.scale[...][..., None, None] * product

    def merge(self) -> Linear:
        """The plain layer with W + ΔW, summed in float32 and rounded once."""

        def merged(kernel: jax.Array, delta: jax.Array) -> jax.Array:
            return kernel.astype(jnp.float32) + delta

        return self.base.with_kernel(self.base.map_kernel(merged, self.weight()))

    def export(self) -> list[dict[str, np.ndarray]]:
        """What PEFT's file holds of every layer, by the ends of the tensors' names.

        All processes must call it; each gets everything.
        """
        pair = [x.reshape(-1, *x.shape[-2:]) for x in to_host(self.pair())]
        exported = []
        for a, b, rank in zip(*pair, self.ranks, strict=True):
            # A fixed correction makes the pair twice as wide as the factors.
            columns = np.arange(a.shape[1]) % self.rank < rank
            exported.append(
                {
                    "lora_A.weight": np.ascontiguousarray(a[:, columns].T),
                    "lora_B.weight": np.ascontiguousarray(b[:, columns]),
                }
            )
        for name, factor in self.factors(self.config).items():
            if factor.peft is not None:
                for tensors, x in zip(exported, self._layers(name), strict=True):
                    tensors[factor.peft] = x
        return exported

    def arrays(self) -> list[dict[str, np.ndarray]]:
        """Every array of every layer at that layer's own rank, by name.

        All processes must call it; each gets everything.
        """
        layers: list[dict[str, np.ndarray]] = [{} for _ in self.ranks]
        for name in self.names:
            for arrays, x in zip(layers, self._layers(name), strict=True):
                arrays[name] = x
        return layers

    def _layers(self, name: str) -> list[np.ndarray]:
        """One array of every layer, without padding, on the host."""
        factor = self.factors(self.config)[name]
        x = to_host(getattr(self, name)[...])
        sizes = {"in": self.base.in_features, "out": self.base.out_features}
        return [
            np.ascontiguousarray(factor.unpadded(one, sizes | {"rank": rank}))
            for one, rank in zip(
                x.reshape(-1, *x.shape[len(self.scale.shape) :]),
                self.ranks,
                strict=True,
            )
        ]

    def _initialised(self, key: jax.Array) -> Arrays:
        if len({*zip(self.ranks, self.alphas, strict=True)}) == 1:
            config = dataclasses.replace(self.config, alpha=self.alphas[0])
            return self.base.map_kernel(
                lambda kernel: self.init(key, kernel, self.rank, config)
            )
        layers: list[Arrays] = []
        least = min(rank for rank in self.ranks if rank)
        for layer, rank in enumerate(self.ranks):
            own = jax.random.fold_in(key, layer)
            config = dataclasses.replace(self.config, alpha=self.alphas[layer])
            init = partial(self.init, own, rank=rank or least, config=config)
            layers.append(self.base.map_kernel(lambda kernel: init(kernel[layer])))  # noqa: B023
        return self._stacked({k: [arrays[k] for arrays in layers] for k in layers[0]})

    def _stacked(self, arrays: Mapping[str, Sequence[Any]]) -> Arrays:
        """The arrays of all layers, padded to the largest rank and stacked."""
        stacks = {}
        for name, factor in self.factors(self.config).items():
            padded = [
                factor.padded(to_host(x), rank, self.ranks)
                for x, rank in zip(arrays[name], self.ranks, strict=True)
            ]
            stacked = np.stack(padded).reshape(*self.scale.shape, *padded[0].shape)
            stacks[name] = jnp.asarray(stacked)
        return stacks

    def _mesh_axes(self, factor: Factor) -> tuple[str | None, ...]:
        """The names of the axes of a stacked array, which decide how it is sharded."""
        layers = ("layers",) * len(self.scale.shape)
        base: dict[str, str | None]
        base = dict(zip(("in", "out"), self.base.axes, strict=True))
        return (*layers, *(base.get(axis, axis) for axis in factor.axes))
