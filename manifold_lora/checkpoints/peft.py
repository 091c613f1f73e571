"""Adapters in PEFT's format: what Hugging Face, vLLM and llama.cpp read.

`adapter_writer.py` writes the files, and `adapter_file.py` reads them.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from manifold_lora.adapters.attach import (
    adapter_class,
    adapters,
    check_bare,
    full_names,
    install,
    projections,
)
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.adapters.options import inits
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    adapter_settings,
    read_adapter,
)
from manifold_lora.checkpoints.adapter_writer import (
    CONFIG,
    EXTRA,
    FACTORS,
    WEIGHTS,
    Exported,
    Format,
    write_files,
)
from manifold_lora.checkpoints.atomic import atomic_directory
from manifold_lora.checkpoints.card import CARD, model_card
from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.processes import is_main
from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from manifold_lora.models.quantised import base_dtype_of


def save_adapter(
    model: Llama,
    path: str | os.PathLike[str],
    *,
    base_id: str | None = None,
    format: Format = "portable",
    license: str | None = None,
) -> None:
    """Write the model's adapter as a PEFT LoRA directory, replacing an older one.

    ΔW = s B Aᵀ becomes lora_A = Aᵀ (r, in) and lora_B = s B (out, r) in float32, with
    `lora_alpha = r`, so that every loader computes the same; of U S Vᵀ, B is U S and A
    is V. DoRA becomes PEFT's DoRA. `load_adapter` restores the factors bit for bit:
    where they do not follow from A and B, factors.safetensors holds them as well. The
    directory appears complete or not at all, and is read back and compared before it
    replaces an older one. With several processes all must call it; the first one
    writes.

    Args:
        model: a model with adapters.
        path: the directory to write.
        base_id: name or path of the base model, for `base_model_name_or_path`.
        format: "portable", or "peft" for s as `lora_alpha`, `use_rslora` and patterns,
            which SGLang and llama.cpp scale by in part only.
        license: of the adapter, for its model card, README.md.

    Raises:
        InputError: the model has no adapters, or one with diagonal scaling, for which
            PEFT has no form; or `path` holds other files, which would be deleted.
        OSError: the files cannot be written; an older adapter is then untouched.
    """
    adapted = adapters(model)
    if not adapted:
        raise InputError("The model has no adapter to save: attach one first.")
    config = next(iter(adapted.values())).config
    if config.merge_only:
        raise InputError(
            "An adapter with diagonal scaling, D₁ W D₂ + ΔW, is not a low-rank update "
            "and has no form in PEFT: merge it and save the model, or train without "
            "diagonal scaling."
        )
    check_replaceable(Path(path))
    modules = {
        full: module
        for name, adapter in adapted.items()
        for full, module in _exported(model, name, adapter)
    }
    peft = {
        "target_modules": _targets(model, adapted),
        "base_model_name_or_path": base_id,
        "lora_dropout": config.dropout,
        "use_dora": config.options.export == "DoRA",
        "use_rslora": config.rslora,
    }
    base_dtype = base_dtype_of(model)
    settings = adapter_settings(config, fingerprint(model), base_dtype)
    if not is_main():
        return
    with atomic_directory(path) as partial:
        write_files(partial, modules, peft, settings, format)
        rank = max(module.rank for module in modules.values())
        text = model_card(config, base_id, rank, base_dtype=base_dtype, license=license)
        (partial / CARD).write_text(text, encoding="utf-8")
        for stray in Path(path).glob(".*"):  # such as .DS_Store
            (shutil.copytree if stray.is_dir() else shutil.copy2)(
                stray, partial / stray.name
            )


def _exported(
    model: Llama, name: str, adapter: LowRankLinear
) -> Iterator[tuple[str, Exported]]:
    """What is exported of every adapted layer, with its full name."""
    layers = zip(
        full_names(model, name), adapter.ranks, adapter.alphas, adapter.export(),
        adapter.arrays(), strict=True,
    )  # fmt: skip
    for full, rank, alpha, tensors, factors in layers:
        if rank:
            # A fixed correction doubles the rank, and must not halve the scale.
            times = tensors["lora_A.weight"].shape[0] // rank
            wide = alpha * (times**0.5 if adapter.config.rslora else times)
            scale = adapter.config.scale(rank, alpha)
            yield full, Exported(tensors, scale, wide, factors)


def _targets(model: Llama, adapted: dict[str, LowRankLinear]) -> list[str]:
    """The target_modules of PEFT: short names where every layer is adapted."""
    targets = []
    for name, adapter in adapted.items():
        if all(adapter.ranks):
            targets.append(name.rpartition(".")[2])
        else:
            pairs = zip(full_names(model, name), adapter.ranks, strict=True)
            targets += [full for full, rank in pairs if rank]
    return targets


def check_replaceable(path: Path) -> None:
    """Only an adapter may be replaced, whose directory holds these files alone."""
    if path.exists():
        files = {path.name} if path.is_file() else set(os.listdir(path))
        files = {name for name in files if not name.startswith(".")}
        if others := files - {CONFIG, WEIGHTS, EXTRA, FACTORS, CARD}:
            raise InputError(
                f"{path} exists and is not an adapter (it holds "
                f"{', '.join(sorted(others))}): choose another directory."
            )


def fingerprint(model: Llama, version: int = 2) -> str:
    """Identify the weights of a base, by a hash of some of all of them.

    Of every projection eight rows, of the embedding the first 64, and the norms: not
    all weights, which would take minutes. Rounded to bfloat16, of a quantised
    projection before it was quantised, so that it does not depend on the dtypes the
    model was loaded in.

    Args:
        model: with or without adapters.
        version: 1 gives that of earlier files, which does not cover the projections.
    """
    layers = model.layers
    parts = [
        model.norm.scale[...],
        layers.input_layernorm.scale[...],
        layers.post_attention_layernorm.scale[...],
        model.embed_tokens.sample(),
    ]
    if version > 1:
        for _, parent, attribute in projections(model):
            parts.append(_base(getattr(parent, attribute)).sample())
    return fingerprint_of(map(to_host, parts), version)


def fingerprint_of(parts: Iterable[np.ndarray], version: int = 2) -> str:
    """The hash of the weights that `fingerprint` chooses."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.astype(ml_dtypes.bfloat16).tobytes())
    return f"{version}:" * (version > 1) + digest.hexdigest()[:16]


