"""merge of several adapters: exact sums, and their truncation."""

from pathlib import Path

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora import InputError, MergeConfig, merge_files
from manifold_lora.adapters import AdapterConfig
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.checkpoints.huggingface import load_llama
from tests import adapters as tiny
from tests.conversion.cases import adapter, command, model_directory
from tests.conversion.test_merge import close, needed, refused, tensors
from tests.tolerances import FLOAT32, LOGITS

FIRST = AdapterConfig("stella", rank=3, alpha=7, rslora=True, targets=["q_proj"])
SECOND = AdapterConfig("lora", rank=2, alpha=5, targets=["q_proj", "down_proj"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "base")


def wanted(tmp_path: Path) -> dict[str, np.ndarray]:
    """W + 0.7 ΔW₁ − 0.3 ΔW₂ in float64, of adapters a and b, which are written."""
    both = [adapter(tmp_path / "a", FIRST), adapter(tmp_path / "b", SECOND, seed=1)]
    total = {name: np.asarray(x, np.float64) for name, x in tiny.TENSORS.items()}
    for weight, model in zip((0.7, -0.3), both, strict=True):
        for name, x in needed(model).items():
            total[name] = total[name] + weight * (x - tiny.TENSORS[name])
    return total


def both(tmp_path: Path) -> tuple[str, str]:
    return f"{tmp_path / 'a'}:0.7", f"{tmp_path / 'b'}:-0.3"


def test_sums_are_exact(base: Path, tmp_path: Path):
    total = wanted(tmp_path)
    config = MergeConfig(model=base, adapters=both(tmp_path), out=tmp_path / "out")
    result = merge_files(config)
    close(tensors(tmp_path / "out"), total)
    assert result["ranks"] == [2, 5]
    assert result["energy_discarded"] == 0
    assert result["largest_logit_difference"] < LOGITS


def test_a_sum_as_an_adapter(base: Path, tmp_path: Path):
    total = wanted(tmp_path)
    out = tmp_path / "sum"
    merge_files(MergeConfig(adapters=both(tmp_path), out=out, as_adapter=True))
    model = load_llama(base)
    ml.load_adapter(model, out)  # of the same base
    assert tiny.error(tiny.logits(model), tiny.needed_logits(total)) < LOGITS
    read = read_adapter(out)
    assert read.method == "lora"
    assert read.base == read_adapter(tmp_path / "a").base is not None
    assert {module.rank for module in read.modules.values()} == {2, 5}


def test_more_columns_than_the_layer_has(base: Path, tmp_path: Path):
    one = AdapterConfig("lora", rank=12, targets="k_proj")  # 16 outputs
    model = adapter(tmp_path / "a", one)
    given = (f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'a'}:0.5")
    config = MergeConfig(model=base, adapters=given, out=tmp_path / "out")
    assert merge_files(config)["ranks"] == [16]
    close(tensors(tmp_path / "out"), needed(model))


def test_truncation_is_the_best_approximation(base: Path, tmp_path: Path):
    total = wanted(tmp_path)
    config = MergeConfig(
        model=base, adapters=both(tmp_path), out=tmp_path / "out", rank=2
    )
    result = merge_files(config)
    lost = energy = 0.0
    for name, x in total.items():
        if "_proj" not in name:
            continue
        u, sigma, vt = np.linalg.svd(x - tiny.TENSORS[name])
        lost += (sigma[2:] ** 2).sum()
        energy += (sigma**2).sum()
        total[name] = tiny.TENSORS[name] + u[:, :2] * sigma[:2] @ vt[:2]
    close(tensors(tmp_path / "out"), total)
    assert 0.01 < lost / energy < 0.9
    assert abs(result["energy_discarded"] - lost / energy) < FLOAT32


def test_the_command_combines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wanted(tmp_path)
    one, other = both(tmp_path)
    flags = ["--as-adapter", "--rank", 1, "--out", tmp_path / "out"]
    assert "discards" in command(capsys, "merge", "--adapter", one, other, *flags)
    assert {m.rank for m in read_adapter(tmp_path / "out").modules.values()} == {1}


def test_dora_is_not_added(base: Path, tmp_path: Path):
    adapter(tmp_path / "a", "dora-kaiming")
    adapter(tmp_path / "b", "lora-kaiming")
    a, b, out = str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "out"
    for given in ((a, b), (f"{a}:0.5",)):
        config = MergeConfig(model=base, adapters=given, out=out)
        refused(config, a, "dora", "Merge it alone")
    refused(MergeConfig(model=base, adapters=(a,), out=out, rank=1), "--rank")


def test_adapters_of_different_bases_are_not_added(tmp_path: Path):
    from tests.tiny import model_directory as other_model

    adapter(tmp_path / "a", SECOND)
    model = load_llama(other_model(tmp_path / "other"))
    ml.attach(model, AdapterConfig("lora", rank=2))
    ml.save_adapter(model, tmp_path / "b")
    given = (str(tmp_path / "a"), str(tmp_path / "b"))
    config = MergeConfig(adapters=given, out=tmp_path / "out", as_adapter=True)
    refused(config, "different bases", "fingerprint", str(tmp_path / "b"))


def test_what_excludes_each_other(tmp_path: Path):
    with pytest.raises(InputError, match="--as-adapter and --model") as caught:
        MergeConfig(adapters=("a",), as_adapter=True, model=tmp_path, dtype="float16")
    assert "--as-adapter and --dtype" in str(caught.value)
    assert "--out" in str(caught.value)
