"""The runs of one method, for any rates, seeds and lengths of one compiled step."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from manifold_lora.adapters import (
    adapters,
    attach,
    axes,
    manifold_tree,
    set_factors,
    split,
)
from manifold_lora.adapters.diagnostics import compressed_product, effective_rank
from manifold_lora.evaluation.heldout import Evaluation, make_evaluate
from manifold_lora.training.artifacts import exporting, write_adapter
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import Data, training_batches
from manifold_lora.training.optimizer import Rates, build_optimizer, with_run_data
from manifold_lora.training.remat import fitting_step
from manifold_lora.training.step import TrainState, make_step


class Runner:
    """The runs of one method on a base that all methods share.

    Learning rates and the number of steps are arguments of the compiled step, and the
    seed only changes the initial factors, so the step is compiled once for all runs.
    """

    def __init__(self, config: TrainConfig, base: Any, data: Data, console: Console):
        self.config = config
        self.data = data
        self._base = nnx.split(base)
        model = self.adapted_model(config.optimizer.seed)
        rebuild, factors, _ = split(model)
        self.trainable = sum(x.size for x in jax.tree.leaves(factors))
        tags, width = manifold_tree(model), model.config.hidden_size

        def build(rates: Rates, steps: Any):
            return build_optimizer(config, tags, steps, width, rates)[0]

        example = Rates(config.learning_rate, config.free_learning_rate)
        self.tx = with_run_data(build, example, 1)
        names = axes(model)

        def make(rebuild: Any) -> Any:
            parts = config.batch.accumulate
            return make_step(rebuild, self.tx, tags, names, parts, data.packing)

        self.step = fitting_step(model, config.model.remat, make, console)
        self.evaluate = make_evaluate(rebuild, names)

    def adapted_model(self, seed: int) -> Any:
        """A new model with an adapter, sharing the base weights."""
        model = nnx.merge(*self._base)
        attach(model, self.config.adapter, seed)
        return model

    def initial_state(self, seed: int) -> tuple[Any, TrainState, Any]:
        """A model, its training state before the first step, and its frozen part."""
        model = self.adapted_model(seed)
        _, factors, frozen = split(model)
        factors = jax.tree.map(jnp.copy, factors)  # the step donates its state
        opt_state = jax.jit(self.tx.init)(factors)
        return model, TrainState(factors, opt_state, jax.random.key(seed)), frozen

    def run(
        self,
        rates: Rates,
        seed: int,
        steps: int,
        eval_every: int,
        held_out: Iterable[Any],
        on_step: Callable[[int, float], None],
        save: Path | None = None,
    ) -> dict[str, Any]:
        """Train once and return the JSON-serialisable result; stop if it diverges.

        Args:
            rates: peak learning rates.
            seed: of the initialisation, the order of the data and dropout.
            steps: number of steps.
            eval_every: steps between evaluations of a saved run; other runs are only
                evaluated at the end.
            held_out: batches to evaluate.
            on_step: called with the number of every step and its loss.
            save: directory for the final adapter; None: it is not saved.
        """
        model, state, frozen = self.initial_state(seed)
        extra = {"rates": _as_arrays(rates), "steps": jnp.int32(steps)}
        losses, seconds, largest_residual = [], [], 0.0
        curve = []

        def evaluate(number: int) -> Evaluation:
            evaluation = self.evaluate(state.factors, frozen, held_out)
            if math.isfinite(evaluation.loss):
                curve.append({"step": number, "loss": evaluation.loss})
            return evaluation

        if save is not None:
            evaluate(0)
        metrics: dict[str, float] = {}
        optimizer = dataclasses.replace(self.config.optimizer, seed=seed)
        config = dataclasses.replace(self.config, optimizer=optimizer)
        for number, batch in zip(
            range(1, steps + 1), training_batches(config, self.data), strict=False
        ):
            started = time.perf_counter()
            state, arrays = self.step(state, frozen, batch, extra)
            metrics = {name: float(value) for name, value in arrays.items()}
            seconds.append(time.perf_counter() - started)
            losses.append(metrics["loss"])
            largest_residual = max(largest_residual, metrics["residual"])
            on_step(number, metrics["loss"])
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                break
            if save is not None and number % eval_every == 0 and number != steps:
                evaluate(number)
        final = evaluate(len(losses))
        diverged = not math.isfinite(losses[-1] + metrics["grad_norm"] + final.loss)
        result: dict[str, Any] = {
            "method": self.config.adapter.method,
            "rank": self.config.adapter.rank,
            "trainable": self.trainable,
            "rates": [rate for rate in rates if rate is not None],
            "seed": seed,
            "steps": len(losses),
            "diverged": diverged,
            # JSON cannot represent NaN and infinity.
            "losses": [round(x, 5) if math.isfinite(x) else None for x in losses],
            "curve": curve,
            "step_seconds": statistics.median(seconds[1:] or seconds),
        }
        if not diverged:
            result["largest_residual"] = largest_residual
            result["last_residual"] = metrics["residual"]
            result["final"] = final._asdict()
            set_factors(model, state.factors)
            result |= _effective_ranks(model)
            if save is not None and not self.config.adapter.merge_only:
                with exporting(self.config, model):
                    write_adapter(self.config, model, save)
        return result

    def step_timer(self, steps: int) -> Callable[[], list[float]]:
        """A function that runs `steps` more steps and returns their durations."""
        _, state, frozen = self.initial_state(self.config.optimizer.seed)
        rates = Rates(self.config.learning_rate, self.config.free_learning_rate)
        extra = {"rates": _as_arrays(rates), "steps": jnp.int32(1000)}
        batch = next(iter(training_batches(self.config, self.data)))

        def time_steps() -> list[float]:
            nonlocal state
            seconds = []
            for _ in range(steps):
                started = time.perf_counter()
                state, arrays = self.step(state, frozen, batch, extra)
                arrays["loss"].block_until_ready()
                seconds.append(time.perf_counter() - started)
            return seconds

        return time_steps


def _as_arrays(rates: Rates) -> Rates:
    return jax.tree.map(jnp.float32, rates)


def _effective_ranks(model: Any) -> dict[str, float]:
    """Effective ranks of B and ΔW over modules and layers."""
    of_b, of_update = [], []
    for module in adapters(model).values():
        adapted = np.array(module.ranks) > 0
        a, b = (np.asarray(x)[adapted] for x in module.pair())
        of_b += effective_rank(b).tolist()
        of_update += effective_rank(compressed_product(b, a)).tolist()
    return {
        "effective_rank_b": float(np.mean(of_b)),
        "least_effective_rank_b": min(of_b),
        "effective_rank_update": float(np.mean(of_update)),
    }
