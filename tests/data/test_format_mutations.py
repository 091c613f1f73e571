"""Records that are changed at random: refused, or all of their texts are there."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_lora.data.formats import MEANINGFUL, ignored_keys, parse_record
from manifold_lora.errors import InputError
from tests.data.test_formats import CALL, SHAREGPT, TOOL, chat

VALID: list[dict[str, Any]] = [
    {"text": "one", "id": "two"},
    {"prompt": "one", "completion": "two"},
    {"question": "one", "answer": "two", "system": "three", "history": [["4", "five"]]},
    {"instruction": "one", "input": "two", "output": "three", "answer": "four"},
    {"instruction": "one", "context": "two", "response": "three"},
    {"conversations": SHAREGPT, "tools": [TOOL], "chat_template": "short"},
    chat(tool_calls=[CALL], reasoning_content="hm", weight=1),
    chat(content=[{"type": "text", "text": "one"}], name="two"),
    {"prompt": chat()["messages"], "completion": chat()["messages"]},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = sorted(
    {*MEANINGFUL, "role", "from", "value", "content", "type", "name", "id", "x"}
    | {key for value in VALID for key in value}
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid record, changed in one to three places."""
    value = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while draw(st.booleans()):
            items = place.values() if isinstance(place, dict) else place
            inner = [item for item in items if isinstance(item, dict | list)]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        if isinstance(place, list):
            place[: draw(st.integers(0, 1))] = [draw(JSON)]
            continue
        key = draw(st.sampled_from(sorted({*place, *KEYS})))
        if draw(st.booleans()):
            place[key] = draw(JSON)
        else:
            place.pop(key, None)
    return value


def texts(value: Any, without: set[str] = frozenset()) -> set[str]:  # pyright: ignore
    """All texts in a JSON value, but those under some keys."""
    if isinstance(value, dict):
        items = [item for key, item in value.items() if key not in without]
    elif isinstance(value, list | tuple):
        items = value
    else:
        return {value} if isinstance(value, str) and value.strip() else set()
    return set().union(*(texts(item, without) for item in items))


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(mutated() | JSON)
def test_a_record_is_refused_or_all_of_its_texts_are_there(value: Any) -> None:
    try:
        record = parse_record(value)
    except InputError as error:
        assert str(error)
        return
    written = [record.prompt, record.completion, record.template or ""]
    written += texts(record.tools)
    for turn in record.turns:
        written += [turn.role, turn.text, *texts(dict(turn.extra))]
    ignored = {key.rpartition(".")[2] for key in ignored_keys(value)}
    structure = {"role", "from", "type"}
    for text in texts(value, ignored | structure):
        assert any(text in part for part in written), text
