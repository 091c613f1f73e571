"""A fine-tuning run, from its configuration to its result."""

import contextlib
import dataclasses
import datetime
import time
from functools import partial
from typing import Any

import jax
from rich.console import Console

from manifold_lora.adapters import axes, manifold_tree, split
from manifold_lora.checkpoints.companions import stop_tokens
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
from manifold_lora.training.directory import RunDirectory, saved_date
from manifold_lora.training.loop import Feed, Loop
from manifold_lora.training.optimizer import build_optimizer, check_optimizer
from manifold_lora.training.profiling import check_directory
from manifold_lora.training.remat import fitting_step
from manifold_lora.training.resume import (
    Preempted,
    checkpoint_errors,
    open_checkpoints,
    restore,
    start_or_resume,
)
from manifold_lora.training.run import Metrics, check_trackers
from manifold_lora.training.setup import (
    check_agreement,
    check_mesh,
    check_tokens,
    identify,
    load_model,
)
from manifold_lora.training.step import initial_state, make_step

__all__ = ["Diverged", "Preempted", "processes", "train"]


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune an adapter as configured and write the run directory.

    An unfinished run of the same configuration resumes from its newest checkpoint, and
    a finished one if it is given more steps. Of several processes all call this, with
    the same configuration.

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
    launch = config.launch
    processes.initialise(launch.coordinator, launch.processes, launch.process_id)
    mesh = make_mesh(read_mesh(launch.mesh))
    with jax.set_mesh(mesh), processes.report_lost_process():
        processes.connect_devices(mesh)
        console = console or make_console(quiet=not processes.is_main())
        check_trackers(config)
        check_directory(config.profile)
        if config.show_batch:
            _show_batch(config, console)
            return {}
        with RunDirectory(config) as directory:
            return _run(config, console, directory, mesh, started)


def _run(
    config: TrainConfig,
    console: Console,
    directory: RunDirectory,
    mesh: Any,
    started: float,
) -> dict[str, Any]:
    """The run in its directory, which this process holds."""
    # Data
    config = _with_date(config, saved_date(directory.settings))
    directory.check_settings(config)
    source, out = config.model.path or BASE, directory.path
    shapes = read_llama_config(source)
    check_mesh(config, mesh, shapes)  # before what takes long
    tokenizer = load_tokenizer(source)
    data = load_data(config, tokenizer)
    stop = stop_tokens(source, tokenizer)
    check_tokens(data, stop, shapes.vocab_size, tokenizer)
    check_agreement(config, data)
    to_devices = BatchSharder(mesh, config.batch.batch_size)

    # Model
    model = load_model(config)
    identity = identify(config, model, data)
    steps = total_steps(config, data)
    if summary := directory.finished(identity, steps):
        display.show_finished(console, config, summary)
        return summary
    rebuild, initial_factors, frozen = split(model)
    manifolds, names = manifold_tree(model), axes(model)

    # Step and evaluation, each compiled once
    tx, schedule = build_optimizer(config, manifolds, steps, model.config.hidden_size)
    check_optimizer(config, tx, initial_factors)

    def make(rebuild: Any) -> Any:
        parts = config.batch.accumulate
        return make_step(rebuild, tx, None, names, parts, data.packing)

    step = fitting_step(model, config.model.remat, make, console)
    held_out = held_out_batches(config, data)
    evaluate = make_evaluate(rebuild, names)
    display.show_plan(console, config, model, data, steps, mesh)

    # Loop
    directory.open(config)
    save_adapter = partial(save_factors, config, model)
    fresh = initial_state(initial_factors, tx, names, config.optimizer.seed)
    with contextlib.ExitStack() as stack:
        store = open_checkpoints(config, identity, out)
        checkpoints = stack.enter_context(store)
        preemption = stack.enter_context(processes.Preemption())
        restored = restore(checkpoints, fresh, console)
        metrics = stack.enter_context(Metrics(out, config, restored))
        measure = None
        if config.evaluation.eval_every != 0:
            measure = partial(
                report_evaluation, evaluate, frozen, held_out, metrics, console
            )
        run = start_or_resume(
            fresh, restored, checkpoints, measure, save_adapter, out, console
        )
        loop = Loop(
            config,
            steps,
            step,
            frozen,
            manifolds,
            schedule,
            measure,
            save_adapter,
            metrics,
            checkpoints,
            preemption,
            console,
            started - run.seconds,
            directory.commit,
        )
        batches = training_batches(config, data, rows=to_devices.local_rows)
        run = loop.run(run, Feed(batches, to_devices, run.data_state), model)
        with checkpoint_errors(config, console):
            checkpoints.wait()

    # Result; the model gets the factors of adapter/
    run = run._replace(seconds=time.perf_counter() - loop.started)
    display.show_early_stop(console, config, run)
    return save_result(
        config, console, model, data, held_out, run, metrics, tokenizer, identity, steps
    )


def _show_batch(config: TrainConfig, console: Console) -> None:
    tokenizer = load_tokenizer(config.model.path or BASE)
    data = load_data(config, tokenizer)
    show_batch(next(iter(training_batches(config, data))), tokenizer, console)


def _with_date(config: TrainConfig, saved: str | None) -> TrainConfig:
    """With the date that chat templates write: of the earlier run, or today."""
    if config.data.date is not None or not config.data.paths:
        return config
    date = saved or datetime.date.today().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))
