"""The host memory of loading a base that is quantised, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

# The anonymous memory, so without the pages of the file that are mapped, above what was
# there before a load; a first load compiles.
CODE = """
import gc, sys, threading, time
from pathlib import Path
import jax
from flax import nnx
import manifold_lora as ml
from manifold_lora.checkpoints.huggingface import hf_tensors, load_llama, save_llama

path, base_dtype = Path(sys.argv[1]), sys.argv[2]
config = ml.LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=2816,
    num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16, head_dim=64)
model = ml.Llama(config, dtype=jax.numpy.bfloat16, rngs=nnx.Rngs(0))
save_llama(model, path)
largest = max(x.nbytes for x in hf_tensors(model).values())
del model

def anonymous():
    line, = [x for x in Path("/proc/self/status").open() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def load():
    return jax.block_until_ready(nnx.state(load_llama(path, "bfloat16", base_dtype)))

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.001)

load()
gc.collect()
seen, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
state = load()
done.set()
thread.join()
file = (path / "model.safetensors").stat().st_size
print(max(seen) - seen[0], largest, len(seen), file)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("base_dtype", "bits"), [("nf4", 4), ("int8", 8)])
def test_a_base_is_quantised_tensor_by_tensor(
    tmp_path: Path, base_dtype: str, bits: int
):
    command = [sys.executable, "-c", CODE, str(tmp_path / "base"), base_dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, largest, samples, file = map(int, done.stdout.split())
    weights = file / 2  # bfloat16; a bfloat16 scale for 64
    stored = weights * (bits / 8 + 2 / 64)
    # And a few tensors in float32, where the whole model is hundreds.
    assert samples > 50 and peak < stored + 8 * largest < 0.8 * file
