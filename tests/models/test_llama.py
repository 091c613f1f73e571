"""The forward pass against a float64 NumPy reference, and its invariances."""

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
from manifold_lora.models.remat import Remat
from tests.models import reference
from tests.tolerances import FLOAT32, LOGITS

TIME = 80  # past the 64 positions of the tiny llama3 scaling
SMALL = LlamaConfig.from_hf(reference.CONFIGS["llama-3"])


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, shape)


def max_error(actual: Any, expected: Any) -> float:
    difference = np.asarray(actual, np.float64) - np.asarray(expected)
    return float(np.max(np.abs(difference)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, reference.Tensors]:
    """A small Llama 3, and the tensors it was loaded from."""
    path: Path = tmp_path_factory.mktemp("small") / "model"
    config = reference.CONFIGS["llama-3"]
    tensors = reference.random_tensors(config)
    return load_llama(reference.write_checkpoint(path, config, tensors)), tensors


@pytest.mark.smoke
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_equal_the_reference(name: str, tmp_path: Path):
    config = reference.CONFIGS[name]
    tensors = reference.random_tensors(config)
    model = load_llama(reference.write_checkpoint(tmp_path / "m", config, tensors))
    tokens = ids(2, TIME)
    actual = model(jnp.asarray(tokens))
    expected = [reference.logits(tensors, config, x) for x in tokens]
    assert actual.shape == (2, TIME, 61) and actual.dtype == jnp.float32
    assert max_error(actual, expected) < LOGITS


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_real_positions(
    side: str, small: tuple[Llama, reference.Tensors]
):
    model, tensors = small
    tokens, lengths = ids(3, 12), (12, 7, 1)
    real = np.zeros((3, 12), bool)
    for row, length in enumerate(lengths):
        real[row, slice(12 - length, 12) if side == "left" else slice(length)] = True
    actual = model(jnp.asarray(tokens), jnp.asarray(real.astype(np.int32)))
    assert bool(jnp.isfinite(actual).all())
    for row in range(3):
        expected = reference.logits(
            tensors, reference.CONFIGS["llama-3"], tokens[row][real[row]]
        )
        assert max_error(actual[row][real[row]], expected) < LOGITS


@pytest.mark.parametrize(
    "restart", [True, False], ids=["positions per segment", "running positions"]
)
def test_packed_segments_are_independent(
    restart: bool, small: tuple[Llama, reference.Tensors]
):
    model, tensors = small
    tokens, segments = ids(1, 14), np.array([[1] * 5 + [2] * 6 + [0] * 3])
    positions = np.array([[*range(5), *range(6), *range(3)]]) if restart else None
    actual = model(
        jnp.asarray(tokens),
        segment_ids=jnp.asarray(segments),
        positions=None if positions is None else jnp.asarray(positions),
    )
    for part in (slice(0, 5), slice(5, 11)):
        config = reference.CONFIGS["llama-3"]
        expected = reference.logits(tensors, config, tokens[0, part])
        assert max_error(actual[0, part], expected) < LOGITS


def test_explicit_positions(small: tuple[Llama, reference.Tensors]):
    model, tensors = small
    tokens, positions = ids(1, 6), np.array([[0, 3, 4, 90, 91, 700]])
    actual = model(jnp.asarray(tokens), positions=jnp.asarray(positions))
    config = reference.CONFIGS["llama-3"]
    expected = reference.logits(tensors, config, tokens[0], positions=positions[0])
    assert max_error(actual[0], expected) < LOGITS


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_rope_frequencies(name: str):
    config = reference.CONFIGS[name]
    actual = rope_frequencies(LlamaConfig.from_hf(config))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, reference.frequencies(config), rtol=5e-7)


def test_the_tiny_config_covers_every_band_of_llama3_scaling():
    config = reference.CONFIGS["llama-3.1"]
    plain = reference.frequencies(config | {"rope_scaling": None})
    ratio = plain / reference.frequencies(config)
    unscaled, scaled = np.isclose(ratio, 1), np.isclose(ratio, 8)
    assert unscaled.any() and scaled.any() and (~unscaled & ~scaled).any()


