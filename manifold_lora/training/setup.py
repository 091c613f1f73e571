"""Build the model that a run needs, and check what its processes must share."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.adapters.diagnostics import effective_rank
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import fingerprint, load_adapter
from manifold_lora.configuration.flat import flatten
from manifold_lora.data.builtin import BASE
from manifold_lora.data.tokens import check_ids
from manifold_lora.distributed.arrays import shard_module, to_host
from manifold_lora.distributed.mesh import divisibility_errors
from manifold_lora.distributed.processes import check_identical, source_code
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.models.quantised import BLOCK
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.data import Data


def load_base(config: TrainConfig) -> Llama:
    """The base in the dtype of the run, without an adapter."""
    on_cpu = jax.default_backend() == "cpu"
    path, base_dtype = config.model.path or BASE, config.model.base_dtype
    dtype = config.model.dtype or ("float32" if on_cpu else "bfloat16")
    return load_llama(path, jnp.dtype(dtype), base_dtype)


def load_model(config: TrainConfig) -> Llama:
    """The base with a new adapter, or with the one to continue from."""
    model = load_base(config)
    if config.initial_adapter is None:
        attach(model, config.adapter, config.optimizer.seed)
        shard_module(model)
        return model
    load_adapter(model, config.initial_adapter)
    shard_module(model)
    for module in adapters(model).values():  # it has no part in what was trained before
        dropout = config.adapter.dropout
        module.config = dataclasses.replace(module.config, dropout=dropout)
    attached = next(iter(adapters(model).values())).config
    found, needed = _comparable(attached), _comparable(config.adapter)
    differing = [
        f"{name}: found {found.get(name)}, needed {needed.get(name)}"
        for name in found | needed
        if found.get(name) != needed.get(name)
    ]
    if differing:
        raise InputError(
            f"--adapter {config.initial_adapter} does not match the run "
            f"({'; '.join(differing)}). Leave these settings out, to continue with the "
            "adapter's, or leave out --adapter to start from a new one."
        )
    return model


def _comparable(config: AdapterConfig) -> dict[str, Any]:
    """The settings that an adapter and the run that continues it must share."""
    settings = dataclasses.asdict(config) | config.options.values("adapter")
    del settings["options"], settings["dropout"]
    return settings


def effective_ranks(model: Llama) -> list[float]:
    """The effective rank of B in ΔW = s B Aᵀ, adapted layer by adapted layer."""
    ranks: list[float] = []
    for module in adapters(model).values():
        _, b = module.pair()
        by_layer = effective_rank(to_host(b)).tolist()
        ranks += [x for x, rank in zip(by_layer, module.ranks, strict=True) if rank]
    return ranks


def check_mesh(config: TrainConfig, mesh: Any, model: LlamaConfig) -> None:
    """Raise `InputError` where the mesh does not divide the model or the batch."""
    rows = config.batch.batch_size // config.batch.accumulate
    block = 1 if config.model.base_dtype is None else BLOCK
    if errors := divisibility_errors(mesh.shape, model, rows, block):
        raise InputError("--mesh: " + "; ".join(errors) + ".")


def check_tokens(data: Data, stop: Sequence[int], rows: int, tokenizer: Any) -> None:
    """Raise `InputError` for a token that the embedding has no row for."""
    check_ids([*data.train, *data.held_out], rows, tokenizer)
    if beyond := [token for token in stop if token >= rows]:
        raise InputError(
            f"the stop token {tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id "
            f"{beyond[0]}, but the embedding of the model has {rows} rows: mend "
            "eos_token_id in config.json, generation_config.json or the tokenizer."
        )


def data_digest(data: Data) -> str:
    """A hash of all examples: of their tokens and of what is trained."""
    digest = hashlib.sha256()
    for example in [*data.train, *data.held_out]:
        digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
    return digest.hexdigest()[:16]


def identify(config: TrainConfig, model: Llama, data: Data) -> dict[str, Any]:
    """What must be the same for a run to resume, or to be called finished."""
    return {
        "method": config.adapter.method,
        "rank": config.adapter.rank,
        "base": fingerprint(model),
        "data": data_digest(data),
    }


def check_agreement(config: TrainConfig, data: Data) -> None:
    """Raise `InputError` if processes differ in settings, data or code."""
    settings = json.dumps(flatten(config), sort_keys=True)
    check_identical(
        {
            "configuration": settings.encode(),
            "data": data_digest(data).encode(),
            "code": source_code(),
        }
    )
