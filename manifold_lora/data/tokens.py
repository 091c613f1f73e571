"""Records to token ids and loss masks."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_lora.data.chats import (
    Encoded,
    Numbered,
    encode_with_generation_tags,
    encode_with_prefixes,
    tokenize,
    with_mask,
)
from manifold_lora.data.records import Record
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(
    r"\{%-?\s*generation\s*-?%\}"
)  # marks the answers in a template
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded record.

    Shapes: `input_ids` (t,) int32; `loss_mask` (t,) bool, true where the token itself
    is a target. The first token has no context and is never a target.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Report:
    """Statistics of `encode`."""

    kept: int
    truncated: int  # of those kept, how many were truncated to the sequence length
    dropped: int  # without an answer token
    tokens: int  # of those kept
    trained_tokens: int
    longest: int  # tokens of the longest record before truncation


def load_tokenizer(path: str | PathLike[str]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face model directory, from local files only.

    Raises:
        InputError: The directory has no tokenizer, or its files cannot be read.
    """
    directory = Path(path)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        reason = "no such directory" if not directory.is_dir() else "neither exists"
        raise InputError(
            f"{directory} has no tokenizer: looked for {' or '.join(TOKENIZER_FILES)}, "
            f"{reason}. Copy the model's tokenizer files into this directory."
        )
    # transformers warns that PyTorch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            f"the tokenizer in {directory} cannot be read: {error}. Copy the files "
            "again, and check that transformers is not older than they are."
        ) from error


def encode(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    train_on_prompt: bool = False,
) -> tuple[list[Example], Report]:
    """Encode records, with the loss on the answers.

    Chats are rendered by the tokenizer's chat template; the token that ends an answer
    is trained too. Prompt and completion are tokenised separately, so that training
    sees the same tokens as generation, and end with a trained end-of-sequence token. A
    record that is too long is truncated from the left of its prompt first (never the
    first token), then from the end of its answer.

    Args:
        records: The records to encode.
        tokenizer: From `load_tokenizer`.
        sequence_length: Maximum number of tokens of an example, at least 2.
        train_on_prompt: Put the loss on every token but the first.

    Returns:
        The examples, in order, none longer than `sequence_length` and none without
        a trained token; and statistics.

    Raises:
        InputError: A chat needs a chat template and the tokenizer has none, or the
            template rejects it; there is no end-of-sequence token; every record is
            longer than `sequence_length`, or none has an answer token.
    """
    if sequence_length < 2:
        raise InputError(
            f"--sequence-length must be at least 2, got {sequence_length}."
        )
    if not records:
        raise InputError("there are no records to encode; at least one is needed.")
    encoded = _encode_all(records, tokenizer)
    lengths = [len(ids) for ids, _ in encoded]
    if min(lengths) > sequence_length:
        raise InputError(
            f"every example is longer than the sequence length: the shortest has "
            f"{min(lengths)} tokens, the longest {max(lengths)}, the sequence length "
            f"is {sequence_length}. Raise --sequence-length ({max(lengths)} keeps all)."
        )
    examples, truncated = [], 0
    for ids, answer in encoded:
        answer[0] = False
        if not answer.any():
            continue
        truncated += len(ids) > sequence_length
        ids, answer = _truncate(ids, answer, sequence_length, tokenizer.bos_token_id)
        mask = np.arange(len(ids)) > 0 if train_on_prompt else answer
        examples.append(Example(ids, mask))
    if not examples:
        raise InputError(
            f"none of the {len(records)} records has an answer token; check them and "
            "the {% generation %} tags of the tokenizer's chat template."
        )
    return examples, Report(
        kept=len(examples),
        truncated=truncated,
        dropped=len(records) - len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(int(example.loss_mask.sum()) for example in examples),
        longest=max(lengths),
    )


def _truncate(ids: np.ndarray, answer: np.ndarray, length: int, bos: Any) -> Encoded:
    """Truncate from the left of the prompt, then from the end of the answer."""
    start = int(answer.argmax())  # length of the prompt, at least 1
    excess = min(max(len(ids) - length, 0), start - 1)
    # Keep BOS in front; without one, any token of the prompt serves as context.
    first = 1 if ids[0] == bos else 0
    indices = np.r_[:first, first + excess : len(ids)][:length]
    answer = answer[indices]
    answer[0] = False
    return ids[indices], answer


def _encode_all(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Encode each record with the method that suits it, in one batch per method."""
    methods: dict[Callable[..., list[Encoded]], list[tuple[int, Record]]] = {}
    chats = []
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    has_tags = tokenizer.is_fast and GENERATION.search(template)
    for number, record in enumerate(records, start=1):
        method = _encode_plain
        if not template and not record.completion:
            chats.append(number)
        elif template and record.turns:
            answers = [turn for turn in record.turns if turn.role == "assistant"]
            # The tags cover all answers, also those that belong to a prompt.
            use_tags = has_tags and all(turn.trained for turn in answers)
            method = encode_with_generation_tags if use_tags else encode_with_prefixes
        methods.setdefault(method, []).append((number, record))
    if chats:
        raise InputError(
            f"the tokenizer has no chat template, and {len(chats)} of {len(records)} "
            f"records are chats (first: record {chats[0]}). Use the instruct model's "
            "directory, put its chat_template.jinja beside tokenizer.json, or use "
            "prompt+completion records."
        )
    encoded: dict[int, Encoded] = {}
    for method, numbered in methods.items():
        pairs = method(numbered, tokenizer)
        encoded |= zip((number for number, _ in numbered), pairs, strict=True)
    return [encoded[number] for number in range(1, len(records) + 1)]


def _encode_plain(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, so answers would never end: "
            "set eos_token in tokenizer_config.json."
        )
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    prompts = tokenize([record.prompt for _, record in numbered], tokenizer)
    completions = tokenize([record.completion for _, record in numbered], tokenizer)
    encoded = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if adds_bos:  # one BOS, even if the text contains its own
            start = prompt or completion
            while start and start[0] == bos:
                del start[0]
            prompt = [bos, *prompt]
        if completion[-1:] != [eos]:
            completion = [*completion, eos]
        encoded.append(with_mask([*prompt, *completion], [(len(prompt), None)]))
    return encoded
