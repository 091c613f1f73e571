"""A whole run, from top to bottom."""

import json
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from manifold_lora.adapters import (
    adapters,
    axes,
    manifolds,
    merge,
    set_factors,
    split,
)
from manifold_lora.adapters.exported import as_exported
from manifold_lora.checkpoints.huggingface import read_llama_config, save_llama
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.data.batches import evaluation_batches, padded_length
from manifold_lora.data.builtin import BASE
from manifold_lora.data.preview import show_batch
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.evaluation.heldout import Evaluation, majority, make_evaluate
from manifold_lora.evaluation.plots import plot_loss
from manifold_lora.training.config import ResolvedConfig, TrainConfig, resolve
from manifold_lora.training.display import (
    progress_bar,
    show_plan,
    show_predictions,
    show_result,
)
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.run import (
    ADAPTER,
    MERGED,
    PICTURE,
    START,
    SUMMARY,
    Metrics,
    finished,
    open_run,
)
from manifold_lora.training.setup import (
    effective_ranks,
    load_data,
    load_model,
    total_steps,
    training_batches,
)
from manifold_lora.training.step import TrainState, make_step


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune an adapter as configured and write the run directory.

    Returns:
        What summary.json holds; of the earlier run, if the same one is finished.

    Raises:
        InputError: something in the configuration, the model or the data is wrong.
        Diverged: the loss became NaN or infinite; the best adapter so far is kept.
    """
    console = console or Console()
    began = time.perf_counter()
    config = resolve(config)
    if not config.show_batch and (summary := finished(config)):
        console.print(
            f"This run is finished: {config.run_directory}/ holds it (accuracy "
            f"{summary['accuracy_after']:.3f}). Give another --out, or --overwrite to "
            "run it again.",
            soft_wrap=True,
        )
        return summary

    # Data, model, adapter, optimiser
    read_llama_config(config.model or BASE)  # before anything that takes long
    tokenizer = load_tokenizer(config.model or BASE)
    data = load_data(config, tokenizer)
    feed = training_batches(config, data)
    if config.show_batch:
        show_batch(next(iter(feed)), tokenizer, console)
        return {}
    model = load_model(config)
    rebuild, factors, frozen = split(model)
    tags, names = manifolds(model), axes(model)
    steps = total_steps(config, data)
    tx, schedule = build_optimizer(config, tags, steps, model.config.hidden_size)
    step = make_step(rebuild, tx, tags, names, config.accumulate)
    evaluate = make_evaluate(rebuild, names)
    held_out = list(
        evaluation_batches(
            data.held_out,
            batch_size=config.batch_size,
            sequence_length=padded_length(data.held_out, config.sequence_length),
        )
    )
    trainable = sum(x.size for x in jax.tree.leaves(factors))
    show_plan(console, config, model, data, steps, trainable)

    # The run
    out = open_run(config)
    every = config.eval_every or -(-steps // 4)
    state = TrainState(factors, jax.jit(tx.init)(factors), jax.random.key(config.seed))
    best_step = waited = tokens = number = 0
    now: dict[str, float] = {}
    largest_residual = 0.0

    export = partial(
        as_exported,
        model,
        project=config.project_on_export,
        truncate_below=config.truncate_below,
    )

    def keep(factors: Any, name: str = ADAPTER) -> None:
        set_factors(model, jax.tree.map(jnp.copy, factors))  # the step donates its own
        if config.diagonal_scaling:  # which no adapter file can hold
            return
        base_id = config.base_id or str(config.model or BASE)
        with export():
            save_adapter(model, out / name, base_id=base_id)

    with Metrics(out, config) as metrics, progress_bar(console) as bar:

        def look(step: int, factors: Any) -> Evaluation:
            found = evaluate(factors, frozen, held_out)
            metrics.write(step=step, eval_loss=found.loss, eval_accuracy=found.accuracy)
            off = now.get("residual", 0.0)
            console.print(
                f"step {step}: held-out loss {found.loss:.4f}, "
                f"accuracy {found.accuracy:.3f}"
                + (f", {off:.1e} from the manifold" if off else "")
            )
            return found

        task = bar.add_task("", total=steps, loss=math.nan, lr=0.0, speed=0.0)
        keep(state.factors, START)
        keep(state.factors)
        before = best = look(0, state.factors)
        for number, batch in zip(range(1, steps + 1), feed, strict=False):
            started = time.perf_counter()
            rate = np.asarray(schedule(number - 1)).item()
            state, arrays = step(state, frozen, batch)
            now = {name: float(value) for name, value in arrays.items()}
            here = int((batch["segment_ids"] > 0).sum())
            speed = here / (time.perf_counter() - started)
            metrics.write(
                step=number, **now, learning_rate=rate, tokens_per_second=round(speed)
            )
            if not math.isfinite(now["loss"]) or not math.isfinite(now["grad_norm"]):
                raise Diverged(
                    f"At step {number} the loss is {now['loss']} and the gradient norm "
                    f"{now['grad_norm']}. {save_kept(config, model, out)}/ keeps what "
                    f"was best, of step {best_step} (held-out loss {best.loss:.4f}). "
                    "Lower --learning-rate or --clip, or lengthen --warmup-steps."
                )
            tokens += here
            largest_residual = max(largest_residual, now["residual"])
            bar.update(task, advance=1, loss=now["loss"], lr=rate, speed=speed)
            if number % every and number != steps:
                continue
            found = look(number, state.factors)
            if _better(config, found, best):
                best, best_step, waited = found, number, 0
                keep(state.factors)
            else:
                waited += 1
                if waited == config.patience:
                    console.print(f"No better in {waited} evaluations: stopping.")
                    break

    # What came of it; the model holds the factors that were kept
    show_predictions(console, model, tokenizer, data.held_out[:8])
    plot_loss(out / PICTURE, metrics.rows, f"{config.method}, rank {config.rank}")
    summary = {
        "method": config.method,
        "seconds": round(time.perf_counter() - began, 2),
        "steps": number,
        "best_step": best_step,
        "tokens": tokens,
        "accuracy_before": before.accuracy,
        "accuracy_after": best.accuracy,
        "majority": majority(data.train, data.held_out),
        "loss_before": before.loss,
        "loss_after": best.loss,
        "largest_residual": largest_residual,
        "last_residual": now["residual"],
        "least_effective_rank": min(effective_ranks(model), default=None),
        "trainable_parameters": trainable,
    }
    if config.project_on_export or config.truncate_below is not None:
        with export() as discarded:
            rebuild, factors, frozen = split(model)
            found = make_evaluate(rebuild, axes(model))(factors, frozen, held_out)
            summary |= {
                "loss_exported": found.loss,
                "accuracy_exported": found.accuracy,
                "energy_discarded": discarded,
                "ranks_exported": sorted(
                    {r for m in adapters(model).values() for r in m.ranks}
                ),
            }
    save_kept(config, model, out)
    text = json.dumps(summary, indent=2) + "\n"
    (out / SUMMARY).write_text(text, encoding="utf-8")
    show_result(console, out, summary)
    return summary


def save_kept(config: ResolvedConfig, model: Any, out: Path) -> Path:
    """Where the best adapter is; one that can only be merged is merged and written."""
    if not config.diagonal_scaling:
        return out / ADAPTER
    merge(model)
    save_llama(model, out / MERGED)
    for file in (config.model or BASE).glob("token*"):
        shutil.copyfile(file, out / MERGED / file.name)
    return out / MERGED


def _better(config: ResolvedConfig, found: Evaluation, best: Evaluation) -> bool:
    if config.best_metric == "accuracy":
        return found.accuracy > best.accuracy
    return found.loss < best.loss
