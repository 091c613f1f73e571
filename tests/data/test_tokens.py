import json
from pathlib import Path

import numpy as np
import pytest

from manifold_lora.data.records import Record, Turn
from manifold_lora.data.tokens import check_ids, encode, load_tokenizer
from manifold_lora.errors import InputError
from tests.data import (
    BOS,
    END,
    EOS,
    EOT,
    LLAMA3,
    START,
    llama3_with_tags,
    make_tokenizer,
    saved,
    spell,
)

TWO_ANSWERS = Record(
    (
        Turn("system", "Be brief."),
        Turn("user", " Hi "),
        Turn("assistant", " Ho\n", trained=True),
        Turn("user", "And?"),
        Turn("assistant", "No", trained=True),
    )
)
TEMPLATES = {
    "prefixes": LLAMA3,
    "tags": llama3_with_tags(end_inside=True),
    "tags without end": llama3_with_tags(end_inside=False),
}


def pieces(*parts: tuple[bool, list[int]]) -> tuple[list[int], list[bool]]:
    ids = [token for _, part in parts for token in part]
    return ids, [trained for trained, part in parts for _ in part]


def check(example, expected: tuple[list[int], list[bool]]) -> None:
    ids, mask = expected
    assert example.input_ids.dtype == np.int32 and example.loss_mask.dtype == np.bool_
    assert (example.input_ids.tolist(), example.loss_mask.tolist()) == (ids, mask)


def header(role: str) -> list[int]:
    return spell(START, role, END, "\n\n")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_ids_and_mask(template: str) -> None:
    """All three ways to locate the answers agree with the chat spelled out."""
    examples, report = encode([TWO_ANSWERS], make_tokenizer(template=template), 500)
    expected = pieces(
        (False, spell(BOS) + header("system") + spell("Be brief.", EOT)),
        (False, header("user") + spell("Hi", EOT) + header("assistant")),
        (True, spell("Ho", EOT)),
        (False, header("user") + spell("And?", EOT) + header("assistant")),
        (True, spell("No", EOT)),
    )
    check(examples[0], expected)
    assert report.trained_tokens == 6
    assert report.tokens == report.longest == len(expected[0])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_answers_in_the_prompt_are_not_trained(template: str) -> None:
    turns = list(TWO_ANSWERS.turns)
    turns[2] = Turn("assistant", "Ho")
    examples, _ = encode([Record(tuple(turns))], make_tokenizer(template=template), 500)
    mask = examples[0].loss_mask
    assert mask.sum() == 3 and mask[-3:].all()


def test_prompt_and_completion() -> None:
    records = [Record(prompt="Q:", completion=" A"), Record(completion="A b")]
    examples, report = encode(records, make_tokenizer(), 20)
    check(examples[0], pieces((False, spell(BOS, "Q:")), (True, spell(" A", EOS))))
    check(examples[1], pieces((False, spell(BOS)), (True, spell("A b", EOS))))
    assert (report.kept, report.truncated, report.split) == (2, 0, 0)


def test_without_bos_the_first_token_is_not_trained() -> None:
    examples, _ = encode([Record(completion="abc")], make_tokenizer(bos=False), 20)
    check(examples[0], pieces((False, spell("a")), (True, spell("bc", EOS))))


@pytest.mark.parametrize("template", [None, LLAMA3])
def test_one_bos_and_one_eos_if_the_text_contains_them(
    template: str | None,
) -> None:
    records = [
        Record(prompt=f"{BOS}Q:", completion=f" A{EOS}"),
        Record(completion=f"{BOS}abc"),
    ]
    if template:
        records.append(TWO_ANSWERS)
    examples, _ = encode(records, make_tokenizer(template=template), 500)
    for example in examples:
        assert (example.input_ids == spell(BOS)[0]).tolist().index(True) == 0
        assert (example.input_ids == spell(BOS)[0]).sum() == 1
    assert (examples[0].input_ids == spell(EOS)[0]).sum() == 1


def test_a_chat_template_selects_the_chat_form() -> None:
    record = Record(
        (Turn("user", "Hi"), Turn("assistant", "Ho", trained=True)), "Q: Hi\nA:", " Ho"
    )
    plain, _ = encode([record], make_tokenizer(), 99)
    check(plain[0], pieces((False, spell(BOS, "Q: Hi\nA:")), (True, spell(" Ho", EOS))))
    chat, _ = encode([record], make_tokenizer(template=LLAMA3), 99)
    prompt = spell(BOS) + header("user") + spell("Hi", EOT) + header("assistant")
    check(chat[0], pieces((False, prompt), (True, spell("Ho", EOT))))


