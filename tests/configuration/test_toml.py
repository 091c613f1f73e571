"""Files of settings that are not what they should be."""

import pytest

from manifold_lora.configuration.flat import Source, compose, flatten, read_toml
from manifold_lora.errors import InputError
from manifold_lora.training.config import TrainConfig


def read(file):
    return compose(TrainConfig, read_toml(file, TrainConfig))


CONTENTS = [
    (b"rank = 1" + b"0" * 30, "rank must be at least 1, at most 65536, got 1000"),
    (b"rank = 1" + b"0" * 5000, "an integer has more than 4300 digits"),
    (b"learning_rate = inf", "learning_rate must be a positive number, at most"),
    (b"learning_rate = 1e999", "at most 1e18, got inf"),
    (b"learning_rate = nan", "must be a positive number, got nan"),
    (b"learning_rate = true", "must be a number, got True"),
    (b"rank = 1979-05-27", "rank must be an integer, got datetime.date(1979"),
    (b"method = 1979-05-27", "method must be text, got datetime.date(1979"),
    (b"model = 1979-05-27", "model must be a path, got datetime.date(1979"),
    (b"rank = 1\nrank = 2", "Cannot overwrite a value"),
    (b"rank = 1\n[adapter]\nrank = 2", "rank is given twice"),
    (b"[[adapter]]\nrank = 2", "adapter must be a path, got [{'rank': 2}]"),
    (b'adapter = "~no-such-user/a"', "the home of a user who does not exist"),
    (b'adapter = "a\\u0000"', "adapter must be a path without NUL characters"),
    (b'adapter = ""', "adapter must be a path, got an empty text"),
    (b'"a.b[0]" = 1', "unknown key 'a.b[0]'"),
    (b"x = " + b"[" * 10_000, "nested too deeply"),
    (b"x = " + b"{a=" * 10_000, "nested too deeply"),
    (b"\x89PNG\r\n\x1a\n\0\0", "not a text in UTF-8 (invalid start byte at byte 0"),
    ("rank = 1".encode("utf-16"), "not a text in UTF-8"),
    (b"rank = 1\0", "not valid TOML"),
    (b'model = "a\\u0000"', "model must be a path without NUL characters"),
    (b'out = ""', "out must be a path, got an empty text"),
]


@pytest.mark.parametrize(("content", "words"), CONTENTS, ids=range(len(CONTENTS)))
def test_unusable_content(tmp_path, content, words):
    file = tmp_path / "run[1].toml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(file)
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_a_byte_order_mark_and_an_empty_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("rank = 3", encoding="utf-8-sig")
    assert read(file).adapter.rank == 3
    file.write_text("")
    assert read(file) == TrainConfig()


def test_files_that_cannot_be_read(tmp_path):
    for path, words in {
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "none.toml": "cannot be read: No such file",
        tmp_path / ("a" * 300): "names have at most 255 bytes",
        tmp_path / "a\0": "without NUL characters",
    }.items():
        with pytest.raises(InputError) as caught:
            read(path)
        assert "--config" in str(caught.value) and words in str(caught.value)


def test_home_is_expanded_and_saved_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('model = "~/model"\neval_data = "~/a"')
    config = read("~/run.toml")
    assert flatten(config)["model"] == str(tmp_path / "model")
    assert config.data.eval_path == tmp_path / "a"
    flags = Source({"out": "~/run"}, from_text=True)
    assert compose(TrainConfig, flags).run_directory == tmp_path / "run"
