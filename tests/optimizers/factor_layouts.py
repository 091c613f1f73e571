"""Layouts of the two factors of ΔW in other libraries, and the product of each."""

import dataclasses
import functools

import numpy as np
import pytest

from manifold_lora import NNX_LORA, QWIX_LORA, FactorSpec
from tests.tolerances import FLOAT64

scanned = functools.partial(dataclasses.replace, QWIX_LORA)
# A spec, the two shapes, the product of the two as their owner writes it, and the
# tall shapes.
LAYOUTS = {
    "ours": (FactorSpec(), (2, 5, 3), (2, 8, 3), "lir,lor->loi", (5, 8)),
    "ours-experts": (
        FactorSpec(), (2, 4, 5, 3), (2, 4, 8, 3), "leir,leor->leoi", (5, 8),
    ),
    "nnx": (NNX_LORA, (5, 3), (3, 8), "ir,ro->oi", (5, 8)),
    "nnx-vmap": (NNX_LORA, (2, 5, 3), (2, 3, 8), "lir,lro->loi", (5, 8)),
    "qwix-query": (QWIX_LORA, (5, 3), (3, 4, 2), "dr,rnh->nhd", (5, 8)),
    "qwix-key-value": (QWIX_LORA, (5, 3), (3, 2, 4, 2), "dr,rckh->ckhd", (5, 16)),
    "qwix-output": (QWIX_LORA, (4, 2, 3), (3, 9), "nhr,rd->dnh", (8, 9)),
    "scan-0": (
        scanned(layer_axes=(0,)), (6, 5, 3), (6, 3, 4, 2), "ldr,lrnh->lnhd", (5, 8),
    ),
    "scan-1": (
        scanned(layer_axes=(1,)), (5, 6, 3), (3, 6, 4, 2), "dlr,rlnh->lnhd", (5, 8),
    ),
    "scan-last": (
        scanned(layer_axes=(-1,)), (5, 3, 6), (3, 4, 2, 6), "drl,rnhl->lnhd", (5, 8),
    ),
    "peft": (
        FactorSpec("lora_A/weight", "lora_B/weight", a_rank_axis=0),
        (3, 5), (8, 3), "ri,or->oi", (5, 8),
    ),
}  # fmt: skip
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def draw_factor(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_product(layout, a, b, tall_a, tall_b):
    """The tall factors have the rows and the ΔW of the layout, in every layer."""
    *_, product, rows = LAYOUTS[layout]
    tall_a, tall_b = (np.asarray(x, np.float64) for x in (tall_a, tall_b))
    *layers, a_rows, rank = tall_a.shape
    assert (a_rows, tall_b.shape[-2]) == rows and rank == 3
    delta = tall_b @ tall_a.swapaxes(-1, -2)
    assert delta.shape == (*layers, rows[1], rows[0])
    expected = np.einsum(product, np.float64(a), np.float64(b))
    np.testing.assert_allclose(
        delta, expected.reshape(delta.shape), rtol=0, atol=FLOAT64
    )