def test_records_of_all_kinds_keep_their_order() -> None:
    one = Record((Turn("user", "x"), Turn("assistant", "y", trained=True)))
    given = Record((*one.turns[:1], Turn("assistant", "z"), *one.turns))
    records = [Record(completion="a"), one, Record(completion="b"), given, one]
    tokenizer = make_tokenizer(template=TEMPLATES["tags"])
    examples, _ = encode(records, tokenizer, 99)
    alone = [encode([record], tokenizer, 99)[0][0] for record in records]
    for example, expected in zip(examples, alone, strict=True):
        check(example, (expected.input_ids.tolist(), expected.loss_mask.tolist()))


def test_prompt_and_completion_are_tokenised_together() -> None:
    """A token across their border belongs to the answer."""
    tokenizer = make_tokenizer(lines=["Answer: yes", "yes yes Answer: yes"] * 4)
    joined = tokenizer("Answer: yes")["input_ids"]
    apart = tokenizer("Answer: y")["input_ids"]
    assert joined[: len(apart)] != apart
    examples, _ = encode([Record(prompt="Answer: y", completion="es")], tokenizer, 99)
    (example,) = examples
    assert example.input_ids.tolist() == [*joined, tokenizer.eos_token_id]
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == f" yes{EOS}"


@pytest.mark.parametrize(
    ("length", "prompt", "answer"),
    [
        (8, "abcd", f"XY{EOS}"),
        (7, "bcd", f"XY{EOS}"),
        (5, "d", f"XY{EOS}"),
        (4, "", f"XY{EOS}"),
        (3, "", "XY"),
    ],
)
def test_truncation_starts_at_the_left_of_the_prompt(
    length: int, prompt: str, answer: str
) -> None:
    records = [Record(prompt="abcd", completion="XY"), Record(completion="k")]
    examples, report = encode(records, make_tokenizer(), length)
    end = spell(EOS) if EOS in answer else []
    expected = spell(answer.replace(EOS, "")) + end
    check(examples[0], pieces((False, spell(BOS, prompt)), (True, expected)))
    assert report.truncated == (length < 8) and report.longest == 8


def test_truncation_without_bos_keeps_one_token_of_context() -> None:
    records = [Record(prompt="abcd", completion="XYZ"), Record(completion="k")]
    examples, _ = encode(records, make_tokenizer(bos=False), 3)
    check(examples[0], pieces((False, spell("d")), (True, spell("XY"))))


def test_train_on_prompt_trains_all_but_the_first_token() -> None:
    records = [Record(prompt="abcd", completion="XY"), Record(completion="k")]
    examples, _ = encode(records, make_tokenizer(), 5, train_on_prompt=True)
    check(examples[0], pieces((False, spell(BOS)), (True, spell("dXY", EOS))))


def test_invalid_records_are_refused_or_skipped() -> None:
    no_tags = "{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ 'x' }}"
    tokenizer = make_tokenizer(template=no_tags)
    turns = (Turn("user", "Hi"), Turn("assistant", "Ho", trained=True))
    chat = Record(turns, location="train.jsonl:7")
    records = [chat, Record(completion="k")]
    with pytest.raises(InputError, match=r"train.jsonl:7: .*\nFix .*--skip-invalid"):
        encode(records, tokenizer, 99)
    examples, report = encode(records, tokenizer, 99, skip_invalid=True)
    assert len(examples) == report.kept == 1
    assert [reason[:14] for reason in report.invalid] == ["train.jsonl:7:"]
    with pytest.raises(InputError, match="train.jsonl:7"):
        encode([chat], tokenizer, 99, skip_invalid=True)  # nothing is left


def test_many_invalid_records_are_counted() -> None:
    chat = Record((Turn("user", "Hi"), Turn("assistant", "Ho", trained=True)))
    with pytest.raises(InputError, match="record 8: .*\n... and 92 more"):
        encode([chat] * 100, make_tokenizer(), 99)


def test_a_long_text_is_split_into_rows() -> None:
    """Every token is in one row, and is trained unless it has no context."""
    records = [Record(completion="abcdefghij"), Record(prompt="k", completion="l")]
    examples, report = encode(records, make_tokenizer(), 5)
    rows = [example.input_ids.tolist() for example in examples]
    assert sum(rows[:-1], []) == spell(BOS, "abcdefghij", EOS)[:-2] + spell("j", EOS)
    assert [len(row) for row in rows] == [5, 5, 2, 4]
    for example in examples[:-1]:
        assert not example.loss_mask[0] and example.loss_mask[1:].all()
    assert (report.split, report.truncated, report.kept) == (1, 0, 4)


