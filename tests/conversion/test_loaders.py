"""The table of docs/loaders.md: what each loader computes from the files we write."""

from pathlib import Path

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.checkpoints.card import VLLM_RANKS
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.methods import METHODS
from tests import adapters as tiny
from tests.adapters import formulas
from tests.conversion import loaders
from tests.tolerances import FLOAT32

DOCS = Path(__file__).parents[2] / "docs" / "loaders.md"
DORA = ("dora", "stiefel_dora")
PLAIN = [method for method in METHODS if method not in DORA]
# Every optional setting at once: rsLoRA, ranks and alphas by module, few targets.
VARIED = {
    "rank": 2,
    "alpha": 5,
    "rslora": True,
    "targets": ["q_proj", "k_proj", "down_proj"],
    "rank_pattern": {"k_proj": 3, "down_proj": 4},
    "alpha_pattern": {"k_proj": 7, "mlp.*": 2.5},
}
RANKS = {"q_proj": 2, "k_proj": 3, "down_proj": 4}
ALPHAS = {"q_proj": 5, "k_proj": 7, "down_proj": 2.5}


def needed_updates(method: str, model: ml.Llama) -> loaders.Matrices:
    """ΔW of every module in float64, from the method's own formula."""
    needed = {}
    for full, arrays in tiny.arrays(model).items():
        w = tiny.TENSORS[f"{full}.weight"].astype(np.float64)
        last = full.rpartition(".")[2]
        scale = ALPHAS[last] / RANKS[last] ** 0.5
        needed[full] = formulas.NEW_WEIGHT[method](w, arrays, scale) - w
    return needed


def varied(method: str) -> ml.Llama:
    attach(model := tiny.base(), AdapterConfig(method, **VARIED))
    return tiny.randomize(model)


def same_updates(got: loaders.Matrices, needed: loaders.Matrices) -> None:
    assert got.keys() == needed.keys()
    for name, delta in needed.items():
        assert np.abs(delta).max() > 0.01
        assert tiny.error(got[name], delta) < FLOAT32 * max(1, np.abs(delta).max())


@pytest.mark.parametrize("method", PLAIN)
def test_every_loader_computes_the_same_update(
    method: str, heads: Path, tmp_path: Path
):
    save_adapter(model := varied(method), path := tmp_path / "a")
    needed = needed_updates(method, model)
    for loader in (loaders.peft, loaders.vllm, loaders.sglang, loaders.llama_cpp):
        same_updates(loader(path), needed)
    for format in ("mlx", "gguf-lora"):
        out = tmp_path / format
        ml.export(ml.ExportConfig(adapter=path, format=format, out=out, model=heads))
    same_updates(loaders.mlx(tmp_path / "mlx"), needed)
    numbers = (tiny.CONFIG[f"num_{x}_heads"] for x in ("attention", "key_value"))
    same_updates(loaders.gguf(tmp_path / "gguf-lora", *numbers), needed)


def test_the_literal_format_is_for_peft_alone(tmp_path: Path):
    """Why portable is the default: the others scale such adapters by other numbers."""
    save_adapter(model := varied("lora"), tmp_path / "a", format="peft")
    needed = needed_updates("lora", model)
    same_updates(loaders.peft(tmp_path / "a"), needed)
    for loader in (loaders.vllm, loaders.sglang, loaders.llama_cpp):
        got = loader(tmp_path / "a")
        assert max(tiny.error(got[name], x) for name, x in needed.items()) > 0.1


@pytest.mark.parametrize("method", DORA)
def test_mlx_computes_the_weights_of_dora(method: str, tmp_path: Path):
    """DoRALinear.fuse: m / ‖W + ΔW‖ · (W + ΔW), over the inputs."""
    save_adapter(model := varied(method), tmp_path / "a")
    out = tmp_path / "out"
    ml.export(ml.ExportConfig(adapter=tmp_path / "a", format="mlx", out=out))
    assert loaders.adapter_config(out)["fine_tune_type"] == "dora"
    tensors = loaders.load_file(out / "adapters.safetensors")
    needed = needed_updates(method, model)
    for name, delta in loaders.mlx(out).items():
        w = tiny.TENSORS[f"{name}.weight"].astype(np.float64)
        lengths = np.linalg.norm(w + delta, axis=1)
        new = (tensors[f"{name}.m"] / lengths)[:, None] * (w + delta)
        assert tiny.error(new, w + needed[name]) < FLOAT32


@pytest.mark.parametrize("diagonal", [False, True])
def test_stella_computes_the_update(diagonal: bool, tmp_path: Path):
    options = {"diagonal_s": diagonal}
    attach(model := tiny.base(), AdapterConfig("stella", options, **VARIED))
    save_adapter(tiny.randomize(model), tmp_path / "a")
    out = tmp_path / "out"
    ml.export(ml.ExportConfig(adapter=tmp_path / "a", format="stella", out=out))
    config = loaders.adapter_config(out)
    assert config["peft_type"] == "STELLA" and config["stella_diag_s"] is diagonal
    tensors = loaders.load_file(out / "adapter_model.safetensors")
    needed = needed_updates("stella", model)
    assert len(tensors) == 3 * len(needed)
    for name, delta in needed.items():
        stem = f"{loaders.PREFIX}{name}.stella_"
        u, s, vt = (
            tensors[f"{stem}{x}.weight"].astype(np.float64) for x in ("U", "S", "Vt")
        )
        assert s.ndim == (1 if diagonal else 2)
        last = name.rpartition(".")[2]
        scale = ALPHAS[last] / RANKS[last] ** 0.5
        got = scale * u @ (np.diag(s) if diagonal else s) @ vt
        assert tiny.error(got, delta) < FLOAT32
    ml.load_adapter(again := tiny.base(), out)
    assert tiny.error(tiny.logits(again), tiny.logits(model)) < FLOAT32


def test_the_page_names_what_is_tested():
    page = DOCS.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for loader in ("PEFT", "vLLM", "SGLang", "llama.cpp", "mlx-lm", "transformers"):
        assert any(row.startswith(f"| {loader} ") for row in rows), loader
    assert ", ".join(map(str, VLLM_RANKS)) in page
