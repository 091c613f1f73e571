"""The data of a run: what is held out, how rows are filled, and what the plan says."""

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed.mesh import make_mesh
from manifold_lora.errors import InputError
from manifold_lora.training.data import (
    describe_data,
    load_data,
    total_steps,
    training_batches,
)
from manifold_lora.training.display import show_plan
from manifold_lora.training.setup import load_model
from tests import smollm2
from tests.configs import train_config
from tests.tiny import CONFIG, data_file, model_directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(model_directory(tmp_path_factory.mktemp("model") / "m"))


def write(file: Path, sizes: list[int]) -> Path:
    """Texts of that many bytes; each is one token, beside BOS and EOS."""
    lines = [json.dumps({"text": chr(97 + i % 26) * n}) for i, n in enumerate(sizes)]
    file.write_text("\n".join(lines))
    return file


def texts(examples: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in examples]


def test_only_the_seed_of_the_split_moves_the_held_out_examples(
    tmp_path: Path, tokenizer: Any
) -> None:
    file = data_file(tmp_path / "d.jsonl")
    held_out = {}
    for seed, split_seed in [(0, 0), (1, 0), (0, 1)]:
        config = train_config(data=file, seed=seed, split_seed=split_seed)
        data = load_data(config, tokenizer)
        held_out[seed, split_seed] = texts(data.held_out, tokenizer)
        together = held_out[seed, split_seed] + texts(data.train, tokenizer)
        assert sorted(together) == sorted(
            f"{r['prompt']}{r['completion']}"
            for r in map(json.loads, file.read_text().splitlines())
        )
    assert held_out[0, 0] == held_out[1, 0] != held_out[0, 1]
    # those of the first numbers of NumPy's permutation
    chosen = sorted(np.random.default_rng(0).permutation(40)[:4].tolist())
    assert [int(re.findall(r"\d+", text)[0]) for text in held_out[0, 0]] == chosen


def test_parts_of_directories_and_several_inputs(
    tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d/train.jsonl", [1, 2])
    write(tmp_path / "d/dev.jsonl", [3])
    other, extra = write(tmp_path / "o.jsonl", [4]), write(tmp_path / "e.jsonl", [5])

    def sizes(**settings: Any) -> list[list[int]]:
        data = load_data(train_config(**settings), tokenizer)
        parts = (data.train, data.held_out)
        return [[len(text) for text in texts(part, tokenizer)] for part in parts]

    paths = (tmp_path / "d", other)
    assert sizes(data=paths) == [[1, 2, 4], [3]]
    assert sizes(data=paths, eval_data=extra) == [[1, 2, 4], [5]]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (
            '{"prompt": "' + "a" * 600 + '", "completion": "b"}',
            "every example is longer",
        ),
        ('{"text": ""}', "text is empty"),
        ("", "no records"),
    ],
)
def test_errors_of_the_held_out_data_say_so(
    tmp_path: Path, tokenizer: Any, held_out: str, message: str
) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text(held_out)
    config = train_config(data=data_file(tmp_path / "d.jsonl"), eval_data=file)
    with pytest.raises(InputError, match=rf"the held-out data, .*e.jsonl: .*{message}"):
        load_data(config, tokenizer)
    (tmp_path / "v").mkdir()
    write(tmp_path / "v/train.jsonl", [1])
    (tmp_path / "v/valid.jsonl").write_text(held_out)
    with pytest.raises(InputError, match=rf"the held-out data, .*valid.*{message}"):
        load_data(train_config(data=tmp_path / "v"), tokenizer)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_of_epochs_trains_every_example_so_often(
    tmp_path: Path, tokenizer: Any, packing: bool, epochs: int
) -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 47).tolist()
    file = write(tmp_path / "d.jsonl", sizes)
    config = train_config(
        data=file, eval_data=file, epochs=epochs, packing=packing, batch_size=4
    )
    data = load_data(config, tokenizer)
    count = Counter[bytes]()
    steps = 0
    for batch in training_batches(config, data):
        steps += 1
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                count[ids[segments == segment].tobytes()] += 1
    needed = Counter(example.input_ids.tobytes() for example in data.train)
    assert count == {key: number * epochs for key, number in needed.items()}
    assert steps == total_steps(config, data)


def test_steps_go_beyond_the_last_epoch(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "d.jsonl", [3] * 12)
    config = train_config(data=file, steps=40, batch_size=4)
    stream = iter(training_batches(config, load_data(config, tokenizer)))
    assert all(next(stream)["segment_ids"][:, 0].all() for _ in range(40))


