"""Records to token ids and masks of what is trained."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_lora.data.chats import Text, dropped_content, render_chat
from manifold_lora.data.masks import Tokens, tokenize
from manifold_lora.data.records import MAX_PROBLEMS, Record
from manifold_lora.data.templates import (
    Renderer,
    TemplateError,
    TemplateTimeout,
    choose_template,
)
from manifold_lora.data.tokenizer import load_tokenizer as load_tokenizer
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TIMEOUTS = 2  # records for which a template takes too long


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded record, or a row of a long text.

    Shapes: `input_ids` (t,) int32; `loss_mask` (t,) bool, true where the token itself
    is a target; `answer_mask` (t,) bool, true where it belongs to an answer, by default
    the loss mask. The first token has no context and is in neither.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    answer_mask: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    location: str = ""  # of the record, for messages

    def __post_init__(self):
        if self.answer_mask is None:
            object.__setattr__(self, "answer_mask", self.loss_mask)


@dataclass(frozen=True)
class Report:
    """Statistics of `encode`."""

    kept: int  # examples
    truncated: int  # examples that were truncated to the sequence length
    split: int  # texts that became several examples
    tokens: int
    trained_tokens: int
    longest: int  # tokens of the longest record, before it was truncated or split
    invalid: tuple[str, ...] = ()  # location and reason of the records left out


def encode(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    train_on_prompt: bool = False,
    *,
    date: str | None = None,
    skip_invalid: bool = False,
) -> tuple[list[Example], Report]:
    """Encode records, with the loss on the answers.

    Chats are rendered by the tokenizer's chat template, other records are their prompt
    followed by their completion and an end-of-sequence token. The text is tokenised as
    a whole; a token that overlaps an answer belongs to it, and so does the token that
    ends its turn. Every answer is checked to be among its trained tokens.

    A record that is too long is truncated from the left of its prompt first (never the
    first token), then from the end of its answer. A text without a prompt is split into
    rows instead, without overlap; the first token of each row has no context.

    Args:
        records: The records to encode.
        tokenizer: From `load_tokenizer`.
        sequence_length: Maximum number of tokens of an example, at least 2.
        train_on_prompt: Put the loss on every token but the first.
        date: "YYYY-MM-DD", for chat templates that write today's date; None is today.
        skip_invalid: Leave out records that cannot be encoded, and report them.

    Returns:
        The examples, in order, none longer than `sequence_length` and none without
        a trained token; and statistics.

    Raises:
        InputError: A record cannot be encoded, with the location and the reason of
            each; there is no end-of-sequence token; every record is longer than
            `sequence_length`.
    """
    if sequence_length < 2:
        raise InputError(
            f"--sequence-length must be at least 2, got {sequence_length}."
        )
    if not records:
        raise InputError("there are no records to encode; at least one is needed.")
    encoded, invalid = _encode_all(records, tokenizer, date)
    if invalid and not (skip_invalid and encoded):
        raise InputError(_summary(invalid))
    lengths = [len(tokens.ids) for _, tokens in encoded]
    splittable = any(not record.prompt and not record.turns for record, _ in encoded)
    if min(lengths) > sequence_length and not splittable:
        raise InputError(
            f"every example is longer than the sequence length: the shortest has "
            f"{min(lengths)} tokens, the longest {max(lengths)}, the sequence length "
            f"is {sequence_length}. Raise --sequence-length ({max(lengths)} keeps all)."
        )
    examples, truncated, split = [], 0, 0
    for record, (ids, masks) in encoded:
        answer = np.asarray(masks.any(axis=0))
        if record.prompt or record.turns:
            truncated += len(ids) > sequence_length
            pieces = [_truncate(ids, answer, sequence_length, tokenizer.bos_token_id)]
        else:
            pieces = list(_split(ids, answer, sequence_length))
            split += len(pieces) > 1
        for ids, answer in pieces:
            mask = np.arange(len(ids)) > 0 if train_on_prompt else answer
            examples.append(Example(ids, mask, answer, record.location))
    return examples, Report(
        kept=len(examples),
        truncated=truncated,
        split=split,
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        longest=max(lengths),
        invalid=tuple(invalid),
    )


def check_ids(
    examples: Iterable[Example], rows: int, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Check that the embedding of a model has a row for every token.

    Args:
        examples: From `encode`.
        rows: Of the embedding: the model's `vocab_size`.
        tokenizer: The one that encoded them.

    Raises:
        InputError: Some id has none; the token, its id and the first record are named.
    """
    for number, example in enumerate(examples, start=1):
        if example.input_ids.max() >= rows:
            token = int(example.input_ids[example.input_ids >= rows][0])
            name = tokenizer.convert_ids_to_tokens(token)
            where = example.location or f"example {number}"
            raise InputError(
                f"{where}: the token {name!r} has the id {token}, but the embedding of "
                f"the model has {rows} rows. Use the tokenizer that belongs to the "
                "model, or a model whose embedding was resized."
            )


