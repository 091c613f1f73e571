"""Names, patterns and values of an AdapterConfig, against PEFT's rules by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from manifold_lora.adapters.config import AdapterConfig, is_target, lookup
from manifold_lora.adapters.options import inits
from manifold_lora.adapters.stella import StellaOptions
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS

Q, GATE = "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("targets", "q", "gate"),
    [
        ("all-linear", True, True),
        ("q_proj", True, False),
        ("self_attn.q_proj", True, False),
        ("proj", False, False),  # whole parts of a name only
        ("_proj", False, False),
        (["q_proj"], True, False),
        (["q_proj", "mlp.gate_proj"], True, True),
        (("k_proj", "v_proj"), False, False),
        ([Q], True, False),
        ([".*proj"], False, False),  # expressions stand alone, not in lists
        ("q_.*", False, False),  # an expression is for the whole name
        (r".*\.q_.*", True, False),
        (r"model\.layers\.\d+\.mlp\..*", False, True),
        (r"model\.layers\.1\..*", False, True),  # and not layer 11
    ],
)
def test_targets(targets: str | Sequence[str], q: bool, gate: bool):
    assert (is_target(targets, Q), is_target(targets, GATE)) == (q, gate)


@pytest.mark.parametrize(
    ("pattern", "q", "gate"),
    [
        ({}, 0, 0),
        ({"q_proj": 1}, 1, 0),
        ({"proj": 1}, 0, 0),
        ({"q_proj": 1, ".*_proj": 2}, 1, 2),  # the first hit wins
        ({".*_proj": 2, "q_proj": 1}, 2, 2),
        ({"mlp.*": 3}, 0, 3),
        ({"q_proj|gate_proj": 4}, 4, 4),
        ({r"layers\.1\.mlp\.gate_proj": 5, "gate_proj": 6}, 0, 5),
        ({"layers.1": 5}, 0, 0),  # the end of the name must match
        ({"^model.*q_proj": 7}, 7, 0),
    ],
)
def test_patterns(pattern: dict[str, int], q: int, gate: int):
    assert (lookup(pattern, Q, 0), lookup(pattern, GATE, 0)) == (q, gate)


def test_alpha_is_twice_the_rank_unless_given():
    assert AdapterConfig(rank=8).alpha == 16
    assert AdapterConfig(rank=8, alpha=1.5).alpha == 1.5


def test_the_initialisation_is_the_first_of_the_method_unless_given():
    defaults = {name: AdapterConfig(name).options.init for name in METHODS}
    assert defaults == {name: inits(name)[0] for name in METHODS}
    assert AdapterConfig("stella", {"init": "zero"}).options.init == "zero"


def test_options_are_those_of_the_method():
    given = StellaOptions(diagonal_s=True)
    assert AdapterConfig("stella", given) == AdapterConfig(
        "stella", {"diagonal_s": 1 == 1}
    )
    with pytest.raises(InputError, match="lora and StellaOptions exclude each other"):
        AdapterConfig("lora", given)
    with pytest.raises(InputError, match="method lora has no option 'diagonal'"):
        AdapterConfig("lora", {"diagonal": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        (
            {"rank_pattern": {"q_proj": -2}},
            "rank_pattern for q_proj must be at least 1, got -2",
        ),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        (
            {"alpha": float("inf")},
            "alpha must be a positive number, at most 1e18, got inf",
        ),
        (
            {"alpha_pattern": {"v_proj": -1.0}},
            "alpha_pattern for v_proj must be a positive number, got -1.0",
        ),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"targets": []}, "at least one module"),
        ({"targets": ""}, "at least one module"),
        (
            {"method": "lora", "options": {"fixed_a": "both"}},
            "fixed_a must be one of random, projection, got 'both'",
        ),
        (
            {"method": "lora", "options": {"init": "orthogonal"}, "rank": 3},
            "init orthogonal needs even ranks, got 3",
        ),
        (
            {
                "method": "lora",
                "options": {"init": "orthogonal"},
                "rank_pattern": {"q_proj": 5},
            },
            "even ranks, got 5",
        ),
    ],
)
def test_values_out_of_range(given: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        AdapterConfig(**given)
    assert message in str(caught.value)


def test_every_bad_value_is_named_at_once():
    with pytest.raises(InputError, match=r"rank .* 0.*alpha .* -1.*dropout .* 2"):
        AdapterConfig(rank=0, alpha=-1, dropout=2)


@pytest.mark.parametrize("use", [is_target, lambda p, n: lookup({p: 1}, n, 0)])
def test_a_broken_expression_is_the_users(use: Any):
    with pytest.raises(InputError, match="not a regular expression"):
        use("(q_proj", Q)
