"""The gradients of one adapted layer against float64 NumPy and closed forms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manifold_lora.adapters import AdapterConfig
from manifold_lora.adapters.attach import adapter_class
from manifold_lora.adapters.factor import tags
from manifold_lora.adapters.loram_fr import LoRAMFixedLinear, fixed_rank_product
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.manifolds import FixedRank
from manifold_lora.models import Linear
from tests import adapters as tiny
from tests.adapters import formulas
from tests.adapters.cases import ALPHA, CASES, RANK, config
from tests.tolerances import FLOAT32, FLOAT64

pytestmark = pytest.mark.usefixtures("quick_compilation")
IN, OUT, TOKENS = 7, 6, 9
SCALE = ALPHA / RANK
RNG = np.random.default_rng(0)
X, WEIGHTS = RNG.normal(size=(TOKENS, IN)), RNG.normal(size=(TOKENS, OUT))
BIAS = RNG.normal(size=OUT)
Arrays = dict[str, np.ndarray]


def layer(case: str) -> tuple[nnx.Module, Any, Arrays]:
    """One adapted layer without a layer axis, and its factors in float64."""
    linear = Linear(IN, OUT, bias=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    linear.kernel.set_value(jnp.asarray(rng.normal(size=(IN, OUT)) / 2, jnp.float32))
    assert linear.bias is not None
    linear.bias.set_value(jnp.asarray(BIAS, jnp.float32))
    given = config(case)
    inner = adapter_class(given.method)(linear, given, key=jax.random.key(0))
    for name in tags(inner.factors(given)):
        variable = getattr(inner, name)
        x = np.asarray(variable[...])
        if name not in "uv" and not (name == "b" and x.any()):
            drawn = tiny.drawn(rng, name, x)
            variable.set_value(jnp.asarray(drawn, jnp.float32))
    module = inner
    if given.merge_only:
        module = ScaledLinear(inner)
        for diagonal in (module.d1, module.d2):
            diagonal.set_value(jnp.asarray(rng.uniform(0.5, 1.5, diagonal.shape)))
    arrays = {n: np.asarray(getattr(inner, n)[...], np.float64) for n in inner.names}
    return module, inner, arrays


def loss_of(new_weight: np.ndarray) -> float:
    return float(np.sum(WEIGHTS * np.sin(X @ new_weight.T + BIAS)))


def slopes_of(new_weight: np.ndarray) -> np.ndarray:
    """∂f/∂y (tokens, out), in closed form."""
    return WEIGHTS * np.cos(X @ new_weight.T + BIAS)


def finite_differences(f: Callable[[Arrays], float], arrays: Arrays) -> Arrays:
    h, found = 1e-6, {}
    for name, x in arrays.items():
        found[name] = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            values = []
            for step in (h, -h):
                moved = x.copy()
                moved[index] += step
                values.append(f(arrays | {name: moved}))
            found[name][index] = (values[0] - values[1]) / (2 * h)
    return found


def gradients(module: nnx.Module) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Of the trained arrays by name, and of the inputs; and the outputs."""
    graph, factors, rest = nnx.split(module, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(factors: Any, x: jax.Array) -> Any:
        def loss(factors: Any, x: jax.Array) -> Any:
            y = nnx.merge(graph, factors, rest)(x)
            return jnp.sum(jnp.asarray(WEIGHTS, jnp.float32) * jnp.sin(y)), y

        with jax.default_matmul_precision("highest"):
            return jax.grad(loss, (0, 1), has_aux=True)(factors, x)

    (got, dx), y = gradient(factors, jnp.asarray(X, jnp.float32))
    found = {str(path[-1]): np.asarray(x[...]) for path, x in nnx.to_flat_state(got)}
    return found, np.asarray(dx), np.asarray(y)


def close(got: Any, needed: np.ndarray) -> None:
    size = max(np.abs(needed).max(), 1)
    assert tiny.error(got, needed) < FLOAT32 * size


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case: str):
    module, inner, arrays = layer(case)
    method = CASES[case]["method"]
    w = np.asarray(inner.base.kernel[...], np.float64).T
    d: dict[str, Any] = {}
    if isinstance(module, ScaledLinear):
        d = {k: np.asarray(getattr(module, k)[...], np.float64) for k in ("d1", "d2")}
    constant = formulas.row_norms(w, arrays, SCALE) if "dora" in method else None

    def weight(x: Arrays) -> np.ndarray:
        new = formulas.NEW_WEIGHT[method](w, x, SCALE)
        if constant is not None:  # the lengths are constant for the gradient
            new = new * (formulas.row_norms(w, x, SCALE) / constant)[:, None]
        return new + x["d1"][:, None] * w * x["d2"] - w if "d1" in x else new

    arrays |= d
    trained = tags(inner.factors(inner.config)).keys() | d.keys()
    needed = finite_differences(lambda x: loss_of(weight(x)), arrays)
    g = slopes_of(weight(arrays)).T @ X
    if method == "loram_fr":  # the pair, and not the chain rule's
        u, v = arrays["u"], arrays["v"]
        needed |= {
            "u": SCALE * g @ v,
            "s": SCALE * u.T @ g @ v,
            "v": SCALE * g.T @ u,
        }
    got, dx, outputs = gradients(module)
    assert got.keys() == trained
    close(outputs, X @ weight(arrays).T + BIAS)
    for name in trained:
        assert np.abs(needed[name]).max() > 0.1, name
        close(got[name], needed[name])
        assert got[name].dtype == np.float32
    close(dx, slopes_of(weight(arrays)) @ weight(arrays))


