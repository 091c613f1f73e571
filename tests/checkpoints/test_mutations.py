"""Damaged models, adapters and checkpoints: refused in one message, or something else.

`benchmarks/mutations.py` does the same for longer, and for all readers.
"""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mutations import FAULTS, Verdict, fingerprint, judge, mutate_json, try_one
from tests.readers import READERS

CHECKPOINTS = ("model", "shape", "stop tokens", "patterns", "stella", "checkpoint")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damage_is_refused_or_read_as_something_else(name, tmp_path):
    reader = next(reader for reader in READERS if reader.name == name)
    original, folder = tmp_path / "original", tmp_path / "mutated"
    original.mkdir()
    reader.make(original)
    expected = fingerprint(reader.read(original))
    assert judge(reader, original, original, expected) == Verdict("read")

    @settings(
        max_examples=25 if name == "model" else 60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        what, verdict = try_one(reader, original, folder, expected, Random(seed))
        assert verdict.kind not in FAULTS, (what, verdict.detail)

    check()


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("config.json", '"hidden_size": 33', "silent"),
        ("config.json", '"hidden_size": "32"', "silent"),
        ("config.json", '"use_cache": 3', "read"),
        ("config.json", '"hidden_size": 32', "read"),
        ("config.json", "}", "silent"),
    ],
)
def test_what_counts_as_silent(file, text, kind, tmp_path):
    """A reader that reads nothing accepts everything."""
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "one" / file).write_text('{"hidden_size": 32, "use_cache": 1}')
    (tmp_path / "other" / file).write_text("{" + text + "}")
    reader = READERS[0]._replace(read=lambda folder: 0)
    verdict = judge(reader, tmp_path / "other", tmp_path / "one", fingerprint(0))
    assert verdict.kind == kind


def test_every_fault_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.mutations.SECONDS", 0.5)
    monkeypatch.setattr("tests.mutations.BYTES", 1 << 20)

    def kind(read) -> str:
        reader = READERS[0]._replace(read=read)
        return judge(reader, tmp_path, tmp_path, fingerprint(0)).kind

    def loop(folder):
        while True:
            pass

    assert kind(loop) == "hang"
    assert kind(lambda folder: 1 / 0) == "traceback"
    assert kind(lambda folder: len(bytearray(1 << 26)) * 0) == "memory"


def test_mutations_change_something():
    text = '{"a": 1, "b": {"c": [2, 3], "d": null}}'
    changed = [mutate_json(text, Random(seed))[0] for seed in range(200)]
    assert sum(x != text for x in changed) > 150 and len({*changed}) > 100