def test_rows_are_packed_where_it_pays(tmp_path: Path, tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    varied, equal = rng.geometric(0.05, 2000).tolist(), [30] * 2000

    def packed(sizes: list[int], **settings: Any) -> bool:
        shape = {"batch_size": 4, "sequence_length": 64} | settings
        file = write(tmp_path / "d.jsonl", sizes)
        config = train_config(data=file, eval_data=file, **shape)
        data = load_data(config, tokenizer)
        tokens = size = 0
        for batch in training_batches(config, data):
            tokens += int((batch["segment_ids"] > 0).sum())
            size += batch["segment_ids"].size
        assert data.fill == pytest.approx(tokens / size, rel=0.02)
        return data.packing

    epoch = {"epochs": 1}
    assert packed(varied, **epoch)
    assert not packed(equal, **epoch)  # unpacked rows of 32 have 31 tokens
    assert not packed(varied[:500], **epoch)  # fewer than 50 steps an epoch
    assert packed(equal, packing=True, **epoch)
    assert not packed(varied, packing=False, **epoch)


def test_the_plan_says_what_is_done_with_the_data(
    tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "d.jsonl"
    records: list[dict[str, Any]] = [{"text": "a" * 28, "id": i} for i in range(20)]
    records += [{"text": ""}, {"text": "", "id": 3}, {"text": "a", "label": 1}]
    records += [{"prompt": "a" * 40, "completion": "b"}, {"text": "c" * 70}]
    file.write_text("\n".join(map(json.dumps, records)))
    held_out = write(tmp_path / "e.jsonl", [1])
    config = train_config(
        data=file, eval_data=held_out, skip_invalid=True, sequence_length=32
    )
    data = load_data(config, tokenizer)
    rows = describe_data(config, data)
    # 20 rows of 29, a row truncated to 32, and a text of 71 in rows of 32, 32 and 7
    assert rows["data"] == f"{file}: 24 examples, 1 held out"
    assert rows["tokens"] == "683, of them 630 trained"
    assert rows["batch"] == "16 rows of 32, unpacked"
    assert rows["tokens per step"] == "512, padding included"
    assert rows["padding"] == "33% of the tokens (unpacked: rows 67% full)"
    assert rows["truncated"] == "1 examples truncated to 32 tokens (longest 71)"
    assert rows["split"] == "1 texts split into rows of 32 tokens (longest 71)"
    assert rows["ignored keys"] == "id (20)"
    left_out = rows["records left out"].splitlines()
    assert left_out[0] == "3"
    assert left_out[1] == f"text is empty: {file}:21, {file}:22"
    assert left_out[2].startswith("label is not understood beside text: it marks")
    assert left_out[2].endswith(f": {file}:23")
    packed = train_config(data=file, skip_invalid=True, packing=True, epochs=1)
    text = describe_data(packed, load_data(packed, tokenizer))["padding"]
    assert re.fullmatch(r"\d+% of .* \(packed: rows \d+% full, \d+% unpacked\)", text)


def test_the_setting_of_several_files(tmp_path: Path) -> None:
    assert train_config(data="a.jsonl").data.paths == (Path("a.jsonl"),)
    assert train_config(data=Path("a")).data.paths == (Path("a"),)
    assert train_config(data=["a", "b"]).data.paths == (Path("a"), Path("b"))


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_tenth_of_the_tokens_of_commonsense_records_is_padding_at_most() -> None:
    tasks = ("ARC-Challenge", "ARC-Easy", "openbookqa")
    files = [smollm2.commonsense() / task / "train.json" for task in tasks]
    config = train_config(data=files, epochs=1)
    data = load_data(config, load_tokenizer(smollm2.directory()))
    tokens = size = 0
    for batch in training_batches(config, data):
        tokens += int((batch["segment_ids"] > 0).sum())
        size += batch["segment_ids"].size
    assert tokens == data.report.tokens
    assert data.packing and 1 - tokens / size < 0.1


def test_the_plan_warns_of_sequences_longer_than_the_model_knows(tmp_path: Path):
    config = dataclasses.replace(CONFIG, max_position_embeddings=8)
    path = model_directory(tmp_path / "m", config=config)
    record = {"prompt": "1234567", "completion": "8"}
    (tmp_path / "d.jsonl").write_text((json.dumps(record) + "\n") * 8)
    run = train_config(model=str(path), data=[str(tmp_path / "d.jsonl")], method="lora")
    data, model = load_data(run, load_tokenizer(path)), load_model(run)
    text = io.StringIO()
    show_plan(Console(file=text, width=200), run, model, data, 1, make_mesh(None))
    # seven bytes of the prompt, one of the answer, and the end
    assert "sequences of 9 tokens are longer than any" in text.getvalue()
    assert "(max_position_embeddings 8)" in text.getvalue()
