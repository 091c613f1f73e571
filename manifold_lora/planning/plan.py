"""A training run planned without its devices: compiled for them, and read."""

import dataclasses
import json
import math
import re
import time
from typing import Any

import jax
from rich.console import Console

from manifold_lora.adapters import factors
from manifold_lora.data.builtin import BASE
from manifold_lora.distributed.mesh import divisibility_errors, make_mesh
from manifold_lora.errors import InputError
from manifold_lora.models.shapes import model_shape, parameter_count
from manifold_lora.planning.abstract import (
    AbstractRun,
    abstract_model,
    abstract_run,
    bytes_per_device,
)
from manifold_lora.planning.config import PlanConfig, Target, resolve_plan
from manifold_lora.planning.flops import matmul_flops
from manifold_lora.planning.meshes import Job, Sizes, ranked, remedies, written
from manifold_lora.planning.program import read_program
from manifold_lora.planning.roofline import seconds, times
from manifold_lora.planning.targets import (
    bandwidth,
    cpu_devices,
    topology_devices,
)
from manifold_lora.planning.view import show_plan

TRIES = 4  # meshes that a search compiles at most
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class NotFittingError(RuntimeError):
    """The step needs more memory than a device has."""


class CompilerError(RuntimeError):
    """The compiler itself failed, which is no fault of the plan."""


def plan(config: PlanConfig, console: Console | None = None) -> dict[str, Any]:
    """Compile the training step for devices that need not be there, and show it.

    Returns:
        What the JSON file of --out holds.

    Raises:
        InputError: something in the configuration is wrong.
        NotFittingError: what to change has been shown.
        CompilerError: libtpu failed.
    """
    console = console or Console()
    target = resolve_plan(config)
    if config.out is not None and config.out.is_dir():
        raise InputError(f"--out {config.out} is a directory: name a JSON file.")
    planner = _Planner(target)
    found: dict[str, Any] = {}
    for sizes in planner.meshes():
        console.print(
            f"Compiling for {planner.where}, mesh {written(sizes)}; a large model "
            "takes minutes.",
            style="dim",
            soft_wrap=True,
        )
        found = planner.plan(sizes)
        if found["fits"]:
            break
        console.print(f"Mesh {written(sizes)} does not fit.", style="dim")
    show_plan(console, found)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        config.out.write_text(text, encoding="utf-8")
    if not found["fits"]:
        raise NotFittingError(
            f"the step does not fit into a device of {planner.where}: see what would."
        )
    return found


