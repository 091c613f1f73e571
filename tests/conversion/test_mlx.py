"""mlx-lm itself loads the export and generates the same tokens, where it is there."""

# mlx-lm is in the extra `hf`, where it has wheels
# pyright: reportMissingImports=false

from pathlib import Path

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, attach
from manifold_lora.checkpoints.peft import save_adapter
from tests import adapters as tiny
from tests.tolerances import LOGITS

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

pytestmark = pytest.mark.hf
SOME_LAYERS = r"model\.layers\.[01]\..*_proj"


@pytest.mark.parametrize("method", ["stella", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", SOME_LAYERS], ids=["all", "some"])
def test_mlx_lm_computes_the_same(
    method: str, targets: str, base: Path, tmp_path: Path
):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    config = AdapterConfig(method, rank=2, alpha=5, targets=targets)
    attach(model := tiny.base(), config)
    save_adapter(tiny.randomize(model), tmp_path / "a")
    out = tmp_path / "mlx"
    ml.export(
        ml.ExportConfig(adapter=tmp_path / "a", format="mlx", out=out, model=base)
    )
    theirs, _ = load_model(base)
    theirs = load_adapters(theirs, str(out))
    theirs.eval()
    got, needed = np.array(theirs(mx.array(tiny.IDS))), tiny.logits(model)
    assert tiny.error(needed, tiny.logits(tiny.base())) > 0.1
    assert tiny.error(got, needed) < LOGITS
    np.testing.assert_array_equal(got.argmax(-1), needed.argmax(-1))
