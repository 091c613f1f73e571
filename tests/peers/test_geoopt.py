"""Ours against geoopt, whose packages ship no tests: the same checks as numbers."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifold_lora as ml
from tests.peers.adapters import Float64, close, peer
from tests.tolerances import SLOPE

geoopt = peer("geoopt")
torch = peer("torch")

pytestmark = pytest.mark.peers

# The square case is the orthogonal group, one column the sphere.
SHAPES = [(10, 5), (5, 5), (9, 1), (4, 7, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def setting():
    np.random.seed(42)
    torch.manual_seed(42)
    with warnings.catch_warnings():
        # geoopt compiles with torch.jit, which torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class Theirs:
    """A manifold of geoopt on NumPy arrays; its spheres are rows, ours columns."""

    def __init__(self, manifold, rows=False):
        self.manifold, self.rows = manifold, rows

    def __getattr__(self, name) -> Any:
        def call(*arrays):
            tensors = [torch.from_numpy(self._turned(a)) for a in arrays]
            out = getattr(self.manifold, name)(*tensors)
            if isinstance(out, tuple):
                return tuple(self._turned(a.numpy()) for a in out)
            return self._turned(out.numpy()) if out.ndim > 1 else out.numpy()

        return call

    def _turned(self, a):
        return np.swapaxes(a, -1, -2).copy() if self.rows else a.copy()


EUCLIDEAN = Theirs(geoopt.EuclideanStiefel())
EXACT = Theirs(geoopt.EuclideanStiefelExact())
CANONICAL = Theirs(geoopt.CanonicalStiefel())
SPHERE = Theirs(geoopt.Sphere(), rows=True)
SPHERE_EXACT = Theirs(geoopt.SphereExact(), rows=True)

QR = Float64(ml.Stiefel("qr", "euclidean"))
EXP = Float64(ml.Stiefel("exp", "euclidean"))
CAYLEY = Float64(ml.Stiefel("cayley", "canonical"))
OBLIQUE = Float64(ml.Oblique())
GREAT_CIRCLES = Float64(ml.Oblique("exp"))


def drawn(ours, shape):
    """Two points, two tangents at the first and an ambient vector."""
    x, y = ours.random_point(*shape), ours.random_point(*shape)
    u, v = ours.random_tangent(x), ours.random_tangent(x)
    return x, y, u, v, np.random.normal(size=shape)


def carried(ours, x, u, v):
    """The point reached along u, and v carried there."""
    y = ours.retract(x, u)
    return y, ours.transport(x, y, v)


# Name → (ours, theirs) on a point, another, two tangents and an ambient vector.
COMMON = {
    "projx": (
        lambda o, x, y, u, v, g: o.nearest_point(g),
        lambda t, x, y, u, v, g: t.projx(g),
    ),
    "projx of a point": (
        lambda o, x, y, u, v, g: o.nearest_point(x),
        lambda t, x, y, u, v, g: t.projx(x),
    ),
    "proju": (
        lambda o, x, y, u, v, g: o.project(x, g),
        lambda t, x, y, u, v, g: t.proju(x, g),
    ),
    "proju of a tangent": (
        lambda o, x, y, u, v, g: o.project(x, u),
        lambda t, x, y, u, v, g: t.proju(x, u),
    ),
    "egrad2rgrad": (
        lambda o, x, y, u, v, g: o.riemannian_gradient(x, g),
        lambda t, x, y, u, v, g: t.egrad2rgrad(x, g),
    ),
    "retr": (
        lambda o, x, y, u, v, g: o.retract(x, u),
        lambda t, x, y, u, v, g: t.retr(x, u),
    ),
    "retr, short": (
        lambda o, x, y, u, v, g: o.retract(x, 1e-6 * u),
        lambda t, x, y, u, v, g: t.retr(x, 1e-6 * u),
    ),
    "retr, long": (
        lambda o, x, y, u, v, g: o.retract(x, 5 * u),
        lambda t, x, y, u, v, g: t.retr(x, 5 * u),
    ),
    "transp": (
        lambda o, x, y, u, v, g: o.transport(x, y, v),
        lambda t, x, y, u, v, g: t.transp(x, y, v),
    ),
    "retr_transp": (
        lambda o, x, y, u, v, g: carried(o, x, u, v)[1],
        lambda t, x, y, u, v, g: t.retr_transp(x, u, v)[1],
    ),
}


def agree(name, ours, theirs, shape):
    f, g = COMMON[name]
    data = drawn(ours, shape)
    close(f(ours, *data), g(theirs, *data), 1e-11)


@pytest.mark.parametrize("name", COMMON)
@shapes
def test_euclidean_stiefel(shape, name):
    agree(name, QR, EUCLIDEAN, shape)


@pytest.mark.parametrize("name", COMMON)
@shapes
def test_exact_stiefel(shape, name):
    agree(name, EXP, EXACT, shape)


def test_a_wrong_map_is_seen():
    with pytest.raises(AssertionError):
        agree("retr", EXP, EUCLIDEAN, (10, 5))
    with pytest.raises(AssertionError):
        agree("egrad2rgrad", CAYLEY, EUCLIDEAN, (10, 5))


SPHERES = [(10, 5), (3, 8), (9, 1), (4, 7, 3)]
spheres = pytest.mark.parametrize("shape", SPHERES, ids=str)


@pytest.mark.parametrize("name", COMMON)
@spheres
def test_sphere(shape, name):
    agree(name, OBLIQUE, SPHERE, shape)


@pytest.mark.parametrize("name", [n for n in COMMON if "transp" not in n])
@spheres
def test_exact_sphere(shape, name):
    agree(name, GREAT_CIRCLES, SPHERE_EXACT, shape)


@spheres
def test_transport_along_great_circles_keeps_the_length_that_geoopt_projects_away(
    shape,
):
    """SphereExact transports by projection, ours is parallel: a choice, measured."""
    x, _, u, _, _ = drawn(GREAT_CIRCLES, shape)
    y, mine = carried(GREAT_CIRCLES, x, u, u)
    theirs = SPHERE_EXACT.retr_transp(x, u, u)[1]
    close(np.linalg.norm(mine, axis=-2), np.linalg.norm(u, axis=-2))
    assert (np.linalg.norm(theirs, axis=-2) < np.linalg.norm(u, axis=-2)).all()
    close(OBLIQUE.project(y, mine), mine)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(QR, EUCLIDEAN), (CAYLEY, CANONICAL)], ids=["eucl", "canon"]
)
@shapes
def test_inner(shape, ours, theirs):
    x, _, u, v, _ = drawn(ours, shape)
    close(ours.inner(x, u, v), theirs.inner(x, u, v))
    close(ours.norm(x, u) ** 2, theirs.inner(x, u, u))


@shapes
def test_canonical_gradient(shape):
    x, _, _, _, g = drawn(CAYLEY, shape)
    close(CAYLEY.riemannian_gradient(x, g), CANONICAL.egrad2rgrad(x, g))


# Where geoopt's canonical Stiefel is wrong, what is wrong is measured.


@pytest.mark.parametrize("shape", [(10, 5), (5, 5), (4, 7, 3)], ids=str)
def test_canonical_projection_of_geoopt_is_none(shape):
    """It is the gradient, V − X Vᵀ X: applied twice it is not what it was once."""
    x, _, u, _, g = drawn(CAYLEY, shape)
    once, mine = CANONICAL.proju(x, g), CAYLEY.project(x, g)
    assert np.max(np.abs(CANONICAL.proju(x, once) - once)) > 0.1
    assert np.max(np.abs(CANONICAL.proju(x, u) - u)) > 0.1  # u is tangent already
    close(CAYLEY.project(x, mine), mine)
    # The tangential part of what theirs adds is X skew(XᵀV) once more.
    skew = (np.swapaxes(x, -1, -2) @ g - np.swapaxes(g, -1, -2) @ x) / 2
    close(once, mine + x @ skew)


def defect(theirs, x, u, ts):
    """‖R(x, tu) − x − tu‖ for every t."""
    return [np.linalg.norm(theirs(x, t * u) - x - t * u) for t in ts]


def test_canonical_retraction_of_geoopt_is_none():
    """It leaves x along u + X Xᵀu, not along u: slope 1 where ours has 2."""
    x, _, u, _, _ = drawn(CAYLEY, (10, 5))
    ts = np.array([1e-2, 5e-3, 2.5e-3])

    def slope(retract):
        return np.polyfit(np.log(ts), np.log(defect(retract, x, u, ts)), 1)[0]

    assert slope(CANONICAL.retr) == pytest.approx(1, abs=SLOPE)
    assert slope(CAYLEY.retract) == pytest.approx(2, abs=SLOPE)


@shapes
def test_canonical_retraction_of_geoopt_is_ours_of_half_the_turn(shape):
    """Given v − ½X Xᵀv for v it is the Cayley retraction."""
    x, _, u, _, _ = drawn(CAYLEY, shape)
    halved = u - x @ (np.swapaxes(x, -1, -2) @ u) / 2
    close(CAYLEY.retract(x, u), CANONICAL.retr(x, halved), 1e-11)


# Whole runs: geoopt's Riemannian SGD with transported momentum is ours of Optax.


def our_run(manifold, x, a, steps, rate, momentum):
    tx = ml.riemannian(
        optax.sgd(rate, momentum or None), manifold, transport=momentum > 0
    )

    def step(carry, _):
        x, state = carry
        u, state = tx.update(a * jnp.cos(a * x), state, x)
        x = optax.apply_updates(x, u)
        return (x, state), x

    with jax.enable_x64(True):
        x = jnp.asarray(x)
        run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[1])
        return np.asarray(run((x, tx.init(x))))


def their_run(manifold, x, a, steps, rate, momentum, rows):
    def turned(array):
        return np.swapaxes(array, -1, -2).copy() if rows else np.array(array)

    x = geoopt.ManifoldParameter(torch.from_numpy(turned(x)), manifold=manifold)
    a = torch.from_numpy(turned(a))
    optimizer = geoopt.optim.RiemannianSGD([x], lr=rate, momentum=momentum)
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.sin(a * x).sum().backward()
        if momentum and not out:
            # Theirs starts its momentum at the Euclidean gradient, ours at zero.
            optimizer.state[x]["momentum_buffer"] = torch.zeros_like(x)
        optimizer.step()
        out.append(turned(x.detach().numpy()))
    return np.stack(out)


RUNS = {
    "qr": (ml.Stiefel("qr", "euclidean"), geoopt.EuclideanStiefel(), False),
    "exp": (ml.Stiefel("exp", "euclidean"), geoopt.EuclideanStiefelExact(), False),
    "sphere": (ml.Oblique(), geoopt.Sphere(), True),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", RUNS)
def test_sgd(name, momentum):
    ours, theirs, rows = RUNS[name]
    x = Float64(ours).random_point(3, 8, 3)
    a = np.random.normal(size=x.shape)
    mine = our_run(ours, x, a, 20, 0.1, momentum)
    close(mine, their_run(theirs, x, a, 20, 0.1, momentum, rows), 1e-10)
