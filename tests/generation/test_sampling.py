"""Choosing tokens, against a float64 restatement in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifold_lora.errors import InputError
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.sampling import choose, penalise, restrict

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)


def allowed(row, config):
    """The tokens that may be sampled, by the definitions, one at a time."""
    x = row.astype(np.float64) / config.temperature
    order = np.argsort(-x)
    kept = list(order[: config.top_k])
    p = np.exp(x - x.max())
    p = {i: p[i] / sum(p[j] for j in kept) for i in kept}
    total, fewest = 0.0, []
    for i in kept:
        if total < config.top_p:
            fewest.append(i)
        total += p[i]
    largest = max(p[i] for i in fewest)
    return sorted(i for i in fewest if p[i] >= config.min_p * largest)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 7},
        {"temperature": 1.5, "top_k": 400},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "top_p": 0.9, "top_k": 12},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_restricted_to_the_same_tokens(options):
    config = GenerationConfig(**options)
    got = np.asarray(restrict(jnp.asarray(LOGITS), config))
    for row, logits in zip(got, LOGITS, strict=True):
        tokens = allowed(logits, config)
        assert np.flatnonzero(np.isfinite(row)).tolist() == tokens
        np.testing.assert_allclose(
            row[tokens], logits[tokens] / config.temperature, rtol=1e-6
        )


def test_samples_have_the_probabilities():
    config = GenerationConfig(temperature=1.0, top_k=3)
    logits = jnp.log(jnp.array([0.5, 0.1, 0.3, 0.05, 0.05]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = np.asarray(choose(jnp.tile(logits, (len(keys), 1)), config, keys))
    frequencies = np.bincount(tokens, minlength=5) / len(keys)
    needed = np.array([0.5, 0.1, 0.3, 0, 0]) / 0.9
    assert np.abs(frequencies - needed).max() < 4 * 0.5 / np.sqrt(len(keys))


def test_penalty():
    seen = np.zeros(LOGITS.shape, bool)
    seen[:, ::3] = True
    got = penalise(jnp.asarray(LOGITS), jnp.asarray(seen), 1.5)
    needed = np.where(LOGITS < 0, LOGITS * 1.5, LOGITS / 1.5)
    np.testing.assert_allclose(got, np.where(seen, needed, LOGITS), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4, "temperature": 0.5}, "num_beams 4 searches, temperature 0.5"),
        ({"top_k": 3}, "top_k limits what is sampled, but temperature is 0"),
        ({"top_p": 0.5}, "top_p limits"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be"),
        ({"min_p": 2.0, "temperature": 1.0}, "min_p must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_beams": 65}, "num_beams must be"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        GenerationConfig(**options)
