"""The E2E protocol: sentences against sacrebleu's own scores."""

import json
from pathlib import Path

import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.configuration.parts import BaseConfig
from manifold_lora.evaluation.config import EvaluateConfig
from manifold_lora.evaluation.e2e import read_e2e
from manifold_lora.evaluation.systems import System
from tests.smollm2 import SHARED
from tests.tiny import model_directory

LINES = """\
name : Alimentum | area : city centre||There is a place in the city centre , Alimentum .
name : Alimentum | area : city centre||Alimentum is located in the city centre .
name : Wildwood | food : English||Wildwood serves English food .

name : Blue Spice | near : Ranch||Near Ranch there is a pub called Blue Spice .
name : Blue Spice | near : Ranch||The Blue Spice is near Ranch .
"""
GOOD = [
    "Alimentum is a place in the city centre .",
    "Wildwood serves food .",
    "Blue Spice is near Ranch .",
]
BAD = ["A place .", "It serves English food in the city .", "Blue is near ."]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "valid.txt").write_text(LINES)
    return tmp_path / "valid.txt"


def test_references_are_those_of_one_meaning(file: Path):
    found = read_e2e(file)
    assert [len(sentences) for sentences in found.values()] == [2, 1, 2]
    file.write_text("name : Alimentum\n")
    with pytest.raises(ml.InputError, match=r"valid.txt:1: needs a meaning"):
        read_e2e(file)
    shared = SHARED / "data" / "e2e" / "valid.txt"
    if shared.is_file():
        found = read_e2e(shared)
        assert (len(found), sum(map(len, found.values()))) == (547, 4672)


def test_scores_are_those_of_sacrebleu(file: Path, tmp_path: Path, monkeypatch):
    sacrebleu = pytest.importorskip("sacrebleu")
    path = model_directory(tmp_path / "model")
    said = {"base": BAD, "adapter": GOOD}
    system = "base"

    def generate(self, prompts, batch_size, **options):
        assert options == {"max_new_tokens": 64, "num_beams": 4} and batch_size == 8
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        assert all(text.endswith("||") for text in texts)
        order = [n for t in texts for n, m in enumerate(read_e2e(file)) if t[:-2] in m]
        sentences = [f" {said[system][n]}\nAnd so on" for n in order]
        return [self.tokenizer(text)["input_ids"] for text in sentences]

    monkeypatch.setattr(System, "generate", generate)
    out = tmp_path / "out"
    given = {"model": BaseConfig(path), "data": (file,), "protocol": "e2e"}
    base = ml.evaluate(EvaluateConfig(**given, out=out))
    rows = [json.loads(x) for x in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(row["sentence"] for row in rows) == sorted(BAD)
    system = "adapter"
    model = ml.load_llama(path)
    ml.attach(model, ml.AdapterConfig("lora", rank=2))
    ml.save_adapter(model, tmp_path / "adapter")
    both = ml.evaluate(
        EvaluateConfig(**given, out=out, adapters=(tmp_path / "adapter",))
    )
    references = list(read_e2e(file).values())
    columns = [[r[n] if n < len(r) else None for r in references] for n in range(2)]
    name, task = str(tmp_path / "adapter"), file.name
    for measure, score in (
        ("BLEU", sacrebleu.corpus_bleu),
        ("chrF", sacrebleu.corpus_chrf),
    ):
        before, after = (score(texts, columns).score for texts in (BAD, GOOD))
        assert base["systems"]["base"]["tasks"][task][measure] == pytest.approx(before)
        assert both["systems"][name]["tasks"][task][measure] == pytest.approx(after)
        change = both["differences"]["of"][name][task][measure]
        assert change["value"] == pytest.approx(after - before)
        assert np.isfinite(change["low"]) and change["low"] < change["high"]


def test_sacrebleu_is_asked_for(file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.bleu", None)
    config = EvaluateConfig(
        model=BaseConfig(model_directory(tmp_path / "model")),
        data=(file,),
        protocol="e2e",
    )
    with pytest.raises(ml.InputError, match=r"pip install 'manifold-lora\[evaluate\]'"):
        ml.evaluate(config)
