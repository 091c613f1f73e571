"""What one evaluation is: a model, adapters, and what they are measured on."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

from manifold_lora.configuration.flat import part
from manifold_lora.configuration.parts import BaseConfig, Date
from manifold_lora.distributed.mesh import read_mesh
from manifold_lora.errors import InputError
from manifold_lora.generation.config import Beams
from manifold_lora.settings import (
    UNSET,
    BatchSize,
    PositiveInt,
    SequenceLength,
    decode,
    fill,
    raise_all,
    setting,
    validate,
)

BASE_NAME = "base"  # of the model without an adapter, in tables and files
RUN_ADAPTER, RUN_SETTINGS = "adapter", "config.toml"
# Settings that an evaluation of a run has from the run, with their types.
_INHERITED = {
    "model": Path,
    "dtype": Literal["float32", "bfloat16"],
    "date": Date,
    "sequence_length": SequenceLength,
    "eval_data": Path,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation of a base and of adapters, on data files or by a protocol.

    Without `data` and `tasks`, the held-out file of the run is used or, for the
    built-in base, the built-in held-out data.

    Args:
        run: run directory: its adapter is evaluated, with its base and settings.
        adapters: directories of adapters or runs.
        base: evaluate the base too.
        data: files of records: loss, token accuracy and exact match of their answers.
        tasks: directory of commonsense tasks, in the form of LLM-Adapters.
        protocol: how prompts are made and answers read.
        examples: records of each task or file at most, from its start.
        num_beams: of the search that generates.
        max_new_tokens: tokens to generate at most.
        batch_size: prompts that are evaluated together.
        sequence_length: tokens of a record of `data` at most.
        date: that chat templates write as today's.
        skip_invalid: leave out the records of `data` that cannot be used.
        mesh: sizes of the mesh axes.
        out: directory to write to.
        overwrite: replace an earlier evaluation there.

    Raises:
        InputError: all problems, in one message.

    Examples:
        >>> EvaluateConfig(tasks=Path("dataset")).protocol
        'llm-adapters'
    """

    model: BaseConfig = part(BaseConfig)

    run: Path | None = setting(
        None,
        "run directory: evaluate its adapter, with its base and settings",
        positional=True,
    )
    adapters: tuple[Path, ...] = setting(
        (), "directories of adapters or runs", name="adapter", may_change=True
    )
    base: bool = setting(
        True, "evaluate the base too, beside the adapters", may_change=True
    )
    data: tuple[Path, ...] = setting(
        (),
        "files of records: loss, token accuracy and exact match of the answers; with "
        "--protocol e2e files of that benchmark",
        default_text="the run's eval_data; for the built-in base the built-in data",
    )
    tasks: Path | None = setting(
        None, "directory of commonsense tasks, NAME/test.json, as of LLM-Adapters"
    )
    protocol: Literal["llm-adapters", "stella", "e2e"] | None = setting(
        UNSET,
        "how prompts are made and answers read",
        default_text="llm-adapters for --tasks, else none",
    )
    examples: PositiveInt | None = setting(
        None, "records of a task or file at most, from its start", default_text="all"
    )
    num_beams: Beams = setting(
        4, "of the search of a protocol; 1: greedy", name="beams"
    )
    max_new_tokens: PositiveInt = setting(
        UNSET, "tokens to generate at most", default_text="32; for e2e 64"
    )
    batch_size: BatchSize = setting(8, "prompts that are evaluated together")
    sequence_length: SequenceLength = setting(
        UNSET,
        "tokens of a record of --data at most; longer ones are truncated",
        default_text="the run's, or 512; for the built-in data 128",
    )
    date: Date | None = setting(
        None,
        "date, as 2026-01-31, that chat templates write as today's",
        default_text="the run's, or today",
    )
    skip_invalid: bool = setting(
        False, "leave out the records of --data that cannot be used, and report them"
    )
    mesh: str | None = setting(
        None,
        "sizes of the mesh axes, as in data=2,fsdp=4,tensor=2",
        default_text="all devices on fsdp",
    )
    out: Path | None = setting(
        None,
        "directory to write to",
        default_text="evaluation/ in the run, or runs/evaluation",
        saved=False,
    )
    overwrite: bool = setting(
        False, "replace an earlier evaluation in --out", saved=False
    )

    def __post_init__(self):
        validate(self)
        inherited = {} if self.run is None else _run_settings(self.run)
        model = fill(
            self.model, path=inherited.get("model"), dtype=inherited.get("dtype")
        )
        data = self.data
        if not data and self.tasks is None and "eval_data" in inherited:
            data = (inherited["eval_data"],)
        builtin = model.path is None and not data and self.tasks is None
        length = inherited.get("sequence_length", 128 if builtin else 512)
        filled = {
            "model": model,
            "data": data,
            "protocol": self.protocol or (self.tasks and "llm-adapters"),
            "max_new_tokens": self.max_new_tokens
            or (64 if self.protocol == "e2e" else 32),
            "sequence_length": self.sequence_length or length,
            "date": self.date or inherited.get("date"),
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        raise_all(self._problems(builtin))

    def _problems(self, builtin: bool) -> list[str]:
        problems = []
        try:
            read_mesh(self.mesh)
        except InputError as error:
            problems.append(str(error))
        if self.data and self.tasks is not None:
            problems.append("--data and --tasks exclude each other: give one")
        elif self.protocol == "e2e" and not self.data:
            problems.append("--protocol e2e needs --data, files of lines MR||sentence")
        elif self.protocol not in (None, "e2e") and self.tasks is None:
            problems.append(
                f"--protocol {self.protocol} needs --tasks, a directory of "
                "NAME/test.json files"
            )
        elif self.protocol == "e2e" and self.tasks is not None:
            problems.append("--protocol e2e is for --data; --tasks has commonsense")
        elif not (self.data or self.tasks or builtin):
            problems.append(
                "there is nothing to evaluate on: give --data FILES or --tasks DIR"
            )
        if not self.systems:
            problems.append("--no-base needs an --adapter or a run")
        elif len(self.systems) < len(self._adapters) + self.base:
            problems.append("an adapter is given twice: give each once")
        return problems

    @property
    def systems(self) -> dict[str, Path | None]:
        """What is evaluated, by name: the base (None) first, and the adapters."""
        base: dict[str, Path | None] = {BASE_NAME: None} if self.base else {}
        return base | {str(path): path for path in self._adapters}

    @property
    def _adapters(self) -> tuple[Path, ...]:
        return self.adapters if self.run is None else (self.run, *self.adapters)

    @property
    def generation(self) -> dict[str, int]:
        """How a protocol generates: arguments of `System.generate`."""
        return {
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
        }

    @property
    def directory(self) -> Path:
        """Where the evaluation is written."""
        run = Path("runs") if self.run is None else self.run
        return self.out or run / "evaluation"


def _run_settings(run: Path) -> dict[str, Any]:
    """The settings of a run that its evaluation shares, from its config.toml."""
    file = run / RUN_SETTINGS
    if not file.is_file():
        raise InputError(
            f"{run} is not a run: it has no {RUN_SETTINGS}. Give the --out of a "
            "training run, or an adapter with --adapter."
        )
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read as TOML ({error}): give --model and --adapter "
            "instead of the run."
        ) from error
    if not (run / RUN_ADAPTER).is_dir():
        merged = " It has merged/: evaluate that with --model."
        raise InputError(
            f"{run} has no {RUN_ADAPTER}/: train it to its end."
            + (merged if (run / "merged").is_dir() else "")
        )
    problems, shared = [], {}
    for name, hint in _INHERITED.items():
        if name in settings:
            try:
                shared[name] = decode(settings[name], hint)
            except ValueError as error:
                problems.append(f"{file}: {name} {error}")
    raise_all(problems)
    return shared
