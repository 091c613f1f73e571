"""Stiefel-LoRA with DoRA's magnitude vector."""

import dataclasses

from manifold_lora.adapters.dora import DoRALinear
from manifold_lora.adapters.stiefel import StiefelLinear, StiefelLoRAOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class StiefelDoRAOptions(StiefelLoRAOptions):
    """Options of Stiefel-LoRA with DoRA's magnitude vector."""

    update = "m ⊙ (W + s B Aᵀ)/‖W + s B Aᵀ‖ − W"
    export = "DoRA"


class StiefelDoRALinear(DoRALinear):
    """DoRA whose B keeps orthonormal columns; A is initialised to zero.

    References:
        "Riemannian optimization for LoRA on the Stiefel manifold", 2025,
        arXiv:2508.17901; Liu et al., "DoRA", 2024, arXiv:2402.09353.
    """

    options = StiefelDoRAOptions
    direction = StiefelLinear
