"""The table of methods that `manifold-lora methods` prints."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx
from rich.console import Console

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.factor import tags
from manifold_lora.adapters.options import OptimizerInputs, adapter_class, inits
from manifold_lora.console import PlainTable, print_table, print_text
from manifold_lora.manifolds import Manifold
from manifold_lora.methods import METHODS
from manifold_lora.models import Linear
from manifold_lora.settings import default_text, flag, number

SIZE, RANK = 4096, 16  # of the example layer whose memory is shown


def show_methods(console: Console) -> None:
    """Print every method with its update, manifolds, defaults, memory and export."""
    memory = {name: training_memory(name) for name in METHODS}
    for name in METHODS:
        adapter = adapter_class(name)
        options, factors = adapter.options, adapter.factors(AdapterConfig(name))
        trained, total = memory[name]
        table = PlainTable(name, title_style="bold", show_header=False)
        table.add_column(style="dim")
        table.add_column()
        lines = {
            "ΔW": options.update,
            "factors": _factors(tags(factors)),
            "optimiser": options.recipe,
            "learning rate": _rates(options),
            "init": ", ".join(inits(name)),
            "memory": f"{trained:,} parameters, {total / 2**20:.2f} MiB with the "
            f"optimiser ({total / memory['lora'][1]:.2f} × lora)",
            "export": f"PEFT {options.export}",
            "options": _options(options),
            "paper": options.paper,
        }
        for key, value in lines.items():
            table.add_row(key, value)
        print_table(console, table)
        print_text(console, "")
    print_text(
        console,
        f"Memory: trained factors and optimiser state of one {SIZE}×{SIZE} layer, rank "
        f"{RANK}, float32.",
    )


def _rates(options: Any) -> str:
    rates, free = options.learning_rates, options.free_learning_rates
    tried = f"compare tries {', '.join(map(number, rates.grid))}"
    if free is None:
        return f"{rates.text()} ({tried})"
    return f"{rates.text()} ({tried}); free factors: {free.text()}"


def _options(options: Any) -> str:
    return ", ".join(
        f"{flag(field.name)} (default: {default_text(field)})"
        for field in dataclasses.fields(options)
        if field.name != "init"
    )


def _factors(manifolds: dict[str, Manifold]) -> str:
    """The factors and their manifolds, such as "A free, B on Stiefel (qr)"."""
    groups: dict[Manifold, list[str]] = {}
    for name, manifold in manifolds.items():
        groups.setdefault(manifold, []).append(name.upper())
    descriptions = []
    for manifold, names in groups.items():
        kind, retraction = type(manifold).__name__, getattr(manifold, "retraction", "")
        text = f"on {kind}" + (f" ({retraction})" if retraction else "")
        if manifold.parts:
            text = f"jointly {text}"
        if kind == "Euclidean":
            text = "free"
        descriptions.append(f"{', '.join(names)} {text}")
    return "; ".join(descriptions)


def training_memory(method: str) -> tuple[int, int]:
    """Trained parameters of one layer, and bytes of them and their optimiser state.

    From abstract shapes: no array is allocated.
    """
    config = AdapterConfig(method, rank=RANK)

    def build() -> Any:
        linear = Linear(SIZE, SIZE, layers=1, rngs=nnx.Rngs(0))
        return adapter_class(method)(linear, config, key=jax.random.key(0))

    factors = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.LoRAParam))
    by_name = tags(adapter_class(method).factors(config))
    first = next(iter(by_name.values()))
    manifolds = first if first.parts else by_name  # coupled factors share one
    rate = optax.constant_schedule(1e-3)
    inputs = OptimizerInputs(manifolds, rate, rate, 0.0, SIZE)
    state = jax.eval_shape(config.options.transformation(inputs).init, factors)
    leaves = jax.tree.leaves((factors, state))
    trained = sum(x.size for x in jax.tree.leaves(factors))
    return trained, sum(x.size * x.dtype.itemsize for x in leaves)
