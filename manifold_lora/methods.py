"""The methods, one row each. Imports no JAX.

A new method is a file in `adapters/`, with its options class and its adapter, and a
row here.
"""

from manifold_lora.errors import InputError, nearest

# The adapter's class, as file.Class in manifold_lora.adapters.
METHODS: dict[str, str] = {
    "lora": "lora.LoRALinear",
    "dora": "dora.DoRALinear",
    "stiefel": "stiefel.StiefelLinear",
    "stiefel_dora": "stiefel_dora.StiefelDoRALinear",
    "stella": "stella.StellaLinear",
    "loram_fr": "loram_fr.LoRAMFixedLinear",
    "loram_br": "loram_br.LoRAMBoundedLinear",
    "landing_stiefel": "landing_stiefel.LandingStiefelLinear",
    "landing_oblique": "landing_oblique.LandingObliqueLinear",
}


def check_method(name: str) -> None:
    """Raise `InputError` for an unknown method, with the nearest names.

    >>> check_method("stella")
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}. {nearest(name, METHODS)}")
