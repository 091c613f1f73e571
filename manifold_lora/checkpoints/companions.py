"""The files beside the weights of a Hugging Face model directory."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
# All that transformers writes for a tokenizer, in its versions 4 and 5.
COMPANIONS = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation configuration, byte for byte.

    Args:
        source: the directory of the base.
        target: the directory of the merged model, which exists.
    """
    for name in COMPANIONS:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, target / name)


def stop_tokens(path: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens at which generation stops.

    They are the end-of-sequence tokens of generation_config.json, of config.json and of
    the tokenizer together: instruct models differ in which of them names the end of a
    turn.

    Raises:
        InputError: one of the files names something that is not a token.
    """
    stop: set[int] = set()
    for file in (path / GENERATION_CONFIG, path / "config.json"):
        if file.is_file():
            stop |= _ids(file, read_json(file).get("eos_token_id"))
    if tokenizer.eos_token_id is not None:
        stop.add(int(str(tokenizer.eos_token_id)))
    return tuple(sorted(stop))


def _ids(file: Path, value: Any) -> set[int]:
    """The tokens of an `eos_token_id`: null, a number or a list of numbers."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in values):
        raise InputError(
            f"{file}: eos_token_id must be a token id or a list of them, got {value!r}."
        )
    return set(values)
