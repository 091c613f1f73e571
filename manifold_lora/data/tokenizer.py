"""The tokenizer of a Hugging Face model directory."""

import importlib.util
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from manifold_lora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(path: str | PathLike[str]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face model directory, from local files only.

    Raises:
        InputError: The directory has no tokenizer, its files cannot be read, or only
            with a package that is not installed.
    """
    directory = Path(path)
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not present:
        reason = "no such directory" if not directory.is_dir() else "neither exists"
        raise InputError(
            f"{directory} has no tokenizer: looked for {' or '.join(TOKENIZER_FILES)}, "
            f"{reason}. Copy the model's tokenizer files into this directory."
        )
    needed = ("sentencepiece", "google.protobuf")
    missing = [name for name in needed if not _installed(name)]
    if present == ["tokenizer.model"] and missing:
        raise InputError(
            f"{directory} has tokenizer.model but no tokenizer.json, which takes "
            "sentencepiece to read: pip install sentencepiece protobuf, or copy the "
            "model's tokenizer.json into this directory."
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


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
