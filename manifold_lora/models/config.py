"""The configuration of a LLaMA model, as in Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from msgspec import Meta

from manifold_lora.errors import InputError, nearest, shortened
from manifold_lora.settings import (
    MAX_INT,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    decode,
    validate,
)

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
# Every layer has names of its own, which must not fill the memory.
Layers = Annotated[int, Meta(ge=1, le=10_000)]
PadToken = Annotated[int, Meta(ge=-1, le=MAX_INT)]  # -1 in the files of LLaMA 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for a longer context.

    `linear` uses `factor` only; the other fields are for `llama3`, with the defaults of
    Llama 3.1.
    """

    rope_type: str
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    def __post_init__(self) -> None:
        """Reject unknown rope types, which would silently change the logits."""
        known = isinstance(self.rope_type, str) and self.rope_type in _ROPE_KEYS
        if not known or self.rope_type == "default":
            raise InputError(
                f"LLaMA config: rope_type {shortened(repr(self.rope_type))} is not "
                f"supported. {nearest(str(self.rope_type), _ROPE_KEYS)}"
            )
        _validate(self, f" of the {self.rope_type} rope scaling")
        if self.low_freq_factor >= self.high_freq_factor:
            _raise(["low_freq_factor must be below high_freq_factor"])


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a LLaMA model, named as in config.json.

    >>> config = LlamaConfig.from_hf({"model_type": "llama", "vocab_size": 512,
    ...     "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    ...     "num_attention_heads": 4})
    >>> config.head_dim, config.num_key_value_heads, config.rope_theta
    (16, 4, 10000.0)
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: Layers
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt  # need not be hidden_size / num_attention_heads
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: NonNegativeInt | None = 1
    eos_token_id: tuple[NonNegativeInt, ...] = (2,)  # each of them ends a sequence
    pad_token_id: PadToken | None = None  # no LLaMA has one

    def __post_init__(self) -> None:
        """Validate the values; one `InputError` lists all that are invalid."""
        _validate(self)
        errors: list[str] = []
        if self.num_attention_heads % self.num_key_value_heads:
            errors.append(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            errors.append(f"head_dim must be even for RoPE, got {self.head_dim}")
        _raise(errors)

    def length_warning(self, length: int) -> str:
        """What to say of sequences of this length; "" if the model knows such ones."""
        if length <= self.max_position_embeddings:
            return ""
        return (
            f"sequences of {length} tokens are longer than any the model was trained "
            f"on (max_position_embeddings {self.max_position_embeddings})"
        )

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "LlamaConfig":
        """Read the contents of a config.json written by transformers 4 or 5.

        Keys that do not affect the forward pass are ignored. Raises `InputError` for
        another architecture, activation or rope type, and for missing keys.
        """
        errors: list[str] = []
        if (kind := mapping.get("model_type")) != "llama":
            errors.append(f"model_type must be 'llama', got {shortened(repr(kind))}")
        if (act := mapping.get("hidden_act", "silu")) != "silu":
            errors.append(f"hidden_act must be 'silu', got {shortened(repr(act))}")
        errors += [
            f"{name} is missing" for name in _REQUIRED if mapping.get(name) is None
        ]
        _raise(errors)

        # null means the default, as in files written by transformers 4
        names = {field.name for field in fields(cls)} - {"rope_scaling"}
        given = {k: v for k, v in mapping.items() if k in names and v is not None}
        hidden, heads = mapping["hidden_size"], mapping["num_attention_heads"]
        given.setdefault("num_key_value_heads", heads)
        if "head_dim" not in given:
            # invalid sizes are left for the constructor to report
            valid = all(type(n) is int and n > 0 for n in (hidden, heads))
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
    objects: dict[str, Mapping[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = mapping.get(name)
        if not isinstance(value, Mapping | None):
            _raise([f"{name} must be an object, got {shortened(repr(value))}"])
        objects[name] = value or {}
    rope = objects["rope_scaling"] or objects["rope_parameters"]
    theta = _theta({"the file": mapping} | objects)

    # a factor without a type is an invalid scaling, not the default
    untyped = "missing" if "factor" in rope else "default"
    given = (rope.get(key) for key in ("rope_type", "type"))
    rope_type: Any = next((kind for kind in given if kind is not None), untyped)
    if rope_type == "default":
        return theta, None
    values: dict[str, Any] = {"factor": 1.0}  # of an unknown type, which is refused
    values |= {key: rope.get(key) for key in _ROPE_KEYS.get(str(rope_type), ())}
    _raise(
        [f"{k} of the rope scaling is missing" for k, x in values.items() if x is None]
    )
    return theta, RopeScaling(rope_type, **values)


def _theta(places: Mapping[str, Mapping[str, Any]]) -> float:
    """The base of the frequencies, which older and newer versions keep elsewhere."""
    given: dict[str, float] = {}
    for place, holder in places.items():
        if (value := holder.get("rope_theta")) is not None:
            try:
                given[place] = decode(value, PositiveFloat)
            except ValueError as error:
                _raise([f"rope_theta of {place} {error}"])
    if len({*given.values()}) > 1:
        values = ", ".join(f"{theta:g} in {place}" for place, theta in given.items())
        _raise([f"rope_theta is {values}: versions of transformers read either"])
    return next(iter(given.values()), 10000.0)


def _validate(config: Any, what: str = "") -> None:
    """Check all fields of a dataclass; the message names them as of `what`."""
    try:
        validate(config)
    except InputError as error:
        _raise([str(error).rstrip(".") + what])


def _raise(errors: list[str]) -> None:
    """Raise one `InputError` with all messages, if there are any."""
    if errors:
        raise InputError("LLaMA config: " + "; ".join(errors) + ".")
