"""Merge adapters into a model file by file, or combine them into one adapter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    adapter_directory,
    read_adapter,
)
from manifold_lora.checkpoints.atomic import atomic_directory
from manifold_lora.checkpoints.companions import copy_companions
from manifold_lora.checkpoints.model_files import INDEX, WEIGHTS, model_files
from manifold_lora.console import make_console, print_text
from manifold_lora.conversion.base import Base
from manifold_lora.conversion.combine import (
    Weighted,
    check_same_base,
    combined,
    ranks,
    truncated,
)
from manifold_lora.conversion.config import MergeConfig
from manifold_lora.conversion.convert import converted
from manifold_lora.conversion.probe import Difference, compare_logits
from manifold_lora.conversion.shards import Rows, rewrite
from manifold_lora.conversion.updates import Update, Updates, as_adapter
from manifold_lora.conversion.write import check_output, write_adapter
from manifold_lora.data.builtin import BASE
from manifold_lora.decoding import read_json
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.models.quantised import BaseDtype, rounded_rows

_CONFIG = "config.json"


def merge_files(config: MergeConfig, console: Console | None = None) -> dict[str, Any]:
    """Merge adapters into a model directory, or combine them into one adapter.

    Every weight is W + Σ wᵢ ΔWᵢ in float32, rounded once to the type it is stored in.
    W of adapters that were trained on a quantised base is that, de-quantised.
    The files are written in blocks of rows: neither the model nor one of its tensors is
    in memory at once. They are the base's: the same shards, index, tokenizer, chat
    template and generation files. The written model is read back and its logits are
    compared with those of the base with the adapters. For a model in memory use
    `merge` and `save_llama`.

    Args:
        config: what to merge, and where to write it.
        console: where it is reported.

    Returns:
        `out`, `modules`, their number, `ranks`, `energy_discarded`, the share of Σσ²
        that `rank` cuts off, `base_dtype`, what W was rounded to before,
        `largest_logit_difference` on a batch of random tokens, and `largest_logit`, for
        comparison; the last two are None for an adapter.

    Raises:
        InputError: an adapter cannot be read, is of another base or cannot be added,
            or `out` exists.
        OSError: a file cannot be read or written; `out` is then as it was before.
    """
    console = console or make_console()
    all_devices()  # reports a platform that is not there
    assert config.out is not None  # MergeConfig
    paths = [(adapter_directory(path), w) for path, w in config.weighted()]
    model = config.model or BASE
    inputs = [path for path, _ in paths] + [model] * (not config.as_adapter)
    check_output(config.out, config.overwrite, inputs)
    base = None if config.as_adapter else Base.open(model)
    read = read_adapter if base is None else base.read_adapter
    sources = [Weighted(path, read(path), weight) for path, weight in paths]
    check_same_base(sources)
    base_dtype = next((x for s in sources if (x := s.adapter.base_dtype)), None)
    sums, discarded = combined(sources), 0.0
    if config.rank is not None:
        sums, discarded = truncated(sums, config.rank)
    result: dict[str, Any] = {
        "out": str(config.out),
        "modules": len(sums),
        "ranks": ranks(sums),
        "energy_discarded": discarded,
        "base_dtype": base_dtype,
        "largest_logit_difference": None,
        "largest_logit": None,
    }
    (first, *others) = sources
    adapter = first.adapter  # by the code of its own method, if it is merged as it is
    if others or first.weight != 1 or config.rank is not None:
        adapter = as_adapter(sums)._replace(
            base=adapter.base, peft=adapter.peft, base_dtype=base_dtype
        )
        adapter = converted(adapter, adapter.method)  # with the patterns of its ranks
    if base is None:
        write_adapter(config.out, adapter)
    else:
        with console.status("Merging", spinner="line"):  # ASCII
            difference = _merge(base, sums, adapter, config.out, config.dtype)
        result["largest_logit_difference"] = difference.largest
        result["largest_logit"] = difference.logits
    _show(console, result, config)
    return result


def _merge(
    base: Base, sums: Updates, adapter: AdapterFile, out: Path, dtype: str | None
) -> Difference:
    """Write the merged model, and compare it with the base with the adapter."""
    with atomic_directory(out) as partial:
        _write_model(base, sums, partial, dtype, adapter.base_dtype)
        written = Base.open(partial)
        return compare_logits(base.with_adapter(adapter), written.with_adapter())


def _write_model(
    base: Base,
    sums: Updates,
    target: Path,
    dtype: str | None,
    base_dtype: BaseDtype | None,
) -> None:
    """The files of the merged model."""
    size = 0
    quantised = base.quantised(base_dtype)

    def change(name: str, rows: Rows, x: np.ndarray) -> np.ndarray:
        x = rounded_rows(x, quantised.get(name))
        return _merged(sums, name, rows, x)

    for file in model_files(base.path):
        size += rewrite(file, target / file.name, change, dtype)
    if not (base.path / WEIGHTS).is_file():
        index = read_json(base.path / INDEX)
        metadata = index.get("metadata")
        kept = metadata if isinstance(metadata, dict) else {}
        _write_json(target / INDEX, index | {"metadata": kept | {"total_size": size}})
    _write_json(target / _CONFIG, _model_config(base, dtype))
    copy_companions(base.path, target)


def _model_config(base: Base, dtype: str | None) -> dict[str, Any]:
    """The base's own config.json, with the keys of transformers 4 and of 5.

    Keys that say nothing of the forward pass, such as `use_cache`, stay as they are.
    """
    original = read_json(base.path / _CONFIG)
    embedding = base.tensors["model.embed_tokens.weight"].dtype.name
    stored = original.get("dtype") or original.get("torch_dtype") or embedding
    return original | base.model.config.to_hf(dtype or str(stored))


def _merged(sums: Updates, name: str, rows: Rows, x: np.ndarray) -> np.ndarray:
    """Some rows of a weight with their part of the update."""
    update = sums.get(name.removesuffix(".weight"))
    return x if update is None else merged_rows(update, rows, x)


def merged_rows(update: Update, rows: Rows, x: np.ndarray) -> np.ndarray:
    """W + s B A, of DoRA m ⊙ (W + s B A)/‖W + s B A‖, in at least float32.

    Args:
        update: of the weight.
        rows: first and end of those in x.
        x: rows of W, (rows, in).
    """
    wide = np.float64 if x.dtype == np.float64 else np.float32
    part = slice(*rows)
    b = wide(update.scale) * update.b[part].astype(wide)
    total = x.astype(wide) + b @ update.a.astype(wide)
    if update.magnitude is None:
        return total
    norm = np.linalg.norm(total, axis=1)
    gain = update.magnitude[part] / np.maximum(norm, np.finfo(wide).tiny)
    return gain[:, None] * total


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _show(console: Console, result: dict[str, Any], config: MergeConfig) -> None:
    what = f"{result['modules']} modules, ranks {', '.join(map(str, result['ranks']))}"
    print_text(console, f"Wrote {result['out']} ({what}).")
    if config.rank is not None:
        print_text(
            console,
            f"Truncation to rank {config.rank} discards "
            f"{result['energy_discarded']:.2e} of the energy Σσ².",
        )
    if not config.as_adapter and result["base_dtype"] is not None:
        print_text(
            console,
            f"The adapter was trained on the base in {result['base_dtype']}: the model "
            "is the de-quantised base with ΔW added, exact for that base.",
        )
    if (difference := result["largest_logit_difference"]) is not None:
        print_text(
            console,
            f"Read back, logits of a probe batch differ by at most {difference:.1e} "
            f"from those of the base with its adapter (largest logit "
            f"{result['largest_logit']:.1f}); weights are rounded to "
            f"{config.dtype or 'the types of the base'}.",
        )
