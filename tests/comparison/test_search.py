"""The grid search against functions whose minimum is known."""

import math

import pytest

from manifold_lora.comparison.search import MAX_EXTENSIONS, search
from manifold_lora.errors import InputError


def bowl(best):
    return lambda rate: (math.log(rate) - math.log(best)) ** 2


@pytest.mark.parametrize(
    ("grid", "best", "tried"),
    [
        ([1, 3, 9], 3, [1, 3, 9]),  # inside: nothing is added
        ([9, 1, 3], 3, [1, 3, 9]),
        ([1, 3, 9], 27, [1, 3, 9, 27, 81]),
        ([1, 3, 9], 1 / 3, [0.111, 0.333, 1, 3, 9]),
        ([1, 1.5], 3, [1, 1.5, 3, 6]),  # steps of at least 2
        ([2], 2, [0.667, 2, 6]),
        ([2], 18, [2, 6, 18, 54]),
    ],
)
def test_the_grid_grows_until_the_best_is_inside(grid, best, tried):
    calls = []

    def loss(rate):
        calls.append(rate)
        return bowl(best)(rate)

    rate, found = search("rate", grid, loss)
    assert list(found) == pytest.approx(tried, rel=1e-2)
    assert rate == pytest.approx(best, rel=1e-2)
    assert sorted(calls) == list(found)  # nothing is run twice


def test_the_growth_has_a_limit():
    _, found = search("rate", [1.0, 10.0], lambda rate: -rate)
    assert len(found) == 2 + MAX_EXTENSIONS and max(found) == pytest.approx(
        10.0 ** (1 + MAX_EXTENSIONS)
    )


def test_rates_that_diverge_are_passed_over():
    def loss(rate):
        return math.nan if rate > 5 else math.inf if rate > 4 else bowl(9)(rate)

    rate, found = search("rate", [1, 4.5, 9], loss)
    assert rate == 1 / 4.5 or rate == 1  # the edge of what is left
    assert all(math.isfinite(found[r]) for r in found if r <= 4)


def test_divergence_everywhere_names_every_loss_and_a_remedy():
    with pytest.raises(InputError) as caught:
        search("stiefel: the learning rate", [1, 2], lambda rate: math.inf)
    for words in ("stiefel: the learning rate", "1: inf, 2: inf", "--warmup-steps"):
        assert words in str(caught.value)
    with pytest.raises(InputError, match="1: it fell, 2: it fell"):
        search("rate", [1, 2], lambda rate: math.nan, lambda rate: "it fell")
