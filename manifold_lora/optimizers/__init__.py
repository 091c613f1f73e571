"""Optax transformations for parameters on manifolds.

`riemannian` wraps any Optax optimiser; the other files are the papers' recipes.
"""

from manifold_lora.optimizers.riemannian import riemannian as riemannian
from manifold_lora.optimizers.stiefel_lora import stiefel_lora as stiefel_lora
