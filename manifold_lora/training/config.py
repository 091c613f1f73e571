"""What one run is: every choice, its default and its check. Imports no JAX."""

import contextlib
import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from manifold_lora.distributed.mesh import read_mesh
from manifold_lora.errors import InputError, nearest
from manifold_lora.methods import find_method
from manifold_lora.methods import problems as exclusions

_DATA = {"batch_size": 16, "sequence_length": 512, "packing": False}
# The built-in examples are short and many.
_BUILTIN_DATA = {"batch_size": 8, "sequence_length": 128, "packing": True}
_BUILTIN_STEPS = 600


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning run. Flags go over the file of --config, and that over defaults."""

    config: Path | None = None  # TOML file of these settings, with underscores
    model: Path | None = None  # Hugging Face LLaMA directory; None: small built-in base
    data: Path | None = None  # .jsonl or .json to train on; None: built-in data
    eval_data: Path | None = None  # held-out file; None: taken out of --data
    out: Path | None = None  # run directory; None: runs/METHOD
    overwrite: bool = False  # begin anew, in place of any run in --out

    method: str = "stiefel"  # as listed by `manifold-lora methods`
    adapter: Path | None = None  # directory of an adapter to go on from
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

    # of the factors before training: as listed by `manifold-lora methods`
    start: str | None = None
    # lora, stiefel: do not train A, but fix it
    fixed_a: Literal["random", "projection"] | None = None
    diagonal_s: bool = False  # stella: S is a diagonal
    diagonal_scaling: bool = False  # lora, loram: D₁ W D₂ + ΔW; can only be merged
    truncate_below: float | None = None  # loram_br: drop singular values on saving
    project_on_export: bool = False  # landing: save the nearest point of the manifold

    # of constrained factors, or of all (lora, stella, loram, landing); None: the
    # method's
    learning_rate: float | None = None
    # of the free factors, stiefel only; None: the method's
    free_learning_rate: float | None = None
    lora_plus_ratio: float | None = None  # lora, dora: B's rate over A's; None: 1
    # loram: None: row
    second_moment: Literal["row", "coordinate", "scalar"] | None = None
    nuclear_decay: float | None = None  # loram_br: λ, off every singular value a step
    attraction: float | None = None  # landing: μ, the pull to the manifold; None: 1
    # landing: least and largest multiple of the rate; None: 0.5 4
    rate_bounds: tuple[float, float] | None = None
    optimizer: str = "adamw"  # any Optax optimiser by name
    weight_decay: float = 0.0  # decoupled; without effect on orthonormal factors
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup_steps: int = 20  # steps until the full rate
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    steps: int | None = None  # optimiser steps; None: by --epochs
    epochs: int | None = None  # passes over the data; None: by --steps, or else 3
    batch_size: int | None = None  # examples (packed rows) of a step; None: 16
    accumulate: int = 1  # equal parts of a batch that pass through memory in turn
    sequence_length: int | None = None  # tokens of a row at most; None: 512
    packing: bool | None = None  # several examples per row; None: only built-in data
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
    # axes of devices, as in data=2,fsdp=4,tensor=2; None: all devices on fsdp
    mesh: str | None = None
    coordinator: str | None = None  # HOST:PORT of process 0; None: found, or alone
    processes: int | None = None  # how many run this together; None: found, or alone
    process_id: int | None = None  # number of this one, from 0; None: found
    # steps between checkpoints; None: 250, and at every evaluation as always
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2  # the last so many, beside the best one
    # whether a run goes on when a checkpoint cannot be written
    checkpoint_errors: Literal["stop", "continue"] = "stop"

    show_batch: bool = False  # print one batch, trained tokens coloured, and stop
    debug: bool = False  # show tracebacks

    @property
    def run_directory(self) -> Path:
        """Where the run is written: `out`, or runs/METHOD."""
        return self.out or Path("runs") / self.method


@dataclasses.dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """A configuration with every choice made; made by `resolve`, never by hand."""

    alpha: float = 0.0
    learning_rate: float = 0.0
    batch_size: int = 0
    sequence_length: int = 0
    packing: bool = False


# Fields that say how a run is started, not what it is.
_NOT_THE_RUN = {
    "config",
    "out",
    "overwrite",
    "show_batch",
    "debug",
    "coordinator",
    "processes",
    "process_id",
}
# Fields that may change when a run goes on: they do not change what comes of it.
_MAY_CHANGE = {"mesh", "checkpoint_every", "keep_checkpoints", "checkpoint_errors"}


def resolve(config: TrainConfig) -> ResolvedConfig:
    """Fill in what depends on other settings, and check every value.

    Raises:
        InputError: all values out of range, in one message.
    """
    method = find_method(config.method)
    filled: dict[str, Any] = {
        "learning_rate": method.rate,
        "free_learning_rate": method.free_rate,
        "start": method.inits[0],
    }
    if config.model is None:  # the small base learns at higher rates
        filled["learning_rate"] = method.builtin_rate
        filled["free_learning_rate"] = method.builtin_free_rate
    filled |= _BUILTIN_DATA if config.data is None else _DATA
    filled["alpha"] = 2 * config.rank
    if config.steps is None and config.epochs is None:
        builtin = config.data is None
        filled |= {"steps": _BUILTIN_STEPS} if builtin else {"epochs": 3}
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    missing = {k: v for k, v in filled.items() if given[k] is None}
    resolved = ResolvedConfig(**given | missing)

    problems = exclusions(config.method, vars(config) | {"init": config.start})
    try:
        read_mesh(resolved.mesh)
    except InputError as error:
        problems.append(str(error).removesuffix("."))
    for name, least in _AT_LEAST.items():
        value = getattr(resolved, name)
        if value is not None and not value >= least:
            problems.append(f"{_flag(name)} must be at least {least}, got {value}")
    for name in _POSITIVE:
        value = getattr(resolved, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{_flag(name)} must be a positive number, got {value}")
    if not 0 <= resolved.dropout < 1:
        problems.append(f"--dropout must be in [0, 1), got {resolved.dropout}")
    bounds = resolved.rate_bounds
    if bounds is not None and not (len(bounds) == 2 and 0 < bounds[0] <= bounds[1]):
        problems.append(
            f"--rate-bounds needs two numbers 0 < least ≤ largest, got {bounds}"
        )
    if resolved.steps is not None and resolved.epochs is not None:
        problems.append("--steps and --epochs exclude each other: give one")
    if resolved.accumulate > 0 and resolved.batch_size % resolved.accumulate:
        problems.append(
            f"--batch-size {resolved.batch_size} must be a multiple of --accumulate "
            f"{resolved.accumulate}"
        )
    if problems:
        raise InputError("; ".join(problems) + ".")
    return resolved


_POSITIVE = (
    "learning_rate",
    "free_learning_rate",
    "alpha",
    "lora_plus_ratio",
    "attraction",
)
_AT_LEAST = {
    "nuclear_decay": 0,
    "truncate_below": 0,
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
    "processes": 1,
    "process_id": 0,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


Config = TypeVar("Config", bound=TrainConfig)


def read_config(path: Path, kind: type[Config] = TrainConfig) -> Config:
    """The configuration in a TOML file, on top of the defaults of its kind.

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
    hints = typing.get_type_hints(kind)
    problems = []
    for key, value in values.items():
        if key not in hints or key == "config":
            problems.append(f"unknown key {key!r}. {nearest(key, hints)}")
            continue
        try:
            values[key] = _coerce(value, hints[key])
        except TypeError:
            hint = str(hints[key]).replace("typing.", "").replace("pathlib.", "")
            problems.append(f"{key} = {value!r} must be {hint.removeprefix('<class ')}")
    if problems:
        raise InputError(f"--config {path}:\n  " + "\n  ".join(problems))
    return dataclasses.replace(kind(), **values)


def _coerce(value: Any, hint: Any) -> Any:
    """The TOML value as the field's type, or `TypeError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for choice in args:
            with contextlib.suppress(TypeError):
                return _coerce(value, choice)
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


def same_run(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What makes two runs different ones, of their settings as TOML holds them."""
    keys = sorted({*one, *other} - _MAY_CHANGE)
    return [
        f"{k} = {one.get(k, 'unset')} there, {other.get(k, 'unset')} now"
        for k in keys
        if one.get(k) != other.get(k)
    ]


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
