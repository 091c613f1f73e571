"""A whole comparison, from top to bottom."""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.data.batches import evaluation_batches, padded_length
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.studies.cells import Cells
from manifold_lora.studies.config import CompareConfig, Plan, resolve_comparison
from manifold_lora.studies.report import PICTURE, TABLE, show_table, summarise, write
from manifold_lora.studies.runner import Runner
from manifold_lora.studies.search import search
from manifold_lora.training.config import ResolvedConfig, as_toml
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
    cells = Cells(out, _settings(plan), config.overwrite)
    if "summary" in cells.content:
        console.print(f"This comparison is finished: {out}/ holds it.", soft_wrap=True)
        show_table(console, cells.content)
        return cells.content
    study = _Study(plan, cells)
    with _progress(console) as bar:
        best = {name: study.find_rates(name, bar) for name in plan.runs}
        for name, rates in best.items():
            for seed in plan.seeds:
                study.cell(name, rates, seed, study.steps, bar, out / "adapters")
        if "step_seconds" not in cells.content:
            cells.content["step_seconds"] = study.timing()
    cells.content["best"] = {
        name: [rate for rate in rates if rate is not None]
        for name, rates in best.items()
    }
    cells.content["summary"] = summarise(cells.content, plan, study.steps)
    cells.write()
    write(out, cells.content)
    show_table(console, cells.content)
    console.print(f"Written: {out}/ ({TABLE}, {PICTURE}, compare.json, adapters/)")
    return cells.content


class _Study:
    """The runs of a comparison, each done once."""

    def __init__(self, plan: Plan, cells: Cells):
        first = next(iter(plan.runs.values()))
        source = first.model or BASE
        read_llama_config(source)  # before anything that takes long
        self.plan, self.cells = plan, cells
        self.data = load_data(first, load_tokenizer(source))
        self.held_out = list(
            evaluation_batches(
                self.data.held_out,
                batch_size=first.batch_size,
                sequence_length=padded_length(
                    self.data.held_out, first.sequence_length
                ),
            )
        )
        self.base = load_base(first)
        self.steps = total_steps(first, self.data)
        self.search_steps = plan.search_steps or max(1, self.steps // 3)
        self.every = first.eval_every or max(1, self.steps // 12)

    @functools.cache  # noqa: B019 - one study is one process
    def runner(self, name: str) -> Runner:
        """The method, of a rank that fits the baseline's number of parameters."""
        config = self.plan.runs[name]
        runner = self._runner(config)
        if name == self.plan.baseline:
            return runner
        limit = BUDGET * self.runner(self.plan.baseline).trainable
        while runner.trainable > limit and config.rank > 1:
            config = dataclasses.replace(config, rank=config.rank - 1)
            runner = self._runner(config)
        return runner

    def _runner(self, config: ResolvedConfig) -> Runner:
        return Runner(config, self.base, self.data, self.held_out)

    def cell(
        self,
        name: str,
        rates: Rates,
        seed: int,
        steps: int,
        bar: Progress,
        adapters: Path | None = None,
    ) -> dict[str, Any]:
        """One run, from the file where it has been done before."""
        shown = " ".join(f"{rate:g}" for rate in rates if rate is not None)
        key = f"{name} rates {shown} seed {seed} steps {steps}"
        if adapters is None:
            key += " search"
        if key not in self.cells:
            task = bar.add_task(key, total=steps, loss=float("nan"))

            def show(number: int, loss: float) -> None:
                bar.update(task, completed=number, loss=loss)

            self.cells[key] = self.runner(name).run(
                rates,
                seed,
                steps,
                self.every if adapters else steps,
                show,
                adapters / f"{name}-seed{seed}" if adapters else None,
            ) | {"trainable": self.runner(name).trainable}
            bar.remove_task(task)
        return self.cells[key]

    def find_rates(self, name: str, bar: Progress) -> Rates:
        """The rates of the least held-out loss after short runs with one seed."""
        config = self.plan.runs[name]
        best = Rates(config.learning_rate, config.free_learning_rate)

        def loss(**rates: float) -> float:
            tried = best._replace(**rates)
            cell = self.cell(name, tried, self.plan.seeds[0], self.search_steps, bar)
            return float("inf") if cell["diverged"] else cell["final"]["loss"]

        rate, _ = search(
            f"{name}: the learning rate",
            self.plan.grids[name],
            lambda rate: loss(constrained=rate),
        )
        best = best._replace(constrained=rate)
        if best.free is not None:
            grid = [float(f"{best.free * factor:.3g}") for factor in FREE_GRID]
            free, _ = search(
                f"{name}: the free learning rate", grid, lambda rate: loss(free=rate)
            )
            best = best._replace(free=free)
        return best

    def timing(self) -> dict[str, float]:
        """Median seconds of a step of every method, measured in turn."""
        more = {name: self.runner(name).seconds_of(STEPS) for name in self.plan.runs}
        for run in more.values():
            run()  # compiles, where nothing of the method has been run yet
        seconds: dict[str, list[float]] = {name: [] for name in more}
        for _ in range(ROUNDS):
            for name, run in more.items():
                seconds[name] += run()
        return {name: statistics.median(values) for name, values in seconds.items()}


def _settings(plan: Plan) -> dict[str, Any]:
    """What makes the comparison what it is."""
    runs = {name: as_toml(config) for name, config in plan.runs.items()}
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
