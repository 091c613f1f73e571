"""The table of methods: what goes with what, and what is said where it does not."""

import re
from typing import Any

import pytest

from manifold_lora.adapters import AdapterConfig
from manifold_lora.adapters.attach import adapter_class
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS, OPTIONS, find_method, problems
from manifold_lora.training.config import TrainConfig, resolve
from manifold_lora.training.optimizer import RECIPES

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
    "attraction": 0.5,
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
    "attraction": ["landing_stiefel", "landing_oblique"],
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


def refusals(method: str, **given: Any) -> list[str]:
    """What a run, and where it takes the setting an adapter, says to it."""
    said = []
    run = {"start" if key == "init" else key: x for key, x in given.items()}
    for make in (
        lambda: resolve(TrainConfig(method=method, **run)),
        lambda: AdapterConfig(method, **given),
    ):
        try:
            make()
        except InputError as error:
            said.append(str(error))
        except TypeError:  # an adapter has no such setting
            assert not hasattr(AdapterConfig(), next(iter(given)))
    return said


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_goes_with_its_methods_alone(option: str):
    assert VALUES.keys() == OPTIONS.keys() == ALLOWED.keys()
    value, places = VALUES[option], 1 + hasattr(AdapterConfig(), option)
    for name, method in METHODS.items():
        said = refusals(name, **{option: value})
        if name in ALLOWED[option]:
            assert option in method.options and said == [], name
            continue
        assert len(said) == places, name
        words = f"method {name} and {option}={value} exclude each other"
        allowed = f"{option} goes with {', '.join(ALLOWED[option])}."
        assert all(words in text and text.endswith(allowed) for text in said)
        assert problems(name, {option: OPTIONS[option]}) == []


@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_goes_with_its_methods_alone(init: str):
    for name, method in METHODS.items():
        said = refusals(name, init=init)
        if name in INITS[init]:
            assert init in method.inits and said == []
            continue
        assert len(said) == 2
        for text in said:
            assert f"method {name} and init={init} exclude each other" in text
            assert f"initialisations of {name} are {', '.join(method.inits)}" in text
            assert f"{init} goes with {', '.join(INITS[init])}." in text


def test_the_tables_are_whole():
    for name, method in METHODS.items():
        assert set(method.inits) <= INITS.keys() and set(method.options) <= {*OPTIONS}
        cls = adapter_class(name)
        assert issubclass(cls, LowRankLinear) and cls.__doc__
        assert method.recipe in RECIPES
        assert method.rates == tuple(sorted(method.rates))
        assert method.rates[0] <= method.rate <= method.rates[-1]
        assert (method.free_rate is None) == (
            "free_learning_rate" not in method.options
        )
        assert (method.builtin_free_rate is None) == (method.free_rate is None)


def test_an_unknown_initialisation_has_no_method():
    text = problems("stella", {"init": "pisa"})[0]
    assert "init=pisa" in text and "goes with" not in text


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_fixed_factor_needs_a_random_initialisation(init: str):
    (text,) = problems("lora", {"init": init, "fixed_a": "random"})
    assert f"init={init} and fixed_a=random exclude each other" in text
    assert "kaiming and gaussian" in text


def test_what_can_only_be_merged_is_not_truncated():
    given = {"diagonal_scaling": True, "truncate_below": 0.1}
    (text,) = problems("loram_br", given)
    assert "diagonal_scaling=True and truncate_below=0.1 exclude each other" in text


def test_everything_wrong_is_said_at_once():
    given = {"diagonal_s": True, "init": "svd_major", "attraction": 1.0}
    assert len(problems("lora", given)) == 3
    run = {"start" if key == "init" else key: x for key, x in given.items()}
    with pytest.raises(InputError, match=r"diagonal_s.*attraction.*svd_major"):
        resolve(TrainConfig(method="lora", **run))


@pytest.mark.parametrize("make", [find_method, lambda name: problems(name, {})])
def test_an_unknown_method(make: Any):
    known = re.escape(", ".join(sorted(METHODS)))
    with pytest.raises(InputError, match=f"'stela'. Did you mean stella.*{known}"):
        make("stela")
