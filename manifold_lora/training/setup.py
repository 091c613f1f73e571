"""From a configuration to examples, a model with its adapter, and a number of steps."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.adapters.diagnostics import effective_rank
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import load_adapter
from manifold_lora.data.batches import batches, evaluation_batches, padded_length
from manifold_lora.data.builtin import BASE, builtin_records
from manifold_lora.data.records import Record, read_records
from manifold_lora.data.tokens import Example, Report, encode
from manifold_lora.distributed.arrays import Feed, place, to_host
from manifold_lora.distributed.mesh import problems
from manifold_lora.distributed.processes import agree, source_code
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.training.config import ResolvedConfig, as_toml


class Data(NamedTuple):
    """Encoded examples, and what encoding did."""

    train: list[Example]
    held_out: list[Example]
    report: Report  # of the training examples
    held_out_report: Report
    row_length: int  # columns of a training batch


def load_data(config: ResolvedConfig, tokenizer: Any) -> Data:
    """Training and held-out examples, from files or built in."""
    if config.data is None:
        train_records, held_out = builtin_records()
    else:
        train_records, held_out = read_records(config.data), []
    if config.eval_data is not None:
        held_out = read_records(config.eval_data)
    elif config.data is not None:
        train_records, held_out = _hold_out(config, train_records)
    encoded, report = encode(
        train_records, tokenizer, config.sequence_length, config.train_on_prompt
    )
    evaluated, cut = encode(held_out, tokenizer, config.sequence_length)
    length = config.sequence_length
    if not config.packing:
        length = padded_length(encoded, length)
    return Data(encoded, evaluated, report, cut, length)


def _hold_out(
    config: ResolvedConfig, records: list[Record]
) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise InputError(
            f"--data {config.data} has one record, and one must be held out "
            "to evaluate on: add records, or give --eval-data."
        )
    count = min(config.eval_examples, max(1, len(records) // 10))
    order = np.random.default_rng(config.seed).permutation(len(records))
    chosen = set(order[:count].tolist())
    kept = [record for i, record in enumerate(records) if i not in chosen]
    return kept, [record for i, record in enumerate(records) if i in chosen]


def adapter_config(config: ResolvedConfig) -> AdapterConfig:
    """The adapter that a run asks for."""
    single = len(config.targets) == 1
    return AdapterConfig(
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        dropout=config.dropout,
        targets=config.targets[0] if single else list(config.targets),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        init=config.start,
        fixed_a=config.fixed_a,
        diagonal_s=config.diagonal_s,
        diagonal_scaling=config.diagonal_scaling,
    )


def load_base(config: ResolvedConfig) -> Llama:
    """The base in the dtype of the run, without an adapter."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    model = load_llama(config.model or BASE, jnp.dtype(dtype))
    model.remat = config.remat
    return model


def load_model(config: ResolvedConfig) -> Llama:
    """The base with a new adapter attached, or the one to go on from."""
    model = load_base(config)
    if config.adapter is None:
        attach(model, adapter_config(config), config.seed)
        place(model)
        return model
    load_adapter(model, config.adapter)
    place(model)
    found, needed = next(iter(adapters(model).values())).config, adapter_config(config)
    differing = [
        f"{name}: found {getattr(found, name)}, needed {getattr(needed, name)}"
        for name in ("method", "rank", "alpha", "rslora", "fixed_a", "diagonal_s")
        if getattr(found, name) != getattr(needed, name)
    ]
    if differing:
        raise InputError(
            f"--adapter {config.adapter} is of another kind than the run asks for "
            f"({'; '.join(differing)}). Give the run the settings found, or leave "
            "--adapter out to begin anew."
        )
    return model


def effective_ranks(model: Llama) -> list[float]:
    """The effective rank of B in ΔW = s B Aᵀ, adapted layer by adapted layer."""
    found: list[float] = []
    for module in adapters(model).values():
        _, b = module.pair()
        each = effective_rank(to_host(b)).tolist()
        found += [x for x, rank in zip(each, module.ranks, strict=True) if rank]
    return found


def check_mesh(config: ResolvedConfig, mesh: Any, model: LlamaConfig) -> None:
    """Raise `InputError` for axes of the mesh that the model or the batch lacks."""
    rows = config.batch_size // config.accumulate
    if wrong := problems(mesh.shape, model, rows):
        raise InputError("--mesh: " + "; ".join(wrong) + ".")


def check_agreement(config: ResolvedConfig, data: Data) -> None:
    """Raise `InputError` where processes have other settings, data or code."""
    digest = hashlib.sha256()
    for example in [*data.train, *data.held_out]:
        digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
    settings = json.dumps(as_toml(config), sort_keys=True)
    agree(
        {
            "configuration": settings.encode(),
            "data": digest.digest(),
            "code": source_code(),
        }
    )


def held_out_batches(config: ResolvedConfig, data: Data, put: Feed) -> list[Any]:
    """The held-out examples, on the devices."""
    made = evaluation_batches(
        data.held_out,
        batch_size=config.batch_size,
        sequence_length=padded_length(data.held_out, config.sequence_length),
        rows=put.rows,
    )
    return [put(batch) for batch in made]


def training_batches(
    config: ResolvedConfig,
    data: Data,
    epochs: int | None = None,
    rows: Sequence[int] | None = None,
) -> Any:
    """The batches of a run, or some rows of each, in an order that its seed decides."""
    return batches(
        data.train,
        batch_size=config.batch_size,
        sequence_length=data.row_length,
        seed=config.seed,
        packing=config.packing,
        epochs=epochs,
        rows=rows,
    )


def total_steps(config: ResolvedConfig, data: Data) -> int:
    """Steps of the run; where rows are packed, only packing tells how many they are."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    if config.packing:
        return sum(1 for _ in training_batches(config, data, config.epochs))
    return -(-len(data.train) * config.epochs // config.batch_size)
