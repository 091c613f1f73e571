"""Plans of tiny models: contents, invalid input, and equality with the real run."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import jax
import pytest
from flax import nnx
from rich.console import Console

from manifold_lora.adapters import attach, axes, manifold_tree, split
from manifold_lora.cli.main import main
from manifold_lora.distributed.arrays import init_sharded, shard_module
from manifold_lora.distributed.mesh import make_mesh
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.models import Llama
from manifold_lora.models.shapes import SHAPES, parameter_count
from manifold_lora.planning.abstract import abstract_model, abstract_run
from manifold_lora.planning.chips import read_topology
from manifold_lora.planning.config import resolve_plan
from manifold_lora.planning.meshes import (
    Workload,
    candidates,
    estimate,
    format_mesh,
    rank_meshes,
    remedies,
)
from manifold_lora.planning.plan import CompilerError, plan
from manifold_lora.training.optimizer import build_optimizer
from manifold_lora.training.step import TrainState
from tests.cases import slow_but
from tests.configs import plan_config
from tests.tiny import CONFIG


def sizes(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with nothing but a config.json; all eight devices are there."""
    assert len(jax.devices()) == 8
    folder = tmp_path_factory.mktemp("shape")
    # Even sizes: the head has to be divided over tensor too.
    config = dataclasses.replace(CONFIG, vocab_size=256)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def config_of(model, **changes):
    given = {"method": "stella", "rank": 4, "batch_size": 16, "sequence_length": 8}
    return plan_config(**{"model": model, "devices": 8} | given | changes)


def test_a_plan_agrees_with_counted_bytes(model, tmp_path, quick_compilation):
    shown, file = io.StringIO(), tmp_path / "plans" / "plan.json"
    config = config_of(model, mesh="data=2,fsdp=2,tensor=2", accumulate=2, out=file)
    found = plan(config, Console(file=shown, width=100))
    assert json.loads(file.read_text()) == found
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]
    shape = dataclasses.replace(CONFIG, vocab_size=256)
    memory = found["memory"]
    norms = 2 * shape.num_hidden_layers + 1
    kernels = parameter_count(shape) - norms * shape.hidden_size
    assert found["parameters"] == parameter_count(shape)
    # bfloat16 over fsdp × tensor, but norms whole; a float32 scale a projection.
    scales = 7 * shape.num_hidden_layers * 4
    expected = 2 * kernels / 4 + 2 * norms * shape.hidden_size + scales
    assert memory["base"] == expected
    assert memory["batch"] == 4 * 4 * 16 * 8 / 4
    square = 7 * shape.num_hidden_layers * 4 * 4  # S of StelLA is whole everywhere
    assert memory["factors"] == 4 * ((found["trained"] - square) / 4 + square)
    assert 2 * memory["factors"] <= memory["optimizer"] < 2 * memory["factors"] + 64
    held = sum(memory[n] for n in ("base", "factors", "optimizer", "batch"))
    assert memory["peak"] >= held + memory["activations"]
    assert found["fits"] and memory["available"] is None and "seconds" not in found
    # Two for each multiply-add, forward, again, and backward to the inputs.
    tokens = 16 * 8 / 8
    assert found["flops"] > 3 * 2 * kernels * 0.5 * tokens
    assert found["collective_bytes"] == sum(c["bytes"] for c in found["collectives"])
    over = {axis for row in found["collectives"] for axis in row["axes"]}
    assert over == {"data", "fsdp", "tensor"}
    assert "peak rates of CPU devices are unknown" in shown.getvalue()
    assert "data=2,fsdp=2,tensor=2" in shown.getvalue()


@pytest.mark.slow
def test_collectives_of_gradients_do_not_grow_with_the_micro_batches(
    model, quick_compilation
):
    def summed(parts):
        config = config_of(model, method="lora", mesh="data=8", accumulate=parts)
        rows = plan(config, Console(quiet=True))["collectives"]
        return sum(row["bytes"] for row in rows if "data" in row["axes"])

    assert summed(2) == pytest.approx(summed(1), rel=0.01)  # and of the losses


