"""Logits agree with Hugging Face's PEFT on the same adapter."""

# peft is in the extra `hf` only
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from manifold_lora.adapters import AdapterConfig, adapters, attach
from manifold_lora.checkpoints.adapter_writer import Format
from manifold_lora.checkpoints.huggingface import load_llama
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.checkpoints.peft_config import is_adapted
from manifold_lora.models import Llama
from tests import adapters as tiny
from tests.checkpoints.peft_files import FORMATS
from tests.checkpoints.transformers_reference import (
    base_directory,
    load_transformers,
    transformers_logits,
)
from tests.tolerances import LOGITS

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.hf,
    # peft 0.21 asks transformers 5 for it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

SUBSET = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_directory(tmp_path_factory.mktemp("base") / "model")


CASES = {
    "lora": AdapterConfig("lora", rank=2, alpha=5),
    "stiefel": AdapterConfig("stiefel", rank=2, alpha=5),
    "stiefel-rslora": AdapterConfig("stiefel", rank=3, alpha=5, rslora=True),
    "subset": AdapterConfig("stiefel", rank=4, targets=SUBSET, dropout=0.1),
    "expression": AdapterConfig("lora", rank=1, targets=r".*\.self_attn\.[kv]_proj"),
    "patterns": AdapterConfig(
        "stiefel",
        rank=2,
        alpha=3,
        rank_pattern={"q_proj": 4, "mlp.*": 6},
        alpha_pattern={"mlp.down_proj": 1.5, "self_attn.*": 8},
    ),
    "patterns-rslora": AdapterConfig(
        "lora",
        rank=2,
        alpha=3,
        rslora=True,
        targets=[*SUBSET, "up_proj"],
        rank_pattern={"up_proj": 4},
        alpha_pattern={".*(up|down)_proj": 2.5},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_peft_reads_what_we_save(name: str, format: Format, base: Path, tmp_path: Path):
    from peft import PeftModel

    model = load_llama(base)
    plain = tiny.logits(model)
    attach(model, CASES[name])
    got = tiny.logits(tiny.randomize(model))
    assert tiny.error(got, plain) > 0.1
    save_adapter(model, tmp_path / "adapter", base_id=str(base), format=format)

    peft_model = PeftModel.from_pretrained(
        load_transformers(base), tmp_path / "adapter"
    ).eval()
    # every tensor of the file reached a module, and every module has one
    layers = [n for n, m in peft_model.named_modules() if hasattr(m, "lora_A")]
    assert len(layers) == len(adapters(model)) * tiny.LAYERS
    assert tiny.error(got, transformers_logits(peft_model)) < LOGITS
    assert tiny.error(got, transformers_logits(peft_model.merge_and_unload())) < LOGITS


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 3},
    "rslora": {"target_modules": SUBSET, "r": 4, "lora_alpha": 2, "use_rslora": True},
    "dropout": {"target_modules": SUBSET, "r": 2, "lora_dropout": 0.3},
    "patterns": {
        "target_modules": "all-linear",
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"q_proj": 5, "mlp.*": 3},
        "alpha_pattern": {"(k|v)_proj": 6, "down_proj": 1},
    },
    "layers-differ": {
        "target_modules": SUBSET,
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        # the second key is met only where the first is not
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {r"layers\.[02]\.mlp\.down_proj": 6, "model.layers.0.*": 4},
    },
    "some-layers": {
        "target_modules": SUBSET,
        "r": 3,
        "lora_alpha": 4,
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    },
    "one-module": {"target_modules": ["model.layers.1.mlp.up_proj"], "r": 2},
    "excluded": {
        "target_modules": "all-linear",
        "exclude_modules": r".*\.2\.mlp\..*",
        "r": 2,
    },
    "orthogonal": {"target_modules": SUBSET, "r": 2, "init_lora_weights": "orthogonal"},
}


def peft_adapter(base: Path, path: Path, config: dict[str, Any]) -> Any:
    """A PEFT adapter with nonzero B, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load_transformers(base), LoraConfig(task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(path))
    return model.eval()


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_we_read_what_peft_saves(name: str, base: Path, tmp_path: Path):
    needed = transformers_logits(
        peft_adapter(base, tmp_path / "adapter", PEFT_CONFIGS[name])
    )
    model = load_llama(base)
    plain = tiny.logits(model)
    load_adapter(model, tmp_path / "adapter")
    got = tiny.logits(model)
    assert tiny.error(got, plain) > 0.05
    assert tiny.error(got, needed) < LOGITS


@pytest.mark.parametrize("name", ["patterns", "layers-differ", "some-layers"])
def test_round_trip_through_our_files(name: str, base: Path, tmp_path: Path):
    """An adapter of PEFT, loaded and saved here, is the same function in PEFT."""
    from peft import PeftModel

    peft_model = peft_adapter(base, tmp_path / "peft", PEFT_CONFIGS[name])
    needed = transformers_logits(peft_model)
    load_adapter(model := load_llama(base), tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(load_transformers(base), tmp_path / "ours").eval()
    assert tiny.error(transformers_logits(again), needed) < LOGITS


def test_an_adapter_in_bfloat16(base: Path, tmp_path: Path):
    model = peft_adapter(base, tmp_path / "a", PEFT_CONFIGS["plain"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.to(torch.float32)
    ours: Llama = load_llama(base, jnp.float32)
    load_adapter(ours, tmp_path / "b")
    assert tiny.error(tiny.logits(ours), transformers_logits(model)) < LOGITS


def test_an_initialisation_that_changed_its_base_is_another_function(
    base: Path, tmp_path: Path
):
    """Why `load_adapter` refuses them: PEFT takes B A out of the base as it loads."""
    from peft import PeftModel

    from manifold_lora.errors import InputError

    config = {"target_modules": SUBSET, "r": 2, "init_lora_weights": "olora"}
    peft_adapter(base, tmp_path / "a", config)
    model = PeftModel.from_pretrained(load_transformers(base), tmp_path / "a").eval()
    with pytest.raises(InputError, match="init_lora_weights='olora'"):
        load_adapter(load_llama(base), tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    written["init_lora_weights"] = True
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(written))
    load_adapter(ours := load_llama(base), tmp_path / "a")
    assert tiny.error(tiny.logits(ours), transformers_logits(model)) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.[02]\.self_attn\.[qk]_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [0],
         "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0],
         "layers_pattern": ["h", "blocks"]},
    ],
)  # fmt: skip
def test_peft_adapts_the_same_modules(settings: dict[str, Any]):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(**settings)
    names = [f"model.layers.{n}.{name}" for n in range(3) for name in tiny.SIZES]
    needed = [name for name in names if check_target_module_exists(config, name)]
    assert [name for name in names if is_adapted(settings, name)] == needed
