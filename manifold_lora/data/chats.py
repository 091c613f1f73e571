"""Chats to texts with the spans of their answers, by the tokenizer's chat template."""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from manifold_lora.data.records import Record, Turn
from manifold_lora.data.templates import GENERATION, Renderer, TemplateError

Span = tuple[int, int]


class Text(NamedTuple):
    """A text to tokenise, with the character spans of its answers."""

    text: str
    spans: list[Span]  # each with the token that ends the turn
    answers: list[str]  # what each span must contain
    special_tokens: bool = False  # whether the tokenizer adds its own


def render_chat(
    record: Record, template: str, renderer: Renderer, ends: re.Pattern[str]
) -> list[Text]:
    """The text of a chat; several where the template rewrites earlier turns.

    Answers are located by {% generation %} tags, if the template has them and they mark
    every answer, or else by rendering the messages before each of them and up to it.
    A template that writes an earlier answer differently when more messages follow (such
    as one that drops its reasoning) gives one text for each such answer.

    Args:
        record: its turns, of which some are trained.
        template: the chat template.
        renderer: renders it.
        ends: matches the tokens that may end a turn, as text.

    Raises:
        TemplateError: the template rejects the chat or writes no answer or no end.
    """
    turns = record.turns
    trained = [index for index, turn in enumerate(turns) if turn.trained]
    messages = [message(turn) for turn in turns]
    tags = bool(GENERATION.search(template))
    chats: list[tuple[Any, bool]] = [(messages, False)]
    if not tags:
        chats += _prefixes(messages, trained)
    whole, *prefixes = renderer.render(template, chats, record.tools)
    if tags:
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(whole.spans) == len(answers):
            marked = dict(zip(answers, whole.spans, strict=True))
            spans = [_with_end(whole.text, marked[i], ends) for i in trained]
            return [Text(whole.text, spans, [turns[i].text for i in trained])]
        chats = _prefixes(messages, trained)
        prefixes = renderer.render(template, chats, record.tools)
    together, alone = Text(whole.text, [], []), []
    for place, index in enumerate(trained):
        texts = [rendering.text for rendering in prefixes[3 * place : 3 * place + 3]]
        part = _locate(turns, index, texts, ends)
        stop = part.spans[0][1]
        if whole.text[:stop] == part.text[:stop]:
            together.spans.extend(part.spans)
            together.answers.extend(part.answers)
        else:
            alone.append(part._replace(text=part.text[:stop]))
    return [*alone, together] if together.spans else alone


def message(turn: Turn) -> dict[str, Any]:
    """A turn as a template takes it."""
    return {"role": turn.role, "content": turn.text, **turn.extra}


def _prefixes(messages: list[Any], trained: Sequence[int]) -> list[tuple[Any, bool]]:
    """For each answer: what comes before it, without and with a prompt; up to it."""
    return [
        chat
        for i in trained
        for chat in (
            (messages[:i], False),
            (messages[:i], True),
            (messages[: i + 1], False),
        )
    ]


def _locate(
    turns: Sequence[Turn], index: int, texts: Sequence[str], ends: re.Pattern[str]
) -> Text:
    """The text up to an answer, with the span of that answer alone.

    Args:
        turns: the chat.
        index: the place of the answer in it.
        texts: the messages before it, without and with a generation prompt, and up to
            it, as the template writes them.
        ends: matches the tokens that may end a turn.
    """
    (before, prompted, text), turn = texts, turns[index]
    start = len(commonprefix([prompted, text]))
    context = before.rstrip()
    if not text.startswith(context):
        # The template always writes a prompt, or another system message.
        if not text.startswith(prompted):
            raise TemplateError(
                f"the answer in message {index + 1} cannot be located, because the "
                "chat template writes the messages before it differently when it "
                "follows. Mark the answers in the template with {% generation %}, or "
                "use prompt+completion records"
            )
        context = prompted
    content = turn.text.strip()
    found = text.find(content, start)
    if found < 0:  # a prompt may end with how the answer begins, such as <think>
        found = text.find(content, len(context))
    if found < 0:
        raise TemplateError(_why_absent(turn, index))
    content = content[max(start - found, 0) :]
    after = max(start, found) + len(content)
    stop = len(text) - len(_trailing_prompt(prompted, text[after:], ends))
    matches = [m.end() for m in ends.finditer(text, after, stop)]
    if not matches:
        raise TemplateError(
            f"the chat template writes no end-of-turn or end-of-text token after the "
            f"answer in message {index + 1}, so answers would never end"
        )
    return Text(text, [(start, matches[-1])], [content])


def _trailing_prompt(prompted: str, text: str, ends: re.Pattern[str]) -> str:
    """The generation prompt after an answer, if the template always writes it.

    Args:
        prompted: a rendering that ends with the generation prompt.
        text: what follows the answer.
        ends: matches the tokens that may end a turn.
    """
    cut = len(text) - len(commonprefix([prompted[::-1], text[::-1]]))
    matches = list(ends.finditer(text))
    # Different tokens may end with the same characters: cut after the whole token.
    cut = next((m.end() for m in matches if m.start() < cut < m.end()), cut)
    rest = text[:cut].rstrip()
    if not any(m.end() == len(rest) for m in matches):
        cut = next((m.end() for m in matches if m.start() >= cut), len(text))
    return text[cut:] if text[cut:].strip() else ""


def _why_absent(turn: Turn, index: int) -> str:
    where = f"the answer in message {index + 1}"
    if "</think>" in turn.text:
        return (
            f"the chat template drops the reasoning before </think> of {where}: it "
            "would not be trained. Remove it from the record, or use a template that "
            "keeps it"
        )
    return f"the chat template does not write {where} as it is in the record"


def _with_end(text: str, span: Span, ends: re.Pattern[str]) -> Span:
    """A marked span with the token that ends the turn, if the mark ends before it."""
    start, stop = span
    tail = text[start:stop].rstrip()
    if any(match.end() == len(tail) for match in ends.finditer(tail)):
        return span
    after = re.compile(rf"\s*(?:{ends.pattern})").match(text, stop)
    return (start, after.end()) if after else span


def dropped_content(record: Record, text: str) -> str | None:
    """What of a chat its rendering does not hold, in words; None if it holds all.

    Answers are checked among the trained tokens instead.
    """
    for index, turn in enumerate(record.turns):
        content = turn.text.strip() if turn.role in ("system", "user") else ""
        if content not in text:
            return f"the content of message {index + 1} ({turn.role})"
        for name in _names(turn.extra.get("tool_calls"), "tool_calls"):
            if name not in text:
                return f"tool_calls of message {index + 1}"
        reasoning = turn.extra.get("reasoning_content") or ""
        if not isinstance(reasoning, str):
            raise TemplateError("reasoning_content must be a string")
        if turn.trained and reasoning.strip() not in text:
            return f"reasoning_content of message {index + 1}"
    if any(name not in text for name in _names(list(record.tools), "tools")):
        return "tools"
    return None


def _names(functions: Any, key: str) -> list[str]:
    """The names of tools or of calls."""
    try:
        return [str(item.get("function", item)["name"]) for item in functions or []]
    except (AttributeError, KeyError, TypeError):
        raise TemplateError(
            f'{key} must be a list of objects such as {{"type": "function", '
            '"function": {"name": ...}}'
        ) from None
