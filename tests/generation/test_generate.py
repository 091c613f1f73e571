"""Generation by token ids, against the forward pass without a cache."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from manifold_lora.adapters import AdapterConfig, attach, factors, set_factors
from manifold_lora.distributed.arrays import shard_module
from manifold_lora.distributed.mesh import make_mesh
from manifold_lora.errors import InputError
from manifold_lora.generation import beams, decode
from manifold_lora.generation.batched import generate_batches
from manifold_lora.generation.config import GenerationConfig
from manifold_lora.generation.generate import Generator, generate
from manifold_lora.generation.padding import bucket, pad_prompts
from manifold_lora.models import Llama, LlamaConfig
from manifold_lora.models.cache import Cache
from tests.cases import slow_but
from tests.tolerances import BFLOAT16, LOGITS

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_id=(2, 7),
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 48, n).tolist() for n in (5, 12, 1, 30, 9)]
NEW = 12
LONGEST = 96


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if "kernel" in path or "embed_tokens" in path:  # so that rows differ
            variable.set_value(8 * variable.get_value())
    nnx.update(model, nnx.state(model))
    return model


def forward(model, ids):
    """The logits in one pass, compiled once."""
    return np.asarray(_forward(*nnx.split(model), jnp.asarray(ids))[0])


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, state, ids):
    return nnx.merge(graph, state)(ids[None])


def log_probabilities(model, ids):
    """Of the token after each, given those up to it; float64."""
    padded = np.pad(ids, (0, LONGEST - len(ids)))  # attention is causal
    logits = forward(model, padded)[: len(ids)].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(model, prompt, count, stop=()):
    """The continuation, recomputed from the start for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(log_probabilities(model, ids)[-1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def test_cached_hidden_states_are_those_of_one_pass(model):
    ids = jnp.asarray(RNG.integers(0, 48, (2, 20)))
    cache = Cache.empty(CONFIG, rows=2, length=24, dtype=jnp.float32)
    parts = []
    for start, stop in itertools.pairwise((0, 7, 8, 15, 20)):
        h, cache = model.extend(ids[:, start:stop], cache)
        parts.append(h)
    needed = model.hidden_states(ids)
    assert np.abs(jnp.concatenate(parts, axis=1) - needed).max() < LOGITS
    assert int(cache.end) == 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy(model, side):
    ids, mask = pad_prompts(PROMPTS)
    if side == "right":
        order = np.argsort(-mask, axis=1, kind="stable")
        ids, mask = (np.take_along_axis(x, order, axis=1) for x in (ids, mask))
    got = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, stop_tokens=())
    assert got.dtype == np.int32
    assert got.tolist() == [greedy(model, prompt, NEW) for prompt in PROMPTS]


def test_greedy_in_bfloat16(model):
    """Each token is the best of one pass, as far as its rounding tells."""
    rounded = nnx.clone(model)
    for _, variable in nnx.to_flat_state(nnx.state(rounded)):
        variable.set_value(variable.get_value().astype(jnp.bfloat16))
    nnx.update(rounded, nnx.state(rounded))
    ids, mask = pad_prompts(PROMPTS)
    got = generate(
        rounded, ids, attention_mask=mask, max_new_tokens=NEW, stop_tokens=()
    )
    others = 0
    for prompt, row in zip(PROMPTS, got.tolist(), strict=True):
        whole = [*prompt, *row]
        logits = forward(rounded, np.pad(whole, (0, LONGEST - len(whole))))
        logits = logits[len(prompt) - 1 : len(whole) - 1].astype(np.float64)
        tolerance = 4 * BFLOAT16 * np.abs(logits).max(-1)
        behind = logits.max(-1) - logits[np.arange(NEW), row]
        assert (behind <= tolerance).all()
        others += int((logits < (logits.max(-1) - tolerance)[:, None]).sum())
    assert others > 0.9 * NEW * len(PROMPTS) * (CONFIG.vocab_size - 1)


def test_rows_that_have_stopped_are_padded(model):
    needed = [greedy(model, prompt, NEW) for prompt in PROMPTS]
    stop = needed[1][3], needed[3][5]
    got = dict(
        generate_batches(
            model,
            PROMPTS,
            GenerationConfig(max_new_tokens=NEW),
            stop_tokens=stop,
            batch_size=2,
        )
    )
    for i, row in enumerate(needed):
        end = next((n for n, token in enumerate(row) if token in stop), NEW)
        assert got[i] == row[:end]
        rows = generate(model, [PROMPTS[i]], max_new_tokens=NEW, stop_tokens=stop)
        assert rows[0, : end + 1].tolist() == row[: end + 1]
        assert set(rows[0, end + 1 :].tolist()) <= {stop[0]}


def test_the_stop_tokens_are_the_models_own(model):
    needed = [greedy(model, prompt, 60, stop=(2, 7)) for prompt in PROMPTS]
    ids, mask = pad_prompts(PROMPTS)
    got = generate(model, ids, attention_mask=mask, max_new_tokens=60)
    assert any(len(row) < 60 for row in needed), "nothing stops: choose another seed"
    for row, expected in zip(got.tolist(), needed, strict=True):
        assert row == expected + [2] * (60 - len(expected))


def best_of_all(model, prompt, count, n, stop, penalty):
    """Beam search by its definition, with lists, in float64."""
    running, finished, still_open = [(0.0, [])], [], True
    for step in range(1, count + 1):
        candidates = []
        for score, ids in running:
            log_p = log_probabilities(model, [*prompt, *ids])[-1]
            candidates += [(score + x, [*ids, t]) for t, x in enumerate(log_p)]
        candidates.sort(key=lambda c: -c[0])
        candidates = candidates[: max(2, 1 + len(stop)) * n]
        ends = [ids[-1] in stop or step == count for _, ids in candidates]
        for (score, ids), end in list(zip(candidates, ends, strict=True))[:n]:
            if end and still_open:
                finished.append((score / step**penalty, ids))
        finished = sorted(finished, key=lambda c: -c[0])[:n]
        running = [c for c, end in zip(candidates, ends, strict=True) if not end][:n]
        if not running:
            break
        worst = finished[-1][0] if len(finished) == n else -1e9
        still_open = still_open and running[0][0] / step**penalty > worst
    return finished[0][1]


@pytest.mark.parametrize(
    ("n", "penalty"), slow_but([(4, 0.0)], [(2, 1.0), (4, 0.0), (3, 2.0)])
)
@pytest.mark.parametrize("stop", [(), (5, 11, 20, 33)])
def test_beams(model, n, penalty, stop):
    needed = [best_of_all(model, p, 8, n, stop, penalty) for p in PROMPTS]
    config = GenerationConfig(max_new_tokens=8, num_beams=n, length_penalty=penalty)
    ids, mask = pad_prompts(PROMPTS)
    got = Generator(model, config, stop)(ids, mask).tolist()
    for row, expected in zip(got, needed, strict=True):
        assert row[: len(expected)] == expected


def test_samples_depend_on_seed_and_prompt_alone(model):
    config = GenerationConfig(max_new_tokens=NEW, temperature=1.0, seed=3)
    samples = [
        dict(generate_batches(model, PROMPTS, config, stop_tokens=(), batch_size=size))
        for size in (1, 2, 5)
    ]
    assert samples[0] == samples[1] == samples[2]
    other = GenerationConfig(max_new_tokens=NEW, temperature=1.0, seed=4)
    assert dict(generate_batches(model, PROMPTS, other, stop_tokens=())) != samples[0]


def test_compiled_once_for_a_bucket(model):
    assert bucket(33) == bucket(40) != bucket(41)
    options = {"max_new_tokens": 3, "stop_tokens": ()}
    generate(model, [[3] * 33], **options)
    programs: tuple[Any, ...] = (decode.begin, decode.advance, beams.search)
    sizes = [f._cache_size() for f in programs]
    for n in (34, 37, 40):
        generate(model, [list(range(3, 3 + n))], **options)
    for seed in (0, 1):
        generate(model, [[3] * 33], temperature=1.0, seed=seed, **options)
    after = [f._cache_size() for f in programs]
    assert after == [sizes[0] + 1, sizes[1] + 1, sizes[2]]  # of the temperature


def test_an_adapter_is_applied(model):
    own = Llama(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(own, nnx.state(model))
    attach(own, AdapterConfig(method="stella", rank=4, alpha=64.0), seed=1)
    got = generate(own, [PROMPTS[3]], max_new_tokens=NEW, stop_tokens=())[0].tolist()
    assert got == greedy(own, PROMPTS[3], NEW)
    moved = jax.tree.map(lambda x: x * 1.5, factors(own))
    set_factors(own, moved)
    again = generate(own, [PROMPTS[3]], max_new_tokens=NEW, stop_tokens=())[0].tolist()
    assert again == greedy(own, PROMPTS[3], NEW) != got


@pytest.mark.mesh
@pytest.mark.parametrize(
    "options", slow_but([{"num_beams": 2}], [{}, {"num_beams": 2}])
)
def test_eight_devices_equal_one(options):
    alone = Llama(CONFIG, rngs=nnx.Rngs(0))
    attach(alone, AdapterConfig(method="stiefel", rank=4), seed=1)
    ids, mask = pad_prompts(PROMPTS)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "stop_tokens": ()}
    needed = generate(alone, ids, **settings, **options)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        shard_module(alone)
        got = generate(alone, ids, **settings, **options)
    assert got.tolist() == needed.tolist()


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[1, 48]], {}, "the token 48 of prompt 1 has no row in the embedding"),
        ([[1, -1]], {}, "the token -1 of prompt 1"),
        ([[1.5]], {}, "must be integers of shape"),
        ([1, 2], {}, "must be integers of shape"),
        ([[1], [1, 2]], {}, "Pad rows of different lengths"),
        ([[1] * 250], {"max_new_tokens": 7}, "more than the model's context"),
        ([[1]], {"stop_tokens": (99,)}, "the stop token 99"),
        ([[1]], {"attention_mask": [[1, 1]]}, "must have the shape of input_ids"),
        ([[1]], {"attention_mask": [[0]]}, "row 1 has no token"),
        ([[1]], {"top_q": 1}, "top_q"),
    ],
)
def test_input_that_is_refused(model, ids, options, words):
    with pytest.raises((InputError, TypeError), match=words):
        generate(model, ids, **options)
