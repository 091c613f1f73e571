"""NumPy reference of LLaMA in float64, on tensors named as in Hugging Face files.

Nothing is imported from the package: shapes, RoPE (as a product of complex numbers)
and masks are restated independently, without regard to speed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")

_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
# wavelengths for head_dim 16 range from 6 to 20,000: below 16, in between, above 64
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WIDE = {"head_dim": 16, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2": _BASE | {"rope_scaling": None},
    "llama-3": _BASE | {"num_key_value_heads": 2, "rope_theta": 500000.0},
    "llama-3.1": _BASE
    | _WIDE
    | {
        "rope_theta": 10000.0,
        "rope_scaling": _LLAMA3 | {"rope_type": "llama3"},
        "eos_token_id": [2, 5, 9],
    },
    "llama-3.2": _BASE
    | _WIDE
    | {
        "rope_theta": 20000.0,
        "rope_scaling": _LLAMA3 | {"factor": 32.0, "type": "llama3"},
        "tie_word_embeddings": True,
    },
    "v5-default": _BASE
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "v5-llama3": _BASE
    | _WIDE
    | {
        "rope_parameters": _LLAMA3 | {"rope_type": "llama3", "rope_theta": 10000.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "linear": _BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


def head_dim(config: dict[str, Any]) -> int:
    return config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights scaled so that logits are of order one, float32, (out, in)."""
    rng = np.random.default_rng(seed)
    d, f, v = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    q = config["num_attention_heads"] * head_dim(config)
    kv = config.get("num_key_value_heads", config["num_attention_heads"])
    kv *= head_dim(config)
    shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
    shapes |= {"gate": (f, d), "up": (f, d), "down": (d, f)}

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, d).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(v, d), "model.norm.weight": norm()}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = normal(v, d)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        tensors[f"{layer}.input_layernorm.weight"] = norm()
        tensors[f"{layer}.post_attention_layernorm.weight"] = norm()
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            biased = config.get("mlp_bias" if part == "mlp" else "attention_bias")
            for name in names:
                linear = f"{layer}.{part}.{name}_proj"
                tensors[f"{linear}.weight"] = normal(*shapes[name])
                if biased:
                    tensors[f"{linear}.bias"] = normal(shapes[name][0])
    return tensors


def write_checkpoint(
    path: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1
) -> Path:
    """A model directory, in one file or in shards with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[n::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def frequencies(config: dict[str, Any]) -> np.ndarray:
    """theta^(-2i/d), scaled by the rule of the rope type, one frequency at a time."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    d = head_dim(config)
    scaled = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        if kind == "linear":
            f /= rope["factor"]
        if kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * f / (2 * np.pi)
            s = np.clip((turns - low) / (high - low), 0.0, 1.0)
            f = (1 - s) * f / rope["factor"] + s * f
        scaled.append(f)
    return np.array(scaled)


def logits(
    tensors: Tensors,
    config: dict[str, Any],
    input_ids: np.ndarray,
    allowed: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of one sequence, (t,) to (t, vocab).

    `allowed` (t, t) is True where a query (row) may attend to a key (column), in
    addition to causality.
    """
    w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    (t,) = input_ids.shape
    allowed = np.tril(np.ones((t, t), bool) if allowed is None else allowed)
    positions = np.arange(t) if positions is None else positions
    heads = config["num_attention_heads"]
    group = heads // config.get("num_key_value_heads", heads)
    turn = np.exp(1j * np.outer(positions, frequencies(config)))  # (t, head_dim / 2)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / rms * w[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:
        real, imaginary = np.split(x, 2, axis=-1)
        z = (real + 1j * imaginary) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(name: str, x: np.ndarray) -> np.ndarray:
        q, k, v = (linear(f"{name}.{p}_proj", x) for p in "qkv")
        outputs = []
        for h in range(heads):
            own, shared = (
                slice(n * head_dim(config), (n + 1) * head_dim(config))
                for n in (h, h // group)
            )
            scores = rotate(q[:, own]) @ rotate(k[:, shared]).T
            scores = np.where(allowed, scores / np.sqrt(head_dim(config)), -1e300)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            outputs.append(weights @ v[:, shared])
        return linear(f"{name}.o_proj", np.concatenate(outputs, axis=-1))

    x = w["model.embed_tokens.weight"][input_ids]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        x = x + attention(f"{layer}.self_attn", norm(f"{layer}.input_layernorm", x))
        h = norm(f"{layer}.post_attention_layernorm", x)
        gate = linear(f"{layer}.mlp.gate_proj", h)
        h = gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", h)
        x = x + linear(f"{layer}.mlp.down_proj", h)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm("model.norm", x) @ head.T
