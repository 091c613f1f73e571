"""Output on terminals that lack characters, width or a reader."""

import contextlib
import io
import os
import sys

import pytest
from rich.console import Console

from manifold_lora.adapters.describe import show_methods
from manifold_lora.console import (
    PlainTable,
    SafeStream,
    make_console,
    print_table,
    print_text,
    printable,
    safe_terminal,
)
from manifold_lora.training.display import StepBar, show_pairs

ODD = "runs/[bold]x[/red] :cat: \\[a] ☺"


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="")


def content(text):
    text.flush()
    return text.buffer.getvalue().decode(text.encoding)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "dW = s*B A^T, 2 x 3, ??, +"),
        ("latin-1", "dW = s·B A^T, 2 × 3, ??, +"),
        ("cp1252", "dW = s·B A^T, 2 × 3, ??, +"),
        ("utf-8", "ΔW = s·B Aᵀ, 2 × 3, ☺?, ╭"),
    ],
)
def test_what_an_encoding_lacks_is_replaced(encoding, shown):
    text = stream(encoding)
    SafeStream(text).write("ΔW = s·B Aᵀ, 2 × 3, ☺\udcff, ╭")
    assert content(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_line_of_methods_on_a_small_encoding(monkeypatch, encoding):
    full, small = stream("utf-8"), stream(encoding)
    for out in (full, small):
        monkeypatch.setattr(sys, "stdout", out)
        show_methods(make_console())
    shown, complete = content(small), content(full)
    assert "dW" in shown and "ΔW" not in shown and "?" not in shown
    assert len(shown.split("\n")) == len(complete.split("\n"))


@pytest.mark.parametrize("console", [Console, make_console])
def test_text_is_never_markup(monkeypatch, console):
    """Not on a user's own console either, which interprets markup and emoji codes."""
    monkeypatch.setattr(sys, "stdout", out := stream("utf-8"))
    console = console()
    print_text(console, ODD, "red")
    show_pairs(console, f"[b]{ODD}", {ODD: ODD})
    lines = content(out).splitlines()
    assert lines[0] == ODD and lines[1].strip() == f"[b]{ODD}"
    assert lines[2].strip() == f"{ODD}  {ODD}"


def test_text_cannot_control_the_terminal():
    assert printable("a\x1b[2J\r\x07\x9b\tb\nc") == "a�[2J���\tb\nc"


def numbers_table():
    table = PlainTable("Numbers")
    for i in range(12):
        table.add_column(f"column {i}")
    table.add_row(*(f"{i}.{'123456789' * 3}" for i in range(12)))
    return table


@pytest.mark.parametrize("width", [1, 20, 79, 200])
def test_tables_fold_and_lose_nothing(width):
    console = Console(file=(out := io.StringIO()), width=width)
    print_table(console, numbers_table())
    rows = [line for line in out.getvalue().splitlines() if "column" not in line]
    shown = "".join("".join(rows).split())
    for digit in "123456789":
        assert shown.count(digit) >= 12 * 3
    assert "…" not in out.getvalue()


@pytest.mark.parametrize("width", [20, 80])
def test_the_bar_keeps_its_numbers(width):
    console = Console(file=(out := io.StringIO()), width=width)
    with StepBar(console, 1234, 0) as bar:
        bar.advance({"loss": 7.0101, "learning_rate": 2e-4, "tokens_per_second": 7339})
    shown = out.getvalue()
    assert "…" not in shown
    if width == 80:
        for text in ("1/1234", "loss 7.010", "lr 2.00e-04", "7,339 tokens/s"):
            assert text in shown


@pytest.mark.parametrize("kind", ["file", "none", "pipe"])
def test_output_that_nobody_can_read_is_dropped(kind):
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        out = os.fdopen(writer, "w")
    else:
        out = stream("utf-8")
    if kind == "file":
        out.close()
    safe = SafeStream(None if kind == "none" else out)
    for _ in range(2):
        assert safe.write("text") == 4
        safe.flush()
    assert not safe.isatty() and safe.encoding
    if kind == "pipe":
        out.close()  # flushes, now to nowhere


def test_a_command_without_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with safe_terminal():
        print("text")
        print_text(make_console(), "text")
    assert sys.stdout is None


def test_a_full_disk_is_reported_once(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", err := stream("utf-8"))
    with safe_terminal():
        for _ in range(3):
            print("text", flush=True)
    with contextlib.suppress(OSError):  # it flushes what is left
        full.close()
    assert content(err) == (
        "manifold-lora: stdout could not be written (No space left on device); "
        "files are not affected.\n"
    )
