"""Configurations of the published LLaMA models by name, for use without weights.

The values are those of the models' config.json files.
"""

from pathlib import Path

from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError, nearest
from manifold_lora.models.config import LlamaConfig, RopeScaling


def _llama2(hidden: int, mlp: int, layers: int, heads: int, kv: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama3(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    *,
    head_dim: int = 128,
    rope_factor: float | None = None,
    tied: bool = False,
    eos: tuple[int, ...] = (128001,),
) -> LlamaConfig:
    """LLaMA 3; since 3.1 its rotary frequencies are scaled by `rope_factor`."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072 if rope_factor else 8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", rope_factor) if rope_factor else None,
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_id=eos,
    )


SHAPES = {
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama3(4096, 14336, 32, 32),
    "llama-3-70b": _llama3(8192, 28672, 80, 64),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, rope_factor=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, rope_factor=8.0),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128, rope_factor=8.0),
    "llama-3.2-1b": _llama3(
        2048, 8192, 16, 32, head_dim=64, rope_factor=32.0, tied=True
    ),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, rope_factor=32.0, tied=True),
    "llama-3.3-70b": _llama3(
        8192, 28672, 80, 64, rope_factor=8.0, eos=(128001, 128008, 128009)
    ),
}


def model_shape(model: str | Path) -> LlamaConfig:
    """The configuration of a model, by name or from a config.json or its directory.

    Raises:
        InputError: neither a known name nor a file, or not the config of a LLaMA.

    Examples:
        >>> model_shape("llama-3.1-8b").num_hidden_layers
        32
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _read(path)
    if str(model) in SHAPES:
        return SHAPES[str(model)]
    raise InputError(
        f"{str(model)!r} is not a known model name, a config.json, or a directory "
        f"with one. {nearest(str(model), SHAPES)}"
    )


def _read(file: Path) -> LlamaConfig:
    mapping = read_json(file)
    try:
        return LlamaConfig.from_hf(mapping)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def parameter_count(config: LlamaConfig) -> int:
    """The number of parameters of the base model, including biases.

    >>> parameter_count(SHAPES["llama-3.1-8b"])
    8030261248
    """
    hidden = config.hidden_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * width + 2 * kv_width)
    if config.attention_bias:
        attention += width + 2 * kv_width + hidden
    mlp = 3 * hidden * config.intermediate_size
    if config.mlp_bias:
        mlp += 2 * config.intermediate_size + hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    layer = attention + mlp + 2 * hidden
    return config.num_hidden_layers * layer + embeddings + hidden
