"""Hugging Face model directories, read into and written from a stacked `Llama`.

One table, `_rows`, maps each tensor of the file to its leaf in the model. Reading and
writing both follow it, so that they are inverse to each other.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from manifold_lora.checkpoints.atomic import atomic_directory, save_tensors
from manifold_lora.checkpoints.model_files import WEIGHTS, open_tensors
from manifold_lora.checkpoints.tensors import FLOATS, all_finite
from manifold_lora.decoding import read_json
from manifold_lora.distributed.arrays import to_host
from manifold_lora.distributed.mesh import divisibility_errors
from manifold_lora.distributed.processes import is_main
from manifold_lora.distributed.sharding import logical_axes, storage_spec
from manifold_lora.errors import InputError
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.models.quantised import (
    BLOCK,
    BaseDtype,
    QuantisedEmbedding,
    QuantisedLinear,
    quantise,
    quantised_parts,
    quantised_rows,
)

_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"
_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
_MLP = tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


class _Row(NamedTuple):
    """One kind of tensor: `{}` in the name is the layer, stacked on axis 0 of the leaf.

    Kernels are (out, in) in the file and (in, out) in the model: transposed.
    """

    name: str
    leaf: str
    transposed: bool = False

    def variable(self, model: Llama) -> Any:
        """The leaf itself, an `nnx.Param`."""
        return attrgetter(self.leaf)(model)

    def quantised(self, model: Llama) -> QuantisedLinear | QuantisedEmbedding | None:
        """The module that has the leaf in parts, None if it is a single variable."""
        module = attrgetter(self.leaf.rpartition(".")[0])(model)
        kinds = QuantisedLinear | QuantisedEmbedding
        return module if isinstance(module, kinds) else None

    def names(self, config: LlamaConfig) -> list[str]:
        """The names in the file: one per layer, or a single one."""
        if "{}" not in self.name:
            return [self.name]
        return [self.name.format(n) for n in range(config.num_hidden_layers)]

    def shape(self, model: Llama) -> tuple[int, ...]:
        """The shape of one tensor in the file."""
        shape = self.variable(model).shape
        shape = shape[1:] if "{}" in self.name else shape
        return shape[::-1] if self.transposed else shape

    def matrices(
        self, leaf: np.ndarray, config: LlamaConfig
    ) -> Iterable[tuple[str, np.ndarray]]:
        """Each name and a view of its slice of the leaf, oriented as in the file."""
        slices = leaf if "{}" in self.name else leaf[None]
        slices = slices.mT if self.transposed else slices
        return zip(self.names(config), slices, strict=True)


def _rows(config: LlamaConfig) -> list[_Row]:
    """The table: exactly the tensors that the file of such a model contains."""
    rows = [
        _Row(_EMBEDDING, "embed_tokens.table"),
        _Row(_NORM, "norm.scale"),
    ]
    if not config.tie_word_embeddings:
        rows.append(_Row("lm_head.weight", "lm_head.kernel", True))
    for norm in _LAYER_NORMS:
        rows.append(_Row(f"model.layers.{{}}.{norm}.weight", f"layers.{norm}.scale"))
    for linears, bias in ((_ATTENTION, config.attention_bias), (_MLP, config.mlp_bias)):
        for linear in linears:
            name, leaf = f"model.layers.{{}}.{linear}", f"layers.{linear}"
            rows.append(_Row(f"{name}.weight", f"{leaf}.kernel", True))
            if bias:
                rows.append(_Row(f"{name}.bias", f"{leaf}.bias"))
    return rows


def _ignored(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor is redundant, given the config and the other tensors."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith(".rotary_emb.inv_freq")


def load_llama(
    path: str | os.PathLike[str],
    dtype: jnp.dtype | type = jnp.float32,
    base_dtype: BaseDtype | None = None,
) -> Llama:
    """Read a Hugging Face LLaMA directory: config.json and safetensors.

    Weights of any float dtype are rounded once to `dtype`. With `base_dtype` "int8" or
    "nf4" the projections of the layers become `QuantisedLinear` and an untied embedding
    `QuantisedEmbedding`, one tensor of the file after the other, quantised from their
    values in float32.

    On the mesh of `jax.set_mesh` the weights are sharded: a host reads only the shards
    of its devices, each byte once, and holds one tensor of the file in memory at a
    time. A head that differs from the embedding is loaded even if the config ties them,
    as transformers 5 does. Raises `InputError` for a directory, config or tensor that
    is not that of a LLaMA, one message listing all bad tensors, for NaN or infinite
    weights, and for a model or mesh that `base_dtype` does not fit.
    """
    model, tensors = open_llama(path, dtype)
    if base_dtype is not None:
        mesh = jax.sharding.get_mesh()
        if errors := divisibility_errors(mesh.shape, model.config, block=BLOCK):
            raise InputError("--mesh: " + "; ".join(errors) + ".")
        model = nnx.eval_shape(
            lambda: quantise(_random(model.config, dtype), base_dtype)
        )
    for row in _rows(model.config):
        if module := row.quantised(model):
            variables, kind = module.parts, module.base_dtype
        else:
            variables, kind = (row.variable(model),), None
        leaves = _leaves(row, variables, tensors, model.config, kind)
        for variable, leaf in zip(variables, leaves, strict=True):
            variable.set_value(leaf)
    return model


def _random(config: LlamaConfig, dtype: jnp.dtype | type) -> Llama:
    return Llama(config, dtype=dtype, rngs=nnx.Rngs(0))


def open_llama(
    path: str | os.PathLike[str], dtype: jnp.dtype | type = jnp.float32
) -> tuple[Llama, dict[str, Any]]:
    """The model of a directory without its weights, and the open file of each tensor.

    Only the headers are read: names, shapes and types of the tensors are those of the
    model, whose leaves are `jax.ShapeDtypeStruct`. See `load_llama`.
    """
    path = Path(path)
    config = read_llama_config(path)
    tensors = open_tensors(path)
    _check_layers(path, config, tensors)
    if config.tie_word_embeddings and _has_own_head(tensors):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    model = nnx.eval_shape(lambda: _random(config, dtype))
    _check(path, model, tensors)
    return model, tensors


def _leaves(
    row: _Row,
    variables: Sequence[Any],
    tensors: Mapping[str, Any],
    config: LlamaConfig,
    base_dtype: BaseDtype | None,
) -> tuple[jax.Array, ...]:
    """The leaves of a row, from the shards of its tensors that the devices need.

    Args:
        row: of the table.
        variables: the leaf, or the parts of a quantised module, as shapes.
        tensors: the files.
        config: of the model.
        base_dtype: None for a single leaf.
    """
    shape = variables[0].shape
    dtype = variables[0].dtype if base_dtype is None else jnp.dtype(jnp.float32)
    mesh = jax.sharding.get_mesh()

    def sharding(spec: P) -> jax.NamedSharding | None:
        return None if mesh.empty else jax.NamedSharding(mesh, spec)

    specs = [
        P() if mesh.empty else storage_spec(logical_axes(v), v.shape, mesh)
        for v in variables
    ]
    spec, shardings = specs[0], tuple(map(sharding, specs))
    stacked = "{}" in row.name
    # Loaded as in the file: devices transpose faster, and the host need not copy.
    axes = [*zip(shape, (*spec, *(None,) * len(shape)), strict=False)][stacked:]
    size, tensor_spec = zip(*(axes[::-1] if row.transposed else axes), strict=True)
    insert = _make_insert(shardings, row.transposed, base_dtype)
    stacks = None
    if stacked:
        shapes = [(v.shape, v.dtype) for v in variables]
        stacks = jax.jit(
            lambda: tuple(jnp.zeros(*each) for each in shapes), out_shardings=shardings
        )()
    for index, name in enumerate(row.names(config)):
        x = _tensor(tensors[name], name, size, dtype, sharding(P(*tensor_spec)))
        # Wait, or the tensors of all layers would queue up in memory.
        stacks = jax.block_until_ready(insert(stacks, x, index))
    assert stacks is not None
    return stacks


@functools.cache
def _make_insert(
    shardings: tuple[jax.NamedSharding | None, ...],
    transposed: bool,
    base_dtype: BaseDtype | None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function that writes one tensor into the stacks, in place if there are any."""
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)

    def insert(stacks: Any, x: jax.Array, index: Any) -> tuple[jax.Array, ...]:
        x = x.T if transposed else x
        if base_dtype is None:
            parts = (x,)
        elif transposed:
            parts = quantised_parts(x, base_dtype)
        else:
            parts = quantised_rows(x)
        if stacks is None:
            return parts
        return tuple(map(write, stacks, parts, [index] * len(parts)))

    return jax.jit(insert, donate_argnums=0, out_shardings=shardings)


