"""Chat templates: which one, today's date, and limits of time and memory."""

import time

import pytest

from manifold_lora.data import templates
from manifold_lora.data.records import Record, Turn
from manifold_lora.data.templates import Renderer, TemplateError, choose_template
from manifold_lora.data.tokens import encode
from manifold_lora.errors import InputError
from tests.data import EOT, LLAMA3, make_tokenizer

CHAT = Record((Turn("user", "Hi"), Turn("assistant", "Ho", trained=True)))
MESSAGES = [{"role": "user", "content": "Hi"}]


def render(template: str, date: str | None = None) -> str:
    renderer = Renderer(make_tokenizer(), date)
    return renderer.render(template, [(MESSAGES, False)])[0].text


def test_today_is_the_given_date():
    assert render("{{ strftime_now('%d %b %Y') }}", "2024-07-26") == "26 Jul 2024"
    today = time.strftime("%Y-%m-%d")
    assert render("{{ strftime_now('%Y-%m-%d') }}") in (
        today,
        time.strftime("%Y-%m-%d"),
    )


def test_rendering_is_that_of_transformers():
    tokenizer = make_tokenizer(template=LLAMA3)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    rendering = Renderer(tokenizer).render(LLAMA3, [(MESSAGES, False)])[0]
    assert rendering.text == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    {
        "{{ 'a' * 10000000000 }}": "memory",
        "{{ 'a'.center(4000000000) }}": "memory",
        "{{ raise_exception('no') }}": "rejects it: no",
        "{{ messages[7].content }}": "rejects it: .*no element 7",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recurses",
        "{% for": "rejects it",
        "{{ ''.__class__.__mro__ }}": "unsafe|rejects",
    }.items(),
)
def test_a_bad_template_is_refused(template, reason):
    with pytest.raises(TemplateError, match=reason):
        render(template)


def test_an_endless_template_is_stopped(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}"
    endless = loop + "{% endfor %}"
    with pytest.raises(TemplateError, match="more than 0.5 seconds"):
        render(endless)
    assert render("ok") == "ok"


def test_a_template_that_renders_nothing():
    with pytest.raises(InputError, match="record 1: "):
        encode([CHAT], make_tokenizer(template=" "), 99)


def test_named_templates():
    tokenizer = make_tokenizer()
    assert choose_template(tokenizer) is None
    tokenizer.chat_template = "text"
    assert choose_template(tokenizer) == "text"
    tokenizer.chat_template = {"chat": "a", "tool_use": "b"}
    assert choose_template(tokenizer, "chat") == "a"
    assert choose_template(tokenizer, tools=True) == "b"
    with pytest.raises(TemplateError, match="'default', only chat, tool_use"):
        choose_template(tokenizer)


def test_only_chats_need_a_default_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"chat": LLAMA3}
    alpaca = Record(CHAT.turns, "Q:", "A")
    examples, _ = encode([Record(prompt="Q:", completion="A"), alpaca], tokenizer, 99)
    assert (examples[0].input_ids == examples[1].input_ids).all()
    with pytest.raises(InputError, match="record 1: .*only chat"):
        encode([CHAT], tokenizer, 99)
    named = Record(CHAT.turns, template="chat")
    examples, _ = encode([named], tokenizer, 99)
    trained = examples[0].input_ids[examples[0].loss_mask]
    assert tokenizer.decode(trained) == f"Ho{EOT}"


@pytest.mark.parametrize("skip_invalid", [False, True])
def test_an_endless_template_is_not_tried_for_every_record(monkeypatch, skip_invalid):
    """Not even if invalid records are left out: 7,000 of them would take hours."""
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}"
    tokenizer = make_tokenizer(template=loop + "{% endfor %}")
    records = [Record(completion="k"), *[CHAT] * 50]
    with pytest.raises(
        InputError, match="^record 2: .* seconds\nrecord 3: .* seconds$"
    ):
        encode(records, tokenizer, 99, skip_invalid=skip_invalid)


@pytest.mark.parametrize("date", ["2026-13-45", "2026-02-30", "0000-00-00", "today"])
def test_a_day_that_does_not_exist(date):
    with pytest.raises(InputError, match=f"--date must be .*, got '{date}'"):
        encode([CHAT], make_tokenizer(template=LLAMA3), 99, date=date)


def test_a_template_that_writes_far_more_than_the_chat():
    """Within the limit of memory, but nothing to tokenise."""
    with pytest.raises(InputError, match="record 1: .* writes 1,000,... characters"):
        tokenizer = make_tokenizer(template="{{ 'a' * 1000000 }}" + LLAMA3)
        encode([CHAT], tokenizer, 99)
    long = Record((Turn("user", "a" * 100_000), CHAT.turns[1]))
    examples, _ = encode([long], make_tokenizer(template=LLAMA3), 200_000)
    assert len(examples[0].input_ids) > 100_000
