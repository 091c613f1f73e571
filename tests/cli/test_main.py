"""The command as a user meets it: help, exit codes and messages."""

import ast
import json
import signal
import subprocess
import sys

import pytest
import tomli_w

import manifold_lora as ml
from manifold_lora.cli.main import main
from tests.tiny import data_file, model_directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return model_directory(folder / "model"), data_file(folder / "train.jsonl")


def call(capsys, *arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    return code, " ".join(shown.out.split()), " ".join(shown.err.split())


HEAVY = {"transformers", "grain", "orbax", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "unused", "shown"),
    [
        (["--help"], HEAVY | {"jax", "flax", "optax"}, "Fine-tune a LLaMA"),
        (["train", "--help"], HEAVY, "--learning-rate"),
    ],
    ids=["commands", "train"],
)
def test_help_imports_little(arguments, unused, shown):
    code = (
        "import sys; from manifold_lora.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as stopped: code = stopped.code\n"
        f"print(code, sorted({unused} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("0 []")
    assert shown in done.stdout


def test_classes_of_flags_have_no_source_to_parse(capsys, monkeypatch):
    """Python 3.11 now and then fails to parse in a process with threads."""

    parsed, parse = [], ast.parse
    monkeypatch.setattr("ast.parse", lambda *a, **k: parsed.append(a) or parse(*a, **k))
    code, shown, _ = call(capsys, "train", "--help")
    assert code == 0 and "--rank" in shown and parsed == []


def test_the_options_of_import_are_called_so(capsys):
    code, shown, _ = call(capsys, "import", "--help")
    assert code == 0 and "import options" in shown and "import_" not in shown


@pytest.mark.parametrize("name", ["train", "compare", "plan"])
def test_help_is_grouped_and_shows_resolved_defaults(capsys, name):
    code, shown, _ = call(capsys, name, "--help")
    assert code == 0 and "None" not in shown
    for group in ("model", "adapter", "method", "optimizer", "batch"):
        assert f"{group} options" in shown
    words = [
        "(default: 2·rank)",
        "--remat {auto,none,dots,block,offload}",
        "S is a diagonal (stella)",
    ]
    if name != "plan":
        words += ["--packing, --no-packing", "for the built-in data 8"]
    if name == "train":
        words += ["5e-5, built-in base 1e-3 (loram_fr)"]
    assert [word for word in words if word not in shown] == []
    hidden = {
        "train": ["--topology", "--search-steps"],
        "compare": ["--method TEXT", "--learning-rate FLOAT", "--mesh", "--patience"],
        "plan": ["--steps", "--out-dir", "--learning-rate", "--project-on-export"],
    }
    assert [flag for flag in hidden[name] if flag in shown] == []


@pytest.mark.smoke
def test_flags_override_the_file_which_overrides_defaults(capsys, files, tmp_path):
    model, data = files
    settings = {"model": str(model), "data": str(data), "rank": 4, "steps": 2}
    settings |= {"targets": ["q_proj"], "batch_size": 4, "learning_rate": 0.3}
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(settings))
    out = tmp_path / "run"
    code, shown, _ = call(
        capsys, "train", "--config", file, "--learning-rate", "0.1", "--out", out
    )
    assert code == 0 and "Result" in shown
    import tomllib

    written = tomllib.loads((out / "config.toml").read_text())
    assert (written["rank"], written["learning_rate"], written["schedule"]) == (
        4,
        0.1,
        "linear",
    )
    code, shown, _ = call(
        capsys, "train", f"--config={file}", "--learning-rate", "0.1", "--out", out
    )
    assert code == 0 and "finished" in shown


def write(path, text):
    path.write_text(text)
    return path