def _tensor(
    file: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.NamedSharding | None,
) -> jax.Array:
    """One tensor of a file, not transposed; on the default device if not sharded."""
    stored = file.get_slice(name)
    shards: dict[str, np.ndarray] = {}  # replicas need not be read twice

    def read_shard(index: Any) -> np.ndarray:
        if (key := str(index)) not in shards:
            shard = stored[index]
            if not all_finite(shard):
                raise InputError(
                    f"{name} has values that are NaN or infinite: the model is "
                    "damaged. Copy or download it again."
                )
            shards[key] = shard.astype(dtype, copy=False)
        return shards[key]

    if sharding is None:  # `jnp.asarray` does not commit it to the device
        return jnp.asarray(read_shard((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read_shard)


def hf_tensors(model: Llama) -> dict[str, np.ndarray]:
    """The model's weights under their Hugging Face names, in the model's dtype.

    Of quantised ones the de-quantised values.
    """
    tensors = {}
    for row in _rows(model.config):
        module = row.quantised(model)
        leaf = row.variable(model)[...] if module is None else module.dequantised()
        leaf = to_host(leaf)
        for name, matrix in row.matrices(leaf, model.config):
            tensors[name] = np.ascontiguousarray(matrix)
    return tensors


def save_llama(
    model: Llama,
    path: str | os.PathLike[str],
    dtype: jnp.dtype | type | None = None,
) -> None:
    """Write config.json and model.safetensors, readable by transformers 4 and 5.

    `dtype` None keeps the model's. The directory appears complete or not at all. An
    existing directory, or a model with adapters, raises `InputError`. With several
    processes all must call it; the first one writes.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} already exists: remove it or choose another name.")
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise InputError(
            "The model has adapters, which a Hugging Face model file cannot hold: "
            "merge first, or save the adapter separately."
        )
    dtype = jnp.dtype(model.embed_tokens.dtype if dtype is None else dtype)
    tensors = {k: v.astype(dtype, copy=False) for k, v in hf_tensors(model).items()}
    if not is_main():
        return
    with atomic_directory(path) as partial:
        config = json.dumps(model.config.to_hf(dtype.name), indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        save_tensors(tensors, partial / WEIGHTS)


def read_llama_config(path: Path) -> LlamaConfig:
    """Read the config of a model directory; checks it before a long load."""
    remedy = "Give a Hugging Face model directory with config.json and *.safetensors."
    if not path.exists():
        raise InputError(f"{path} does not exist. {remedy}")
    if not path.is_dir():
        raise InputError(f"{path} is a file. {remedy}")
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} has no config.json. {remedy}")
    mapping = read_json(file)
    try:
        return LlamaConfig.from_hf(mapping)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _check_layers(path: Path, config: LlamaConfig, tensors: Mapping[str, Any]) -> None:
    """Compare the number of layers before anything of that size is made."""
    if config.num_hidden_layers > len(tensors):
        raise InputError(
            f"{path}/config.json has num_hidden_layers {config.num_hidden_layers}, but "
            f"the weights have {len(tensors)} tensors: they are of different models."
        )


def _has_own_head(tensors: Mapping[str, Any]) -> bool:
    """Whether there is a head with other values than the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in tensors for name in names):
        return False
    head, embedding = (tensors[name].get_slice(name) for name in names)
    if head.get_shape() != embedding.get_shape():
        return True
    rows, block = head.get_shape()[0], 4096
    blocks = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
    return any(not np.array_equal(head[part], embedding[part]) for part in blocks)


def _check(path: Path, model: Llama, tensors: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes, strictly; one error lists all that differ."""
    errors = []
    needed = {
        name: row.shape(model)
        for row in _rows(model.config)
        for name in row.names(model.config)
    }
    for name, shape in needed.items():
        if name not in tensors:
            errors.append(f"{name}: missing, needed {shape}")
            continue
        header = tensors[name].get_slice(name)
        if (actual := tuple(header.get_shape())) != shape:
            errors.append(f"{name}: found {actual}, needed {shape}")
        if (kind := header.get_dtype()) not in FLOATS:
            errors.append(f"{name}: found {kind}, needed one of {', '.join(FLOATS)}")
    for name in tensors:
        if name not in needed and not _ignored(name, model.config):
            errors.append(f"{name}: unexpected")
    if errors:
        raise InputError(
            f"The weights in {path} do not fit its config.json:\n  "
            + "\n  ".join(errors)
            + "\nThe directory must hold one unquantised LLaMA and its own config."
        )
