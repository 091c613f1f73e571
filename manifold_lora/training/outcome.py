"""What comes of a run: predictions, picture, summary, and the merged model."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from manifold_lora.adapters import adapters, axes, factors, merge, split
from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.huggingface import save_llama
from manifold_lora.data.builtin import BASE
from manifold_lora.distributed.processes import is_main, wait_for_all
from manifold_lora.evaluation.heldout import majority, make_evaluate
from manifold_lora.training.config import ResolvedConfig
from manifold_lora.training.display import show_result
from manifold_lora.training.plot import plot_loss
from manifold_lora.training.progress import Progress
from manifold_lora.training.run import ADAPTER, MERGED, PICTURE, SUMMARY
from manifold_lora.training.setup import Data, effective_ranks


def summarise(
    config: ResolvedConfig, model: Any, data: Data, progress: Progress
) -> dict[str, Any]:
    """The numbers of summary.json, of a model that holds the factors kept."""
    trainable = sum(x.size for x in jax.tree.leaves(factors(model)))
    return {
        "method": config.method,
        "seconds": round(progress.seconds, 2),
        "steps": progress.step,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        "accuracy_before": progress.before.accuracy,
        "accuracy_after": progress.best.accuracy,
        "majority": majority(data.train, data.held_out),
        "loss_before": progress.before.loss,
        "loss_after": progress.best.loss,
        "largest_residual": progress.largest_residual,
        "last_residual": progress.last_residual,
        "least_effective_rank": min(effective_ranks(model), default=None),
        "trainable_parameters": trainable,
    }


def as_saved(model: Any, held_out: Any, discarded: float) -> dict[str, Any]:
    """How the adapter does that is saved, where that is not the one trained."""
    rebuild, trained, frozen = split(model)
    found = make_evaluate(rebuild, axes(model))(trained, frozen, held_out)
    return {
        "loss_exported": found.loss,
        "accuracy_exported": found.accuracy,
        "energy_discarded": discarded,
        "ranks_exported": sorted(
            {r for m in adapters(model).values() for r in m.ranks}
        ),
    }


def conclude(
    console: Console,
    out: Path,
    config: ResolvedConfig,
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """Write picture and summary, the summary last: it says that the run is finished."""
    if is_main():
        plot_loss(out / PICTURE, rows, f"{config.method}, rank {config.rank}")
        write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        show_result(console, out, summary)
    wait_for_all("summary")


def save_kept(config: ResolvedConfig, model: Any, out: Path) -> Path:
    """Where the best adapter is; one that can only be merged is merged and written."""
    if not config.diagonal_scaling:
        return out / ADAPTER
    if is_main():
        shutil.rmtree(out / MERGED, ignore_errors=True)  # of a run that was killed
    wait_for_all("merged")
    merge(model)
    save_llama(model, out / MERGED)
    if is_main():
        for file in (config.model or BASE).glob("token*"):
            shutil.copyfile(file, out / MERGED / file.name)
    return out / MERGED
