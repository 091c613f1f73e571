"""Optax transformations for parameters on manifolds.

`riemannian` and `landing` wrap any Optax optimiser; `stiefel_lora`, `stella`, `loram`
and `landing_adamw` are the papers' recipes; `scaled_gd` and `lora_plus` are baselines.
`FactorTree` and `FactorSpec` describe the factors of other libraries.
"""

from manifold_lora.optimizers.factor_spec import NNX_LORA as NNX_LORA
from manifold_lora.optimizers.factor_spec import QWIX_LORA as QWIX_LORA
from manifold_lora.optimizers.factor_spec import FactorSpec as FactorSpec
from manifold_lora.optimizers.factor_tree import FactorDims as FactorDims
from manifold_lora.optimizers.factor_tree import FactorTree as FactorTree
from manifold_lora.optimizers.landing import landing as landing
from manifold_lora.optimizers.landing_adamw import landing_adamw as landing_adamw
from manifold_lora.optimizers.lora_plus import lora_plus as lora_plus
from manifold_lora.optimizers.loram import loram as loram
from manifold_lora.optimizers.riemannian import riemannian as riemannian
from manifold_lora.optimizers.scaled_gd import scaled_gd as scaled_gd
from manifold_lora.optimizers.stella import stella as stella
from manifold_lora.optimizers.stiefel_lora import stiefel_lora as stiefel_lora
