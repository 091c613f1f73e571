"""Records to token ids, with the tokens that carry the loss marked."""

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
    arrays,
    encode_by_marks,
    encode_by_prefixes,
    tokenize,
)
from manifold_lora.data.records import Record
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks answers in a template
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded record.

    Shapes: `input_ids` (t,) int32; `loss_mask` (t,) bool, true where the token is
    itself a target. The first token has nothing before it and is never a target.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Report:
    """What `encode` did, in numbers."""

    kept: int
    truncated: int  # of those kept: shortened to the sequence length
    dropped: int  # no answer token
    tokens: int  # of those kept
    trained_tokens: int
    longest: int  # tokens of the longest record before it was shortened


def load_tokenizer(path: str | PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face model directory, from local files only.

    Raises:
        InputError: There is no tokenizer there, or its files cannot be read.
    """
    directory = Path(path)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        found = "no such directory" if not directory.is_dir() else "none is there"
        raise InputError(
            f"{directory} has no tokenizer: looked for {' or '.join(TOKENIZER_FILES)}, "
            f"{found}. Copy the tokenizer files of the model into its directory."
        )
    # Nobody who fine-tunes with JAX needs to hear that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise InputError(
            f"the tokenizer in {directory} cannot be read: {error}. Copy the files "
            "again, and see that transformers is as new as they are."
        ) from error


def encode(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    train_on_prompt: bool = False,
) -> tuple[list[Example], Report]:
    """Encode records, with the loss on answers.

    Chats are written by the tokenizer's chat template and end as it ends them; the
    token that ends an answer is trained too. Prompt and completion are tokenised
    apart, so that training sees the tokens generation sees, and end with the
    trained end-of-sequence token. A record that is too long loses the left of its
    prompt first (never the first token), then the end of its answer.

    Args:
        records: What to encode.
        tokenizer: From `load_tokenizer`.
        sequence_length: The most tokens of an example, at least 2.
        train_on_prompt: Put the loss on every token but the first.

    Returns:
        The examples, in order, none longer than `sequence_length` and none without
        a trained token; and the counts.

    Raises:
        InputError: A chat meets a tokenizer without chat template or one that
            refuses it, there is no end-of-sequence token, every record is longer
            than `sequence_length`, or none has an answer token.
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
            f"none of the {len(records)} records has an answer token; look at them and "
            "at the {% generation %} marks of the tokenizer's chat template."
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
    """Drop from the left of the prompt, then from the end of the answer."""
    start = int(answer.argmax())  # length of the prompt, at least 1
    excess = min(max(len(ids) - length, 0), start - 1)
    # BOS stays in front; without one any prompt token serves to predict the answer.
    first = 1 if ids[0] == bos else 0
    kept = np.r_[:first, first + excess : len(ids)][:length]
    answer = answer[kept]
    answer[0] = False
    return ids[kept], answer


def _encode_all(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Every record by the way that suits it, tokenised one batch per way."""
    ways: dict[Callable[..., list[Encoded]], list[tuple[int, Record]]] = {}
    chats = []
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    marked = tokenizer.is_fast and GENERATION.search(template)
    for number, record in enumerate(records, start=1):
        way = _encode_plain
        if not template and not record.completion:
            chats.append(number)
        elif template and record.turns:
            answers = [turn for turn in record.turns if turn.role == "assistant"]
            # The template's marks cover all answers, also those a prompt brings along.
            by_marks = marked and all(turn.trained for turn in answers)
            way = encode_by_marks if by_marks else encode_by_prefixes
        ways.setdefault(way, []).append((number, record))
    if chats:
        raise InputError(
            f"the tokenizer has no chat template, and {len(chats)} of {len(records)} "
            f"records are chats (first: record {chats[0]}). Use the instruct model's "
            "directory, put its chat_template.jinja beside tokenizer.json, or give "
            "prompt+completion records."
        )
    encoded: dict[int, Encoded] = {}
    for way, numbered in ways.items():
        pairs = way(numbered, tokenizer)
        encoded |= zip((number for number, _ in numbered), pairs, strict=True)
    return [encoded[number] for number in range(1, len(records) + 1)]


def _encode_plain(
    numbered: Numbered, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "the tokenizer names no end-of-sequence token, so answers would never end: "
            "set eos_token in tokenizer_config.json."
        )
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    prompts = tokenize([record.prompt for _, record in numbered], tokenizer)
    completions = tokenize([record.completion for _, record in numbered], tokenizer)
    encoded = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if adds_bos:  # one BOS, whether or not the text brings its own
            start = prompt or completion
            while start and start[0] == bos:
                del start[0]
            prompt = [bos, *prompt]
        if completion[-1:] != [eos]:
            completion = [*completion, eos]
        encoded.append(arrays([*prompt, *completion], [(len(prompt), None)]))
    return encoded
