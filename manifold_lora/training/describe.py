"""The methods on the terminal: what the rows say, and what building them shows."""

from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from manifold_lora.adapters import AdapterConfig, adapter_class
from manifold_lora.adapters.factor import tags
from manifold_lora.manifolds import Manifold
from manifold_lora.methods import METHODS
from manifold_lora.models import Linear
from manifold_lora.training.config import TrainConfig, resolve
from manifold_lora.training.optimizer import build_optimizer

SIZE, RANK = 4096, 16  # of the layer whose memory is shown


def show_methods(console: Console) -> None:
    """Every method with its parametrisation, manifolds, defaults, memory and export."""
    memory = {name: training_memory(name) for name in METHODS}
    for name, row in METHODS.items():
        factors = adapter_class(name).factors(AdapterConfig(name))
        rates = f"{row.rate:g}"
        if row.free_rate is not None:
            rates += f" constrained, {row.free_rate:g} free"
        trained, total = memory[name]
        lines = {
            "ΔW": row.update,
            "factors": _factors(tags(factors)),
            "optimiser": row.recipe,
            "learning rate": f"{rates} (compare tries "
            f"{', '.join(f'{rate:g}' for rate in row.rates)})",
            "init": ", ".join(row.inits),
            "memory": f"{trained:,} parameters, {total / 2**20:.2f} MiB with the "
            f"optimiser ({total / memory['lora'][1]:.2f} × lora)",
            "export": f"PEFT {row.export}",
            "options": ", ".join(f"--{o.replace('_', '-')}" for o in row.options),
            "paper": row.paper,
        }
        table = Table(
            title=name,
            title_justify="left",
            title_style="bold",
            show_header=False,
            box=None,
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in lines.items():
            table.add_row(key, value)
        console.print(table, "")
    console.print(
        f"Memory is that of the factors and the optimiser's state of one {SIZE}×{SIZE} "
        f"layer at rank {RANK}, float32. The small built-in base has rates of its own.",
        soft_wrap=True,
    )


def _factors(manifolds: dict[str, Manifold]) -> str:
    """The factors and where they live, such as "A free, B on Stiefel (qr)"."""
    groups: dict[Manifold, list[str]] = {}
    for name, manifold in manifolds.items():
        groups.setdefault(manifold, []).append(name.upper())
    words = []
    for manifold, names in groups.items():
        kind, how = type(manifold).__name__, getattr(manifold, "retraction", "")
        where = f"on {kind}" + (f" ({how})" if how else "")
        if manifold.parts:
            where = f"together {where}"
        words.append(f"{', '.join(names)} {'free' if kind == 'Euclidean' else where}")
    return "; ".join(words)


def training_memory(method: str) -> tuple[int, int]:
    """Trained numbers of one layer, and bytes of them and their optimiser's state.

    From shapes alone: nothing is computed.
    """

    def build() -> Any:
        linear = Linear(SIZE, SIZE, layers=1, rngs=nnx.Rngs(0))
        config = AdapterConfig(method, rank=RANK)
        return adapter_class(method)(linear, config, key=jax.random.key(0))

    adapter = nnx.eval_shape(build)
    factors = nnx.to_pure_dict(nnx.state(adapter, nnx.LoRAParam))
    manifolds = tags(adapter.factors(adapter.config))
    first = next(iter(manifolds.values()))
    config = resolve(TrainConfig(method=method))
    tx, _ = build_optimizer(config, first if first.parts else manifolds, 1, SIZE)
    state = jax.eval_shape(tx.init, factors)
    leaves = jax.tree.leaves((factors, state))
    trained = sum(x.size for x in jax.tree.leaves(factors))
    return trained, sum(x.size * x.dtype.itemsize for x in leaves)
