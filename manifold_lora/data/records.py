"""Training records from JSON files; the format of each record is detected."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from manifold_lora.errors import InputError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the "
    "request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ROLES = {role: role for role in ("system", "user", "assistant")}
OPENAI = ("role", "content", ROLES)  # key of the role, key of the text, roles
SHAREGPT = ("from", "value", ROLES | {"human": "user", "gpt": "assistant"})
SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer accepts them
MAX_PROBLEMS = 8  # shown per file; the rest are counted


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `trained` turns carry the loss."""

    role: str  # system, user, assistant or tool
    text: str
    trained: bool = False
    # Further keys of the message for the chat template, such as tool_calls.
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One training record: as a chat, as a prompt with its completion, or both.

    If it has both, a tokenizer with a chat template uses the chat and any other one
    the plain form. A plain text is a completion of the empty prompt.
    """

    turns: tuple[Turn, ...] = ()  # empty: no chat form
    prompt: str = ""
    completion: str = ""  # empty: no plain form
    tools: tuple[dict[str, Any], ...] = ()  # for the chat template
    template: str | None = None  # name of the chat template; None: the default one
    location: str = ""  # file and line, for messages


def read_records(path: str | PathLike[str]) -> list[Record]:
    """Read the training records of a JSON Lines or JSON file.

    The format of every record is detected: `messages`, `conversations`,
    `prompt`+`completion`, `instruction`[+`input`]+`output`, `question`+`answer` or
    `text`, the first of these whose keys it has. `.jsonl` and `.ndjson` files hold a
    record per line; `.json` files hold a list, `{"data": [...]}`, or lines.

    Args:
        path: The file, in UTF-8.

    Returns:
        The records, at least one, in the order of the file.

    Raises:
        InputError: The file is missing, empty or not JSON, or has records of unknown
            formats; all problems are listed, each with its line or record number.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "train.jsonl")
        >>> _ = file.write_text('{"prompt": "1+1=", "completion": "2"}')
        >>> [(record.prompt, record.completion) for record in read_records(file)]
        [('1+1=', '2')]
    """
    path, problems = Path(path), list[str]()
    records = []
    for location, parse in _values(path, _read_text(path)):
        try:
            records.append(parse_record(parse()))
        except InputError as error:
            problems.append(f"{location}: {error}")
        except json.JSONDecodeError as error:
            reason = f"{error.msg} (column {error.colno})"
            problems.append(f"{location}: not JSON: {reason}")
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more"]
    if problems:
        raise InputError("\n".join(problems))
    if not records:
        raise InputError(f"{path} holds no records; at least one is needed.")
    return records


def parse_record(value: Any) -> Record:
    """Convert a decoded JSON value to a record.

    Raises:
        InputError: It is not an object, or has no known keys or invalid values.

    Example:
        >>> parse_record({"text": "Once upon a time"}).completion
        'Once upon a time'
    """
    if not isinstance(value, dict):
        raise InputError(f"a record must be an object, got {type(value).__name__}")
    # A null is a column that only other records of the table use.
    present = {key: item for key, item in value.items() if item is not None}
    for keys, parse in FORMATS.items():
        if present.keys() >= set(keys):
            return parse(present)
    accepted = " | ".join("+".join(keys) for keys in FORMATS)
    keys = ", ".join(value) or "none"
    raise InputError(f"unknown format: keys found: {keys}; accepted: {accepted}")


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give one .jsonl or .json file in it.")
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a .jsonl or .json file.")
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        raise InputError(
            f"{path} must end in .jsonl, .ndjson or .json, got "
            f"{path.suffix or 'no suffix'}; convert it, one JSON object per line."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; convert it.") from error


def _values(path: Path, text: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The location of each record, and a function that parses its value."""
    if path.suffix.lower() == ".json" and text.strip():
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # which is what the parser says of JSON Lines
                raise InputError(f"{path}: not JSON: {error}") from error
        else:
            if isinstance(content, dict) and isinstance(content.get("data"), list):
                content = content["data"]
            values = content if isinstance(content, list) else [content]
            for number, value in enumerate(values, start=1):
                yield f"{path}, record {number}", lambda value=value: value
            return
    # Not splitlines: it also splits at U+2028, which may occur inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", partial(json.loads, line)


def _messages(value: dict[str, Any]) -> Record:
    return Record(_chat(_turns(value, "messages")))


def _conversations(value: dict[str, Any]) -> Record:
    return Record(_chat(_turns(value, "conversations", SHAREGPT)))


def _completion(value: dict[str, Any]) -> Record:
    if isinstance(value["prompt"], list):
        context = [Turn(turn.role, turn.text) for turn in _turns(value, "prompt")]
        return Record(_chat(context + _turns(value, "completion")))
    prompt = _string(value, "prompt", empty=True)
    return Record(prompt=prompt, completion=_string(value, "completion"))


def _instruction(value: dict[str, Any]) -> Record:
    instruction, output = _string(value, "instruction"), _string(value, "output")
    context = _string({"input": "", **value}, "input", empty=True)
    question, prompt = instruction, ALPACA
    if context.strip():
        question, prompt = f"{instruction}\n\n{context}", ALPACA_WITH_INPUT
    prompt = prompt.format(instruction=instruction, input=context)
    return Record(_exchange(question, output), prompt, output)


def _question(value: dict[str, Any]) -> Record:
    question, answer = _string(value, "question"), _string(value, "answer")
    prompt = f"Question: {question}\nAnswer:"
    return Record(_exchange(question, answer), prompt, f" {answer}")


FORMATS: dict[tuple[str, ...], Callable[[dict[str, Any]], Record]] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
    ("question", "answer"): _question,
    ("text",): lambda value: Record(completion=_string(value, "text")),
}


def _exchange(question: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("user", question), Turn("assistant", answer, trained=True))


def _turns(
    value: dict[str, Any], key: str, style: tuple[str, str, dict[str, str]] = OPENAI
) -> list[Turn]:
    role_key, text_key, roles = style
    items = value[key]
    if not isinstance(items, list):
        raise InputError(
            f"{key} must be a list of messages, got {type(items).__name__}"
        )
    turns = []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise InputError(
                f"{key}[{index}] must be an object, got {type(item).__name__}"
            )
        role = item.get(role_key)
        if not isinstance(role, str) or role not in roles:
            known = ", ".join(sorted(roles))
            raise InputError(
                f"{key}[{index}].{role_key} is {role!r}; it must be one of: {known}"
            )
        answer = roles[role] == "assistant"
        text = _string(item, text_key, empty=not answer, at=f"{key}[{index}].")
        turns.append(Turn(roles[role], text, trained=answer))
    return turns


def _chat(turns: list[Turn]) -> tuple[Turn, ...]:
    if not any(turn.trained for turn in turns):
        raise InputError("the chat has no answer: an assistant message is needed")
    if turns[0].role == "assistant":
        raise InputError("the chat starts with an answer: a user message is needed")
    return tuple(turns)


def _string(
    item: dict[str, Any], key: str, *, empty: bool = False, at: str = ""
) -> str:
    text = item.get(key)
    if not isinstance(text, str):
        raise InputError(f"{at}{key} must be a string, got {type(text).__name__}")
    if not empty and not text.strip():
        raise InputError(f"{at}{key} is empty")
    if SURROGATE.search(text):
        raise InputError(f"{at}{key} contains half of a surrogate pair; fix the text")
    return text
