"""The adapter_config.json of PEFT: what is read of it, with types and ranges."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifold_lora.adapters.config import full_match, is_target, matches_end
from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError, shortened
from manifold_lora.settings import (
    NonNegativeInt,
    PositiveNumber,
    Probability,
    Rank,
    decode,
    raise_all,
)

# Settings of PEFT's LoRA that change the model, with the value that does not.
_PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# Initialisations that subtract B A from the base: the adapter belongs to that base.
_CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


Names = str | list[str] | None
Numbers = NonNegativeInt | list[NonNegativeInt] | None
_TYPES: dict[str, Any] = {
    "r": Rank,
    "lora_alpha": PositiveNumber,
    "lora_dropout": Probability,
    "target_modules": Names,
    "exclude_modules": Names,
    "layers_to_transform": Numbers,
    "layers_pattern": Names,
    "rank_pattern": Mapping[str, Rank],
    "alpha_pattern": Mapping[str, PositiveNumber],
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "init_lora_weights": bool | str | None,
    "base_model_name_or_path": str | None,
}


def read_peft_config(file: Path) -> dict[str, Any]:
    """Read and check adapter_config.json.

    Raises:
        InputError: it is of another kind of adapter, or values are of the wrong type or
            out of range; file and keys are named.
    """
    config = read_json(file)
    if config.get("peft_type") not in ("LORA", "STELLA"):
        raise InputError(
            f"{file} is of peft_type {shortened(repr(config.get('peft_type')))}; only "
            "LORA and STELLA can be read."
        )
    unsupported = [
        f"{key}={shortened(repr(config[key]))}"
        for key, plain in _PLAIN.items()
        if not _is_plain(config.get(key), plain)
    ]
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(_CHANGED_BASE):
        unsupported.append(f"init_lora_weights={init!r}")
    if unsupported:
        raise InputError(
            f"{file} uses {', '.join(unsupported)}, which cannot be read: "
            "merge that adapter into its base with PEFT first."
        )
    missing = [key for key in ("r", "lora_alpha") if config.get(key) is None]
    if missing:
        raise InputError(f"{file} must have a number for {', '.join(missing)}.")
    for key, default in (("lora_dropout", 0.0), ("rank_pattern", {}),
                         ("alpha_pattern", {})):  # fmt: skip
        if config.get(key) is None:
            config[key] = default
    problems = []
    for key, kind in _TYPES.items():
        try:
            config[key] = decode(config.get(key), kind)
        except ValueError as error:
            problems.append(f"{file}: {key} {error}")
    raise_all(problems)
    return config


def _is_plain(value: Any, plain: Any) -> bool:
    """Whether a setting is that of plain LoRA; 0 is not False."""
    if value is None or (plain is None and (value is False or value == [])):
        return True
    return type(value) is type(plain) and value == plain


def is_adapted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module of that full name, given target_modules.

    >>> is_adapted({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj")
    True
    """
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if (excluded and _is_named(excluded, name)) or not _is_named(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or layers in (None, []):
        return True
    place = re.match(r"(.*)\.(\d+)\.", name)
    patterns = config.get("layers_pattern") or [".*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if place is None or not any(matches_end(p, place[1]) for p in patterns):
        return False
    return int(place[2]) in ([layers] if isinstance(layers, int) else layers)


def _is_named(given: str | list[str], name: str) -> bool:
    if isinstance(given, str):
        return given == "all-linear" or full_match(given, name)
    return is_target(given, name)
