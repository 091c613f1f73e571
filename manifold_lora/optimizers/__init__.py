"""Optax transformations for parameters on manifolds.

`riemannian` and `landing` wrap any Optax optimiser; `stiefel_lora`, `stella`, `loram`
and `landing_adamw` are the papers' recipes; `scaled_gd` and `lora_plus` are baselines
to compare with.
"""

from manifold_lora.optimizers.loram import loram as loram
from manifold_lora.optimizers.riemannian import riemannian as riemannian
from manifold_lora.optimizers.stella import stella as stella
from manifold_lora.optimizers.stiefel_lora import stiefel_lora as stiefel_lora
