"""What one run is: every choice, its default and its check. Imports no JAX."""

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from manifold_lora.errors import InputError, nearest

# Rates of the papers, for models of billions of parameters.
_METHOD = {
    "lora": {"learning_rate": 2e-4, "free_learning_rate": 2e-4},
    "stiefel": {"learning_rate": 0.1, "free_learning_rate": 2e-4},
}
# The small built-in base learns at higher rates than a large model.
_BUILTIN = {
    "lora": {"learning_rate": 5e-3, "free_learning_rate": 5e-3},
    "stiefel": {"learning_rate": 0.1, "free_learning_rate": 5e-3},
}
_BUILTIN_STEPS = 600


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning run. Flags go over the file of --config, and that over defaults."""

    config: Path | None = None  # TOML file of these settings, with underscores
    model: Path | None = None  # Hugging Face LLaMA directory; None: small built-in base
    data: Path | None = None  # .jsonl or .json to train on; None: built-in data
    eval_data: Path | None = None  # held-out file; None: taken out of --data
    out: Path | None = None  # run directory; None: runs/METHOD
    overwrite: bool = False  # replace a run with another configuration in --out

    method: str = "stiefel"  # lora or stiefel
    rank: int = 16  # columns of the factors
    alpha: float | None = None  # the update is scaled by alpha/rank; None: 2·rank
    rslora: bool = False  # scale by alpha/√rank instead
    dropout: float = 0.0  # of the adapters' inputs
    # names of modules, or one regular expression for whole names
    targets: tuple[str, ...] = ("all-linear",)
    # rank by module, as in: q_proj 8 mlp.* 32
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    # alpha by module, likewise
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    # of constrained factors (of all, for lora); None: the method's
    learning_rate: float | None = None
    free_learning_rate: float | None = None  # of the others; None: the method's
    optimizer: str = "adamw"  # any Optax optimiser by name
    weight_decay: float = 0.0  # decoupled; without effect on orthonormal factors
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup_steps: int = 20  # steps until the full rate
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    steps: int | None = None  # optimiser steps; None: by --epochs
    epochs: int | None = None  # passes over the data; None: by --steps, or else 3
    batch_size: int = 32  # examples (packed rows) of one optimiser step
    accumulate: int = 1  # equal parts of a batch that pass through memory in turn
    sequence_length: int = 512  # tokens of a row at most
    packing: bool = False  # several examples per row
    train_on_prompt: bool = False  # put the loss on prompts too
    seed: int = 0  # of the adapter's start, the order of the data and dropout

    eval_every: int | None = None  # steps; None: four times a run
    eval_examples: int = 1000  # held out of --data, at most a tenth of it
    best_metric: Literal["loss", "accuracy"] = "loss"  # decides which adapter is kept
    patience: int | None = None  # evaluations without improvement before stopping
    # of the base; None: bfloat16 on accelerators, float32 on CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: bool = True  # recompute layers in the backward pass to save memory
    report: tuple[Literal["tensorboard", "wandb"], ...] = ()  # besides metrics.jsonl
    base_id: str | None = None  # the base's name in the adapter; None: --model
    show_batch: bool = False  # print one batch, trained tokens coloured, and stop
    debug: bool = False  # show tracebacks

    @property
    def run_directory(self) -> Path:
        """Where the run is written: `out`, or runs/METHOD."""
        return self.out or Path("runs") / self.method


# Fields that say how a run is started, not what it is.
_NOT_THE_RUN = {"config", "out", "overwrite", "show_batch", "debug"}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other settings, and check every value.

    Raises:
        InputError: all values out of range, in one message.
    """
    builtin = config.model is None
    filled: dict[str, Any] = dict(
        (_BUILTIN if builtin else _METHOD).get(config.method, {})
    )
    filled["alpha"] = 2 * config.rank
    if config.steps is None and config.epochs is None:
        by_steps = builtin and config.data is None
        filled |= {"steps": _BUILTIN_STEPS} if by_steps else {"epochs": 3}
    missing = {k: v for k, v in filled.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **missing)

    problems = []
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            problems.append(f"{_flag(name)} must be at least {least}, got {value}")
    for name in ("learning_rate", "free_learning_rate", "alpha"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{_flag(name)} must be a positive number, got {value}")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout must be in [0, 1), got {config.dropout}")
    if config.steps is not None and config.epochs is not None:
        problems.append("--steps and --epochs exclude each other: give one")
    if config.accumulate > 0 and config.batch_size % config.accumulate:
        problems.append(
            f"--batch-size {config.batch_size} must be a multiple of --accumulate "
            f"{config.accumulate}"
        )
    if problems:
        raise InputError("; ".join(problems) + ".")
    return config


_AT_LEAST = {
    "rank": 1,
    "weight_decay": 0,
    "warmup_steps": 0,
    "clip": 0,
    "steps": 1,
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "sequence_length": 2,
    "seed": 0,
    "eval_every": 1,
    "eval_examples": 1,
    "patience": 1,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_config(path: Path) -> TrainConfig:
    """The configuration in a TOML file, on top of the defaults.

    Raises:
        InputError: no such file, broken TOML, unknown keys (with the nearest known
            ones) and values of the wrong type, all in one message.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--config {path} cannot be read: {error.strerror}."
        ) from error
    except ValueError as error:
        raise InputError(f"--config {path} is not valid TOML: {error}.") from error
    hints = typing.get_type_hints(TrainConfig)
    problems = []
    for key, value in values.items():
        if key not in hints or key == "config":
            problems.append(f"unknown key {key!r}. {nearest(key, hints)}")
            continue
        try:
            values[key] = _coerce(value, hints[key])
        except TypeError:
            kind = str(hints[key]).replace("typing.", "").replace("pathlib.", "")
            problems.append(f"{key} = {value!r} must be {kind.removeprefix('<class ')}")
    if problems:
        raise InputError(f"--config {path}:\n  " + "\n  ".join(problems))
    return dataclasses.replace(TrainConfig(), **values)


def _coerce(value: Any, hint: Any) -> Any:
    """The TOML value as the field's type, or `TypeError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _coerce(value, next(a for a in args if a is not type(None)))
    if origin is Literal and value in args:
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list):
            return tuple(_coerce(item, args[0]) for item in items)
    elif origin is dict and isinstance(value, dict):
        return {key: _coerce(item, args[1]) for key, item in value.items()}
    elif hint is float and isinstance(value, int | float) and value is not True:
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise TypeError


def as_toml(config: TrainConfig) -> dict[str, Any]:
    """The settings that make the run what it is, as TOML can hold them."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_THE_RUN or value is None:
            continue
        if isinstance(value, Path):
            value = str(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values
