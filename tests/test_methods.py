"""The methods and their options: what goes with what, and what is said otherwise."""

import dataclasses
import re
from typing import Any

import pytest

from manifold_lora.adapters import AdapterConfig
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.adapters.options import (
    adapter_class,
    fields_by_option,
    inits,
    make_options,
    options_class,
)
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS, check_method
from tests.configs import train_config

VALUES: dict[str, Any] = {  # of every option, other than unset
    "fixed_a": "random",
    "diagonal_s": True,
    "diagonal_scaling": True,
    "lora_plus_ratio": 4.0,
    "free_learning_rate": 1e-3,
    "optimizer": "sgd",
    "second_moment": "scalar",
    "nuclear_decay": 1e-3,
    "truncate_below": 0.1,
    "penalty_weight": 0.5,
    "rate_bounds": (0.5, 2.0),
    "project_on_export": True,
}
ALLOWED = {  # restated
    "fixed_a": ["lora", "stiefel"],
    "diagonal_s": ["stella"],
    "diagonal_scaling": ["lora", "loram_fr", "loram_br"],
    "lora_plus_ratio": ["lora", "dora"],
    "free_learning_rate": ["stiefel", "stiefel_dora"],
    "optimizer": [name for name in METHODS if not name.startswith("loram")],
    "second_moment": ["loram_fr", "loram_br"],
    "nuclear_decay": ["loram_br"],
    "truncate_below": ["loram_br"],
    "penalty_weight": ["landing_stiefel", "landing_oblique"],
    "rate_bounds": ["landing_stiefel", "landing_oblique"],
    "project_on_export": ["landing_stiefel", "landing_oblique"],
}
INITS = {
    "kaiming": ["lora", "dora"],
    "gaussian": ["lora", "dora"],
    "orthogonal": ["lora"],
    "pissa": ["lora"],
    "olora": ["lora"],
    "zero": ["stella", "loram_fr", "loram_br"],
    "svd_major": ["stella"],
    "svd_minor": ["stella"],
    "identity": ["loram_fr"],
    "random": [
        "stiefel",
        "stiefel_dora",
        "stella",
        "landing_stiefel",
        "landing_oblique",
    ],
}


def errors(method: str, **options: Any) -> list[str]:
    """What a run and an adapter say to options of the method."""
    messages = []
    for make in (
        lambda: train_config(method=method, **options),
        lambda: AdapterConfig(method, options),
    ):
        try:
            make()
        except InputError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("option", VALUES)
def test_every_option_goes_with_its_methods_alone(option: str):
    assert {*VALUES, "init"} == fields_by_option().keys()
    value = VALUES[option]
    for name in METHODS:
        messages = errors(name, **{option: value})
        if name in ALLOWED[option]:
            assert name in fields_by_option()[option] and messages == [], name
            continue
        assert len(messages) == 2, name
        words = f"method {name} and {option}={value} exclude each other"
        allowed = f"{option} goes with {', '.join(ALLOWED[option])}."
        assert all(words in text and text.endswith(allowed) for text in messages)


@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_goes_with_its_methods_alone(init: str):
    for name in METHODS:
        messages = errors(name, init=init)
        if name in INITS[init]:
            assert init in inits(name) and messages == []
            continue
        assert len(messages) == 2
        for text in messages:
            assert f"method {name} and init={init} exclude each other" in text
            assert f"{name} has {', '.join(inits(name))}" in text
            assert f"{init} goes with {', '.join(INITS[init])}." in text


def test_declarations_are_complete():
    for name in METHODS:
        cls, options = adapter_class(name), options_class(name)
        assert issubclass(cls, LowRankLinear) and cls.__doc__
        assert set(inits(name)) <= INITS.keys()
        assert options().init == inits(name)[0]
        assert options.update and options.paper and options.recipe
        rates, free = options.learning_rates, options.free_learning_rates
        assert rates.grid == tuple(sorted(rates.grid))
        assert rates.grid[0] <= rates.default <= rates.grid[-1]
        names = {field.name for field in dataclasses.fields(options)}
        assert (free is not None) == ("free_learning_rate" in names)
        for field in dataclasses.fields(options):
            assert field.metadata["help"] and field.metadata["role"]


def test_an_initialisation_of_no_method():
    with pytest.raises(InputError, match="init=pisa exclude") as caught:
        AdapterConfig("stella", {"init": "pisa"})
    assert "goes with" not in str(caught.value)
    with pytest.raises(InputError, match="--init must be one of kaiming, .*, got 'pis"):
        train_config(method="stella", init="pisa")


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_fixed_factor_needs_a_random_initialisation(init: str):
    for text in errors("lora", init=init, fixed_a="random"):
        assert f"init={init} and fixed_a=random exclude each other" in text
        assert "kaiming and gaussian" in text
    assert len(errors("lora", init=init, fixed_a="random")) == 2


def test_what_can_only_be_merged_is_not_truncated():
    given = {"diagonal_scaling": True, "truncate_below": 0.1}
    for text in errors("loram_br", **given):
        assert "diagonal_scaling=True and truncate_below=0.1 exclude each other" in text
    assert len(errors("loram_br", **given)) == 2


def test_bounds_of_the_rate_are_in_order():
    (_, text) = errors("landing_oblique", rate_bounds=(2.0, 0.5))
    assert "rate_bounds needs least ≤ largest, got 2.0 and 0.5" in text


def test_everything_wrong_is_reported_at_once():
    given = {"diagonal_s": True, "init": "svd_major", "penalty_weight": 1.0}
    for text in errors("lora", **given):
        assert re.search(r"diagonal_s.*svd_major.*penalty_weight", text)


@pytest.mark.parametrize("make", [check_method, lambda name: make_options(name, {})])
def test_an_unknown_method(make: Any):
    known = re.escape(", ".join(sorted(METHODS)))
    with pytest.raises(InputError, match=f"'stela'. Did you mean stella.*{known}"):
        make("stela")
