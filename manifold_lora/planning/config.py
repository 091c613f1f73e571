"""The configuration of a plan: the settings of a training step, and devices for it."""

import dataclasses
from pathlib import Path
from typing import Any

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.configuration.flat import part
from manifold_lora.configuration.parts import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
)
from manifold_lora.distributed.mesh import read_mesh
from manifold_lora.errors import InputError
from manifold_lora.planning.chips import CHIPS, Topology, read_topology
from manifold_lora.settings import (
    PositiveFloat,
    PositiveInt,
    fill,
    raise_all,
    setting,
    validate,
)
from manifold_lora.training.config import TrainConfig

AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A training step, and devices to compile it for without access to them.

    Args:
        topology: TPU slice, as in v5p:8x8x8.
        devices: number of CPU devices, instead of a TPU slice.
        mesh: sizes of the mesh axes, as in fsdp=128,tensor=4, or auto.
        price: dollars per chip-hour.
        out: JSON file for the plan.

    Raises:
        InputError: all problems, in one message.
    """

    model: ModelConfig = part(ModelConfig)
    adapter: AdapterConfig = part(AdapterConfig, roles=("adapter", "optimizer"))
    optimizer: OptimizerConfig = part(OptimizerConfig)
    batch: BatchConfig = part(BatchConfig)

    topology: str | None = setting(None, "TPU slice, as in v5p:8x8x8")
    devices: PositiveInt | None = setting(
        None, "number of CPU devices, instead of a TPU slice"
    )
    mesh: str | None = setting(
        None,
        "sizes of the mesh axes, as in fsdp=128,tensor=4, or auto",
        default_text="all devices on fsdp",
    )
    price: PositiveFloat | None = setting(
        None, "dollars per chip-hour", default_text="the list price"
    )
    out: Path | None = setting(None, "JSON file for the plan")

    def __post_init__(self):
        validate(self)
        resolve_plan(self)


@dataclasses.dataclass(frozen=True)
class Target:
    """A plan with all defaults resolved."""

    run: TrainConfig
    topology: Topology | None  # None: CPU devices
    count: int  # number of devices
    mesh: dict[str, int] | None  # sizes of its axes; None: all devices on fsdp
    search: bool  # whether to search for the best mesh
    price: float | None  # dollars per chip-hour; None: unknown


def resolve_plan(config: PlanConfig) -> Target:
    """Resolve the run, the devices and the mesh of a configuration.

    Raises:
        InputError: all problems, in one message.
    """
    problems: list[str] = []

    def checked(f: Any, *arguments: Any) -> Any:
        try:
            return f(*arguments)
        except InputError as error:
            problems.append(str(error))

    topology, count = None, config.devices or 0
    if (config.topology is None) == (config.devices is None):
        got = "neither" if config.topology is None else "both"
        problems.append(
            "a plan needs --topology, a TPU slice such as v5e:4x4 or v5p:8x8x8 "
            f"(generations: {', '.join(CHIPS)}), or --devices, a number of CPU "
            f"devices; got {got}"
        )
    elif config.topology is not None:
        topology = checked(read_topology, config.topology)
        count = topology.count if topology else 0
    search = config.mesh == AUTO
    mesh = None if search else checked(read_mesh, config.mesh)
    price = config.price
    if price is None and topology is not None:
        price = topology.chip.price
    run = checked(_run_of, config)
    raise_all(problems)
    return Target(run, topology, count, mesh, search, price)


def _run_of(config: PlanConfig) -> TrainConfig:
    """The run, with the defaults for the user's own model and data."""
    model, batch = config.model, config.batch
    if model.path is not None:
        batch = fill(batch, batch_size=16, sequence_length=512)
    if model.dtype is None:
        model = dataclasses.replace(model, dtype="bfloat16")
    return TrainConfig(
        model=model, adapter=config.adapter, optimizer=config.optimizer, batch=batch
    )
