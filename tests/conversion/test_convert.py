"""convert: the same weights by every method's own formula, on its manifolds."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from manifold_lora import ConvertConfig, InputError, convert_adapter
from manifold_lora.adapters import AdapterConfig
from manifold_lora.adapters.options import OptimizerInputs, adapter_class
from manifold_lora.checkpoints.adapter_file import AdapterFile, read_adapter
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.configuration.parts import ModelConfig
from manifold_lora.methods import METHODS
from tests import adapters as tiny
from tests.adapters import formulas
from tests.cases import slow_but
from tests.checkpoints.peft_files import pairs, write
from tests.conversion.cases import HELD, adapter, command, model_directory
from tests.tiny import data_file
from tests.tiny import model_directory as with_tokenizer
from tests.tolerances import FLOAT32, LOGITS, RESIDUAL

PLAIN = [method for method in METHODS if "dora" not in method]
LAYERED = AdapterConfig(  # ranks 3, 2 and 0, with scales of their own
    "lora",
    rank=2,
    alpha=5,
    rslora=True,
    dropout=0.25,
    targets=r"model\.layers\.[01]\.(self_attn\.v|mlp\.down)_proj",
    rank_pattern={"v_proj": 3},
    alpha_pattern={"down_proj": 2.5},
)


def weights(file: AdapterFile) -> dict[str, np.ndarray]:
    """The adapted weights in float64, by the formula of the method."""
    new = formulas.NEW_WEIGHT[file.method]
    return {
        full: new(
            np.asarray(tiny.TENSORS[f"{full}.weight"], np.float64),
            {k: np.asarray(x, np.float64) for k, x in module.factors.items()},
            module.scale,
        )
        for full, module in file.modules.items()
    }


def check(source: Path, out: Path) -> AdapterFile:
    """The same weights, and factors on the manifolds."""
    before, after = read_adapter(source), read_adapter(out)
    got, needed = weights(after), weights(before)
    assert got.keys() == needed.keys()
    for full, x in needed.items():
        assert tiny.error(x, tiny.TENSORS[f"{full}.weight"]) > 0.01, full
        size = max(1.0, float(np.abs(x).max()))
        assert tiny.error(got[full], x) < FLOAT32 * size, full
    declared = adapter_class(after.method).factors(after.config)
    for module in after.modules.values():
        for name, factor in declared.items():
            assert module.factors[name].dtype == np.float32
            residual = factor.manifold.residual(jnp.asarray(module.factors[name]))
            assert float(residual) < RESIDUAL
            if factor.part_of is not None:
                point = {k: jnp.asarray(x) for k, x in module.factors.items()}
                assert float(factor.part_of.residual(point)) < RESIDUAL
    for field in ("rslora", "dropout", "targets"):
        assert getattr(after.config, field) == getattr(before.config, field)
    assert after.base == before.base
    return after


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layered") / "a"
    adapter(path, LAYERED)
    return path


@pytest.mark.parametrize("method", PLAIN)
def test_every_method_holds_the_same_update(method: str, layered: Path, tmp_path: Path):
    config = ConvertConfig(adapter=layered, method=method, out=tmp_path / "b")
    result = convert_adapter(config)
    after = check(layered, tmp_path / "b")
    assert after.method == result["method"] == method
    assert {m.rank for m in after.modules.values()} == {2, 3}
    assert result["largest_update_difference"] < FLOAT32
    assert result["largest_logit_difference"] is None


@pytest.mark.parametrize("case", sorted({*HELD} - {"lora-kaiming"}))
def test_any_adapter_is_a_source(case: str, tmp_path: Path):
    adapter(tmp_path / "a", case)
    method = "stiefel_dora" if "dora" in case else "loram_br"
    convert_adapter(
        ConvertConfig(adapter=tmp_path / "a", method=method, out=tmp_path / "b")
    )
    check(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("diagonal", [False, True])
def test_s_of_stella(diagonal: bool, tmp_path: Path):
    adapter(tmp_path / "a", "stella-zero")
    config = ConvertConfig(
        adapter=tmp_path / "a", method="stella", out=tmp_path / "b", diagonal_s=diagonal
    )
    convert_adapter(config)
    after = check(tmp_path / "a", tmp_path / "b")
    shapes = {m.factors["s"].shape for m in after.modules.values()}
    assert shapes == ({(2,)} if diagonal else {(2, 2)})
    assert after.config.options.diagonal_s is diagonal


@pytest.mark.parametrize(
    "method", slow_but(["landing_oblique"], ["loram_fr", "landing_oblique"])
)
def test_it_loads_and_takes_a_step(method: str, layered: Path, tmp_path: Path):
    base = model_directory(tmp_path / "base")
    config = ConvertConfig(
        adapter=layered, method=method, out=tmp_path / "b", model=base
    )
    assert convert_adapter(config)["largest_logit_difference"] < LOGITS
    model = load_llama(base)
    model.remat = "none"
    ml.load_adapter(model, tmp_path / "b")
    rebuild, factors, frozen = ml.split(model)
    constant = optax.constant_schedule(1e-3)
    inputs = OptimizerInputs(ml.manifold_tree(model), constant, constant, 0.0, 32)
    tx = read_adapter(tmp_path / "b").config.options.transformation(inputs)

    def loss(factors: Any) -> jax.Array:
        logits = rebuild(factors, frozen)(jnp.asarray(tiny.IDS))[:, :-1]
        labels = jnp.asarray(tiny.IDS)[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    before, gradients = value_and_gradient(factors)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(factors), factors)
    after, _ = value_and_gradient(optax.apply_updates(factors, updates))
    assert after < before


@pytest.mark.slow
def test_train_continues_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = with_tokenizer(tmp_path / "base")
    data = data_file(tmp_path / "data.jsonl")
    full = "model.layers.1.self_attn.q_proj"
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 32)) / 9, rng.normal(size=(32, 2)) / 9
    write(tmp_path / "peft", {full: pair})
    done = command(
        capsys, "convert", tmp_path / "peft", "--to", "stella", "--out",
        tmp_path / "stella", "--model", base,
    )  # fmt: skip
    assert "Logits of a probe batch differ" in done
    config = ml.TrainConfig(
        model=ModelConfig(path=base),
        data=ml.DataConfig(paths=(data,)),
        schedule=ml.ScheduleConfig(steps=1, warmup_steps=0),
        batch=ml.BatchConfig(batch_size=4, sequence_length=32),
        output=ml.OutputConfig(out=tmp_path / "run"),
        initial_adapter=tmp_path / "stella",
    )
    assert config.adapter.method == "stella"
    ml.train(config)
    start = read_adapter(tmp_path / "run" / "start").modules[full]
    for name, x in read_adapter(tmp_path / "stella").modules[full].factors.items():
        np.testing.assert_array_equal(start.factors[name], x)
    trained = read_adapter(tmp_path / "run" / "last").modules[full]
    assert not np.array_equal(trained.factors["s"], start.factors["s"])


def refused(source: Path, method: str, *words: str) -> None:
    out = source.with_name("refused")
    with pytest.raises(InputError) as caught:
        convert_adapter(ConvertConfig(adapter=source, method=method, out=out))
    for word in words:
        assert word in str(caught.value)
    assert not out.exists()


def test_dora_stays_dora(tmp_path: Path):
    adapter(tmp_path / "a", "stiefel_dora-random")
    for method in PLAIN:
        refused(tmp_path / "a", method, method, "dora or stiefel_dora")
    adapter(tmp_path / "b", "lora-kaiming")
    refused(tmp_path / "b", "dora", "lengths", ", ".join(PLAIN))


def test_updates_of_lower_rank(tmp_path: Path):
    pair = pairs({"self_attn.q_proj": 3}, layers=(0, 1))
    for full, (a, b) in pair.items():
        b[:, -1] = 0  # an unused column
        if "layers.1" in full:
            b[:] = a[:] = 0
    write(tmp_path / "a", pair, r=3)
    refused(tmp_path / "a", "loram_fr", "layers.0.self_attn.q_proj", "loram_br")
    for method in ("loram_br", "stella", "stiefel", "landing_oblique"):
        convert_adapter(
            ConvertConfig(adapter=tmp_path / "a", method=method, out=tmp_path / method)
        )
        after = read_adapter(tmp_path / method)
        got, needed = weights(after), weights(read_adapter(tmp_path / "a"))
        for full, x in needed.items():
            assert tiny.error(got[full], x) < FLOAT32
        declared = adapter_class(method).factors(after.config)
        for module in after.modules.values():
            for name, factor in declared.items():
                x = jnp.asarray(module.factors[name])
                assert float(factor.manifold.residual(x)) < RESIDUAL


def test_more_columns_than_the_layer_has(tmp_path: Path):
    pair = pairs({"self_attn.k_proj": 24})  # 16 outputs
    write(tmp_path / "a", pair, r=24)
    convert_adapter(
        ConvertConfig(adapter=tmp_path / "a", method="stiefel", out=tmp_path / "b")
    )
    after = check(tmp_path / "a", tmp_path / "b")
    assert after.config.rank == 16


def test_all_problems_at_once():
    with pytest.raises(InputError) as caught:
        ConvertConfig(method="stela", diagonal_s=True)
    for words in ("ADAPTER", "--out", "Did you mean stella?", "--diagonal-s"):
        assert words in str(caught.value)


def test_the_settings_are_written(layered: Path, tmp_path: Path):
    config = ConvertConfig(adapter=layered, method="loram_br", out=tmp_path / "b")
    convert_adapter(config)
    settings = json.loads((tmp_path / "b" / "manifold_lora.json").read_text())
    assert settings["method"] == "loram_br"
    assert settings["rslora"] is True
    assert settings["dropout"] == 0.25
