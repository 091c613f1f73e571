"""Our Stiefel manifold behind the interface of geomstats: without mathematics."""

import numpy as np

import manifold_lora as ml
from tests.peers.adapters import Float64, peer

stiefel = peer("geomstats.geometry.stiefel")
CANONICAL, EXP = Float64(ml.Stiefel("qr")), Float64(ml.Stiefel("exp"))


def together(f, *arrays):
    """Theirs broadcasts every argument against the others."""
    return f(*np.broadcast_arrays(*arrays))


class Metric(stiefel.StiefelCanonicalMetric):
    """The canonical metric; logarithm and lifting stay those of geomstats."""

    def inner_product(self, tangent_vec_a, tangent_vec_b, base_point):
        arrays = base_point, tangent_vec_a, tangent_vec_b
        return together(CANONICAL.inner, *arrays)[()]

    def norm(self, vector, base_point):
        return together(CANONICAL.norm, base_point, vector)[()]

    def exp(self, tangent_vec, base_point):
        return together(EXP.retract, base_point, tangent_vec)

    @staticmethod
    def retraction(tangent_vec, base_point):
        return together(CANONICAL.retract, base_point, tangent_vec)


class Stiefel(stiefel.Stiefel):
    """`ml.Stiefel`; what belongs and what is tangent stays for geomstats to say."""

    @staticmethod
    def default_metric():
        return Metric

    def random_point(self, n_samples=1, bound=1.0):
        batch = () if n_samples == 1 else (n_samples,)
        return CANONICAL.random_point(*batch, self.n, self.p)

    random_uniform = random_point

    def random_tangent_vec(self, base_point, n_samples=1):
        points = base_point
        if n_samples > 1 and base_point.ndim == 2:
            points = np.broadcast_to(points, (n_samples, *base_point.shape))
        return CANONICAL.random_tangent(points)

    def to_tangent(self, vector, base_point):
        return together(CANONICAL.project, base_point, vector)

    def projection(self, point):
        return CANONICAL.nearest_point(point)
