"""The configurations of merge, import and convert."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from manifold_lora.errors import InputError
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
