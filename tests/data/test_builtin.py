import hashlib
import unicodedata
from collections import Counter

from manifold_lora.data.builtin import builtin_records
from manifold_lora.data.records import Record


def test_records_agree_with_unicodedata() -> None:
    train, held_out = builtin_records()
    assert Record(prompt="LATIN SMALL LETTER A:", completion=" Ll") in train + held_out
    for record in train[:500] + held_out:
        name = record.prompt.removesuffix(":")
        assert record.completion == f" {unicodedata.category(unicodedata.lookup(name))}"
        assert record.turns == ()


def test_splits_are_disjoint_and_without_generated_names() -> None:
    train, held_out = builtin_records()
    names = [record.prompt for record in train + held_out]
    assert len(held_out) == 1000 and len(train) > 29_000
    assert len(set(names)) == len(names)
    for generated in ("CJK UNIFIED IDEOGRAPH-4E00:", "HANGUL SYLLABLE GAG:"):
        assert generated not in names
    assert "HANGUL CHOSEONG KIYEOK:" in names and "DOMINO TILE VERTICAL-00-01:" in names


def test_majority_class_of_either_split() -> None:
    for split in builtin_records():
        counts = Counter(record.completion for record in split)
        (majority, count), *_ = counts.most_common()
        assert majority == " Lo" and 0.455 < count / len(split) < 0.47


def test_the_hashes_determine_the_split() -> None:
    """The same on every machine: these three have the smallest hashes."""
    train, held_out = builtin_records()
    first = {"CANADIAN SYLLABICS NGI:", "LAO LETTER NYO:", "YI SYLLABLE NDIE:"}
    assert first <= {record.prompt for record in held_out}

    def hashes(records: list[Record]) -> list[str]:
        names = [record.prompt.removesuffix(":") for record in records]
        return [hashlib.sha256(name.encode()).hexdigest() for name in names]

    assert max(hashes(held_out)) < min(hashes(train))
