"""Loading onto a mesh: correct values, each read once, with little host memory."""

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from manifold_lora.checkpoints import huggingface
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama
from manifold_lora.distributed.sharding import logical_axes, storage_spec
from tests.cases import slow_but
from tests.distributed.cases import MESHES, build_mesh
from tests.models import reference

pytestmark = pytest.mark.mesh

# 3 layers and a vocabulary of 61, which no mesh divides; the first has biases.
CONFIGS = {"untied": "v5-llama3", "tied": "llama-3.2"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Model directories, by tied or untied embeddings and number of files."""
    root = tmp_path_factory.mktemp("models")
    paths = {}
    for tied, name in CONFIGS.items():
        config = reference.CONFIGS[name]
        tensors = reference.random_tensors(config)
        for shards in (1, 3):
            path = root / f"{tied}-{shards}"
            paths[tied, shards] = reference.write_checkpoint(
                path, config, tensors, shards
            )
    return paths


def variables(model: Any) -> dict[tuple[Any, ...], Any]:
    return {path: v for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("text", slow_but([MESHES[2]], MESHES))
@pytest.mark.parametrize(
    "tied, shards, dtype",
    [
        ("untied", 1, jnp.float32),
        ("untied", 3, jnp.bfloat16),
        ("tied", 1, jnp.bfloat16),
        ("tied", 3, jnp.float32),
    ],
)
def test_loading_on_a_mesh_equals_loading_without(
    text, tied, shards, dtype, directories
):
    path, mesh = directories[tied, shards], build_mesh(text)
    expected = variables(load_llama(path, dtype))
    with jax.set_mesh(mesh):
        model = load_llama(path, dtype)
    loaded = variables(model)
    assert loaded.keys() == expected.keys()
    for name, variable in loaded.items():
        x, y = variable.get_value(), expected[name].get_value()
        assert x.dtype == y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        spec = storage_spec(logical_axes(variable), x.shape, mesh)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), name
    stored = [load_file(file) for file in path.glob("*.safetensors")]
    tensors = {name: x for file in stored for name, x in file.items()}
    for name, x in hf_tensors(model).items():
        np.testing.assert_array_equal(x, tensors.pop(name).astype(dtype))
    assert not tensors


class CountingFile:
    """An open file that counts how often each entry of its tensors is read."""

    def __init__(self, file: Any, reads: dict[str, np.ndarray]):
        self.file, self.reads = file, reads

    def get_slice(self, name: str) -> Any:
        stored, reads = self.file.get_slice(name), self.reads

        class Slice:
            get_shape, get_dtype = stored.get_shape, stored.get_dtype

            def __getitem__(self, index: Any) -> np.ndarray:
                count = reads.setdefault(name, np.zeros(stored.get_shape(), int))
                count[index] += 1
                return stored[index]

        return Slice()


@pytest.mark.parametrize("text", [None, *MESHES])
@pytest.mark.parametrize("tied", CONFIGS)
def test_every_entry_is_read_once(text, tied, directories, monkeypatch):
    reads: dict[str, np.ndarray] = {}
    open_tensors = huggingface.open_tensors

    def counted(path: Path) -> dict[str, Any]:
        return {k: CountingFile(v, reads) for k, v in open_tensors(path).items()}

    monkeypatch.setattr(huggingface, "open_tensors", counted)
    path = directories[tied, 1]
    if text is None:
        load_llama(path)
    else:
        with jax.set_mesh(build_mesh(text)):
            load_llama(path)
    stored = load_file(path / "model.safetensors")
    assert reads.keys() == stored.keys()
    for name, count in reads.items():
        assert Counter(count.ravel().tolist()) == {1: stored[name].size}, name


@pytest.mark.parametrize("text", slow_but([MESHES[2]], MESHES))
def test_host_memory_holds_one_tensor_at_a_time(text, tmp_path):
    config = reference.CONFIGS["llama-3"] | {
        "vocab_size": 1003,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
    }
    tensors = reference.random_tensors(config)
    total = sum(x.nbytes for x in tensors.values())
    largest = max(x.nbytes for x in tensors.values())
    path = reference.write_checkpoint(tmp_path / "model", config, tensors)
    del tensors
    with jax.set_mesh(build_mesh(text)):
        load_llama(path)  # compiles
        tracemalloc.start()
        load_llama(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Only NumPy's arrays are counted, not those of the devices.
    assert largest // 2 < peak < 3 * largest < total / 2
