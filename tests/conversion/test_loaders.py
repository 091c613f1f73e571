"""The table of docs/loaders.md: what each loader computes from the files we write."""

from pathlib import Path
from typing import Any

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

# The formulas of the loaders of PEFT's files, of vLLM those of two versions.
OF_PEFTS_FILES = {
    "PEFT": [loaders.peft],
    "transformers": [loaders.peft],
    "vLLM": [loaders.vllm, loaders.new_vllm],
    "SGLang": [loaders.sglang],
    "llama.cpp": [loaders.llama_cpp],
}
LITERAL = {True: "patterns by version", False: "another strength, without a word"}


def table() -> dict[str, dict[str, str]]:
    """The cells of the page's table by loader and column."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    head, _, *rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return {row[0].split(" (")[0]: dict(zip(head, row, strict=True)) for row in rows}


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
    for name, formulas_of_versions in OF_PEFTS_FILES.items():
        assert table()[name]["portable"] == "exact"
        for loader in formulas_of_versions:
            same_updates(loader(path), needed)
    for format in ("mlx", "gguf-lora"):
        out = tmp_path / format
        ml.export(ml.ExportConfig(adapter=path, format=format, out=out, model=heads))
    same_updates(loaders.mlx(tmp_path / "mlx"), needed)
    numbers = (tiny.CONFIG[f"num_{x}_heads"] for x in ("attention", "key_value"))
    same_updates(loaders.gguf(tmp_path / "gguf-lora", *numbers), needed)


@pytest.mark.parametrize("name", OF_PEFTS_FILES)
def test_the_literal_format(name: str, tmp_path: Path):
    """Why portable is the default: some scale such adapters by other numbers."""
    save_adapter(model := varied("lora"), tmp_path / "a", format="peft")
    needed = needed_updates("lora", model)
    errors = []
    for loader in OF_PEFTS_FILES[name]:
        got = loader(tmp_path / "a")
        errors.append(max(tiny.error(got[full], x) for full, x in needed.items()))
    exact = [error < FLOAT32 for error in errors]
    assert all(error > 0.1 for error, e in zip(errors, exact, strict=True) if not e)
    found = "exact" if all(exact) else LITERAL[any(exact)]
    assert table()[name]["peft with rsLoRA or patterns"] == found


@pytest.mark.parametrize("name", OF_PEFTS_FILES)
def test_who_takes_dora(name: str, tmp_path: Path):
    save_adapter(varied("dora"), tmp_path / "a")
    cell = table()[name]["DoRA"]
    for loader in OF_PEFTS_FILES[name]:
        if "refused" in cell:
            with pytest.raises(loaders.Refused):
                loader(tmp_path / "a")
        else:  # of transformers, test_methods_parity.py runs it
            assert cell == "yes" or name == "transformers"
            loader(tmp_path / "a")


@pytest.mark.parametrize("method", DORA)
@pytest.mark.parametrize("format", ["portable", "peft", "mlx"])
def test_the_weights_of_dora(method: str, format: Any, tmp_path: Path):
    """PEFT and mlx-lm's DoRALinear.fuse: m / ‖W + ΔW‖ · (W + ΔW), over the inputs."""
    save_adapter(model := varied(method), tmp_path / "a")
    out = tmp_path / "out"
    ml.export(ml.ExportConfig(adapter=tmp_path / "a", format=format, out=out))
    config, mlx = loaders.adapter_config(out), format == "mlx"
    assert config["fine_tune_type"] == "dora" if mlx else config["use_dora"]
    file = "adapters" if mlx else "adapter_model"
    key = "{}.m" if mlx else loaders.PREFIX + "{}.lora_magnitude_vector"
    tensors = loaders.load_file(out / f"{file}.safetensors")
    needed = needed_updates(method, model)
    found = (loaders.mlx if mlx else loaders.peft)(out)
    assert found.keys() == needed.keys()
    for name, delta in found.items():
        w = tiny.TENSORS[f"{name}.weight"].astype(np.float64)
        lengths = np.linalg.norm(w + delta, axis=1)
        new = (tensors[key.format(name)] / lengths)[:, None] * (w + delta)
        assert tiny.error(new, w + needed[name]) < FLOAT32


@pytest.mark.parametrize("diagonal", [False, True])
def test_stella_computes_the_update(diagonal: bool, tmp_path: Path):
    options = {"diagonal_s": diagonal}
    attach(model := tiny.base(), AdapterConfig("stella", options, **VARIED))
    save_adapter(tiny.randomize(model), tmp_path / "a")
    out = tmp_path / "out"
    ml.export(ml.ExportConfig(adapter=tmp_path / "a", format="stella", out=out))
    assert loaders.adapter_config(out)["stella_diag_s"] is diagonal
    same_updates(loaders.stella(out), needed_updates("stella", model))
    ml.load_adapter(again := tiny.base(), out)
    assert tiny.error(tiny.logits(again), tiny.logits(model)) < FLOAT32


def test_the_page_names_what_is_tested():
    assert [*table()] == [*OF_PEFTS_FILES, "mlx-lm", "StelLA"]
    assert ", ".join(map(str, VLLM_RANKS)) in table()["vLLM"]["largest rank"]
