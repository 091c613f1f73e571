"""Files of all kinds, and directories of them."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_lora.data.files import SUFFIXES, find_files, read_values
from manifold_lora.data.records import read_records
from manifold_lora.errors import InputError

ROWS = [
    {"prompt": 'a, "b"\nc', "completion": " d\u2028\r\ne"},
    {"prompt": "", "completion": "x" * 200_000},
]


def table(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def content(suffix: str) -> bytes:
    if suffix == ".parquet":
        return parquet(ROWS)
    if suffix in (".csv", ".tsv"):
        return table(ROWS, "\t" if suffix == ".tsv" else ",")
    lines = [json.dumps(row) for row in ROWS]
    return ("\n".join(lines)).encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_holds_the_same_records(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"train{suffix}"
    file.write_bytes(content(suffix))
    records = read_records(file)
    assert [{"prompt": r.prompt, "completion": r.completion} for r in records] == ROWS


def test_locations_in_tables_are_the_last_lines_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text('text\n"a\nb"\n\nc\n')
    assert [location for location, _ in read_values(file)] == [f"{file}:3", f"{file}:5"]


def test_nulls_that_fill_up_structs_are_left_out(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the keys of all."""
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": calls},
    ]
    other = [{"function": {"name": "f", "arguments": {"y": 2}}}]
    rows = [
        {"messages": messages},
        {"messages": [messages[0], messages[1] | {"tool_calls": other}]},
    ]
    (tmp_path / "train.parquet").write_bytes(parquet(rows))
    records = read_records(tmp_path / "train.parquet")
    found = [r.turns[1].extra["tool_calls"][0]["function"] for r in records]
    assert [f["arguments"] for f in found] == [{"x": 1}, {"y": 2}]


def test_parquet_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'manifold-lora\[parquet\]'"):
        read_records(tmp_path / "train.parquet")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,text\na,b\n", "the first row must name the columns, each once"),
        ("a.csv", "text,\na,b\n", "the first row must name the columns"),
        (
            "a.csv",
            "text,id\na\n",
            "a.csv:2: the row has 1 cells and the first row name",
        ),
        ("a.tsv", "text\tid\na\tb\tc\n", "a.tsv:2: the row has 3 cells"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv:3: not csv: unexpected end of data"),
        ("a.csv", 'text\n"b"c\n', "a.csv:2: not csv: ',' expected after"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "the key text occurs twice"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON: nested too deeply"),
        ("a.json", "[" * 100_000, "not JSON: nested too deeply"),
        ("a.jsonl", f'{{"text": {"1" * 5000}}}', "not JSON: Exceeds the limit"),
        ("a.json", f'{{"text": {"1" * 5000}}}', "not JSON: Exceeds the limit"),
        ("a.parquet", "PAR1", "cannot be read as Parquet"),
        ("a" * 300 + ".json", None, "cannot be read: File name too long"),
    ],
)
def test_a_broken_file_raises(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / name)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert read_records("~/a.jsonl")[0].completion == "a"
    with pytest.raises(InputError, match="~nobody-here/a.jsonl does not exist"):
        read_records("~nobody-here/a.jsonl")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train.jsonl"], [["train.jsonl"], [], []]),
        (
            ["Train.csv", "validation.json", "test.parquet", "README.md", "other.json"],
            [["Train.csv"], ["validation.json"], ["test.parquet"]],
        ),
        (
            [f"train-0000{i}-of-00002.parquet" for i in range(2)] + ["dev.tsv"],
            [[f"train-0000{i}-of-00002.parquet" for i in range(2)], ["dev.tsv"], []],
        ),
        (["training.ndjson", "trained.json"], [["training.ndjson"], [], []]),
    ],
)
def test_parts_of_a_directory(
    tmp_path: Path, names: list[str], parts: list[list[str]]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert [[f.name for f in part] for part in find_files([tmp_path])] == parts


def test_files_and_directories_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").touch()
        (tmp_path / name / "valid.json").touch()
    file = tmp_path / "c.json"
    found = find_files([tmp_path / "a", file, tmp_path / "b"])
    assert found.train == [tmp_path / "a/train.json", file, tmp_path / "b/train.json"]
    assert found.valid == [tmp_path / "a/valid.json", tmp_path / "b/valid.json"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no file to train on.*it holds nothing"),
        (["data.json", "notes"], "no file to train on.*it holds data.json, notes"),
        (
            ["train.json", "train.csv"],
            "several files for one part.*train.csv, train.js",
        ),
        (["train.json", "dev.json", "val.json"], "several files.*dev.json, val.json"),
    ],
)
def test_a_directory_that_is_not_clear_raises(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        find_files([tmp_path])


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A kind of file, and a valid or invalid content of it with some bytes changed."""
    suffix = draw(st.sampled_from(SUFFIXES))
    data = bytearray(draw(st.binary(max_size=60)))
    if draw(st.booleans()):
        rows = [{"text": "a", "id": "1"}, {"text": "b", "id": "2"}]
        made = {
            ".parquet": lambda: parquet(rows),
            ".csv": lambda: table(rows),
            ".tsv": lambda: table(rows, "\t"),
        }
        lines = "\n".join(map(json.dumps, rows)).encode()
        data = bytearray(made.get(suffix, lambda: lines)())
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(data) - 1))
            size = draw(st.integers(0, 3))
            data[at : at + size] = draw(st.binary(max_size=3))
    return suffix, bytes(data)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(mutated())
def test_any_bytes_are_records_or_refused(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[str, bytes]
) -> None:
    suffix, data = made
    file = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    file.write_bytes(data)
    try:
        assert read_records(file)
    except InputError as error:
        assert str(file) in str(error)
