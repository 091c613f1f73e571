"""Adapters in PEFT's format: what Hugging Face, vLLM and llama.cpp read.

Only keys that every PEFT since 0.7 accepts are written, the rest only where they are
used; `adapter_file.py` says what stands beside them, and reads it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

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
    CONFIG,
    EXTRA,
    FACTORS,
    WEIGHTS,
    AdapterFile,
    adapter_settings,
    read_adapter,
)
from manifold_lora.checkpoints.atomic import atomic_directory, save_tensors
from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.processes import is_main
from manifold_lora.errors import InputError
from manifold_lora.models import Llama


def save_adapter(
    model: Llama, path: str | os.PathLike[str], *, base_id: str | None = None
) -> None:
    """Write the model's adapter as a PEFT LoRA directory, replacing an older one.

    ΔW = s B Aᵀ becomes lora_A = Aᵀ (r, in) and lora_B = B (out, r) in float32; of
    U S Vᵀ, B is U S and A is V. DoRA becomes PEFT's DoRA. `load_adapter` restores the
    factors bit for bit: a method that has others than A and B keeps them in
    factors.safetensors as well. The directory appears complete or not at all, and is
    read back and compared before it replaces an older one. With several processes all
    must call it; the first one writes.

    Args:
        model: a model with adapters.
        path: the directory to write.
        base_id: name or path of the base model, for `base_model_name_or_path`.

    Raises:
        InputError: the model has no adapters, or one with diagonal scaling, for which
            PEFT has no form; or `path` holds other files, which would be deleted.
        OSError: the files cannot be written; an older adapter is then untouched.
    """
    modules = adapters(model)
    if not modules:
        raise InputError("The model has no adapter to save: attach one first.")
    config = next(iter(modules.values())).config
    if config.merge_only:
        raise InputError(
            "An adapter with diagonal scaling, D₁ W D₂ + ΔW, is not a low-rank update "
            "and has no form in PEFT: merge it and save the model, or train without "
            "diagonal scaling."
        )
    _check_replaceable(Path(path))
    tensors: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    ranks: dict[str, dict[str, int]] = {}  # of the file, by module and full name
    for name, module in modules.items():
        ranks[name] = {}
        own = module.arrays() if set(module.names) != {"a", "b"} else None
        exported = module.export()
        for layer, full in enumerate(full_names(model, name)):
            if not module.ranks[layer]:
                continue
            parts = exported[layer]
            ranks[name][full] = parts["lora_A.weight"].shape[0]
            tensors |= {f"base_model.model.{full}.{k}": x for k, x in parts.items()}
            if own is not None:
                factors |= {f"{full}.{k}": x for k, x in own[layer].items()}
    settings = adapter_settings(config) | {"base": fingerprint(model)}
    if not is_main():
        return
    with atomic_directory(path) as partial:
        texts = {CONFIG: _peft_config(modules, ranks, base_id), EXTRA: settings}
        for file, content in texts.items():
            text = json.dumps(content, indent=2) + "\n"
            (partial / file).write_text(text, encoding="utf-8")
        for file, content in ((WEIGHTS, tensors), (FACTORS, factors)):
            if content:
                save_tensors(content, partial / file)
                _check_written(content, partial / file)
        for stray in Path(path).glob(".*"):  # such as .DS_Store
            (shutil.copytree if stray.is_dir() else shutil.copy2)(
                stray, partial / stray.name
            )


def _check_written(tensors: dict[str, np.ndarray], file: Path) -> None:
    written = load_file(file)
    if not all(tensors[key].tobytes() == written[key].tobytes() for key in tensors):
        raise OSError(f"{file.name} read back differs from what was written")


def _check_replaceable(path: Path) -> None:
    """Only an adapter may be replaced, whose directory holds these files alone."""
    if path.exists():
        files = {path.name} if path.is_file() else set(os.listdir(path))
        files = {name for name in files if not name.startswith(".")}
        if others := files - {CONFIG, WEIGHTS, EXTRA, FACTORS, "README.md"}:
            raise InputError(
                f"{path} exists and is not an adapter (it holds "
                f"{', '.join(sorted(others))}): choose another directory."
            )


def fingerprint(model: Llama, version: int = 2) -> str:
    """Identify the weights of a base, by a hash of some of all of them.

    Of every projection eight rows, of the embedding the first 64, and the norms: not
    all weights, which would take minutes. Rounded to bfloat16, so that it does not
    depend on the dtype the model was loaded in.

    Args:
        model: with or without adapters.
        version: 1 gives that of earlier files, which does not cover the projections.
    """
    layers = model.layers
    parts = [
        model.norm.scale[...],
        layers.input_layernorm.scale[...],
        layers.post_attention_layernorm.scale[...],
        model.embed_tokens[...][:64],
    ]
    if version > 1:
        for _, parent, attribute in projections(model):
            kernel = _base(getattr(parent, attribute)).kernel[...]
            parts.append(kernel[:, :: -(-kernel.shape[1] // 8)])
    digest = hashlib.sha256()
    for part in parts:
        digest.update(to_host(part).astype(ml_dtypes.bfloat16).tobytes())
    return f"{version}:" * (version > 1) + digest.hexdigest()[:16]


def _base(module: Any) -> Any:
    """The linear layer of a projection, inside of its adapter if it has one."""
    if isinstance(module, ScaledLinear):
        module = module.adapter
    return module.base if isinstance(module, LowRankLinear) else module


def _peft_config(
    modules: dict[str, LowRankLinear],
    ranks: dict[str, dict[str, int]],
    base_id: str | None,
) -> dict[str, Any]:
    config = next(iter(modules.values())).config
    written: dict[str, tuple[int, float]] = {}  # rank and alpha by full name
    targets, names = set(), {}
    for name, module in modules.items():
        layers = [layer for layer, rank in enumerate(module.ranks) if rank]
        for layer, (full, rank) in zip(layers, ranks[name].items(), strict=True):
            times = rank // module.ranks[layer]
            # A fixed correction doubles the rank, and must not halve the scale.
            alpha = module.alphas[layer] * (times**0.5 if config.rslora else times)
            written[full] = (rank, alpha)
        complete = len(layers) == len(module.ranks)
        targets |= {name.rpartition(".")[2]} if complete else set(ranks[name])
        alike = complete and len({written[full] for full in ranks[name]}) == 1
        names |= {full: name if alike else full for full in ranks[name]}
    rank, alpha = (
        Counter(column).most_common(1)[0][0]
        for column in zip(*written.values(), strict=True)
    )
    optional = {
        "use_dora": config.options.export == "DoRA",
        "use_rslora": config.rslora,
        "rank_pattern": {names[f]: r for f, (r, _) in written.items() if r != rank},
        "alpha_pattern": {names[f]: a for f, (_, a) in written.items() if a != alpha},
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(targets),
    } | {key: value for key, value in optional.items() if value}


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
            weights than the model's.

    Raises:
        InputError: the model has adapters already, the adapter belongs to another
            base, or what `read_adapter` refuses.
    """
    check_bare(model)
    sites = {name: (parent, at) for name, parent, at in projections(model)}
    sizes = {}
    for name, (parent, attribute) in sites.items():
        linear = getattr(parent, attribute)
        for full in full_names(model, name):
            sizes[full] = (linear.in_features, linear.out_features)
    file = read_adapter(path, sizes)
    version = 2 if file.base is None or ":" in file.base else 1
    if check_base and file.base not in (None, needed := fingerprint(model, version)):
        raise InputError(
            f"The adapter in {path} was trained on another base: its fingerprint is "
            f"{file.base}, this model's is {needed}. Load it into the base it was "
            "trained on, or use it here all the same with check_base=False."
        )
    made = [
        (parent, attribute, _adapter(model, name, getattr(parent, attribute), file))
        for name, (parent, attribute) in sites.items()
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
            kernel = linear.kernel[...][layer].astype(np.float32)
            initial = cls.init(jax.random.key(0), kernel, 1, plain)
            layers.append(present | {k: np.asarray(x) for k, x in initial.items()})
    return cls(
        linear,
        file.config,
        ranks=[0 if module is None else module.rank for module in modules],
        alphas=[1.0 if module is None else module.alpha for module in modules],
        arrays={key: [arrays[key] for arrays in layers] for key in present},
    )
