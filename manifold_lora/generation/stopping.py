"""Text while it is generated: streamed, and stopped at strings."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from manifold_lora.generation.padding import until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # how a part of a character is decoded


class TextMonitor:
    """Decodes rows as they grow, stops them at strings, and passes their text on.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop_tokens: at which a row's text ends.
        stop_strings: likewise; the text ends before the first of them.
        write: called with each new piece of the first row's text, in order. What may
            be the beginning of a stop string is held back until it is not.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ):
        self._tokenizer = tokenizer
        self._stop_tokens = stop_tokens
        self._stop_strings = stop_strings
        self._write = write
        self._written = 0  # characters

    def text(self, ids: Sequence[int]) -> str:
        """The text of new ids, up to a stop token or a stop string."""
        return self._truncate(self._decode(ids))[0]

    def __call__(self, new_ids: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Whether each row, (b, n) ids so far, has stopped."""
        done = done.copy()
        for row, ids in enumerate(new_ids):
            if self._stop_strings and not done[row]:
                done[row] = self._truncate(self._decode(ids.tolist()))[1]
        if self._write is not None and len(new_ids):
            self._stream(self._decode(new_ids[0].tolist()), bool(done[0]))
        return done

    def finish(self, ids: Sequence[int]) -> None:
        """Write what was held back of the first row, given all of its ids."""
        if self._write is not None:
            self._stream(self._decode(ids), done=True)

    def _decode(self, ids: Sequence[int]) -> str:
        ids = until_stop(ids, self._stop_tokens)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _truncate(self, text: str) -> tuple[str, bool]:
        """The text before the first stop string, and whether there is one."""
        ends = [i for stop in self._stop_strings if (i := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def _stream(self, text: str, done: bool) -> None:
        text, _ = self._truncate(text)
        if not done:
            text = text[: len(text) - self._held_back(text)]
        if len(text) > self._written and self._write is not None:
            self._write(text[self._written :])
            self._written = len(text)

    def _held_back(self, text: str) -> int:
        """The characters at the end that the next tokens may change or remove."""
        partial = len(text) - len(text.rstrip(_INCOMPLETE))
        prefixes = (
            n
            for stop in self._stop_strings
            for n in range(1, len(stop))
            if text.endswith(stop[:n])
        )
        return max(partial, max(prefixes, default=0))
