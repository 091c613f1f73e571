"""The LLaMA model: configuration, layers, forward pass and token loss."""

from manifold_lora.models.config import LlamaConfig, RopeScaling
from manifold_lora.models.layers import Linear
from manifold_lora.models.llama import Llama

__all__ = ["Linear", "Llama", "LlamaConfig", "RopeScaling"]
