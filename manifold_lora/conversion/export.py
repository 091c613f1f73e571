"""Export an adapter to the formats of other tools, each file read back and compared."""

import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from manifold_lora.checkpoints.adapter_file import adapter_directory, read_adapter
from manifold_lora.checkpoints.atomic import atomic_directory, atomic_file
from manifold_lora.checkpoints.card import CARD, Run, model_card, serving
from manifold_lora.checkpoints.huggingface import load_llama, read_llama_config
from manifold_lora.checkpoints.peft import (
    install_adapter,
    linear_sizes,
    load_adapter,
)
from manifold_lora.console import make_console, print_text
from manifold_lora.conversion import gguf_lora
from manifold_lora.conversion.export_config import ExportConfig
from manifold_lora.conversion.formats import FORMATS, Source, check_holds
from manifold_lora.conversion.updates import (
    Updates,
    as_adapter,
    probe_logits,
    relative_difference,
    updates,
)
from manifold_lora.conversion.write import check_output, check_output_file
from manifold_lora.decoding import read_json
from manifold_lora.errors import InputError
from manifold_lora.models import Llama

# Of the updates as they are read back: one rounding of every number to float32.
_TOLERANCE = 1e-6
_MODULE = r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"


def export(config: ExportConfig, console: Console | None = None) -> dict[str, Any]:
    """Write an adapter in the format of another tool.

    Needs neither the base nor a tokenizer. What was written is read back, and the
    update that the format's loaders compute of it compared with the adapter's.

    Args:
        config: what to export, and how.
        console: where it is reported.

    Returns:
        `out`, `format`, `rank`, the largest of all modules, `modules`, their number,
        `largest_update_difference`, relative to ΔW, and `largest_logit_difference` on
        a fixed batch of random tokens, and `largest_logit`, the largest of those; both
        None without the weights of the base.

    Raises:
        InputError: there is no adapter, it is not of this base, the format cannot hold
            it, or the output exists and may not be replaced.
        OSError: a file cannot be written, or reads back as something else.
    """
    console = console or make_console()
    assert config.adapter is not None and config.out is not None  # ExportConfig
    out, format = config.out, FORMATS[config.format]
    path = adapter_directory(config.adapter)
    source = _source(config, path)
    check_holds(config.format, source)
    if format.is_file:
        check_output_file(out, config.overwrite, gguf_lora.MAGIC)
    else:
        check_output(out, config.overwrite, [path])
    with console.status("Comparing logits", spinner="line"):  # ASCII
        probe = _Probe.of(config.model, path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (atomic_file if format.is_file else atomic_directory)(out) as partial:
        format.write(partial, source)
        read = format.read(partial, source)
        difference = relative_difference(updates(source.adapter), read)
        if not format.is_file:
            (partial / CARD).write_text(_card(config, path, source), encoding="utf-8")
        if not difference < _TOLERANCE:
            raise OSError(f"{out} reads back with ΔW apart by {difference:.1e}")
    result = {
        "out": str(out),
        "format": config.format,
        "rank": max(update.a.shape[0] for update in read.values()),
        "modules": len(read),
        "largest_update_difference": difference,
        "largest_logit_difference": probe.difference(read) if probe else None,
        "largest_logit": float(np.abs(probe.logits).max()) if probe else None,
    }
    _show(console, result, source)
    return result


def _card(config: ExportConfig, path: Path, source: Source) -> str:
    """The model card, with what is known of the run that has the adapter."""
    settings, summary = path.parent / "config.toml", path.parent / "summary.json"
    run = None
    if path.name == "adapter" and settings.is_file() and summary.is_file():
        run = Run(tomllib.loads(settings.read_text("utf-8")), read_json(summary))
    return model_card(
        source.adapter.config,
        source.peft["base_model_name_or_path"],
        max(module.rank for module in source.modules().values()),
        base_dtype=source.adapter.base_dtype,
        library=FORMATS[config.format].library,
        license=source.license,
        run=run,
    )


class _Probe(NamedTuple):
    """A base, and the logits of its adapter on a batch of random tokens."""

    base: Llama
    logits: np.ndarray

    @classmethod
    def of(cls, model: Path | None, adapter: Path) -> "_Probe | None":
        """None without the weights of a base."""
        if model is None or not any(model.glob("*.safetensors")):
            return None
        base = load_llama(model, jnp.float32, read_adapter(adapter).base_dtype)
        load_adapter(adapted := nnx.clone(base), adapter)
        return cls(base, probe_logits(adapted))

    def difference(self, read: Updates) -> float:
        """The largest difference of these logits from those of other updates."""
        install_adapter(self.base, as_adapter(read))
        return float(np.abs(probe_logits(self.base) - self.logits).max())


def _show(console: Console, result: dict[str, Any], source: Source) -> None:
    out, format, rank = result["out"], result["format"], result["rank"]
    modules = result["modules"]
    lines = [
        f"Wrote {out} ({format}, {modules} modules, rank {rank}).",
        f"Read back, ΔW differs by at most {result['largest_update_difference']:.1e} "
        "of its size.",
    ]
    if (logits := result["largest_logit_difference"]) is not None:
        lines.append(
            f"Logits of a probe batch differ by at most {logits:.1e}; the largest is "
            f"{result['largest_logit']:.3g}."
        )
    for line in [*lines, hint(format, out, rank, source)]:
        print_text(console, line)


def _source(config: ExportConfig, path: Path) -> Source:
    """The adapter, read and checked against the base where that is known."""
    model = None if config.model is None else read_llama_config(config.model)
    sizes = None
    if model is not None:
        sizes = linear_sizes(nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0))))
    adapter = read_adapter(path, sizes)
    strange = [full for full in adapter.modules if not re.fullmatch(_MODULE, full)]
    if strange:
        raise InputError(
            f"{path} adapts {', '.join(strange[:4])}{' …' * (len(strange) > 4)}, which "
            "LLaMA does not have: loaders would serve the base without a word. Rename "
            "the tensors to base_model.model.model.layers.N.self_attn.q_proj and so on."
        )
    peft = adapter.peft
    targets = peft["target_modules"]
    narrowed = (
        peft.get("exclude_modules") or peft.get("layers_to_transform") is not None
    )
    if not isinstance(targets, list) or narrowed:
        targets = list(adapter.modules)
    given = {
        "target_modules": targets,
        "base_model_name_or_path": config.base_id
        or peft.get("base_model_name_or_path"),
        "lora_dropout": adapter.config.dropout,
        "use_dora": adapter.config.options.export == "DoRA",
        "use_rslora": adapter.config.rslora,
    }
    return Source(adapter, given, model, config.license)


def hint(format: str, out: str, rank: int, source: Source) -> str:
    """How a loader of the format is called."""
    if format == "stella":
        return "Read it with the package of the method's authors."
    if format == "mlx":
        return f"Generate with: mlx_lm.generate --model BASE --adapter-path {out}"
    if format == "gguf-lora":
        return f"Run with: llama-cli -m BASE.gguf --lora {out}"
    return serving(rank, source.dora, out)
