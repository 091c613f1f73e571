"""Chats to token ids and loss masks, with the tokenizer's chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_lora.data.records import Record, Turn
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Numbered = Sequence[tuple[int, Record]]  # records with their numbers, from 1
Encoded = tuple[np.ndarray, np.ndarray]  # token ids int32, answer mask bool


def encode_with_generation_tags(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Encode chats with a template that marks the answers by {% generation %}."""
    try:
        out: Any = tokenizer.apply_chat_template(
            [_messages(record.turns) for _, record in numbered],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception:
        for number, record in numbered:  # find the record, to name it
            _render(number, record.turns, tokenizer)
        raise
    added, bos = tokenizer.added_tokens_decoder, tokenizer.bos_token_id
    special = [token for token, kind in added.items() if kind.special and token != bos]
    encoded = []
    for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True):
        ids, mask = np.array(ids, np.int32), np.array(mask, np.bool_)
        # Templates differ in whether the tag includes the token that ends the turn.
        ends = mask[:-1] & ~mask[1:] & ~np.isin(ids[:-1], special)
        mask[1:] |= ends & np.isin(ids[1:], special)
        encoded.append((ids, mask))
    return encoded


def encode_with_prefixes(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Encode chats by rendering prefixes: each answer is what the longer one adds."""
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
                    "located among the tokens, because the chat template renders the "
                    "messages up to it differently when others follow. Mark the "
                    "answers in the template with {% generation %}, or use "
                    "prompt+completion records."
                )
            spans.append((len(before), len(after)))
        encoded.append(with_mask(ids, spans))
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
            f"record {number}: the chat template rejects it: {error}"
        ) from error
    return text


def tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids without special tokens; the template or the caller adds BOS."""
    out: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
    return out["input_ids"]


def with_mask(ids: list[int], spans: list[tuple[int, int | None]]) -> Encoded:
    """Token ids and answer mask as arrays, given the spans of the answers."""
    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        mask[start:end] = True
    return np.array(ids, np.int32), mask
