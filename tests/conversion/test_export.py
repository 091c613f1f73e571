"""The command `export`: what it reports and writes, and what it refuses."""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters
from manifold_lora.checkpoints.card import CARD
from manifold_lora.checkpoints.peft import save_adapter
from manifold_lora.cli.main import main
from manifold_lora.conversion import formats
from manifold_lora.conversion.export import export
from manifold_lora.conversion.export_config import ExportConfig
from manifold_lora.errors import InputError
from tests import adapters as tiny
from tests.checkpoints.peft_files import (
    CONFIG,
    EXTRA,
    VARIED,
    WEIGHTS,
    attached,
    pairs,
    read,
    same,
    write,
)
from tests.tolerances import LOGITS

SOME_LAYERS = AdapterConfig("lora", rank=2, targets=r"model\.layers\.1\..*_proj")


def saved(path: Path, config: AdapterConfig = VARIED) -> Path:
    save_adapter(attached(config), path, base_id="org/base")
    return path


def exported(adapter: Path, format: Any, out: Path, **options: Any) -> dict[str, Any]:
    return export(ExportConfig(adapter=adapter, format=format, out=out, **options))


def refused(adapter: Path, format: Any, out: Path, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        exported(adapter, format, out, **options)
    assert [word for word in words if word not in str(caught.value)] == []
    assert not (out.exists() and out.name == "out")


@pytest.mark.parametrize("format", ["portable", "peft", "mlx", "gguf-lora"])
def test_logits_of_what_is_read_back(format: str, base: Path, tmp_path: Path):
    adapter = saved(tmp_path / "a")
    result = exported(adapter, format, tmp_path / "out", model=base)
    assert result["modules"] == 12 and result["rank"] == 3
    assert result["largest_update_difference"] < 1e-7
    assert result["largest_logit"] > 1
    assert result["largest_logit_difference"] < LOGITS


def test_metadata_of_a_single_file(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A card beside it would be one of all that is in its directory."""
    adapter, out = saved(tmp_path / "a"), tmp_path / "out" / "a.gguf"
    exported(adapter, "gguf-lora", out, model=heads, license="mit")
    assert os.listdir(out.parent) == ["a.gguf"]
    fields = GGUFReader(out).fields
    assert fields["general.license"].contents() == "mit"
    assert fields["general.base_model.count"].contents() == 1
    assert fields["general.base_model.0.name"].contents() == "org/base"
    shown = "".join(capsys.readouterr().out.split())
    assert shown.endswith(f"llama-cli-mBASE.gguf--lora{out}")


@pytest.mark.parametrize("way", [("portable", "peft"), ("peft", "portable")])
def test_both_forms_of_peft_become_each_other(way: Any, tmp_path: Path):
    """Exported files are those that saving in that format gives, and can be trained."""
    save_adapter(model := attached(VARIED), tmp_path / "a", format=way[0])
    exported(tmp_path / "a", way[1], tmp_path / "out", base_id="org/other")
    ml.load_adapter(again := tiny.base(), tmp_path / "out")
    same(ml.factors(again), ml.factors(model))
    one, other = (next(iter(adapters(m).values())).config for m in (model, again))
    assert one == other
    save_adapter(model, tmp_path / "b", format=way[1], base_id="org/other")
    files = sorted(os.listdir(tmp_path / "b"))
    assert sorted(os.listdir(tmp_path / "out")) == files
    for file in files:
        got, needed = ((tmp_path / x / file).read_bytes() for x in ("out", "b"))
        assert got == needed, file


def test_an_adapter_of_peft(tmp_path: Path):
    """It gets no settings of this library, and keeps its dropout and base."""
    matrices = pairs({"self_attn.q_proj": 2, "mlp.up_proj": 2})
    more = {"use_rslora": True, "lora_dropout": 0.5, "base_model_name_or_path": "x/y"}
    path = write(tmp_path / "a", matrices, **more)
    exported(path, "portable", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted([CARD, CONFIG, WEIGHTS])
    config = read(tmp_path / "out" / CONFIG)
    assert config["lora_alpha"] == config["r"] == 2 and "use_rslora" not in config
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.5, "x/y")
    ml.load_adapter(one := tiny.base(), path)
    ml.load_adapter(other := tiny.base(), tmp_path / "out")
    assert tiny.error(tiny.logits(one), tiny.logits(other)) < LOGITS


@pytest.mark.parametrize("format", ["portable", "peft"])
def test_an_adapter_of_ours_of_an_unknown_base(format: Any, tmp_path: Path):
    """What another tool's became here stays what it is, and can be trained."""
    path = write(tmp_path / "a", pairs({"self_attn.q_proj": 2}))
    ml.convert_adapter(
        ml.ConvertConfig(adapter=path, method="stella", out=tmp_path / "b")
    )
    exported(tmp_path / "b", format, tmp_path / "out")
    assert "base" not in read(tmp_path / "out" / EXTRA)
    ml.load_adapter(one := tiny.base(), tmp_path / "b")
    ml.load_adapter(other := tiny.base(), tmp_path / "out")
    assert {a.config.method for a in adapters(other).values()} == {"stella"}
    same(ml.factors(other), ml.factors(one))


def test_a_run_stands_for_its_adapter(tmp_path: Path):
    saved(tmp_path / "run" / "adapter")
    assert exported(tmp_path / "run", "portable", tmp_path / "out")["modules"] == 12


@pytest.mark.parametrize(
    ("rank", "shown"),
    [(16, "NAME={out}\n"), (17, "--max-lora-rank 32\n"), (32, "--max-lora-rank 32\n")],
)
def test_how_to_serve_it(
    rank: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    saved(tmp_path / "a", AdapterConfig("lora", rank=rank, targets="q_proj"))
    monkeypatch.chdir(tmp_path)
    main(["export", "a", "--out", "o"])
    text = capsys.readouterr().out
    assert "Wrote o (portable, 3 modules" in text
    assert text.endswith(shown.format(out="o"))


def test_what_no_server_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "a", AdapterConfig("dora", rank=2, targets="q_proj"))
    exported(tmp_path / "a", "portable", tmp_path / "out")
    assert "have no DoRA: merge it" in " ".join(capsys.readouterr().out.split())
    assert "vllm serve" not in (tmp_path / "out" / CARD).read_text()


# Bad input


def test_formats_that_cannot_hold_it(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    dora = saved(tmp_path / "d", AdapterConfig("dora", rank=2))
    refused(dora, "gguf-lora", out, "no DoRA", "portable, peft, mlx, which can")
    refused(dora, "stella", out, "this is dora", "convert", "portable, peft, mlx")
    lora = saved(tmp_path / "l")
    refused(lora, "gguf-lora", out, "by heads", "--model", "portable, peft, mlx")
    some = saved(tmp_path / "s", SOME_LAYERS)
    refused(some, "mlx", out, "from the last one", "--model")
    exported(some, "mlx", out, model=base)
    assert read(out / CONFIG)["num_layers"] == 3


def test_an_output_that_exists(tmp_path: Path):
    adapter, there = saved(tmp_path / "a"), tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    refused(adapter, "peft", there, "exists: choose another, or add --overwrite")
    refused(adapter, "peft", there, "neither a model nor an adapter", overwrite=True)
    assert (there / "notes.txt").read_text() == "mine"
    refused(adapter, "peft", adapter, "would replace", overwrite=True)
    exported(adapter, "peft", tmp_path / "out")
    exported(adapter, "mlx", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out" / "adapters.safetensors").exists()


def test_a_file_that_exists(tmp_path: Path, base: Path):
    adapter, there = saved(tmp_path / "a"), tmp_path / "there"
    there.write_text("mine")
    refused(adapter, "gguf-lora", there, "add --overwrite", model=base)
    refused(adapter, "gguf-lora", there, "no GGUF file", overwrite=True, model=base)
    assert there.read_text() == "mine"
    out = tmp_path / "out.gguf"
    exported(adapter, "gguf-lora", out, model=base)
    written = out.read_bytes()
    out.write_bytes(written[:100])
    exported(adapter, "gguf-lora", out, model=base, overwrite=True)
    assert out.read_bytes() == written
    refused(adapter, "gguf-lora", tmp_path, "is no file", model=base)


def test_what_is_no_adapter(tmp_path: Path):
    out = tmp_path / "out"
    refused(tmp_path / "none", "peft", out, "does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "peft", out, "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "peft", out, f"has no {CONFIG}")


def test_modules_that_no_loader_would_find(tmp_path: Path):
    """vLLM checks the last part of a name only, and serves the base otherwise."""
    matrices = pairs({"self_attn.q_proj": 2})
    renamed = {full.replace("model.", "base."): x for full, x in matrices.items()}
    path = write(tmp_path / "a", renamed)
    refused(path, "peft", tmp_path / "out", "base.layers.0", "serve the base")


def test_an_adapter_of_another_model(base: Path, tmp_path: Path):
    matrices = pairs({"self_attn.q_proj": 2})
    wide = {full: (a.repeat(2, axis=1), b) for full, (a, b) in matrices.items()}
    path = write(tmp_path / "a", wide)
    words = [f"model.layers.{n}.self_attn.q_proj.lora_A" for n in range(3)]
    refused(path, "peft", tmp_path / "out", *words, "found (2, 64)", model=base)
    mine = saved(tmp_path / "b")
    settings = read(mine / EXTRA) | {"base": "2:0123456789abcdef"}
    (mine / EXTRA).write_text(json.dumps(settings))
    refused(mine, "peft", tmp_path / "out", "another base", model=base)


def test_what_reads_back_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = saved(tmp_path / "a")

    def damaged(path: Path, source: Any) -> Any:
        read = formats.read_peft(path)
        full = next(iter(read))
        return read | {full: read[full]._replace(scale=1.001 * read[full].scale)}

    changed = formats.FORMATS["peft"]._replace(read=damaged)
    monkeypatch.setitem(formats.FORMATS, "peft", changed)
    with pytest.raises(OSError, match="reads back with ΔW apart by 1.0e-03"):
        exported(adapter, "peft", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a"]


def test_without_the_package_of_llama_cpp(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **more)

    adapter = saved(tmp_path / "a")
    monkeypatch.setattr(builtins, "__import__", without)
    out = tmp_path / "out"
    refused(adapter, "gguf-lora", out, "pip install 'manifold-lora[gguf]'", model=heads)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["ADAPTER", "--out"]),
        (["a", "--out", "o", "--format", "gguf"], ["--format", "gguf-lora", "'gguf'"]),
        (["a", "--out", "o", "--formt", "mlx"], ["--formt", "--format"]),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert [word for word in words if word not in shown.err] == []
