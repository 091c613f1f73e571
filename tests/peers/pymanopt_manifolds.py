"""Our manifolds behind the interface of pymanopt: adapters without mathematics."""

from typing import Any

import numpy as np

import manifold_lora as ml
from tests.peers.adapters import Float64, peer, projection_derivative

manifolds = peer("pymanopt").manifolds
fixed_rank = peer("pymanopt.manifolds.fixed_rank")
Point, Tangent = fixed_rank._FixedRankPoint, fixed_rank._FixedRankTangentVector


class _Ours:
    """A point is one array for both sides; a product sums over its members."""

    ours: Float64
    exact: Float64  # with the exponential as its retraction
    shape: tuple[int, ...]

    def inner_product(self, point, tangent_vector_a, tangent_vector_b):
        return np.sum(self.ours.inner(point, tangent_vector_a, tangent_vector_b))

    def norm(self, point, tangent_vector):
        return np.linalg.norm(self.ours.norm(point, tangent_vector))

    def projection(self, point, vector):
        return self.ours.project(point, vector)

    to_tangent_space = projection

    def euclidean_to_riemannian_gradient(self, point, euclidean_gradient):
        return self.ours.riemannian_gradient(point, euclidean_gradient)

    def euclidean_to_riemannian_hessian(
        self, point, euclidean_gradient, euclidean_hessian, tangent_vector
    ):
        turning = projection_derivative(
            self.ours.manifold, point, tangent_vector, euclidean_gradient
        )
        return self.projection(point, euclidean_hessian + turning)

    def retraction(self, point, tangent_vector):
        return self.ours.retract(point, tangent_vector)

    def exp(self, point, tangent_vector):
        return self.exact.retract(point, tangent_vector)

    def transport(self, point_a, point_b, tangent_vector_a):
        return self.ours.transport(point_a, point_b, tangent_vector_a)

    def random_point(self):
        return self.ours.random_point(*self.shape)

    def random_tangent_vector(self, point):
        vector = self.ours.random_tangent(point)
        return vector / self.norm(point, vector)


class Stiefel(_Ours, manifolds.Stiefel):
    """`ml.Stiefel`, by default with pymanopt's Euclidean metric."""

    def __init__(self, n, p, *, k=1, retraction: Any = "qr", metric: Any = "euclidean"):
        manifolds.Stiefel.__init__(self, n, p, k=k)
        self.ours = Float64(ml.Stiefel(retraction, metric))
        self.exact = Float64(ml.Stiefel("exp", metric))
        self.shape = (n, p) if k == 1 else (k, n, p)

    def dist(self, point_a, point_b):
        return np.linalg.norm(point_a - point_b)


class Oblique(_Ours, manifolds.Oblique):
    """`ml.Oblique`; the logarithm and the distance stay pymanopt's."""

    ours, exact = Float64(ml.Oblique()), Float64(ml.Oblique("exp"))

    def __init__(self, m, n):
        manifolds.Oblique.__init__(self, m, n)
        self.shape = (m, n)


class FixedRankEmbedded(manifolds.FixedRankEmbedded):
    """`ml.FixedRank`: (u, s, vᵀ) with a vector s for our {"u", "s", "v"}."""

    def __init__(self, m, n, k, retraction: Any = "truncation"):
        super().__init__(m, n, k)
        self.shape = (m, n, k)
        self.ours = Float64(ml.FixedRank(retraction))

    def inner_product(self, point, tangent_vector_a, tangent_vector_b):
        vectors = triple(tangent_vector_a), triple(tangent_vector_b)
        return self.ours.inner(point_of(point), *vectors)

    def norm(self, point, tangent_vector):
        return self.ours.norm(point_of(point), triple(tangent_vector))

    def projection(self, point, vector):
        pair = {
            "u": self._apply_ambient(vector, point[2].T),
            "v": self._apply_ambient_transpose(vector, point[0]),
        }
        return tangent(self.ours.riemannian_gradient(point_of(point), filled(pair)))

    def to_tangent_space(self, point, vector):
        return tangent(self.ours.project(point_of(point), triple(vector)))

    def euclidean_to_riemannian_gradient(self, point, euclidean_gradient):
        """For gradients of the factors of a function of the matrix: G V S, Gᵀ U S."""
        du, _, dvt = euclidean_gradient
        pair = {"u": du / point[1], "v": dvt.T / point[1]}
        return tangent(self.ours.riemannian_gradient(point_of(point), filled(pair)))

    def retraction(self, point, tangent_vector):
        y = self.ours.retract(point_of(point), triple(tangent_vector))
        left, s, right = np.linalg.svd(y["s"])
        return Point(y["u"] @ left, s, right @ y["v"].T)

    def transport(self, point_a, point_b, tangent_vector_a):
        points = point_of(point_a), point_of(point_b)
        return tangent(self.ours.transport(*points, triple(tangent_vector_a)))

    def random_point(self):
        x = self.ours.random_point(*self.shape)
        return Point(x["u"], np.diag(x["s"]), x["v"].T)

    def random_tangent_vector(self, point):
        vector = tangent(self.ours.random_tangent(point_of(point)))
        return vector / self.norm(point, vector)


def point_of(point):
    return {"u": point[0], "s": np.diag(point[1]), "v": point[2].T}


def triple(vector):
    return {"u": vector[0], "s": vector[1], "v": vector[2]}


def tangent(v):
    return Tangent(v["u"], v["s"], v["v"])


def filled(pair):
    """The middle of the pair follows from the others; NaN shows that it is not read."""
    r = pair["u"].shape[-1]
    return {**pair, "s": np.full((r, r), np.nan)}
