"""What the adapters to the peers share."""

import functools
import importlib.metadata
import sys
import tarfile
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def peer(name: str) -> Any:
    """The installed library; skips the module that asks for it where it is absent.

    Some peers warn while they are imported, which is not our error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def shipped(package: str, path: str) -> Any:
    """A test module out of the source archive of the installed version.

    The archive lies, as the registry serves it, in the folder `peers` of the
    environment:

        pip download --no-deps --no-binary :all: -d "$VIRTUAL_ENV/peers" PACKAGE
    """
    root = f"{package}-{importlib.metadata.version(package)}"
    archive = Path(sys.prefix) / "peers" / f"{root}.tar.gz"
    if not archive.exists():
        pytest.skip(f"needs {archive}, see `shipped`", allow_module_level=True)
    with tarfile.open(archive) as tar:
        source = tar.extractfile(f"{root}/{path}")
        assert source is not None
        code = compile(source.read(), f"{root}/{path}", "exec")
    module = types.ModuleType(Path(path).stem)
    exec(code, module.__dict__)
    return module


class Float64:
    """The functions of one of our manifolds on NumPy arrays, compiled, in float64."""

    def __init__(self, manifold: Any):
        self.manifold = manifold

    def __getattr__(self, name: str) -> Any:
        return _call(self.manifold, name)

    def random_point(self, *shape: int) -> Any:
        return _random_point(self.manifold, shape)(_seed())

    def random_tangent(self, x: Any) -> Any:
        return _random_tangent(self.manifold)(_seed(), x)


def _seed() -> Any:
    """The peers draw from NumPy's global generator, and so do we: one seed for all."""
    return np.random.randint(2**31)


def _numpy(f: Any) -> Any:
    compiled = jax.jit(f)

    def call(*args: Any) -> Any:
        with jax.enable_x64(True):
            return jax.tree.map(np.array, compiled(*args))

    return call


@functools.cache
def _call(manifold: Any, name: str) -> Any:
    return _numpy(getattr(manifold, name))


@functools.cache
def _random_point(manifold: Any, shape: tuple[int, ...]) -> Any:
    return _numpy(
        lambda seed: manifold.random_point(jax.random.key(seed), shape, jnp.float64)
    )


@functools.cache
def _random_tangent(manifold: Any) -> Any:
    return _numpy(lambda seed, x: manifold.random_tangent(jax.random.key(seed), x))


@functools.cache
def _turning(manifold: Any) -> Any:
    def derivative(x, u, v):
        return jax.jvp(lambda x: manifold.project(x, v), (x,), (u,))[1]

    return _numpy(derivative)


def projection_derivative(manifold: Any, x: Any, u: Any, v: Any) -> Any:
    """D_u P_x(v), the derivative of our projection of v where x moves along u."""
    return _turning(manifold)(x, u, v)


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Equal to within the tolerance of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    scale = max(1.0, float(np.max(np.abs(theirs), initial=0)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
