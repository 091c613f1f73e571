"""Layers of different ranks in one stack, against layers built one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.adapters.attach import adapter_class
from manifold_lora.adapters.factor import tags
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS
from manifold_lora.models import Linear
from manifold_lora.training.step import largest_residual
from tests import adapters as tiny
from tests.adapters import formulas
from tests.adapters.cases import CASES, CHANGED, ROUNDED
from tests.cases import slow_but
from tests.tolerances import FLOAT32, RESIDUAL

IN, OUT, STEPS = 9, 8, 4
RANKS, ALPHAS = (2, 4, 0), (3.0, 5.0, 1.0)
X = np.random.default_rng(0).normal(size=(5, IN)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(5, OUT)).astype(np.float32)
# StelLA without the scale for a model's width, and LoRAM coordinate by coordinate:
# their other settings depend on the padding of a layer as well.
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "lora": lambda tags: optax.adam(1e-2),
    "dora": lambda tags: optax.adam(1e-2),
    "stiefel": lambda tags: ml.stiefel_lora(0.1, tags, free_learning_rate=1e-2),
    "stiefel_dora": lambda tags: ml.stiefel_lora(0.1, tags, free_learning_rate=1e-2),
    "stella": lambda tags: ml.stella(1e-2, tags),
    "loram_fr": lambda tags: ml.loram(1e-2, tags, second_moment="coordinate"),
    "loram_br": lambda tags: ml.loram(
        1e-2, tags, second_moment="coordinate", nuclear_decay=1e-3
    ),
    "landing_stiefel": lambda tags: ml.landing_adamw(2e-3, tags),
    "landing_oblique": lambda tags: ml.landing_adamw(2e-3, tags),
}


def linear(kernel: np.ndarray) -> Linear:
    layers = kernel.shape[0] if kernel.ndim == 3 else None
    made = Linear(IN, OUT, layers=layers, rngs=nnx.Rngs(0))
    made.kernel.set_value(jnp.asarray(kernel))
    return made


def assign(module: LowRankLinear, name: str, x: Any) -> None:
    getattr(module, name).set_value(x)


def stack(method: str) -> tuple[LowRankLinear, list[LowRankLinear]]:
    """Three layers of ranks 2, 4 and 0, and the first two of them by themselves."""
    kernel = np.random.default_rng(2).normal(size=(3, IN, OUT)).astype(np.float32) / 3
    cls, config = adapter_class(method), AdapterConfig(method, rank=3)
    module = cls(
        linear(kernel), config, ranks=RANKS, alphas=ALPHAS, key=jax.random.key(0)
    )
    if method == "loram_fr":  # away from the boundary of the manifold
        full = np.array(nnx.to_pure_dict(nnx.state(module, nnx.LoRAParam))["s"])
        full[0, :2, :2], full[1] = np.eye(2), np.eye(4)
        assign(module, "s", jnp.asarray(full))
    alone = [
        cls(
            linear(kernel[layer]),
            config,
            ranks=[RANKS[layer]],
            alphas=[ALPHAS[layer]],
            arrays={k: [x] for k, x in module.arrays()[layer].items()},
        )
        for layer in (0, 1)
    ]
    return module, alone


def trained(module: LowRankLinear, alone: list[LowRankLinear], method: str) -> Any:
    """The factors before and after some steps of one optimiser, and all gradients."""
    modules = {"stack": module, "0": alone[0], "1": alone[1]}
    graphs, factors, rests, manifolds = {}, {}, {}, {}
    for name, one in modules.items():
        graphs[name], state, rests[name] = nnx.split(one, nnx.LoRAParam, ...)
        factors[name] = nnx.to_pure_dict(state)
        own = tags(one.factors(one.config))
        first = own[min(own)]
        manifolds[name] = first if first.parts else own
    tx = OPTIMIZERS[method](manifolds)

    def output(name: str, factors: Any, rest: Any) -> jax.Array:
        state = nnx.state(modules[name], nnx.LoRAParam)
        nnx.replace_by_pure_dict(state, factors)
        return nnx.merge(graphs[name], state, rest)(X)

    def loss(factors: Any) -> jax.Array:
        total = jnp.zeros(())
        for name in modules:
            one = lambda f, r, name=name: output(name, f, r)  # noqa: E731
            call = jax.vmap(one) if name == "stack" else one
            total += jnp.sum(jnp.sin(call(factors[name], rests[name])) * WEIGHTS)
        return total

    @jax.jit
    def run(factors: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            factors, state = carry
            gradient = jax.grad(loss)(factors)
            updates, state = tx.update(gradient, state, factors)
            return (optax.apply_updates(factors, updates), state), gradient

        with jax.default_matmul_precision("highest"):
            carry, gradients = jax.lax.scan(
                step, (factors, tx.init(factors)), length=STEPS
            )
        return carry[0], gradients

    return factors, *run(factors)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("method", slow_but(["stiefel", "stella", "loram_br"], METHODS))
def test_a_padded_layer_trains_as_one_of_its_own_rank(method: str):
    module, alone = stack(method)
    before, after, gradients = trained(module, alone, method)
    own_tags = tags(module.factors(module.config))
    tag = own_tags[min(own_tags)]
    # the padding is on the manifold, too
    residual = largest_residual(tag if tag.parts else own_tags, before["stack"])
    assert residual < RESIDUAL
    for name, x in after["stack"].items():
        assign(module, name, x)
    for layer, rank in enumerate(RANKS):
        own = module.arrays()[layer]
        for name in before["stack"]:
            first, last = (
                np.array(tree["stack"][name][layer]) for tree in (before, after)
            )
            slopes = np.array(gradients["stack"][name][:, layer])
            if rank:
                needed = np.asarray(after[str(layer)][name])
                assert own[name].shape == needed.shape
                assert np.abs(needed - before[str(layer)][name]).max() > 1e-3
                assert tiny.error(own[name], needed) < FLOAT32 * max(
                    1, np.abs(needed).max()
                )
            # all else stays exactly where it was, for nothing flows through it
            index = tuple(map(slice, own[name].shape))
            if name != "m":
                first[index] = last[index] = 0
                slopes[:, *index] = 0
            if rank == 0 or name != "m":
                assert not slopes.any()
                np.testing.assert_array_equal(last, first)
    for layer, rank in enumerate(RANKS):
        update = np.asarray(module.weight()[layer]).T
        assert update.any() == (rank > 0)
        if rank:
            w = np.asarray(module.base.kernel[...], np.float64)[layer].T
            x = {k: a.astype(np.float64) for k, a in module.arrays()[layer].items()}
            new = formulas.NEW_WEIGHT[method](w, x, ALPHAS[layer] / rank)
            assert tiny.error(w + update, new) < FLOAT32


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES]
    + [(case, "bfloat16") for case in ("dora-kaiming", "lora-pissa")],
)
def test_layers_of_other_ranks_equal_their_base_at_initialisation_or_are_listed(
    case: str, dtype: str
):
    given = AdapterConfig(rank=3 if case not in ROUNDED else 2, **CASES[case])
    kernel = np.random.default_rng(2).normal(size=(3, IN, OUT)) / 3
    base = linear(kernel.astype(dtype))
    cls = adapter_class(given.method)
    ranks = (2, 0, 2) if case == "loram_fr-zero" else RANKS
    module = cls(base, given, ranks=ranks, alphas=ALPHAS, key=jax.random.key(0))
    outer = ScaledLinear(module) if given.merge_only else module

    @jax.jit
    def run(x: jax.Array) -> Any:
        return [outputs(one, x) for one in (outer, base)]

    got, needed = run(jnp.asarray(X, dtype))
    if case in CHANGED:
        differs = np.asarray(got != needed).any(axis=(1, 2))
        np.testing.assert_array_equal(differs, [True, True, False])
    elif case in ROUNDED:
        assert tiny.error(got, needed) < (FLOAT32 if dtype == "float32" else 0.1)
    else:
        np.testing.assert_array_equal(got, needed)


def outputs(module: Any, x: jax.Array) -> jax.Array:
    """Of every layer, called one after the other as the decoder's scan does."""
    graph, state = nnx.split(module)
    return jax.lax.map(lambda state: nnx.merge(graph, state)(x), state)


