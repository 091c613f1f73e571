"""The LLaMA model: its configuration, its layers and its forward pass."""

from manifold_lora.models.config import LlamaConfig, RopeScaling
from manifold_lora.models.layers import Linear
from manifold_lora.models.llama import Llama

__all__ = ["Linear", "Llama", "LlamaConfig", "RopeScaling"]
