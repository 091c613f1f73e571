"""Prompts, stop strings and streaming."""

import json

import numpy as np
import pytest

from manifold_lora.data.builtin import BASE
from manifold_lora.data.templates import Renderer
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.errors import InputError
from manifold_lora.generation.prompts import as_prompt, encode_prompt, read_prompts
from manifold_lora.generation.stopping import TextMonitor

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(BASE)


def contents(records):
    return [[(t.role, t.text) for t in r.turns] or r.prompt for r in records]


def test_prompts_of_a_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo [x]\n", encoding="utf-8-sig")
    records = read_prompts(file, system="Be brief.")
    assert [r.prompt for r in records] == ["one", "two [x]"]
    assert contents(records)[0] == [("system", "Be brief."), ("user", "one")]


VALUES = [
    ("plain", [("user", "plain")]),
    ({"prompt": "p"}, "p"),
    ({"prompt": "p", "completion": "c"}, "p"),
    ({"messages": [{"role": "user", "content": "q"}]}, [("user", "q")]),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [("user", "q")],
    ),
    ({"prompt": [{"role": "user", "content": "q"}]}, [("user", "q")]),
    ({"instruction": "do", "input": "it"}, [("user", "do\n\nit")]),
    ({"question": "why", "answer": "so"}, [("user", "why")]),
]


@pytest.mark.parametrize(("value", "needed"), VALUES)
def test_prompts_of_records(tmp_path, value, needed):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(value) + "\n")
    (record,) = read_prompts(file)
    turns = [(turn.role, turn.text) for turn in record.turns]
    if isinstance(needed, str):
        assert record.prompt == needed and not turns
    else:
        assert [role for role, _ in turns] == [role for role, _ in needed]
        words = needed[-1][1].split()
        assert all(word in turns[-1][1] for word in words)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.txt", "\n", "holds no prompt"),
        ("bad.jsonl", '{"x": 1}\n{"prompt": 3}\n', r"bad.jsonl:1: .*unknown format"),
        ("bad.jsonl", '{"prompt": "a"\n', "bad.jsonl:1"),
        ("no.txt", None, "cannot be read"),
        ("no.jsonl", None, "does not exist"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / name)


def test_a_prompt_is_rendered_as_transformers_renders_it(tokenizer):
    tokenizer.chat_template = CHATML
    renderer = Renderer(tokenizer)
    record = as_prompt("Hi there", system="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi there"},
    ]
    needed = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_prompt(record, tokenizer, renderer) == needed
    raw = encode_prompt(record, tokenizer, renderer, raw=True)
    assert raw == tokenizer("Hi there")["input_ids"]


def stream(tokenizer, text, stop=()):
    """The pieces written for a text that arrives token by token, and where it ends."""
    pieces, n = [], 0
    monitor = TextMonitor(tokenizer, (), stop, pieces.append)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for n in range(1, len(ids) + 1):
        if monitor(np.array([ids[:n]]), np.array([False]))[0]:
            break
    monitor.finish(ids[:n])
    return pieces, monitor.text(ids[:n])


@pytest.mark.parametrize("text", ["A plain text", "two\nlines", "Grüße, κόσμε 😀!"])
def test_streamed_pieces_are_the_text(tokenizer, text):
    pieces, whole = stream(tokenizer, text)
    assert "".join(pieces) == whole == text
    assert len(pieces) > 1 and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [("END",), ("ND", "XX"), ("E",)])
def test_nothing_of_a_stop_string_is_written(tokenizer, stop):
    text = "some text EEN END and more"
    ends = min(i for s in stop if (i := text.find(s)) >= 0)
    pieces, whole = stream(tokenizer, text, stop)
    assert "".join(pieces) == whole == text[:ends]


def test_what_looks_like_a_stop_string_is_written_in_the_end(tokenizer):
    pieces, whole = stream(tokenizer, "it ends with EN", ("END",))
    assert "".join(pieces) == whole == "it ends with EN"
