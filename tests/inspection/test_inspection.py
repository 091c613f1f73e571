"""`inspect` on adapters of every method, of PEFT and of StelLA, against full ΔW."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console
from safetensors.numpy import save_file

import manifold_lora as ml
from manifold_lora.adapters.attach import adapters
from manifold_lora.checkpoints.adapter_file import (
    AdapterFile,
    ModuleFactors,
    read_adapter,
)
from manifold_lora.inspection import view
from manifold_lora.inspection.inspect import inspect_adapter, locate
from manifold_lora.inspection.measure import measure
from manifold_lora.manifolds import Euclidean, Oblique, Stiefel
from manifold_lora.methods import METHODS
from tests.adapters.test_factor import OtherNames
from tests.cases import slow_but
from tests.inspection.runs import run_directory
from tests.tolerances import FLOAT32, FLOAT64, RESIDUAL

PICTURES = ["effective_rank.png", "gram.png", "spectra.png"]


def inspect(path, out=None, width=80):
    console = Console(file=io.StringIO(), width=width)
    report = inspect_adapter(path, out, console)
    return report, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def file_of(modules, method="lora"):
    config = ml.AdapterConfig(method if method in METHODS else "lora", rank=2)
    return AdapterFile(method, config, modules, None)


def module(a, b, manifolds=None, scale=2.0, factors=None):
    factors = {"a": a, "b": b} if factors is None else factors
    given: dict[str, ml.Manifold] = dict.fromkeys(factors, Euclidean())
    given |= manifolds or {}
    rank = b.shape[1]
    return ModuleFactors(a, b, scale, factors, given, rank, scale * rank)


def update_of(model, name):
    """ΔW (out, in) in float64 as the model applies it; of DoRA, without magnitudes."""
    *_, layer, block, projection = name.split(".")
    adapter = adapters(model)[f"{block}.{projection}"]
    a, b = (np.asarray(x[int(layer)], np.float64) for x in adapter.pair())
    return float(adapter.scale[...][int(layer)]) * b @ a.T


@pytest.mark.parametrize("method", slow_but(["dora", "stella", "loram_fr"], METHODS))
def test_update_of_every_method(tmp_path, method):
    model = run_directory(tmp_path / "run", method)
    report, _ = inspect(tmp_path / "run")
    assert report["method"] == method and len(report["modules"]) == 4
    for name, numbers in report["modules"].items():
        full, found = update_of(model, name), numbers["delta_w"]
        sigma = np.linalg.svd(full, compute_uv=False)[:4]
        np.testing.assert_allclose(found["singular_values"], sigma, rtol=FLOAT32)
        p = sigma / sigma.sum()
        effective = math.exp(-np.sum(p * np.log(p)))
        assert found["effective_rank"] == pytest.approx(effective, rel=FLOAT32)
        stable = (sigma**2).sum() / sigma[0] ** 2
        assert found["stable_rank"] == pytest.approx(stable, rel=FLOAT32)
        assert found["rank_used"] == numbers["rank"] == 4
        assert found["norm"] == pytest.approx(np.linalg.norm(full), rel=FLOAT32)
        places = [(w["row"], w["column"]) for w in found["largest_weights"]]
        values = [w["value"] for w in found["largest_weights"]]
        np.testing.assert_allclose(values, [full[p] for p in places], rtol=FLOAT32)
        np.testing.assert_allclose(
            np.abs(values), np.sort(np.abs(full), axis=None)[:-6:-1], rtol=FLOAT32
        )


@pytest.mark.parametrize("method", slow_but(["dora", "stella", "loram_fr"], METHODS))
def test_factors_of_every_method(tmp_path, method):
    run_directory(tmp_path / "run", method)
    report, _ = inspect(tmp_path / "run")
    held = {
        "stiefel": {"b": Stiefel},
        "stiefel_dora": {"b": Stiefel},
        "landing_stiefel": {"b": Stiefel},
        "landing_oblique": {"b": Oblique},
        "stella": {"u": Stiefel, "v": Stiefel},
        "loram_fr": {"u": Stiefel, "v": Stiefel},
        "loram_br": {"v": Stiefel},
    }.get(method, {})
    now = read_adapter(tmp_path / "run" / "adapter").modules
    start = read_adapter(tmp_path / "run" / "start").modules
    for name, numbers in report["modules"].items():
        assert set(numbers["factors"]) == set(now[name].factors) - {"m"}
        for key, found in numbers["factors"].items():
            x = now[name].factors[key].astype(np.float64)
            gram = x.T @ x
            off = gram - np.eye(4)
            if held.get(key) is Oblique:
                off = np.diag(off)
            if key in held:
                assert found["manifold"] == held[key].__name__
                assert found["residual"] == pytest.approx(
                    np.abs(off).max(), abs=RESIDUAL
                )
            else:
                assert (found["manifold"], found["residual"]) == ("Euclidean", None)
            length = np.sqrt(np.diag(gram))
            pairs = (gram / length / length[:, None])[np.triu_indices(4, 1)]
            cosines = [found[f"cosine_{n}"] for n in ("mean", "std", "max")]
            expected = [pairs.mean(), pairs.std(), np.abs(pairs).max()]
            np.testing.assert_allclose(cosines, expected, atol=FLOAT64)
            if start[name].factors[key].any() and key != "s":
                assert 0 < found["angle_mean"] <= found["angle_largest"] <= 90
            else:
                assert found["angle_mean"] is found["angle_largest"] is None


def test_a_subspace_turned_by_30_degrees():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 3)))[0]
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    before = module(np.ones((5, 2)), q[:, :2])
    turned = np.stack([q[:, 0], c * q[:, 1] + s * q[:, 2]], axis=1)
    now = module(np.ones((5, 2)), turned)
    found = measure(file_of({"lm_head": now}), file_of({"lm_head": before}))
    b = found["modules"]["lm_head"]["factors"]["b"]
    assert b["angle_largest"] == pytest.approx(30, abs=math.degrees(FLOAT64))
    assert b["angle_mean"] == pytest.approx(15, abs=math.degrees(FLOAT64))


def test_means_and_maxima_over_layers():
    """Columns at 60 and 90 degrees; B has twice the norm in the second layer."""
    a = np.eye(6)[:, :2]
    skew = np.array([[1, 0.5], [0, math.sqrt(3) / 2], [0, 0]])
    modules = {
        "model.layers.10.mlp.up_proj": module(a, skew, {"b": Oblique()}),
        "model.layers.2.mlp.up_proj": module(a, 2 * np.eye(3)[:, :2], {"b": Oblique()}),
        "model.layers.2.self_attn.q_proj": module(a[:, :1], 5 * np.ones((3, 1))),
    }
    report = measure(file_of(modules))
    # in the order of the computation
    assert [n.split("layers.")[1] for n in report["modules"]] == [
        "2.self_attn.q_proj",
        "2.mlp.up_proj",
        "10.mlp.up_proj",
    ]
    assert list(report["kinds"]) == ["self_attn.q_proj", "mlp.up_proj"]
    up = report["kinds"]["mlp.up_proj"]
    b = up["factors"]["b"]
    assert b["cosine_mean"] == pytest.approx(0.25)
    assert b["cosine_max"] == pytest.approx(0.5)
    assert b["residual"] == pytest.approx(3)  # ‖2e‖² − 1
    assert up["delta_w"]["norm"] == pytest.approx(2 * (math.sqrt(2) + math.sqrt(8)) / 2)
    largest = up["delta_w"]["largest_weight"]
    assert largest["module"] == "model.layers.2.mlp.up_proj"
    assert largest["value"] == 4
    everything = report["summary"]
    assert everything["modules"] == 3
    assert everything["rank"] == pytest.approx(5 / 3)
    assert everything["delta_w"]["largest_weight"]["value"] == 10
    one = report["kinds"]["self_attn.q_proj"]["factors"]["b"]
    assert one["cosine_mean"] is one["residual"] is None


def test_a_diagonal_s_is_a_diagonal_matrix(tmp_path):
    run_directory(tmp_path / "run", "stella", diagonal_s=True)
    report, _ = inspect(tmp_path / "run")
    modules = read_adapter(tmp_path / "run" / "adapter").modules
    for name, numbers in report["modules"].items():
        s = modules[name].factors["s"]
        assert s.shape == (4,)
        found = numbers["factors"]["s"]
        assert found["shape"] == [4, 4]
        np.testing.assert_allclose(found["singular_values"], np.sort(np.abs(s))[::-1])


def test_a_fixed_factor_and_a_fixed_correction(tmp_path):
    run_directory(tmp_path / "fixed", "lora", fixed_a="random")
    report, _ = inspect(tmp_path / "fixed")
    a = report["modules"]["model.layers.0.self_attn.q_proj"]["factors"]["a"]
    assert a["manifold"] == "fixed"
    assert a["angle_largest"] == pytest.approx(0, abs=FLOAT32)
    model = run_directory(tmp_path / "pissa", "lora", init="pissa")
    report, _ = inspect(tmp_path / "pissa")
    for name, numbers in report["modules"].items():
        assert list(numbers["factors"]) == ["a", "b"]
        sigma = np.linalg.svd(update_of(model, name), compute_uv=False)[:8]
        found = numbers["delta_w"]["singular_values"]
        np.testing.assert_allclose(found, sigma, atol=FLOAT32 * sigma[0])


def test_a_method_with_other_names(tmp_path, monkeypatch):
    """Matrices, their order and their plots follow from the declared factors."""
    monkeypatch.setattr("manifold_lora.adapters.lora.LoRALinear", OtherNames)
    drawn = {}
    monkeypatch.setattr(view, "plot_gram", lambda path, rows, title: drawn.update(rows))
    run_directory(tmp_path / "run", "lora")
    report, _ = inspect(tmp_path / "run")
    modules = read_adapter(tmp_path / "run" / "adapter").modules
    for name, numbers in report["modules"].items():
        x, factors = modules[name].factors, numbers["factors"]
        # as declared, without the constant that is added to `right` and the vector
        assert list(factors) == ["left", "core", "gains", "right"]
        assert [f["manifold"] for f in factors.values()] == [
            "Stiefel",
            "Euclidean",
            "Euclidean",
            "Oblique",
        ]
        left = np.abs(x["left"].T @ x["left"] - np.eye(4)).max()
        right = np.abs(np.sum(x["right"] ** 2, axis=0) - 1).max()
        residuals = [f["residual"] for f in factors.values()]
        assert residuals == pytest.approx([left, None, None, right], abs=RESIDUAL)
        sigma = np.sort(np.abs(x["gains"]))[::-1]
        np.testing.assert_allclose(factors["gains"]["singular_values"], sigma)
        assert factors["gains"]["shape"] == [4, 4]
        assert factors["core"]["angle_mean"] is None  # square
        assert 0 < factors["left"]["angle_mean"] <= 90
        product = x["left"] @ x["core"] @ (x["right"] * x["gains"] + x["still"]).T
        update = numbers["scale"] * x["shift"][:, None] * product
        sigma = np.linalg.svd(update, compute_uv=False)[:4]
        np.testing.assert_allclose(
            numbers["delta_w"]["singular_values"], sigma, rtol=FLOAT32
        )
    assert {label.split()[1] for label in drawn} == {"LEFTᵀLEFT", "RIGHTᵀRIGHT"}


def write_foreign(path, config, tensors):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {
            f"base_model.model.{k}": np.ascontiguousarray(v, np.float32)
            for k, v in tensors.items()
        },
        path / "adapter_model.safetensors",
    )
    return path


def test_an_adapter_of_peft_with_ranks_by_layer(tmp_path):
    rng = np.random.default_rng(0)
    tensors, full = {}, {}
    for layer, r in ((0, 3), (2, 2)):
        name = f"model.layers.{layer}.self_attn.v_proj"
        a, b = rng.normal(size=(r, 7)), rng.normal(size=(5, r))
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        full[name] = 6 / r * b @ a
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    config["rank_pattern"] = {r"layers\.2\.self_attn\.v_proj": 2}
    path = write_foreign(tmp_path / "foreign", config, tensors)
    report, shown = inspect(path)
    for name, numbers in report["modules"].items():
        sigma = np.linalg.svd(full[name], compute_uv=False)[: numbers["rank"]]
        found = numbers["delta_w"]["singular_values"]
        np.testing.assert_allclose(found, sigma, rtol=FLOAT32)
    assert report["start"] is None
    assert "not available without start/" in " ".join(shown.split())
    assert sorted(p.name for p in (tmp_path / "foreign-inspect").iterdir()) == sorted(
        ["inspect.json", *PICTURES]
    )


def test_an_adapter_of_stella(tmp_path):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (6, 8))
    name = "model.layers.0.mlp.down_proj"
    tensors = {"U": u, "S": [3.0, 1.0, 0.01], "Vt": v.T}
    path = write_foreign(
        tmp_path / "foreign",
        {"peft_type": "STELLA", "r": 3, "lora_alpha": 6, "stella_diag_s": True},
        {f"{name}.stella_{key}.weight": x for key, x in tensors.items()},
    )
    report, _ = inspect(path, tmp_path / "out")
    numbers = report["modules"][name]
    assert report["method"] == "stella"
    np.testing.assert_allclose(
        numbers["delta_w"]["singular_values"], [6, 2, 0.02], rtol=FLOAT32
    )
    assert numbers["delta_w"]["rank_used"] == 2  # the third is below 1 % of the first
    assert list(numbers["factors"]) == ["u", "s", "v"]
    for key in "uv":
        assert numbers["factors"][key]["residual"] < RESIDUAL
        assert numbers["factors"][key]["effective_rank"] == pytest.approx(3)


@pytest.mark.pictures
def test_output_files_and_tables(tmp_path, monkeypatch):
    run_directory(tmp_path / "run", "stiefel")
    before = sorted(p.name for p in (tmp_path / "run" / "adapter").iterdir())
    report, shown = inspect(tmp_path / "run")
    out = tmp_path / "run" / "inspect"

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (out / "inspect.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == report
    assert sorted(p.name for p in out.iterdir()) == sorted(["inspect.json", *PICTURES])
    for name in PICTURES:
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 0.01, name
    assert sorted(p.name for p in (tmp_path / "run" / "adapter").iterdir()) == before
    assert max(map(len, shown.partition("Wrote")[0].splitlines())) <= 80 + len(
        str(tmp_path)
    )
    update, factors = shown.split("Factors")
    for table, rows in ((update, 3), (factors, 6)):
        lines = [line for line in table.splitlines() if "." in line and "  " in line]
        assert len([x for x in lines if x.split()[0] != "angle:"]) >= rows
    assert " q_proj " in update and " down_proj " in factors and " all " in factors
    # Again, given the adapter itself: the same output directory and the same measures.
    again, _ = inspect(tmp_path / "run" / "adapter")
    assert again["modules"] == report["modules"]
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    assert locate(type(tmp_path)(".")).out.resolve() == out


def test_output_directories(tmp_path):
    run, lone = tmp_path / "run", tmp_path / "mine"
    for path in (run / "adapter", run / "start", run / "best", lone):
        path.mkdir(parents=True)
    (run / "config.toml").touch()
    assert locate(run) == (run / "adapter", run / "start", run / "inspect")
    assert locate(run / "adapter")[1:] == (run / "start", run / "inspect")
    assert locate(run / "best")[1:] == (run / "start", run / "best-inspect")
    (tmp_path / "start").mkdir()  # unrelated: the directory is not a run
    assert locate(lone) == (lone, None, tmp_path / "mine-inspect")
    assert locate(lone, tmp_path / "out").out == tmp_path / "out"


def test_an_update_of_zeros(tmp_path):
    """B = 0 at initialisation: rank 0, and no cosines or angles."""
    run_directory(tmp_path / "run", "lora")
    report, shown = inspect(tmp_path / "run" / "start")
    update = report["summary"]["delta_w"]
    assert update["rank_used"] == update["effective_rank"] == update["norm"] == 0
    b = report["summary"]["factors"]["b"]
    assert b["stable_rank"] == 0 and b["cosine_max"] is b["angle_mean"] is None
    assert "–" in shown
