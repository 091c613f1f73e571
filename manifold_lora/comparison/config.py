"""What a comparison is: every choice, its default and its check. Imports no JAX."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Suppress

from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS, OPTIONS, find_method
from manifold_lora.training.config import ResolvedConfig, TrainConfig, resolve

# Settings of one run that a comparison decides itself, or has no use for.
_NOT_HERE = (
    "method",
    "adapter",
    "learning_rate",
    "free_learning_rate",
    "best_metric",
    "patience",
    "report",
    "show_batch",
    "mesh",
    "coordinator",
    "processes",
    "process_id",
    "checkpoint_every",
    "keep_checkpoints",
    "checkpoint_errors",
)


@dataclasses.dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """A comparison of methods. All settings but the method's own are shared by all."""

    out: Path | None = None  # directory of the comparison; None: runs/compare
    overwrite: bool = False  # replace a comparison with other settings in --out
    seed: int = 0  # of the search and of the first run; the others have those after it
    eval_every: int | None = None  # steps; None: twelve times a run

    methods: tuple[str, ...] = tuple(METHODS)  # names, with spaces or commas between
    # grid of the constrained rate: numbers for all methods, or auto: each its own
    learning_rates: tuple[str | float, ...] = ("auto",)
    seeds: int = 3  # runs of every method at its best rate: --seed and those after it
    search_steps: int | None = None  # of a run of the grid; None: a third of --steps

    # Of `_NOT_HERE`: they are no flags of this command.
    method: Suppress[str] = TrainConfig.method
    adapter: Suppress[Path | None] = None
    learning_rate: Suppress[float | None] = None
    free_learning_rate: Suppress[float | None] = None
    best_metric: Suppress[Any] = TrainConfig.best_metric
    patience: Suppress[int | None] = None
    report: Suppress[Any] = ()
    show_batch: Suppress[bool] = False
    mesh: Suppress[str | None] = None
    coordinator: Suppress[str | None] = None
    processes: Suppress[int | None] = None
    process_id: Suppress[int | None] = None
    checkpoint_every: Suppress[int | None] = None
    keep_checkpoints: Suppress[int] = TrainConfig.keep_checkpoints
    checkpoint_errors: Suppress[Any] = TrainConfig.checkpoint_errors

    @property
    def run_directory(self) -> Path:
        """Where the comparison is written: `out`, or runs/compare."""
        return self.out or Path("runs") / "compare"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison with every choice made."""

    shared: CompareConfig
    runs: dict[str, ResolvedConfig]  # of every method
    grids: dict[str, tuple[float, ...]]
    baseline: str
    seeds: tuple[int, ...]
    search_steps: int | None  # None: a third of the steps


def resolve_comparison(config: CompareConfig) -> Plan:
    """Make every choice and check every value.

    Raises:
        InputError: all that is wrong, in one message.
    """
    names = list(dict.fromkeys(_words(config.methods)))
    for name in names:
        find_method(name)
    problems = []
    if not names:
        problems.append("--methods must name at least one method")
    default = TrainConfig()
    for field in _NOT_HERE:
        if getattr(config, field) != getattr(default, field):
            problems.append(
                f"{field} has no place in a comparison, which sets it for every method "
                "itself"
            )
    if config.seeds < 1:
        problems.append(f"--seeds must be at least 1, got {config.seeds}")
    if config.search_steps is not None and config.search_steps < 1:
        problems.append(f"--search-steps must be at least 1, got {config.search_steps}")
    numbers: set[float] = set()
    texts = _words(config.learning_rates)
    for text in texts if texts != ["auto"] else []:
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        numbers.add(rate)
        if not 0 < rate < float("inf"):
            problems.append(
                f"--learning-rates needs positive numbers or auto, got {text}"
            )
    for option in (*OPTIONS, "start"):
        value = getattr(config, option)
        taken = any(_takes(config, option, name) for name in names)
        if value != OPTIONS.get(option) and not taken:
            problems.append(f"no method of the comparison takes {option}={value}")
    if problems:
        raise InputError("; ".join(problems) + ".")
    runs = {name: _run_of(config, name) for name in names}
    grids = {
        name: tuple(sorted(numbers)) or _grid(name, config.model is None)
        for name in names
    }
    return Plan(
        shared=config,
        runs=runs,
        grids=grids,
        baseline="lora" if "lora" in names else names[0],
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
        search_steps=config.search_steps,
    )


def _words(items: Sequence[str | float]) -> list[str]:
    """What is between the spaces and commas."""
    return [word for item in items for word in str(item).replace(",", " ").split()]


def _takes(config: TrainConfig, option: str, name: str) -> bool:
    """Whether a method has an option, or the start that is asked for."""
    row = METHODS[name]
    return config.start in row.inits if option == "start" else option in row.options


def _run_of(config: CompareConfig, name: str) -> ResolvedConfig:
    """The run of one method: the shared settings without those it does not take."""
    given: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)
    }
    for option in (*OPTIONS, "start"):
        if not _takes(config, option, name):
            given[option] = OPTIONS.get(option)
    given["method"] = name
    return resolve(TrainConfig(**given))


def _grid(name: str, builtin: bool) -> tuple[float, ...]:
    row = METHODS[name]
    if builtin:  # the small base learns at other rates than the papers'
        return row.builtin_rate / 3, row.builtin_rate, row.builtin_rate * 3
    return row.rates
