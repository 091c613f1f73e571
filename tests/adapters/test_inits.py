"""Initialisations: ΔW = 0 bit for bit, or what the method documents instead."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.adapters import AdapterConfig, adapters, attach, factors
from manifold_lora.adapters.loram_fr import S0
from manifold_lora.adapters.options import inits
from manifold_lora.methods import METHODS
from manifold_lora.models.remat import Remat
from tests import adapters as tiny
from tests.adapters.cases import (
    ALPHA,
    CASES,
    CHANGED,
    FEW,
    RANK,
    ROUNDED,
    config,
)
from tests.cases import slow_but
from tests.tolerances import FLOAT32, LOGITS, RESIDUAL

BOTH = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# One of every form of y. All cases are compared layer by layer in test_layers.
FORMS = [
    "lora-kaiming",
    "lora-pissa",
    "lora-diagonal_scaling=True",
    "dora-kaiming",
    "stella-zero",
    "loram_fr-zero",
    "loram_br-zero",
]
OTHERWISE = ["lora-orthogonal", "stella-random", "loram_fr-identity"]


@pytest.mark.parametrize(
    ("case", "dtype", "remat"),
    slow_but(
        [(case, "float32", "none") for case in [*FORMS, *OTHERWISE]]
        + [("dora-kaiming", "bfloat16", "block")],
        [(case, "float32", "none") for case in [*FORMS, *OTHERWISE]]
        + [(case, "bfloat16", "block") for case in FORMS]
        + [(case, "bfloat16", "none") for case in ("lora-kaiming", "dora-kaiming")]
        + [(case, "float32", "block") for case in ("lora-kaiming", "dora-kaiming")],
    ),
)
def test_the_model_equals_its_base_bit_for_bit_or_is_listed(
    case: str, dtype: str, remat: Remat
):
    plain, model = tiny.base(BOTH[dtype]), tiny.base(BOTH[dtype])
    plain.remat = model.remat = remat
    attach(model, config(case, targets=FEW))
    got, needed = tiny.logits(model), tiny.logits(plain)
    if case in CHANGED:
        size = tiny.error(got, needed)
        assert size > (S0 if case.startswith("loram_fr") else 0.5)
    elif case in ROUNDED:
        assert 0 < tiny.error(got, needed) < LOGITS
    else:
        np.testing.assert_array_equal(got, needed)


def test_the_lists_of_cases_are_complete():
    assert CHANGED | ROUNDED <= CASES.keys()
    assert {*FORMS} <= CASES.keys() - CHANGED - ROUNDED
    assert {*OTHERWISE} <= CHANGED | ROUNDED


DRAWN = {  # what is random, by method
    "lora": "a",
    "dora": "a",
    "stiefel": "b",
    "stiefel_dora": "b",
    "stella": "uv",
    "loram_fr": "uv",
    "loram_br": "v",
    "landing_stiefel": "b",
    "landing_oblique": "b",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_initialisation(method: str):
    def initial(seed: int, dtype: type = jnp.float32) -> dict[str, np.ndarray]:
        given = AdapterConfig(method, rank=2, targets=FEW)
        attach(model := tiny.base(dtype), given, seed=seed)
        dtypes = {x.dtype for x in jax.tree.leaves(factors(model))}
        assert dtypes == {np.dtype("float32")}  # also on a bfloat16 base
        return {
            f"{name}.{factor}": np.asarray(getattr(module, factor)[...])
            for name, module in adapters(model).items()
            for factor in DRAWN[method]
        }

    first, again, other = initial(0), initial(0, jnp.bfloat16), initial(1)
    assert len(first) == len(FEW) * len(DRAWN[method])
    for name, one in first.items():
        np.testing.assert_array_equal(one, again[name])
        assert (one != other[name]).any(axis=(1, 2)).all()
    # no two layers or projections share their numbers
    numbers = {float(x) for one in first.values() for x in one[:, 0, 0]}
    assert len(numbers) == len(first) * tiny.LAYERS


def initialised(case: str) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """W (out, in) and the factors of every adapted layer, in float64."""
    attach(model := tiny.base(), config(case, targets=FEW))
    return [
        (tiny.TENSORS[f"{full}.weight"].astype(np.float64), x)
        for full, x in tiny.arrays(model).items()
    ]


def uniform(a: np.ndarray) -> None:
    """A is uniform on ±1/√in."""
    bound = 1 / math.sqrt(a.shape[0])
    assert 0.8 * bound < np.abs(a).max() <= bound
    # standard deviation of the mean of n uniform numbers
    assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.size)


def orthonormal(x: np.ndarray) -> None:
    assert tiny.error(x.T @ x, np.eye(x.shape[1])) < RESIDUAL


@pytest.mark.parametrize("case", ["lora-kaiming", "lora-fixed_a=random"])
def test_lora_is_initialised_uniformly(case: str):
    for _, x in initialised(case):
        uniform(x["a"])
        assert not x["b"].any()


def test_gaussian_has_deviation_one_over_the_rank():
    for case in ("lora-gaussian", "dora-gaussian"):
        found = [x for _, x in initialised(case)]
        a = np.concatenate([x["a"].ravel() for x in found])
        # standard deviation of the variance of n normal numbers
        assert abs(RANK**2 * a.var() - 1) < 4 * math.sqrt(2 / a.size)
        assert abs(RANK * a.mean()) < 4 / math.sqrt(a.size)
        assert not any(x["b"].any() for x in found)


def test_orthogonal_factors_have_no_product():
    squares = {"a": [], "b": []}
    for _, x in initialised("lora-orthogonal"):
        assert x["a"].any() and x["b"].any()
        assert tiny.error(x["b"] @ x["a"].T, 0) < FLOAT32
        for factor, found in squares.items():
            found.append(x[factor].ravel() ** 2)
    for found in squares.values():  # deviation 1/10 in half of the directions
        assert np.mean(np.concatenate(found)) == pytest.approx(0.005, rel=0.2)


def test_pissa_is_the_best_approximation_of_the_weight():
    for w, x in initialised("lora-pissa"):
        u, sigma, vt = np.linalg.svd(w)
        best = (u[:, :RANK] * sigma[:RANK]) @ vt[:RANK]
        # what rounding makes of the singular vectors grows as their gap shrinks
        near = FLOAT32 * sigma[0] ** 2 / (sigma[RANK - 1] - sigma[RANK])
        assert tiny.error(ALPHA / RANK * x["b"] @ x["a"].T, best) < near
        assert tiny.error(x["a"].T @ x["a"], x["b"].T @ x["b"]) < FLOAT32  # balanced
        for factor in "ab":
            np.testing.assert_array_equal(x[factor], x[f"{factor}0"])


def test_olora_is_the_beginning_of_qr():
    for w, x in initialised("lora-olora"):
        q, r = np.linalg.qr(w)
        assert tiny.error(x["b"] @ x["a"].T, q[:, :RANK] @ r[:RANK]) < FLOAT32
        orthonormal(x["b"])
        for factor in "ab":
            np.testing.assert_array_equal(x[factor], x[f"{factor}0"])


def test_a_fixed_projection_is_one_of_the_weight():
    for w, x in initialised("stiefel-fixed_a=projection"):
        assert tiny.error(x["a"], w.T @ x["b"]) < FLOAT32
        orthonormal(x["b"])
    for w, x in initialised("lora-fixed_a=projection"):
        p, rest, *_ = np.linalg.lstsq(w.T, x["a"], rcond=None)  # A = WᵀP
        orthonormal(p) if w.shape[0] < w.shape[1] else None
        assert not x["b"].any() and np.all(rest < FLOAT32)
    for _, x in initialised("stiefel-fixed_a=random"):
        uniform(x["a"])
        orthonormal(x["b"])


@pytest.mark.parametrize("case", [c for c in CASES if "fixed_a" in c])
def test_a_fixed_factor_is_not_trained(case: str):
    attach(model := tiny.base(), config(case, targets="q_proj"))
    assert factors(model)["layers"]["self_attn"]["q_proj"].keys() == {"b"}


@pytest.mark.parametrize("method", ["dora", "stiefel_dora"])
def test_magnitudes_are_the_lengths_of_the_rows(method: str):
    for w, x in initialised(f"{method}-{inits(method)[0]}"):
        np.testing.assert_allclose(
            x["m"], np.linalg.norm(w, axis=1), rtol=FLOAT32, atol=0
        )
        if method == "dora":
            uniform(x["a"])
        else:
            orthonormal(x["b"])


@pytest.mark.parametrize("init", ["svd_major", "svd_minor"])
def test_stella_takes_singular_vectors(init: str):
    for w, x in initialised(f"stella-{init}"):
        u, sigma, vt = np.linalg.svd(w, full_matrices=False)
        place = slice(RANK) if init == "svd_major" else slice(-RANK, None)
        assert tiny.error(x["u"] @ x["u"].T, u[:, place] @ u[:, place].T) < LOGITS
        assert tiny.error(x["v"] @ x["v"].T, vt[place].T @ vt[place]) < LOGITS
        # and they belong to each other, signs included
        middle = np.diag(x["u"].T @ w @ x["v"])
        np.testing.assert_allclose(middle, sigma[place], atol=FLOAT32 * sigma[0])
        np.testing.assert_array_equal(x["s"], np.eye(RANK))


MIDDLE = {
    "stella-random": np.eye(RANK),
    "stella-zero": np.zeros((RANK, RANK)),
    "stella-diagonal_s=True": np.ones(RANK),
    "loram_fr-identity": S0 * np.eye(RANK),
    "loram_fr-zero": np.zeros((RANK, RANK)),
}


@pytest.mark.parametrize("case", MIDDLE)
def test_three_factors_are_orthonormal(case: str):
    for _, x in initialised(case):
        orthonormal(x["u"])
        orthonormal(x["v"])
        np.testing.assert_allclose(x["s"], MIDDLE[case], rtol=FLOAT32)


@pytest.mark.parametrize(
    ("case", "zero", "constrained"),
    [
        ("stiefel-random", "a", "b"),
        ("landing_stiefel-random", "a", "b"),
        ("landing_oblique-random", "a", "b"),
        ("loram_br-zero", "a", "v"),
    ],
)
def test_one_factor_is_zero_and_one_is_on_its_manifold(
    case: str, zero: str, constrained: str
):
    for _, x in initialised(case):
        assert not x[zero].any()
        if case == "landing_oblique-random":
            lengths = np.linalg.norm(x[constrained], axis=0)
            assert tiny.error(lengths, 1) < RESIDUAL
        else:
            orthonormal(x[constrained])
