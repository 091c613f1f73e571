"""The formats of records, and the keys of each that are honoured or refused."""

import json
from typing import Any

import pytest

from manifold_lora.data.formats import MEANINGFUL, ignored_keys, parse_record
from manifold_lora.data.schema import Record, Turn
from manifold_lora.errors import InputError

CHAT = (Turn("user", "Hi"), Turn("assistant", "Ho", trained=True))
PLAIN = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ],
                "text": "messages win",
            },
            Record(CHAT),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                ]
            },
            Record((Turn("system", ""), *CHAT)),
        ),
        ({"prompt": "", "completion": " b"}, Record(prompt="", completion=" b")),
        (
            {
                "prompt": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "Hi"},
                ],
                "completion": [{"role": "assistant", "content": "Ho"}],
            },
            Record(
                (
                    Turn("user", "a"),
                    Turn("assistant", "b"),
                    Turn("user", "Hi"),
                    Turn("assistant", "Ho", trained=True),
                )
            ),
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Ho", "question": "q"},
            Record(
                CHAT,
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nHi\n\n"
                "### Response:\n",
                "Ho",
            ),
        ),
        (
            {"instruction": "Add {x}", "input": "1 2", "output": "3"},
            Record(
                (Turn("user", "Add {x}\n\n1 2"), Turn("assistant", "3", trained=True)),
                "Below is an instruction that describes a task, paired with an input "
                "that provides further context. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nAdd {x}\n\n"
                "### Input:\n1 2\n\n### Response:\n",
                "3",
            ),
        ),
        (
            {"question": "Hi", "answer": "Ho", "text": "not this"},
            Record(CHAT, "Question: Hi\nAnswer:", " Ho"),
        ),
        ({"messages": None, "text": "a"}, Record(completion="a")),
        (
            {"instruction": "Hi", "context": "", "response": "Ho", "category": "qa"},
            Record(CHAT, PLAIN, "Ho"),
        ),
        (
            {"instruction": "Hi", "context": "1 2", "response": "3"},
            Record(
                (Turn("user", "Hi\n\n1 2"), Turn("assistant", "3", trained=True)),
                "Below is an instruction that describes a task, paired with an input "
                "that provides further context. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nHi\n\n"
                "### Input:\n1 2\n\n### Response:\n",
                "3",
            ),
        ),
        (
            {"instruction": "Hi", "output": "Ho", "system": "Be brief."},
            Record(
                (Turn("system", "Be brief."), *CHAT),
                "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n",
                "Ho",
            ),
        ),
        (
            {"question": "Hi", "answer": "Ho", "system_prompt": "Be brief."},
            Record(
                (Turn("system", "Be brief."), *CHAT),
                "Be brief.\n\nQuestion: Hi\nAnswer:",
                " Ho",
            ),
        ),
        (
            {"instruction": "Hi", "output": "Ho", "history": [["a", "b"]]},
            Record((Turn("user", "a"), Turn("assistant", "b", trained=True), *CHAT)),
        ),
        (
            {"instruction": "Hi", "output": "Ho", "history": [], "images": []},
            Record(CHAT, PLAIN, "Ho"),
        ),
        (
            {"question": "Hi", "answer": "Ho", "chat_template": "short"},
            Record(CHAT, template="short"),
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                ],
                "weight": 1,
            },
            Record((Turn("system", "Be brief."), *CHAT)),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "weight": 0},
                    {"role": "assistant", "content": "b", "weight": 0},
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "text": "H"},
                            {"type": "text", "text": "o"},
                        ],
                        "train": True,
                    },
                ],
                "template": "short",
            },
            Record(
                (Turn("user", "a"), Turn("assistant", "b"), *CHAT), template="short"
            ),
        ),
    ],
)
def test_each_format_is_detected(value: dict[str, object], expected: Record) -> None:
    assert parse_record(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must be an object, got list"),
        (
            {"prompt": "a", "respnse": "b"},
            "keys found: prompt, respnse; accepted: mess",
        ),
        ({}, "keys found: none"),
        ({"messages": "a"}, "messages must be a list of messages, got str"),
        ({"messages": ["a"]}, r"messages\[0\] must be an object, got str"),
        (
            {"messages": [{"role": "function", "content": "a"}]},
            r"messages\[0\].role is 'function'; it must be one of: assistant, system, "
            "tool, user",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "a"}]},
            r"conversations\[0\].from is \['human'\]",
        ),
        ({"messages": []}, "no answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "starts with an answer",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content is null",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": " "},
                ]
            },
            r"messages\[1\].content is empty",
        ),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": []}, "completion must be a string, got list"),
        ({"prompt": [], "completion": "a"}, "completion must be a list"),
        ({"question": "a", "answer": ["b"]}, "answer must be a string, got list"),
        ({"instruction": "a", "output": 3}, "output must be a string, got int"),
        ({"text": "cut \ud83d"}, "text contains half of a surrogate pair"),
    ],
)
def test_an_invalid_record_raises(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_record(value)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


@pytest.mark.parametrize("tools", [[TOOL], TOOL, json.dumps([TOOL])])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_calls_and_tools(tools: Any, content: Any, arguments: Any) -> None:
    function = {"name": "add", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    value = {
        "tools": tools,
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call], **content},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "Ho", "reasoning_content": "hm"},
        ],
    }
    assert parse_record(value) == Record(
        (
            Turn("user", "Hi"),
            Turn("assistant", "", True, {"tool_calls": [CALL | {"id": "c1"}]}),
            Turn("tool", "2", extra={"tool_call_id": "c1", "name": "add"}),
            Turn("assistant", "Ho", True, {"reasoning_content": "hm"}),
        ),
        tools=(TOOL,),
    )


