"""Our own files beside PEFT's: inconsistent ones are errors."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import manifold_lora as ml
from manifold_lora.adapters import adapters, attach
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.checkpoints.adapter_writer import Format
from manifold_lora.checkpoints.peft import fingerprint, load_adapter, save_adapter
from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.adapters.cases import CASES, config
from tests.checkpoints.peft_files import (
    CONFIG,
    EXTRA,
    FACTORS,
    FORMATS,
    WEIGHTS,
    read,
    same,
)
from tests.tolerances import FLOAT32

TARGET = "v_proj"
WITH_FACTORS = [
    "dora-kaiming",
    "stella-random",
    "stella-diagonal_s=True",
    "loram_fr-identity",
    "loram_br-zero",
    "lora-pissa",
]
FULL = "model.layers.1.self_attn.v_proj"


def saved(case: str, path: Path, format: Format = "portable") -> Path:
    attach(model := tiny.base(), config(case, targets=TARGET))
    save_adapter(tiny.randomize(model), path, format=format)
    return path


def edit(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(path: Path, *words: str) -> None:
    model = tiny.base()
    with pytest.raises(InputError) as caught:
        load_adapter(model, path)
    for word in words:
        assert word in str(caught.value)
    assert not adapters(model)


def scaled(end: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in tensors:
            if FULL in key and key.endswith(end):
                tensors[key] = tensors[key] * np.float32(1.001)

    return change


@pytest.mark.parametrize("case", WITH_FACTORS)
@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_tensors_changed_by_another_tool(case: str, end: str, tmp_path: Path):
    path = saved(case, tmp_path / "a")
    update = {n: np.asarray(m.weight()) for n, m in loaded(path).items()}
    edit(path / WEIGHTS, scaled(end))
    remedy = ["remove this file and manifold_lora.json", "plain LoRA"]
    refused(path, str(path / FACTORS), WEIGHTS, f"{FULL} differs", *remedy)
    for file in (FACTORS, EXTRA):
        (path / file).unlink()
    for name, module in loaded(path).items():
        assert module.config.method == ("dora" if "dora" in case else "lora")
        assert tiny.error(module.weight(), update[name]) < 0.01
        assert tiny.error(module.weight()[0], update[name][0]) < FLOAT32


def loaded_model(path: Path) -> Llama:
    load_adapter(model := tiny.base(), path)
    return model


def loaded(path: Path) -> dict[str, LowRankLinear]:
    return adapters(loaded_model(path))


@pytest.mark.parametrize("case", ["dora-kaiming", "stiefel_dora-random"])
def test_magnitudes_changed_by_another_tool(case: str, tmp_path: Path):
    path = saved(case, tmp_path / "a")
    edit(path / WEIGHTS, scaled("lora_magnitude_vector"))
    refused(path, str(path / FACTORS), f"{FULL} differs")


@pytest.mark.parametrize("case", [c for c in WITH_FACTORS if "dora" not in c])
def test_missing_factors(case: str, tmp_path: Path):
    path = saved(case, tmp_path / "a")
    edit(path / FACTORS, lambda t: [t.pop(k) for k in list(t) if f"{FULL}." in k])
    refused(path, str(path / FACTORS), f"has no {FULL}.")
    (path / FACTORS).unlink()
    refused(path, str(path / FACTORS), "has no model.layers.0.self_attn.v_proj.")


def test_factors_of_other_shapes(tmp_path: Path):
    path = saved("loram_br-zero", tmp_path / "a")
    edit(path / FACTORS, lambda t: t.update({f"{FULL}.a": np.ones((3, 2), "f4")}))
    refused(path, str(path / FACTORS), f"{FULL} differs")


def test_factors_that_the_method_does_not_have(tmp_path: Path):
    path = saved("loram_br-zero", tmp_path / "a")
    edit(path / FACTORS, lambda t: t.update({f"{FULL}.w": np.ones((3, 2), "f4")}))
    refused(path, str(path / FACTORS), f"{FULL}.w, which is not an array of loram_br")


@pytest.mark.parametrize("end", ["a0", "b0"])
def test_corrections_of_another_adapter(end: str, tmp_path: Path):
    path = saved("lora-pissa", tmp_path / "a")
    edit(path / FACTORS, scaled(f".{end}"))
    refused(path, str(path / FACTORS), f"{FULL} differs")


# What earlier files say of every method, whether it has that option or not.
UNSET = {"fixed_a": None, "diagonal_s": False, "diagonal_scaling": False}


@pytest.mark.parametrize(
    "case",
    [
        "lora-pissa",
        "lora-fixed_a=random",
        "stella-zero",
        "stella-diagonal_s=True",
        "loram_fr-zero",
        "dora-gaussian",
        "landing_oblique-random",
    ],
)
def test_files_of_earlier_versions(case: str, tmp_path: Path):
    """`init` was called `start`, the options of all methods stood there, and no format
    but PEFT's literal one was known."""
    path = saved(case, tmp_path / "a", "peft")
    needed, factors = loaded(path), tiny.arrays(loaded_model(path))
    settings = read(path / EXTRA)
    assert settings.pop("format") == "peft"
    old = UNSET | {"start" if key == "init" else key: x for key, x in settings.items()}
    assert old.keys() == UNSET.keys() | settings.keys() - {"init"} | {"start"}
    (path / EXTRA).write_text(json.dumps(old))
    same(tiny.arrays(loaded_model(path)), factors)
    for name, module in loaded(path).items():
        assert module.config == needed[name].config
        assert module.config.options.init == old["start"]