def bad_inputs(folder, model, data):
    """Name, arguments and what the message must say."""
    record = {"prompt": "a", "completion": "b"}
    empty = folder / "empty"
    empty.mkdir()
    not_llama = folder / "mistral"
    not_llama.mkdir()
    write(not_llama / "config.json", json.dumps({"model_type": "mistral"}))
    write(not_llama / "tokenizer.json", (model / "tokenizer.json").read_text())
    no_tokenizer = folder / "no_tokenizer"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        (no_tokenizer / name).write_bytes((model / name).read_bytes())
    truncated = folder / "truncated"
    rope = folder / "rope"
    for directory in (truncated, rope):
        directory.mkdir()
        for source in model.iterdir():
            (directory / source.name).write_bytes(source.read_bytes())
    adapter = folder / "adapter"
    llama = ml.load_llama(model)
    ml.attach(llama, ml.AdapterConfig("stella", rank=4, targets="q_proj"))
    ml.save_adapter(llama, adapter)
    weights = (model / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
    write(rope / "config.json", json.dumps(config))
    bad_line = json.dumps(record) + "\n{broken\n"
    unknown = json.dumps({"foo": 1, "bar": 2}) + "\n"
    long = 2 * (json.dumps({"prompt": "a" * 90, "completion": "b" * 90}) + "\n")
    ok = ("--data", data)
    use = ("--model", model)
    return {
        "missing model": (("--model", folder / "none", *ok), "does not exist"),
        "empty model": (("--model", empty, *ok), "config.json"),
        "not a llama": (("--model", not_llama, *ok), "mistral"),
        "rope": (("--model", rope, *ok), "yarn"),
        "truncated": (("--model", truncated, *ok), "truncated"),
        "no tokenizer": (("--model", no_tokenizer, *ok), "tokenizer"),
        "no data": ((*use, "--data"), "--data needs at least one value"),
        "missing data": ((*use, "--data", folder / "none.jsonl"), "none.jsonl"),
        "empty data": ((*use, "--data", write(folder / "e.jsonl", "")), "e.jsonl"),
        "bad line": ((*use, "--data", write(folder / "b.jsonl", bad_line)), "2"),
        "unknown": (
            (*use, "--data", write(folder / "u.jsonl", unknown)),
            "foo",
        ),
        "too long": (
            (*use, "--data", write(folder / "l.jsonl", long), "--sequence-length", 8),
            "--sequence-length",
        ),
        "targets": ((*use, *ok, "--targets", "q_porj"), "Did you mean q_proj"),
        "rank": ((*use, *ok, "--rank", 999), "rank 999"),
        "method": ((*use, *ok, "--method", "stifel"), "Did you mean stiefel"),
        "option": (
            (*use, *ok, "--method", "lora", "--diagonal-s"),
            "diagonal_s goes with stella",
        ),
        "init": (
            (*use, *ok, "--init", "pissa"),
            "stiefel has random; pissa goes with lora",
        ),
        "renamed": ((*use, *ok, "--start", "pissa"), "--start is now called --init"),
        "no value": (
            (*use, *ok, "--packing", "True"),
            "--packing takes no value now; its opposite is --no-packing",
        ),
        "pairs": ((*use, *ok, "--rank-pattern", "q_proj"), "a value each"),
        "several": (
            (*use, *ok, "--rank", 0, "--dropout", "x", "--batch-size", 1.5),
            "--rank must be at least 1, got 0; --dropout must be a number, got 'x'; "
            "--batch-size must be an integer, got 1.5.",
        ),
        "fixed": (
            (*use, *ok, "--method", "stella", "--fixed-a", "random"),
            "method stella and fixed_a=random exclude each other",
        ),
        "no adapter": ((*use, *ok, "--adapter", empty), "adapter_config.json"),
        "other method": (
            (*use, *ok, "--method", "lora", "--adapter", adapter, "--rank", 4),
            "method: found stella, needed lora",
        ),
        "other rank": (
            (*use, *ok, "--method", "stella", "--adapter", adapter, "--rank", 8),
            "rank: found 4, needed 8",
        ),
        "key": (
            ("--config", write(folder / "c.toml", "lerning_rate = 1")),
            "Did you mean learning_rate",
        ),
        "flag": ((*use, *ok, "--lerning-rate", 1), "--learning-rate"),
        "rate": ((*use, *ok, "--learning-rate", -1), "--learning-rate"),
        "steps": ((*use, *ok, "--steps", 0), "--steps"),
        "dropout": ((*use, *ok, "--dropout", 1.5), "--dropout"),
        "type": ((*use, *ok, "--rank", "x"), "--rank"),
        "out is a file": ((*use, *ok, "--out", data), "is a file"),
    }


def test_bad_input_is_one_message_and_exit_code_2(capsys, files, tmp_path):
    wrong = {}
    for name, (arguments, message) in bad_inputs(tmp_path, *files).items():
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        code, _, error = call(capsys, "train", *arguments, *out)
        if code != 2 or message not in error or "Traceback" in error:
            wrong[name] = (code, error)
    assert wrong == {}
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(files):
    with pytest.raises(Exception, match="does not exist"):
        main(["train", "--model", "/nowhere", "--debug"])


def test_unknown_command(capsys):
    code, _, error = call(capsys, "trian")
    assert code == 2 and "train" in error


@pytest.mark.slow
def test_an_interruption_while_it_compiles_is_exit_code_130(files, tmp_path):
    model, data = files
    # A shell that runs the tests in the background has its children ignore SIGINT.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from manifold_lora.cli.main import main; main()"
    )
    arguments = ["train", "--model", model, "--data", data, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # The step is compiled after the first evaluation is shown.
    next(line for line in process.stdout if line.startswith("step 0"))
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in shown
    assert (tmp_path / "run" / "start" / "adapter_config.json").exists()
