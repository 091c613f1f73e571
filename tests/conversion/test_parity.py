"""Merged models in transformers, and sums and merges as PEFT makes them."""

# peft is in the extra `hf` only
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifold_lora import ConvertConfig, MergeConfig, convert_adapter, merge_files
from manifold_lora.adapters import AdapterConfig
from tests import adapters as tiny
from tests.checkpoints.transformers_reference import (
    load_transformers,
    transformers_logits,
)
from tests.conversion.cases import adapter, model_directory
from tests.conversion.test_merge import LAYERED, tensors
from tests.tolerances import FLOAT32, LOGITS

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.hf,
    # peft 0.21 asks transformers 5 for it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]
FIRST = AdapterConfig("stella", rank=3, alpha=7, rslora=True, targets=["q_proj"])
SECOND = AdapterConfig("lora", rank=2, alpha=5, targets=["q_proj", "down_proj"])


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("what", [LAYERED, "dora-kaiming", "loram_fr-identity"])
@pytest.mark.parametrize("count", [1, 3])
def test_transformers_reads_the_merged_files(what: Any, count: int, tmp_path: Path):
    base = model_directory(tmp_path / "base", count)
    model = adapter(tmp_path / "a", what)
    out = tmp_path / "out"
    merge_files(MergeConfig(model=base, adapters=(str(tmp_path / "a"),), out=out))
    got = transformers_logits(load_transformers(out))
    assert tiny.error(got, tiny.logits(model)) < LOGITS


@pytest.mark.parametrize("what", [LAYERED, "stiefel_dora-random", "lora-pissa"])
def test_it_is_what_peft_merges(what: Any, tmp_path: Path):
    from peft import PeftModel

    base = model_directory(tmp_path / "base")
    adapter(tmp_path / "a", what)
    out = tmp_path / "out"
    merge_files(MergeConfig(model=base, adapters=(str(tmp_path / "a"),), out=out))
    peft = PeftModel.from_pretrained(load_transformers(base), str(tmp_path / "a"))
    needed = weights(peft.merge_and_unload())
    for name, x in tensors(out).items():
        assert tiny.error(x, needed[name]) < FLOAT32, name


def test_a_sum_is_that_of_add_weighted_adapter(tmp_path: Path):
    from peft import PeftModel

    base = model_directory(tmp_path / "base")
    # PEFT adds adapters of the same modules only
    second = AdapterConfig("lora", rank=2, alpha=5, targets=["q_proj"])
    adapter(tmp_path / "a", FIRST)
    adapter(tmp_path / "b", second, seed=1)
    given = (f"{tmp_path / 'a'}:0.7", f"{tmp_path / 'b'}:0.3")
    merge_files(MergeConfig(model=base, adapters=given, out=tmp_path / "out"))
    merge_files(MergeConfig(adapters=given, out=tmp_path / "sum", as_adapter=True))
    model = PeftModel.from_pretrained(
        load_transformers(base), str(tmp_path / "a"), adapter_name="a"
    )
    model.load_adapter(str(tmp_path / "b"), "b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="cat")
    model.set_adapter("c")
    needed = transformers_logits(model.eval())
    got = transformers_logits(load_transformers(tmp_path / "out"))
    assert tiny.error(got, needed) < LOGITS
    ours = PeftModel.from_pretrained(load_transformers(base), str(tmp_path / "sum"))
    assert tiny.error(transformers_logits(ours.eval()), needed) < LOGITS


@pytest.mark.parametrize("method", ["stiefel", "stella", "loram_fr", "landing_oblique"])
def test_peft_reads_a_converted_adapter(method: str, tmp_path: Path):
    from peft import PeftModel

    base = model_directory(tmp_path / "base")
    model = adapter(tmp_path / "a", SECOND)
    convert_adapter(
        ConvertConfig(adapter=tmp_path / "a", method=method, out=tmp_path / "b")
    )
    peft = PeftModel.from_pretrained(load_transformers(base), str(tmp_path / "b"))
    assert tiny.error(transformers_logits(peft.eval()), tiny.logits(model)) < LOGITS