def test_diagonals_of_a_layer_that_is_not_adapted_are_not_trained():
    given = AdapterConfig("lora", rank=3, options={"diagonal_scaling": True})
    kernel = np.random.default_rng(2).normal(size=(3, IN, OUT)).astype(np.float32)
    module = ScaledLinear(
        adapter_class("lora")(
            linear(kernel), given, ranks=RANKS, alphas=ALPHAS, key=jax.random.key(0)
        )
    )
    graph, factors, rest = nnx.split(module, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(factors: Any) -> Any:
        def loss(factors: Any) -> jax.Array:
            y = outputs(nnx.merge(graph, factors, rest), jnp.asarray(X))
            return jnp.sum(jnp.sin(y) * WEIGHTS)

        return jax.grad(loss)(factors)

    got = nnx.to_pure_dict(gradient(factors))
    for name in ("d1", "d2"):
        moved = np.asarray(got[name]).any(axis=1)
        np.testing.assert_array_equal(moved, [True, True, False])
    module.d1.set_value(2 * module.d1[...])
    module.d2.set_value(2 * module.d2[...])
    merged = np.asarray(module.merge().kernel[...])
    np.testing.assert_array_equal(merged[2], kernel[2])
    assert tiny.error(merged[:2], 4 * kernel[:2]) < FLOAT32


def test_a_target_may_leave_out_any_layer():
    """An expression for some layers and an initialisation that needs even ranks."""
    only = r"model\.layers\.1\..*q_proj"
    given = AdapterConfig("lora", rank=2, options={"init": "orthogonal"}, targets=only)
    attach(model := tiny.base(), given)
    assert adapters(model)["self_attn.q_proj"].ranks == (0, 2, 0)


def test_init_zero_needs_one_rank():
    """Its retraction would mix the columns of a layer with its padding."""
    pattern = {r"layers\.1\.self_attn\.q_proj": 4}
    given = AdapterConfig(
        "loram_fr", rank=2, options={"init": "zero"}, rank_pattern=pattern
    )
    with pytest.raises(InputError, match="q_proj: loram_fr .* 2, 4: take .* identity"):
        attach(tiny.base(), given)
    some = AdapterConfig(
        "loram_fr", {"init": "zero"}, rank=2, targets=r"model\.layers\.[02]\..*v_proj"
    )
    attach(model := tiny.base(), some)
    assert adapters(model)["self_attn.v_proj"].ranks == (2, 0, 2)
