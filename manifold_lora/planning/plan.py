"""Plan a training run: compile its step for devices without access to them."""

import dataclasses
import json
import math
import re
import time
from typing import Any

import jax
from rich.console import Console

from manifold_lora.adapters import factors
from manifold_lora.checkpoints.atomic import write_text
from manifold_lora.console import make_console, print_text
from manifold_lora.data.builtin import BASE
from manifold_lora.distributed.mesh import divisibility_errors, make_mesh
from manifold_lora.errors import InputError
from manifold_lora.models.remat import Remat, candidates
from manifold_lora.models.shapes import model_shape, parameter_count
from manifold_lora.planning.abstract import (
    AbstractRun,
    abstract_model,
    abstract_run,
    bytes_per_device,
)
from manifold_lora.planning.config import PlanConfig, Target, resolve_plan
from manifold_lora.planning.flops import matmul_flops
from manifold_lora.planning.meshes import (
    Sizes,
    Workload,
    block_of,
    format_mesh,
    rank_meshes,
    remedies,
)
from manifold_lora.planning.program import read_program
from manifold_lora.planning.roofline import times, transfer_seconds
from manifold_lora.planning.targets import (
    bandwidth,
    cpu_devices,
    topology_devices,
)
from manifold_lora.planning.view import show_plan
from manifold_lora.training.memory import program_memory
from manifold_lora.training.remat import is_out_of_memory

MAX_MESHES = 4  # meshes that a search compiles at most
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFitError(RuntimeError):
    """The step needs more memory than a device has."""


class CompilerError(RuntimeError):
    """The compiler failed for reasons other than memory."""


def plan(config: PlanConfig, console: Console | None = None) -> dict[str, Any]:
    """Compile the training step without access to the devices, and show its cost.

    Returns:
        The contents of the JSON file of --out.

    Raises:
        InputError: the configuration is invalid.
        DoesNotFitError: the step does not fit; remedies have been printed.
        CompilerError: the compiler failed.
    """
    console = console or make_console()
    target = resolve_plan(config)
    if config.out is not None and config.out.is_dir():
        raise InputError(f"--out {config.out} is a directory: name a JSON file.")
    planner = _Planner(target)
    result: dict[str, Any] = {}
    for sizes in planner.meshes():
        print_text(
            console,
            f"Compiling for {planner.devices_name}, mesh {format_mesh(sizes)}; a large "
            "model takes minutes.",
            "dim",
        )
        result = planner.plan(sizes)
        if result["fits"]:
            break
        print_text(console, f"Mesh {format_mesh(sizes)} does not fit.", "dim")
    show_plan(console, result)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_text(config.out, text)
    if not result["fits"]:
        raise DoesNotFitError(
            f"the step does not fit into a device of {planner.devices_name}: see the "
            "changes suggested above."
        )
    return result


