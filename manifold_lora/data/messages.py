"""The messages of chats, as OpenAI and ShareGPT write them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from manifold_lora.data.schema import Turn
from manifold_lora.decoding import decode_json
from manifold_lora.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer accepts them
# Keys of messages that chat templates know; encoding checks that they are rendered.
EXTRA = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MEANINGLESS = ("id", "timestamp")
MAX_DEPTH = 100  # of tools and calls


class Style(NamedTuple):
    """How a format writes a message."""

    role: str  # key of the role
    text: str  # key of the text
    roles: Mapping[str, str]


_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_CALL = "function_call"  # a ShareGPT message that is a call
OPENAI = Style("role", "content", _ROLES)
SHAREGPT = Style(
    "from",
    "value",
    _ROLES
    | {"human": "user", "gpt": "assistant", "observation": "tool", _CALL: "assistant"},
)


def parse_turns(
    value: Mapping[str, Any], key: str, style: Style, trained: bool = True
) -> list[Turn]:
    """The messages in `value[key]`.

    Args:
        value: of the record.
        key: of the list of messages.
        style: how they are written.
        trained: whether answers are trained unless they say otherwise; else they
            belong to a prompt.

    Raises:
        InputError: No messages, or keys and values that are not understood.
    """
    items = value[key]
    if not isinstance(items, list):
        raise InputError(
            f"{key} must be a list of messages, got {type(items).__name__}"
        )
    turns = []
    for index, item in enumerate(items):
        at = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise InputError(f"{at} must be an object, got {type(item).__name__}")
        turns.append(_turn(item, at, style, trained))
    return turns


def meaningless(messages: Any) -> list[str]:
    """The keys without meaning that some messages have, if it is a list of messages."""
    items = messages if isinstance(messages, list) else []
    return [key for key in MEANINGLESS if any(item.get(key) for item in items)]


def _turn(item: dict[str, Any], at: str, style: Style, trained: bool) -> Turn:
    name = item.get(style.role)
    if not isinstance(name, str) or name not in style.roles:
        known = ", ".join(sorted(style.roles))
        raise InputError(f"{at}.{style.role} is {name!r}; it must be one of: {known}")
    role, answer = style.roles[name], style.roles[name] == "assistant"
    present = {k: v for k, v in item.items() if v not in (None, "", [], {})}
    known = {style.role, style.text, "train", "weight", "tool_calls", *EXTRA}
    others = [key for key in present if key not in known and key not in MEANINGLESS]
    if others:
        raise InputError(
            f"{at}.{others[0]} is not understood in a message: remove it, or put what "
            f"it says into {style.text}"
        )
    extra: dict[str, Any] = {
        key: text_of(item, key, at=f"{at}.") for key in EXTRA if key in present
    }
    calls = present.get("tool_calls")
    if name == _CALL:
        if calls is not None:
            raise InputError(f"{at} is a {_CALL} and has tool_calls: keep one of them")
        calls, item = _json(text_of(item, style.text, at=f"{at}."), at), {}
    if calls is not None:
        if not answer:
            raise InputError(f"{at}.tool_calls belongs in an assistant message")
        extra["tool_calls"] = _calls(calls, f"{at}.tool_calls")
        if item.get(style.text) is None:
            item = {style.text: ""}
    empty = not answer or "tool_calls" in extra
    text = _content(item, style.text, at, empty)
    return Turn(role, text, _is_trained(present, at, answer, trained), extra)


def _is_trained(present: Mapping[str, Any], at: str, answer: bool, train: bool) -> bool:
    """Whether a message is trained, as its `train` or `weight` says."""
    flags = {key: present[key] for key in ("train", "weight") if key in present}
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise InputError(
                f"{at}.{key} is {flag!r}; only 0 and 1 are supported, which leave an "
                "answer out of the loss or in it"
            )
        if flag and not (answer and train):
            where = "a prompt" if answer else "another role"
            raise InputError(
                f"{at}.{key} is {flag!r}, but the message belongs to {where}: only "
                "answers of the assistant are trained"
            )
    return answer and train and all(flags.values())


def _content(item: Mapping[str, Any], key: str, at: str, empty: bool) -> str:
    """The text of a message, which may be in parts."""
    parts = item.get(key)
    if not isinstance(parts, list):
        return text_of(item, key, empty=empty, at=f"{at}.")
    texts = []
    for index, part in enumerate(parts):
        where = f"{at}.{key}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InputError(f'{where} must be like {{"type": "text", "text": "..."}}')
        present = [k for k, v in part.items() if v not in (None, "", [], {})]
        others = [k for k in present if k not in ("type", "text")]
        if part["type"] != "text" or others:
            kind = part["type"] if part["type"] != "text" else others[0]
            raise InputError(
                f"{where} is or has {kind!r}: only parts of type text can be trained"
            )
        texts.append(text_of(part, "text", empty=True, at=f"{where}."))
    return text_of({key: "".join(texts)}, key, empty=empty, at=f"{at}.")


def parse_tools(value: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The tools of a record, from a list of objects or a JSON text of one."""
    tools = value.get("tools", [])
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise InputError("tools must be a list of objects, or a JSON text of one")
    _check_texts(tools, "tools")
    return tuple(tools)


def _calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Calls of functions as templates take them: arguments as objects, not as text."""
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{at} must name a function in each call")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{at}.arguments")
        if not isinstance(arguments, dict):
            raise InputError(f"{at}.arguments must be an object, or a JSON text of one")
        function = function | {"arguments": arguments}
        if "function" in call:
            parsed.append(call | {"function": function})
        else:
            parsed.append({"type": "function", "function": function})
    _check_texts(parsed, at)
    return parsed


def _json(text: str, at: str) -> Any:
    kind: Any = Any
    try:
        return decode_json(text, kind)
    except ValueError as error:
        raise InputError(f"{at} is {error}") from error


def _check_texts(value: Any, at: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"{at} is nested too deeply, in more than {MAX_DEPTH} levels")
    if isinstance(value, str) and SURROGATE.search(value):
        raise InputError(f"{at} contains half of a surrogate pair; fix the text")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _check_texts(item, at, depth + 1)


def text_of(
    item: Mapping[str, Any], key: str, *, empty: bool = False, at: str = ""
) -> str:
    """The text in `item[key]`, of which `at` says in messages where it is."""
    text = item.get(key)
    if text is None:
        raise InputError(f"{at}{key} is {'null' if key in item else 'missing'}")
    if not isinstance(text, str):
        raise InputError(f"{at}{key} must be a string, got {type(text).__name__}")
    if not empty and not text.strip():
        raise InputError(f"{at}{key} is empty")
    if SURROGATE.search(text):
        raise InputError(f"{at}{key} contains half of a surrogate pair; fix the text")
    return text