def _encode_all(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", date: str | None
) -> tuple[list[tuple[Record, Tokens]], list[str]]:
    """The tokens of each record, and the reasons why others have none."""
    names = _end_tokens(tokenizer)
    ends = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    texts: list[tuple[int, Text]] = []
    problems: dict[int, str] = {}
    timeouts = 0
    renderer = Renderer(tokenizer, date)
    for number, record in enumerate(records):
        try:
            made = _texts(record, tokenizer, renderer, ends)
            _check_text("".join(text.text for text in made))
            texts += [(number, text) for text in made]
        except TemplateError as error:
            problems[number] = str(error)
            timeouts += isinstance(error, TemplateTimeout)
        if timeouts == MAX_TIMEOUTS:  # one record may be odd; here it is the template
            raise InputError("\n".join(_located(records, problems)[-MAX_PROBLEMS:]))
    encoded = []
    all_tokens = tokenize([text for _, text in texts], tokenizer)
    for (number, text), tokens in zip(texts, all_tokens, strict=True):
        if text.special_tokens:
            tokens = _with_eos(tokens, tokenizer.eos_token_id)
        if problem := _untrained(text, tokens, tokenizer, names):
            problems.setdefault(number, problem)
        tokens.masks[:, :1] = False  # it has no context
        if not tokens.masks.any():
            problems.setdefault(number, "it has nothing to train")
        encoded.append((number, tokens))
    valid = [(records[i], tokens) for i, tokens in encoded if i not in problems]
    return valid, _located(records, problems)


def _located(records: Sequence[Record], problems: Mapping[int, str]) -> list[str]:
    """The problems of records, with the location of each."""
    return [
        f"{records[number].location or f'record {number + 1}'}: {problem}"
        for number, problem in sorted(problems.items())
    ]


def _end_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The tokens that may end a turn, as text: the added ones, and EOS."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if eos is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, so answers would never end: "
            "set eos_token in tokenizer_config.json."
        )
    return added - {str(bos)} | {str(eos)}


def _texts(
    record: Record,
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
    ends: re.Pattern[str],
) -> list[Text]:
    """A record as texts with answers, of which a chat may need several."""
    template = None
    if record.turns:
        try:
            template = choose_template(tokenizer, record.template, bool(record.tools))
        except TemplateError:
            if not record.completion:
                raise
        if template is None and not record.completion:
            raise TemplateError(
                "it is a chat, and the tokenizer has no chat template. Use the "
                "instruct model's directory, put its chat_template.jinja beside "
                "tokenizer.json, or use prompt+completion records"
            )
    if template is None:
        prompt, completion = record.prompt, record.completion
        bos = str(tokenizer.bos_token)
        if prompt.startswith(bos):
            prompt = _without_bos(prompt, tokenizer)
        elif not prompt and completion.startswith(bos):
            completion = _without_bos(completion, tokenizer)
        text = prompt + completion
        span = (len(prompt), len(text))
        return [Text(text, [span], [completion], special_tokens=True)]
    if not any(turn.trained for turn in record.turns):
        raise TemplateError("it has no answer to train")
    texts = render_chat(record, template, renderer, ends)
    if dropped := dropped_content(record, "".join(text.text for text in texts)):
        raise TemplateError(f"the chat template does not write {dropped}")
    return texts


def _check_text(text: str) -> None:
    """Refuse half of a surrogate pair: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"it holds {text[error.start]!r}, half of a surrogate pair, which is not "
            "a character"
        ) from None


def _without_bos(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A text without BOS in front, if the tokenizer adds one."""
    single: Any = tokenizer("a")["input_ids"]
    if single[0] != tokenizer.bos_token_id:
        return text
    bos = str(tokenizer.bos_token)
    while text.startswith(bos):
        text = text.removeprefix(bos)
    return text


def _with_eos(tokens: Tokens, eos: Any) -> Tokens:
    """With an EOS, if there is none, that belongs to the answer."""
    ids, masks = tokens
    if ids[-1:].tolist() != [eos]:
        ids = np.append(ids, np.int32(eos))
        masks = np.append(masks, np.zeros((len(masks), 1), np.bool_), axis=1)
    masks[:, -1] = True
    return Tokens(ids, masks)


def _untrained(
    text: Text,
    tokens: Tokens,
    tokenizer: "PreTrainedTokenizerBase",
    ends: set[str],
) -> str | None:
    """Why the trained tokens are not the answers, if they are not."""

    def decoded(ids: Any) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for answer, mask in zip(text.answers, tokens.masks, strict=True):
        ids = tokens.ids[mask].tolist()
        trained = decoded(ids)
        # Tokenizers may normalise: what they make of the answer is then the answer.
        if answer.strip() not in trained:
            plain: Any = tokenizer(answer, add_special_tokens=False, verbose=False)
            if decoded(plain["input_ids"]).strip() not in trained:
                return (
                    f"the answer {_short(answer)} is not in what would be trained, "
                    f"{_short(trained)}"
                )
        if not ids or tokenizer.convert_ids_to_tokens(ids[-1]) not in ends:
            return (
                f"what would be trained, {_short(trained)}, does not end with an "
                "end-of-turn or end-of-text token"
            )
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")


def _summary(invalid: Sequence[str]) -> str:
    """One message for all records that cannot be encoded."""
    lines = list(islice(invalid, MAX_PROBLEMS))
    if len(invalid) > MAX_PROBLEMS:
        lines.append(f"... and {len(invalid) - MAX_PROBLEMS} more")
    return "\n".join(lines) + "\nFix these records, or leave them out: --skip-invalid."


def _truncate(
    ids: np.ndarray, answer: np.ndarray, length: int, bos: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Truncate from the left of the prompt, then from the end of the answer."""
    start = int(answer.argmax())  # length of the prompt, at least 1
    excess = min(max(len(ids) - length, 0), start - 1)
    # Keep BOS in front; without one, any token of the prompt serves as context.
    first = 1 if ids[0] == bos else 0
    indices = np.r_[:first, first + excess : len(ids)][:length]
    answer = answer[indices]
    answer[0] = False
    return ids[indices], answer


def _split(
    ids: np.ndarray, answer: np.ndarray, length: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Rows of a text, without a last one of a single token, which has no context."""
    for start in range(0, len(ids), length):
        row = answer[start : start + length].copy()
        row[0] = False
        if row.any():
            yield ids[start : start + length], row
