"""The adapter_config.json of PEFT: what is read of it, with types and ranges."""

import re
from pathlib import Path
from typing import Any

import msgspec

from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError
from manifold_lora.settings import PositiveInt, PositiveNumber, Probability

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


class PeftConfig(msgspec.Struct):
    """What is read of adapter_config.json, with types and ranges."""

    r: PositiveInt
    lora_alpha: PositiveNumber
    lora_dropout: Probability
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveNumber] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None
    base_model_name_or_path: str | None = None


def read_peft_config(file: Path) -> dict[str, Any]:
    """Read and check adapter_config.json.

    Raises:
        InputError: it is of another kind of adapter, or a value is of the wrong type or
            out of range; file and key are named.
    """
    config = read_json(file)
    if config.get("peft_type") not in ("LORA", "STELLA"):
        raise InputError(
            f"{file} is of peft_type {config.get('peft_type')!r}; only LORA "
            "and STELLA can be read."
        )
    unsupported = [
        f"{key}={config[key]!r}"
        for key, plain in _PLAIN.items()
        if config.get(key) not in (plain, None, False, [])
    ]
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(_CHANGED_BASE):
        unsupported.append(f"init_lora_weights={init!r}")
    if unsupported:
        raise InputError(
            f"{file} uses {', '.join(unsupported)}, which cannot be read: "
            "merge that adapter into its base with PEFT first."
        )
    config.setdefault("lora_dropout", 0.0)
    missing = [key for key in ("r", "lora_alpha") if config.get(key) is None]
    if missing:
        raise InputError(f"{file} must have a number for {', '.join(missing)}.")
    try:
        msgspec.convert(config, PeftConfig)
    except msgspec.ValidationError as error:
        key = re.search(r"\$\.(\w+)", str(error))
        name = key[1] if key else "it"
        value = str(config.get(name))[:60]
        raise InputError(f"{file}: {name} is {value}: {error}.") from error
    return config
