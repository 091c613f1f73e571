"""What a run writes beside metrics and checkpoints: adapters, and its result."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from manifold_lora.adapters import adapters, axes, factors, merge, set_factors, split
from manifold_lora.adapters.exported import as_exported
from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.checkpoints.card import CARD, Run, model_card
from manifold_lora.checkpoints.companions import copy_companions, stop_tokens
from manifold_lora.checkpoints.huggingface import save_llama
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.configuration.flat import flatten
from manifold_lora.data.builtin import BASE
from manifold_lora.distributed.processes import is_main, wait_for_all
from manifold_lora.evaluation.heldout import Evaluation, majority, make_evaluate
from manifold_lora.training import display
from manifold_lora.training.config import RunConfig, TrainConfig
from manifold_lora.training.data import Data
from manifold_lora.training.memory import peak_memory
from manifold_lora.training.plot import plot_loss
from manifold_lora.training.run import (
    ADAPTER,
    LAST,
    MERGED,
    PICTURE,
    SUMMARY,
    Metrics,
)
from manifold_lora.training.setup import effective_ranks
from manifold_lora.training.state import RunState, better


class Diverged(RuntimeError):
    """The loss or the gradient is NaN or infinite; the best adapter is saved."""

    @classmethod
    def after(
        cls, config: TrainConfig, model: Any, run: RunState, row: dict[str, float]
    ) -> "Diverged":
        """The error after a step with these metrics; it saves what is still unsaved."""
        saved = "No trained adapter is saved."
        if run.best is not None:
            saved = (
                f"{save_merged(config, model)}/ has the best adapter, of step "
                f"{run.best_step} (held-out loss {run.best.loss:.4f})."
            )
        return cls(
            f"At step {run.step} the loss is {row['loss']} and the gradient norm "
            f"{row['grad_norm']}. {saved} Lower --learning-rate or --clip, or increase "
            "--warmup-steps."
        )


def exporting(config: TrainConfig, model: Any) -> AbstractContextManager[float]:
    """The model with its adapters as they are saved; see `as_exported`."""
    return as_exported(model, **config.adapter.options.values("export"))


def base_id(config: RunConfig) -> str:
    """The name of the base in the files of an adapter."""
    return config.output.base_id or str(config.model.path or BASE)


def save_factors(config: TrainConfig, model: Any, factors: Any, path: Path) -> None:
    """Give the model these factors, and write them as an adapter if there is a format.

    With diagonal scaling, which no adapter file can hold, `save_merged` writes the
    model in the end.
    """
    # Copies: the training step donates its own.
    set_factors(model, jax.tree.map(jnp.copy, factors))
    if not config.adapter.merge_only:
        with exporting(config, model):
            write_adapter(config, model, path)


def write_adapter(config: RunConfig, model: Any, path: Path) -> None:
    """Write the adapter of a model as the settings say."""
    output = config.output
    save_adapter(
        model,
        path,
        base_id=base_id(config),
        format=output.export_format,
        license=output.license,
    )


def write_card(config: TrainConfig, model: Any, summary: dict[str, Any]) -> None:
    """Give adapter/ a model card with the scores of the finished run."""
    with exporting(config, model):
        rank = max(module.rank for module in adapters(model).values())
    text = model_card(
        config.adapter,
        base_id(config),
        rank,
        base_dtype=config.model.base_dtype,
        license=config.output.license,
        run=Run(flatten(config), summary),
    )
    write_text(config.run_directory / ADAPTER / CARD, text)


def save_merged(config: TrainConfig, model: Any) -> Path:
    """The directory of the best adapter, or of the merged model, which is written."""
    out = config.run_directory
    if not config.adapter.merge_only:
        return out / ADAPTER
    if is_main():
        shutil.rmtree(out / MERGED, ignore_errors=True)  # of a run that was killed
    wait_for_all("merged")
    merge(model)
    save_llama(model, out / MERGED)
    if is_main():
        copy_companions(config.model.path or BASE, out / MERGED)
    return out / MERGED


def report_evaluation(
    evaluate: Callable[..., Evaluation],
    frozen: Any,
    held_out: Any,
    metrics: Metrics,
    console: Console,
    step: int,
    factors: Any,
    violation: float = 0.0,
    memory: int | None = None,
) -> Evaluation:
    """Evaluate factors, and write and show the result."""
    evaluation = evaluate(factors, frozen, held_out)
    row = {f"eval_{name}": value for name, value in evaluation._asdict().items()}
    if memory is not None:
        row["peak_memory_bytes"] = memory
    metrics.write(step=step, **row)
    display.show_evaluation(console, step, evaluation, violation)
    return evaluation


def save_result(
    config: TrainConfig,
    console: Console,
    model: Any,
    data: Data,
    held_out: Any,
    run: RunState,
    metrics: Metrics,
    tokenizer: Any,
    identity: dict[str, Any],
    steps: int,
) -> dict[str, Any]:
    """Write last/, picture and summary, the summary last: it marks the run as finished.

    Args:
        config: of the run.
        console: where the result is shown.
        model: with the best factors, or with any if there are no best ones.
        data: its held-out examples are shown with predictions.
        held_out: the same in batches.
        run: after the last step.
        metrics: for the picture.
        tokenizer: for the predictions.
        identity: of the run.
        steps: that it was to take.
    """
    out = config.run_directory
    best = factors(model)
    save_factors(config, model, run.arrays.factors, out / LAST)
    if run.best is None or config.keep == "last":
        run = run._replace(best_step=run.step)
        save_factors(config, model, run.arrays.factors, out / ADAPTER)
    else:
        set_factors(model, best)
    stop = stop_tokens(config.model.path or BASE, tokenizer)
    display.show_predictions(console, model, tokenizer, data.held_out[:8], stop)
    summary = _summary(config, model, data, run)
    summary |= {"planned_steps": steps, "identity": identity}
    options = config.adapter.options.values("export").values()
    if any(value is not None and value is not False for value in options):
        with exporting(config, model) as discarded:
            summary |= _exported(model, held_out, discarded)
    save_merged(config, model)
    if is_main():
        adapter = config.adapter
        title = f"{adapter.method}, rank {adapter.rank}"
        plot_loss(out / PICTURE, metrics.rows, title)
        if not adapter.merge_only:
            write_card(config, model, summary)
        write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        display.show_result(console, config, summary)
    wait_for_all("summary")
    return summary


def _summary(
    config: TrainConfig, model: Any, data: Data, run: RunState
) -> dict[str, Any]:
    """The content of summary.json, of a model that has the factors of adapter/."""
    summary: dict[str, Any] = {
        "method": config.adapter.method,
        "seconds": round(run.seconds, 2),
        "steps": run.step,
        "best_step": run.best_step,
        "tokens": run.tokens,
    }
    after = run.last if config.keep == "last" else run.best
    for when, evaluation in (("before", run.initial), ("after", after)):
        for name in Evaluation._fields:
            summary[f"{name}_{when}"] = getattr(evaluation, name, None)
    improved = None
    if run.initial is not None and after is not None:
        improved = better(after, run.initial, config.best_metric)
    return summary | {
        "better_than_start": improved,
        "majority": majority(data.train, data.held_out) if data.held_out else None,
        "largest_residual": run.largest_violation,
        "last_residual": run.last_violation,
        "least_effective_rank": min(effective_ranks(model), default=None),
        "trainable_parameters": sum(x.size for x in jax.tree.leaves(factors(model))),
        "peak_memory_bytes": peak_memory(),
    }


def _exported(model: Any, held_out: Any, discarded: float) -> dict[str, Any]:
    """The measures of an adapter that is not exported as it was trained."""
    rebuild, trained, frozen = split(model)
    evaluation = make_evaluate(rebuild, axes(model))(trained, frozen, held_out)
    return {
        **{f"{name}_exported": value for name, value in evaluation._asdict().items()},
        "energy_discarded": discarded,
        "ranks_exported": sorted(
            {rank for module in adapters(model).values() for rank in module.ranks}
        ),
    }