def test_calls_of_sharegpt() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {
                "from": "function_call",
                "value": '{"name": "add", "arguments": {"x": 1}}',
            },
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Ho"},
        ],
    }
    assert parse_record(value).turns == (
        Turn("user", "Hi"),
        Turn("assistant", "", True, {"tool_calls": [CALL]}),
        Turn("tool", "2"),
        Turn("assistant", "Ho", True),
    )


def chat(**answer: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Ho"} | answer
    return {"messages": [{"role": "user", "content": "Hi"}, message]}


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            chat() | {"images": ["a.png"]},
            "images is not understood beside messages: on",
        ),
        (chat() | {"chosen": "a", "rejected": "b"}, "chosen .*; rejected is not under"),
        ({"prompt": "a", "completion": "b", "label": False}, "label is not understood"),
        (chat() | {"weight": 0.5}, "weight is not understood beside messages: only"),
        (chat() | {"train": False}, "train is not understood"),
        ({"text": "a", "context": "b"}, "context is not understood beside text"),
        ({"text": "a", "output": "b"}, "output is not understood beside text: give"),
        ({"instruction": "a", "output": "b", "tools": [TOOL]}, "tools .* use messages"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system needs a chat"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "history is not"),
        ({"text": "a", "turns": [{}]}, "turns .* holds list, which may change"),
        (
            chat() | {"system": "a", "system_prompt": "b"},
            "system and system_prompt dif",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}, *SHAREGPT]}
            | {"system": "b"},
            "two system texts",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            r"history\[0\] must be a pair",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", None]]},
            r"history\[0\].answer is null",
        ),
        (chat(weight=0.5), r"messages\[1\].weight is 0.5; only 0 and 1"),
        (chat(weight=1, train=0), "the chat has no answer to train"),
        (chat(mask=True), r"messages\[1\].mask is not understood in a message"),
        (chat(function_call={"name": "f"}), r"messages\[1\].function_call is not und"),
        (chat(content=[IMAGE]), r"messages\[1\].content\[0\] is or has 'image_url'"),
        (chat(content=["a"]), r'content\[0\] must be like {"type": "text"'),
        (chat(content=None), r"messages\[1\].content is null"),
        (chat(tool_calls=["a"]), "must name a function in each call"),
        (
            chat(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "arguments is not valid JSON",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "train": 1}]},
            r"messages\[0\].train is 1, but the message belongs to another role",
        ),
        (
            {
                "prompt": [{"role": "assistant", "content": "a", "weight": 1}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            "belongs to a prompt",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f"}]},
            "not valid JSON",
        ),
        (
            {
                "conversations": [
                    {"from": "function_call", "value": "{}", "tool_calls": [CALL]}
                ]
            },
            "is a function_call and has tool_calls",
        ),
        (chat() | {"tools": "f(x)"}, "tools is not valid JSON"),
        (chat() | {"tools": ["f"]}, "tools must be a list of objects"),
        (chat() | {"tools": [{"a": "\ud83d"}]}, "tools contains half of a surrogate"),
        (chat() | {"tools": [{"a": deep(200)}]}, "tools is nested too deeply"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "accepted.*; chosen: prefer"),
        ({"input_ids": [1], "labels": [1]}, "accepted.*; input_ids: tokens are made"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"messages": None}, "messages is null"),
    ],
)
def test_keys_that_change_the_meaning_are_refused_by_name(
    value: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_record(value)


@pytest.mark.parametrize("key", sorted(MEANINGFUL))
def test_no_key_with_a_meaning_is_dropped(key: str) -> None:
    with pytest.raises(InputError, match=key):
        parse_record({"text": "a", key: "b"})


def test_keys_without_meaning() -> None:
    value = chat(id="m1", refusal=None) | {
        "id": 3,
        "text": "the chat as one text",
        "score": 0.5,
        "metadata": {"url": "a"},
        "label": None,
        "weight": 1,
    }
    ignored = ["id", "text", "score", "metadata", "messages[].id"]
    assert ignored_keys(value) == ignored
    assert parse_record(value) == Record(CHAT)
