"""The best point of a grid, which grows while the best is at its edge."""

import math
from collections.abc import Callable, Sequence

from manifold_lora.errors import InputError

LIMIT = 4  # points that may be added on either side


def search(
    what: str,
    grid: Sequence[float],
    loss: Callable[[float], float],
    tell: Callable[[float], str] | None = None,
) -> tuple[float, dict[float, float]]:
    """The rate of the least loss, and the loss at every rate that was tried.

    Where the best is the smallest or the largest, the grid goes on in that direction by
    the same factor, or by 2 if that is less, at most `LIMIT` times a side. A loss that
    is no number means that the run diverged.

    Args:
        what: is searched, for the message.
        grid: rates, positive.
        loss: of a rate.
        tell: what became of a rate that diverged, for the message; None: its loss.

    Raises:
        InputError: every rate diverges.

    Examples:
        >>> import math
        >>> search("rate", [1.0, 2.0], lambda rate: abs(math.log2(rate) - 3))[0]
        8.0
    """
    grid = sorted(grid)
    found = {rate: loss(rate) for rate in grid}
    low = high = 0
    while True:
        finite = {rate: x for rate, x in found.items() if math.isfinite(x)}
        if not finite:
            tell = tell or (lambda rate: str(found[rate]))
            tried = ", ".join(f"{rate:g}: {tell(rate)}" for rate in found)
            raise InputError(
                f"{what} diverges at every rate (loss at each: {tried}). Give smaller "
                "--learning-rates, a longer --warmup-steps, or a smaller --clip."
            )
        best = min(finite, key=finite.__getitem__)
        rates = sorted(found)
        if best == rates[-1] and high < LIMIT:
            new, high = best * _factor(rates[-2:]), high + 1
        elif best == rates[0] and low < LIMIT:
            new, low = best / _factor(rates[:2]), low + 1
        else:
            return best, dict(sorted(found.items()))
        new = float(f"{new:.3g}")
        found[new] = loss(new)


def _factor(pair: list[float]) -> float:
    """The ratio of the two points at an edge, at least 2; 3 for a single point."""
    return max(pair[1] / pair[0], 2.0) if len(pair) > 1 else 3.0
