"""The `manifold-lora` command: arguments in, exit codes out. Imports no JAX itself."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro
from rich.console import Console
from tyro.extras import SubcommandApp

from manifold_lora.comparison.config import CompareConfig
from manifold_lora.errors import InputError
from manifold_lora.planning.chips import without_accelerator
from manifold_lora.planning.config import PlanConfig
from manifold_lora.training.config import TrainConfig, read_config


def commands(arguments: Sequence[str]) -> SubcommandApp:
    """Every command, with the defaults that a config file may have changed."""
    app = SubcommandApp()
    run, comparison, planned = TrainConfig(), CompareConfig(), PlanConfig()
    match arguments[:1]:
        case ["compare"]:
            comparison = _file_defaults(arguments, CompareConfig)
        case ["plan"]:
            planned = _file_defaults(arguments, PlanConfig)
        case _:
            run = _file_defaults(arguments, TrainConfig)

    @app.command
    def train(config: TrainConfig = run) -> None:
        """Fine-tune a LLaMA with a low-rank adapter and write it in PEFT's format.

        With no arguments, the small built-in base learns the general categories of
        Unicode characters from their names. Flags go over the file of --config,
        which goes over the defaults.
        """
        # Importing JAX takes seconds, and --help does not need it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from manifold_lora.training import loop

        try:
            loop.train(config)
        except loop.Diverged as error:
            stop(error, 1)
        except loop.Preempted as error:
            stop(error, 143)  # as a process that SIGTERM ended
        except loop.processes.Lost as error:
            _report(error)
            os._exit(1)  # not waiting for the others

    @app.command
    def compare(config: CompareConfig = comparison) -> None:
        """Train several methods, each at its own best learning rate, and compare them.

        Short runs search the learning rate of each method, then every method runs with
        several seeds on the same batches. Writes compare.md, compare.json, compare.png
        and the adapters. Interrupted, it goes on after the last finished run.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from manifold_lora.comparison.compare import compare

        compare(config)

    @app.command
    def plan(config: PlanConfig = planned) -> None:
        """Say what a run takes on devices that need not be there, before paying.

        Compiles the training step for a TPU slice or for CPU devices, from shapes
        alone, and shows per device: memory, operations, collectives over every axis of
        the mesh, and by a roofline the time, the tokens a second and their cost. The
        model is a name, such as llama-3.1-70b, or a directory with config.json.
        """
        without_accelerator()
        from manifold_lora.planning import plan

        try:
            plan.plan(config)
        except (plan.NotFittingError, plan.CompilerError) as error:
            stop(error, 1)

    @app.command
    def methods() -> None:
        """List the methods: formula, manifolds, defaults, memory, export, options."""
        from manifold_lora.training.describe import show_methods

        show_methods(Console())

    @app.command
    def inspect(
        adapter: tyro.conf.Positional[Path],
        out: Path | None = None,
        debug: bool = False,
    ) -> None:
        """Show what the factors of an adapter look like, without its base model.

        Per module and in all: rank used, effective and stable rank, singular values,
        distance from the manifold, cosines between columns, the angle from the start,
        and the largest weights moved. As tables, inspect.json, and the pictures
        gram.png, effective_rank.png and spectra.png.

        Args:
            adapter: a run, or the directory of an adapter: our own, PEFT's or StelLA's.
            out: where to write; None: inspect/ in the run, or NAME-inspect/ beside an
                adapter NAME/ that is no run's.
            debug: show tracebacks.
        """
        del debug  # main looks for it
        from manifold_lora.inspection.inspect import inspect_adapter

        inspect_adapter(adapter, out)

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with 2 and one message where the input is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app = commands(arguments)
        app.cli(
            prog="manifold-lora",
            description="Low-rank adapters on matrix manifolds for LLaMA, in JAX.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except InputError as error:
        if "--debug" in arguments:
            raise
        stop(error, 2)
    except OSError as error:
        if "--debug" in arguments:
            raise
        stop(
            f"{error}. A file could not be read or written; what was written before is "
            "whole. Free space or mend the permissions, and run again.",
            2,
        )
    except KeyboardInterrupt:
        _report("interrupted.")
        # JAX may crash while the interpreter ends in the middle of a compilation.
        os._exit(130)


Config = TypeVar("Config", bound=TrainConfig)


def _file_defaults(arguments: Sequence[str], kind: type[Config]) -> Config:
    """The settings of the file that --config names, before any flag is read."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name == "--config" and (value or following):
            return read_config(Path(value or following), kind)
    return kind()


def stop(message: object, code: int) -> NoReturn:
    """Print one message to stderr and exit."""
    _report(message)
    sys.exit(code)


def _report(message: object) -> None:
    text = f"manifold-lora: {message}"
    Console(stderr=True).print(text, style="red", markup=False, soft_wrap=True)
