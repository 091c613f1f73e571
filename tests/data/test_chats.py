"""Chats whose templates, tools or texts are not the plain case."""

import pytest

from manifold_lora.data.records import Record, Turn
from manifold_lora.data.tokens import encode
from manifold_lora.errors import InputError
from tests.data import BOS, EOT, LLAMA3, PROMPT, make_tokenizer

HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
# The first template of Llama 3 Instruct: a generation prompt after everything.
ALWAYS_PROMPTS = LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")
TOOLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}"
    + HEADER
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{{ '<|eot_id|>' }}{% endfor %}" + PROMPT
)
CHATML = (
    "{% for m in messages %}"
    "{{ m.role + '\n' + m.content + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
# Qwen 3's way: the reasoning of earlier turns is dropped.
DROPS_EARLIER = CHATML.replace(
    "m.content", "(m.content if loop.last else m.content.split('</think>')[-1])"
)
DROPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


def chat(*texts: str) -> Record:
    turns = [
        Turn("assistant", text, trained=True) if i % 2 else Turn("user", text)
        for i, text in enumerate(texts)
    ]
    return Record(tuple(turns))


def with_key(key: str, value: object) -> Record:
    answer = Turn("assistant", "b", trained=True, extra={key: value})
    return Record((Turn("user", "a"), answer))


def trained(record: Record, template: str, **options) -> list[list[str]]:
    """The runs of trained tokens of each example, decoded."""
    tokenizer = make_tokenizer(template=template, **options)
    examples, _ = encode([record], tokenizer, 999)
    texts = []
    for example in examples:
        runs, previous = [], False
        for token, mask in zip(example.input_ids, example.loss_mask, strict=True):
            if mask and not previous:
                runs.append([])
            if mask:
                runs[-1].append(token)
            previous = mask
        texts.append([tokenizer.decode(run) for run in runs])
    return texts


def test_a_template_that_always_writes_a_prompt():
    assert "add_generation_prompt" not in ALWAYS_PROMPTS
    one, two = chat("So?", "Yes."), chat("So?", "Yes.", "And?", "No.")
    assert trained(one, ALWAYS_PROMPTS) == [[f"Yes.{EOT}"]]
    assert trained(two, ALWAYS_PROMPTS) == [[f"Yes.{EOT}", f"No.{EOT}"]]
    same = chat("yes", "yes", "yes", "yes")
    assert trained(same, ALWAYS_PROMPTS) == [[f"yes{EOT}"] * 2]


def test_tools_and_calls_are_rendered_and_trained():
    call = Turn("assistant", "I call.", True, {"tool_calls": [CALL]})
    tool = Turn("tool", "it is", extra={"name": "look"})
    turns = (Turn("user", "So?"), call, tool, Turn("assistant", "Yes.", True))
    record = Record(turns, tools=(CALL,))
    ((first, second),) = trained(record, TOOLS)
    assert first == 'I call.{"name": "look", "arguments": {"at": "it"}}' + EOT
    assert second == f"Yes.{EOT}"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record(chat("So?", "Yes.").turns, tools=(CALL,)), "does not write tools"),
        (with_key("tool_calls", [CALL]), "does not write tool_calls of message 2"),
        (with_key("reasoning_content", "why"), "not write reasoning_content of mess"),
    ],
)
def test_what_the_template_ignores_is_refused(record, reason):
    with pytest.raises(InputError, match=reason):
        encode([record], make_tokenizer(template=LLAMA3), 999)


def test_a_system_text_that_the_template_ignores():
    ignoring = LLAMA3.replace(
        "{{ message.content", "{{ '' if message.role == 'system' else message.content"
    )
    turns = (Turn("system", "Be brief."), *chat("So?", "Yes.").turns)
    with pytest.raises(InputError, match=r"content of message 1 \(system\)"):
        encode([Record(turns)], make_tokenizer(template=ignoring), 999)


def test_reasoning():
    answer = "<think>\nWhy?</think> No."
    record = chat("So?", answer, "And?", answer)
    first, second = trained(record, DROPS_EARLIER)
    assert first == second == [f"{answer}{EOT}"]
    with pytest.raises(InputError, match="drops the reasoning before </think>"):
        trained(record, DROPS)
    # A prompt that begins the reasoning leaves the rest to train.
    begins = CHATML.replace("'assistant\n'", "'assistant\n<think>\n'")
    assert trained(chat("So?", answer), begins) == [[f"Why?</think> No.{EOT}"]]
    assert trained(chat("So?", "No."), begins) == [[f"No.{EOT}"]]


@pytest.mark.parametrize("answer", ["\nYes.", "\n\n  Yes.\n", "  Yes", "Yes. "])
def test_white_space_around_an_answer_is_trained(answer):
    """Also where it merges with the end of the prompt into one token."""
    lines = ["assistant\n\nYes", "\n\n\n", "assistant\n\n", "x\n\n  Yes"] * 9
    ((text,),) = trained(chat("So?", answer), CHATML, lines=lines)
    assert answer.strip() in text and text.endswith(EOT)
    tokenizer = make_tokenizer(template=CHATML, lines=lines)
    examples, _ = encode([chat("So?", answer)], tokenizer, 999)
    whole = f"user\nSo?{EOT}\nassistant\n{answer}{EOT}\n"
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert examples[0].input_ids.tolist() == expected


def test_a_template_without_ends_is_refused():
    endless = CHATML.replace("<|eot_id|>", "")
    with pytest.raises(InputError, match="no end-of-turn or end-of-text token"):
        trained(chat("So?", "Yes."), endless)


def test_marks_of_an_answer_that_is_not_trained():
    tags = (
        "{% for m in messages %}{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = list(chat("So?", "Yes.", "And?", "No.").turns)
    turns[1] = Turn("assistant", "Yes.")
    assert trained(Record(tuple(turns)), tags) == [[f"No.{EOT}"]]
    assert BOS not in tags


def test_a_date_is_fixed_in_the_configuration():
    dated = "{{ strftime_now('%d %b %Y') }}" + LLAMA3
    tokenizer = make_tokenizer(template=dated)
    (example,), _ = encode([chat("So?", "Yes.")], tokenizer, 99, date="2024-07-26")
    assert str(tokenizer.decode(example.input_ids)).startswith("26 Jul 2024")


def test_a_prompt_is_not_trained_if_turns_end_differently():
    """The end tokens of user and assistant have their last characters in common."""
    template = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '\n' + m.content + "
        "('<|eot_id|>' if m.role == 'assistant' else '<|end_header_id|>') + '\n' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant\n' }}"
    )
    record = chat("a", "b", "assistant", "d")
    assert trained(record, template) == [[f"b{EOT}", f"d{EOT}"]]


@pytest.mark.parametrize(
    "value", [["x"], [None], [{"function": "f"}], [{}], {"a": 1}, "s", 5]
)
def test_malformed_calls_and_tools_are_refused(value):
    with pytest.raises(InputError, match="record 1: tool_calls must be a list"):
        encode([with_key("tool_calls", value)], make_tokenizer(template=LLAMA3), 999)


def test_other_malformed_keys_are_refused():
    tokenizer = make_tokenizer(template=LLAMA3)
    tools = Record(chat("a", "b").turns, tools=({"function": "f"},))
    for record in (with_key("reasoning_content", 5), tools):
        with pytest.raises(InputError, match="record 1: .* must be a"):
            encode([record], tokenizer, 999)
