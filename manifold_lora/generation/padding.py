"""Prompts of different lengths as the rows of one array, and back."""

from collections.abc import Sequence

import numpy as np


def pad_prompts(
    prompts: Sequence[Sequence[int]], rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (rows, t) of prompts, padded on the left and with empty rows."""
    rows = len(prompts) if rows is None else rows
    t = max(map(len, prompts), default=1)
    ids, mask = np.zeros((rows, t), np.int32), np.zeros((rows, t), np.int32)
    for i, prompt in enumerate(prompts):
        ids[i, t - len(prompt) :] = prompt
        mask[i, t - len(prompt) :] = 1
    return ids, mask


def until_stop(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The tokens before the first that stops.

    >>> until_stop([5, 6, 2, 2], stop=(2,))
    [5, 6]
    """
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])


def bucket(length: int) -> int:
    """The padded length: a multiple of a quarter of the power of two below, at least 8.

    >>> [bucket(n) for n in (1, 33, 40, 100, 1000)]
    [32, 40, 40, 112, 1024]
    """
    unit = max(2 ** (length.bit_length() - 3), 8)
    return max(-(-length // unit) * unit, 32)


def pad_left(
    ids: np.ndarray, mask: np.ndarray, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens at the right end of (rows, length), whatever the padding was."""
    real = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
    padded, new_mask = pad_prompts([[0] * length, *real], rows + 1)
    return padded[1:], new_mask[1:]