def test_rope_angles_at_position_100_000():
    positions = np.array([[0, 99_999, 100_000, 131_071]])
    frequencies = rope_frequencies(LlamaConfig.from_hf(reference.CONFIGS["llama-3.1"]))
    cos, sin = jax.jit(rope_angles)(frequencies, jnp.asarray(positions))
    product = positions.astype(np.float32)[..., None, None] * frequencies
    assert product.dtype == np.float32
    turn = np.exp(1j * product.astype(np.float64))
    assert max_error(cos, np.real(turn)) < FLOAT32
    assert max_error(sin, np.imag(turn)) < FLOAT32

    # in bfloat16 only the result is rounded, not the angle: 2^-8 of the norm
    x = jnp.ones((1, 4, 1, 16), jnp.bfloat16)
    actual = apply_rope(x, cos, sin)
    z = (1 + 1j) * turn
    assert actual.dtype == jnp.bfloat16
    assert max_error(actual, np.concatenate([z.real, z.imag], -1)) < 2 * 2**-8


@pytest.mark.parametrize("remat", ["dots", "block", "offload"])
def test_remat_does_not_change_loss_and_gradient(remat: Remat):
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(ids(2, 8))

    def loss_and_grad(policy: Remat):
        model.remat = policy
        graph, state = nnx.split(model)
        return jax.jit(
            jax.value_and_grad(lambda s: jnp.mean(nnx.merge(graph, s)(tokens) ** 2))
        )(state)

    loss, gradient = loss_and_grad(remat)
    other_loss, other_gradient = loss_and_grad("none")
    assert abs(float(loss) - float(other_loss)) < FLOAT32
    other = dict(nnx.to_flat_state(other_gradient))
    for path, leaf in nnx.to_flat_state(gradient):
        actual = np.asarray(leaf[...])
        np.testing.assert_allclose(actual, other[path][...], atol=FLOAT32)
        for layer in actual if "layers" in path else [actual]:
            assert np.abs(layer).max() > 0, path  # gradients reach every matrix


class Wrapper(nnx.Module):
    """A minimal adapter: a base, trainable factors, dropout by key."""

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


def test_every_layer_and_projection_has_its_own_dropout_key():
    keys: list[tuple[str, np.ndarray]] = []

    class Spy(nnx.Module):
        def __init__(self, base: Linear, name: str):
            self.base, self.name = base, name

        def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
            assert key is not None
            jax.debug.callback(
                lambda data: keys.append((self.name, np.asarray(data))),
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
    assert len(keys) == 7 * SMALL.num_hidden_layers
    assert len({data.tobytes() for _, data in keys}) == len(keys)


def dot_generals(jaxpr: Any) -> list[Any]:
    """All matrix products of a jaxpr, including those of inner jaxprs."""
    equations = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    for value in (v for e in jaxpr.eqns for v in e.params.values()):
        inner = getattr(value, "jaxpr", value)  # closed or not
        equations += dot_generals(inner) if hasattr(inner, "eqns") else []
    return equations


def gradient_jaxpr(layers: int, dtype: Any) -> Any:
    config = reference.CONFIGS["llama-3"] | {"num_hidden_layers": layers}
    model = nnx.eval_shape(
        lambda: Llama(LlamaConfig.from_hf(config), dtype=dtype, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(model)
    tokens = jnp.asarray(ids(1, 4))
    return jax.make_jaxpr(
        jax.grad(lambda s: jnp.mean(nnx.merge(graph, s)(tokens) ** 2))
    )(state)


def test_matmuls_of_a_float32_model_have_highest_precision():
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    full, half = (
        [e.params["precision"] for e in dot_generals(gradient_jaxpr(3, dtype).jaxpr)]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert len(full) > 27 and set(full) == {highest}
    assert highest not in half


def test_the_jaxpr_does_not_grow_with_depth():
    few, many = (str(gradient_jaxpr(layers, jnp.float32)) for layers in (4, 32))
    assert many.count("\n") == few.count("\n")


def test_bfloat16_model():
    float32 = Llama(SMALL, rngs=nnx.Rngs(0))
    graph, state = nnx.split(float32)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    tokens = jnp.asarray(ids(1, 8))
    hidden = rounded.hidden_states(tokens)
    actual, expected = rounded.unembed(hidden), float32(tokens)
    assert hidden.dtype == jnp.bfloat16 and actual.dtype == jnp.float32
    assert max_error(actual, expected) < 0.05 * float(jnp.abs(expected).max())
    fresh = nnx.eval_shape(lambda: Llama(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.state(fresh)):
        assert leaf.dtype == jnp.bfloat16, path


def test_token_ids_outside_the_vocabulary_give_nan(
    small: tuple[Llama, reference.Tensors],
):
    logits = small[0](jnp.array([[1, 61], [1, 60]]))
    assert np.isnan(logits[0, 1]).all() and np.isfinite(logits[1]).all()