def test_the_pair_of_fixed_rank_does_not_vanish_at_zero():
    module, inner, arrays = layer("loram_fr-zero")
    inner.s.set_value(jnp.zeros((RANK, RANK)))
    u, v = arrays["u"], arrays["v"]
    w = np.asarray(inner.base.kernel[...], np.float64).T
    g = SCALE * slopes_of(w).T @ X
    got, *_ = gradients(module)
    for name, needed in {"u": g @ v, "s": u.T @ g @ v, "v": g.T @ u}.items():
        assert np.abs(needed).max() > 0.1
        close(got[name], needed)


def test_the_pair_is_float32_on_a_bfloat16_base():
    point = FixedRank().random_point(jax.random.key(0), (OUT, IN, RANK))
    x = jnp.asarray(X, jnp.bfloat16)

    def loss(point: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fixed_rank_product(x, jnp.float32(SCALE), **point))

    got, dx = jax.grad(loss, (0, 1))(point, x)
    assert {g.dtype for g in got.values()} == {jnp.dtype("float32")}
    assert dx.dtype == jnp.bfloat16
    # G = s 1 xᵀ, from the rounded inputs and V
    v = np.asarray(point["v"].astype(jnp.bfloat16), np.float64)
    needed = SCALE * np.ones((OUT, 1)) * (np.asarray(x, np.float64) @ v).sum(0)
    assert tiny.error(got["u"], needed) < 0.02 * np.abs(needed).max()


def test_the_gradient_is_the_derivative_along_retraction_curves():
    """d/dt f(R(x, tξ)) = ⟨grad f, ξ⟩ at t = 0, in float64 and through the adapter."""
    with jax.enable_x64(True):
        manifold = FixedRank("orthographic")
        linear = Linear(IN, OUT, dtype=jnp.float64, rngs=nnx.Rngs(0))
        given = AdapterConfig("loram_fr", rank=RANK, alpha=ALPHA)
        module = LoRAMFixedLinear(linear, given, key=jax.random.key(0))
        keys = jax.random.split(jax.random.key(1))
        point = manifold.random_point(keys[0], (OUT, IN, RANK), jnp.float64)
        for name, part in point.items():
            getattr(module, name).set_value(part)
        x = jnp.asarray(X)
        graph, factors, rest = nnx.split(module, nnx.LoRAParam, ...)

        @jax.jit
        def gradient(factors: Any) -> Any:
            def loss(factors: Any) -> jax.Array:
                return jnp.sum(WEIGHTS * jnp.sin(nnx.merge(graph, factors, rest)(x)))

            return jax.grad(loss)(factors)

        got = nnx.to_pure_dict(gradient(factors))
        assert {x.dtype for x in got.values()} == {jnp.dtype("float64")}
        ascent = manifold.riemannian_gradient(point, got)

        @jax.jit
        def along(t: jax.Array, tangent: Any) -> jax.Array:
            move = {k: t * part for k, part in tangent.items()}
            y = manifold.retract(point, move)
            update = SCALE * y["u"] @ y["s"] @ y["v"].T
            return jnp.sum(WEIGHTS * jnp.sin(X @ (linear.kernel[...] + update.T)))

        for key in jax.random.split(keys[1], 3):
            tangent = manifold.random_tangent(key, point)
            slope = jax.jvp(lambda t, z=tangent: along(t, z), (0.0,), (1.0,))[1]
            inner = manifold.inner(point, ascent, tangent)
            assert abs(inner) > 0.1
            assert abs(inner - slope) < FLOAT64 * 100 * max(1, abs(slope))
