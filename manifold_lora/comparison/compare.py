"""A whole comparison, from top to bottom."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.comparison.cells import ADAPTERS, FILE, PICTURE, TABLE, Cells
from manifold_lora.comparison.config import (
    CompareConfig,
    Comparison,
    resolve_comparison,
)
from manifold_lora.comparison.report import show_table, summarise, write
from manifold_lora.comparison.runner import Runner
from manifold_lora.comparison.search import search
from manifold_lora.configuration.flat import flatten
from manifold_lora.data.batches import evaluation_batches, padded_length
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.optimizer import Rates
from manifold_lora.training.setup import load_base, load_data, total_steps

FREE_GRID = (1 / 3, 1.0, 3.0)  # of the free rate, times its default
BUDGET = 1.1  # trained parameters over the baseline's, at most
ROUNDS, STEPS = 3, 10  # of the timing, all methods in turn


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Compare methods, each at its own best learning rates, over several seeds.

    1. Search: short runs with one seed over each method's grid, which grows while the
       best is at its edge; a method with two rates is searched in one, then the other.
    2. Runs of full length at the best rates with every seed. The same seed has the
       same batches in the same order for all methods.
    3. Timing: some steps of every method in turn, for the overhead over the baseline.

    Every finished run is in compare.json at once; a comparison that was interrupted
    goes on after the last of them. Each method's step is compiled once.

    Returns:
        What compare.json holds.

    Raises:
        InputError: something in the configuration, the model or the data is wrong, or
            a method diverges at every rate.
    """
    console = console or Console()
    plan = resolve_comparison(config)
    out = plan.shared.run_directory
    cells = Cells(out, _settings(plan), config.output.overwrite)
    found = cells.content
    if "summary" in found:
        console.print(
            f"This comparison is finished: {out}/ holds it. Give another --out, or "
            "--overwrite to run it again.",
            soft_wrap=True,
        )
        show_table(console, found)
        return found
    with _progress(console) as bar:
        study = _Study(plan, cells, bar)
        best = {name: study.find_rates(name) for name in plan.runs}
        # By seed, so that an interrupted comparison has something of every method.
        for seed in plan.seeds:
            for name, rates in best.items():
                study.cell(name, rates, seed)
        if "step_seconds" not in found:
            found["step_seconds"] = study.timing()
            cells.write()
    found["best"] = {
        name: [rate for rate in rates if rate is not None]
        for name, rates in best.items()
    }
    found["summary"] = summarise(found, study.steps)
    write(out, found)
    cells.write()  # last: a file with a summary means that all is there
    show_table(console, found)
    files = ", ".join(str(out / name) for name in (TABLE, PICTURE, FILE))
    console.print(f"Written: {files}, {out / ADAPTERS}/", soft_wrap=True)
    return found


