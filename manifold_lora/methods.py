"""The methods: one row each, and every name that may stand for one. Imports no JAX.

A new method is a file in `adapters/` and a row here, which names the file's class,
the optimiser that trains it, and what the command line may say of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from manifold_lora.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Method:
    """What is known of a method without building it."""

    adapter: str  # class, as file.Class in manifold_lora.adapters
    recipe: str  # the optimiser, a key of training.optimizer.RECIPES
    update: str  # ΔW in its factors
    paper: str
    rates: tuple[float, ...]  # learning rates about the papers', for `compare`
    rate: float  # the default, of the constrained factors or of all
    builtin_rate: float  # for the small built-in base, which learns at higher ones
    free_rate: float | None = None  # of the free factors, where they have their own
    builtin_free_rate: float | None = None
    inits: tuple[str, ...] = ("random",)  # the first is the default
    options: tuple[str, ...] = ()  # settings that not every method has
    export: str = "LoRA"  # PEFT's name of what the adapter is written as


_PAIR = ("optimizer",)  # settings of every method whose optimiser wraps another
_LORA = "Hu et al. 2021, arXiv:2106.09685"
_LANDING = "Manifold-LoRA 2024"
_LORAM = "LoRAM 2025"
_LORA_INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")

METHODS: dict[str, Method] = {
    "lora": Method(
        adapter="lora.LoRALinear",
        recipe="adamw",
        update="s B Aᵀ",
        paper=_LORA,
        rates=(1e-4, 2e-4, 3e-4),
        rate=2e-4,
        builtin_rate=5e-3,
        inits=_LORA_INITS,
        options=(*_PAIR, "fixed_a", "diagonal_scaling", "lora_plus_ratio"),
    ),
    "dora": Method(
        adapter="dora.DoRALinear",
        recipe="adamw",
        update="m ⊙ (W + s B Aᵀ)/‖W + s B Aᵀ‖ − W",
        paper="Liu et al. 2024, arXiv:2402.09353",
        rates=(1e-4, 2e-4, 3e-4),
        rate=2e-4,
        builtin_rate=5e-3,
        inits=("kaiming", "gaussian"),
        options=(*_PAIR, "lora_plus_ratio"),
        export="DoRA",
    ),
    "stiefel": Method(
        adapter="stiefel.StiefelLinear",
        recipe="stiefel_lora",
        update="s B Aᵀ",
        paper="Stiefel-LoRA 2025, arXiv:2508.17901",
        rates=(0.1, 0.2, 0.3),
        rate=0.1,
        builtin_rate=0.03,
        free_rate=2e-4,
        builtin_free_rate=5e-3,
        options=(*_PAIR, "fixed_a", "free_learning_rate"),
    ),
    "stiefel_dora": Method(
        adapter="stiefel_dora.StiefelDoRALinear",
        recipe="stiefel_lora",
        update="m ⊙ (W + s B Aᵀ)/‖W + s B Aᵀ‖ − W",
        paper="Stiefel-LoRA 2025, arXiv:2508.17901",
        rates=(0.1, 0.2, 0.3),
        rate=0.1,
        builtin_rate=0.03,
        free_rate=2e-4,
        builtin_free_rate=5e-3,
        options=(*_PAIR, "free_learning_rate"),
        export="DoRA",
    ),
    "stella": Method(
        adapter="stella.StellaLinear",
        recipe="stella",
        update="s U S Vᵀ",
        paper="StelLA 2025, arXiv:2510.01938",
        rates=(2e-4, 5e-4, 1e-3),
        rate=5e-4,
        builtin_rate=5e-3,
        inits=("random", "zero", "svd_major", "svd_minor"),
        options=(*_PAIR, "diagonal_s"),
    ),
    "loram_fr": Method(
        adapter="loram_fr.LoRAMFixedLinear",
        recipe="loram",
        update="s U S Vᵀ",
        paper=_LORAM,
        rates=(3e-5, 5e-5, 1e-4),
        rate=5e-5,
        builtin_rate=1e-3,
        inits=("identity", "zero"),
        options=("second_moment", "diagonal_scaling"),
    ),
    "loram_br": Method(
        adapter="loram_br.LoRAMBoundedLinear",
        recipe="loram",
        update="s A Vᵀ",
        paper=_LORAM,
        rates=(5e-5, 1e-4, 2e-4),
        rate=1e-4,
        builtin_rate=1e-3,
        inits=("zero",),
        options=(
            "second_moment",
            "diagonal_scaling",
            "nuclear_decay",
            "truncate_below",
        ),
    ),
    "landing_stiefel": Method(
        adapter="landing_stiefel.LandingStiefelLinear",
        recipe="landing_adamw",
        update="s B Aᵀ",
        paper=_LANDING,
        rates=(2e-4, 5e-4, 1e-3),
        rate=2e-4,
        builtin_rate=5e-3,
        options=(*_PAIR, "attraction", "rate_bounds", "project_on_export"),
    ),
    "landing_oblique": Method(
        adapter="landing_oblique.LandingObliqueLinear",
        recipe="landing_adamw",
        update="s B Aᵀ",
        paper=_LANDING,
        rates=(2e-4, 5e-4, 1e-3),
        rate=2e-4,
        builtin_rate=5e-3,
        options=(*_PAIR, "attraction", "rate_bounds", "project_on_export"),
    ),
}
# What a setting is when nobody asked for it.
OPTIONS: dict[str, Any] = {
    "fixed_a": None,
    "diagonal_s": False,
    "diagonal_scaling": False,
    "lora_plus_ratio": None,
    "free_learning_rate": None,
    "optimizer": "adamw",
    "second_moment": None,
    "nuclear_decay": None,
    "truncate_below": None,
    "attraction": None,
    "rate_bounds": None,
    "project_on_export": False,
}


def find_method(name: str) -> Method:
    """The row of that name.

    Raises:
        InputError: there is none; the nearest names are given.

    >>> find_method("stella").update
    's U S Vᵀ'
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}. {nearest(name, METHODS)}")
    return METHODS[name]


def problems(name: str, settings: Mapping[str, Any]) -> list[str]:
    """What the method does not go with, of settings that may hold others as well.

    >>> problems("lora", {"diagonal_s": True, "rank": 4})
    ['method lora and diagonal_s=True exclude each other: diagonal_s goes with stella']
    """
    method, found = find_method(name), []
    for option, unset in OPTIONS.items():
        value = settings.get(option, unset)
        if value == unset or option in method.options:
            continue
        allowed = ", ".join(k for k, m in METHODS.items() if option in m.options)
        found.append(
            f"method {name} and {option}={value} exclude each other: {option} goes "
            f"with {allowed}"
        )
    init = settings.get("init")
    if init is not None and init not in method.inits:
        others = [k for k, m in METHODS.items() if init in m.inits]
        allowed = f"; {init} goes with {', '.join(others)}" if others else ""
        found.append(
            f"method {name} and init={init} exclude each other: the initialisations of "
            f"{name} are {', '.join(method.inits)}{allowed}"
        )
    if init in ("pissa", "olora", "orthogonal") and settings.get("fixed_a"):
        found.append(
            f"init={init} and fixed_a={settings['fixed_a']} exclude each other: "
            "fixed_a goes with the initialisations kaiming and gaussian"
        )
    if settings.get("diagonal_scaling") and settings.get("truncate_below") is not None:
        found.append(
            "diagonal_scaling=True and "
            f"truncate_below={settings['truncate_below']} exclude each other: what can "
            "only be merged has no rank to lower"
        )
    return found
