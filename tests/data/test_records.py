import json
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_lora.data.records import read_files, read_records
from manifold_lora.errors import InputError

COMMONSENSE = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"train{suffix}"
    # U+2028 is a line end to str.splitlines and an ordinary character to JSON.
    file.write_text('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}\n', encoding="utf-8")
    assert [r.completion for r in read_records(file)] == ["a\u2028b", "c"]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"data": x}])
def test_json(tmp_path: Path, wrap) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps(wrap([{"text": "a"}, {"text": "b"}]), indent=1))
    assert [r.completion for r in read_records(str(file))] == ["a", "b"]


def test_all_bad_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": }\n[]\n{"txt": "a"}\n')
    with pytest.raises(InputError) as caught:
        read_records(file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}:3: not JSON: Expecting value (column 10)"
    assert lines[1] == f"{file}:4: a record must be an object, got list"
    assert lines[2].startswith(f"{file}:5: unknown format: keys found: txt;")
    assert len(lines) == 3


def test_many_bad_records_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"text": "a"}, *[{"text": ""}] * 20]))
    with pytest.raises(InputError) as caught:
        read_records(file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file}, record 2: text is empty"
    assert lines[8:] == [
        "... and 12 more. Fix these records, or leave them out: --skip-invalid."
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "no records"),
        ("blank.json", b" \n", "no records"),
        ("empty.json", b"[]", "no records"),
        ("train.csv", b"a,b", "no records"),
        ("train.xlsx", b"a,b", "must end in .*csv.* or .parquet, got .xlsx"),
        ("train", b"{}", "got no suffix"),
        ("bad.json", b'[{"text": "a"},\n{"text"]', "not JSON: .*line 2"),
        ("latin.jsonl", b'{"text": "\xe9"}', "not UTF-8"),
        ("number.json", b"3", "record 1: a record must be an object, got int"),
    ],
)
def test_an_invalid_file_raises(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / name)


def test_a_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        read_records(tmp_path)


@pytest.mark.skipif(not COMMONSENSE.is_dir(), reason="needs ../shared/data/commonsense")
@pytest.mark.parametrize("name", ["ARC-Challenge", "boolq", "openbookqa"])
def test_commonsense_files(name: str) -> None:
    """Records have both `output` and `answer`; `output` is the completion."""
    file = COMMONSENSE / name / "train.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    records = read_records(file)
    assert [record.completion for record in records] == [r["output"] for r in raw]
    assert [record.turns[0].text for record in records] == [
        item["instruction"] for item in raw
    ]


def test_importing_the_subpackage_is_light() -> None:
    """grain and transformers take seconds to import, so only on first use."""
    code = (
        "import sys, manifold_lora.data.records, manifold_lora.data.tokens, "
        "manifold_lora.data.batches, manifold_lora.data.builtin; "
        "print({'grain', 'transformers', 'jax'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"


def test_records_know_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    locations = [record.location for record in read_records(file)]
    assert locations == [f"{file}:1", f"{file}:3"]


def test_invalid_records_are_left_out_and_reported(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines = ['{"text": "a", "id": 1}', '{"text": ""}', "{", '{"text": "b", "id": 2}']
    first.write_text("\n".join(lines))
    second.write_text('[{"text": "c", "source": "x"}, {"text": "d", "label": 0}]')
    read = read_files([first, second], skip_invalid=True)
    assert [record.completion for record in read.records] == ["a", "b", "c"]
    assert read.ignored_keys == {"id": 2, "source": 1}
    starts = [
        f"{first}:2: text is empty",
        f"{first}:3: not JSON: Expecting",
        f"{second}, record 2: label is not understood",
    ]
    for skipped, start in zip(read.skipped, starts, strict=True):
        assert skipped.startswith(start)
    with pytest.raises(InputError, match="a.jsonl:2: text is empty\n.*a.jsonl:3: not"):
        read_files([first, second])


def test_a_file_of_which_nothing_can_be_used_raises(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="text is empty"):
        read_files([file], skip_invalid=True)
