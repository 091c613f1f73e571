"""The formats of training records: JSON values to records, no key dropped in silence.

Every format has keys that it needs and keys that it honours. Of all others, those that
change what a record means are refused by name, and those without meaning are counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from manifold_lora.data.messages import (
    OPENAI,
    SHAREGPT,
    meaningless,
    parse_tools,
    parse_turns,
    text_of,
)
from manifold_lora.data.schema import Record, Turn
from manifold_lora.errors import InputError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the "
    "request."
)
# Keys that change what a record means, with what to do where they are not honoured.
_PREFERENCE = (
    "preferences cannot be trained: keep the good answers, as prompt+completion"
)
_MEDIA = "only text can be trained: remove it, or leave these records out"
_TURNS = "write it into the prompt, or use messages"
_MASKED = "only whole answers are trained: use messages, with train on each"
MEANINGFUL = {
    **dict.fromkeys(("chosen", "rejected", "margin"), _PREFERENCE),
    **dict.fromkeys(
        ("label", "kto_tag"),
        "it marks unpaired preferences (KTO) or classes, and a bad completion must "
        "not be trained: keep the good records and remove the key",
    ),
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos", "files"), _MEDIA
    ),
    **dict.fromkeys(
        ("system", "system_prompt", "history", "context", "input", "documents"), _TURNS
    ),
    **dict.fromkeys(("passage", "choices", "options", "prefix", "suffix"), _TURNS),
    "tools": "tools need a chat: use messages",
    "functions": "describe them in tools, as functions of JSON schemas",
    **dict.fromkeys(
        ("tool_calls", "function_call"), "put it into an assistant message, in messages"
    ),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "rationale"),
        "put it into an assistant message as reasoning_content, or remove it",
    ),
    **dict.fromkeys(("chat_template", "template"), "templates need a chat"),
    "chat_template_kwargs": "arguments of templates are not supported: remove it",
    "weight": "only records of weight 1 are trained: leave out those of weight 0",
    "train": "leave out the records that are not to be trained",
    **dict.fromkeys(("loss_mask", "assistant_masks", "completion_mask"), _MASKED),
    **dict.fromkeys(
        ("input_ids", "labels", "attention_mask"),
        "tokens are made here from texts: give those",
    ),
}
# Lists and objects without meaning; numbers, texts and truth values never stop a run.
MEANINGLESS = {"metadata", "meta", "tags", "extra_info", "info", "source", "sources"}
Value = Mapping[str, Any]


class Format(NamedTuple):
    """The keys of a format, and what makes a record of their values."""

    keys: tuple[str, ...]  # all needed
    optional: tuple[str, ...]  # honoured
    parse: Callable[[Value], Record]


def parse_record(value: Any) -> Record:
    """Convert a decoded JSON value to a record.

    Raises:
        InputError: It is not an object, has no known keys, invalid values, or keys
            that change its meaning and that its format does not honour.

    Example:
        >>> parse_record({"text": "Once upon a time"}).completion
        'Once upon a time'
        >>> parse_record({"text": "Once", "label": 0})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        manifold_lora.errors.InputError: label is not understood beside text: ...
    """
    present = _present(value)
    form = _format_of(value)
    beside = "+".join(form.keys)
    problems = []
    for key in _others(present, form):
        item, remedy = present[key], MEANINGFUL.get(key)
        if key in ("weight", "train") and item in (1, True):
            continue
        if remedy is not None:
            problems.append(f"{key} is not understood beside {beside}: {remedy}")
        elif isinstance(item, list | dict | tuple) and key not in MEANINGLESS | _KEYS:
            problems.append(
                f"{key} is not understood beside {beside} and holds "
                f"{_kind(item)}, which may change what the record means: remove it"
            )
    if problems:
        raise InputError("; ".join(problems))
    return form.parse({**present, **{key: value[key] for key in form.keys}})


def ignored_keys(value: Value) -> list[str]:
    """The keys of a valid record that have no meaning for training.

    Example:
        >>> ignored_keys({"text": "Once upon a time", "id": 3, "weight": 1})
        ['id']
    """
    form = _format_of(value)
    others = _others(_present(value), form)
    ignored = [key for key in others if key not in ("weight", "train")]
    return ignored + [
        f"{key}[].{k}" for key in form.keys for k in meaningless(value[key])
    ]


def _present(value: Any) -> Value:
    """The keys that say something: a null or an empty list may be a table's column."""
    if not isinstance(value, dict):
        raise InputError(f"a record must be an object, got {_kind(value)}")
    return {k: item for k, item in value.items() if item not in (None, "", [], {})}


def _others(present: Value, form: Format) -> list[str]:
    return [key for key in present if key not in form.keys + form.optional]


def _format_of(value: Value) -> Format:
    complete = [form for form in FORMATS if value.keys() >= set(form.keys)]
    for form in complete:
        if all(value[key] is not None for key in form.keys):
            return form
    if complete:
        nulls = [key for key in complete[0].keys if value[key] is None]
        raise InputError(f"{nulls[0]} is null")
    accepted = " | ".join("+".join(form.keys) for form in FORMATS)
    keys = ", ".join([str(key) for key in value][:20]) or "none"
    hints = [f"; {key}: {MEANINGFUL[key]}" for key in value if key in MEANINGFUL][:1]
    raise InputError(
        f"unknown format: keys found: {keys}; accepted: {accepted}{''.join(hints)}"
    )


