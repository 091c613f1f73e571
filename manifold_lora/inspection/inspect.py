"""What the factors of an adapter look like: as tables, as JSON and as pictures.

Works from the files alone, without the base model, on adapters of this library, of
PEFT and of StelLA.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from manifold_lora.adapters.diagnostics import (
    USED,
    column_cosines,
    core,
    effective_rank,
    gram,
    largest_weights,
    principal_angles,
    singular_values,
    stable_rank,
    used_rank,
)
from manifold_lora.errors import InputError
from manifold_lora.inspection.view import draw, show
from manifold_lora.manifolds import Euclidean, Manifold

if TYPE_CHECKING:
    from manifold_lora.checkpoints.adapter_file import AdapterFile, ModuleFactors

NUMBERS = "inspect.json"
# Over layers, the worst is what counts of these, and the mean of all others.
_WORST = ("residual", "cosine_max", "angle_largest")
# In the order of the computation; files have them in that of the alphabet.
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_FACTORS = "abusv"


class Place(NamedTuple):
    """Where an adapter is, where it started, and where its report goes."""

    adapter: Path
    start: Path | None
    out: Path


def inspect_adapter(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure an adapter, show tables, and write inspect.json and three pictures.

    Args:
        path: a run, or the directory of an adapter of this library, PEFT or StelLA.
        out: where to write; None: inspect/ in the run, or beside a lone adapter
            under its name with -inspect added.
        console: to show the tables on.

    Returns:
        What inspect.json holds, as described at `measure`, with the paths.

    Raises:
        InputError: there is no adapter, it or its start cannot be read, it has numbers
            that are not finite, or `out` is a file or inside the adapter.
    """
    from manifold_lora.checkpoints.adapter_file import read_adapter

    console = console or Console()
    place = locate(Path(path), None if out is None else Path(out))
    adapter = read_adapter(place.adapter)
    start = None if place.start is None else read_adapter(place.start)
    paths = {
        "adapter": str(place.adapter),
        "start": None if place.start is None else str(place.start),
    }
    with console.status("Measuring"):
        report = paths | measure(adapter, start)
    place.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (place.out / NUMBERS).write_text(text, encoding="utf-8")
    grams = {
        name: {key: gram(x) for key, x in matrices(module).items()}
        for name, module in adapter.modules.items()
    }
    pictures = draw(place.out, report, grams)
    show(console, report)
    files = ", ".join(str(place.out / name) for name in (NUMBERS, *pictures))
    console.print(f"Written: {files}", markup=False, soft_wrap=True)
    return report


def locate(path: Path, out: Path | None = None) -> Place:
    """Find the adapter and its start from the path of a run or of an adapter.

    Raises:
        InputError: nothing is there, or `out` will not do.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: give the directory of an adapter or a run.")
    is_run = (path / "adapter").is_dir()
    if not is_run and (path / "config.toml").is_file():
        raise InputError(
            f"{path} is a run without an adapter/: train it first, or give the "
            "directory of an adapter."
        )
    adapter = path / "adapter" if is_run else path
    # Only a run's own start/ belongs to the adapter; any other may be anything.
    parent = path if is_run else path.resolve().parent
    in_run = is_run or (parent / "config.toml").is_file()
    start = parent / "start" if in_run and (parent / "start").is_dir() else None
    if out is None:
        name = adapter.resolve().name
        own = in_run and name == "adapter"
        out = parent / ("inspect" if own else f"{name}-inspect")
    if out.is_file():
        raise InputError(f"--out {out} is a file: choose a directory.")
    if out.resolve().is_relative_to(adapter.resolve()):
        raise InputError(
            f"--out {out} is inside the adapter, whose directory vLLM and PEFT read: "
            "choose another."
        )
    return Place(adapter, start, out)


def measure(
    adapter: "AdapterFile", start: "AdapterFile | None" = None
) -> dict[str, Any]:
    """All numbers of an adapter, module by module, by kind of module, and in all.

    Of ΔW and of each factor that is a matrix (a vector S counts as a diagonal one):
    `rank_used` (`used_rank`), `effective_rank`, `stable_rank`, `singular_values`. Of ΔW
    its Frobenius norm and its largest entries. Of a factor, too: `residual`, the
    distance from its manifold; `cosine_mean`, `cosine_std`, `cosine_max`
    (`column_cosines`); `angle_mean`, `angle_largest`, between its column space now and
    at the start, in degrees. None where a number has no meaning: the residual of a free
    factor, cosines of one column, angles without a start, from zero, or of a square
    factor. ΔW of DoRA is the update of the direction.

    A kind is a module's name without its layer. Over layers, all are means, but
    residual, cosine_max and angle_largest are the largest.

    Args:
        adapter: as read from its file.
        start: the same adapter before the first step.

    Raises:
        InputError: numbers are not finite, or the start is not of this adapter.
    """
    _check_finite(adapter)
    modules: dict[str, Any] = {}
    for name in sorted(adapter.modules, key=_order):
        factors = adapter.modules[name]
        layer, kind = _layer_and_kind(name)
        before = {} if start is None else _start_factors(name, factors, start)
        modules[name] = {
            "layer": layer,
            "kind": kind,
            "rank": factors.rank,
            "scale": float(factors.scale),
            "delta_w": _update_numbers(factors),
            "factors": {
                key: _factor_numbers(x, factors.manifolds.get(key), before.get(key))
                for key, x in matrices(factors).items()
            },
        }
    kinds = dict.fromkeys(module["kind"] for module in modules.values())
    return {
        "method": adapter.method,
        "used_threshold": USED,
        "summary": _average(modules),
        "kinds": {
            kind: _average({n: m for n, m in modules.items() if m["kind"] == kind})
            for kind in kinds
        },
        "modules": modules,
    }


def _check_finite(adapter: "AdapterFile") -> None:
    bad = []
    for name, module in adapter.modules.items():
        parts = module.factors | {"ΔW": np.hstack([module.b.ravel(), module.scale])}
        wrong = [key for key, x in parts.items() if not np.isfinite(x).all()]
        if wrong:
            bad.append(f"{name}: {', '.join(wrong)}")
    if bad:
        raise InputError(
            f"{len(bad)} of {len(adapter.modules)} modules have numbers that are NaN "
            "or infinite:\n  "
            + "\n  ".join(bad[:8] + ["…"] * (len(bad) > 8))
            + "\nThe training diverged: take an earlier adapter, or train again with a "
            "lower --learning-rate."
        )


def _start_factors(
    name: str, module: "ModuleFactors", start: "AdapterFile"
) -> dict[str, np.ndarray]:
    """The module's matrices at the start, which must fit those of now."""
    before = matrices(start.modules[name]) if name in start.modules else {}
    for key, x in matrices(module).items():
        found = before[key].shape if key in before else "nothing"
        if key not in before or before[key].shape[0] != x.shape[0]:
            raise InputError(
                f"start/ is not the start of this adapter: {name} has {key} of shape "
                f"{x.shape} now and {found} there. Move start/ away, or copy the "
                "adapter out of the run."
            )
    return before


