"""The shape of a LLaMA model, read from and written to Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from manifold_lora.errors import InputError, nearest

# What each rope type needs beside its name; the key set is what we support.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_POSITIVE = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
_BOOLEAN = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context.

    `linear` uses `factor` only; the other fields belong to `llama3`, and their
    defaults are those of Llama 3.1.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        """Refuse a type we do not know: without it the logits would be others."""
        if self.rope_type not in _ROPE_KEYS or self.rope_type == "default":
            raise InputError(
                f"LLaMA config: rope_type {self.rope_type!r} is not supported. "
                + nearest(str(self.rope_type), _ROPE_KEYS)
            )
        bad = [
            f"{key} of the {self.rope_type} rope scaling must be a positive number, "
            f"got {value!r}"
            for key in _ROPE_KEYS[self.rope_type]
            if not _is_number(value := getattr(self, key)) or value <= 0
        ]
        if not bad and self.low_freq_factor >= self.high_freq_factor:
            bad.append("low_freq_factor must be below high_freq_factor")
        _raise(bad)


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a LLaMA model, named as in config.json.

    >>> config = LlamaConfig.from_hf({"model_type": "llama", "vocab_size": 512,
    ...     "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    ...     "num_attention_heads": 4})
    >>> config.head_dim, config.num_key_value_heads, config.rope_theta
    (16, 4, 10000.0)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # need not be hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)  # any of them ends the text
    pad_token_id: int | None = None  # no LLaMA has one

    def __post_init__(self) -> None:
        """Check the values; all that are wrong are named in one `InputError`."""
        bad: list[str] = []
        for name in _POSITIVE:
            value = getattr(self, name)
            whole = LlamaConfig.__annotations__[name] is int
            if not _is_number(value):
                bad.append(f"{name} must be a number, got {value!r}")
            elif value <= 0 or (whole and not isinstance(value, int)):
                kind = "whole number" if whole else "number"
                bad.append(f"{name} must be a positive {kind}, got {value!r}")
        for name in _BOOLEAN:
            if not isinstance(value := getattr(self, name), bool):
                bad.append(f"{name} must be true or false, got {value!r}")
        for token in self.eos_token_id:
            if not isinstance(token, int):
                bad.append(f"eos_token_id must hold whole numbers, got {token!r}")
        if not bad and self.num_attention_heads % self.num_key_value_heads:
            bad.append(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not bad and self.head_dim % 2:
            bad.append(f"head_dim must be even for rotation, got {self.head_dim}")
        _raise(bad)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json in the spelling of transformers 4 or 5.

        Keys that do not change the forward pass are ignored. Raises `InputError`
        for another architecture, activation or rope type, and for missing keys.
        """
        bad: list[str] = []
        if (kind := mapping.get("model_type")) != "llama":
            bad.append(f"model_type must be 'llama', got {kind!r}")
        if (act := mapping.get("hidden_act", "silu")) != "silu":
            bad.append(f"hidden_act must be 'silu', got {act!r}")
        bad += [f"{name} is missing" for name in _REQUIRED if name not in mapping]
        _raise(bad)

        # null means the default, as in files written by transformers 4
        names = {field.name for field in fields(cls)} - {"rope_scaling"}
        given = {k: v for k, v in mapping.items() if k in names and v is not None}
        hidden, heads = mapping["hidden_size"], mapping["num_attention_heads"]
        given.setdefault("num_key_value_heads", heads)
        if "head_dim" not in given:
            # sizes that are no such numbers are left for the constructor to report
            whole = all(isinstance(n, int) and n > 0 for n in (hidden, heads))
            if whole and hidden % heads:
                raise InputError(
                    f"LLaMA config: hidden_size {hidden} must be a multiple of "
                    f"num_attention_heads {heads}, or head_dim must be given."
                )
            given["head_dim"] = hidden // heads if whole else 2
        if "eos_token_id" in mapping:
            eos = mapping["eos_token_id"]
            ids = eos if isinstance(eos, list | tuple) else [eos]
            given["eos_token_id"] = tuple(i for i in ids if i is not None)
        if "bos_token_id" in mapping:
            given["bos_token_id"] = mapping["bos_token_id"]
        theta, scaling = _read_rope(mapping)
        return cls(**given | {"rope_theta": theta, "rope_scaling": scaling})

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of config.json, in both spellings.

        transformers 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`, and
        silently falls back to theta 10000 without them; transformers 5 reads `dtype`
        and `rope_parameters`.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["eos_token_id"] = list(self.eos_token_id) or None
        if len(self.eos_token_id) == 1:
            plain["eos_token_id"] = self.eos_token_id[0]
        rope: dict[str, Any] | None = None
        if scaling := self.rope_scaling:
            keys = _ROPE_KEYS[scaling.rope_type]
            rope = {"rope_type": scaling.rope_type}
            rope |= {key: getattr(scaling, key) for key in keys}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **plain,
            "rope_scaling": rope,
            "rope_parameters": {
                **(rope or {"rope_type": "default"}),
                "rope_theta": self.rope_theta,
            },
            "torch_dtype": dtype,
            "dtype": dtype,
        }


def _read_rope(mapping: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; as in transformers, `rope_scaling` wins if both are there."""
    new = mapping.get("rope_parameters") or {}
    rope = mapping.get("rope_scaling") or new
    theta = rope.get("rope_theta") or mapping.get("rope_theta")
    theta = theta or new.get("rope_theta") or 10000.0

    # a factor without a type is a damaged scaling, not the default
    untyped = "missing" if "factor" in rope else "default"
    rope_type = rope.get("rope_type") or rope.get("type") or untyped
    if rope_type == "default":
        return theta, None
    keys = _ROPE_KEYS.get(rope_type, ("factor",))
    # a missing key is None here, which the constructor refuses by name
    values: dict[str, Any] = {key: rope.get(key) for key in keys}
    return theta, RopeScaling(rope_type, **values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _raise(bad: list[str]) -> None:
    """Raise all complaints at once."""
    if bad:
        raise InputError("LLaMA config: " + "; ".join(bad) + ".")
