"""Turn adapters into adapters of other methods with the same ΔW."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.adapters.options import adapter_class
from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    ModuleFactors,
    adapter_directory,
    read_adapter,
)
from manifold_lora.console import make_console, print_text
from manifold_lora.conversion.base import Base
from manifold_lora.conversion.combine import factorised, fitting
from manifold_lora.conversion.config import ConvertConfig
from manifold_lora.conversion.probe import compare_logits
from manifold_lora.conversion.updates import (
    MAGNITUDE,
    Update,
    relative_difference,
    updates,
)
from manifold_lora.conversion.write import check_output, write_adapter
from manifold_lora.distributed.mesh import all_devices
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS

# A singular value below this share of the largest is not of full rank in float32.
_RANK_TOLERANCE = 1e-6
_DORA = ("dora", "stiefel_dora")


def convert_adapter(
    config: ConvertConfig, console: Console | None = None
) -> dict[str, Any]:
    """Turn an adapter into one of another method with the same ΔW.

    By QR or the singular values of the product, in float64: the new factors are on the
    manifolds of the method and `train --adapter` continues from them. Rank, scale,
    targets and dropout stay. To give an adapter to another tool, use `export`.

    Args:
        config: what to convert, and into what.
        console: where it is reported.

    Returns:
        `out`, `method`, `modules`, their number, `largest_update_difference`, relative
        to ΔW, and `largest_logit_difference`, None without a base.

    Raises:
        InputError: the method cannot hold the adapter, or it cannot be read.
        OSError: the files cannot be written, or read back as something else.
    """
    console = console or make_console()
    all_devices()  # reports a platform that is not there
    assert config.adapter is not None and config.out is not None  # ConvertConfig
    assert config.method is not None
    path = adapter_directory(config.adapter)
    check_output(config.out, config.overwrite, [path])
    base = None if config.model is None else Base.open(config.model)
    source = read_adapter(path) if base is None else base.read_adapter(path)
    new = converted(source, config.method, diagonal_s=config.diagonal_s)
    write_adapter(config.out, new)
    return report(console, config.out, source, base)


def report(
    console: Console, out: Path, source: AdapterFile, base: Base | None
) -> dict[str, Any]:
    """Read an adapter back, and show how far it is from the one it was made of.

    Returns:
        What `convert_adapter` returns.
    """
    read = read_adapter(out)
    difference = relative_difference(updates(source), updates(read))
    logits = None
    if base is not None:
        with console.status("Comparing logits", spinner="line"):  # ASCII
            logits = compare_logits(base.with_adapter(source), base.with_adapter(read))
    result = {
        "out": str(out),
        "method": read.method,
        "modules": len(read.modules),
        "largest_update_difference": difference,
        "largest_logit_difference": logits and logits.largest,
    }
    print_text(console, f"Wrote {out} ({read.method}, {len(read.modules)} modules).")
    print_text(
        console, f"Read back, ΔW differs by at most {difference:.1e} of its size."
    )
    if logits is not None:
        print_text(
            console,
            f"Logits of a probe batch differ by at most {logits.largest:.1e} (largest "
            f"logit {logits.logits:.1f}).",
        )
    return result


def converted(
    adapter: AdapterFile, method: str, *, diagonal_s: bool = False
) -> AdapterFile:
    """The adapter of another method with the same ΔW.

    Args:
        adapter: of any method.
        method: the new one.
        diagonal_s: for stella, S as a diagonal.

    Returns:
        The new adapter, whose factors are rounded once to float32.

    Raises:
        InputError: the method cannot hold it; the message names those that can.
    """
    _check_dora(adapter, method)
    options = {"diagonal_s": True} if diagonal_s else {}
    pairs = {full: fitting(update) for full, update in updates(adapter).items()}
    if method == "loram_fr":
        _check_full_rank(pairs)
    settings: dict[str, tuple[int, float]] = {}
    for full, update in pairs.items():
        own, rank = adapter.modules[full], len(update.a)
        alpha = own.alpha
        if rank != own.rank:  # the same s = alpha/r, or alpha/√r
            root = adapter.config.rslora
            alpha = float(f"{update.scale * (rank**0.5 if root else rank):.12g}")
        settings[full] = rank, int(alpha) if alpha == int(alpha) else alpha
    rank, alpha = (
        Counter(column).most_common(1)[0][0]
        for column in zip(*settings.values(), strict=True)
    )
    config = AdapterConfig(
        method,
        options,
        rank=rank,
        alpha=alpha,
        rslora=adapter.config.rslora,
        dropout=adapter.config.dropout,
        targets=adapter.config.targets,
        rank_pattern={full: r for full, (r, _) in settings.items() if r != rank},
        alpha_pattern={full: a for full, (_, a) in settings.items() if a != alpha},
    )
    modules = {
        full: _module(method, config, update, *settings[full])
        for full, update in pairs.items()
    }
    return adapter._replace(method=method, config=config, modules=modules)


def _check_dora(adapter: AdapterFile, method: str) -> None:
    """DoRA's lengths are of W + ΔW, which the files of an adapter do not hold."""
    if adapter.method in _DORA and method not in _DORA:
        raise InputError(
            f"{method} cannot hold {adapter.method}, which scales the rows of W + ΔW "
            f"to lengths of its own: convert it to {' or '.join(_DORA)}, or merge it."
        )
    if method in _DORA and adapter.method not in _DORA:
        others = ", ".join(name for name in METHODS if name not in _DORA)
        raise InputError(
            f"{method} needs the lengths of W + ΔW, which follow from the base and not "
            f"from {adapter.method}: convert it to one of {others}."
        )


