"""import: what PEFT, StelLA and mlx-lm wrote, as adapters of this library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora import ImportConfig, InputError, import_adapter
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.checkpoints.huggingface import load_llama
from tests import adapters as tiny
from tests.adapters import formulas
from tests.cases import slow_but
from tests.checkpoints import test_stella as stella
from tests.checkpoints.peft_files import pairs, write
from tests.conversion.cases import command, model_directory
from tests.tolerances import FLOAT32, LOGITS

SCALE = 2.5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "base")


def write_mlx(path: Path, matrices: tiny.Matrices, dora: bool = False) -> Path:
    """The files of mlx-lm: lora_a (in, r) and lora_b (r, out), and m of DoRA."""
    path.mkdir()
    tensors = {}
    for full, (a, b) in matrices.items():
        tensors[f"{full}.lora_a"] = np.ascontiguousarray(a.T)
        tensors[f"{full}.lora_b"] = np.ascontiguousarray(b.T)
        if dora:
            tensors[f"{full}.m"] = np.linspace(0.5, 1.5, len(b), dtype=np.float32)
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})
    config = {
        "adapter_path": "adapters",
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "rank": 2,
            "scale": SCALE,
            "dropout": 0.1,
            "keys": ["self_attn.q_proj", "mlp.down_proj"],
        },
        "model": "someone/model",
        "num_layers": 2,  # the last ones
        "optimizer_config": {"adam": {}},
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def imported(source: Path, out: Path, base: Path | None = None) -> dict[str, Any]:
    return import_adapter(ImportConfig(adapter=source, out=out, model=base))


@pytest.mark.parametrize("dora", slow_but([False], [False, True]))
def test_mlx(dora: bool, base: Path, tmp_path: Path):
    matrices = pairs({"self_attn.q_proj": 2, "mlp.down_proj": 2}, layers=(1, 2))
    source = write_mlx(tmp_path / "mlx", matrices, dora)
    result = imported(source, tmp_path / "a", base)
    assert result["method"] == ("dora" if dora else "lora")
    assert result["largest_logit_difference"] < LOGITS
    file = read_adapter(tmp_path / "a")
    assert file.base is not None  # of --model
    assert (file.config.rank, file.config.alpha) == (2, 5)
    assert file.config.dropout == 0.1
    needed = {name: np.asarray(x, np.float64) for name, x in tiny.TENSORS.items()}
    for full, (a, b) in matrices.items():
        w = needed[f"{full}.weight"]
        needed[f"{full}.weight"] = w + SCALE * b.astype(np.float64) @ a
        if dora:
            total = needed[f"{full}.weight"]
            m = np.linspace(0.5, 1.5, len(b), dtype=np.float32)
            total *= (m / np.sqrt((total**2).sum(1)))[:, None]
    ml.load_adapter(model := load_llama(base), tmp_path / "a")
    assert tiny.error(tiny.logits(model), tiny.needed_logits(needed)) < LOGITS
    peft = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == "someone/model"


def test_rslora_and_patterns_of_peft(tmp_path: Path):
    matrices = pairs({"self_attn.q_proj": 2, "mlp.down_proj": 4})
    source = write(
        tmp_path / "peft",
        matrices,
        use_rslora=True,
        rank_pattern={"down_proj": 4},
        alpha_pattern={"layers.1.mlp.down_proj": 9},
        base_model_name_or_path="someone/model",
    )
    imported(source, tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    assert file.method == "lora"
    assert file.config.rslora
    for full, (a, b) in matrices.items():
        alpha = 9 if full == "model.layers.1.mlp.down_proj" else 3
        scale = alpha / np.sqrt(len(a))
        module = file.modules[full]
        got = module.scale * module.b.astype(np.float64) @ module.a.T
        assert tiny.error(got, scale * b.astype(np.float64) @ a) < FLOAT32
    assert (tmp_path / "a" / "manifold_lora.json").is_file()


@pytest.mark.parametrize("diagonal", [False, True])
def test_stella(diagonal: bool, tmp_path: Path):
    name = "model.layers.0.self_attn.q_proj"
    arrays = stella.factors({name: 2}, diagonal)
    source = stella.write(tmp_path / "sony", arrays)
    imported(source, tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    assert file.method == "stella"
    for factor, x in arrays[name].items():
        np.testing.assert_array_equal(file.modules[name].factors[factor], x)
    w = np.zeros((32, 32))
    got = formulas.three_factors(w, file.modules[name].factors, 1.5)
    assert np.abs(got).max() > 0.1
    assert file.config.options.diagonal_s is diagonal


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_mlx(tmp_path / "mlx", pairs({"self_attn.q_proj": 2}))
    given = ["import", tmp_path / "mlx", "--out", tmp_path / "a", "--base-id", "me/it"]
    assert "(lora, 3 modules)" in command(capsys, *given)
    peft = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == "me/it"
    # other commands say what it is
    assert "manifold-lora import" in command(
        capsys, "inspect", tmp_path / "mlx", "--out", tmp_path / "i", code=2
    )


def refused(source: Path, base: Path | None, *words: str) -> None:
    out = source.with_name("refused")
    with pytest.raises(InputError) as caught:
        imported(source, out, base)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not out.exists()


def test_bad_files_of_mlx(base: Path, tmp_path: Path):
    good = pairs({"self_attn.q_proj": 2})
    path = write_mlx(tmp_path / "mlx", good)
    weights, config = path / "adapters.safetensors", path / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"

    def changed(**other: Any) -> None:
        config.write_text(json.dumps(settings | other))

    bad = dict(tensors)
    bad[f"{first}.lora_a"] = bad[f"{first}.lora_a"].T.copy()
    del bad[f"{second}.lora_b"]
    bad["model.embed_tokens.lora_a"] = bad["lm_head.weight"] = np.zeros((3, 2), "f4")
    save_file(bad, weights)
    refused(
        path,
        base,
        f"{first}.lora_a: found (2, 32), needed (32, 2)",
        f"{second}.lora_b: missing",
        "model.embed_tokens.lora_a: unexpected",
        "lm_head.weight: unexpected",
    )
    save_file(tensors | {f"{first}.lora_a": np.full((32, 2), np.nan, "f4")}, weights)
    refused(path, None, f"{first}.lora_a", "NaN")
    save_file(tensors, weights)
    changed(lora_parameters={"rank": 4, "scale": SCALE, "dropout": 0})
    refused(path, None, "needed (32, 4)", "needed (4, 32)")
    changed(lora_parameters={"rank": 2})
    refused(path, None, str(config), "scale")
    changed(fine_tune_type="full")
    refused(path, None, "'full'", "mlx_lm.fuse")
    config.unlink()
    refused(path, None, "adapter_config.json")


def test_what_is_no_low_rank_adapter(tmp_path: Path):
    good = pairs({"self_attn.q_proj": 2})
    path = write(tmp_path / "a", good, modules_to_save=["lm_head"], bias="all")
    refused(path, None, "modules_to_save=['lm_head']", "bias='all'", "PEFT")
    path = write(tmp_path / "b", good, peft_type="LOHA")
    refused(path, None, "LOHA")
    path = write(tmp_path / "c", good)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused(path, None, "adapter_model.bin is a pickle", "save_pretrained")
    with pytest.raises(InputError, match="ADAPTER.*--out"):
        ImportConfig()


def test_another_base_is_refused(tmp_path: Path):
    path = write(tmp_path / "a", pairs({"self_attn.q_proj": 2, "mlp.up_proj": 2}))
    from tests.models import reference

    config = tiny.CONFIG | {"intermediate_size": 56}
    tensors = reference.random_tensors(config)
    base = reference.write_checkpoint(tmp_path / "base", config, tensors)
    refused(path, base, *(f"model.layers.{n}.mlp.up_proj" for n in range(3)))
