"""Evaluate a base and adapters on data files, on commonsense tasks or on E2E."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich import progress as bars
from rich.console import Console

from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.checkpoints.peft import fingerprint
from manifold_lora.console import make_console, print_text
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.evaluation import report
from manifold_lora.evaluation.commonsense import Commonsense
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.data_files import DataFiles
from manifold_lora.evaluation.e2e import E2E
from manifold_lora.evaluation.predictions import Predictions
from manifold_lora.evaluation.suite import Suite
from manifold_lora.evaluation.systems import System, adapter_digest
from manifold_lora.generation.model import adapted, load_base
from manifold_lora.models import Llama, LlamaConfig


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure a base and adapters, and write predictions, summary and table.

    An evaluation that was killed resumes from its predictions.

    Args:
        config: what is evaluated, and on what.
        console: where progress is shown; by default the terminal.

    Returns:
        The contents of evaluation.json: "systems", with the measures of every task and
        the seconds, and "differences" from the base, with bootstrap intervals.

    Raises:
        InputError: something in the configuration, the model, an adapter or the data
            is wrong.

    Examples:
        >>> config = EvaluateConfig(tasks=Path("dataset"))
        >>> summary = evaluate(config)  # doctest: +SKIP
    """
    console = console or make_console()
    with jax.set_mesh(make_mesh(read_mesh(config.mesh))):
        return _evaluate(config, console)


def _evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    source = config.model.path or BASE
    tokenizer = load_tokenizer(source)
    suite = make_suite(config, tokenizer, read_llama_config(source))
    for note in suite.notes:
        print_text(console, note)
    systems = config.systems
    digests = {name: adapter_digest(path) for name, path in systems.items() if path}
    model = load_base(config.model)
    base = fingerprint(model)
    digests = {name: digests.get(name, base) for name in systems}
    identity = {"data": suite.digest, "base": base, "systems": digests}
    with Predictions(config, identity) as predictions:
        _predict(suite, systems, model, tokenizer, source, predictions, console)
        names = list(systems)
        summary = report.summarise(suite, predictions, names)
        changed = list(report.changes(suite, predictions, names))
        report.write(config.directory, summary, changed)
    report.show(console, config.directory, summary, changed)
    return summary


def make_suite(config: EvaluateConfig, tokenizer: Any, shape: LlamaConfig) -> Suite:
    """The tasks and the measures that a configuration asks for."""
    if config.tasks is not None:
        return Commonsense(config, tokenizer, shape)
    if config.protocol == "e2e":
        return E2E(config, tokenizer, shape)
    return DataFiles(config, tokenizer, shape)


def _predict(
    suite: Suite,
    systems: Mapping[str, Path | None],
    model: Llama,
    tokenizer: Any,
    source: Path,
    predictions: Predictions,
    console: Console,
) -> None:
    """Run every system on what it has no predictions for."""
    with _bar(console) as bar:
        for name, adapter in systems.items():
            done = {
                task: {*predictions.rows.get((name, task), {})} for task in suite.sizes
            }
            total, before = sum(suite.sizes.values()), sum(map(len, done.values()))
            shown = bar.add_task(name, total=total, completed=before)
            if before == total:
                continue
            with adapted(model, adapter):
                system = System(model, tokenizer, source)
                for task in suite.sizes:
                    for rows in suite.predict(system, task, done[task]):
                        predictions.write(name, task, rows)
                        new = {row["record"] for row in rows} - done[task]
                        bar.update(shown, advance=len(new))


def _bar(console: Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(bar_width=24),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(compact=True),
        bars.TextColumn("left"),
        console=console,
    )
