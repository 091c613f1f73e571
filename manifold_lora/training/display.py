"""What a run shows on the terminal."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

from manifold_lora.adapters import adapters, axes, factors, split
from manifold_lora.console import PlainTable, print_table, print_text, printable
from manifold_lora.data.tokens import Example
from manifold_lora.evaluation.heldout import Evaluation, answer, complete
from manifold_lora.models import Llama
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import Data
from manifold_lora.training.run import (
    ADAPTER,
    MERGED,
    METRICS,
    PICTURE,
    SETTINGS,
    SUMMARY,
)
from manifold_lora.training.state import RunState


def show_plan(
    console: Console,
    config: TrainConfig,
    model: Llama,
    data: Data,
    steps: int,
    mesh: Any,
) -> None:
    """What is about to run."""
    shape, adapter, batch = model.config, config.adapter, config.batch
    trainable = sum(x.size for x in jax.tree.leaves(factors(model)))
    base = sum(module.base.kernel.size for module in adapters(model).values())
    report = data.report
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
        "data": f"{config.data.path or 'built in, Unicode names to categories'}: "
        f"{report.kept:,} examples, {len(data.held_out):,} held out",
        "tokens": f"{report.tokens:,}, of them {report.trained_tokens:,} trained",
        "batch": f"{batch.batch_size} rows of {data.row_length}"
        + (f" in {batch.accumulate} micro-batches" if batch.accumulate > 1 else "")
        + (", packed" if config.data.packing else ""),
        "tokens per step": f"{batch.batch_size * data.row_length:,}, padding included",
        "steps": f"{steps:,}",
        "optimiser": f"{optimizer}, learning rate {rates}, {config.schedule.schedule}",
        "output": f"{config.run_directory}/",
    }
    if mesh.size > 1:
        shape_of = ", ".join(f"{n} {axis}" for axis, n in mesh.shape.items() if n > 1)
        count = jax.process_count()
        rows["devices"] = f"{mesh.size}: {shape_of}" + (
            f"; {count} processes" if count > 1 else ""
        )
    reports = {"truncated": report, "truncated, held out": data.held_out_report}
    for name, part in reports.items():
        if part.truncated or part.dropped:
            rows[name] = (
                f"{part.truncated:,} examples truncated to {batch.sequence_length} "
                f"tokens (longest {part.longest:,}), {part.dropped:,} dropped because "
                "they have no answer"
            )
    show_pairs(console, "Plan", rows)


def show_result(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """The result of a run, and where it is."""
    kept = f"step {summary['best_step']} of {summary['steps']}"
    rows = {
        "accuracy": f"{summary['accuracy_after']:.3f} after, "
        f"{summary['accuracy_before']:.3f} before, {summary['majority']:.3f} by always "
        "giving the most common answer",
        "held-out loss": f"{summary['loss_after']:.4f} after, "
        f"{summary['loss_before']:.4f} before",
        "constraint violation": f"{summary['largest_residual']:.1e} at most, "
        f"{summary['last_residual']:.1e} at the end",
        "seconds": f"{summary['seconds']:.0f}",
        "adapter": f"{out / ADAPTER}/ (PEFT, {kept})"
        if (out / ADAPTER).exists()
        else f"{out / MERGED}/ (the whole model, {kept})",
        "also": ", ".join(str(out / n) for n in (METRICS, SETTINGS, PICTURE, SUMMARY)),
    }
    if summary["least_effective_rank"] is not None:
        rows["least effective rank"] = f"{summary['least_effective_rank']:.4f}"
    if "loss_exported" in summary:
        rows["as exported"] = (
            f"held-out loss {summary['loss_exported']:.4f}, accuracy "
            f"{summary['accuracy_exported']:.3f}, ranks "
            f"{', '.join(map(str, summary['ranks_exported']))}, "
            f"{summary['energy_discarded']:.2%} of the energy discarded"
        )
    show_pairs(console, "Result", rows)


def show_pairs(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """A table of names and values."""
    table = PlainTable(title, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(console, table)


def show_predictions(
    console: Console, model: Llama, tokenizer: Any, examples: Sequence[Example]
) -> None:
    """Prompts with the model's greedy completions beside the truth."""
    rebuild, trained, frozen = split(model)
    stop = model.config.eos_token_id
    completions = complete(rebuild, axes(model), trained, frozen, examples, stop)
    table = PlainTable("Held-out examples")
    table.add_column("prompt")
    table.add_column("predicted")
    table.add_column("truth")
    for example, completion in zip(examples, completions, strict=True):
        start = int(example.loss_mask.argmax())
        prompt, predicted, truth = (
            " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
            for ids in (example.input_ids[:start], completion, answer(example))
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
    print_text(
        console,
        f"This run is finished: {config.run_directory}/ holds it (accuracy "
        f"{summary['accuracy_after']:.3f}). Give another --out, or --overwrite to "
        "run it again.",
    )


def show_evaluation(
    console: Console, step: int, evaluation: Evaluation, violation: float
) -> None:
    """The held-out measures after a step."""
    print_text(
        console,
        f"step {step}: held-out loss {evaluation.loss:.4f}, "
        f"accuracy {evaluation.accuracy:.3f}"
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
