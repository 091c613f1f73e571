"""Settings of several processes, and platforms that are not there."""

import jax
import pytest

from manifold_lora.configuration.parts import LaunchConfig
from manifold_lora.distributed import processes
from manifold_lora.distributed.launch import launch_problems
from manifold_lora.distributed.mesh import all_devices, read_mesh
from manifold_lora.errors import InputError


@pytest.mark.parametrize(
    "address", ["localhost:1", "10.0.0.1:65535", "[::1]:1234", "node-1.a_b:80"]
)
def test_addresses(address):
    assert launch_problems(address, 2, 1) == []


@pytest.mark.parametrize(
    "address",
    [
        *("", ":", "localhost", "localhost:", ":1234", "localhost:0", "a:65536"),
        *("a:-1", "a:1.5", "a:x", "a:²", "::1:1234", "[::1]", "[::1:1234", "[]:1"),
        *("a b:1", "a:1 ", "http://a:1", "[bold]:1", "a:1\n"),
        pytest.param("a:" + "9" * 5000, id="long"),
    ],
)
def test_malformed_addresses(address):
    with pytest.raises(InputError) as caught:
        LaunchConfig(coordinator=address, processes=2, process_id=0)
    needed = "--coordinator must be HOST:PORT with a port from 1 to 65535"
    assert needed in str(caught.value) and len(str(caught.value)) < 400


def test_all_problems_are_in_one_message():
    with pytest.raises(InputError) as caught:
        processes.initialise("x", 2, 2)
    assert "--coordinator must be" in str(caught.value)
    assert "--process-id must be 0 to 1 with --processes 2, got 2" in str(caught.value)
    with pytest.raises(InputError, match="--process-id 0 needs --processes"):
        LaunchConfig(process_id=0)


@pytest.mark.parametrize("text", ["x", "-1", "", pytest.param("9" * 5000, id="long")])
def test_launchers_that_count_wrongly(monkeypatch, text):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", text)
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE must be the number"):
        processes.initialise()


@pytest.mark.parametrize(
    "size", ["9" * 23, "0", "1_0", "٣", "+1", pytest.param("9" * 5000, id="long")]
)
def test_sizes_of_a_mesh(size):
    with pytest.raises(InputError) as caught:
        read_mesh(f"data={size}")
    assert "positive integer up to 999999, got" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("platforms", "error", "message"),
    [
        (
            "cuda",
            AssertionError(),
            r"^JAX finds no cuda \(install jax\[cuda12\], or unset JAX_PLATFORMS\)\.$",
        ),
        (
            "tpu",
            RuntimeError("Unable to initialize backend 'tpu': no libtpu\nmore"),
            r"no tpu \(install jax\[tpu\], or unset .*\. JAX reports: 'tpu': no libtpu",
        ),
        ("nonsense", RuntimeError("x"), r"^JAX finds no nonsense \(unset JAX_PLATF"),
        ("", RuntimeError("broken plugin"), r"no device to run on.*broken plugin\.$"),
    ],
)
def test_platforms_that_are_not_there(monkeypatch, platforms, error, message):
    def devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr("jax.devices", devices)
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", platforms)
    try:
        with pytest.raises(InputError, match=message):
            all_devices()
    finally:
        jax.config.update("jax_platforms", before)
