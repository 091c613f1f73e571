import json
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_lora.data.records import Record, Turn, parse_record, read_records
from manifold_lora.errors import InputError

COMMONSENSE = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"
CHAT = (Turn("user", "Hi"), Turn("assistant", "Ho", trained=True))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ],
                "text": "messages win",
            },
            Record(CHAT),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                ]
            },
            Record((Turn("system", ""), *CHAT)),
        ),
        ({"prompt": "", "completion": " b"}, Record(prompt="", completion=" b")),
        (
            {
                "prompt": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "Hi"},
                ],
                "completion": [{"role": "assistant", "content": "Ho"}],
            },
            Record(
                (
                    Turn("user", "a"),
                    Turn("assistant", "b"),
                    Turn("user", "Hi"),
                    Turn("assistant", "Ho", trained=True),
                )
            ),
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Ho", "question": "q"},
            Record(
                CHAT,
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nHi\n\n"
                "### Response:\n",
                "Ho",
            ),
        ),
        (
            {"instruction": "Add {x}", "input": "1 2", "output": "3"},
            Record(
                (Turn("user", "Add {x}\n\n1 2"), Turn("assistant", "3", trained=True)),
                "Below is an instruction that describes a task, paired with an input "
                "that provides further context. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nAdd {x}\n\n"
                "### Input:\n1 2\n\n### Response:\n",
                "3",
            ),
        ),
        (
            {"question": "Hi", "answer": "Ho", "text": "not this"},
            Record(CHAT, "Question: Hi\nAnswer:", " Ho"),
        ),
        ({"messages": None, "text": "a"}, Record(completion="a")),
    ],
)
def test_each_format_is_detected(value: dict[str, object], expected: Record) -> None:
    assert parse_record(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must be an object, got list"),
        (
            {"prompt": "a", "respnse": "b"},
            "keys found: prompt, respnse; accepted: mess",
        ),
        ({}, "keys found: none"),
        ({"messages": "a"}, "messages must be a list of messages, got str"),
        ({"messages": ["a"]}, r"messages\[0\] must be an object, got str"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            r"messages\[0\].role is 'tool'; it must be one of: assistant, system, user",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "a"}]},
            r"conversations\[0\].from is \['human'\]",
        ),
        ({"messages": []}, "no answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "starts with an answer",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content must be a string, got NoneType",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": " "},
                ]
            },
            r"messages\[1\].content is empty",
        ),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": []}, "completion must be a string, got list"),
        ({"prompt": [], "completion": "a"}, "completion must be a list"),
        ({"question": "a", "answer": ["b"]}, "answer must be a string, got list"),
        ({"instruction": "a", "output": 3}, "output must be a string, got int"),
        ({"text": "cut \ud83d"}, "text contains half of a surrogate pair"),
    ],
)
def test_an_invalid_record_raises(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_record(value)


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
    assert lines[8:] == ["... and 12 more"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "no records"),
        ("blank.json", b" \n", "no records"),
        ("empty.json", b"[]", "no records"),
        ("train.csv", b"a,b", "must end in .jsonl, .ndjson or .json, got .csv"),
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
