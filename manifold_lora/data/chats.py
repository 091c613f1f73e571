"""Chats to token ids with the answers marked, by the tokenizer's chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_lora.data.records import Record, Turn
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbered = Sequence[tuple[int, Record]]  # records with their numbers, from 1
Encoded = tuple[np.ndarray, np.ndarray]  # token ids int32, answer mask bool


def encode_by_marks(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Chats by a template that marks the answers itself."""
    try:
        out: Any = tokenizer.apply_chat_template(
            [_messages(record.turns) for _, record in numbered],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception:
        for number, record in numbered:  # to name the record that is refused
            _render(number, record.turns, tokenizer)
        raise
    added, bos = tokenizer.added_tokens_decoder, tokenizer.bos_token_id
    special = [token for token, kind in added.items() if kind.special and token != bos]
    encoded = []
    for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True):
        ids, mask = np.array(ids, np.int32), np.array(mask, np.bool_)
        # Templates differ in whether the mark holds the token that ends the turn.
        ends = mask[:-1] & ~mask[1:] & ~np.isin(ids[:-1], special)
        mask[1:] |= ends & np.isin(ids[1:], special)
        encoded.append((ids, mask))
    return encoded


def encode_by_prefixes(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Chats whose answers lie between two prefixes: up to the answer, and with it."""
    texts = []
    for number, record in numbered:
        turns = record.turns
        texts.append(_render(number, turns, tokenizer))
        for index in _trained(turns):
            texts.append(_render(number, turns[:index], tokenizer, prompt=True))
            texts.append(_render(number, turns[: index + 1], tokenizer))
    tokens = iter(tokenize(texts, tokenizer))
    encoded = []
    for number, record in numbered:
        ids, spans = next(tokens), []
        for index in _trained(record.turns):
            before, after = next(tokens), next(tokens)
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise InputError(
                    f"record {number}: the answer in message {index + 1} cannot be "
                    "found among the tokens, because the chat template writes the "
                    "messages up to there otherwise when more follow. Mark answers "
                    "in the template with {% generation %}, or give "
                    "prompt+completion records."
                )
            spans.append((len(before), len(after)))
        encoded.append(arrays(ids, spans))
    return encoded


def _trained(turns: Sequence[Turn]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn.trained]


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _render(
    number: int,
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    prompt: bool = False,
) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            _messages(turns), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # whatever the template's own code raises
        raise InputError(
            f"record {number}: the chat template refuses it: {error}"
        ) from error
    return text


def tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids without special tokens: BOS is the template's or the caller's."""
    out: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
    return out["input_ids"]


def arrays(ids: list[int], spans: list[tuple[int, int | None]]) -> Encoded:
    """Ids and mask from a list of ids and the spans of the answers in it."""
    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        mask[start:end] = True
    return np.array(ids, np.int32), mask
