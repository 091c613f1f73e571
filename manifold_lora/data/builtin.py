"""The built-in data set: Unicode character names and their general categories."""

import hashlib
import re
import sys
import unicodedata
from pathlib import Path

from manifold_lora.data.records import Record

BASE = Path(__file__).parent / "base"  # the built-in model and its tokenizer
HELD_OUT = 1000
# Names generated from the code point contain nothing to learn.
ALGORITHMIC = re.compile(r"-[0-9A-F]{3,}$|^HANGUL SYLLABLE")


def builtin_records() -> tuple[list[Record], list[Record]]:
    """A small real task that needs no file: predict a character's category by its name.

    The prompt is "LATIN SMALL LETTER A:" and the completion " Ll", for every named
    character of Python's `unicodedata` except those with generated names. The hashes of
    the names determine order and split, which therefore do not change between runs; a
    Python with a newer Unicode has a few more characters. There are 30 categories.
    Always predicting the majority class, Lo, is right for 46 % of either split: only a
    higher accuracy shows that a model has learned something.

    Returns:
        About 30,400 records to train on and 1,000 held out (Unicode 14: 30,364).

    Example:
        >>> train, held_out = builtin_records()
        >>> held_out[0].prompt.endswith(":"), len(held_out)
        (True, 1000)
    """
    named = []
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not ALGORITHMIC.search(name):
            named.append((name, unicodedata.category(chr(code))))
    named.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
    records = [Record(prompt=f"{name}:", completion=f" {kind}") for name, kind in named]
    return records[HELD_OUT:], records[:HELD_OUT]
