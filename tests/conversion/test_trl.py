"""TRL's trainer continues from an exported adapter."""

# trl and peft are in the extra `hf` only
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import manifold_lora as ml
from manifold_lora.checkpoints.adapter_file import read_adapter
from manifold_lora.checkpoints.huggingface import load_llama
from tests import adapters as tiny
from tests.checkpoints.transformers_reference import load_transformers
from tests.conversion.cases import adapter, model_directory
from tests.tiny import model_directory as with_tokenizer
from tests.tolerances import FLOAT32, LOGITS

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.hf,
    # TRL 1.16 and peft 0.21 ask transformers 5 for these
    pytest.mark.filterwarnings(
        "ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"
    ),
]


@pytest.mark.parametrize("method", ["stiefel-random", "dora-kaiming"])
@pytest.mark.parametrize("format", ["portable", "peft"])
def test_it_continues_from_an_adapter(method: str, format: Any, tmp_path: Path):
    trl = pytest.importorskip("trl")
    import datasets
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = model_directory(tmp_path / "base")
    model = adapter(tmp_path / "a", method)
    given = tmp_path / "given"
    ml.export(
        ml.ExportConfig(
            adapter=tmp_path / "a", format=format, out=given, base_id=str(base)
        )
    )
    theirs = PeftModel.from_pretrained(
        load_transformers(base), str(given), is_trainable=True
    )
    ids = tiny.IDS.tolist()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(ids),
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=theirs,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
        processing_class=AutoTokenizer.from_pretrained(
            with_tokenizer(tmp_path / "tokenizer")
        ),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))

    # Its first loss is that of our model with the adapter.
    first = trainer.state.log_history[0]["loss"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        tiny.logits(model)[:, :-1], tiny.IDS[:, 1:]
    )
    assert first == pytest.approx(float(losses.mean()), rel=FLOAT32)

    # What it saved is another adapter, and gives the same logits here.
    before, after = read_adapter(given), read_adapter(tmp_path / "out")
    for full, module in after.modules.items():
        for name in ("a", "b"):
            old = getattr(before.modules[full], name)
            assert np.abs(getattr(module, name) - old).max() > 1e-3
    ml.import_adapter(ml.ImportConfig(adapter=tmp_path / "out", out=tmp_path / "in"))
    ours = load_llama(base)
    ml.load_adapter(ours, tmp_path / "in")
    import torch

    with torch.no_grad():
        needed = trainer.model.eval()(torch.tensor(tiny.IDS)).logits.numpy()
    assert tiny.error(tiny.logits(ours), needed) < LOGITS
    assert tiny.error(tiny.logits(model), needed) > 10 * LOGITS
