"""Low-rank adapters on matrix manifolds, for JAX, Optax and LLaMA.

    import manifold_lora as ml
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), ml.riemannian(optax.adam(1e-3), manifolds)
    )

The names below are the public interface. Each is imported on first use, so that
`import manifold_lora` and `manifold-lora --help` stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manifold_lora.adapters import AdapterConfig as AdapterConfig
    from manifold_lora.adapters import attach as attach
    from manifold_lora.adapters import factors as factors
    from manifold_lora.adapters import manifold_tree as manifold_tree
    from manifold_lora.adapters import merge as merge
    from manifold_lora.adapters import set_factors as set_factors
    from manifold_lora.adapters import split as split
    from manifold_lora.checkpoints.huggingface import load_llama as load_llama
    from manifold_lora.checkpoints.huggingface import save_llama as save_llama
    from manifold_lora.checkpoints.peft import load_adapter as load_adapter
    from manifold_lora.checkpoints.peft import save_adapter as save_adapter
    from manifold_lora.comparison.compare import compare as compare
    from manifold_lora.comparison.config import CompareConfig as CompareConfig
    from manifold_lora.configuration.parts import BatchConfig as BatchConfig
    from manifold_lora.configuration.parts import CheckpointConfig as CheckpointConfig
    from manifold_lora.configuration.parts import DataConfig as DataConfig
    from manifold_lora.configuration.parts import EvaluationConfig as EvaluationConfig
    from manifold_lora.configuration.parts import LaunchConfig as LaunchConfig
    from manifold_lora.configuration.parts import ModelConfig as ModelConfig
    from manifold_lora.configuration.parts import OptimizerConfig as OptimizerConfig
    from manifold_lora.configuration.parts import OutputConfig as OutputConfig
    from manifold_lora.configuration.parts import ScheduleConfig as ScheduleConfig
    from manifold_lora.conversion.config import ConvertConfig as ConvertConfig
    from manifold_lora.conversion.config import ImportConfig as ImportConfig
    from manifold_lora.conversion.config import MergeConfig as MergeConfig
    from manifold_lora.conversion.convert import convert_adapter as convert_adapter
    from manifold_lora.conversion.export import export as export
    from manifold_lora.conversion.export_config import ExportConfig as ExportConfig
    from manifold_lora.conversion.importing import import_adapter as import_adapter
    from manifold_lora.conversion.merge import merge_files as merge_files
    from manifold_lora.data.batches import batches as batches
    from manifold_lora.data.records import read_records as read_records
    from manifold_lora.data.tokens import encode as encode
    from manifold_lora.data.tokens import load_tokenizer as load_tokenizer
    from manifold_lora.errors import InputError as InputError
    from manifold_lora.evaluation.config import EvaluateConfig as EvaluateConfig
    from manifold_lora.evaluation.evaluate import evaluate as evaluate
    from manifold_lora.generation.batched import generate_batches as generate_batches
    from manifold_lora.generation.command import GenerateConfig as GenerateConfig
    from manifold_lora.generation.command import generate_texts as generate_texts
    from manifold_lora.generation.config import GenerationConfig as GenerationConfig
    from manifold_lora.generation.generate import generate as generate
    from manifold_lora.inspection.inspect import inspect_adapter as inspect_adapter
    from manifold_lora.manifolds import BoundedRank as BoundedRank
    from manifold_lora.manifolds import Euclidean as Euclidean
    from manifold_lora.manifolds import FixedRank as FixedRank
    from manifold_lora.manifolds import Manifold as Manifold
    from manifold_lora.manifolds import Oblique as Oblique
    from manifold_lora.manifolds import Stiefel as Stiefel
    from manifold_lora.manifolds import truncate as truncate
    from manifold_lora.models import Llama as Llama
    from manifold_lora.models import LlamaConfig as LlamaConfig
    from manifold_lora.models.loss import token_loss as token_loss
    from manifold_lora.optimizers import NNX_LORA as NNX_LORA
    from manifold_lora.optimizers import QWIX_LORA as QWIX_LORA
    from manifold_lora.optimizers import FactorDims as FactorDims
    from manifold_lora.optimizers import FactorSpec as FactorSpec
    from manifold_lora.optimizers import FactorTree as FactorTree
    from manifold_lora.optimizers import landing as landing
    from manifold_lora.optimizers import landing_adamw as landing_adamw
    from manifold_lora.optimizers import lora_plus as lora_plus
    from manifold_lora.optimizers import loram as loram
    from manifold_lora.optimizers import riemannian as riemannian
    from manifold_lora.optimizers import scaled_gd as scaled_gd
    from manifold_lora.optimizers import stella as stella
    from manifold_lora.optimizers import stiefel_lora as stiefel_lora
    from manifold_lora.planning.config import PlanConfig as PlanConfig
    from manifold_lora.planning.plan import plan as plan
    from manifold_lora.training.config import TrainConfig as TrainConfig
    from manifold_lora.training.train import train as train

_HOMES = {
    "adapters": [
        "AdapterConfig",
        "attach",
        "factors",
        "manifold_tree",
        "merge",
        "set_factors",
        "split",
    ],
    "checkpoints.huggingface": ["load_llama", "save_llama"],
    "checkpoints.peft": ["load_adapter", "save_adapter"],
    "comparison.compare": ["compare"],
    "comparison.config": ["CompareConfig"],
    "configuration.parts": [
        "BatchConfig",
        "CheckpointConfig",
        "DataConfig",
        "EvaluationConfig",
        "LaunchConfig",
        "ModelConfig",
        "OptimizerConfig",
        "OutputConfig",
        "ScheduleConfig",
    ],
    "conversion.config": ["ConvertConfig", "ImportConfig", "MergeConfig"],
    "conversion.convert": ["convert_adapter"],
    "conversion.export": ["export"],
    "conversion.export_config": ["ExportConfig"],
    "conversion.importing": ["import_adapter"],
    "conversion.merge": ["merge_files"],
    "data.batches": ["batches"],
    "data.records": ["read_records"],
    "data.tokens": ["encode", "load_tokenizer"],
    "errors": ["InputError"],
    "evaluation.config": ["EvaluateConfig"],
    "evaluation.evaluate": ["evaluate"],
    "generation.batched": ["generate_batches"],
    "generation.command": ["GenerateConfig", "generate_texts"],
    "generation.config": ["GenerationConfig"],
    "generation.generate": ["generate"],
    "inspection.inspect": ["inspect_adapter"],
    "manifolds": [
        "BoundedRank",
        "Euclidean",
        "FixedRank",
        "Manifold",
        "Oblique",
        "Stiefel",
        "truncate",
    ],
    "models": ["Llama", "LlamaConfig"],
    "models.loss": ["token_loss"],
    "optimizers": [
        "FactorDims",
        "FactorSpec",
        "FactorTree",
        "NNX_LORA",
        "QWIX_LORA",
        "landing",
        "landing_adamw",
        "lora_plus",
        "loram",
        "riemannian",
        "scaled_gd",
        "stella",
        "stiefel_lora",
    ],
    "planning.config": ["PlanConfig"],
    "planning.plan": ["plan"],
    "training.config": ["TrainConfig"],
    "training.train": ["train"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "manifolds":  # a subpackage that needs no import of its own
        return importlib.import_module(f"{__name__}.manifolds")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME_OF[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
