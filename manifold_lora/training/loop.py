"""The loop over steps, which never waits for the device without need.

While a step runs on the device, the host makes the next batch and writes the metrics of
the step before. Only evaluations and checkpoints wait for the step itself.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from manifold_lora.checkpoints.store import CheckpointStore
from manifold_lora.distributed.processes import Preemption
from manifold_lora.training.artifacts import Diverged
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.display import StepBar
from manifold_lora.training.memory import peak_memory
from manifold_lora.training.profiling import Profiler
from manifold_lora.training.resume import Preempted, save_checkpoint
from manifold_lora.training.run import ADAPTER, Metrics
from manifold_lora.training.state import RunState, all_finite
from manifold_lora.training.step import largest_residual


class Feed:
    """Training batches on the devices, of which the next can be made ahead.

    Args:
        batches: a grain dataset of host batches.
        to_devices: puts one on the devices.
        state: of the iterator, to resume from.

    Attributes:
        state: of the iterator after the batches that were taken.
    """

    def __init__(
        self,
        batches: Any,
        to_devices: Callable[[Any], Any],
        state: dict[str, Any] | None = None,
    ):
        self._iterator = iter(batches)
        if state is not None:
            self._iterator.set_state(state)
        self.state = self._next_state = self._iterator.get_state()
        self._to_devices = to_devices
        self._next: Any = None

    def prepare(self) -> None:
        """Make the next batch, if it is not made yet."""
        if self._next is None and (batch := next(self._iterator, None)) is not None:
            self._next = self._to_devices(batch)
            self._next_state = self._iterator.get_state()

    def take(self) -> Any:
        """The next batch; None after the last one."""
        self.prepare()
        batch, self._next = self._next, None
        self.state = self._next_state
        return batch


class _Pending(NamedTuple):
    """A step whose metrics are not read yet."""

    step: int
    measured: dict[str, Any]


@dataclasses.dataclass
class Loop:
    """What the steps of a run share.

    Args:
        config: of the run.
        steps: of the whole run.
        step: from `make_step`.
        frozen: the base.
        manifolds: prefix tree of the factors, for the constraint violation.
        schedule: of the learning rate.
        measure: evaluates factors after a step; None without evaluation.
        save_adapter: writes factors to a directory.
        metrics: where rows go.
        checkpoints: where states go.
        preemption: says whether to stop.
        started: the time at which the run began, less what it took before.
        on_first_step: called when the first step has worked.
    """

    config: TrainConfig
    steps: int
    step: Callable[..., Any]
    frozen: Any
    manifolds: Any
    schedule: Callable[[int], Any]
    measure: Callable[..., Any] | None
    save_adapter: Callable[[Any, Path], None]
    metrics: Metrics
    checkpoints: CheckpointStore
    preemption: Preemption
    console: Console
    started: float
    on_first_step: Callable[[], None]

    def __post_init__(self):
        self._residual = jax.jit(partial(largest_residual, self.manifolds))
        self._pending: _Pending | None = None
        self._read = time.perf_counter()  # when the last metrics were read

    def run(self, run: RunState, feed: Feed, model: Any) -> RunState:
        """Take the steps that are left.

        Raises:
            Diverged: the loss or the gradient became NaN or infinite.
            Preempted: a checkpoint is written.
        """
        config, out = self.config, self.config.run_directory
        eval_every = config.evaluation.eval_every
        eval_every = -(-self.steps // 4) if eval_every is None else eval_every
        checkpoint_every = config.checkpoints.checkpoint_every or 250
        profiler = Profiler(config.profile, run.step, self.console)
        with StepBar(self.console, self.steps, run.step) as bar:
            while run.step < self.steps and not self._out_of_patience(run):
                profiler.before_step(run.step, run.arrays)
                if (batch := feed.take()) is None:
                    break
                arrays, measured = self.step(run.arrays, self.frozen, batch)
                run = run.after_step(arrays)
                last = run.step == self.steps
                evaluates = self.measure is not None and (
                    last or run.step % eval_every == 0
                )
                if (
                    evaluates
                    or last
                    or run.step % config.evaluation.residual_every == 0
                ):
                    measured["residual"] = self._residual(arrays.factors)
                feed.prepare()
                run = self._log(run, bar, model)
                self._pending = _Pending(run.step, measured)
                preempted = self.preemption.reached(run.step)
                saves = last or evaluates or preempted
                if not (saves or run.step % checkpoint_every == 0):
                    continue
                run = self._log(run, bar, model)
                if evaluates:
                    run = self._evaluate(run)
                seconds = time.perf_counter() - self.started
                run = run.paused(seconds, feed.state)
                save_checkpoint(self.checkpoints, config, run, self.console)
                if preempted:
                    self.checkpoints.wait()
                    raise Preempted.after(run, out)
            profiler.finish(run.step, run.arrays)
            return self._log(run, bar, model)

    def _out_of_patience(self, run: RunState) -> bool:
        return run.evaluations_since_best == self.config.patience

    def _log(self, run: RunState, bar: StepBar, model: Any) -> RunState:
        """Read and write the metrics of the step that is pending, if one is."""
        if self._pending is None:
            return run
        (step, measured), self._pending = self._pending, None
        row = {name: float(value) for name, value in measured.items()}
        tokens = int(row.pop("tokens"))
        now = time.perf_counter()
        row |= {
            "learning_rate": np.asarray(self.schedule(step - 1)).item(),
            "tokens_per_second": round(tokens / (now - self._read)),
        }
        self._read = now
        self.metrics.write(step=step, **row)
        run = run.measured(tokens, row.get("residual"))
        if not all_finite(row):
            raise Diverged.after(self.config, model, run._replace(step=step), row)
        self.on_first_step()
        bar.advance(row)
        return run

    def _evaluate(self, run: RunState) -> RunState:
        assert self.measure is not None
        evaluation = self.measure(
            run.step, run.arrays.factors, run.last_violation, peak_memory()
        )
        run = run.after_evaluation(evaluation, self.config.best_metric)
        if run.best_step == run.step:
            self.save_adapter(run.arrays.factors, self.config.run_directory / ADAPTER)
        self._read = time.perf_counter()
        return run
