"""The model card of an adapter: README.md, with the metadata that the Hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from manifold_lora.adapters.config import AdapterConfig
from manifold_lora.settings import number

CARD = "README.md"
UNKNOWN = "unknown"  # as the Hub calls a licence that is not given
# The sizes that vLLM has for adapters, of which 16 is the default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MEASURES = {
    "loss": "loss per answer token",
    "accuracy": "token accuracy",
    "exact_match": "exact match",
}
_EXACT = (
    "It was trained on the base in {0}, in blocks of 64 inputs with a bfloat16 scale "
    "each, and is exact on that: load the base with `--base-dtype {0}`, or merge it "
    "with `manifold-lora merge`, which adds ΔW to the de-quantised base. On the base "
    "as it is in its files the outputs differ by what quantising takes away."
)
_SHOWN = ("steps", "epochs", "learning_rate", "batch_size", "sequence_length", "seed")


class Run(NamedTuple):
    """What the card says of the run that trained the adapter."""

    settings: Mapping[str, Any]  # as in config.toml
    summary: Mapping[str, Any]  # as in summary.json


def serving(rank: int, dora: bool, path: str) -> str:
    """How to serve an adapter with vLLM, or why that is not possible."""
    if dora:
        return "vLLM, SGLang and llama.cpp have no DoRA: merge it for them."
    size = next((size for size in VLLM_RANKS if size >= rank), None)
    if size is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}: merge it for that."
    more = f" --max-lora-rank {size}" if size > 16 else ""
    return f"vllm serve BASE --enable-lora --lora-modules NAME={path}{more}"


def model_card(
    config: AdapterConfig,
    base_id: str | None,
    rank: int,
    *,
    base_dtype: str | None = None,
    library: str = "peft",
    license: str | None = None,
    run: Run | None = None,
) -> str:
    """The text of README.md.

    Args:
        config: of the adapter.
        base_id: name or path of the base.
        rank: the largest in the files.
        base_dtype: what the base was quantised to in training: int8, nf4 or None.
        library: that loads the files: peft, mlx or stella.
        license: of the adapter, as the Hub calls it, such as apache-2.0.
        run: that trained it, for settings, data and scores.
    """
    base = base_id or UNKNOWN
    options = config.options
    name = base if _is_on_hub(base) else Path(base).name
    lines = [
        f"# {config.method} adapter of {name}",
        f"A low-rank adapter of the method `{config.method}` ({options.paper}), with "
        f"ΔW = {options.update}, written by manifold-lora.",
        "## Settings",
        _table(("setting", "value"), _settings(config, base, base_dtype, run)),
    ]
    if base_dtype is not None:
        lines.append(_EXACT.format(base_dtype))
    if run is not None:
        lines += ["## Data", _data(run.settings), "## Scores", _scores(run.summary)]
    lines += ["## How to load", _usage(base, rank, options.export == "DoRA", library)]
    lines.append(f"License: {license or UNKNOWN}.")
    metadata = _metadata(config, base, library, license, run)
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(lines) + "\n"


def _metadata(
    config: AdapterConfig,
    base: str,
    library: str,
    license: str | None,
    run: Run | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out examples",
            metric_type=name,
            metric_value=run.summary[f"{name}_after"],
        )
        for name in _MEASURES
        if run is not None and run.summary.get(f"{name}_after") is not None
    ]
    kind = "dora" if config.options.export == "DoRA" else "lora"
    data = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        library_name=library,
        license=license or UNKNOWN,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([kind, config.method, "manifold-lora", "llama"])),
        model_name=f"{config.method} adapter" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _is_on_hub(base: str) -> bool:
    """Whether a base is named as on the Hub, which refuses other names in metadata."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return "/" in base and not Path(base).exists()


def _settings(
    config: AdapterConfig, base: str, base_dtype: str | None, run: Run | None
) -> list[tuple[str, Any]]:
    targets = config.targets
    if not isinstance(targets, str):
        names = [name.rpartition(".")[2] for name in targets]
        targets = ", ".join(dict.fromkeys(names))
    rows: list[tuple[str, Any]] = [
        ("base", base),
        ("rank", config.rank),
        ("alpha", config.alpha),
        ("scale of ΔW", "α/√r" if config.rslora else "α/r"),
        ("targets", targets),
        ("dropout", config.dropout),
    ]
    if base_dtype is not None:
        rows.append(("base quantised to", base_dtype))
    rows += [
        (name.replace("_", " "), ", ".join(f"{k}: {v}" for k, v in pattern.items()))
        for name in ("rank_pattern", "alpha_pattern")
        if (pattern := getattr(config, name)) and len(pattern) <= 8
    ]
    rows += [(k, v) for k, v in config.options.values("adapter").items() if v]
    if run is not None:
        given = run.settings
        rows += [(n.replace("_", " "), given[n]) for n in _SHOWN if n in given]
    return rows


def _data(settings: Mapping[str, Any]) -> str:
    paths = settings.get("data") or []
    paths = [paths] if isinstance(paths, str) else paths
    names = ", ".join(f"`{Path(path).name}`" for path in paths)
    return names or "The built-in example data of manifold-lora."


def _scores(summary: Mapping[str, Any]) -> str:
    rows = [
        (text, *(summary.get(f"{name}_{when}") for when in ("before", "after")))
        for name, text in _MEASURES.items()
    ]
    if all(after is None for _, _, after in rows):
        return "It was not evaluated."
    return _table(("held-out examples", "before training", "after"), rows)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = [head, tuple("---" for _ in head)]
    cells += [tuple(map(_cell, row)) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else number(value)
    return re.sub(r"\s+", " ", "–" if value is None else text).replace("|", "\\|")


def _usage(base: str, rank: int, dora: bool, library: str) -> str:
    if library == "mlx":
        return f"    mlx_lm.generate --model {base} --adapter-path THIS_DIRECTORY"
    if library == "stella":
        return "With the package of the method's authors, which reads STELLA adapters."
    code = [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
        "```",
    ]
    served = serving(rank, dora, "THIS_DIRECTORY")
    plain = dora or rank > VLLM_RANKS[-1]
    return "\n".join([*code, "", served if plain else f"    {served}"])
