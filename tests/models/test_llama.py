"""The forward pass against float64 NumPy, and the laws that hold for it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.models import Linear, Llama, LlamaConfig
from manifold_lora.models.layers import apply_rope, rope_angles, rope_frequencies
from tests.models import reference
from tests.tolerances import FLOAT32, LOGITS

TIME = 80  # past the 64 positions of the tiny llama3 scaling
SMALL = LlamaConfig.from_hf(reference.CONFIGS["llama-3"])


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, shape)


def error(got: Any, needed: Any) -> float:
    return float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(needed))))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, reference.Tensors]:
    """A Llama 3 with weights of ordinary size, and the tensors it was read from."""
    path: Path = tmp_path_factory.mktemp("small") / "model"
    config = reference.CONFIGS["llama-3"]
    tensors = reference.random_tensors(config)
    return load_llama(reference.write_checkpoint(path, config, tensors)), tensors


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_are_those_of_the_formulas(name: str, tmp_path: Path):
    config = reference.CONFIGS[name]
    tensors = reference.random_tensors(config)
    model = load_llama(reference.write_checkpoint(tmp_path / "m", config, tensors))
    tokens = ids(2, TIME)
    got = model(jnp.asarray(tokens))
    assert got.shape == (2, TIME, 61) and got.dtype == jnp.float32
    assert error(got, [reference.logits(tensors, config, x) for x in tokens]) < LOGITS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_position(
    side: str, small: tuple[Llama, reference.Tensors]
):
    model, tensors = small
    tokens, lengths = ids(3, 12), (12, 7, 1)
    real = np.zeros((3, 12), bool)
    for row, length in enumerate(lengths):
        real[row, slice(12 - length, 12) if side == "left" else slice(length)] = True
    got = model(jnp.asarray(tokens), jnp.asarray(real.astype(np.int32)))
    assert bool(jnp.isfinite(got).all())
    for row in range(3):
        needed = reference.logits(
            tensors, reference.CONFIGS["llama-3"], tokens[row][real[row]]
        )
        assert error(got[row][real[row]], needed) < LOGITS


@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "running"])
def test_packed_segments_are_separate_sequences(
    restart: bool, small: tuple[Llama, reference.Tensors]
):
    model, tensors = small
    tokens, segments = ids(1, 14), np.array([[1] * 5 + [2] * 6 + [0] * 3])
    positions = np.array([[*range(5), *range(6), *range(3)]]) if restart else None
    got = model(
        jnp.asarray(tokens),
        segment_ids=jnp.asarray(segments),
        positions=None if positions is None else jnp.asarray(positions),
    )
    for part in (slice(0, 5), slice(5, 11)):
        config = reference.CONFIGS["llama-3"]
        needed = reference.logits(tensors, config, tokens[0, part])
        assert error(got[0, part], needed) < LOGITS


def test_given_positions_reach_the_rotation(small: tuple[Llama, reference.Tensors]):
    model, tensors = small
    tokens, positions = ids(1, 6), np.array([[0, 3, 4, 90, 91, 700]])
    got = model(jnp.asarray(tokens), positions=jnp.asarray(positions))
    config = reference.CONFIGS["llama-3"]
    needed = reference.logits(tensors, config, tokens[0], positions=positions[0])
    assert error(got[0], needed) < LOGITS


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_rope_frequencies(name: str):
    config = reference.CONFIGS[name]
    got = rope_frequencies(LlamaConfig.from_hf(config))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference.frequencies(config), rtol=5e-7)


def test_the_tiny_scaling_meets_every_band_of_llama3():
    config = reference.CONFIGS["llama-3.1"]
    plain = reference.frequencies(config | {"rope_scaling": None})
    ratio = plain / reference.frequencies(config)
    kept, divided = np.isclose(ratio, 1), np.isclose(ratio, 8)
    assert kept.any() and divided.any() and (~kept & ~divided).any()


def test_rotation_at_position_100_000_is_that_of_the_float32_product():
    positions = np.array([[0, 99_999, 100_000, 131_071]])
    frequencies = rope_frequencies(LlamaConfig.from_hf(reference.CONFIGS["llama-3.1"]))
    cos, sin = jax.jit(rope_angles)(frequencies, jnp.asarray(positions))
    product = positions.astype(np.float32)[..., None, None] * frequencies
    assert product.dtype == np.float32
    turn = np.exp(1j * product.astype(np.float64))
    assert error(cos, np.real(turn)) < FLOAT32 and error(sin, np.imag(turn)) < FLOAT32

    # in bfloat16 only the result is rounded, never the angle: 2^-8 of the length
    x = jnp.ones((1, 4, 1, 16), jnp.bfloat16)
    got = apply_rope(x, cos, sin)
    z = (1 + 1j) * turn
    assert got.dtype == jnp.bfloat16
    assert error(got, np.concatenate([z.real, z.imag], -1)) < 2 * 2**-8


def test_remat_changes_neither_loss_nor_gradient():
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(ids(2, 8))

    def run(remat: bool):
        model.remat = remat
        graph, state = nnx.split(model)
        return jax.jit(
            jax.value_and_grad(lambda s: jnp.mean(nnx.merge(graph, s)(tokens) ** 2))
        )(state)

    (loss, gradient), (other_loss, other_gradient) = run(True), run(False)
    assert abs(float(loss) - float(other_loss)) < FLOAT32
    other = dict(nnx.to_flat_state(other_gradient))
    for path, leaf in nnx.to_flat_state(gradient):
        got = np.asarray(leaf[...])
        np.testing.assert_allclose(got, other[path][...], atol=FLOAT32)
        for layer in got if "layers" in path else [got]:
            assert np.abs(layer).max() > 0, path  # gradients reach every matrix


class Wrapper(nnx.Module):
    """The least that an adapter is: a base, trainable factors, dropout by key."""

    def __init__(self, base: Linear, layers: int, rank: int = 2):
        self.base = base
        self.a = nnx.LoRAParam(jnp.ones((layers, base.in_features, rank)))
        self.b = nnx.LoRAParam(jnp.zeros((layers, base.out_features, rank)))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = self.base(x, key)
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        return y + x @ self.a[...] @ self.b[...].mT


def test_a_projection_can_be_replaced():
    plain = Llama(SMALL, rngs=nnx.Rngs(0))
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        owner = getattr(model.layers, part)
        wrapper = Wrapper(getattr(owner, name), SMALL.num_hidden_layers)
        setattr(owner, name, wrapper)
    tokens = jnp.asarray(ids(2, 8))
    np.testing.assert_array_equal(model(tokens), plain(tokens))

    graph, factors, base = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(factors, key):
        def loss(factors):
            return jnp.mean(nnx.merge(graph, factors, base)(tokens, key=key) ** 2)

        return jax.grad(loss)(factors)

    keys = jax.random.split(jax.random.key(0))
    first, again, other = (gradient(factors, k) for k in (keys[0], keys[0], keys[1]))
    for path, leaf in nnx.to_flat_state(first):
        same, changed = (dict(nnx.to_flat_state(g))[path] for g in (again, other))
        assert leaf.shape[0] == SMALL.num_hidden_layers
        np.testing.assert_array_equal(leaf[...], same[...])
        if path[-1] == "b":  # a's gradient is zero, since b is
            assert bool((leaf[...] != 0).any(axis=(1, 2)).all())
            assert bool((leaf[...] != changed[...]).any())


def test_each_layer_and_projection_draws_its_own_dropout():
    seen: list[tuple[str, np.ndarray]] = []

    class Spy(nnx.Module):
        def __init__(self, base: Linear, name: str):
            self.base, self.name = base, name

        def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
            assert key is not None
            jax.debug.callback(
                lambda data: seen.append((self.name, np.asarray(data))),
                jax.random.key_data(key),
            )
            return self.base(x, key)

    model = Llama(SMALL, rngs=nnx.Rngs(0))
    names = [("self_attn", f"{x}_proj") for x in "qkvo"]
    names += [("mlp", f"{x}_proj") for x in ("gate", "up", "down")]
    for part, name in names:
        owner = getattr(model.layers, part)
        setattr(owner, name, Spy(getattr(owner, name), name))
    jax.block_until_ready(model(jnp.asarray(ids(1, 4)), key=jax.random.key(0)))
    jax.effects_barrier()
    assert len(seen) == 7 * SMALL.num_hidden_layers
    assert len({data.tobytes() for _, data in seen}) == len(seen)


def _products(jaxpr: Any) -> list[Any]:
    """All matrix products of a program, those of inner programs included."""
    found = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    for value in (v for e in jaxpr.eqns for v in e.params.values()):
        inner = getattr(value, "jaxpr", value)  # closed or not
        found += _products(inner) if hasattr(inner, "eqns") else []
    return found


def _program(layers: int, dtype: Any) -> Any:
    config = reference.CONFIGS["llama-3"] | {"num_hidden_layers": layers}
    model = nnx.eval_shape(
        lambda: Llama(LlamaConfig.from_hf(config), dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    tokens = jnp.asarray(ids(1, 4))
    return jax.make_jaxpr(
        jax.grad(lambda s: jnp.mean(nnx.merge(graph, s)(tokens) ** 2))
    )(state)


def test_every_product_of_a_float32_model_is_in_full_precision():
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    full = [e.params["precision"] for e in _products(_program(3, jnp.float32).jaxpr)]
    assert len(full) > 27 and set(full) == {highest}
    half = [e.params["precision"] for e in _products(_program(3, jnp.bfloat16).jaxpr)]
    assert highest not in half


def test_the_program_does_not_grow_with_depth():
    few, many = (str(_program(layers, jnp.float32)) for layers in (4, 32))
    assert many.count("\n") == few.count("\n")


def test_bfloat16_model():
    exact = Llama(SMALL, rngs=nnx.Rngs(0))
    graph, state = nnx.split(exact)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    tokens = jnp.asarray(ids(1, 8))
    hidden = rounded.hidden_states(tokens)
    got, needed = rounded.unembed(hidden), exact(tokens)
    assert hidden.dtype == jnp.bfloat16 and got.dtype == jnp.float32
    assert error(got, needed) < 0.05 * float(jnp.abs(needed).max())
    fresh = nnx.eval_shape(lambda: Llama(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.state(fresh)):
        assert leaf.dtype == jnp.bfloat16, path


def test_a_token_beyond_the_vocabulary_is_not_guessed(
    small: tuple[Llama, reference.Tensors],
):
    logits = small[0](jnp.array([[1, 61], [1, 60]]))
    assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()
