"""The configuration of a LLaMA model, as in Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from manifold_lora.errors import InputError, nearest

# The parameters of each supported rope type.
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
    """How rotary frequencies are scaled for a longer context.

    `linear` uses `factor` only; the other fields are for `llama3`, with the defaults of
    Llama 3.1.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        """Reject unknown rope types, which would silently change the logits."""
        if self.rope_type not in _ROPE_KEYS or self.rope_type == "default":
            raise InputError(
                f"LLaMA config: rope_type {self.rope_type!r} is not supported. "
                + nearest(str(self.rope_type), _ROPE_KEYS)
            )
        errors = [
            f"{key} of the {self.rope_type} rope scaling must be a positive number, "
            f"got {value!r}"
            for key in _ROPE_KEYS[self.rope_type]
            if not _is_number(value := getattr(self, key)) or value <= 0
        ]
        if not errors and self.low_freq_factor >= self.high_freq_factor:
            errors.append("low_freq_factor must be below high_freq_factor")
        _raise(errors)


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
    eos_token_id: tuple[int, ...] = (2,)  # each of them ends a sequence
    pad_token_id: int | None = None  # no LLaMA has one

    def __post_init__(self) -> None:
        """Validate the values; one `InputError` lists all that are invalid."""
        errors: list[str] = []
        for name in _POSITIVE:
            value = getattr(self, name)
            integral = LlamaConfig.__annotations__[name] is int
            if not _is_number(value):
                errors.append(f"{name} must be a number, got {value!r}")
            elif value <= 0 or (integral and not isinstance(value, int)):
                kind = "integer" if integral else "number"
                errors.append(f"{name} must be a positive {kind}, got {value!r}")
        for name in _BOOLEAN:
            if not isinstance(value := getattr(self, name), bool):
                errors.append(f"{name} must be true or false, got {value!r}")
        for token in self.eos_token_id:
            if not isinstance(token, int):
                errors.append(f"eos_token_id must contain integers, got {token!r}")
        if not errors and self.num_attention_heads % self.num_key_value_heads:
            errors.append(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not errors and self.head_dim % 2:
            errors.append(f"head_dim must be even for RoPE, got {self.head_dim}")
        _raise(errors)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "LlamaConfig":
        """Read the contents of a config.json written by transformers 4 or 5.

        Keys that do not affect the forward pass are ignored. Raises `InputError` for
        another architecture, activation or rope type, and for missing keys.
        """
        errors: list[str] = []
        if (kind := mapping.get("model_type")) != "llama":
            errors.append(f"model_type must be 'llama', got {kind!r}")
        if (act := mapping.get("hidden_act", "silu")) != "silu":
            errors.append(f"hidden_act must be 'silu', got {act!r}")
        errors += [f"{name} is missing" for name in _REQUIRED if name not in mapping]
        _raise(errors)

        # null means the default, as in files written by transformers 4
        names = {field.name for field in fields(cls)} - {"rope_scaling"}
        given = {k: v for k, v in mapping.items() if k in names and v is not None}
        hidden, heads = mapping["hidden_size"], mapping["num_attention_heads"]
        given.setdefault("num_key_value_heads", heads)
        if "head_dim" not in given:
            # invalid sizes are left for the constructor to report
            valid = all(isinstance(n, int) and n > 0 for n in (hidden, heads))
            if valid and hidden % heads:
                raise InputError(
                    f"LLaMA config: hidden_size {hidden} must be a multiple of "
                    f"num_attention_heads {heads}, or head_dim must be given."
                )
            given["head_dim"] = hidden // heads if valid else 2
        if "eos_token_id" in mapping:
            eos = mapping["eos_token_id"]
            ids = eos if isinstance(eos, list | tuple) else [eos]
            given["eos_token_id"] = tuple(i for i in ids if i is not None)
        if "bos_token_id" in mapping:
            given["bos_token_id"] = mapping["bos_token_id"]
        theta, scaling = _read_rope(mapping)
        return cls(**given | {"rope_theta": theta, "rope_scaling": scaling})

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The contents of config.json, with the keys of transformers 4 and of 5.

        transformers 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`, and
        silently defaults to theta 10000 without them; transformers 5 reads `dtype` and
        `rope_parameters`.
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
    """Theta and scaling; as in transformers, `rope_scaling` takes precedence."""
    new = mapping.get("rope_parameters") or {}
    rope = mapping.get("rope_scaling") or new
    theta = rope.get("rope_theta") or mapping.get("rope_theta")
    theta = theta or new.get("rope_theta") or 10000.0

    # a factor without a type is an invalid scaling, not the default
    untyped = "missing" if "factor" in rope else "default"
    rope_type = rope.get("rope_type") or rope.get("type") or untyped
    if rope_type == "default":
        return theta, None
    keys = _ROPE_KEYS.get(rope_type, ("factor",))
    # a missing key becomes None, which the constructor rejects by name
    values: dict[str, Any] = {key: rope.get(key) for key in keys}
    return theta, RopeScaling(rope_type, **values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _raise(errors: list[str]) -> None:
    """Raise one `InputError` with all messages, if there are any."""
    if errors:
        raise InputError("LLaMA config: " + "; ".join(errors) + ".")
