"""The `manifold-lora` command: arguments in, exit codes out. Imports no JAX itself."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.extras import SubcommandApp

from manifold_lora.cli.compile_cache import use_compile_cache
from manifold_lora.console import make_console, print_text, safe_terminal
from manifold_lora.errors import InputError, nearest
from manifold_lora.planning.chips import hide_accelerators
from manifold_lora.settings import check_renamed


def train(config: Any) -> None:
    """Fine-tune a LLaMA with a low-rank adapter and write it in PEFT's format.

    With no arguments, the small built-in base learns the general categories of Unicode
    characters from their names. Flags override the config file, which overrides the
    defaults. An interrupted run resumes from its newest checkpoint.
    """
    from manifold_lora.training import train as training

    try:
        training.train(config)
    except training.Diverged as error:
        stop(error, 1)
    except training.Preempted as error:
        stop(error, 143)  # as a process that SIGTERM ended
    except training.processes.ProcessLost as error:
        _report(error)
        os._exit(1)  # not waiting for the others


def compare(config: Any) -> None:
    """Train several methods, each at its own best learning rate, and compare them.

    Short runs search the learning rate of each method, then every method runs with
    several seeds on the same batches. Writes compare.md, compare.json, compare.png and
    the adapters. An interrupted comparison resumes after the last finished run.
    """
    from manifold_lora.comparison.compare import compare

    compare(config)


def plan(config: Any) -> None:
    """Show what a run needs on devices, without access to them.

    Compiles the training step for a TPU slice or for CPU devices, from shapes alone,
    and shows per device: memory, operations, collectives over every axis of the mesh,
    and by a roofline the time, the tokens a second and their cost. The model is a
    name, such as llama-3.1-70b, or a directory with config.json.
    """
    from manifold_lora.planning import plan

    try:
        plan.plan(config)
    except (plan.DoesNotFitError, plan.CompilerError) as error:
        stop(error, 1)


def generate(config: Any) -> None:
    """Generate text with a base and, if given, an adapter.

    From one prompt, from a file of prompts, or in a chat, with the model's chat
    template where it has one. Greedy by default; with a temperature it samples, with
    beams it searches.
    """
    from manifold_lora.generation.command import generate_texts

    generate_texts(config)


def evaluate(config: Any) -> None:
    """Measure a base and adapters, side by side, on data or by the papers' protocol.

    On data files: loss per answer token, token accuracy and exact match. On the
    commonsense tasks: accuracy of the answers that are generated, how many cannot be
    read, and accuracy by the likelihoods of the labels. Differences from the base have
    a bootstrap interval. Every prediction is written, and a killed evaluation resumes.
    """
    from manifold_lora.evaluation.evaluate import evaluate

    evaluate(config)


def methods() -> None:
    """List the methods: formula, manifolds, defaults, memory, export, options."""
    from manifold_lora.adapters.describe import show_methods

    show_methods(make_console())


def inspect(
    adapter: tyro.conf.Positional[Path], out: Path | None = None, debug: bool = False
) -> None:
    """Show what the factors of an adapter look like, without its base model.

    Per module and in all: numerical rank, effective and stable rank, singular values,
    constraint violation, cosines between columns, the angle from the initialisation,
    and the largest changes of weights. As tables, inspect.json, and the pictures
    gram.png, effective_rank.png and spectra.png.

    Args:
        adapter: a run, or the directory of an adapter: our own, PEFT's or StelLA's.
        out: where to write; None: inspect/ in the run, or NAME-inspect/ beside an
            adapter NAME/ that is not a run's.
        debug: show tracebacks.
    """
    del debug  # main looks for it
    from manifold_lora.inspection.inspect import inspect_adapter

    inspect_adapter(adapter, out)


def export(config: Any) -> None:
    """Write an adapter in the format of another tool, read back and compared.

    `portable` is what PEFT, vLLM, SGLang and llama.cpp each compute the same from:
    the scale is part of B, and every module has one rank. `peft` has rsLoRA and
    patterns as they are, `mlx` is for mlx-lm, `stella` for StelLA's own package, and
    `gguf-lora` for llama.cpp. Needs no tokenizer, and the base only with --model.
    """
    from manifold_lora.conversion.export import export

    export(config)


def merge(config: Any) -> None:
    """Merge adapters into a model, or combine several into one adapter.

    Reads and writes the files of the model in blocks, so that it is never in memory,
    and compares the logits of what was written with those of the base and its adapters.
    The sum of several adapters, each with a weight, is exact. Needs no tokenizer.
    """
    from manifold_lora.conversion.merge import merge_files

    merge_files(config)


def import_(config: Any) -> None:
    """Write an adapter of PEFT, StelLA or mlx-lm as one of this library.

    PEFT's LoRA, rsLoRA and DoRA with rank and alpha patterns, StelLA's own files, and
    mlx-lm's adapters.safetensors. Then `convert` makes it an adapter of another method.
    Needs no base; with --model it is checked against it and logits are compared.
    """
    from manifold_lora.conversion.importing import import_adapter

    import_adapter(config)


def convert(config: Any) -> None:
    """Turn an adapter into one of another method, with the same update of the weights.

    The new factors are on the manifolds of the method, and `train --adapter` continues
    from them. Reads adapters of this library, PEFT and StelLA.
    """
    from manifold_lora.conversion.convert import convert_adapter

    convert_adapter(config)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "plan": plan,
    "generate": generate,
    "evaluate": evaluate,
    "methods": methods,
    "inspect": inspect,
    "export": export,
    "merge": merge,
    "import": import_,
    "convert": convert,
}
# The class, in manifold_lora, whose settings are the flags of a command.
CONFIGURATIONS = {
    train: "training.config.TrainConfig",
    compare: "comparison.config.CompareConfig",
    plan: "planning.config.PlanConfig",
    generate: "generation.command.GenerateConfig",
    export: "conversion.export_config.ExportConfig",
    evaluate: "evaluation.config.EvaluateConfig",
    merge: "conversion.config.MergeConfig",
    import_: "conversion.config.ImportConfig",
    convert: "conversion.config.ConvertConfig",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with 2 and one message where the input is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with safe_terminal():
        _report_errors(arguments or ["--help"])


def _run(arguments: Sequence[str]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = arguments[0]
    names = list(COMMANDS)
    if chosen not in names and not chosen.startswith("-"):
        raise InputError(f"there is no command {chosen!r}. {nearest(chosen, names)}")
    check_renamed(arguments)
    if chosen == plan.__name__:
        hide_accelerators()  # before JAX is imported
    elif "--no-compile-cache" not in arguments:
        use_compile_cache()  # likewise; a plan's programs could not be read again
    command = COMMANDS.get(chosen)
    if command is not None and command in CONFIGURATIONS:
        from manifold_lora.cli.flags import join_repeated

        arguments = join_repeated(_configuration(command), arguments)
    app = SubcommandApp()
    for name, other in COMMANDS.items():
        parsed: Any = _parsed(other, name == chosen)
        app.command(parsed, name=name)
    app.cli(
        prog="manifold-lora",
        description="Low-rank adapters on matrix manifolds for LLaMA, in JAX.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def _report_errors(arguments: Sequence[str]) -> None:
    try:
        _run(arguments)
    except InputError as error:
        if "--debug" in arguments:
            raise
        stop(error, 2)
    except OSError as error:
        if "--debug" in arguments:
            raise
        stop(
            f"{error}. A file could not be read or written; what was written before is "
            "intact. Free space or fix the permissions, and run again.",
            2,
        )
    except KeyboardInterrupt:
        _report("interrupted.")
        # JAX may crash while the interpreter ends in the middle of a compilation.
        os._exit(130)


def _configuration(command: Callable[..., None]) -> Any:
    """The class of a command's configuration."""
    module, _, name = CONFIGURATIONS[command].rpartition(".")
    return getattr(importlib.import_module(f"manifold_lora.{module}"), name)


def _parsed(command: Callable[..., None], chosen: bool) -> Callable[..., None]:
    """A command as tyro sees it: with the flags of its configuration.

    They come from the methods, whose files import JAX, which takes a second: only the
    chosen command gets its own.
    """
    if command not in CONFIGURATIONS:
        return command
    parsed: Any
    if chosen:
        from manifold_lora.cli.flags import flags_class, read_flags

        kind = _configuration(command)

        def run(flags: Any) -> None:
            command(read_flags(kind, flags))

        flags: Any = flags_class(kind)
        unnamed = Annotated[flags, tyro.conf.arg(name="")]
        run.__annotations__ = {"flags": unnamed, "return": None}
        run.__defaults__ = (flags(),)
        parsed = run
    else:
        parsed = lambda: None  # noqa: E731
    parsed.__doc__ = command.__doc__
    return parsed


def stop(message: object, code: int) -> NoReturn:
    """Print one message to stderr and exit."""
    _report(message)
    sys.exit(code)


def _report(message: object) -> None:
    print_text(make_console(stderr=True), f"manifold-lora: {message}", "red")
