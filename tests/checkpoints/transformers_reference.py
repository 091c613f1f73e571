"""Models of transformers and PEFT with the weights of the tests; needs the extra hf."""

# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import numpy as np

from tests import adapters as tiny


def base_directory(path: Path) -> Path:
    """A model directory written by transformers, weights of ordinary size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in tiny.CONFIG.items() if k != "torch_dtype"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    state = {name: torch.tensor(x) for name, x in tiny.TENSORS.items()}
    model.load_state_dict(state, strict=True)
    model.save_pretrained(path)
    return path


def load_transformers(path: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def transformers_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tiny.IDS)).logits.numpy()
