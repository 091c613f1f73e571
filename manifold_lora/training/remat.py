"""The training step with the fastest rematerialisation that fits into memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from manifold_lora.adapters import split
from manifold_lora.console import print_text
from manifold_lora.models import Llama
from manifold_lora.models.remat import Remat, RematSetting, candidates
from manifold_lora.training.memory import device_memory, program_memory

# The rest is for the next batch, for evaluation and for what the runtime itself needs,
# and, where that is the host, for other programs.
_USABLE = {"cpu": 0.5}
_USABLE_ELSEWHERE = 0.9

Step = Callable[..., Any]


def fitting_step(
    model: Llama, setting: RematSetting, make: Callable[[Any], Step], console: Console
) -> Step:
    """The step of a model with the setting's policy, or the fastest one that fits.

    Args:
        model: with its adapter; its `remat` is set.
        setting: a policy, or "auto".
        make: from the `rebuild` of `adapters.split` to a jitted step.
        console: where the choice is shown.
    """

    def step_with(policy: Remat) -> Step:
        model.remat = policy
        rebuild, _, _ = split(model)
        return make(rebuild)

    policies = candidates(setting, jax.default_backend())
    return first_fitting(step_with, policies, console)


def first_fitting(
    step_with: Callable[[Remat], Step], policies: Sequence[Remat], console: Console
) -> Step:
    """The step with the first of the policies that fits, or with the last.

    Which one that is shows at the first call: the step is compiled for its arguments,
    and the memory that the program needs, by its own figures, compared with the
    device's. With a single policy there is nothing to choose.

    Args:
        step_with: the jitted step with a policy.
        policies: fastest first; see `models.remat.candidates`.
        console: where the choice is shown.
    """
    *others, last = policies
    if not others:
        return step_with(last)
    chosen: Step | None = None

    def step(*arguments: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            chosen = _first_that_fits(step_with, policies, arguments, console)
        return chosen(*arguments)

    return step


def _first_that_fits(
    step_with: Callable[[Remat], Step],
    policies: Sequence[Remat],
    arguments: tuple[Any, ...],
    console: Console,
) -> Step:
    available = device_memory()
    usable = _USABLE.get(jax.default_backend(), _USABLE_ELSEWHERE)
    *others, last = policies
    for policy in others:
        step: Any = step_with(policy)
        try:
            needed = program_memory(step.lower(*arguments).compile())
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        if available is None or needed <= usable * available:
            _show(console, policy, needed, available)
            return step  # called as it is, it is not compiled again
    _show(console, last, None, available)
    return step_with(last)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the compiler, or the device, found the memory too small."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _show(
    console: Console, policy: Remat, needed: int | None, available: int | None
) -> None:
    text = f"remat {policy}"
    if needed is not None:
        text += f": a step needs {needed / 2**30:.2f} GiB"
        text += "" if available is None else f" of {available / 2**30:.1f}"
    print_text(console, text, "dim")
