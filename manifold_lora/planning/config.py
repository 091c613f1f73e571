"""What a plan is: every choice, its default and its check. Imports no JAX."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Suppress

from manifold_lora.distributed.mesh import read_mesh
from manifold_lora.errors import InputError
from manifold_lora.planning.chips import CHIPS, Topology, read_topology
from manifold_lora.training.config import ResolvedConfig, TrainConfig, resolve

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A training run on devices that need not be there."""

    model: Path | None = None  # as llama-3.1-70b, or a directory with config.json
    out: Path | None = None  # JSON file for the plan
    topology: str | None = None  # TPU slice, as in v5p:8x8x8
    devices: int | None = None  # CPU devices instead of a TPU slice
    mesh: str | None = None  # as in fsdp=128,tensor=4, or auto; None: all on fsdp
    price: float | None = None  # dollars of a chip-hour; None: the list price

    # Settings of a run that change nothing of its step.
    data: Suppress[Path | None] = None
    eval_data: Suppress[Path | None] = None
    overwrite: Suppress[bool] = False
    adapter: Suppress[Path | None] = None
    truncate_below: Suppress[float | None] = None
    project_on_export: Suppress[bool] = False
    steps: Suppress[int | None] = None
    epochs: Suppress[int | None] = None
    packing: Suppress[bool | None] = None
    train_on_prompt: Suppress[bool] = False
    eval_every: Suppress[int | None] = None
    eval_examples: Suppress[int] = TrainConfig.eval_examples
    best_metric: Suppress[Any] = TrainConfig.best_metric
    patience: Suppress[int | None] = None
    report: Suppress[Any] = ()
    base_id: Suppress[str | None] = None
    coordinator: Suppress[str | None] = None
    processes: Suppress[int | None] = None
    process_id: Suppress[int | None] = None
    checkpoint_every: Suppress[int | None] = None
    keep_checkpoints: Suppress[int] = TrainConfig.keep_checkpoints
    checkpoint_errors: Suppress[Any] = TrainConfig.checkpoint_errors
    show_batch: Suppress[bool] = False


@dataclasses.dataclass(frozen=True)
class Target:
    """What is planned, with every choice made."""

    run: ResolvedConfig
    topology: Topology | None  # None: CPU devices
    count: int  # of devices
    mesh: dict[str, int] | None  # sizes of its axes; None: all devices on fsdp
    search: bool  # for the best mesh
    price: float | None  # dollars of a chip-hour; None: unknown


def resolve_plan(config: PlanConfig) -> Target:
    """Make every choice and check every value.

    Raises:
        InputError: all that is wrong, in one message.
    """
    problems: list[str] = []

    def checked(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except InputError as error:
            problems.append(str(error).rstrip("."))

    topology, count = None, config.devices or 0
    if (config.topology is None) == (config.devices is None):
        got = "neither" if config.topology is None else "both"
        problems.append(
            "a plan needs --topology of a TPU slice, as in v5e:4x4 or v5p:8x8x8 "
            f"(generations: {', '.join(CHIPS)}), or --devices, a number of CPU "
            f"devices; got {got}"
        )
    elif config.topology is not None:
        topology = checked(read_topology, config.topology)
        count = topology.count if topology else 0
    elif count < 1:
        problems.append(f"--devices must be at least 1, got {config.devices}")
    search = config.mesh == AUTO
    mesh = None if search else checked(read_mesh, config.mesh)
    price = config.price
    if price is not None and not 0 < price < float("inf"):
        problems.append(f"--price must be a positive number, got {price}")
    if price is None and topology is not None:
        price = topology.chip.price
    run = checked(resolve, _run_of(config))
    if problems:
        raise InputError("; ".join(problems) + ".")
    return Target(run, topology, count, mesh, search, price)


def _run_of(config: PlanConfig) -> TrainConfig:
    """The run, with the defaults of a run on data of the user's own."""
    given: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)
    }
    given["mesh"] = None  # it is read here
    given["dtype"] = config.dtype or "bfloat16"
    if config.model is not None:
        given["batch_size"] = config.batch_size or 16
        given["sequence_length"] = config.sequence_length or 512
    return TrainConfig(**given)
