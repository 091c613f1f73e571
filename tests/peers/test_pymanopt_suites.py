"""The Stiefel, fixed-rank and oblique suites that pymanopt ships, on our functions."""

import numpy as np
import pytest

from tests.peers.adapters import peer, shipped

peer("pymanopt")
peer("autograd")
stiefel = shipped("pymanopt", "tests/manifolds/test_stiefel.py")
fixed_rank = shipped("pymanopt", "tests/manifolds/test_fixed_rank.py")
oblique = shipped("pymanopt", "tests/manifolds/test_oblique.py")
ours = pytest.importorskip("tests.peers.pymanopt_manifolds")

pytestmark = pytest.mark.peers
# Their classes make what they test themselves: of ours from here on.
stiefel.Stiefel = ours.Stiefel
oblique.Oblique = ours.Oblique


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(42)


class TestStiefel(stiefel.TestSingleStiefelManifold):
    test_dim = None  # of pymanopt alone, here and below

    @pytest.fixture(autouse=True, params=[(20, 2), (5, 5), (9, 1), (64, 8)], ids=str)
    def setup(self, request):
        self.m, self.n = request.param
        self.k = 1
        self.manifold = ours.Stiefel(*request.param)
        self.manifold_polar = ours.Stiefel(*request.param, retraction="polar")
        self.projection = lambda x, u: u - x @ (x.T @ u + u.T @ x) / 2


def test_a_wrong_projection_is_seen(monkeypatch):
    def without_half(self, x, v):
        return v - x @ (x.T @ v + v.T @ x)

    monkeypatch.setattr(ours.Stiefel, "projection", without_half)
    suite = TestStiefel()
    suite.m, suite.n, suite.manifold = 20, 2, ours.Stiefel(20, 2)
    with pytest.raises(AssertionError):
        suite.test_projection()


class TestStiefelOtherRetractions(TestStiefel):
    """Cayley in the place of QR, and the exponential in the place of polar."""

    @pytest.fixture(autouse=True, params=[(20, 2), (5, 5), (9, 1)], ids=str)
    def setup(self, request):
        self.m, self.n = request.param
        self.k = 1
        self.manifold = ours.Stiefel(*request.param, retraction="cayley")
        self.manifold_polar = ours.Stiefel(*request.param, retraction="exp")
        self.projection = lambda x, u: u - x @ (x.T @ u + u.T @ x) / 2


class TestProductOfStiefel(stiefel.TestMultiStiefelManifold):
    test_dim = test_typical_dist = None


class TestOblique(oblique.TestObliqueManifold):
    pass


class TestFixedRank(fixed_rank.TestFixedRankEmbeddedManifold):
    test_dim = test_typical_dist = test_dist = None
    test_apply_ambient = test_apply_ambient_transpose = None
    test_euclidean_to_riemannian_hessian = None  # empty

    @pytest.fixture(params=["truncation", "orthographic"])
    def retraction(self, request):
        return request.param

    @pytest.fixture(autouse=True, params=[(10, 5, 3), (7, 4, 1), (5, 9, 4)], ids=str)
    def setup(self, request, retraction):
        self.m, self.n, self.k = request.param
        self.manifold = ours.FixedRankEmbedded(*request.param, retraction)

    @pytest.mark.xfail(
        strict=True,
        reason="all our random points have the singular values 2 … 1, on purpose",
    )
    def test_random_point(self):
        super().test_random_point()

    @pytest.mark.xfail(
        strict=True,
        reason="converts any three arrays; we take what is the gradient of a function "
        "of the matrix, and the test's random arrays are of none",
    )
    def test_euclidean_to_riemannian_gradient(self):
        super().test_euclidean_to_riemannian_gradient()
