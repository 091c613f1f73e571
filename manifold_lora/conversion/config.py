"""The configurations of merge, import and convert."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS, check_method
from manifold_lora.settings import Rank, setting, validate

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Adapters to merge into a model, or to combine into one adapter.

    Args:
        model: directory of the base.
        adapters: directories of adapters or of runs, each with its weight after a
            colon: "runs/stella:0.7"; 1 without.
        out: directory to write.
        dtype: of the merged model.
        rank: truncate the sum of the adapters to this rank.
        as_adapter: write the sum as an adapter, instead of merging it into a model.
        overwrite: replace a model or adapter in `out`.

    Raises:
        InputError: all problems, in one message.

    Examples:
        >>> MergeConfig(adapters=("a:0.7", "b:0.3"), out=Path("c")).weighted()
        [(PosixPath('a'), 0.7), (PosixPath('b'), 0.3)]
    """

    model: Path | None = setting(
        None,
        "Hugging Face directory of the base",
        default_text="the small built-in base",
    )
    adapters: tuple[str, ...] = setting(
        (),
        "directories of adapters or runs, each with its weight: DIR or DIR:WEIGHT",
        name="adapter",
    )
    out: Path | None = setting(None, "directory to write")
    dtype: Dtype | None = setting(
        None, "of the merged model", default_text="as each tensor of the base"
    )
    rank: Rank | None = setting(
        None,
        "truncate the sum of the adapters to this rank",
        default_text="the sum of their ranks",
    )
    as_adapter: bool = setting(
        False, "write the sum as an adapter instead, without a model"
    )
    overwrite: bool = setting(False, "replace a model or an adapter in --out")

    def __post_init__(self):
        problems = []
        if not self.adapters:
            problems.append("merge needs --adapter, the directory of an adapter")
        if self.out is None:
            problems.append("merge needs --out, the directory to write")
        for given in ("model", "dtype"):
            if self.as_adapter and getattr(self, given) is not None:
                problems.append(
                    f"--as-adapter and --{given} exclude each other: an adapter is "
                    "written without a model, in float32"
                )
        validate(self, problems)
        self.weighted()

    def weighted(self) -> list[tuple[Path, float]]:
        """The adapters with their weights.

        Raises:
            InputError: what stands after the last colon is not a finite number.
        """
        return [_weighted(text) for text in self.adapters]


def _weighted(text: str) -> tuple[Path, float]:
    if Path(text).expanduser().is_dir() or ":" not in text:  # of a name with a colon
        return Path(text).expanduser(), 1.0
    path, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise InputError(
            f"--adapter {text}: the weight must be a finite number, got {number!r}. "
            "Write DIR:WEIGHT, as in runs/stella/adapter:0.7, or DIR alone."
        )
    return Path(path).expanduser(), weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """An adapter of PEFT, StelLA or mlx-lm, to write as one of this library.

    Args:
        adapter: its directory.
        out: directory to write.
        model: directory of its base: the adapter is checked against it, its logits are
            compared, and the new adapter remembers the base.
        base_id: name of the base in the files.
        overwrite: replace an adapter in `out`.

    Raises:
        InputError: all problems, in one message.
    """

    adapter: Path | None = setting(
        None, "directory of an adapter of PEFT, StelLA or mlx-lm", positional=True
    )
    out: Path | None = setting(None, "directory to write")
    model: Path | None = setting(
        None, "Hugging Face directory of its base, to check and compare logits"
    )
    base_id: str | None = setting(
        None, "name of the base in the files", default_text="as in the adapter"
    )
    overwrite: bool = setting(False, "replace an adapter in --out")

    def __post_init__(self):
        validate(self, _missing("import", self.adapter, self.out))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """An adapter of any method, to turn into one of another method.

    Args:
        adapter: its directory, or that of a run.
        method: the new method.
        out: directory to write.
        diagonal_s: for stella, S as a diagonal.
        model: directory of its base, to check and compare logits.
        overwrite: replace an adapter in `out`.

    Raises:
        InputError: all problems, in one message.
    """

    adapter: Path | None = setting(
        None, "directory of an adapter, or of a run with one", positional=True
    )
    method: str | None = setting(
        None, f"the new method: {', '.join(METHODS)}", name="to"
    )
    out: Path | None = setting(None, "directory to write")
    diagonal_s: bool = setting(False, "of stella, S as a diagonal")
    model: Path | None = setting(
        None, "Hugging Face directory of its base, to check and compare logits"
    )
    overwrite: bool = setting(False, "replace an adapter in --out")

    def __post_init__(self):
        problems = _missing("convert", self.adapter, self.out)
        if self.method is None:
            problems.append(f"convert needs --to, one of {', '.join(METHODS)}")
        else:
            try:
                check_method(self.method)
            except InputError as error:
                problems.append(f"--to: {error}")
        if self.diagonal_s and self.method != "stella":
            problems.append(
                f"--diagonal-s and --to {self.method} exclude each other: it goes with "
                "stella"
            )
        validate(self, problems)


def _missing(command: str, adapter: Path | None, out: Path | None) -> list[str]:
    needed = {"ADAPTER, the directory of an adapter": adapter,
              "--out, the directory to write": out}  # fmt: skip
    return [f"{command} needs {what}" for what, path in needed.items() if path is None]
