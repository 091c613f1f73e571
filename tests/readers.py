"""The readers of everything that this library reads, for `tests/mutations.py`."""

import dataclasses
import io
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import tomli_w
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters import adapters
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.checkpoints.companions import stop_tokens
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.checkpoints.store import CheckpointStore, Restored
from manifold_lora.configuration.flat import compose, entries, flatten, parts, read_toml
from manifold_lora.data.records import read_records
from manifold_lora.inspection.measure import measure
from manifold_lora.models.shapes import model_shape
from manifold_lora.training.config import TrainConfig
from manifold_lora.training.directory import RunDirectory
from manifold_lora.training.run import Metrics
from tests.configs import train_config
from tests.mutations import Reader
from tests.tiny import CONFIG, data_file, model_directory

SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("model_type", "hidden_act", "attention_bias", "mlp_bias", "eos_token_id"),
    *("max_position_embeddings", "bos_token_id", "rope_theta"),
}
PEFT = {
    *("r", "lora_alpha", "target_modules", "use_rslora", "peft_type", "bias"),
    *("fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"),
}
OWN = {"method", "rank", "alpha", "rslora", "targets", "rank_pattern", "base", "init"}


_scratch = tempfile.TemporaryDirectory()


@cache
def _base() -> Path:
    return model_directory(Path(_scratch.name, "base"))


@cache
def _loaded() -> Any:
    return load_llama(_base())


def _weights(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(_base() / name, folder)


def _model(folder: Path) -> Any:
    model = load_llama(folder)
    return model.config, nnx.to_pure_dict(nnx.state(model))


def _shards(folder: Path) -> None:
    """The base in two files with an index."""
    shutil.copy(_base() / "config.json", folder)
    tensors = sorted(load_file(_base() / "model.safetensors").items())
    where = {}
    for number in (0, 1):
        name = f"model-{number}.safetensors"
        part = dict(tensors[number::2])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def _stop_files(folder: Path) -> None:
    for name, eos in (("generation_config.json", [1, 5]), ("config.json", 3)):
        config = CONFIG.to_hf() | {"eos_token_id": eos}
        (folder / name).write_text(json.dumps(config))


def _stop(folder: Path) -> Any:
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    return stop_tokens(folder, tokenizer)


def _adapter_of(method: str, folder: Path, own: bool = True, **config: Any) -> None:
    model = nnx.clone(_loaded())
    settings = {"rank": 2, "alpha": 3, "targets": ["q_proj", "down_proj"]} | config
    ml.attach(model, ml.AdapterConfig(method, **settings))
    rng = np.random.default_rng(0)
    for module in adapters(model).values():  # no update is zero
        for name in {"b", "s"} & set(module.names):
            x = getattr(module, name)
            if not np.asarray(x[...]).any():
                x.set_value(jnp.asarray(rng.normal(size=x.shape), jnp.float32))
    save_adapter(model, folder / "adapter")
    (folder / "adapter" / "README.md").unlink()  # which nothing reads
    for file in (folder / "adapter").iterdir():
        if own or file.name.startswith("adapter"):
            shutil.copy(file, folder)
    shutil.rmtree(folder / "adapter")


def _stella(folder: Path) -> None:
    """An adapter as the paper's code writes it."""
    _adapter_of("stella", folder)
    factors = load_file(folder / "factors.safetensors")
    ends = {"u": "stella_U.weight", "s": "stella_S.weight", "v": "stella_Vt.weight"}
    tensors = {}
    for key, x in factors.items():
        name, _, factor = key.rpartition(".")
        end = ends[factor]
        tensors[f"base_model.model.{name}.{end}"] = x.T if factor == "v" else x
    tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "STELLA"}))
    (folder / "factors.safetensors").unlink()
    (folder / "manifold_lora.json").unlink()


def _attached(folder: Path) -> Any:
    model = nnx.clone(_loaded())
    load_adapter(model, folder)
    modules = adapters(model)
    settings = [(m.config, m.ranks, m.alphas) for m in modules.values()]
    return settings, ml.factors(model)


def _measured(folder: Path) -> Any:
    adapter = read_adapter(folder)
    return json.dumps(measure(adapter, None)), adapter.base, adapter.config


