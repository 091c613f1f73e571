"""What is asked of a plan, and every wrong way to ask."""

from pathlib import Path

import pytest

from manifold_lora.errors import InputError
from manifold_lora.planning.config import PlanConfig, resolve_plan


def test_choices_are_made():
    target = resolve_plan(
        PlanConfig(
            model=Path("llama-3.1-8b"), topology="v5e:4x4", mesh="fsdp=8,tensor=2"
        )
    )
    assert (target.count, target.price, target.search) == (16, 1.2, False)
    assert target.mesh == {"data": 1, "fsdp": 8, "tensor": 2}
    assert (target.run.batch_size, target.run.sequence_length) == (16, 512)
    assert (target.run.dtype, target.run.method) == ("bfloat16", "stiefel")


def test_cpu_devices_have_no_price_unless_it_is_given():
    target = resolve_plan(PlanConfig(devices=4, mesh="auto", dtype="float32"))
    assert (target.topology, target.count, target.price) == (None, 4, None)
    assert (target.mesh, target.search, target.run.dtype) == (None, True, "float32")
    assert resolve_plan(PlanConfig(topology="v5e:4x4", price=0.5)).price == 0.5


def test_all_problems_come_in_one_message():
    config = PlanConfig(
        topology="v5p:4x4", devices=4, mesh="fdsp=4", price=-1.0, batch_size=-2
    )
    with pytest.raises(InputError) as raised:
        resolve_plan(config)
    for part in ("got both", "'fdsp'. Did you mean fsdp", "--price", "--batch-size"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (PlanConfig(), "needs --topology .*or --devices.*got neither"),
        (PlanConfig(devices=0), "--devices must be at least 1, got 0"),
        (PlanConfig(topology="v9:2x2"), "unknown generation 'v9'"),
        (PlanConfig(topology="v5p:4x4"), "v5p:4x4x4"),
        (PlanConfig(devices=1, method="stifel"), "Did you mean stiefel"),
    ],
)
def test_bad_input(config, message):
    with pytest.raises(InputError, match=message):
        resolve_plan(config)
