"""What a run shows on the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from manifold_lora.adapters import adapters, axes, split
from manifold_lora.data.tokens import Example
from manifold_lora.evaluation.heldout import answer, complete
from manifold_lora.models import Llama
from manifold_lora.training.config import ResolvedConfig
from manifold_lora.training.run import (
    ADAPTER,
    MERGED,
    METRICS,
    PICTURE,
    SETTINGS,
    SUMMARY,
)
from manifold_lora.training.setup import Data


def show_plan(
    console: Console,
    config: ResolvedConfig,
    model: Llama,
    data: Data,
    steps: int,
    trainable: int,
    mesh: Any,
) -> None:
    """What is about to run."""
    shape = model.config
    base = sum(module.base.kernel.size for module in adapters(model).values())
    report = data.report
    rates = f"{config.learning_rate:g}"
    if config.free_learning_rate is not None:
        rates += f" constrained, {config.free_learning_rate:g} free"
    rows = {
        "model": f"{config.model or 'built in'}: {shape.num_hidden_layers} layers of "
        f"{shape.hidden_size}, {model.embed_tokens.dtype}",
        "method": f"{config.method}, rank {config.rank}, alpha {config.alpha:g}, on "
        + ", ".join(name.rpartition(".")[2] for name in adapters(model)),
        "trainable parameters": f"{trainable:,} ({trainable / base:.1%} of what they "
        "adapt)",
        "data": f"{config.data or 'built in, Unicode names to categories'}: "
        f"{report.kept:,} examples, {len(data.held_out):,} held out",
        "tokens": f"{report.tokens:,}, of them {report.trained_tokens:,} trained",
        "batch": f"{config.batch_size} rows of {data.row_length}"
        + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
        + (", packed" if config.packing else ""),
        "tokens per step": f"{config.batch_size * data.row_length:,}, padding included",
        "steps": f"{steps:,}",
        "optimiser": f"{config.optimizer}, rate {rates}, {config.schedule}",
        "output": f"{config.run_directory}/",
    }
    if mesh.size > 1:
        shape_of = ", ".join(f"{n} {axis}" for axis, n in mesh.shape.items() if n > 1)
        count = jax.process_count()
        rows["devices"] = f"{mesh.size}: {shape_of}" + (
            f"; {count} processes" if count > 1 else ""
        )
    for name, part in (("cut", report), ("cut, held out", data.held_out_report)):
        if part.truncated or part.dropped:
            rows[name] = (
                f"{part.truncated:,} examples shortened to {config.sequence_length} "
                f"tokens (longest {part.longest:,}), {part.dropped:,} left out because "
                "they have no answer"
            )
    show_pairs(console, "Plan", rows)


def show_result(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """What came of a run, and where it is."""
    kept = f"step {summary['best_step']} of {summary['steps']}"
    rows = {
        "accuracy": f"{summary['accuracy_after']:.3f} after, "
        f"{summary['accuracy_before']:.3f} before, {summary['majority']:.3f} by always "
        "giving the commonest answer",
        "held-out loss": f"{summary['loss_after']:.4f} after, "
        f"{summary['loss_before']:.4f} before",
        "distance from the manifold": f"{summary['largest_residual']:.1e} at most, "
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
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def show_predictions(
    console: Console, model: Llama, tokenizer: Any, examples: Sequence[Example]
) -> None:
    """Prompts with the model's greedy completions beside the truth."""
    rebuild, factors, frozen = split(model)
    stop = model.config.eos_token_id
    completions = complete(rebuild, axes(model), factors, frozen, examples, stop)
    table = Table(title="Held-out examples", title_justify="left", box=None)
    table.add_column("prompt", no_wrap=True)
    table.add_column("predicted")
    table.add_column("truth")
    for example, completion in zip(examples, completions, strict=True):
        start = int(example.loss_mask.argmax())
        prompt, predicted, truth = (
            escape(" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()))
            for ids in (example.input_ids[:start], completion, answer(example))
        )
        style = "green" if predicted == truth else "red"
        # The end of a long prompt says more than its beginning.
        short = prompt if len(prompt) <= 40 else "…" + prompt[-39:]
        table.add_row(short, f"[{style}]{predicted}", truth)
    console.print(table)


def progress_bar(console: Console) -> Progress:
    """A bar with loss, learning rate, tokens per second and the time left."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("lr {task.fields[lr]:.2e}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
    )
