"""The terminal: any text on any of them, and output that never ends a run."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

# Tables are laid out for at least this width; narrower terminals wrap their lines.
MIN_TABLE_WIDTH = 80

# What our own output shows beyond ASCII, for terminals without it.
_ASCII = {
    "Δ": "d", "σ": "sigma", "ᵀ": "^T", "ᵣ": "_r", "ₚ": "_p", "²": "^2", "·": "*",
    "×": "x", "√": "sqrt ", "±": "+/-", "−": "-", "–": "-", "—": "-", "…": "...",
    "≤": "<=", "≥": ">=", "∈": "in", "→": "->", "←": "<-", "↔": "<->", "•": "*",
    "α": "alpha", "β": "beta", "ε": "eps", "η": "eta", "λ": "lambda", "‖": "|",
    "⊙": "o", "Σ": "Sigma", "μ": "mu", "∂": "d", "₀": "0", "₁": "1", "₂": "2",
    "∞": "inf", "½": "1/2",
    "⁻": "^-", "¹": "^1", "“": '"', "”": '"', "’": "'",
    "─": "-", "━": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip
# Characters that move the cursor or change the terminal, all but tab and newline.
_CONTROLS = {n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160))}
del _CONTROLS[ord("\t")], _CONTROLS[ord("\n")]
_REPLACE = "manifold_lora.replace"


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(_ASCII.get(c, "?") for c in characters), error.end


codecs.register_error(_REPLACE, _replace)


class SafeStream:
    """A text stream that writes what its encoding has, and whose failures are ignored.

    A run must not end because a terminal lacks a character, or because the reader of a
    pipe has gone: training continues in silence and all files are written.

    >>> import io
    >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    >>> _ = SafeStream(stream).write("ΔW = B Aᵀ ☺")
    >>> _ = stream.seek(0)
    >>> stream.read()
    'dW = B A^T ?'
    """

    def __init__(self, stream: Any):
        self._stream = stream  # None: the process was started without it
        self._failed = stream is None
        self.error: OSError | None = None  # why writing failed; None: the reader left

    @property
    def encoding(self) -> str:
        """That of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write with replacements; the number of characters given."""
        if not self._failed:
            encoded = text.encode(self.encoding, _REPLACE)
            self._attempt("write", encoded.decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, unless writing has failed before."""
        if not self._failed:
            self._attempt("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return not self._failed and self._stream.isatty()

    def _attempt(self, method: str, *arguments: str) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except BrokenPipeError:
            self._failed = True
            # Python flushes the rest when it ends, and would report the failure then.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except ValueError:  # a closed file
            self._failed = True
        except OSError as error:  # such as a full disk
            self._failed, self.error = True, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_terminal() -> Iterator[None]:
    """Replace stdout and stderr by streams that never fail; for a whole command."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would receive our output
            os.open(os.devnull, os.O_RDWR)
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    redirect_out: Any = contextlib.redirect_stdout(out)  # pyright: ignore[reportArgumentType]
    redirect_err: Any = contextlib.redirect_stderr(err)  # pyright: ignore[reportArgumentType]
    with redirect_out, redirect_err:
        try:
            yield
        finally:
            out.flush()
            if out.error is not None:
                err.write(
                    f"manifold-lora: stdout could not be written ({out.error.strerror})"
                    "; files are not affected.\n"
                )
            err.flush()


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on stdout or stderr that prints any text as it is."""
    stream: Any = SafeStream(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, stderr=stderr, quiet=quiet, markup=False, emoji=False)


def printable(text: object) -> str:
    """Text without characters that would control the terminal."""
    return str(text).translate(_CONTROLS)


def print_text(console: Console, text: object, style: str | None = None) -> None:
    """Print text as it is: never as markup, never cut, wrapped by the terminal alone.

    >>> print_text(Console(), "runs/[bold]x :cat:")
    runs/[bold]x :cat:
    """
    console.print(
        printable(text), style=style, markup=False, emoji=False, soft_wrap=True
    )


class PlainTable(Table):
    """A table of plain text, folded rather than cut; shown by `print_table`."""

    def __init__(self, title: str, **options: Any):
        super().__init__(
            title=Text(printable(title)), title_justify="left", box=None, **options
        )

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        """A column, by default one that folds long words."""
        options.setdefault("overflow", "fold")
        super().add_column(Text(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """A row of text, or of `Text` with a style."""
        plain = (Text(printable(c)) if isinstance(c, str) else c for c in cells)
        super().add_row(*plain, **options)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        width = max(options.max_width, MIN_TABLE_WIDTH)
        return super().__rich_console__(console, options.update(max_width=width))


def print_table(console: Console, table: Table) -> None:
    """Print a table, on a narrow terminal with lines that it wraps."""
    console.print(table, crop=False)