class _Planner:
    """A target with its model and its devices."""

    def __init__(self, target: Target):
        self.target, self.topology = target, target.topology
        self.where = str(self.topology or f"{target.count} CPU devices")
        shape = model_shape(target.run.model.path or BASE)
        self.model = abstract_model(target.run, shape)
        trained = sum(x.size for x in jax.tree.leaves(factors(self.model)))
        self.job = Job(target.run, shape, trained)
        if self.topology is None:
            self.devices = cpu_devices(target.count)
        else:
            self.devices = topology_devices(self.topology)

    def meshes(self) -> list[Sizes]:
        """Those to compile, until one fits."""
        sizes = self.target.mesh or {"data": 1, "fsdp": self.target.count, "tensor": 1}
        wrong = divisibility_errors(sizes, self.job.shape, self.job.rows)
        if self.target.search:
            found = ranked(
                self.job, self.target.count, self.topology, self.bandwidth_on
            )
            if not found:
                raise InputError(
                    f"--mesh auto: no mesh of {self.target.count} devices divides the "
                    f"model and the batch. With all on fsdp: {'; '.join(wrong)}."
                )
            return found[:TRIES]
        if wrong and math.prod(sizes.values()) == self.target.count:
            raise InputError(f"--mesh {written(sizes)}: {'; '.join(wrong)}.")
        return [sizes]

    def bandwidth_on(self, sizes: Sizes, axes: tuple[str, ...]) -> float:
        """Bytes a second along axes of a mesh of that shape."""
        assert self.topology is not None
        return bandwidth(make_mesh(sizes, self.devices).devices, axes, self.topology)

    def plan(self, sizes: Sizes) -> dict[str, Any]:
        """The plan on one mesh, as JSON can hold it."""
        run = abstract_run(self.target.run, self.model, make_mesh(sizes, self.devices))
        heading, held = self._heading(sizes), self._held(run)
        try:
            found = self._compiled(run)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return heading | self._too_large(held, sizes, str(error))
            raise CompilerError(
                f"the compiler failed on the step for {self.where}, mesh "
                f"{written(sizes)}: {str(error).splitlines()[0]} Try another "
                "--batch-size, --sequence-length or --mesh, or another libtpu."
            ) from error
        found["memory"] = held | found["memory"]
        if self.topology is not None:
            whole = found["seconds"]["step"]
            found["optimizer"]["share"] = found["optimizer"]["seconds"]["step"] / whole
            found |= self._rates(whole)
        peak, limit = found["memory"]["peak"], found["memory"]["available"]
        fits = limit is None or peak <= limit
        return heading | found | {"fits": fits, "remedies": []}

    def _compiled(self, run: AbstractRun) -> dict[str, Any]:
        """The step, and the optimiser's part of it, compiled and read."""
        traced, began = run.traced(), time.perf_counter()
        compiled = traced.lower().compile()
        found: dict[str, Any] = {
            "compile_seconds": time.perf_counter() - began,
            "memory": self._peak(compiled.memory_analysis()),
            **self._read(run, traced, compiled),
        }
        part = run.optimizer()
        return found | {"optimizer": self._read(run, part, part.lower().compile())}

    def _heading(self, sizes: Sizes) -> dict[str, Any]:
        run = self.target.run
        return {
            "model": str(run.model.path or "built in"),
            "parameters": parameter_count(self.job.shape),
            "trained": self.job.trained,
            "method": run.adapter.method,
            "rank": run.adapter.rank,
            **dataclasses.asdict(run.batch),
            "dtype": run.model.dtype,
            "remat": run.model.remat,
            "devices": self.target.count,
            "topology": None if self.topology is None else str(self.topology),
            "mesh": dict(sizes),
            "price": self.target.price,
        }

    def _held(self, run: AbstractRun) -> dict[str, Any]:
        """Bytes that are there all the time."""
        limit = None if self.topology is None else self.topology.chip.memory
        return {
            "base": bytes_per_device(run.frozen),
            "factors": bytes_per_device(run.state.factors),
            "optimizer": bytes_per_device(run.state.opt_state),
            "batch": bytes_per_device(run.batch),
            "available": limit,
        }

    def _peak(self, used: Any) -> dict[str, Any]:
        """Bytes that come on top, and all together, by the compiler's account."""
        program = used.generated_code_size_in_bytes
        results = used.output_size_in_bytes - used.alias_size_in_bytes
        activations = used.temp_size_in_bytes
        arguments = used.argument_size_in_bytes
        peak = arguments + results + activations + program
        return {"activations": activations, "program": program, "peak": peak}

    def _read(self, run: AbstractRun, traced: Any, compiled: Any) -> dict[str, Any]:
        """What a program computes and moves, and the time it takes."""
        program = read_program(compiled.as_text(), dict(run.mesh.shape))
        count, devices = self.target.count, run.mesh.devices
        rows: list[dict[str, Any]] = [
            dataclasses.asdict(collective) | {"axes": list(collective.axes)}
            for collective in program.collectives
        ]
        found: dict[str, Any] = {
            "flops": matmul_flops(traced.jaxpr) / count,
            "hbm_bytes": program.hbm_bytes,
            "collectives": rows,
            "collective_bytes": sum(c.bytes for c in program.collectives),
        }
        if self.topology is not None:
            passes = matmul_flops(traced.jaxpr, passes=True) / count
            took = times(passes, program, devices, self.topology)
            found["seconds"] = dataclasses.asdict(took) | {"step": took.step}
            for row in rows:
                row["seconds"] = seconds(
                    row["bytes"], row["axes"], devices, self.topology
                )
        return found

    def _rates(self, step: float) -> dict[str, Any]:
        run = self.target.run
        rate = run.batch.batch_size * run.batch.sequence_length / step
        price = self.target.price
        assert price is not None
        dollars = price * self.target.count / 3600 / rate * 1e9
        return {"tokens_per_second": rate, "dollars_per_billion_tokens": dollars}

    def _too_large(
        self, held: dict[str, Any], sizes: Sizes, message: str
    ) -> dict[str, Any]:
        """What an over-full plan needs, by the compiler's message, and what helps."""
        amounts = [
            float(number) * _UNITS[unit]
            for number, unit in re.findall(r"\b([\d.]+)([KMGT])\b", message)
        ]
        arguments = sum(
            held[name] for name in ("base", "factors", "optimizer", "batch")
        )
        needed = max([arguments, *amounts])
        limit = held["available"]
        assert limit is not None
        return {
            "memory": held | {"peak": needed},
            "fits": False,
            "remedies": remedies(self.job, sizes, needed, limit, self.topology),
        }
