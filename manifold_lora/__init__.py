"""Low-rank adapters on matrix manifolds, for JAX, Optax and LLaMA.

    import manifold_lora as ml
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), ml.riemannian(optax.adam(1e-3), manifolds)
    )

The names below are the public interface. Each is imported on first use, so that
`import manifold_lora` and `manifold-lora --help` stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manifold_lora.errors import InputError as InputError
    from manifold_lora.manifolds import Euclidean as Euclidean
    from manifold_lora.manifolds import Manifold as Manifold
    from manifold_lora.manifolds import Stiefel as Stiefel
    from manifold_lora.optimizers import riemannian as riemannian
    from manifold_lora.optimizers import stiefel_lora as stiefel_lora

_HOMES = {
    "errors": ["InputError"],
    "manifolds": ["Euclidean", "Manifold", "Stiefel"],
    "optimizers": ["riemannian", "stiefel_lora"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME_OF[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
