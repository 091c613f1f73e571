"""Any TOML and any flags: a configuration or one clear message, nothing else."""

import dataclasses
import datetime
import functools
import tomllib
import typing
from collections.abc import Mapping
from typing import Literal

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifold_lora.comparison.config import CompareConfig
from manifold_lora.configuration.flat import (
    OPTIONS,
    Source,
    compose,
    entries,
    flatten,
    parts,
    read_toml,
)
from manifold_lora.errors import InputError
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.planning.config import PlanConfig
from manifold_lora.settings import flag
from manifold_lora.training.config import TrainConfig

KINDS = (TrainConfig, CompareConfig, PlanConfig, EvaluateConfig)
any_input = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
texts = st.one_of(
    st.text(max_size=12),
    st.text("0123456789.+-eE_ xinfaNn", max_size=30),
    st.sampled_from(
        ["~", "~nobody/x", "\0", "a" * 300, "9" * 5000, "1e999", "[b]", ""]
    ),
    st.sampled_from(["lora", "stella", "q_proj", "data=2", "adamw", "[::1]:1", "auto"]),
)
numbers = st.one_of(
    st.integers(-3, 40), st.integers(-(10**40), 10**40), st.floats(width=64)
)
scalars = st.one_of(
    numbers,
    texts,
    st.booleans(),
    st.dates(),
    st.times(),
    st.datetimes(datetime.datetime(1970, 1, 1)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=5,
)


@functools.cache
def known(kind):
    return entries(kind)


@st.composite
def likely(draw, hint):
    """A value of about the right type, so that many documents are accepted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return draw(st.sampled_from(args))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return draw(st.dictionaries(st.sampled_from(["q_proj", "a.b[0]"]), numbers))
    if origin is tuple:
        return draw(st.lists(st.sampled_from([0.5, 2, "lora", "wandb"]), max_size=2))
    for base in (args[0] if args else hint, *args):
        if base in (int, float):
            return draw(st.integers(1, 64).map(base))
        if base is bool:
            return draw(st.booleans())
    return draw(texts)


@st.composite
def documents(draw):
    """A class of configuration, and the content of a TOML file for it."""
    kind = draw(st.sampled_from(KINDS))
    names = draw(st.lists(st.sampled_from(sorted(known(kind))), max_size=5))
    content = {}
    for name in names:
        hint = known(kind)[name].hint
        content[name] = draw(st.one_of(values, *[likely(hint)] * 3))
    if draw(st.booleans()):
        table = draw(st.sampled_from([*parts(kind), "nothing"]))
        content[table] = draw(values)
    return kind, content


def accepted(kind, make):
    """The configuration, which its own settings make again, or None."""
    try:
        config = make()
    except InputError as error:
        assert 0 < len(str(error)) < 10_000
        return None
    saved = flatten(config)
    again = compose(kind, Source(tomllib.loads(tomli_w.dumps(saved))))
    assert flatten(again) == saved
    for field in dataclasses.fields(config):
        if field.name not in ("launch", "output"):  # have settings that are not saved
            value = getattr(config, field.name)
            # A comparison's options are saved with the runs of its methods.
            saved_here = field.metadata.get("saved", True) and field.name != OPTIONS
            if saved_here:
                assert getattr(again, field.name) == value
    return config


@given(documents())
@any_input
def test_any_values_in_a_file(tmp_path_factory, document):
    kind, content = document
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    accepted(kind, lambda: compose(kind, read_toml(file, kind)))


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
@any_input
def test_any_bytes_in_a_file(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    accepted(TrainConfig, lambda: compose(TrainConfig, read_toml(file, TrainConfig)))


@given(st.data())
@any_input
def test_any_text_of_flags(data):
    kind = data.draw(st.sampled_from(KINDS))
    names = data.draw(st.lists(st.sampled_from(sorted(known(kind))), max_size=4))
    given = {}
    for name in names:
        hint = known(kind)[name].hint
        origin = typing.get_origin(hint)
        if hint is bool:
            given[name] = data.draw(st.booleans())
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            given[name] = data.draw(st.dictionaries(texts, texts, max_size=2))
        elif origin is tuple:
            given[name] = tuple(data.draw(st.lists(texts, max_size=3)))
        else:
            given[name] = data.draw(st.one_of(texts, likely(hint).map(str)))
    accepted(kind, lambda: compose(kind, Source(given, flag, from_text=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_round_trip(kind):
    given = {"devices": 1} if kind is PlanConfig else {}
    assert accepted(kind, lambda: compose(kind, Source(given))) is not None