@pytest.mark.parametrize("method", slow_but(["dora", "stella", "loram_fr"], METHODS))
def test_arrays_are_placed_as_in_training(model, method):
    target = resolve_plan(config_of(model, method=method, mesh="fsdp=4,tensor=2"))
    assert target.mesh
    mesh = make_mesh(target.mesh, jax.devices())
    shape = dataclasses.replace(CONFIG, vocab_size=256)
    planned = abstract_run(target.run, abstract_model(target.run, shape), mesh)

    with jax.set_mesh(mesh):
        real = Llama(shape, dtype=jax.numpy.bfloat16, rngs=nnx.Rngs(0))
        attach(real, target.run.adapter)
        shard_module(real)
        _, factors, frozen = split(real)
        tx, _ = build_optimizer(target.run, manifold_tree(real), 1, shape.hidden_size)
        opt_state = init_sharded(tx.init, factors, axes(real))
    state = TrainState(factors, opt_state, jax.random.key(0))
    arrays, treedef = jax.tree.flatten((state, frozen))
    shapes, planned_treedef = jax.tree.flatten((planned.state, planned.frozen))
    assert str(treedef) == str(planned_treedef)
    for array, planned_array in zip(arrays[:-1], shapes[:-1], strict=True):
        assert (array.shape, array.dtype) == (planned_array.shape, planned_array.dtype)
        if array.ndim and array.sharding.mesh.shape:
            assert array.sharding.is_equivalent_to(planned_array.sharding, array.ndim)


def job(name="llama-3.1-8b", **changes):
    config = plan_config(model=name, topology="v5e:4x4", **changes)
    return Workload(resolve_plan(config).run, SHAPES[name], trained=40_000_000)


def test_candidates_are_all_meshes_that_divide():
    found = list(candidates(job(batch_size=8, sequence_length=64), 16))
    # 8 rows: data × fsdp at most 8; 8 key and value heads: tensor at most 8.
    assert all(math.prod(s.values()) == 16 for s in found)
    assert {(s["data"] * s["fsdp"], s["tensor"]) for s in found} == {
        (8, 2),
        (4, 4),
        (2, 8),
    }
    assert len(found) == 4 + 3 + 2
    assert list(candidates(job(batch_size=3), 16)) == []


def test_meshes_that_fit_are_ranked_by_time():
    slice_ = read_topology("v5e:4x4")

    def bandwidth(sizes, axes):
        return 1e11

    work = job(batch_size=16, sequence_length=1024)
    order = rank_meshes(work, 16, slice_, bandwidth)
    costs = [estimate(work, mesh, slice_, bandwidth) for mesh in order]
    fits = [cost.memory <= slice_.chip.memory for cost in costs]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    times = [cost.seconds for cost, ok in zip(costs, fits, strict=True) if ok]
    assert times == sorted(times)
    # Whole copies of 16 GB do not fit; gathering the base does.
    assert order[0]["fsdp"] > 1
    # Without a chip's numbers the mesh of the least memory is the first.
    least = rank_meshes(work, 16, None, bandwidth)
    memory = [estimate(work, mesh, None, bandwidth).memory for mesh in least]
    assert memory == sorted(memory)


def test_remedies_are_single_changes_that_fit():
    work = job(batch_size=64, sequence_length=2048, remat="none")
    slice_ = read_topology("v5e:4x4")
    limit = slice_.chip.memory
    offered = remedies(work, sizes(1, 16, 1), 40 * 2**30, limit, slice_)
    assert offered[0].startswith("--remat block")
    starts = [text.split()[0] for text in offered]
    assert {"--accumulate", "--batch-size", "--mesh", "--topology"} & {*starts}
    assert all("GiB)" in text for text in offered)
    # Each device already has a single row: nothing is left to divide.
    small = job(batch_size=16, sequence_length=2048)
    offered = remedies(small, sizes(1, 16, 1), 1000 * 2**30, limit, slice_)
    assert offered == []


