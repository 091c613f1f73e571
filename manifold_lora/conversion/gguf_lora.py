"""LoRA files of llama.cpp, as its convert_lora_to_gguf.py writes them.

For each weight of the model's file, `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r);
llama.cpp adds alpha / r · B A. It rotates neighbouring pairs of a head's rows where
Hugging Face rotates its halves, so the rows of q_proj and k_proj are interleaved.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from manifold_lora.checkpoints.adapter_writer import Exported
from manifold_lora.errors import InputError
from manifold_lora.models import LlamaConfig

MAGIC = b"GGUF"  # with which the files begin
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}


def write(
    path: Path,
    modules: Mapping[str, Exported],
    model: LlamaConfig,
    base_id: str | None = None,
    license: str | None = None,
) -> None:
    """Write the file.

    Args:
        path: the file.
        modules: by full name, all of one rank and alpha.
        model: of the base, for its heads.
        base_id: name or path of the base.
        license: of the adapter.
    """
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if license is not None:
        writer.add_license(license)
    if base_id is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_id)
    alpha = next(iter(modules.values())).alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for full, module in modules.items():
        _, _, layer, kind = full.split(".", 3)
        stem = f"blk.{layer}.{_NAMES[kind]}.weight"
        b = module.tensors["lora_B.weight"]
        rows = _rows(kind, model, len(b))
        writer.add_tensor(f"{stem}.lora_a", module.tensors["lora_A.weight"])
        writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b[rows]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(
    path: Path, model: LlamaConfig
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """A (r, in) and B (out, r) by Hugging Face's full names, and alpha."""
    gguf = _gguf()
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    pairs = {}
    for name, a in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_a", name)
        if match:
            kind = _KINDS[match[2]]
            stored = tensors[name.removesuffix("a") + "b"]
            b = np.empty_like(stored)
            b[_rows(kind, model, len(stored))] = stored
            pairs[f"model.layers.{match[1]}.{kind}"] = (a, b)
    return pairs, alpha


def _rows(kind: str, model: LlamaConfig, outputs: int) -> np.ndarray:
    """The row of Hugging Face's weight that stands at each row of llama.cpp's."""
    rows = np.arange(outputs)
    heads = {
        "self_attn.q_proj": model.num_attention_heads,
        "self_attn.k_proj": model.num_key_value_heads,
    }.get(kind)
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "--format gguf-lora needs the package gguf: pip install "
            "'manifold-lora[gguf]'."
        ) from error
    return gguf
