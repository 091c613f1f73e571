"""Grid search for a learning rate, extending the grid while the best is at its edge."""

import math
from collections.abc import Callable, Sequence

from manifold_lora.errors import InputError

MAX_EXTENSIONS = 4  # points added on either side


def search(
    what: str,
    grid: Sequence[float],
    loss: Callable[[float], float],
    describe: Callable[[float], str] | None = None,
) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss, and the losses of all rates tried.

    While the best rate is the smallest or the largest, the grid is extended in that
    direction by the same factor, but at least 2, up to `MAX_EXTENSIONS` times per side.
    A NaN or infinite loss means that the run diverged.

    Args:
        what: name of the searched quantity, for the message.
        grid: rates, positive.
        loss: maps a rate to its loss.
        describe: describes a diverged rate in the message; None: shows its loss.

    Raises:
        InputError: every rate diverges.

    Examples:
        >>> import math
        >>> search("rate", [1.0, 2.0], lambda rate: abs(math.log2(rate) - 3))[0]
        8.0
    """
    grid = sorted(grid)
    losses = {rate: loss(rate) for rate in grid}
    below = above = 0  # extensions on either side
    while True:
        finite = {rate: x for rate, x in losses.items() if math.isfinite(x)}
        if not finite:
            describe = describe or (lambda rate: str(losses[rate]))
            tried = ", ".join(f"{rate:g}: {describe(rate)}" for rate in losses)
            raise InputError(
                f"{what} diverges at every rate tried ({tried}). Try smaller "
                "--learning-rates, more --warmup-steps, or a smaller --clip."
            )
        best = min(finite, key=finite.__getitem__)
        rates = sorted(losses)
        if best == rates[-1] and above < MAX_EXTENSIONS:
            new, above = best * _factor(rates[-2:]), above + 1
        elif best == rates[0] and below < MAX_EXTENSIONS:
            new, below = best / _factor(rates[:2]), below + 1
        else:
            return best, dict(sorted(losses.items()))
        new = float(f"{new:.3g}")
        losses[new] = loss(new)


def _factor(pair: list[float]) -> float:
    """The ratio of the two rates at an edge, but at least 2; 3 for a single rate."""
    return max(pair[1] / pair[0], 2.0) if len(pair) > 1 else 3.0
