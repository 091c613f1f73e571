"""The logits of model directories on a few random tokens, in NumPy.

The forward pass is written again here, for files of which a few megabytes are read at
a time: compiling that of `models` takes more memory than a small model has, and holds
a whole layer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import expit, softmax

from manifold_lora.conversion.shards import Stored
from manifold_lora.conversion.updates import Update, Updates
from manifold_lora.models import LlamaConfig
from manifold_lora.models.layers import rope_frequencies

_TOKENS = (2, 32)


class Model(NamedTuple):
    """A model in files, with the updates of an adapter or without any."""

    config: LlamaConfig
    tensors: Mapping[str, Stored]
    updates: Updates = {}


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float
    logits: float  # the largest of all, for comparison


def compare_logits(one: Model, other: Model) -> Difference:
    """The largest difference of the logits of two models of one vocabulary.

    In float32, on a fixed batch of random tokens. The weights are read in blocks of
    rows, so that not even a layer is ever in memory. An update is added to what the
    weight gives, x Wᵀ + s (x Aᵀ) Bᵀ, and not to the weight.
    """
    ids = np.random.default_rng(0).integers(0, one.config.vocab_size, _TOKENS)
    hidden = [_hidden_states(model, ids) for model in (one, other)]
    heads = [_head(model) for model in (one, other)]
    difference = size = 0.0
    for block in heads[0].blocks():
        x, y = (
            h @ head.read(block).astype(np.float32).T
            for h, head in zip(hidden, heads, strict=True)
        )
        difference = max(difference, float(np.abs(x - y).max()))
        size = max(size, float(np.abs(x).max()))
    return Difference(difference, size)


def _head(model: Model) -> Stored:
    tied = model.config.tie_word_embeddings
    return model.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]


def _hidden_states(model: Model, ids: np.ndarray) -> np.ndarray:
    """What the head is applied to, (tokens, d)."""
    embedding = model.tensors["model.embed_tokens.weight"]
    rows = [embedding.read((i, i + 1)) for i in ids.ravel().tolist()]
    x = np.concatenate(rows).astype(np.float32).reshape(*ids.shape, -1)
    for layer in range(model.config.num_hidden_layers):
        x = _layer(model, f"model.layers.{layer}", x)
    return _norm(model, "model.norm", x).reshape(ids.size, -1)


def _layer(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """One block: x + attention(norm(x)), then x + mlp(norm(x)), of (b, t, d)."""

    def linear(part: str, x: np.ndarray) -> np.ndarray:
        return _linear(model, f"{name}.{part}_proj", x)

    h = _norm(model, f"{name}.input_layernorm", x)
    heads = (*x.shape[:2], -1, model.config.head_dim)
    q, k, v = (linear(f"self_attn.{part}", h).reshape(heads) for part in "qkv")
    y = _attention(_rotated(model, q), _rotated(model, k), v)
    x = x + linear("self_attn.o", y.reshape(*x.shape[:2], -1))
    h = _norm(model, f"{name}.post_attention_layernorm", x)
    gate = linear("mlp.gate", h)
    return x + linear("mlp.down", gate * expit(gate) * linear("mlp.up", h))


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal, with fewer heads in k and v, (b, t, h, head_dim)."""
    _, t, heads, size = q.shape
    k, v = (x.repeat(heads // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(size))
    scores[..., ~np.tri(t, dtype=bool)] = -np.inf
    return np.einsum("bhqk,bkhd->bqhd", softmax(scores, axis=-1), v)


def _rotated(model: Model, x: np.ndarray) -> np.ndarray:
    """RoPE, (b, t, h, head_dim)."""
    positions = np.arange(x.shape[1], dtype=np.float32)[:, None, None]
    angles = positions * rope_frequencies(model.config)  # (t, 1, head_dim / 2)
    cos, sin = np.cos(angles), np.sin(angles)
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)


def _norm(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """RMSNorm, w · x / sqrt(mean(x²) + ε)."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    scale = model.tensors[f"{name}.weight"].read().astype(np.float32)
    return scale * x / np.sqrt(mean_square + np.float32(model.config.rms_norm_eps))


def _linear(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """A projection with its update, (b, t, in) to (b, t, out)."""
    weight = model.tensors[f"{name}.weight"]
    update = model.updates.get(name)
    flat = x.reshape(-1, x.shape[-1])  # one product, not one a sequence
    parts = []
    for rows in weight.blocks():
        w = weight.read(rows).astype(np.float32)
        y = flat @ w.T
        if update is not None:
            part = _rows_of(update, slice(*rows))
            y += (flat @ part.a.T) @ part.b.T
            if part.magnitude is not None:
                y *= part.magnitude / np.linalg.norm(w + part.b @ part.a, axis=1)
        parts.append(y)
    y = np.concatenate(parts, axis=-1).reshape(*x.shape[:-1], -1)
    bias = model.tensors.get(f"{name}.bias")
    return y if bias is None else y + bias.read().astype(np.float32)


def _rows_of(update: Update, rows: slice) -> Update:
    """Some outputs of an update, in float32, its scale in B."""
    b = np.float32(update.scale) * update.b[rows].astype(np.float32)
    a, magnitude = update.a.astype(np.float32, copy=False), update.magnitude
    return Update(a, b, 1.0, None if magnitude is None else magnitude[rows])