class _Planner:
    """A target with its abstract model and its devices."""

    def __init__(self, target: Target):
        self.target, self.topology = target, target.topology
        self.devices_name = str(self.topology or f"{target.count} CPU devices")
        shape = model_shape(target.run.model.path or BASE)
        self.model = abstract_model(target.run, shape)
        trained = sum(x.size for x in jax.tree.leaves(factors(self.model)))
        self.workload = Workload(target.run, shape, trained)
        if self.topology is None:
            self.devices = cpu_devices(target.count)
        else:
            self.devices = topology_devices(self.topology)

    def meshes(self) -> list[Sizes]:
        """The meshes to compile, in order, until one fits."""
        count = self.target.count
        sizes = self.target.mesh or {"data": 1, "fsdp": count, "tensor": 1}
        shape, rows = self.workload.shape, self.workload.rows
        errors = divisibility_errors(sizes, shape, rows, block_of(self.target.run))
        if self.target.search:
            meshes = rank_meshes(self.workload, count, self.topology, self._bandwidth)
            if not meshes:
                raise InputError(
                    f"--mesh auto: no mesh of {count} devices divides the model and "
                    f"the batch. With all devices on fsdp: {'; '.join(errors)}."
                )
            return meshes[:MAX_MESHES]
        if errors and math.prod(sizes.values()) == count:
            raise InputError(f"--mesh {format_mesh(sizes)}: {'; '.join(errors)}.")
        return [sizes]

    def _bandwidth(self, sizes: Sizes, axes: tuple[str, ...]) -> float:
        """Bytes/s along axes of a mesh of these sizes."""
        assert self.topology is not None
        return bandwidth(make_mesh(sizes, self.devices).devices, axes, self.topology)

    def plan(self, sizes: Sizes) -> dict[str, Any]:
        """The plan on one mesh, JSON-serialisable.

        Of the policies of `--remat auto` it is that of the first one that fits.
        """
        result: dict[str, Any] = {}
        platform = "cpu" if self.topology is None else "tpu"
        for remat in candidates(self.target.run.model.remat, platform):
            result = self._plan(sizes, remat)
            if result["fits"]:
                break
        return result

    def _plan(self, sizes: Sizes, remat: Remat) -> dict[str, Any]:
        mesh = make_mesh(sizes, self.devices)
        run = abstract_run(self.target.run, self.model, mesh, remat)
        settings = self._settings(sizes) | {"remat": remat}
        arguments = self._argument_bytes(run)
        try:
            costs = self._compile(run)
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                amounts = self._out_of_memory(arguments, sizes, remat, str(error))
                return settings | amounts
            raise CompilerError(
                f"the compiler failed on the step for {self.devices_name}, mesh "
                f"{format_mesh(sizes)}: {str(error).splitlines()[0]} Try another "
                "--batch-size, --sequence-length or --mesh, or another libtpu."
            ) from error
        costs["memory"] = arguments | costs["memory"]
        if self.topology is not None:
            step, optimizer = costs["seconds"]["step"], costs["optimizer"]
            optimizer["share"] = optimizer["seconds"]["step"] / step
            costs |= self._throughput(step)
        peak, limit = costs["memory"]["peak"], costs["memory"]["available"]
        fits = limit is None or peak <= limit
        return settings | costs | {"fits": fits, "remedies": []}

    def _settings(self, sizes: Sizes) -> dict[str, Any]:
        run = self.target.run
        return {
            "model": str(run.model.path or "built in"),
            "parameters": parameter_count(self.workload.shape),
            "trained": self.workload.trained,
            "method": run.adapter.method,
            "rank": run.adapter.rank,
            **dataclasses.asdict(run.batch),
            "dtype": run.model.dtype,
            "base_dtype": run.model.base_dtype,
            "devices": self.target.count,
            "topology": None if self.topology is None else str(self.topology),
            "mesh": dict(sizes),
            "price": self.target.price,
        }

    def _argument_bytes(self, run: AbstractRun) -> dict[str, Any]:
        """Bytes per device of the arguments of the step, and the memory available."""
        limit = None if self.topology is None else self.topology.chip.memory
        return {
            "base": bytes_per_device(run.frozen),
            "factors": bytes_per_device(run.state.factors),
            "optimizer": bytes_per_device(run.state.opt_state),
            "batch": bytes_per_device(run.batch),
            "available": limit,
        }

    def _compile(self, run: AbstractRun) -> dict[str, Any]:
        """Compile the step, and the optimiser update alone, and analyse both."""
        traced, started = run.traced(), time.perf_counter()
        compiled = traced.lower().compile()
        costs: dict[str, Any] = {
            "compile_seconds": time.perf_counter() - started,
            "memory": self._program_bytes(compiled),
            **self._analyse(run, traced, compiled),
        }
        update = run.traced_update()
        optimizer = self._analyse(run, update, update.lower().compile())
        return costs | {"optimizer": optimizer}

    def _program_bytes(self, compiled: Any) -> dict[str, Any]:
        """Bytes of temporaries and code, and the peak, from the compiler's analysis."""
        analysis = compiled.memory_analysis()
        return {
            "activations": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
            "peak": program_memory(compiled),
        }

    def _analyse(self, run: AbstractRun, traced: Any, compiled: Any) -> dict[str, Any]:
        """Operations, memory traffic, collectives and, for TPUs, times of a program."""
        program = read_program(compiled.as_text(), dict(run.mesh.shape))
        count, devices = self.target.count, run.mesh.devices
        rows: list[dict[str, Any]] = [
            dataclasses.asdict(collective) | {"axes": list(collective.axes)}
            for collective in program.collectives
        ]
        costs: dict[str, Any] = {
            "flops": matmul_flops(traced.jaxpr) / count,
            "hbm_bytes": program.hbm_bytes,
            "collectives": rows,
            "collective_bytes": sum(c.bytes for c in program.collectives),
        }
        if self.topology is not None:
            passes = matmul_flops(traced.jaxpr, passes=True) / count
            seconds = times(passes, program, devices, self.topology)
            costs["seconds"] = dataclasses.asdict(seconds) | {"step": seconds.step}
            for row in rows:
                row["seconds"] = transfer_seconds(
                    row["bytes"], row["axes"], devices, self.topology
                )
        return costs

    def _throughput(self, step: float) -> dict[str, Any]:
        """Tokens per second and their cost, from the seconds of a step."""
        run = self.target.run
        rate = run.batch.batch_size * run.batch.sequence_length / step
        price = self.target.price
        assert price is not None
        dollars = price * self.target.count / 3600 / rate * 1e9
        return {"tokens_per_second": rate, "dollars_per_billion_tokens": dollars}

    def _out_of_memory(
        self, arguments: dict[str, Any], sizes: Sizes, remat: Remat, message: str
    ) -> dict[str, Any]:
        """The memory needed, according to the compiler's error, and remedies."""
        amounts = [
            float(number) * _UNITS[unit]
            for number, unit in re.findall(r"\b([\d.]+)([KMGT])\b", message)
        ]
        total = sum(
            arguments[name] for name in ("base", "factors", "optimizer", "batch")
        )
        needed = max([total, *amounts])
        limit = arguments["available"]
        assert limit is not None
        workload = self.workload.with_remat(remat)
        return {
            "memory": arguments | {"peak": needed},
            "fits": False,
            "remedies": remedies(workload, sizes, needed, limit, self.topology),
        }
