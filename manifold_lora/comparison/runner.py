"""One method, compiled once, and its runs at any rates, seeds and lengths."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from manifold_lora.adapters import (
    adapters,
    attach,
    axes,
    manifold_tree,
    set_factors,
    split,
)
from manifold_lora.adapters.diagnostics import compressed_product, effective_rank
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.evaluation.heldout import Evaluation, make_evaluate
from manifold_lora.training.artifacts import base_id, exporting
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import Rates, build_optimizer, with_run_data
from manifold_lora.training.setup import Data, training_batches
from manifold_lora.training.step import TrainState, make_step


class Runner:
    """The runs of one method on a base that all methods share.

    Rates and the number of steps are data of the compiled step, and a seed only makes
    other factors to begin with: whatever is run, the step is compiled once.
    """

    def __init__(
        self, config: TrainConfig, base: Any, data: Data, held_out: Sequence[Any]
    ):
        self.config = config
        self.data = data
        self.held_out = held_out
        self._base = nnx.split(base)
        model = self.attached(config.optimizer.seed)
        rebuild, factors, _ = split(model)
        self.trainable = sum(x.size for x in jax.tree.leaves(factors))
        tags, width = manifold_tree(model), model.config.hidden_size

        def build(rates: Rates, steps: Any):
            return build_optimizer(config, tags, steps, width, rates)[0]

        example = Rates(config.learning_rate, config.free_learning_rate)
        self.tx = with_run_data(build, example, 1)
        names = axes(model)
        self.step = make_step(rebuild, self.tx, tags, names, config.batch.accumulate)
        self.evaluate = make_evaluate(rebuild, names)

    def attached(self, seed: int) -> Any:
        """A model of its own around the shared base weights."""
        model = nnx.merge(*self._base)
        attach(model, self.config.adapter, seed)
        return model

    def begin(self, seed: int) -> tuple[Any, TrainState, Any]:
        """A model, the state before its first step, and its frozen part."""
        model = self.attached(seed)
        _, factors, frozen = split(model)
        factors = jax.tree.map(jnp.copy, factors)  # the step donates its own
        moments = jax.jit(self.tx.init)(factors)
        return model, TrainState(factors, moments, jax.random.key(seed)), frozen

    def run(
        self,
        rates: Rates,
        seed: int,
        steps: int,
        every: int,
        show: Callable[[int, float], None],
        save: Path | None = None,
    ) -> dict[str, Any]:
        """One run, as JSON can hold it; a run that diverges ends there.

        Args:
            rates: peaks of the learning rates.
            seed: of the start, the order of the data and dropout.
            steps: of the run.
            every: steps between the evaluations of a run that is saved; the others are
                evaluated at the end only.
            show: is called with every step and its loss.
            save: where the last adapter goes; None: nowhere.
        """
        model, state, frozen = self.begin(seed)
        extra = {"rates": _as_data(rates), "steps": jnp.int32(steps)}
        losses, seconds, residual = [], [], 0.0
        curve = []

        def evaluate(number: int) -> Evaluation:
            evaluation = self.evaluate(state.factors, frozen, self.held_out)
            if math.isfinite(evaluation.loss):
                curve.append({"step": number, "loss": evaluation.loss})
            return evaluation

        if save is not None:
            evaluate(0)
        now: dict[str, float] = {}
        optimizer = dataclasses.replace(self.config.optimizer, seed=seed)
        order = dataclasses.replace(self.config, optimizer=optimizer)
        for number, batch in zip(
            range(1, steps + 1), training_batches(order, self.data), strict=False
        ):
            started = time.perf_counter()
            state, arrays = self.step(state, frozen, batch, extra)
            now = {name: float(value) for name, value in arrays.items()}
            seconds.append(time.perf_counter() - started)
            losses.append(now["loss"])
            residual = max(residual, now["residual"])
            show(number, now["loss"])
            if not math.isfinite(now["loss"] + now["grad_norm"]):
                break
            if save is not None and number % every == 0 and number != steps:
                evaluate(number)
        final = evaluate(len(losses))
        cell: dict[str, Any] = {
            "method": self.config.adapter.method,
            "rank": self.config.adapter.rank,
            "trainable": self.trainable,
            "rates": [rate for rate in rates if rate is not None],
            "seed": seed,
            "steps": len(losses),
            "diverged": not math.isfinite(losses[-1] + now["grad_norm"] + final.loss),
            # JSON has no word for what is no number.
            "losses": [round(x, 5) if math.isfinite(x) else None for x in losses],
            "curve": curve,
            "step_seconds": statistics.median(seconds[1:] or seconds),
        }
        if not cell["diverged"]:
            cell |= {"largest_residual": residual, "last_residual": now["residual"]}
            cell["final"] = final._asdict()
            set_factors(model, state.factors)
            cell |= _ranks(model)
            if save is not None and not self.config.adapter.merge_only:
                with exporting(self.config, model):
                    save_adapter(model, save, base_id=base_id(self.config))
        return cell

    def seconds_of(self, steps: int) -> Callable[[], list[float]]:
        """A function that runs some more steps and gives the seconds of each."""
        _, state, frozen = self.begin(self.config.optimizer.seed)
        rates = Rates(self.config.learning_rate, self.config.free_learning_rate)
        extra = {"rates": _as_data(rates), "steps": jnp.int32(1000)}
        batch = next(iter(training_batches(self.config, self.data)))

        def more() -> list[float]:
            nonlocal state
            seconds = []
            for _ in range(steps):
                started = time.perf_counter()
                state, arrays = self.step(state, frozen, batch, extra)
                arrays["loss"].block_until_ready()
                seconds.append(time.perf_counter() - started)
            return seconds

        return more


def _as_data(rates: Rates) -> Rates:
    return jax.tree.map(jnp.float32, rates)


def _ranks(model: Any) -> dict[str, float]:
    """Effective ranks of B and of ΔW over modules and layers."""
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
