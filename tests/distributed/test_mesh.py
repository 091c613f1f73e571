"""Parsing mesh sizes, building meshes, and checking that they divide the model."""

import jax
import pytest
from jax.sharding import AxisType

from manifold_lora.distributed.mesh import (
    AXES,
    divisibility_errors,
    group_count,
    make_mesh,
    read_mesh,
)
from manifold_lora.errors import InputError
from manifold_lora.models import LlamaConfig
from manifold_lora.models.shapes import model_shape

pytestmark = pytest.mark.mesh


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("data=2,fsdp=4,tensor=3", (2, 4, 3)),
        ("tensor=3,data=2", (2, 1, 3)),
        ("fsdp=16", (1, 16, 1)),
        (" data=2 , fsdp=4", (2, 4, 1)),
    ],
)
def test_read_mesh(text, sizes):
    assert read_mesh(text) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


def test_read_mesh_without_text():
    assert read_mesh(None) is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("fsd=8", ["--mesh fsd=8", "unknown axis 'fsd'", "fsdp", "data=2,fsdp=4"]),
        ("", ["unknown axis ''", "data, fsdp, tensor"]),
        ("fsdp=2,", ["unknown axis ''"]),
        ("8", ["unknown axis '8'"]),
        ("FSDP=8", ["unknown axis 'FSDP'", "fsdp"]),
        ("fsdp=2,fsdp=4", ["fsdp is given twice"]),
        (
            "fsdp=0",
            ["the size of fsdp must be a positive integer up to 999999, got '0'"],
        ),
        ("fsdp=-2", ["positive integer up to 999999, got '-2'"]),
        ("data=2,fsdp=2.5", ["--mesh data=2,fsdp=2.5", "got '2.5'"]),
        ("fsdp=four", ["got 'four'"]),
        ("fsdp", ["got ''"]),
        ("fsdp=2=2", ["got '2=2'"]),
        ("fsdp=²", ["got '²'"]),
    ],
)
def test_invalid_mesh_text(text, words):
    with pytest.raises(InputError) as caught:
        read_mesh(text)
    for word in words:
        assert word in str(caught.value)


def test_mesh_of_all_devices():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == (2, 2, 2)
    assert list(mesh.devices.flat) == jax.devices()  # neighbours on the last axis
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_default_mesh_is_fsdp():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    one = make_mesh(None, jax.devices()[3:4])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert one.devices.item() == jax.devices()[3]


def test_mesh_of_some_devices():
    some = jax.devices()[4:]
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, some)
    assert set(mesh.devices.flat) == set(some)


@pytest.mark.parametrize(
    "sizes, count, words",
    [
        (
            (2, 2, 1),
            8,
            ["data=2,fsdp=2,tensor=1 needs 4 devices", "8 are available", "be 8"],
        ),
        ((1, 16, 1), 8, ["needs 16 devices", "8 are available", "Omit --mesh"]),
        ((1, 2, 1), 1, ["needs 2 devices", "1 is available", "must be 1"]),
    ],
)
def test_sizes_must_multiply_to_the_number_of_devices(sizes, count, words):
    with pytest.raises(InputError) as caught:
        make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[:count])
    for word in words:
        assert word in str(caught.value)


def test_group_count():
    assert group_count({"data": 2, "fsdp": 3, "tensor": 5}) == 6
    assert group_count({"tensor": 5}) == 1


LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
)
HEADS = "does not divide num_attention_heads 6: tensor may be 1, 2, 3, 6"
KEYS = "does not divide num_key_value_heads 2: tensor may be 1, 2"
HIDDEN = "does not divide intermediate_size 40: tensor may be 1, 2, 4, 5, 8, 10, 20, 40"
WIDTH = "does not divide hidden_size 48: fsdp may be 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"


@pytest.mark.parametrize(
    "data, fsdp, tensor, rows, expected",
    [
        (1, 1, 1, None, []),
        (7, 16, 2, None, []),  # layers, vocabulary and data need not divide
        (1, 1, 3, None, ["tensor=3 " + KEYS, "tensor=3 " + HIDDEN]),
        (1, 1, 4, None, ["tensor=4 " + HEADS, "tensor=4 " + KEYS]),
        (
            1,
            5,
            12,
            None,
            ["tensor=12 " + t for t in (HEADS, KEYS, HIDDEN)] + ["fsdp=5 " + WIDTH],
        ),
        (1, 96, 1, None, ["fsdp=96 " + WIDTH]),
        (2, 4, 2, 16, []),
        (2, 4, 2, 12, ["data × fsdp = 8 does not divide the 12 rows"]),
        (1, 1, 2, 5, []),
        (2, 1, 1, 5, ["data × fsdp = 2 does not divide the 5 rows"]),
    ],
)
def test_divisibility_errors(data, fsdp, tensor, rows, expected):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    lines = divisibility_errors(sizes, LLAMA, rows)
    pairs = zip(lines, expected, strict=True)
    assert [line[: len(start)] for line, start in pairs] == expected


def test_remedy_for_the_batch_size():
    (line,) = divisibility_errors({"data": 2, "fsdp": 4, "tensor": 1}, LLAMA, 12)
    assert "--batch-size a multiple of 8 × --accumulate" in line
    assert "tensor axis" in line


def test_long_lists_of_divisors_are_truncated():
    (line,) = divisibility_errors({"fsdp": 7}, model_shape("llama-3.1-70b"))
    shown = "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, …, 8192"
    assert line == f"fsdp=7 does not divide hidden_size 8192: fsdp may be {shown}"


def test_physical_axes_are_split_where_the_sizes_do_not_match(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("not a whole physical axis")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh(read_mesh("fsdp=4,tensor=2"), jax.devices())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert {*mesh.devices.flat} == {*jax.devices()}
    assert {*mesh.axis_types} == {jax.sharding.AxisType.Auto}
