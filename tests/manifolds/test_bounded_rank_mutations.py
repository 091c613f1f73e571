"""Mutations of BoundedRank, each of which must violate a law."""

import functools
import inspect
import types

import jax
import pytest

from manifold_lora.manifolds import bounded_rank
from tests.manifolds.test_bounded_rank import (
    case,
    law_gradient,
    law_order,
    law_retraction,
    law_step,
    law_transport,
)


def mutant(old, new):
    """BoundedRank from source with one expression changed."""
    source = inspect.getsource(bounded_rank)
    assert source.count(old) == 1
    module = types.ModuleType("mutant")
    exec(source.replace(old, new), module.__dict__)
    return module.BoundedRank


GRADIENT = functools.partial(law_gradient, shape=(7, 6, 3))
RETRACTION = functools.partial(law_retraction, x=case()[0], v=case()[2])


@pytest.mark.parametrize(
    ("law", "order", "old", "new"),
    [
        (RETRACTION, 1, "matmul(nb, h) + t", "-matmul(nb, h) + t"),
        (RETRACTION, 1, "+ times(k, s * h))", "- times(k, s * h))"),
        (GRADIENT, 1, "times(gv, m) - times(v, matmul(matmul(v.mT, gv), m))",
         "times(gv, m)"),
        (GRADIENT, 1, "gram / (2 * self.alpha)", "gram / self.alpha"),
        (law_transport, 1, "times(k, turn) + times(a, lean)", "times(k, turn)"),
        (law_transport, 1, " - times(basis_new, inside)", ""),
        (law_transport, 1, "+ 2 * self.alpha * lean", "+ self.alpha * lean"),
        (law_order, 2, "eye_like(c) - c /", "eye_like(c) + c /"),
        (law_order, 2, "if self.order == 1:", "if True:"),
        (law_step, 2, "g - matmul(w.mT, w)", "g"),
    ],
)  # fmt: skip
def test_laws_reject_mutants(law, order, old, new):
    manifold = mutant(old, new)(order=order)
    with jax.enable_x64(True), pytest.raises(AssertionError):
        law(manifold)
