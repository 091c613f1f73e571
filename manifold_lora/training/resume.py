"""How a run starts, resumes from its checkpoints, and writes them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from manifold_lora.checkpoints.store import (
    CheckpointError,
    CheckpointStore,
    CorruptCheckpointError,
    Restored,
)
from manifold_lora.configuration.flat import flatten
from manifold_lora.console import print_text
from manifold_lora.evaluation.heldout import Evaluation
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.run import ADAPTER, CHECKPOINTS, START
from manifold_lora.training.state import RunState
from manifold_lora.training.step import TrainState


class Preempted(RuntimeError):
    """The run received SIGTERM; a checkpoint has been written."""

    @classmethod
    def after(cls, run: RunState, out: Path) -> "Preempted":
        """The error after the last step of a preempted run."""
        return cls(
            f"received SIGTERM: the checkpoint {out / CHECKPOINTS}/{run.step} is "
            "written. The same command resumes from it."
        )


def open_checkpoints(
    config: TrainConfig, identity: dict[str, Any], out: Path
) -> CheckpointStore:
    """The checkpoints of a run, which only the same run resumes from."""
    keep = config.checkpoints.keep_checkpoints
    return CheckpointStore(out / CHECKPOINTS, identity=identity, keep=keep)


def restore(
    checkpoints: CheckpointStore, like: TrainState, console: Console
) -> Restored | None:
    """The newest intact checkpoint, if there is one; corrupt ones are reported."""
    restored = checkpoints.restore_latest(like)
    for line in checkpoints.skipped:
        print_text(console, f"Skipping corrupt checkpoint: {line}")
    return restored


def start_or_resume(
    fresh: TrainState,
    restored: Restored | None,
    checkpoints: CheckpointStore,
    measure: Callable[[int, Any], Evaluation] | None,
    save_adapter: Callable[[Any, Path], None],
    out: Path,
    console: Console,
) -> RunState:
    """The state that a run starts or resumes with.

    adapter/ then holds the best trained adapter so far, if there is one.

    Args:
        fresh: the state before the first step.
        restored: the checkpoint to resume from; None starts the run.
        checkpoints: where the best factors are, if they are not the restored ones.
        measure: evaluates factors after a step; None without evaluation.
        save_adapter: writes factors to a directory.
        out: the run directory.
        console: where it is reported.
    """
    save_adapter(fresh.factors, out / START)
    if restored is None:
        initial = measure(0, fresh.factors) if measure else None
        return RunState(fresh, initial=initial)
    print_text(console, f"Resuming from the checkpoint of step {restored.step}.")
    run = RunState.from_json(restored.state, restored.progress["progress"])
    best = restored.state.factors
    if run.best_step == 0:
        return run
    try:
        if run.best_step != restored.step:
            best = checkpoints.restore(run.best_step, fresh).state.factors
    except CorruptCheckpointError as error:
        print_text(
            console,
            f"The best adapter is lost ({error}). The one of step {restored.step} "
            "replaces it.",
        )
        evaluation = measure(restored.step, best) if measure else None
        run = run._replace(best=evaluation, best_step=restored.step)
    save_adapter(best, out / ADAPTER)
    return run


def save_checkpoint(
    checkpoints: CheckpointStore,
    config: TrainConfig,
    run: RunState,
    console: Console,
) -> None:
    """Write a checkpoint in the background."""
    with checkpoint_errors(config, console):
        content = {"progress": run.to_json(), "config": flatten(config)}
        checkpoints.save(run.step, run.arrays, content, best_step=run.best_step)


@contextlib.contextmanager
def checkpoint_errors(config: TrainConfig, console: Console) -> Iterator[None]:
    """Stop or continue where a checkpoint cannot be written, as configured."""
    try:
        yield
    except CheckpointError as error:
        if config.checkpoints.checkpoint_errors == "stop":
            raise
        print_text(console, f"Continuing without it: {error}", "red")
