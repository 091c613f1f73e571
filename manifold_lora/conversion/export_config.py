"""The configuration of an export."""

import dataclasses
from pathlib import Path
from typing import Literal

from manifold_lora.settings import setting, validate

FormatName = Literal["portable", "peft", "mlx", "stella", "gguf-lora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """An adapter, the format to write it in, and where.

    Args:
        adapter: the directory of an adapter, or of a run with one.
        out: the directory to write, or for gguf-lora the file.
        format: "portable", which PEFT, vLLM, SGLang and llama.cpp read alike, "peft",
            "mlx", "stella" or "gguf-lora".
        model: the base's directory, to compare logits; gguf-lora needs its config.json.
        base_id: name of the base in the files; by default as in the adapter.
        license: of the adapter, for its model card or the metadata of gguf-lora.
        overwrite: replace an adapter in `out`.

    Raises:
        InputError: all problems, in one message.
    """

    adapter: Path | None = setting(
        None, "directory of an adapter, or of a run with one", positional=True
    )
    format: FormatName = setting(
        "portable",
        "portable, for PEFT, vLLM, SGLang and llama.cpp alike; peft, with rsLoRA and "
        "patterns as they are; mlx; stella; gguf-lora",
    )
    out: Path | None = setting(None, "directory to write, or for gguf-lora the file")
    model: Path | None = setting(
        None, "Hugging Face directory of the base, to compare logits"
    )
    base_id: str | None = setting(
        None, "name of the base in the files", default_text="as in the adapter"
    )
    license: str | None = setting(
        None, "of the adapter, for its card or metadata", default_text="unknown"
    )
    overwrite: bool = setting(False, "replace an adapter in --out")

    def __post_init__(self):
        problems = [
            f"export needs {needed}"
            for value, needed in (
                (self.adapter, "ADAPTER, the directory of an adapter or of a run"),
                (self.out, "--out, the directory or file to write"),
            )
            if value is None
        ]
        validate(self, problems)
