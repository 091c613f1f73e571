"""Adapters as they are exported: on their manifold, and of the rank they need."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.adapters.exported import as_exported
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.models import Llama
from manifold_lora.training.step import largest_residual
from tests import adapters as tiny
from tests.adapters import formulas
from tests.adapters.cases import FEW
from tests.tolerances import FLOAT32, LOGITS, RESIDUAL

pytestmark = pytest.mark.usefixtures("quick_compilation")
PATTERN = {r"layers\.1\..*": 4}
SOME = r"model\.layers\.[01]\.(self_attn\.[qv]|mlp\.down)_proj"  # layer 2 has rank 0


def unchanged(model: Llama, before: Any) -> None:
    after = ml.factors(model)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


def nearest(b: np.ndarray, method: str) -> np.ndarray:
    if method == "landing_oblique":
        return b / np.linalg.norm(b, axis=0)
    u, _, vt = np.linalg.svd(b, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("method", ["landing_stiefel", "landing_oblique"])
def test_what_only_landed_is_put_on_its_manifold(method: str, tmp_path: Path):
    given = AdapterConfig(method, rank=2, targets=SOME, rank_pattern=PATTERN)
    attach(model := tiny.base(), given)
    tiny.randomize(model)
    rng = np.random.default_rng(5)
    modules: dict[str, Any] = adapters(model)
    for module in modules.values():
        b = np.array(module.b[...])
        for layer, rank in enumerate(module.ranks):
            part = b[layer, : module.base.out_features, :rank]
            part += 0.03 * rng.normal(size=part.shape)
        module.b.set_value(jnp.asarray(b))
    before, trained = ml.factors(model), tiny.arrays(model)
    tags = ml.manifold_tree(model)
    assert largest_residual(tags, before) > 0.01
    with as_exported(model, project_on_export=True) as discarded:
        assert discarded == 0
        assert largest_residual(tags, ml.factors(model)) < RESIDUAL
        for full, x in tiny.arrays(model).items():
            near = nearest(trained[full]["b"], method)
            assert tiny.error(x["b"], near) < FLOAT32
            np.testing.assert_array_equal(x["a"], trained[full]["a"])
        save_adapter(model, tmp_path / "a")
        exported = ml.factors(model)
    unchanged(model, before)
    load_adapter(again := tiny.base(), tmp_path / "a")
    unchanged(again, exported)


# of A Vᵀ, by the rank of its layer and the place among all layers
SIGMAS = [
    [2.0, 1e-3],
    [1.5, 1.0, 2e-3, 1e-3],
    [2e-3, 1e-3],  # all below the threshold: rank 1 is the least
    [3.0, 2.5, 0.5, 0.25],
]


def with_values(model: Llama) -> None:
    """Give the layers of A Vᵀ the singular values SIGMAS in turn."""
    rng, turn = np.random.default_rng(6), 0
    modules: dict[str, Any] = adapters(model)
    for module in modules.values():
        a = np.array(module.a[...])
        for layer, rank in enumerate(module.ranks):
            if rank:
                sigma = SIGMAS[2 * (turn % 2) + (rank == 4)]
                left = np.linalg.qr(rng.normal(size=(a.shape[1], rank)))[0]
                right = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
                a[layer, :, :rank] = left * sigma @ right
                turn += rank == 4
        module.a.set_value(jnp.asarray(a))


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_truncation_keeps_the_rank_that_every_layer_needs(
    rslora: bool, scaled: bool, tmp_path: Path
):
    alphas = {r"layers\.1\.mlp.*": 3}
    given = AdapterConfig(
        "loram_br",
        rank=2,
        alpha=5,
        rslora=rslora,
        targets=SOME,
        rank_pattern=PATTERN,
        alpha_pattern=alphas,
        options={"diagonal_scaling": scaled},
    )
    attach(model := tiny.base(), given)
    if scaled:
        tiny.randomize(model)
    with_values(model)
    before, logits = ml.factors(model), tiny.logits(model) if not rslora else None
    scales, truncated, lost, total = {}, {}, 0.0, 0.0
    for full, x in tiny.arrays(model).items():
        layer, rank = int(full.split(".")[2]), x["a"].shape[1]
        alpha = 3 if layer == 1 and "mlp" in full else 5
        scales[full] = alpha / (math.sqrt(rank) if rslora else rank)
        u, sigma, vt = np.linalg.svd(x["a"] @ x["v"].T, full_matrices=False)
        kept = max(int((sigma > 0.01).sum()), 1)
        total += float((sigma**2).sum())
        lost += float((sigma[sigma < 0.01] ** 2).sum())
        sigma = np.where(sigma > 0.01, sigma, 0)[:kept]
        truncated[full] = {"a": u[:, :kept] * sigma, "v": vt[:kept].T}
    with as_exported(model, truncate_below=0.01) as discarded:
        assert discarded == pytest.approx(lost / total, rel=1e-3)
        found = tiny.arrays(model)
        assert found.keys() == truncated.keys()
        for full, x in found.items():
            assert x["a"].shape == truncated[full]["a"].shape
            needed = truncated[full]["a"] @ truncated[full]["v"].T
            assert tiny.error(x["a"] @ x["v"].T, needed) < FLOAT32
        # every layer keeps its own s, whatever its new rank
        diagonals = formulas.diagonals(model)
        assert bool(diagonals) == scaled
        weights = formulas.weights("loram_br", truncated, scales, diagonals)
        if not rslora:
            assert tiny.error(tiny.logits(model), tiny.needed_logits(weights)) < LOGITS
        else:
            for name, module in adapters(model).items():
                for layer in (0, 1):
                    full = f"model.layers.{layer}.{name}"
                    assert module.scale[...][layer] == pytest.approx(scales[full])
        exported = ml.factors(model)
        if not scaled:
            save_adapter(model, tmp_path / "a")
    unchanged(model, before)
    if logits is not None:
        np.testing.assert_array_equal(tiny.logits(model), logits)
    if scaled:
        return
    load_adapter(again := tiny.base(), tmp_path / "a")
    unchanged(again, exported)
    ranks = {full: x["a"].shape[1] for full, x in tiny.arrays(again).items()}
    assert ranks == {full: x["a"].shape[1] for full, x in truncated.items()}
    assert len({*ranks.values()}) > 1


def test_what_fails_inside_leaves_the_model_as_it_was():
    attach(model := tiny.base(), AdapterConfig("loram_br", rank=4, targets=FEW))
    with_values(model)
    before = ml.factors(model)
    with pytest.raises(OSError, match="disk"):
        with as_exported(model, truncate_below=0.01):
            raise OSError("no disk")
    unchanged(model, before)
