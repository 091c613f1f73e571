"""Resolved plans, and invalid configurations."""

import pytest

from manifold_lora.errors import InputError
from manifold_lora.planning.config import Target, resolve_plan
from tests.configs import plan_config


def resolved(**settings) -> Target:
    return resolve_plan(plan_config(**settings))


def test_defaults_are_resolved():
    target = resolved(model="llama-3.1-8b", topology="v5e:4x4", mesh="fsdp=8,tensor=2")
    assert (target.count, target.price, target.search) == (16, 1.2, False)
    assert target.mesh == {"data": 1, "fsdp": 8, "tensor": 2}
    batch = target.run.batch
    assert (batch.batch_size, batch.sequence_length) == (16, 512)
    assert target.run.model.dtype == "bfloat16"
    assert target.run.adapter.method == "stiefel"


def test_cpu_devices_have_no_default_price():
    target = resolved(devices=4, mesh="auto", dtype="float32")
    assert (target.topology, target.count, target.price) == (None, 4, None)
    assert (target.mesh, target.search) == (None, True)
    assert target.run.model.dtype == "float32"
    assert resolved(topology="v5e:4x4", price=0.5).price == 0.5


def test_all_problems_are_in_one_message():
    with pytest.raises(InputError) as raised:
        plan_config(
            topology="v5p:4x4", devices=4, mesh="fdsp=4", price=-1.0, batch_size=-2
        )
    for part in ("got both", "'fdsp'. Did you mean fsdp", "--price", "--batch-size"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "needs --topology, .*or --devices.*got neither"),
        ({"devices": 0}, "--devices must be at least 1, got 0"),
        ({"topology": "v9:2x2"}, "unknown generation 'v9'"),
        ({"topology": "v5p:4x4"}, "v5p:4x4x4"),
        ({"devices": 1, "method": "stifel"}, "Did you mean stiefel"),
        ({"devices": 1, "price": float("inf")}, "--price must be a positive number"),
        ({"devices": 1, "truncate_below": 0.1}, "unknown key 'truncate_below'"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(InputError, match=message):
        plan_config(**settings)
