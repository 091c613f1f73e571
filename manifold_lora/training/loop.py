"""A whole run, from top to bottom."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P
from rich.console import Console

from manifold_lora.adapters import axes, manifold_tree, set_factors, split
from manifold_lora.adapters.exported import as_exported
from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.checkpoints.peft import fingerprint, save_adapter
from manifold_lora.checkpoints.resume import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    Restored,
)
from manifold_lora.data.builtin import BASE
from manifold_lora.data.preview import show_batch
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed import processes
from manifold_lora.distributed.arrays import Feed, initialised
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.evaluation.heldout import Evaluation, make_evaluate
from manifold_lora.training.config import (
    ResolvedConfig,
    TrainConfig,
    as_toml,
    resolve,
)
from manifold_lora.training.display import (
    progress_bar,
    show_plan,
    show_predictions,
)
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.outcome import as_saved, conclude, save_kept, summarise
from manifold_lora.training.progress import Progress, all_finite
from manifold_lora.training.run import (
    ADAPTER,
    CHECKPOINTS,
    START,
    Metrics,
    finished,
    open_run,
)
from manifold_lora.training.setup import (
    check_agreement,
    check_mesh,
    held_out_batches,
    load_data,
    load_model,
    total_steps,
    training_batches,
)
from manifold_lora.training.step import TrainState, make_step


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Preempted(RuntimeError):
    """The run was told to end; a checkpoint has been written."""


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune an adapter as configured and write the run directory.

    A run that is unfinished there goes on from its newest checkpoint. With several
    processes all call this, with the same configuration.

    Returns:
        What summary.json holds; of the earlier run, if the same one is finished.

    Raises:
        InputError: something in the configuration, the model or the data is wrong.
        Diverged: the loss became NaN or infinite; the best adapter so far is kept.
        Preempted: SIGTERM came; the same call goes on from there.
        Lost: another process of the run is gone; end this one without waiting.
        CheckpointError: a checkpoint cannot be written; the earlier ones are whole.
    """
    config = resolve(config)
    processes.start(config.coordinator, config.processes, config.process_id)
    console = console or Console(quiet=not processes.is_main())
    if not config.show_batch and (summary := finished(config)):
        console.print(
            f"This run is finished: {config.run_directory}/ holds it (accuracy "
            f"{summary['accuracy_after']:.3f}). Give another --out, or --overwrite to "
            "run it again.",
            soft_wrap=True,
        )
        return summary
    mesh = make_mesh(read_mesh(config.mesh))
    with jax.set_mesh(mesh), processes.together():
        return Run(config, console, mesh).go()