class _Study:
    """The runs of a comparison, each done once.

    Args:
        plan: the comparison.
        cells: what has been done of it.
        bar: where it shows what it does.
    """

    def __init__(self, plan: Comparison, cells: Cells, bar: Progress):
        first = next(iter(plan.runs.values()))  # all have the same model and data
        source = first.model.path or BASE
        read_llama_config(source)  # before anything that takes long
        self.plan, self.cells, self.bar = plan, cells, bar
        self.data = load_data(first, load_tokenizer(source))
        self.held_out = list(
            evaluation_batches(
                self.data.held_out,
                batch_size=first.batch.batch_size,
                sequence_length=padded_length(
                    self.data.held_out, first.batch.sequence_length
                ),
            )
        )
        self.base = load_base(first)
        self.steps = total_steps(first, self.data)
        self.search_steps = plan.search_steps or max(1, self.steps // 3)
        self.every = first.evaluation.eval_every or max(1, self.steps // 12)
        self._runners: dict[str, Runner] = {}

    def runner(self, name: str) -> Runner:
        """The method, at the largest rank that fits the baseline's parameters."""
        if name not in self._runners:
            config = self.plan.runs[name]
            runner = self._runner(config)
            limit = math.inf
            if name != self.plan.baseline:
                limit = BUDGET * self.runner(self.plan.baseline).trainable
            while runner.trainable > limit and config.adapter.rank > 1:
                # alpha follows the rank unless it was given
                alpha = self.plan.shared.adapter.alpha
                adapter = dataclasses.replace(
                    config.adapter, rank=config.adapter.rank - 1, alpha=alpha
                )
                config = dataclasses.replace(config, adapter=adapter)
                runner = self._runner(config)
            self._runners[name] = runner
        return self._runners[name]

    def _runner(self, config: TrainConfig) -> Runner:
        return Runner(config, self.base, self.data, self.held_out)

    def cell(
        self, name: str, rates: Rates, seed: int, searching: bool = False
    ) -> dict[str, Any]:
        """One run, from the file where it has been done before.

        Args:
            name: of the method.
            rates: peaks of its learning rates.
            seed: of the start, the order of the data and dropout.
            searching: a short run; otherwise its curve and its adapter are kept.
        """
        steps = self.search_steps if searching else self.steps
        shown = " ".join(f"{rate:g}" for rate in rates if rate is not None)
        key = f"{name} rates {shown} seed {seed} steps {steps}"
        key += " search" if searching else ""
        if key in self.cells:
            return self.cells[key]
        adapters = self.plan.shared.run_directory / ADAPTERS
        task = self.bar.add_task(key, total=steps, loss=math.nan)
        self.cells[key] = self.runner(name).run(
            rates,
            seed,
            steps,
            self.every,
            lambda number, loss: self.bar.update(task, completed=number, loss=loss),
            None if searching else adapters / f"{name}-seed{seed}",
        )
        self.bar.remove_task(task)
        self.bar.console.print(f"{key}: {_outcome(self.cells[key])}", soft_wrap=True)
        return self.cells[key]

    def find_rates(self, name: str) -> Rates:
        """The rates of the least held-out loss after short runs with one seed."""
        config = self.plan.runs[name]
        best = Rates(config.learning_rate, config.free_learning_rate)
        best = best._replace(
            constrained=self._best(name, best, "constrained", self.plan.grids[name])
        )
        if best.free is not None:
            grid = [float(f"{best.free * factor:.3g}") for factor in FREE_GRID]
            best = best._replace(free=self._best(name, best, "free", grid))
        return best

    def _best(
        self, name: str, rates: Rates, which: str, grid: Sequence[float]
    ) -> float:
        """The best of one of the rates, the other being as it is."""

        def cell(rate: float) -> dict[str, Any]:
            tried = rates._replace(**{which: rate})
            return self.cell(name, tried, self.plan.seeds[0], searching=True)

        def loss(rate: float) -> float:
            found = cell(rate)
            return math.inf if found["diverged"] else found["final"]["loss"]

        what = "the free learning rate" if which == "free" else "the learning rate"
        return search(f"{name}: {what}", grid, loss, lambda r: _outcome(cell(r)))[0]

    def timing(self) -> dict[str, float]:
        """Median seconds of a step of every method, measured in turn."""
        task = self.bar.add_task("timing", total=ROUNDS, loss=math.nan)
        more = {name: self.runner(name).seconds_of(STEPS) for name in self.plan.runs}
        for run in more.values():
            run()  # compiles, where nothing of the method has been run yet
        seconds: dict[str, list[float]] = {name: [] for name in more}
        for _ in range(ROUNDS):
            for name, run in more.items():
                seconds[name] += run()
            self.bar.advance(task)
        self.bar.remove_task(task)
        return {name: statistics.median(values) for name, values in seconds.items()}


def _outcome(cell: dict[str, Any]) -> str:
    """What became of a run, in a few words."""
    if not cell["diverged"]:
        final = cell["final"]
        return f"held-out loss {final['loss']:.4f}, accuracy {final['accuracy']:.3f}"
    *before, last = cell["losses"]
    loss = "nan" if last is None else f"{last:.4g}"
    after = f" after {before[-1]:.4g}" if before else ""
    return f"diverged at step {cell['steps']} with loss {loss}{after}"


def _settings(plan: Comparison) -> dict[str, Any]:
    """What makes the comparison what it is."""
    runs = {name: flatten(config) for name, config in plan.runs.items()}
    return {
        "runs": runs,
        "grids": {name: list(grid) for name, grid in plan.grids.items()},
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "search_steps": plan.search_steps,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )
