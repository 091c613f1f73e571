"""The configuration of a comparison: settings that all methods share, and a search."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_lora.adapters.config import AdapterConfig, LowRankConfig
from manifold_lora.adapters.options import fields_by_option, inits, options_class
from manifold_lora.methods import METHODS, check_method
from manifold_lora.settings import PositiveInt, raise_all, setting, validate
from manifold_lora.training.config import RunConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """A comparison of methods that share all settings but the learning rates.

    Args:
        options: method options by name; each is passed to the methods that have it.
        methods: names, separated by spaces or commas.
        learning_rates: one grid for all methods, or "auto" for each method's own.
        seeds: number of runs of every method at its best learning rate, with seeds
            that the search does not use.
        search_steps: length of the runs of the search.

    Raises:
        InputError: all problems, in one message.
    """

    options: Mapping[str, Any] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"roles": ("adapter", "optimizer", "export")},
    )
    methods: tuple[str, ...] = setting(
        tuple(METHODS), "names, separated by spaces or commas"
    )
    learning_rates: tuple[str | float, ...] = setting(
        ("auto",), "one grid for all methods, or auto for each method's own"
    )
    seeds: PositiveInt = setting(
        3,
        "runs of every method at its best learning rate, with seeds from --seed on; "
        "the search has the next one",
    )
    search_steps: PositiveInt | None = setting(
        None, "length of the runs of the search", default_text="a third of the run"
    )

    def __post_init__(self):
        validate(self)
        resolve_comparison(self)

    @property
    def run_directory(self) -> Path:
        """The output directory: `--out`, or runs/compare."""
        return self.output.out or Path("runs") / "compare"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison with all defaults resolved."""

    shared: CompareConfig
    runs: dict[str, TrainConfig]  # by method
    grids: dict[str, tuple[float, ...]]
    baseline: str
    seeds: tuple[int, ...]  # of the runs that are reported
    search_seed: int  # none of them
    search_steps: int | None  # None: a third of the steps


def resolve_comparison(config: CompareConfig) -> Comparison:
    """Resolve the runs and grids of a configuration.

    Raises:
        InputError: all problems, in one message.
    """
    names = list(dict.fromkeys(_split_words(config.methods)))
    for name in names:
        check_method(name)
    problems = [] if names else ["--methods must name at least one method"]
    rates: set[float] = set()
    texts = _split_words(config.learning_rates)
    for text in texts if texts != ["auto"] else []:
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        rates.add(rate)
        if not 0 < rate < float("inf"):
            problems.append(
                f"--learning-rates needs positive numbers or auto, got {text}"
            )
    for option, value in config.options.items():
        if not any(_has_option(name, option, value) for name in names):
            problems.append(f"no method of the comparison takes {option}={value}")
    raise_all(problems)
    search_seed = config.optimizer.seed + config.seeds
    dataclasses.replace(config.optimizer, seed=search_seed)  # check its range
    runs = {name: _run_of(config, name) for name in names}
    builtin = config.model.path is None
    grids = {name: tuple(sorted(rates)) or _grid(name, builtin) for name in names}
    first = config.optimizer.seed
    return Comparison(
        shared=config,
        runs=runs,
        grids=grids,
        baseline="lora" if "lora" in names else names[0],
        seeds=tuple(range(first, search_seed)),
        search_seed=search_seed,
        search_steps=config.search_steps,
    )


def _split_words(items: Sequence[str | float]) -> list[str]:
    """Split items at spaces and commas."""
    return [word for item in items for word in str(item).replace(",", " ").split()]


def _has_option(name: str, option: str, value: Any) -> bool:
    """Whether a method has the option, or for `init` the requested initialisation."""
    if option == "init":
        return value in inits(name)
    return name in fields_by_option().get(option, {})


def _run_of(config: CompareConfig, name: str) -> TrainConfig:
    """The run of one method, with the options that it has."""
    options = {k: v for k, v in config.options.items() if _has_option(name, k, v)}
    low_rank = {
        field.name: getattr(config.adapter, field.name)
        for field in dataclasses.fields(LowRankConfig)
    }
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    shared["adapter"] = AdapterConfig(name, options, **low_rank)
    return TrainConfig(**shared)


def _grid(name: str, builtin: bool) -> tuple[float, ...]:
    rates = options_class(name).learning_rates
    if builtin:  # the small base needs other learning rates than the papers' models
        return rates.builtin / 3, rates.builtin, rates.builtin * 3
    return rates.grid
