"""DoRA: a separate magnitude vector m, and LoRA for the direction."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import Factor
from manifold_lora.adapters.lora import LoRALinear, LoRAPlusOptions
from manifold_lora.adapters.low_rank import Arrays
from manifold_lora.adapters.options import initialisation
from manifold_lora.models import Linear
from manifold_lora.models.remat import projection_output

MAGNITUDE = Factor(("out",), peft="lora_magnitude_vector")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAOptions(LoRAPlusOptions):
    """Options of DoRA."""

    update = "m ⊙ (W + s B Aᵀ)/‖W + s B Aᵀ‖ − W"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    export = "DoRA"

    init: Literal["kaiming", "gaussian"] = initialisation("kaiming")


class DoRALinear(LoRALinear):
    """y = m ⊙ (W x + s B Aᵀ x)/‖W + s B Aᵀ‖, with a trained magnitude vector m.

    The norm is that of a row of W + ΔW, over the inputs, and is a constant for the
    gradient, as in PEFT. It is computed without forming the sum, row by row:

        ‖W + sBAᵀ‖² = ‖W‖² + 2s (B ⊙ WA)·1 + s² (B AᵀA ⊙ B)·1

    so that it costs what a product with A costs, and equals m to the last bit as long
    as the update is zero. m is initialised to ‖W‖, and the layer to its base. Dropout
    acts on the update alone. `product` and the factors A and B are LoRA's; the weight
    of the whole layer is not W plus a matrix of low rank: it exports as PEFT's DoRA.

    References:
        Liu et al., "DoRA: Weight-decomposed low-rank adaptation", 2024,
        arXiv:2402.09353, section 4.3 for the constant norm.
    """

    options = DoRAOptions
    direction: ClassVar[type[LoRALinear]] = LoRALinear

    m: nnx.LoRAParam

    def __init__(self, base: Linear, config: AdapterConfig, **options: Any):
        super().__init__(base, config, **options)
        m0 = base.map_kernel(row_norms)
        self.m0 = nnx.Variable(m0, axes=self._mesh_axes(MAGNITUDE))

    @classmethod
    def factors(cls, config: AdapterConfig) -> dict[str, Factor]:
        """Those of the direction, and a free m."""
        return cls.direction.factors(config) | {"m": MAGNITUDE}

    @classmethod
    def init(
        cls, key: jax.Array, kernel: jax.Array, rank: int, config: AdapterConfig
    ) -> Arrays:
        """A and B of the direction, and m = ‖W‖."""
        initial = cls.direction.init(key, kernel, rank, config)
        return {**initial, "m": row_norms(kernel)}

    def delta(self, x: jax.Array) -> jax.Array:
        """The second part of y: (m/‖W + sBAᵀ‖) ⊙ s B Aᵀ x."""
        return self._gain().astype(x.dtype) * super().delta(x)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Shapes (…, in) to (…, out); `key` switches dropout on."""
        y = projection_output(self.base(x))  # which the gradient of m needs by itself
        linear = y if self.base.bias is None else y - self.base.bias[...]
        # Rounded after 1 is taken off: bfloat16 has no numbers close to 1.
        change = (self._gain() - 1).astype(x.dtype)
        return y + change * linear + self.delta(self.dropped(x, key))

    def weight(self) -> jax.Array:
        """The change of the whole layer, float32 ((layers,) in, out)."""

        def change(kernel: jax.Array, total: jax.Array) -> jax.Array:
            return total - kernel.astype(jnp.float32)

        return self.base.map_kernel(change, self._total())

    def merge(self) -> Linear:
        """The plain layer m ⊙ (W + sBAᵀ)/‖·‖, in float32 and rounded once."""
        return self.base.with_kernel(self._total())

    def _total(self) -> jax.Array:
        """The weight m ⊙ (W + sBAᵀ)/‖·‖ of the whole layer, in float32."""

        def total(kernel: jax.Array, gain: jax.Array, delta: jax.Array) -> jax.Array:
            return gain[..., None, :] * (kernel.astype(jnp.float32) + delta)

        return self.base.map_kernel(total, self._gain(), super().weight())

    def _gain(self) -> jax.Array:
        """The gain m/‖W + sBAᵀ‖ of every output, ((layers,) out)."""
        a, b = jax.lax.stop_gradient(self.pair())
        s = self.scale[...][..., None]
        kernel = self.base.gathered_kernel().astype(jnp.float32)
        wa = jnp.matmul(kernel.mT, a, precision="highest")  # (out, r)
        gram = jnp.matmul(a.mT, a, precision="highest")
        bgram = jnp.matmul(b, gram, precision="highest")
        m0 = self.m0[...]
        change = 2 * s * jnp.sum(b * wa, -1) + s**2 * jnp.sum(b * bgram, -1)
        # Rounding leaves at least this much of a row that the update takes away.
        square = jnp.maximum(1 + change / m0**2, 1e-12)
        gain = self.m[...] / m0 / jnp.sqrt(square)
        return jnp.where(s > 0, gain, 1)  # 1 in a layer that is not adapted


def row_norms(kernel: jax.Array) -> jax.Array:
    """The length of every row of W, from the kernel Wᵀ."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
