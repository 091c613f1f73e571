"""Write adapters of this library without a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    adapter_settings,
    read_adapter,
)
from manifold_lora.checkpoints.adapter_writer import CONFIG, Exported, write_files
from manifold_lora.checkpoints.atomic import atomic_directory
from manifold_lora.checkpoints.card import CARD, model_card
from manifold_lora.conversion.updates import MAGNITUDE, relative_difference, updates
from manifold_lora.errors import InputError

# Of the updates as they are read back: one rounding of every number to float32.
_TOLERANCE = 1e-6


def check_output(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise `InputError` unless a directory may be written.

    Args:
        out: the directory.
        overwrite: whether a model or an adapter in it may be replaced.
        inputs: what is read, which must not be replaced.
    """
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--out {out} would replace {path}: choose another.")
        if out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--out {out} is inside {path}: choose another.")
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file: choose a directory.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not overwrite:
        raise InputError(f"--out {out} exists: choose another, or add --overwrite.")
    if not names & {"config.json", CONFIG}:
        raise InputError(
            f"--out {out} holds neither a model nor an adapter: --overwrite does not "
            "replace it. Choose another."
        )


def check_output_file(out: Path, overwrite: bool, magic: bytes) -> None:
    """Raise `InputError` unless a file may be written.

    Args:
        out: the file.
        overwrite: whether a file of its kind may be replaced.
        magic: with which files of its kind begin.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_file():
        raise InputError(f"--out {out} is no file: choose another.")
    if not overwrite:
        raise InputError(f"--out {out} exists: choose another, or add --overwrite.")
    with out.open("rb") as stream:
        if stream.read(len(magic)) != magic:
            raise InputError(
                f"--out {out} is no {magic.decode()} file: --overwrite does not "
                "replace it. Choose another."
            )


def write_adapter(path: Path, adapter: AdapterFile) -> float:
    """Write an adapter as `save_adapter` does, and read it back.

    Args:
        path: the directory, which appears complete or not at all.
        adapter: of any method.

    Returns:
        The largest relative difference of ΔW as it is read back.

    Raises:
        OSError: the files cannot be written, or read back as something else.
    """
    config = adapter.config
    modules = {}
    for full, update in updates(adapter).items():
        tensors = {
            "lora_A.weight": np.ascontiguousarray(update.a),
            "lora_B.weight": np.ascontiguousarray(update.b),
        }
        if update.magnitude is not None:
            tensors[MAGNITUDE] = update.magnitude
        rank = len(update.a)
        alpha = update.scale * (rank**0.5 if config.rslora else rank)
        own = adapter.modules[full].factors
        # safetensors writes the bytes of a transposed array in their order in memory.
        factors = {name: np.ascontiguousarray(x) for name, x in own.items()}
        modules[full] = Exported(tensors, update.scale, alpha, factors)
    settings = adapter_settings(config, adapter.base, adapter.base_dtype)
    peft = {
        "target_modules": list(modules),
        "base_model_name_or_path": adapter.peft.get("base_model_name_or_path"),
        "lora_dropout": config.dropout,
        "use_dora": config.options.export == "DoRA",
        "use_rslora": config.rslora,
    }
    with atomic_directory(path) as partial:
        write_files(partial, modules, peft, settings, "portable")
        text = model_card(
            config,
            peft["base_model_name_or_path"],
            max(module.rank for module in modules.values()),
            base_dtype=adapter.base_dtype,
        )
        (partial / CARD).write_text(text, encoding="utf-8")
        read = updates(read_adapter(partial))
        difference = relative_difference(updates(adapter), read)
        if not difference < _TOLERANCE:
            raise OSError(f"{path} reads back with ΔW apart by {difference:.1e}")
    return difference
