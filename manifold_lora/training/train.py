"""A fine-tuning run, from its configuration to its result."""

import contextlib
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

from manifold_lora.adapters import axes, manifold_tree, split
from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.console import make_console
from manifold_lora.data.builtin import BASE
from manifold_lora.data.preview import show_batch
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed import processes
from manifold_lora.distributed.arrays import BatchSharder
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.evaluation.heldout import make_evaluate
from manifold_lora.training import display
from manifold_lora.training.artifacts import (
    Diverged,
    report_evaluation,
    save_factors,
    save_result,
)
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import (
    held_out_batches,
    load_data,
    total_steps,
    training_batches,
)
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.resume import (
    Preempted,
    checkpoint_errors,
    open_checkpoints,
    restore,
    save_checkpoint,
    start_or_resume,
)
from manifold_lora.training.run import ADAPTER, Metrics, finished, open_run
from manifold_lora.training.setup import check_agreement, check_mesh, load_model
from manifold_lora.training.state import all_finite
from manifold_lora.training.step import initial_state, make_step


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune an adapter as configured and write the run directory.

    An unfinished run of the same configuration resumes from its newest checkpoint. Of
    several processes all call this, with the same configuration.

    Args:
        config: of the run.
        console: where progress is shown; by default the terminal.

    Returns:
        What summary.json holds; of the earlier run, if the same one is finished.

    Raises:
        InputError: something in the configuration, the model or the data is wrong.
        Diverged: the loss became NaN or infinite; the best adapter so far is saved.
        Preempted: the run received SIGTERM; the same call resumes it.
        ProcessLost: another process of the run is gone; end this one without waiting.
        CheckpointError: a checkpoint cannot be written; the last one is intact.

    Examples:
        >>> summary = train(TrainConfig(learning_rate=0.03))  # doctest: +SKIP
    """
    started = time.perf_counter()
    launch, batch_size = config.launch, config.batch.batch_size
    processes.initialise(launch.coordinator, launch.processes, launch.process_id)
    console = console or make_console(quiet=not processes.is_main())
    if not config.show_batch and (summary := finished(config)):
        display.show_finished(console, config, summary)
        return summary
    mesh = make_mesh(read_mesh(launch.mesh))
    with jax.set_mesh(mesh), processes.report_lost_process():
        # Data
        source = config.model.path or BASE
        check_mesh(config, mesh, read_llama_config(source))  # before what takes long
        tokenizer = load_tokenizer(source)
        data = load_data(config, tokenizer)
        check_agreement(config, data)
        if config.show_batch:
            show_batch(next(iter(training_batches(config, data))), tokenizer, console)
            return {}
        to_devices = BatchSharder(mesh, batch_size)

        # Model
        model = load_model(config)
        rebuild, initial_factors, frozen = split(model)
        manifolds, names = manifold_tree(model), axes(model)

        # Step and evaluation, each compiled once
        steps = total_steps(config, data)
        width = model.config.hidden_size
        tx, schedule = build_optimizer(config, manifolds, steps, width)
        step = make_step(rebuild, tx, manifolds, names, config.batch.accumulate)
        held_out = held_out_batches(config, data, to_devices)
        evaluate = make_evaluate(rebuild, names)
        display.show_plan(console, config, model, data, steps, mesh)

        # Loop
        out = open_run(config)
        save_adapter = partial(save_factors, config, model)
        fresh = initial_state(initial_factors, tx, names, config.optimizer.seed)
        eval_every = config.evaluation.eval_every or -(-steps // 4)
        checkpoint_every = config.checkpoints.checkpoint_every or 250
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(open_checkpoints(config, model, out))
            preemption = stack.enter_context(processes.Preemption())
            restored = restore(checkpoints, fresh, console)
            metrics = stack.enter_context(Metrics(out, config, restored))
            measure = partial(
                report_evaluation, evaluate, frozen, held_out, metrics, console
            )
            run = start_or_resume(
                fresh, restored, checkpoints, measure, save_adapter, out, console
            )
            started -= run.seconds
            batches = iter(training_batches(config, data, rows=to_devices.local_rows))
            if run.data_state is not None:
                batches.set_state(run.data_state)
            bar = stack.enter_context(display.StepBar(console, steps, run.step))
            while run.step < steps:
                out_of_patience = run.evaluations_since_best == config.patience
                if out_of_patience or (batch := next(batches, None)) is None:
                    break
                step_started = time.perf_counter()
                rate = np.asarray(schedule(run.step)).item()
                arrays, measured = step(run.arrays, frozen, to_devices(batch))
                row = {name: float(value) for name, value in measured.items()}
                tokens = int(row.pop("tokens"))
                speed = tokens / (time.perf_counter() - step_started)
                run = run.after_step(arrays, tokens, row["residual"])
                row |= {"learning_rate": rate, "tokens_per_second": round(speed)}
                metrics.write(step=run.step, **row)
                if not all_finite(row):
                    raise Diverged.after(config, model, run, row)
                bar.advance(row)
                evaluated = run.step % eval_every == 0 or run.step == steps
                if evaluated:
                    evaluation = measure(run.step, arrays.factors, row["residual"])
                    run = run.after_evaluation(evaluation, config.best_metric)
                    if run.best_step == run.step:
                        save_adapter(arrays.factors, out / ADAPTER)
                preempted = preemption.reached(run.step)
                if evaluated or preempted or run.step % checkpoint_every == 0:
                    seconds = time.perf_counter() - started
                    run = run.paused(seconds, batches.get_state())
                    save_checkpoint(checkpoints, config, run, console)
                if preempted:
                    checkpoints.wait()
                    raise Preempted.after(run, out)
            with checkpoint_errors(config, console):
                checkpoints.wait()

        # Result; the model has the best factors
        display.show_early_stop(console, config, run)
        display.show_predictions(console, model, tokenizer, data.held_out[:8])
        run = run._replace(seconds=time.perf_counter() - started)
        return save_result(config, console, model, data, held_out, run, metrics)