def test_options_of_another_method_are_refused(tmp_path: Path):
    path = saved("lora-kaiming", tmp_path / "a")
    settings = read(path / EXTRA)
    (path / EXTRA).write_text(json.dumps(settings | UNSET | {"diagonal_s": True}))
    refused(path, str(path / EXTRA), "lora and diagonal_s=True", "goes with stella")


def test_factors_that_are_damaged(tmp_path: Path):
    path = saved("stella-random", tmp_path / "a")
    content = (path / FACTORS).read_bytes()
    (path / FACTORS).write_bytes(content[: len(content) // 2])
    refused(path, str(path / FACTORS), "truncated")


def test_factors_without_their_settings(tmp_path: Path):
    path = saved("stella-random", tmp_path / "a")
    (path / EXTRA).unlink()
    refused(path, str(path / FACTORS), "plain LoRA")


@pytest.mark.parametrize("case", ["lora-kaiming", "stella-random", "lora-pissa"])
@pytest.mark.parametrize("change", [{"lora_alpha": 50}, {"use_rslora": True}])
@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_changed_by_another_tool(
    case: str, change: dict[str, object], format: Format, tmp_path: Path
):
    path = saved(case, tmp_path / "a", format)
    (path / CONFIG).write_text(json.dumps(read(path / CONFIG) | change))
    refused(path, str(path / CONFIG), "scales model.layers.0", f"{EXTRA} by 2.5")


def test_columns_that_another_tool_added(tmp_path: Path):
    """Of a module of a lower rank, all columns beyond its rank must be zero."""
    one = f"{FULL.replace('.1.', '.0.')}"
    attach(model := tiny.base(), config("lora-kaiming", targets=TARGET,
           rank_pattern={one.replace(".", r"\."): 4}))  # fmt: skip
    save_adapter(tiny.randomize(model), path := tmp_path / "a")
    loaded(path)
    edit(path / WEIGHTS, lambda t: t[f"base_model.model.{FULL}.lora_B.weight"]
         .__setitem__((0, 3), 1.0))  # fmt: skip
    refused(path, f"{FULL} differs")


@pytest.mark.parametrize("value", ["gguf", 1])
def test_an_unknown_format(value: object, tmp_path: Path):
    path = saved("lora-kaiming", tmp_path / "a")
    (path / EXTRA).write_text(json.dumps(read(path / EXTRA) | {"format": value}))
    refused(path, str(path / EXTRA), "portable or peft", repr(value))


def test_an_unknown_setting(tmp_path: Path):
    path = saved("lora-kaiming", tmp_path / "a")
    (path / EXTRA).write_text(json.dumps(read(path / EXTRA) | {"rnak": 2}))
    refused(path, str(path / EXTRA), "'rnak'", "Did you mean rank", "newer version")


def test_settings_that_exclude_each_other(tmp_path: Path):
    path = saved("lora-kaiming", tmp_path / "a")
    (path / EXTRA).write_text(json.dumps(read(path / EXTRA) | {"diagonal_s": True}))
    refused(path, str(path / EXTRA), "lora and diagonal_s=True exclude each other")


def test_an_adapter_of_another_base(tmp_path: Path):
    path = saved("stella-random", tmp_path / "a")
    other = tiny.base()
    other.norm.scale.set_value(2 * other.norm.scale[...])
    needed = fingerprint(other)
    with pytest.raises(InputError) as caught:
        load_adapter(other, path)
    for word in (fingerprint(tiny.base()), needed, "check_base=False"):
        assert word in str(caught.value)
    load_adapter(other, path, check_base=False)
    load_adapter(same_base := tiny.base(), path)
    same(ml.factors(other), ml.factors(same_base))
    # an adapter of another tool does not record the base it was trained on
    (path / FACTORS).unlink()
    (path / EXTRA).unlink()
    another = tiny.base()
    another.norm.scale.set_value(2 * another.norm.scale[...])
    load_adapter(another, path)


@pytest.mark.parametrize("part", ["embedding", "first norm", "last norm"])
def test_the_fingerprint_depends_on_the_weights_only(part: str):
    assert fingerprint(tiny.base(jnp.bfloat16)) == fingerprint(tiny.base())
    model = tiny.base()
    norm = {
        "embedding": model.embed_tokens.table,
        "first norm": model.layers.input_layernorm.scale,
        "last norm": model.norm.scale,
    }[part]
    norm.set_value(norm[...] * 1.01)
    assert fingerprint(model) != fingerprint(tiny.base())


def test_the_cases_exist():
    assert set(WITH_FACTORS) <= CASES.keys()
