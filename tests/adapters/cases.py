"""Every method with each of its initialisations and options, from METHODS."""

from typing import Any

from manifold_lora.adapters import AdapterConfig
from manifold_lora.adapters.options import inits, options_class
from manifold_lora.methods import METHODS

RANK, ALPHA = 2, 5
FEW = ["q_proj", "v_proj", "down_proj"]  # square, narrow and wide


def _cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        available = options_class(name)().values("adapter")
        options: list[dict[str, Any]] = [{"init": init} for init in inits(name)]
        if "fixed_a" in available:
            options += [{"fixed_a": kind} for kind in ("random", "projection")]
        for switch in ("diagonal_s", "diagonal_scaling"):
            if switch in available:
                options.append({switch: True})
        for option in options:
            ((key, value),) = option.items()
            label = value if key == "init" else f"{key}={value}"
            found[f"{name}-{label}"] = {"method": name, "options": option}
    return found


CASES = _cases()
# Cases that differ from the base at initialisation; in all others ΔW = 0 exactly.
CHANGED = {  # ΔW is not zero
    "stiefel-fixed_a=random",
    "stiefel-fixed_a=projection",
    "stella-random",
    "stella-svd_major",
    "stella-svd_minor",
    "stella-diagonal_s=True",
    "loram_fr-identity",
    "loram_fr-diagonal_scaling=True",
}
ROUNDED = {"lora-orthogonal"}  # ΔW is zero to rounding


def config(case: str, **more: Any) -> AdapterConfig:
    given: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
    return AdapterConfig(**given | CASES[case] | more)
