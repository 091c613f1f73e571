"""Every method agrees with PEFT and transformers: logits, and gradients of DoRA."""

# peft is in the extra `hf` only
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifold_lora as ml
from manifold_lora.adapters import AdapterConfig, adapters, attach, split
from manifold_lora.adapters.exported import as_exported
from manifold_lora.adapters.options import inits
from manifold_lora.checkpoints.adapter_writer import Format
from manifold_lora.checkpoints.huggingface import load_llama, save_llama
from manifold_lora.checkpoints.peft import load_adapter, save_adapter
from manifold_lora.methods import METHODS
from tests import adapters as tiny
from tests.adapters.cases import CASES, FEW, config
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

EXPORTED = {
    **{
        case: config(case, targets=FEW)
        for case in CASES
        if not case.endswith("diagonal_scaling=True")
    },
    # a correction of twice the rank, with the other scale
    **{
        f"{init}-rslora": config(f"lora-{init}", targets=FEW, rslora=True)
        for init in ("pissa", "olora")
    },
    # layers of ranks 4, 1 and 0
    **{
        f"{method}-layers": AdapterConfig(
            method,
            rank=1,
            alpha=3,
            rslora=method in ("stella", "dora"),
            targets=r"model\.layers\.[01]\.(self_attn\.[qv]|mlp\.down)_proj",
            rank_pattern={r"layers\.0\..*": 4, r"1\.mlp.down_proj": 3},
            alpha_pattern={r"layers\.1\.self_attn\..*": 2.5},
        )
        for method in METHODS
    },
    "pissa-layers": config(
        "lora-pissa", targets="q_proj", rank_pattern={r"layers\.0\..*": 3}
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_directory(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("format", FORMATS)
def test_peft_reads_every_method(name: str, format: Format, base: Path, tmp_path: Path):
    from peft import PeftModel

    model = load_llama(base)
    model.remat = "none"
    attach(model, EXPORTED[name])
    got = tiny.logits(tiny.randomize(model))
    assert tiny.error(got, tiny.logits(load_llama(base))) > 0.1
    save_adapter(model, tmp_path / "adapter", base_id=str(base), format=format)
    peft_model = PeftModel.from_pretrained(
        load_transformers(base), tmp_path / "adapter"
    ).eval()
    # every tensor of the file belongs to a module and vice versa
    layers = [n for n, m in peft_model.named_modules() if hasattr(m, "lora_A")]
    assert len(layers) == sum(r > 0 for m in adapters(model).values() for r in m.ranks)
    assert tiny.error(got, transformers_logits(peft_model)) < LOGITS
    assert tiny.error(got, transformers_logits(peft_model.merge_and_unload())) < LOGITS


def test_peft_switches_between_adapters(base: Path, tmp_path: Path):
    """Hot swap: of two adapters loaded by name, of other ranks and targets."""
    from peft import PeftModel

    needed = {}
    for name, case, options in (
        ("one", "stella-random", {"rank": 3, "targets": ["q_proj", "up_proj"]}),
        ("two", "stiefel-random", {"targets": FEW, "rslora": True}),
    ):
        attach(model := load_llama(base), config(case, **options))
        needed[name] = tiny.logits(tiny.randomize(model))
        save_adapter(model, tmp_path / name, base_id=str(base))
    peft_model = PeftModel.from_pretrained(
        load_transformers(base), tmp_path / "one", adapter_name="one"
    ).eval()
    peft_model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    assert tiny.error(needed["one"], needed["two"]) > 0.1
    for name in ("two", "one", "two"):
        peft_model.set_adapter(name)
        assert tiny.error(needed[name], transformers_logits(peft_model)) < LOGITS, name


@pytest.mark.parametrize(
    ("case", "exact"), [("stella-random", True), ("dora-kaiming", False)]
)
def test_transformers_loads_an_adapter(
    case: str, exact: bool, base: Path, tmp_path: Path
):
    """Unlike PEFT it drops the lengths of DoRA, which docs/loaders.md says."""
    attach(model := load_llama(base), config(case, targets=FEW, rslora=True))
    save_adapter(tiny.randomize(model), tmp_path / "a", base_id=str(base))
    theirs = load_transformers(base)
    theirs.load_adapter(str(tmp_path / "a"))
    error = tiny.error(tiny.logits(model), transformers_logits(theirs))
    assert error < LOGITS if exact else error > 0.01


def test_peft_reads_a_truncated_adapter(base: Path, tmp_path: Path):
    from peft import PeftModel

    attach(model := load_llama(base), AdapterConfig("loram_br", rank=4, targets=FEW))
    tiny.randomize(model)
    with as_exported(model, truncate_below=0.9):
        got = tiny.logits(model)
        ranks = {r for m in adapters(model).values() for r in m.ranks}
        save_adapter(model, tmp_path / "a")
    assert len(ranks) > 1
    peft_model = PeftModel.from_pretrained(
        load_transformers(base), tmp_path / "a"
    ).eval()
    assert tiny.error(got, transformers_logits(peft_model)) < LOGITS


MERGED = [f"{method}-{inits(method)[0]}" for method in METHODS]
MERGED += [case for case in CASES if case.endswith("diagonal_scaling=True")]


@pytest.mark.parametrize("case", MERGED)
def test_transformers_reads_the_merged_model(case: str, base: Path, tmp_path: Path):
    model = load_llama(base)
    model.remat = "none"
    attach(model, config(case, targets=FEW))
    got = tiny.logits(tiny.randomize(model))
    ml.merge(model)
    save_llama(model, tmp_path / "merged")
    assert (
        tiny.error(got, transformers_logits(load_transformers(tmp_path / "merged")))
        < LOGITS
    )


def test_we_read_the_dora_of_peft(base: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "target_modules": FEW,
        "r": 2,
        "lora_alpha": 3,
        "use_dora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 4},
    }
    model = get_peft_model(
        load_transformers(base), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape))
    model.save_pretrained(str(tmp_path / "peft"))
    needed = transformers_logits(model.eval())
    load_adapter(ours := load_llama(base), tmp_path / "peft")
    assert {m.config.method for m in adapters(ours).values()} == {"dora"}
    assert adapters(ours)["self_attn.q_proj"].ranks == (2, 4, 2)
    assert tiny.error(tiny.logits(ours), needed) < LOGITS
    # and back
    from peft import PeftModel

    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(load_transformers(base), tmp_path / "ours").eval()
    assert tiny.error(transformers_logits(again), needed) < LOGITS


def test_gradients_of_dora_are_those_of_peft(base: Path, tmp_path: Path):
    from peft import PeftModel

    model = load_llama(base)
    model.remat = "none"
    attach(model, config("dora-kaiming", targets=FEW))
    # of B itself, which does not contain the scale
    save_adapter(tiny.randomize(model), tmp_path / "a", format="peft")
    weights = np.random.default_rng(3).normal(size=(*tiny.IDS.shape, 61)) / 10
    rebuild, factors, frozen = split(model)

    @jax.jit
    def gradient(factors: Any, frozen: Any) -> Any:
        def loss(factors: Any) -> jax.Array:
            return jnp.sum(rebuild(factors, frozen)(jnp.asarray(tiny.IDS)) * weights)

        return jax.grad(loss)(factors)

    got = gradient(factors, frozen)["layers"]
    peft_model = PeftModel.from_pretrained(
        load_transformers(base), tmp_path / "a", is_trainable=True
    ).eval()
    logits = peft_model(torch.tensor(tiny.IDS)).logits
    (logits * torch.tensor(weights, dtype=torch.float32)).sum().backward()
    ends = {"a": "lora_A.default", "b": "lora_B.default"}
    ends |= {"m": "lora_magnitude_vector.default"}
    modules = dict(peft_model.named_modules())
    for part, names in got.items():
        for name, one in names.items():
            for n in range(tiny.LAYERS):
                for factor, end in ends.items():
                    full = f"base_model.model.model.layers.{n}.{part}.{name}.{end}"
                    needed = modules[full].weight.grad.numpy()
                    needed = needed.T if factor == "a" else needed
                    size = max(1.0, float(np.abs(needed).max()))
                    assert np.abs(needed).max() > 0.01, full
                    assert tiny.error(one[factor][n], needed) < LOGITS * size, full