def _layer_and_kind(name: str) -> tuple[int | None, str]:
    """0, "self_attn.q_proj" of "model.layers.0.self_attn.q_proj"."""
    found = re.fullmatch(r"(.*?\.|)(\d+)\.(.+)", name)
    if found is None:
        return None, name
    prefix, layer, kind = found.groups()
    return int(layer), prefix.removeprefix("model.layers.") + kind


def _order(name: str) -> tuple[float, int, str]:
    layer, kind = _layer_and_kind(name)
    projection = kind.rpartition(".")[2].removesuffix("_proj")
    known = projection in _PROJECTIONS
    place = _PROJECTIONS.index(projection) if known else len(_PROJECTIONS)
    return math.inf if layer is None else layer, place, name


def matrices(module: "ModuleFactors") -> dict[str, np.ndarray]:
    """The factors that are matrices; a vector S is a diagonal, DoRA's m is none.

    Nor are A₀ and B₀ factors of their own, the fixed correction of some starts.
    """
    return {
        key: np.diag(x) if key == "s" and x.ndim == 1 else x
        for key, x in sorted(
            module.factors.items(), key=lambda item: _FACTORS.find(item[0])
        )
        if key == "s" or (x.ndim == 2 and key not in ("a0", "b0"))
    }


def _spectrum(x: np.ndarray) -> dict[str, Any]:
    return {
        "rank_used": int(used_rank(x)),
        "effective_rank": float(effective_rank(x)),
        "stable_rank": float(stable_rank(x)),
        "singular_values": singular_values(x).tolist(),
    }


def _update_numbers(module: "ModuleFactors") -> dict[str, Any]:
    b = module.scale * module.b.astype(np.float64)
    numbers = _spectrum(core(b, module.a))
    largest = largest_weights(b, module.a)
    return numbers | {
        "norm": math.hypot(*numbers["singular_values"]),
        "largest_weights": [weight._asdict() for weight in largest],
    }


def _factor_numbers(
    x: np.ndarray, manifold: Manifold | None, start: np.ndarray | None
) -> dict[str, Any]:
    residual = None
    if manifold is not None and not isinstance(manifold, Euclidean):
        residual = float(manifold.residual(jnp.asarray(x)))
    cosines = column_cosines(x)
    angles = np.zeros(0)
    # A square factor of full rank spans everything, at the start as now.
    if start is not None and x.shape[0] > x.shape[1]:
        angles = principal_angles(start, x)
    moved = angles.size > 0
    return {
        "manifold": "fixed" if manifold is None else type(manifold).__name__,
        "shape": list(x.shape),
        **_spectrum(x),
        "residual": residual,
        "cosine_mean": _number(cosines.mean),
        "cosine_std": _number(cosines.std),
        "cosine_max": _number(cosines.largest),
        "angle_mean": float(angles.mean()) if moved else None,
        "angle_largest": float(angles.max()) if moved else None,
    }


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x


def _average(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Several modules in one: means, and of `_WORST` the largest."""
    rows = list(modules.values())
    name, largest = max(
        ((name, m["delta_w"]["largest_weights"][0]) for name, m in modules.items()),
        key=lambda item: abs(item[1]["value"]),
    )
    where = {"module": name, "layer": modules[name]["layer"]}
    names = dict.fromkeys(key for row in rows for key in row["factors"])
    return {
        "modules": len(rows),
        "rank": _mean([row["rank"] for row in rows]),
        "delta_w": {
            key: _mean([row["delta_w"][key] for row in rows])
            for key in ("rank_used", "effective_rank", "stable_rank", "norm")
        }
        | {"largest_weight": where | largest},
        "factors": {
            name: _average_factor(
                [row["factors"][name] for row in rows if name in row["factors"]]
            )
            for name in names
        },
    }


def _average_factor(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    averaged: dict[str, Any] = {}
    for key in rows[0]:
        if key not in ("manifold", "shape", "singular_values"):
            known = [row[key] for row in rows if row[key] is not None]
            averaged[key] = max(known, default=None) if key in _WORST else _mean(known)
    return averaged


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