def _check_full_rank(pairs: dict[str, Update]) -> None:
    def share(update: Update) -> float:
        sigma = factorised(update).sigma
        return sigma[-1] / sigma[0] if sigma[0] else 0.0

    low = [full for full, update in pairs.items() if share(update) < _RANK_TOLERANCE]
    if low:
        shown = ", ".join(low[:4]) + f" and {len(low) - 4} more" * (len(low) > 4)
        raise InputError(
            f"loram_fr needs ΔW of full rank, S being regular, but that of {shown} has "
            "a lower rank than its factors: convert it to loram_br, whose rank may be "
            "lower, or to stella, stiefel, landing_stiefel, landing_oblique or lora."
        )


def _module(
    method: str, config: AdapterConfig, update: Update, rank: int, alpha: float
) -> ModuleFactors:
    factors = {
        name: np.ascontiguousarray(x, np.float32)
        for name, x in _factors(method, config, update).items()
    }
    product = adapter_class(method).product
    a, b = map(np.asarray, product(jax.tree.map(jnp.asarray, factors)))
    declared = adapter_class(method).factors(config)
    manifolds = {name: f.manifold for name, f in declared.items() if f.trained}
    return ModuleFactors(a, b, update.scale, factors, manifolds, rank, alpha)


def _factors(
    method: str, config: AdapterConfig, update: Update
) -> dict[str, np.ndarray]:
    """The factors of a method whose product is B A, in float64."""
    a, b = update.a.T.astype(np.float64), update.b.astype(np.float64)
    if method in ("lora", "dora"):
        factors = {"a": a, "b": b}
    elif method in ("stiefel", "stiefel_dora", "landing_stiefel"):
        q, r = np.linalg.qr(b)
        factors = {"a": a @ r.T, "b": q}
    elif method == "landing_oblique":
        factors = _with_unit_columns(a, b)
    elif method == "loram_br":
        q, r = np.linalg.qr(a)
        factors = {"a": b @ r.T, "v": q}
    else:  # stella and loram_fr: U S Vᵀ
        u, sigma, v = factorised(update._replace(scale=1.0))
        diagonal = getattr(config.options, "diagonal_s", False)
        factors = {"u": u, "s": sigma if diagonal else np.diag(sigma), "v": v}
    if update.magnitude is not None:
        name = next(
            name
            for name, factor in adapter_class(method).factors(config).items()
            if factor.peft == MAGNITUDE
        )
        factors[name] = update.magnitude
    return factors


def _with_unit_columns(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of b of length 1, and a times their lengths."""
    lengths = np.linalg.norm(b, axis=0)
    axes = np.eye(len(b), len(lengths))  # any directions for columns that are zero
    zero = lengths == 0
    directions = np.where(zero, axes, b / np.where(zero, 1.0, lengths))
    return {"a": a * lengths, "b": directions}
