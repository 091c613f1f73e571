"""The built-in data set: Unicode character names and their general categories."""

import hashlib
import re
import sys
import unicodedata
from pathlib import Path

from manifold_lora.data.records import Record

BASE = Path(__file__).parent / "base"  # the built-in model and its tokenizer
HELD_OUT = 1000
# Names that are made by rule from the code point hold nothing to learn.
ALGORITHMIC = re.compile(r"-[0-9A-F]{3,}$|^HANGUL SYLLABLE")


def builtin_records() -> tuple[list[Record], list[Record]]:
    """A small real task that needs no file: from a character's name to its category.

    The prompt is "LATIN SMALL LETTER A:" and the completion " Ll", for every named
    character of Python's `unicodedata` but those named by rule. The names' hashes
    decide the order and the split, so they do not change from run to run; a Python
    with a newer Unicode has some more characters. There are 30 categories. Always
    answering the commonest, Lo, is right for 46 % of either part: a model has
    learned something only above that.

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