def _base(module: Any) -> Any:
    """The linear layer of a projection, inside of its adapter if it has one."""
    if isinstance(module, ScaledLinear):
        module = module.adapter
    return module.base if isinstance(module, LowRankLinear) else module


def load_adapter(
    model: Llama, path: str | os.PathLike[str], *, check_base: bool = True
) -> None:
    """Attach the adapter of a directory to a model without one, in place.

    Reads what `save_adapter`, PEFT (LoRA and DoRA, with rsLoRA and patterns) or StelLA
    wrote. What `save_adapter` wrote comes back as the method it was trained with and
    can be trained on; PEFT's becomes "lora" or "dora", StelLA's "stella". Layers that
    the file leaves out stay as they are.

    Args:
        model: a model without adapters.
        path: the directory.
        check_base: refuse an adapter of this library that was trained on other
            weights than the model's, or on these stored otherwise (`base_dtype`).

    Raises:
        InputError: the model has adapters already, the adapter belongs to another
            base, or what `read_adapter` refuses.
    """
    check_bare(model)
    file = read_adapter(path, linear_sizes(model))
    version = 2 if file.base is None or ":" in file.base else 1
    if check_base and file.base not in (None, needed := fingerprint(model, version)):
        raise InputError(
            f"The adapter in {path} was trained on another base: its fingerprint is "
            f"{file.base}, this model's is {needed}. Load it into the base it was "
            "trained on, or use it here all the same with check_base=False."
        )
    base_dtype = base_dtype_of(model)
    if check_base and file.base is not None and file.base_dtype != base_dtype:
        needed = file.base_dtype or "its own type, without --base-dtype"
        raise InputError(
            f"The adapter in {path} was trained on the base in {needed}, and this one "
            f"is in {base_dtype or 'its own type'}. Load the base so (--base-dtype), "
            "or merge the adapter (manifold-lora merge), which is exact, or use it "
            "here all the same with check_base=False."
        )
    install_adapter(model, file)


def linear_sizes(model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every projection of a `Llama`, by full name."""
    sizes = {}
    for name, parent, attribute in projections(model):
        linear = getattr(parent, attribute)
        for full in full_names(model, name):
            sizes[full] = (linear.in_features, linear.out_features)
    return sizes


def install_adapter(model: Llama, file: AdapterFile) -> None:
    """Attach an adapter that has been read and fits the model, in place."""
    made = [
        (parent, attribute, _adapter(model, name, getattr(parent, attribute), file))
        for name, parent, attribute in projections(model)
        if any(full in file.modules for full in full_names(model, name))
    ]
    for parent, attribute, adapter in made:
        install(parent, attribute, adapter)


def _adapter(model: Llama, name: str, linear: Any, file: AdapterFile) -> LowRankLinear:
    """The adapter of one projection, from its layers in the file."""
    cls = adapter_class(file.method)
    modules = [file.modules.get(full) for full in full_names(model, name)]
    present = next(module.factors for module in modules if module is not None)
    # The default initialisation is cheap: others need the SVD of the kernel.
    options = dataclasses.replace(file.config.options, init=inits(file.method)[0])
    plain = dataclasses.replace(file.config, options=options)
    layers: list[dict[str, np.ndarray]] = []
    for layer, module in enumerate(modules):
        if module is not None:
            layers.append(module.factors)
        else:  # no column of these is kept: only an array without columns matters
            init = partial(cls.init, jax.random.key(0), rank=1, config=plain)
            initial = linear.map_kernel(lambda kernel: init(kernel[layer]))  # noqa: B023
            layers.append(present | {k: np.asarray(x) for k, x in initial.items()})
    return cls(
        linear,
        file.config,
        ranks=[0 if module is None else module.rank for module in modules],
        alphas=[1.0 if module is None else module.alpha for module in modules],
        arrays={key: [arrays[key] for arrays in layers] for key in present},
    )
