"""From texts with the character spans of their answers to token ids and masks."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manifold_lora.data.chats import Span, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """A tokenised text."""

    ids: np.ndarray  # (t,) int32
    masks: np.ndarray  # (answers, t) bool, which tokens belong to each answer


def tokenize(
    texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase"
) -> list[Tokens]:
    """Tokenise each text once; a token that overlaps an answer belongs to it.

    So the ids are those of the tokenizer for the whole text, and no token is split or
    made up where the prompt ends and the answer begins.
    """
    encoded: dict[int, Tokens] = {}
    for special_tokens in (False, True):
        numbers = [i for i, t in enumerate(texts) if t.special_tokens == special_tokens]
        if not numbers:
            continue
        out: Any = tokenizer(
            [texts[i].text for i in numbers],
            add_special_tokens=special_tokens,
            return_offsets_mapping=bool(tokenizer.is_fast),
            verbose=False,
        )
        for place, number in enumerate(numbers):
            text, ids = texts[number], out["input_ids"][place]
            if tokenizer.is_fast:
                masks = _by_offsets(out["offset_mapping"][place], text.spans)
            else:
                masks = _by_prefixes(ids, text, tokenizer)
            encoded[number] = Tokens(np.array(ids, np.int32), masks)
    return [encoded[number] for number in range(len(texts))]


def _by_offsets(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """The masks from the characters that each token stands for.

    Offsets may leave out white space at the beginning of a token: what lies between two
    tokens belongs to the second one. A token without characters, such as the space that
    sentencepiece puts first, belongs to an answer if it lies in one.
    """
    starts, stops = np.asarray(offsets, np.int64).reshape(-1, 2).T
    previous = np.maximum.accumulate(np.concatenate([[0], stops]))[:-1]
    starts = np.minimum(starts, previous)
    masks = np.zeros((len(spans), len(starts)), np.bool_)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        overlaps = (starts < stop) & (stops > start)
        mask[:] = overlaps | ((starts == stops) & (starts >= start) & (starts < stop))
    return masks


def _by_prefixes(
    ids: Sequence[int], text: Text, tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """The masks of a tokenizer without offsets, from the tokens of prefixes."""
    masks = np.zeros((len(text.spans), len(ids)), np.bool_)
    for mask, span in zip(masks, text.spans, strict=True):
        start, stop = (_common(ids, text, end, tokenizer) for end in span)
        mask[start : len(ids) if span[1] == len(text.text) else stop] = True
    return masks


def _common(
    ids: Sequence[int], text: Text, end: int, tokenizer: "PreTrainedTokenizerBase"
) -> int:
    """How many tokens the text and its prefix have in common."""
    out: Any = tokenizer(
        text.text[:end], add_special_tokens=text.special_tokens, verbose=False
    )
    pairs = zip(ids, out["input_ids"], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
