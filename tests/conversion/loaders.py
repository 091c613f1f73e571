"""What other loaders compute from the files, restated in NumPy float64 from theirs.

Each function takes the directory or file and gives ΔW by full name, (out, in), or
raises `Refused`. With DoRA that is what is added to W before its rows are rescaled.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Matrices = dict[str, np.ndarray]
PREFIX = "base_model.model."


class Refused(Exception):
    """A loader does not take these files."""


def adapter_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))


def _pairs(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (
            x.astype(np.float64),
            tensors[key.replace("lora_A", "lora_B")].astype(np.float64),
        )
        for key, x in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def _matched(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """As PEFT's get_pattern_key: the first key that matches the end of a name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """PEFT's scale of a module, which must have the rank of the file."""
    r = _matched(config.get("rank_pattern", {}), name, config["r"])
    alpha = _matched(config.get("alpha_pattern", {}), name, config["lora_alpha"])
    assert rank == r
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def peft(path: Path) -> Matrices:
    """PEFT: everything by module."""
    config = adapter_config(path)
    return {
        name: _scale(config, name, len(a)) * b @ a
        for name, (a, b) in _pairs(path).items()
    }


def stella(path: Path) -> Matrices:
    """The authors' package, which is a copy of PEFT: s U S Vᵀ."""
    config = adapter_config(path)
    assert config["peft_type"] == "STELLA"
    tensors = load_file(path / "adapter_model.safetensors")
    result = {}
    for key in tensors:
        if not key.endswith(".stella_U.weight"):
            continue
        stem = key.removesuffix("U.weight")
        u, s, vt = (
            tensors[f"{stem}{x}.weight"].astype(np.float64) for x in ("U", "S", "Vt")
        )
        assert s.ndim == (1 if config["stella_diag_s"] else 2)
        name = stem.removeprefix(PREFIX).removesuffix(".stella_")
        middle = np.diag(s) if s.ndim == 1 else s
        result[name] = _scale(config, name, len(vt)) * u @ middle @ vt
    assert len(tensors) == 3 * len(result)
    return result


def new_vllm(path: Path) -> Matrices:
    """vLLM since it honours patterns, as PEFT."""
    _no_dora(adapter_config(path))
    return peft(path)


def _no_dora(config: dict[str, Any]) -> None:
    if config.get("use_dora"):
        raise Refused("DoRA")


def vllm(path: Path) -> Matrices:
    """vLLM's PEFTHelper: one scaling of the file, by rsLoRA if it says so."""
    config = adapter_config(path)
    _no_dora(config)
    assert config["bias"] == "none" and not config["modules_to_save"]
    root = math.sqrt if config.get("use_rslora") else float
    scale = config["lora_alpha"] / root(config["r"])
    return {name: scale * b @ a for name, (a, b) in _pairs(path).items()}


def sglang(path: Path) -> Matrices:
    """SGLang's LoRAAdapter: `self.scaling = lora_alpha / r`, and one rank."""
    config = adapter_config(path)
    _no_dora(config)
    scale = config["lora_alpha"] / config["r"]
    return {name: scale * b @ a for name, (a, b) in _pairs(path).items()}


def llama_cpp(path: Path) -> Matrices:
    """convert_lora_to_gguf.py and llama.cpp: alpha of the file over B's columns."""
    alpha = adapter_config(path)["lora_alpha"]
    if any("magnitude" in k for k in load_file(path / "adapter_model.safetensors")):
        raise Refused("tensors other than lora_A and lora_B")
    return {name: alpha / b.shape[1] * b @ a for name, (a, b) in _pairs(path).items()}


def mlx(path: Path) -> Matrices:
    """mlx-lm's LoRALinear.fuse: (scale · lora_bᵀ) lora_aᵀ."""
    config = adapter_config(path)
    settings = config["lora_parameters"]
    tensors = load_file(path / "adapters.safetensors")
    result = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_a"):
            continue
        name = key.removesuffix(".lora_a")
        b = tensors[f"{name}.lora_b"].astype(np.float64)
        assert a.shape[1] == len(b) == settings["rank"]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        assert match and match[2] in settings["keys"]
        assert int(match[1]) < config["num_layers"]
        result[name] = settings["scale"] * b.T @ a.astype(np.float64).T
    return result


def gguf(path: Path, heads: int, kv_heads: int) -> Matrices:
    """llama.cpp's tensors, with the rows of q and k as Hugging Face has them."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    tensors = {t.name: t for t in reader.tensors}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    result = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_([ab])", name)
        assert match
        layer, weight, side = match.groups()
        if side == "b":
            continue
        other = tensors[name[:-1] + "b"]
        # ne: a is {in, r} and b {r, out}, as llama-adapter.cpp checks them
        assert tensor.shape[1] == other.shape[0]
        a, b = (np.array(t.data, np.float64) for t in (tensor, other))
        delta = fields["adapter.lora.alpha"] / int(other.shape[0]) * b @ a
        n = {"attn_q": heads, "attn_k": kv_heads}.get(weight)
        if n is not None:  # LlamaModel.permute of llama.cpp, backwards
            split = delta.reshape(n, delta.shape[0] // n // 2, 2, -1)
            delta = split.swapaxes(1, 2).reshape(delta.shape)
        result[f"model.layers.{layer}.{names[weight]}"] = delta
    return result
