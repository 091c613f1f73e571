"""Ours against pymanopt: the same numbers, its own diagnostics and its optimisers."""

import re
from unittest import mock

import numpy as np
import pytest

from tests.peers.adapters import close, peer
from tests.tolerances import SLOPE

pymanopt = peer("pymanopt")
peer("autograd")
anp = pytest.importorskip("autograd.numpy")
diagnostics = pytest.importorskip("pymanopt.tools.diagnostics")
optimizers = pytest.importorskip("pymanopt.optimizers")
ours = pytest.importorskip("tests.peers.pymanopt_manifolds")
theirs = pymanopt.manifolds

pytestmark = pytest.mark.peers

# (n, p, k): the square case is the orthogonal group, p = 1 the sphere.
SHAPES = [(7, 3, 1), (5, 5, 1), (9, 1, 1), (40, 8, 1), (6, 2, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(42)


def drawn(manifold):
    x, y = manifold.random_point(), manifold.random_point()
    u, w = (manifold.random_tangent_vector(x) for _ in range(2))
    return x, y, u, w, np.random.normal(size=x.shape), np.random.normal(size=x.shape)


# Every function of the two Riemannian submanifolds of arrays, by name.
SAME = {
    "projection": lambda m, x, y, u, w, g, h: m.projection(x, g),
    "to_tangent_space": lambda m, x, y, u, w, g, h: m.to_tangent_space(x, g),
    "gradient": lambda m, x, y, u, w, g, h: m.euclidean_to_riemannian_gradient(x, g),
    "hessian": lambda m, x, y, u, w, g, h: m.euclidean_to_riemannian_hessian(
        x, g, h, u
    ),
    "retraction": lambda m, x, y, u, w, g, h: m.retraction(x, u),
    "long step": lambda m, x, y, u, w, g, h: m.retraction(x, 30 * u),
    "exp": lambda m, x, y, u, w, g, h: m.exp(x, u),
    "exp far": lambda m, x, y, u, w, g, h: m.exp(x, 5 * u),
    "transport": lambda m, x, y, u, w, g, h: m.transport(x, y, u),
    "inner_product": lambda m, x, y, u, w, g, h: m.inner_product(x, u, w),
    "norm": lambda m, x, y, u, w, g, h: m.norm(x, u + w),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("retraction", ["qr", "polar"])
@shapes
def test_stiefel(shape, retraction, name):
    n, p, k = shape
    manifold = ours.Stiefel(n, p, k=k, retraction=retraction)
    peer = theirs.Stiefel(n, p, k=k, retraction=retraction)
    data = drawn(peer)
    close(SAME[name](manifold, *data), SAME[name](peer, *data))


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("shape", [(7, 3), (4, 9), (9, 1)], ids=str)
def test_oblique(shape, name):
    peer = theirs.Oblique(*shape)
    data = drawn(peer)
    close(SAME[name](ours.Oblique(*shape), *data), SAME[name](peer, *data))


RANKS = [(10, 5, 3), (7, 4, 1), (5, 9, 5)]
ranks = pytest.mark.parametrize("shape", RANKS, ids=str)


def ambient(manifold, x, v):
    left, middle, right = manifold.embedding(x, v)
    return left @ middle @ right.T


def matrix(x):
    return (x[0] * x[1]) @ x[2]


# The same of fixed rank: `peer` turns points and tangents into dense matrices.
SAME_MATRIX = {
    "projection": lambda m, d, x, y, u, w, g: d(x, m.projection(x, g)),
    "projection of a triple": lambda m, d, x, y, u, w, g: d(
        y, m.projection(y, (x[0], np.diag(x[1]), x[2].T))
    ),
    "to_tangent_space": lambda m, d, x, y, u, w, g: d(x, m.to_tangent_space(x, u)),
    "transport": lambda m, d, x, y, u, w, g: d(y, m.transport(x, y, u)),
    "inner_product": lambda m, d, x, y, u, w, g: m.inner_product(x, u, w),
    "norm": lambda m, d, x, y, u, w, g: m.norm(x, u + w),
    "gradient": lambda m, d, x, y, u, w, g: d(
        x, m.euclidean_to_riemannian_gradient(x, of_factors(x, g))
    ),
}


def of_factors(x, g):
    """The gradients of a function of u diag(s) vᵀ, from its dense gradient."""
    u, s, vt = x
    return (g @ vt.T) * s, np.diag(u.T @ g @ vt.T), s[:, None] * (u.T @ g)


@pytest.mark.parametrize("name", SAME_MATRIX)
@ranks
def test_fixed_rank(shape, name):
    peer = theirs.FixedRankEmbedded(*shape)
    x, y = peer.random_point(), peer.random_point()
    u, w = (peer.random_tangent_vector(x) for _ in range(2))
    data = x, y, u, w, np.random.normal(size=shape[:2])

    def dense(x, v):
        return ambient(peer, x, v)

    f = SAME_MATRIX[name]
    manifold = ours.FixedRankEmbedded(*shape)
    close(f(manifold, dense, *data), f(peer, dense, *data), 1e-11)


@pytest.mark.parametrize("t", [1e-3, 0.5, 20.0])
@ranks
def test_truncation(shape, t):
    peer = theirs.FixedRankEmbedded(*shape)
    x = peer.random_point()
    u = peer.random_tangent_vector(x)
    mine = ours.FixedRankEmbedded(*shape).retraction(x, t * u)
    close(matrix(mine), matrix(peer.retraction(x, t * u)))


@ranks
def test_orthographic_is_second_order_as_truncation(shape):
    peer = theirs.FixedRankEmbedded(*shape)
    manifold = ours.FixedRankEmbedded(*shape, "orthographic")
    x = manifold.random_point()
    u = manifold.random_tangent_vector(x)
    ts = np.array([4e-2, 2e-2, 1e-2])
    gaps = [
        np.linalg.norm(
            matrix(manifold.retraction(x, t * u)) - matrix(peer.retraction(x, t * u))
        )
        for t in ts
    ]
    if shape[2] == min(shape[:2]):  # all matrices near x have full rank
        close(gaps, np.zeros(3), 1e-12)
    else:
        assert np.polyfit(np.log(ts), np.log(gaps), 1)[0] > 3 - SLOPE


# pymanopt's diagnostics of a problem: slope 2 for a right gradient, 3 for a Hessian.


def problem(manifold):
    """A function of all entries that is not of second degree."""
    shape = manifold.shape
    if isinstance(manifold, theirs.FixedRankEmbedded):
        a = np.random.normal(size=shape[:2])

        @pymanopt.function.autograd(manifold)
        def cost(u, s, vt):
            w = anp.dot(u * s, vt)
            return anp.sum(a * w + anp.sin(w) * a**2)

    else:
        a = np.random.normal(size=shape)

        @pymanopt.function.autograd(manifold)
        def cost(x):
            return anp.sum(a * x + anp.sin(x) * a**2)

    return pymanopt.Problem(manifold, cost)


@pytest.fixture(autouse=True)
def fitted_slope(monkeypatch):
    """pymanopt's search for a linear piece ends in an error since NumPy 2.4."""

    def piece(x, y, window_length):
        segment = np.flatnonzero((x > -3) & (x < -1.5))
        return segment, np.polyfit(x[segment], y[segment], 1)

    monkeypatch.setattr(diagnostics, "identify_linear_piece", piece)


def slope(problem, **options):
    return diagnostics.check_directional_derivative(problem, **options)[3][0]


STIEFELS = {
    f"stiefel {shape} {metric}": (ours.Stiefel, shape, {"metric": metric})
    for shape in [(7, 3), (5, 5), (9, 1)]
    for metric in ("euclidean", "canonical")
}
GRADIENTS = STIEFELS | {
    "oblique": (ours.Oblique, (7, 3), {}),
    "truncation": (ours.FixedRankEmbedded, (10, 5, 3), {"retraction": "truncation"}),
    "orthographic": (
        ours.FixedRankEmbedded,
        (10, 5, 3),
        {"retraction": "orthographic"},
    ),
}
HESSIANS = {k: v for k, v in GRADIENTS.items() if "euclidean" in k or k == "oblique"}


def made(table, name):
    kind, shape, options = table[name]
    return kind(*shape, **options)


@pytest.mark.parametrize("name", GRADIENTS)
def test_check_gradient(name):
    assert slope(problem(made(GRADIENTS, name))) == pytest.approx(2, abs=SLOPE)


@pytest.mark.parametrize("name", HESSIANS)
def test_check_hessian(name):
    checked = slope(problem(made(HESSIANS, name)), use_quadratic_model=True)
    assert checked == pytest.approx(3, abs=SLOPE)


def test_check_gradient_sees_the_gradient_of_the_other_metric():
    class Wrong(ours.Stiefel):
        def euclidean_to_riemannian_gradient(self, point, euclidean_gradient):
            return self.projection(point, euclidean_gradient)

    assert slope(problem(Wrong(7, 3, metric="canonical"))) < 2 - SLOPE


# Slope of the distance to the exponential: 2 at first order, 3 at second.
ORDERS = {
    ("polar", "euclidean"): 3,
    ("polar", "canonical"): 2,
    ("cayley", "canonical"): 3,
    ("cayley", "euclidean"): 2,
    ("qr", "euclidean"): 2,
    ("qr", "canonical"): 2,
}


@pytest.mark.parametrize(("retraction", "metric"), ORDERS)
def test_check_retraction(retraction, metric, monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "plt", mock.MagicMock())  # no figures
    manifold = ours.Stiefel(7, 3, retraction=retraction, metric=metric)
    with np.errstate(divide="ignore"):
        diagnostics.check_retraction(manifold)
    printed = re.search(r"slope is: (\S+?)\.?\n", capsys.readouterr().out)
    assert printed is not None
    expected = ORDERS[retraction, metric]
    assert float(printed[1]) == pytest.approx(expected, abs=SLOPE)


# pymanopt's optimisers on our manifolds reach the known optima.


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley", "exp"])
@pytest.mark.parametrize("optimizer", ["ConjugateGradient", "TrustRegions"])
def test_optimises_on_stiefel(optimizer, retraction):
    a = np.diag(np.arange(1.0, 9.0))
    manifold = ours.Stiefel(8, 3, retraction=retraction)

    @pymanopt.function.autograd(manifold)
    def cost(x):
        return -anp.sum(x * anp.dot(a, x))

    run = getattr(optimizers, optimizer)(verbosity=0, min_gradient_norm=1e-8)
    best = run.run(pymanopt.Problem(manifold, cost))
    assert best.cost == pytest.approx(-(8 + 7 + 6), abs=1e-9)


@pytest.mark.parametrize("retraction", ["truncation", "orthographic"])
def test_optimises_at_fixed_rank(retraction):
    a = np.random.normal(size=(10, 6))
    manifold = ours.FixedRankEmbedded(10, 6, 3, retraction)

    @pymanopt.function.autograd(manifold)
    def cost(u, s, vt):
        return anp.sum((anp.dot(u * s, vt) - a) ** 2) / 2

    run = optimizers.ConjugateGradient(verbosity=0, min_gradient_norm=1e-8)
    best = run.run(pymanopt.Problem(manifold, cost))
    discarded = np.linalg.svd(a)[1][3:]
    assert best.cost == pytest.approx(np.sum(discarded**2) / 2, rel=1e-9)