def test_answer_and_loss_masks_are_two_things() -> None:
    (example,), _ = encode(
        [Record(prompt="ab", completion="cd")], make_tokenizer(), 9, True
    )
    assert example.loss_mask.tolist() == [False] + [True] * 5
    assert example.answer_mask.tolist() == [False] * 3 + [True] * 3


def test_ids_beyond_the_embedding() -> None:
    tokenizer = make_tokenizer()
    records = [Record(completion="ab"), Record(completion="aé", location="x.jsonl:2")]
    examples, _ = encode(records, tokenizer, 99)
    largest = max(int(example.input_ids.max()) for example in examples)
    check_ids(examples, largest + 1, tokenizer)
    with pytest.raises(InputError, match=f"x.jsonl:2: .* {largest}, .* {largest} rows"):
        check_ids(examples, largest, tokenizer)


def test_every_example_too_long() -> None:
    records = [
        Record(prompt="a", completion="bcdef"),
        Record(prompt="a", completion="bcdefgh"),
    ]
    message = "shortest has 8 tokens, the longest 10, .* is 7. Raise --sequence-length"
    with pytest.raises(InputError, match=message):
        encode(records, make_tokenizer(), 7)


@pytest.mark.parametrize(
    ("records", "length", "message"),
    [
        ([], 10, "no records"),
        ([Record(completion="a")], 1, "--sequence-length must be at least 2, got 1"),
    ],
)
def test_nothing_to_encode(records: list[Record], length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(records, make_tokenizer(), length)


def test_chat_without_chat_template() -> None:
    with pytest.raises(InputError, match="record 2: .*has no chat template"):
        encode([Record(completion="a"), TWO_ANSWERS], make_tokenizer(), 99)


def test_no_end_of_sequence_token() -> None:
    with pytest.raises(InputError, match="set eos_token in tokenizer_config.json"):
        encode([Record(completion="a")], make_tokenizer(eos=None), 99)


@pytest.mark.parametrize("tags", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_that_rejects_a_chat(tags: str) -> None:
    reject = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    tokenizer = make_tokenizer(template=reject + tags + "{% endif %}" + LLAMA3)
    chat = Record((Turn("user", "Hi"), Turn("assistant", "Ho", trained=True)))
    with pytest.raises(InputError, match="record 2: .* rejects it: no system"):
        encode([chat, TWO_ANSWERS], tokenizer, 99)


def test_a_template_that_rewrites_earlier_turns() -> None:
    """Each answer that it would rewrite is an example of its own."""
    chat = Record(TWO_ANSWERS.turns[1:])
    rewriting = LLAMA3.replace(
        "{{ message.content | trim }}",
        "{{ message.content | trim if loop.last or message.role == 'user' "
        "else '...' }}",
    )
    examples, _ = encode([chat], make_tokenizer(template=rewriting), 500)
    user = (False, spell(BOS) + header("user") + spell("Hi", EOT) + header("assistant"))
    again = (False, header("user") + spell("And?", EOT) + header("assistant"))
    check(examples[0], pieces(user, (True, spell("Ho", EOT))))
    rewritten = (False, spell("...", EOT))
    check(examples[1], pieces(user, rewritten, again, (True, spell("No", EOT))))
    assert len(examples) == 2


@pytest.mark.parametrize("template", [None, LLAMA3])
def test_load_tokenizer(tmp_path: Path, template: str | None) -> None:
    """The loaded tokenizer encodes as the saved one, also beside a LLaMA config."""
    tokenizer = make_tokenizer(template=template)
    path = saved(tokenizer, tmp_path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(path)
    text = "It's  1,000\n\n café <|eot_id|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == template


def test_load_tokenizer_names_the_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer.json or tokenizer.model, neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        Record((Turn("user", "a\ud83d"), Turn("assistant", "b", trained=True))),
        Record((Turn("user", "a"), Turn("assistant", "\udc00b", trained=True))),
        Record(prompt="a", completion="b\ud83d"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(record: Record) -> None:
    tokenizer = make_tokenizer(template=LLAMA3)
    with pytest.raises(InputError, match="record 1: .* surrogate pair"):
        encode([record], tokenizer, 99)
    records = [record, Record(completion="k")]
    _, report = encode(records, tokenizer, 99, skip_invalid=True)
    assert (report.kept, len(report.invalid)) == (1, 1)


@pytest.mark.parametrize("template", [LLAMA3, TEMPLATES["tags"]])
def test_a_chat_without_a_trained_answer_is_refused(template: str) -> None:
    chat = Record((Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(InputError, match="record 1: it has no answer to train"):
        encode([chat], make_tokenizer(template=template), 99)


def test_a_record_of_only_a_first_token_is_refused() -> None:
    with pytest.raises(InputError, match="record 1: it has nothing to train"):
        encode([Record()], make_tokenizer(bos=False), 99)
