"""The held-out records of a comparison: for the search, and for the results."""

from dataclasses import replace

import numpy as np
import pytest

from manifold_lora.comparison.splits import split_held_out
from manifold_lora.errors import InputError
from tests.comparison.cells import splits_of
from tests.configs import train_config
from tests.tiny import data_file, model_directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    data = data_file(folder / "train.jsonl")
    return {"model": model_directory(folder / "model"), "data": data}


def test_the_test_part_is_eval_data_where_it_is_given(settings, tmp_path):
    path = data_file(tmp_path / "eval.jsonl", 7)
    first, second = (
        splits_of(settings | {"eval_data": path, "seed": n}) for n in (0, 3)
    )
    assert [len(part) for part in (first.data.train, first.validation)] == [36, 4]
    assert len(first.test) == 7 and first.data.held_out is first.test
    for one, other in zip(first.validation, second.validation, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
    third = splits_of(settings | {"eval_data": path, "split_seed": 1})
    assert len(third.validation) == 4
    assert {e.input_ids.tobytes() for e in third.validation} != {
        e.input_ids.tobytes() for e in first.validation
    }


def test_rows_of_one_text_are_in_one_part(settings):
    splits = splits_of(settings)
    config = train_config(model=settings["model"], data=settings["data"])
    rows = [replace(e, location=f"a:{n % 5}") for n, e in enumerate(splits.data.train)]
    again = split_held_out(config, splits.data._replace(held_out=rows))
    places = [{e.location for e in part} for part in (again.validation, again.test)]
    assert [len(part) for part in places] == [2, 3] and not places[0] & places[1]
    assert len(again.validation) + len(again.test) == 36
    with pytest.raises(InputError, match="one record is held out.*--eval-examples"):
        split_held_out(config, splits.data._replace(held_out=rows[:1]))
    given = train_config(
        **{name: settings[name] for name in ("model", "data")},
        eval_data=settings["data"],
    )
    with pytest.raises(InputError, match="--data has one record"):
        split_held_out(given, splits.data._replace(train=rows[:1]))
