"""A comparison of methods from top to bottom: search, runs, timing, report."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from manifold_lora.checkpoints.huggingface import read_llama_config
from manifold_lora.comparison.config import (
    CompareConfig,
    Comparison,
    resolve_comparison,
)
from manifold_lora.comparison.report import show_table, summarise, write
from manifold_lora.comparison.results import (
    ADAPTERS,
    PLOT,
    RESULTS,
    TABLE,
    ResultsFile,
    run_name,
)
from manifold_lora.comparison.runner import Runner
from manifold_lora.comparison.search import search
from manifold_lora.comparison.splits import split_held_out
from manifold_lora.configuration.flat import flatten
from manifold_lora.console import make_console, print_text
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.evaluation.heldout import Evaluation
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import held_out_batches, load_data, total_steps
from manifold_lora.training.optimizer import Rates
from manifold_lora.training.setup import load_base

FREE_GRID = (1 / 3, 1.0, 3.0)  # multiples of the default free learning rate
BUDGET = 1.1  # maximum ratio of trained parameters to the baseline's
TIMING_ROUNDS, TIMING_STEPS = 3, 10  # steps per round, over all methods in turn


def compare(config: CompareConfig, console: Console | None = None) -> dict[str, Any]:
    """Compare methods, each at its own best learning rates, over several seeds.

    1. Search: short runs with one seed over each method's grid, which is extended while
       the best rate is at its edge. A method with two rates searches one, then the
       other. The loss on the validation part decides.
    2. Full-length runs at the best rates with every seed, reported on the test part.
       Neither these seeds nor the test part have been used by the search. For a given
       seed, all methods see the same batches in the same order.
    3. Timing: some steps of every method in turn, relative to the baseline.

    Each finished run is written to compare.json at once, and an interrupted comparison
    resumes after the last of them. The step of each method is compiled once.

    Returns:
        The contents of compare.json.

    Raises:
        InputError: the configuration, the model or the data is invalid, or a method
            diverges at every rate.
    """
    all_devices()  # reports a platform that is not there
    console = console or make_console()
    comparison = resolve_comparison(config)
    out = comparison.shared.run_directory
    results = ResultsFile(out, _settings(comparison), config.output.overwrite)
    content = results.content
    if "summary" in content:
        print_text(
            console,
            f"The comparison in {out}/ is finished. Choose another --out, or pass "
            "--overwrite to run it again.",
        )
        show_table(console, content)
        return content
    with _progress(console) as bar:
        study = _Study(comparison, results, bar)
        best = {name: study.find_rates(name) for name in comparison.runs}
        # By seed, so that an interrupted comparison has results of every method.
        for seed in comparison.seeds:
            for name, rates in best.items():
                study.run(name, rates, seed)
        # Without runs of other names, which an edited file may hold.
        content["cells"] = {name: results[name] for name in study.used}
        content["held_out"] = study.held_out
        if "step_seconds" not in content:
            content["step_seconds"] = study.time_steps()
            results.write()
    content["best"] = {
        name: [rate for rate in rates if rate is not None]
        for name, rates in best.items()
    }
    content["summary"] = summarise(content, study.steps)
    write(out, content)
    results.write()  # last: a file with a summary marks a finished comparison
    show_table(console, content)
    files = ", ".join(str(out / name) for name in (TABLE, PLOT, RESULTS))
    print_text(console, f"Wrote {files}, {out / ADAPTERS}/")
    return content


class _Study:
    """The runs of a comparison, each done once.

    Args:
        comparison: the resolved configuration.
        results: of the runs that are finished.
        bar: shows the progress of each run.
    """

    def __init__(self, comparison: Comparison, results: ResultsFile, bar: Progress):
        # All runs have the same model and data.
        first = next(iter(comparison.runs.values()))
        source = first.model.path or BASE
        read_llama_config(source)  # report a bad model before the slow parts
        self.comparison, self.results, self.bar = comparison, results, bar
        data = load_data(first, load_tokenizer(source))
        self.data, validation, test = split_held_out(first, data)
        self.test = held_out_batches(first, self.data)
        self.validation = held_out_batches(
            first, self.data._replace(held_out=validation)
        )
        self.held_out = {
            "validation": len(validation),
            "test": len(test),
            "test_is_eval_data": first.data.eval_path is not None,
        }
        self.base = load_base(first)
        self.steps = total_steps(first, self.data)
        self.search_steps = comparison.search_steps or max(1, self.steps // 3)
        self.eval_every = first.evaluation.eval_every or max(1, self.steps // 12)
        self.used: dict[str, None] = {}  # names of the runs, in order
        self._runners: dict[str, Runner] = {}

    def find_rates(self, name: str) -> Rates:
        """The learning rates with the lowest validation loss in short runs."""
        config = self.comparison.runs[name]
        best = Rates(config.learning_rate, config.free_learning_rate)
        grid = self.comparison.grids[name]
        best = best._replace(
            constrained=self._best_rate(name, best, "constrained", grid)
        )
        if best.free is not None:
            grid = [float(f"{best.free * factor:.3g}") for factor in FREE_GRID]
            best = best._replace(free=self._best_rate(name, best, "free", grid))
        return best

    def _best_rate(
        self, name: str, rates: Rates, which: str, grid: Sequence[float]
    ) -> float:
        """The best value of one of the rates, with the other fixed."""

        def result(rate: float) -> dict[str, Any]:
            tried = rates._replace(**{which: rate})
            return self.run(name, tried, self.comparison.search_seed, searching=True)

        def loss(rate: float) -> float:
            tried = result(rate)
            return tried["final"]["loss"] if "final" in tried else math.inf

        what = "the free learning rate" if which == "free" else "the learning rate"
        return search(f"{name}: {what}", grid, loss, lambda r: _describe(result(r)))[0]

    def run(
        self, name: str, rates: Rates, seed: int, searching: bool = False
    ) -> dict[str, Any]:
        """The result of one run, which is done now unless it is finished already.

        Args:
            name: of the method.
            rates: peak learning rates.
            seed: of the initialisation, the order of the data and dropout.
            searching: a short run of the search, evaluated on the validation part; its
                adapter and curve are not saved.
        """
        steps = self.search_steps if searching else self.steps
        used = [rate for rate in rates if rate is not None]
        key = run_name(name, used, seed, steps, searching)
        self.used[key] = None
        if key in self.results:
            return self.results[key]
        adapters = self.comparison.shared.run_directory / ADAPTERS
        task = self.bar.add_task(key, total=steps, loss=math.nan)
        self.results[key] = self.runner(name).run(
            rates,
            seed,
            steps,
            self.eval_every,
            self.validation if searching else self.test,
            lambda number, loss: self.bar.update(task, completed=number, loss=loss),
            None if searching else adapters / f"{name}-seed{seed}",
        )
        self.bar.remove_task(task)
        text = f"{key}: {_describe(self.results[key])}"
        print_text(self.bar.console, text)
        return self.results[key]

    def runner(self, name: str) -> Runner:
        """The method, at the largest rank within the parameter budget."""
        if name not in self._runners:
            config = self.comparison.runs[name]
            runner = self._runner(config)
            limit = math.inf
            if name != self.comparison.baseline:
                limit = BUDGET * self.runner(self.comparison.baseline).trainable
            while runner.trainable > limit and config.adapter.rank > 1:
                # alpha follows the rank unless it was given
                alpha = self.comparison.shared.adapter.alpha
                adapter = dataclasses.replace(
                    config.adapter, rank=config.adapter.rank - 1, alpha=alpha
                )
                config = dataclasses.replace(config, adapter=adapter)
                runner = self._runner(config)
            self._runners[name] = runner
        return self._runners[name]

    def _runner(self, config: TrainConfig) -> Runner:
        return Runner(config, self.base, self.data, self.bar.console)

    def time_steps(self) -> dict[str, float]:
        """Median seconds per step of every method, measured in turn."""
        task = self.bar.add_task("timing", total=TIMING_ROUNDS, loss=math.nan)
        timers = {
            name: self.runner(name).step_timer(TIMING_STEPS)
            for name in self.comparison.runs
        }
        for timer in timers.values():
            timer()  # warm up: compiles a step that has not run yet
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(TIMING_ROUNDS):
            for name, timer in timers.items():
                seconds[name] += timer()
            self.bar.advance(task)
        self.bar.remove_task(task)
        return {name: statistics.median(values) for name, values in seconds.items()}


def _describe(result: dict[str, Any]) -> str:
    """The outcome of a run in a few words."""
    if "final" in result:
        final = Evaluation(**result["final"])
        return (
            f"held-out loss {final.loss:.4f}, accuracy {final.accuracy:.3f}, "
            f"exact match {final.exact_match:.3f}"
        )
    *before, last = result["losses"]
    loss = "nan" if last is None else f"{last:.4g}"
    after = f" after {before[-1]:.4g}" if before else ""
    return f"diverged at step {result['steps']} with loss {loss}{after}"


def _settings(comparison: Comparison) -> dict[str, Any]:
    """The settings that determine the results."""
    runs = {name: flatten(config) for name, config in comparison.runs.items()}
    return {
        "runs": runs,
        "grids": {name: list(grid) for name, grid in comparison.grids.items()},
        "baseline": comparison.baseline,
        "seeds": list(comparison.seeds),
        "search_seed": comparison.search_seed,
        "search_steps": comparison.search_steps,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )
