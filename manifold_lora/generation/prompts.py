"""Prompts from the command line and from files, as texts and as token ids."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold_lora.data.chats import message
from manifold_lora.data.files import read_values
from manifold_lora.data.formats import parse_record
from manifold_lora.data.schema import Record, Turn
from manifold_lora.data.templates import Renderer, choose_template
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "-"  # stands for the answer that a prompt lacks


def read_prompts(path: Path, system: str = "") -> list[Record]:
    r"""The prompts of a file: one a line of a `.txt` file, or those of records.

    Records have any format of training data, with or without the answer: of a chat the
    last answer is left out, of others the completion. A line, or a text in a list of
    JSON, is a message of the user where there is a chat template.

    Args:
        path: the file.
        system: system message of the chats that have none.

    Raises:
        InputError: there is no such file, it is empty, or a record is invalid.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "prompts.txt")
        >>> _ = file.write_text("What is 1+1?\n")
        >>> [record.prompt for record in read_prompts(file)]
        ['What is 1+1?']
    """
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"--prompts {path} cannot be read: {error}.") from error
        prompts = [as_prompt(line, system) for line in lines if line.strip()]
    else:
        prompts, problems = [], []
        for location, value in read_values(path):
            try:
                prompts.append(_parse(value, system))
            except (InputError, ValueError) as error:
                problems.append(f"{location}: {error}")
        if problems:
            more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
            listed = "\n  ".join(problems[:8])
            raise InputError(f"--prompts has invalid records:\n  {listed}{more}")
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt.")
    return prompts


def as_prompt(text: str, system: str = "") -> Record:
    """A text as a message of the user, or alone where there is no chat template."""
    return Record(turns=_with_system((Turn("user", text),), system), prompt=text)


def _with_system(turns: Sequence[Turn], system: str) -> tuple[Turn, ...]:
    if system and not any(turn.role == "system" for turn in turns):
        return (Turn("system", system), *turns)
    return tuple(turns)


def _parse(value: Callable[[], Any], system: str) -> Record:
    parsed = value()
    if isinstance(parsed, str):
        return as_prompt(parsed, system)
    record = parse_record(_with_answer(parsed))
    turns = record.turns
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if turns:
        turns = _with_system(turns, system)
    return Record(
        turns=turns,
        prompt=record.prompt,
        tools=record.tools,
        template=record.template,
        location=record.location,
    )


def _with_answer(value: Any) -> Any:
    """A record of a prompt alone, with a placeholder for its answer."""
    if not isinstance(value, dict):
        return value
    chat = value.get("messages")
    if isinstance(chat, list) and chat and isinstance(chat[-1], dict):
        if chat[-1].get("role") != "assistant":
            return value | {"messages": [*chat, _assistant()]}
        return value
    for prompt, answer in (
        ("prompt", "completion"),
        ("instruction", "output"),
        ("question", "answer"),
    ):
        has_answer = value.get(answer) or value.get("response")
        if prompt in value and not has_answer:
            is_chat = isinstance(value[prompt], list)
            return value | {answer: [_assistant()] if is_chat else _ANSWER}
    return value


def _assistant() -> dict[str, str]:
    return {"role": "assistant", "content": _ANSWER}


def encode_prompt(
    record: Record,
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
    *,
    raw: bool = False,
) -> list[int]:
    """The token ids of a prompt.

    A chat is rendered by the chat template, with the generation prompt; any other
    record, and with `raw` every one, is its prompt with the tokenizer's special tokens.

    Raises:
        InputError: the template rejects the chat, or there is none and no plain form.
    """
    template = None
    if record.turns and not raw:
        template = choose_template(tokenizer, record.template, bool(record.tools))
    if template is None:
        if not record.prompt:
            where = f"{record.location}: " if record.location else ""
            raise InputError(
                f"{where}the prompt is empty or a chat, for which the tokenizer has no "
                "chat template: give a text, or use an instruct model's directory."
            )
        return tokenizer(record.prompt)["input_ids"]  # pyright: ignore[reportReturnType]
    chat = [message(turn) for turn in record.turns]
    (rendered,) = renderer.render(template, [(chat, True)], record.tools)
    ids: Any = tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    return ids
