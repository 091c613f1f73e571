"""Parametrisations of ΔW, their factors' manifolds, and how they enter a model.

One file per method, with the same members in the same order: `factors`, `init`,
`delta`, `product`; what they share is in `low_rank.py`.
"""

from manifold_lora.adapters.attach import adapters as adapters
from manifold_lora.adapters.attach import attach as attach
from manifold_lora.adapters.attach import axes as axes
from manifold_lora.adapters.attach import factors as factors
from manifold_lora.adapters.attach import manifold_tree as manifold_tree
from manifold_lora.adapters.attach import merge as merge
from manifold_lora.adapters.attach import set_factors as set_factors
from manifold_lora.adapters.attach import split as split
from manifold_lora.adapters.config import AdapterConfig as AdapterConfig
from manifold_lora.adapters.options import adapter_class as adapter_class