STATE = {"a": jnp.arange(6.0).reshape(2, 3), "n": jnp.zeros((), jnp.int32)}


def _checkpoints(folder: Path) -> None:
    with CheckpointStore(folder, identity={"rank": 4}) as store:
        store.save(3, STATE, {"loss": float("nan"), "rows": [1, 2]}, best_step=3)


def _restored(folder: Path) -> Any:
    with CheckpointStore(folder, identity={"rank": 4}) as store:
        restored = store.restore_latest(STATE)
    return (
        None if restored is None else (restored.step, restored.state, restored.progress)
    )


def _records(folder: Path) -> None:
    data_file(folder / "train.jsonl", 4)
    chat = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hm", "weight": 0},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hi"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    (folder / "chats.json").write_text(json.dumps([chat, {"text": "Once"}]))
    (folder / "table.csv").write_text('prompt,completion\nWhat?,"a, b"\nWho?,me\n')


def _read_records(folder: Path) -> Any:
    files = ("train.jsonl", "chats.json", "table.csv")
    return [
        [
            dataclasses.replace(record, location="")
            for record in read_records(folder / f)
        ]
        for f in files
    ]


def _config(**settings: Any) -> TrainConfig:
    return train_config(
        method="stella", rank=4, steps=3, targets=["q_proj"], **settings
    )


def _toml(folder: Path) -> None:
    (folder / "config.toml").write_text(tomli_w.dumps(flatten(_config())))


def _configuration(folder: Path) -> Any:
    return flatten(compose(TrainConfig, read_toml(folder / "config.toml", TrainConfig)))


IDENTITY = {"data": "1", "base": "2"}


def _run(folder: Path) -> None:
    _toml(folder)
    rows = [{"step": n, "loss": 1.0 / (n + 1), "tokens": 5} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    summary = {"method": "stella", "steps": 3, "best_step": 2, "loss_after": 1.5,
               "planned_steps": 3, "identity": IDENTITY, "seconds": 1.0}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def _read_run(folder: Path) -> Any:
    from manifold_lora.training.display import show_finished

    config = _config(out=str(folder))
    with RunDirectory(config) as run:
        run.check_settings(config)
        if summary := run.finished(IDENTITY, 3):
            show_finished(Console(file=io.StringIO()), config, summary)
        with Metrics(folder, config, Restored(2, None, {})) as metrics:
            return summary, metrics.rows


EOS = frozenset({"eos_token_id"})  # one or several
TARGETS = frozenset({"target_modules", "targets", "data"})  # likewise
MODEL = {"config.json": SIZES}
ADAPTER = {"adapter_config.json": PEFT, "manifold_lora.json": OWN}
# The names of parts are tables in a file; others may differ in a run that goes on.
_FREE = {name for name, x in entries(TrainConfig).items() for field in x.fields.values()
         if field.metadata.get("may_change")}  # fmt: skip
SETTINGS = {"config.toml": {*flatten(_config())} - _FREE - parts(TrainConfig).keys()}
plain_lora = partial(_adapter_of, "lora", own=False)
varied = partial(plain_lora, rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 5})
READERS = [
    Reader("model", _weights, _model, MODEL, EOS),
    Reader("shards", _shards, _model, MODEL, EOS),
    Reader("shape", _stop_files, model_shape, MODEL, EOS,
           optional=frozenset({"generation_config.json"})),
    Reader("stop tokens", _stop_files, _stop),
    Reader("lora", plain_lora, _attached, ADAPTER, TARGETS),
    Reader("patterns", varied, _attached, ADAPTER, TARGETS),
    Reader("stiefel", partial(_adapter_of, "stiefel"), _attached, ADAPTER, TARGETS),
    Reader("stella", partial(_adapter_of, "stella"), _measured, ADAPTER, TARGETS),
    Reader("stella's own", _stella, _attached, ADAPTER, TARGETS),
    Reader("checkpoint", _checkpoints, _restored, exact=True),
    Reader("records", _records, _read_records,
           optional=frozenset({"table.csv"}), exact=True),
    Reader("configuration", _toml, _configuration, SETTINGS, TARGETS),
    Reader("run", _run, _read_run, SETTINGS, TARGETS,
           optional=frozenset({"summary.json", "metrics.jsonl"})),
]  # fmt: skip