class Run:
    """One run: what it is made of, and its stages in the order of their calls."""

    def __init__(self, config: ResolvedConfig, console: Console, mesh: Any):
        self.config, self.console, self.mesh = config, console, mesh
        self.began, self.earlier = time.perf_counter(), 0.0
        source = config.model or BASE
        # before anything that takes long
        check_mesh(config, mesh, read_llama_config(source))
        self.tokenizer = load_tokenizer(source)
        self.data = load_data(config, self.tokenizer)
        check_agreement(config, self.data)
        self.put = Feed(mesh, config.batch_size)

    def go(self) -> dict[str, Any]:
        """Everything, to the summary."""
        if self.config.show_batch:
            feed = training_batches(self.config, self.data)
            show_batch(next(iter(feed)), self.tokenizer, self.console)
            return {}
        self.build()
        self.out = self.config.run_directory
        if processes.is_main():
            open_run(self.config)
        processes.wait_for_all("run directory")
        identity = {
            "method": self.config.method,
            "rank": self.config.rank,
            "base": fingerprint(self.model),
        }
        checkpoints = Checkpoints(
            self.out / CHECKPOINTS,
            identity=identity,
            keep=self.config.keep_checkpoints,
        )
        with checkpoints, processes.Preemption() as preemption:
            self.checkpoints, self.preemption = checkpoints, preemption
            restored = self.restored()
            since = restored.step if restored else None
            with Metrics(self.out, self.config, since, processes.is_main()) as metrics:
                self.metrics = metrics
                state, progress = self.begin(restored)
                self.advance(state, progress)
            with self.checkpoint_errors():
                checkpoints.wait()
        return self.finish(progress)

    def build(self) -> None:
        """Model, adapter, optimiser, and what is compiled."""
        config = self.config
        self.model = load_model(config)
        rebuild, self.start, self.frozen = split(self.model)
        tags, self.names = manifold_tree(self.model), axes(self.model)
        self.steps = total_steps(config, self.data)
        width = self.model.config.hidden_size
        self.tx, self.schedule = build_optimizer(config, tags, self.steps, width)
        self.step = make_step(rebuild, self.tx, tags, self.names, config.accumulate)
        self.evaluate = make_evaluate(rebuild, self.names)
        self.held_out = held_out_batches(config, self.data, self.put)
        self.trainable = sum(x.size for x in jax.tree.leaves(self.start))
        self.export = partial(
            as_exported,
            self.model,
            project=config.project_on_export,
            truncate_below=config.truncate_below,
        )
        show_plan(
            self.console,
            config,
            self.model,
            self.data,
            self.steps,
            self.trainable,
            self.mesh,
        )

    def initial(self) -> TrainState:
        """The state before the first step; the step donates it."""
        factors = jax.tree.map(jnp.copy, self.start)
        opt_state = initialised(self.tx.init, factors, self.names)
        everywhere = NamedSharding(self.mesh, P())
        key = jax.jit(jax.random.key, out_shardings=everywhere)(self.config.seed)
        return TrainState(factors, opt_state, key)

    def restored(self) -> Restored | None:
        """The newest whole checkpoint, if there is one."""
        found = self.checkpoints.newest(self.initial())
        for line in self.checkpoints.skipped:
            self.console.print(f"Damaged, and left out: {line}", soft_wrap=True)
        return found

    def begin(self, restored: Restored | None) -> tuple[TrainState, Progress]:
        """Where the run starts or goes on; adapter/ is then the best so far."""
        state = self.initial()
        self.keep(self.start, START)
        if restored is None:
            self.keep(self.start)
            first = self.look(0, self.start)
            return state, Progress(before=first, best=first)
        progress = Progress.from_json(restored.progress["progress"])
        self.earlier = progress.seconds
        self.console.print(f"Going on from the checkpoint of step {restored.step}.")
        best = progress.best_step
        if best == 0:
            self.keep(self.start)
        elif best == restored.step:
            self.keep(restored.state.factors)
        else:
            try:
                self.keep(self.checkpoints.at(best, state).state.factors)
            except DamagedError as error:
                self.console.print(
                    f"The best adapter is lost ({error}). The one of step "
                    f"{restored.step} takes its place.",
                    soft_wrap=True,
                )
                self.keep(restored.state.factors)
                progress.best = self.look(restored.step, restored.state.factors)
                progress.best_step = restored.step
        return restored.state, progress

    def keep(self, factors: Any, name: str = ADAPTER) -> None:
        """Let the model hold these factors, and write them as an adapter."""
        config = self.config
        # the step donates its own
        set_factors(self.model, jax.tree.map(jnp.copy, factors))
        if config.diagonal_scaling:  # which no adapter file can hold
            return
        base_id = config.base_id or str(config.model or BASE)
        with self.export():
            save_adapter(self.model, self.out / name, base_id=base_id)

    def look(self, step: int, factors: Any, off: float = 0.0) -> Evaluation:
        """Evaluate, and say what came of it."""
        found = self.evaluate(factors, self.frozen, self.held_out)
        self.metrics.write(
            step=step, eval_loss=found.loss, eval_accuracy=found.accuracy
        )
        self.console.print(
            f"step {step}: held-out loss {found.loss:.4f}, "
            f"accuracy {found.accuracy:.3f}"
            + (f", {off:.1e} from the manifold" if off else "")
        )
        return found

    def advance(self, state: TrainState, progress: Progress) -> None:
        """All the steps that are left."""
        config, steps = self.config, self.steps
        feed = iter(training_batches(config, self.data, rows=self.put.rows))
        if progress.feed is not None:
            feed.set_state(progress.feed)
        every = config.eval_every or -(-steps // 4)
        with progress_bar(self.console) as bar:
            task = bar.add_task("", total=steps, loss=math.nan, lr=0.0, speed=0.0)
            bar.update(task, completed=progress.step)
            while progress.step < steps and progress.waited != config.patience:
                batch = next(feed, None)
                if batch is None:
                    break
                state, shown = self.one_step(state, batch, progress)
                bar.update(task, advance=1, **shown)
                due = progress.step % (config.checkpoint_every or 250) == 0
                if progress.step % every == 0 or progress.step == steps:
                    due = True
                    off = progress.last_residual
                    found = self.look(progress.step, state.factors, off)
                    if progress.found(found, config.best_metric):
                        self.keep(state.factors)
                told = self.preemption.reached(progress.step)
                if due or told:
                    progress.feed = feed.get_state()
                    progress.seconds = self.seconds()
                    self.checkpoint(state, progress)
                if told:
                    self.checkpoints.wait()
                    raise Preempted(
                        f"told to end: {self.out / CHECKPOINTS}/{progress.step} is "
                        "written. The same command goes on from there."
                    )
        if progress.waited == config.patience:
            self.console.print(f"No better in {progress.waited} evaluations: stopping.")

    def one_step(
        self, state: TrainState, batch: dict[str, np.ndarray], progress: Progress
    ) -> tuple[TrainState, dict[str, Any]]:
        """One step; what it was like goes to the metrics, and back to be shown."""
        started = time.perf_counter()
        rate = np.asarray(self.schedule(progress.step)).item()
        arrays = self.put(batch)
        state, measured = self.step(state, self.frozen, arrays)
        now = {name: float(value) for name, value in measured.items()}
        tokens = int(now.pop("tokens"))
        speed = tokens / (time.perf_counter() - started)
        progress.step += 1
        self.metrics.write(
            step=progress.step,
            **now,
            learning_rate=rate,
            tokens_per_second=round(speed),
        )
        if not all_finite(now):
            kept = save_kept(self.config, self.model, self.out)
            raise Diverged(
                f"At step {progress.step} the loss is {now['loss']} and the gradient "
                f"norm {now['grad_norm']}. {kept}/ keeps what was best, of step "
                f"{progress.best_step} (held-out loss {progress.best.loss:.4f}). "
                "Lower --learning-rate or --clip, or lengthen --warmup-steps."
            )
        progress.tokens += tokens
        progress.last_residual = now["residual"]
        progress.largest_residual = max(progress.largest_residual, now["residual"])
        return state, {"loss": now["loss"], "lr": rate, "speed": speed}

    def checkpoint(self, state: TrainState, progress: Progress) -> None:
        """Write one, in the background."""
        with self.checkpoint_errors():
            self.checkpoints.save(
                progress.step,
                state,
                {"progress": progress.to_json(), "config": as_toml(self.config)},
                best_step=progress.best_step,
            )

    @contextlib.contextmanager
    def checkpoint_errors(self) -> Iterator[None]:
        """Stop or go on where a checkpoint cannot be written, as configured."""
        try:
            yield
        except CheckpointError as error:
            if self.config.checkpoint_errors == "stop":
                raise
            self.console.print(f"Going on without it: {error}", style="red")

    def finish(self, progress: Progress) -> dict[str, Any]:
        """What came of it; the model holds the factors kept."""
        config, model, data = self.config, self.model, self.data
        show_predictions(self.console, model, self.tokenizer, data.held_out[:8])
        progress.seconds = self.seconds()
        summary = summarise(config, model, data, progress)
        if config.project_on_export or config.truncate_below is not None:
            with self.export() as discarded:
                summary |= as_saved(model, self.held_out, discarded)
        save_kept(config, model, self.out)
        conclude(self.console, self.out, config, summary, self.metrics.rows)
        return summary

    def seconds(self) -> float:
        """Time spent on the run, with what was spent before it went on."""
        return self.earlier + time.perf_counter() - self.began