def test_format_mesh():
    assert format_mesh(sizes(1, 128, 4)) == "fsdp=128,tensor=4"
    assert format_mesh(sizes(1, 1, 1)) == "fsdp=1"


@pytest.mark.slow
def test_auto_selects_a_mesh_that_divides(model, quick_compilation):
    few = {"method": "lora", "mesh": "auto"}
    config = config_of(model, batch_size=4, **few)
    assert plan(config, Console(quiet=True))["mesh"] == sizes(1, 4, 2)
    with pytest.raises(InputError, match=r"no mesh of 8 devices.*data × fsdp = 8"):
        plan(config_of(model, batch_size=3, **few), Console(quiet=True))


def test_a_compiler_failure_has_a_message(model, monkeypatch):
    def fail(run):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr("manifold_lora.planning.abstract.AbstractRun.traced", fail)
    with pytest.raises(
        CompilerError, match=r"8 CPU devices.*RET_CHECK.*another libtpu"
    ):
        plan(config_of(model), Console(quiet=True))


def bad_inputs(model, folder):
    use = ("--model", model, "--devices", 8, "--batch-size", 8)
    return {
        "product": ((*use, "--mesh", "fsdp=4"), "product of the sizes must be 8"),
        "heads": (
            (*use, "--mesh", "tensor=8"),
            "tensor=8 does not divide num_attention_heads 4: tensor may be 1, 2, 4",
        ),
        "rows": ((*use[:4], "--batch-size", 9), "does not divide the 9 rows"),
        "name": (("--model", "llama-3.1-7b", "--devices", 1), "Did you mean llama-3.1"),
        "topology": (("--topology", "v5p:2x2"), "v5p:2x2x1"),
        "nothing": ((), "--topology"),
        "method": ((*use, "--method", "stela"), "Did you mean stella"),
        "layers": (
            (*use, "--rank-pattern", "layers.0.self_attn.q_proj", 2),
            "one rank for all layers",
        ),
        "out": ((*use, "--out", folder), "is a directory"),
    }


def test_bad_input_is_one_message_and_exit_code_2(capsys, model, tmp_path, monkeypatch):
    # It would change the environment of the tests that follow.
    monkeypatch.setattr("manifold_lora.cli.main.hide_accelerators", lambda: None)
    wrong = {}
    for name, (arguments, message) in bad_inputs(model, tmp_path).items():
        code = 0
        try:
            main(["plan", *map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        error = " ".join(capsys.readouterr().err.split())
        if code != 2 or message not in error or "Traceback" in error:
            wrong[name] = (code, error)
    assert wrong == {}


def test_a_plan_for_a_tpu_without_access_to_it(tmp_path):
    """In a process of its own, which libtpu has not seen, as the command runs."""
    pytest.importorskip("libtpu", reason="needs libtpu (the [tpu] extra)")
    code = "from manifold_lora.cli.main import main; main()"
    command = [sys.executable, "-c", code, "plan", "--topology", "v5e:2x2"]
    command += ["--mesh", "fsdp=2,tensor=2", "--method", "lora"]
    file = tmp_path / "plan.json"
    done = subprocess.run(
        [*command, "--out", str(file)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    found = json.loads(file.read_text())
    took = found["seconds"]
    longest = max(took["compute"], took["memory"], took["hidden"])
    assert took["step"] == pytest.approx(longest + took["exposed"])
    tokens = found["batch_size"] * found["sequence_length"]
    assert found["tokens_per_second"] == pytest.approx(tokens / took["step"])
    hours = 1e9 / found["tokens_per_second"] / 3600
    dollars = found["dollars_per_billion_tokens"]
    assert dollars == pytest.approx(hours * 4 * 1.2)
    assert found["memory"]["peak"] < found["memory"]["available"]
    assert 0 < found["optimizer"]["share"] < 1

    many = ["--batch-size", "1024", "--sequence-length", "8192"]
    done = subprocess.run(
        [*command, *many, "--out", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "does not fit" in done.stderr
    assert "--accumulate" in done.stdout
    found = json.loads(file.read_text())
    assert found["memory"]["peak"] > found["memory"]["available"]