def _messages(value: Value) -> Record:
    return _chat(value, parse_turns(value, "messages", OPENAI))


def _conversations(value: Value) -> Record:
    return _chat(value, parse_turns(value, "conversations", SHAREGPT))


def _completion(value: Value) -> Record:
    if isinstance(value["prompt"], list):
        context = parse_turns(value, "prompt", OPENAI, trained=False)
        return _chat(value, context + parse_turns(value, "completion", OPENAI))
    if beside := [key for key in _CHAT_KEYS if key in value]:
        raise InputError(
            f"{beside[0]} needs a chat: make prompt and completion lists of messages"
        )
    prompt = text_of(value, "prompt", empty=True)
    return Record(prompt=prompt, completion=text_of(value, "completion"))


def _instruction(value: Value, input_key: str, output_key: str) -> Record:
    instruction, output = text_of(value, "instruction"), text_of(value, output_key)
    context = text_of({input_key: "", **value}, input_key, empty=True)
    question, preamble, section = instruction, ALPACA, ""
    if context.strip():
        question, preamble = f"{instruction}\n\n{context}", ALPACA_WITH_INPUT
        section = f"### Input:\n{context}\n\n"
    prompt = (
        f"{_system(value) or preamble}\n\n### Instruction:\n{instruction}\n\n"
        f"{section}### Response:\n"
    )
    return _exchange(value, question, output, prompt, output)


def _question(value: Value) -> Record:
    question, answer = text_of(value, "question"), text_of(value, "answer")
    system = _system(value)
    prompt = f"{system}\n\n" * bool(system) + f"Question: {question}\nAnswer:"
    return _exchange(value, question, answer, prompt, f" {answer}")


def _text(value: Value) -> Record:
    if answers := [key for key in _ANSWERS if key in value]:
        raise InputError(
            f"{answers[0]} is not understood beside text: give the prompt of this "
            "answer as well, or remove it"
        )
    return Record(completion=text_of(value, "text"))


_SYSTEM = ("system", "system_prompt")
_TEMPLATE = ("template", "chat_template")
_CHAT_KEYS = (*_SYSTEM, *_TEMPLATE, "tools")
_ANSWERS = ("completion", "output", "response", "answer")
_EXCHANGE = (*_SYSTEM, *_TEMPLATE, "history")
FORMATS = (
    Format(("messages",), _CHAT_KEYS, _messages),
    Format(("conversations",), _CHAT_KEYS, _conversations),
    Format(("prompt", "completion"), _CHAT_KEYS, _completion),
    Format(
        ("instruction", "output"),
        (*_EXCHANGE, "input"),
        lambda value: _instruction(value, "input", "output"),
    ),
    Format(
        ("instruction", "response"),
        (*_EXCHANGE, "context"),
        lambda value: _instruction(value, "context", "response"),
    ),
    Format(("question", "answer"), _EXCHANGE, _question),
    Format(("text",), (), _text),
)
_KEYS = {key for form in FORMATS for key in form.keys}


def _exchange(
    value: Value, question: str, answer: str, prompt: str, completion: str
) -> Record:
    """A question with its answer, as a chat and, without history, in plain form."""
    history = _history(value)
    turns = [*history, Turn("user", question), Turn("assistant", answer, trained=True)]
    record = _chat(value, turns)
    if history or record.template:
        return record
    return Record(record.turns, prompt, completion)


def _history(value: Value) -> list[Turn]:
    """Earlier questions and answers; the answers are trained, as in LLaMA-Factory."""
    pairs, turns = value.get("history", []), list[Turn]()
    if not isinstance(pairs, list):
        raise InputError(f"history must be a list of pairs, got {_kind(pairs)}")
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise InputError(
                f"history[{index}] must be a pair of a question and its answer"
            )
        named: Value = {"question": pair[0], "answer": pair[1]}
        question = text_of(named, "question", at=f"history[{index}].")
        answer = text_of(named, "answer", at=f"history[{index}].")
        turns += [Turn("user", question), Turn("assistant", answer, trained=True)]
    return turns


def _chat(value: Value, turns: list[Turn]) -> Record:
    """The chat with the system text, tools and template of the record."""
    if not any(turn.trained for turn in turns):
        raise InputError(
            "the chat has no answer to train: an assistant message is needed"
        )
    if turns[0].role == "assistant":
        raise InputError("the chat starts with an answer: a user message is needed")
    if system := _system(value):
        if turns[0].role == "system":
            raise InputError("the record has two system texts: keep one of them")
        turns = [Turn("system", system), *turns]
    template = _one_of(value, _TEMPLATE)
    return Record(tuple(turns), tools=parse_tools(value), template=template or None)


def _system(value: Value) -> str:
    return _one_of(value, _SYSTEM)


def _one_of(value: Value, names: tuple[str, str]) -> str:
    """The text under the one of two names that the record has."""
    texts = {name: text_of(value, name) for name in names if name in value}
    if len({*texts.values()}) > 1:
        raise InputError(f"{' and '.join(texts)} differ: keep one of them")
    return next(iter(texts.values()), "")


def _kind(value: Any) -> str:
    return type(value).__name__
