"""What a run shows on the terminal."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

from manifold_lora.adapters import adapters, factors
from manifold_lora.console import PlainTable, print_table, print_text, printable
from manifold_lora.data.tokens import Example
from manifold_lora.evaluation.heldout import Evaluation, first_turn
from manifold_lora.generation.batched import generate_batches
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.models import Llama
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import Data, describe_data
from manifold_lora.training.run import (
    ADAPTER,
    MERGED,
    METRICS,
    PICTURE,
    SETTINGS,
    SUMMARY,
)
from manifold_lora.training.state import RunState

_PREDICTED = GenerationConfig(max_new_tokens=16)


def show_plan(
    console: Console,
    config: TrainConfig,
    model: Llama,
    data: Data,
    steps: int,
    mesh: Any,
) -> None:
    """What is about to run."""
    shape, adapter = model.config, config.adapter
    trainable = sum(x.size for x in jax.tree.leaves(factors(model)))
    base = sum(math.prod(module.base.shape) for module in adapters(model).values())
    optimizer = getattr(adapter.options, "optimizer", "Riemannian Adam")
    rates = f"{config.learning_rate:g}"
    if config.free_learning_rate is not None:
        rates += f" constrained, {config.free_learning_rate:g} free"
    rows = {
        "model": f"{config.model.path or 'built in'}: {shape.num_hidden_layers} layers "
        f"of {shape.hidden_size}, {model.embed_tokens.dtype}",
        "method": f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}, on "
        + ", ".join(name.rpartition(".")[2] for name in adapters(model)),
        "trainable parameters": f"{trainable:,} ({trainable / base:.1%} of what they "
        "adapt)",
        **describe_data(config, data),
        "steps": f"{steps:,}",
        "optimiser": f"{optimizer}, learning rate {rates}, {config.schedule.schedule}",
        "output": f"{config.run_directory}/",
    }
    longest = max(len(example.input_ids) for example in data.train + data.held_out)
    if warning := shape.length_warning(longest):
        rows["warning"] = warning
    if mesh.size > 1:
        shape_of = ", ".join(f"{n} {axis}" for axis, n in mesh.shape.items() if n > 1)
        count = jax.process_count()
        rows["devices"] = f"{mesh.size}: {shape_of}" + (
            f"; {count} processes" if count > 1 else ""
        )
    show_pairs(console, "Plan", rows)


def show_result(console: Console, config: TrainConfig, summary: dict[str, Any]) -> None:
    """The result of a run, and where it is."""
    out = config.run_directory
    which = f"PEFT, step {summary['best_step']} of {summary['steps']}"
    merged = which.replace("PEFT", "the whole model")
    rows = {
        "constraint violation": f"{summary['largest_residual']:.1e} at most, "
        f"{summary['last_residual']:.1e} at the end",
        "seconds": f"{summary['seconds']:.0f}",
        "adapter": f"{out / ADAPTER}/ ({which})"
        if (out / ADAPTER).exists()
        else f"{out / MERGED}/ ({merged})",
        "also": ", ".join(str(out / n) for n in (METRICS, SETTINGS, PICTURE, SUMMARY)),
    }
    if summary["loss_after"] is not None:
        rows = _measures(summary) | rows
    if summary["better_than_start"] is False:
        rows["note"] = (
            f"no evaluation was better than the start by {config.best_metric}; the "
            "adapter is nevertheless a trained one"
        )
    if summary["peak_memory_bytes"]:
        rows["peak memory"] = f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    if summary["least_effective_rank"] is not None:
        rows["least effective rank"] = f"{summary['least_effective_rank']:.4f}"
    if "loss_exported" in summary:
        rows["as exported"] = (
            f"held-out loss {summary['loss_exported']:.4f}, accuracy "
            f"{summary['accuracy_exported']:.3f}, exact match "
            f"{summary['exact_match_exported']:.3f}, ranks "
            f"{', '.join(map(str, summary['ranks_exported']))}, "
            f"{summary['energy_discarded']:.2%} of the energy discarded"
        )
    show_pairs(console, "Result", rows)


def _measures(summary: Mapping[str, Any]) -> dict[str, str]:
    """The held-out measures before and after training."""
    before, after = (
        Evaluation(*(summary[f"{name}_{when}"] for name in Evaluation._fields))
        for when in ("before", "after")
    )
    return {
        "held-out loss": f"{after.loss:.4f} after, {before.loss:.4f} before "
        f"(perplexity {after.perplexity:.4g} and {before.perplexity:.4g})",
        "accuracy": f"{after.accuracy:.3f} of the answer tokens after, "
        f"{before.accuracy:.3f} before",
        "exact match": f"{after.exact_match:.3f} of the answers after, "
        f"{before.exact_match:.3f} before, {summary['majority']:.3f} by always giving "
        "the most common answer",
    }


def show_pairs(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """A table of names and values."""
    table = PlainTable(title, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(console, table)


def show_predictions(
    console: Console,
    model: Llama,
    tokenizer: Any,
    examples: Sequence[Example],
    stop: Sequence[int],
) -> None:
    """Prompts with the model's greedy completions beside the truth.

    Prompts that are empty or fill the model's context are left out.
    """
    turns = [first_turn(example) for example in examples]
    room = model.config.max_position_embeddings - _PREDICTED.max_new_tokens
    turns = [(prompt, true) for prompt, true in turns if 0 < len(prompt) <= room]
    if not turns:
        return
    prompts = [prompt.tolist() for prompt, _ in turns]
    completions = dict(generate_batches(model, prompts, _PREDICTED, stop_tokens=stop))
    table = PlainTable("Held-out examples")
    table.add_column("prompt")
    table.add_column("predicted")
    table.add_column("truth")
    for i, (before, true) in enumerate(turns):
        completion = completions[i]
        prompt, predicted, truth = (
            " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
            for ids in (before, completion, true)
        )
        style = "green" if predicted == truth else "red"
        # The end of a long prompt says more than its beginning.
        short = prompt if len(prompt) <= 40 else "…" + prompt[-39:]
        table.add_row(short, Text(printable(predicted), style), truth)
    print_table(console, table)


def show_finished(
    console: Console, config: TrainConfig, summary: Mapping[str, Any]
) -> None:
    """That the same run has been finished before."""
    loss = summary["loss_after"]
    measured = "" if loss is None else f" (held-out loss {loss:.4f})"
    print_text(
        console,
        f"This run is finished: {config.run_directory}/ holds it{measured}. Give more "
        "--steps to continue it, another --out, or --overwrite to run it again.",
    )


def show_evaluation(
    console: Console, step: int, evaluation: Evaluation, violation: float
) -> None:
    """The held-out measures after a step."""
    print_text(
        console,
        f"step {step}: held-out loss {evaluation.loss:.4f}, "
        f"accuracy {evaluation.accuracy:.3f}, "
        f"exact match {evaluation.exact_match:.3f}"
        + (f", constraint violation {violation:.1e}" if violation else ""),
    )


def show_early_stop(console: Console, config: TrainConfig, run: RunState) -> None:
    """That the run stopped early, if it did."""
    if run.evaluations_since_best == config.patience:
        text = f"No improvement for {config.patience} evaluations; stopped early."
        print_text(console, text)


class StepBar:
    """A bar with loss, learning rate, tokens per second and the time left.

    Args:
        console: where it is drawn.
        steps: of the whole run.
        completed: those taken before.
    """

    def __init__(self, console: Console, steps: int, completed: int):
        fold = Column(overflow="fold")  # numbers are not cut where there is no room
        text = partial(bars.TextColumn, table_column=fold)
        self._bar = bars.Progress(
            text("step"),
            bars.MofNCompleteColumn(table_column=fold),
            bars.BarColumn(bar_width=24),
            text("loss {task.fields[loss]:.3f}"),
            text("lr {task.fields[learning_rate]:.2e}"),
            text("{task.fields[tokens_per_second]:,.0f} tokens/s"),
            bars.TimeRemainingColumn(compact=True, table_column=fold),
            text("left"),
            console=console,
        )
        row: Any = {"loss": math.nan, "learning_rate": 0.0, "tokens_per_second": 0.0}
        self._task = self._bar.add_task("", total=steps, completed=completed, **row)

    def advance(self, row: Any) -> None:
        """One step more, with its metrics by name."""
        self._bar.update(self._task, advance=1, **row)

    def __enter__(self) -> "StepBar":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
