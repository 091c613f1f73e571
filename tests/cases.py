"""Cases of parametrised tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, of which all but the quick ones are marked slow.

    A tuple is a case of several arguments.
    """
    quick, cases = [*quick], [*cases]
    assert quick and all(case in cases for case in quick)
    return [
        case if case in quick else pytest.param(*_values(case), marks=pytest.mark.slow)
        for case in cases
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
