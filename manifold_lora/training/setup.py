"""Build what a run needs from its configuration: data, model and number of steps."""

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
from manifold_lora.configuration.flat import flatten
from manifold_lora.data.batches import batches, evaluation_batches, padded_length
from manifold_lora.data.builtin import BASE, builtin_records
from manifold_lora.data.records import Record, read_records
from manifold_lora.data.tokens import Example, Report, encode
from manifold_lora.distributed.arrays import BatchSharder, shard_module, to_host
from manifold_lora.distributed.mesh import divisibility_errors
from manifold_lora.distributed.processes import check_identical, source_code
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.training.config import TrainConfig


class Data(NamedTuple):
    """Encoded examples, and the counts of what encoding truncated and dropped."""

    train: list[Example]
    held_out: list[Example]
    report: Report  # of the training examples
    held_out_report: Report
    row_length: int  # columns of a training batch


def load_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Training and held-out examples, from files or built in."""
    length = config.batch.sequence_length
    if config.data.path is None:
        train_records, held_out = builtin_records()
    else:
        train_records, held_out = read_records(config.data.path), []
    if config.data.eval_path is not None:
        held_out = read_records(config.data.eval_path)
    elif config.data.path is not None:
        train_records, held_out = _hold_out(config, train_records)
    encoded, report = encode(
        train_records, tokenizer, length, config.data.train_on_prompt
    )
    evaluated, held_out_report = encode(held_out, tokenizer, length)
    if not config.data.packing:
        length = padded_length(encoded, length)
    return Data(encoded, evaluated, report, held_out_report, length)


def _hold_out(
    config: TrainConfig, records: list[Record]
) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise InputError(
            f"--data {config.data.path} has one record, and one must be held out "
            "to evaluate on: add records, or give --eval-data."
        )
    count = min(config.data.eval_examples, max(1, len(records) // 10))
    order = np.random.default_rng(config.optimizer.seed).permutation(len(records))
    chosen = set(order[:count].tolist())
    training = [record for i, record in enumerate(records) if i not in chosen]
    return training, [record for i, record in enumerate(records) if i in chosen]


def load_base(config: TrainConfig) -> Llama:
    """The base in the dtype of the run, without an adapter."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = config.model.dtype or ("float32" if on_cpu else "bfloat16")
    model = load_llama(config.model.path or BASE, jnp.dtype(dtype))
    model.remat = config.model.remat
    return model


def load_model(config: TrainConfig) -> Llama:
    """The base with a new adapter, or with the one to continue from."""
    model = load_base(config)
    if config.initial_adapter is None:
        attach(model, config.adapter, config.optimizer.seed)
        shard_module(model)
        return model
    load_adapter(model, config.initial_adapter)
    shard_module(model)
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
            f"({'; '.join(differing)}). Give the run the settings found, or leave out "
            "--adapter to start from a new one."
        )
    return model


def _comparable(config: AdapterConfig) -> dict[str, Any]:
    """The settings that an adapter and the run that continues it must share."""
    settings = {name: getattr(config, name) for name in ("rank", "alpha", "rslora")}
    options = config.options.values("adapter")
    options.pop("init", None)  # only decides the factors before training
    return {"method": config.method, **settings, **options}


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
    if errors := divisibility_errors(mesh.shape, model, rows):
        raise InputError("--mesh: " + "; ".join(errors) + ".")


def check_agreement(config: TrainConfig, data: Data) -> None:
    """Raise `InputError` if processes differ in settings, data or code."""
    digest = hashlib.sha256()
    for example in [*data.train, *data.held_out]:
        digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
    settings = json.dumps(flatten(config), sort_keys=True)
    check_identical(
        {
            "configuration": settings.encode(),
            "data": digest.digest(),
            "code": source_code(),
        }
    )


def held_out_batches(
    config: TrainConfig, data: Data, to_devices: BatchSharder
) -> list[Any]:
    """The held-out examples, on the devices."""
    host_batches = evaluation_batches(
        data.held_out,
        batch_size=config.batch.batch_size,
        sequence_length=padded_length(data.held_out, config.batch.sequence_length),
        rows=to_devices.local_rows,
    )
    return [to_devices(batch) for batch in host_batches]


def training_batches(
    config: TrainConfig,
    data: Data,
    epochs: int | None = None,
    rows: Sequence[int] | None = None,
) -> Any:
    """The batches of a run, or some rows of each, in an order that its seed decides."""
    return batches(
        data.train,
        batch_size=config.batch.batch_size,
        sequence_length=data.row_length,
        seed=config.optimizer.seed,
        packing=config.data.packing,
        epochs=epochs,
        rows=rows,
    )


def total_steps(config: TrainConfig, data: Data) -> int:
    """The number of steps; with packing it takes packing the data to know it."""
    steps, epochs = config.schedule.steps, config.schedule.epochs
    if steps is not None:
        return steps
    assert epochs is not None
    if config.data.packing:
        return sum(1 for _ in training_batches(config, data, epochs))
    return -(-len(data.train) * epochs // config.batch.batch_size)
