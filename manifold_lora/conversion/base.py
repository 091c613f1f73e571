"""The base in its files: checked, its weights still on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manifold_lora.adapters.attach import full_names, projections
from manifold_lora.checkpoints.adapter_file import AdapterFile, read_adapter
from manifold_lora.checkpoints.huggingface import open_llama
from manifold_lora.checkpoints.model_files import model_files
from manifold_lora.checkpoints.peft import fingerprint_of, linear_sizes
from manifold_lora.conversion.probe import Model
from manifold_lora.conversion.shards import Rows, Stored, stored_tensors
from manifold_lora.conversion.updates import updates
from manifold_lora.errors import InputError
from manifold_lora.models import Llama
from manifold_lora.models.quantised import BaseDtype, rounded_rows

_EMBEDDING = "model.embed_tokens.weight"


class Rounded(NamedTuple):
    """A weight in a file that is read as a quantised model has it."""

    stored: Stored
    base_dtype: BaseDtype

    def blocks(self) -> Iterator[Rows]:
        """The rows in blocks."""
        return self.stored.blocks()

    def read(self, rows: Rows | None = None) -> np.ndarray:
        """The weight, or some of its rows, de-quantised."""
        return rounded_rows(self.stored.read(rows), self.base_dtype)


class Base(NamedTuple):
    """A model directory."""

    path: Path
    model: Llama  # without its weights
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path) -> "Base":
        """Check a directory as `load_llama` does; of the weights nothing is read.

        Raises:
            InputError: it does not hold a LLaMA.
        """
        model, _ = open_llama(path)
        tensors: dict[str, Stored] = {}
        for file in model_files(path):
            tensors |= stored_tensors(file)
        return cls(path, model, tensors)

    def read_adapter(self, path: Path) -> AdapterFile:
        """Read an adapter of this base.

        Raises:
            InputError: it is of another one, or cannot be read.
        """
        adapter = read_adapter(path, linear_sizes(self.model))
        version = 2 if adapter.base is None or ":" in adapter.base else 1
        if adapter.base not in (None, needed := self.fingerprint(version)):
            raise InputError(
                f"The adapter in {path} was trained on another base: its fingerprint "
                f"is {adapter.base}, that of {self.path} is {needed}. Give --model the "
                "base it was trained on."
            )
        return adapter

    def fingerprint(self, version: int = 2) -> str:
        """What `checkpoints.peft.fingerprint` gives for the model."""
        return fingerprint_of(self._sampled(version), version)

    def _sampled(self, version: int) -> Iterator[np.ndarray]:
        """The weights of the fingerprint, in its order."""
        yield self.tensors["model.norm.weight"].read()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names = full_names(self.model, norm)
            yield np.stack([self.tensors[f"{name}.weight"].read() for name in names])
        embedding = self.tensors[_EMBEDDING]
        yield embedding.read((0, min(64, embedding.shape[0])))
        for name, parent, attribute in projections(self.model) if version > 1 else ():
            step = -(-getattr(parent, attribute).in_features // 8)
            yield np.stack(
                [
                    self.tensors[f"{full}.weight"].read()[:, ::step].T.copy()
                    for full in full_names(self.model, name)
                ]
            )

    def with_adapter(self, adapter: AdapterFile | None = None) -> Model:
        """What `compare_logits` needs of it, quantised as it was for the adapter."""
        if adapter is None:
            return Model(self.model.config, self.tensors)
        tensors: dict[str, Any] = dict(self.tensors)
        for name, kind in self.quantised(adapter.base_dtype).items():
            tensors[name] = Rounded(self.tensors[name], kind)
        return Model(self.model.config, tensors, updates(adapter))

    def quantised(self, base_dtype: BaseDtype | None) -> dict[str, BaseDtype]:
        """The weights that `models.quantised.quantise` rounds, and to what."""
        if base_dtype is None:
            return {}
        kinds: dict[str, BaseDtype] = dict.fromkeys(
            (f"{full}.weight" for full in linear_sizes(self.model)), base_dtype
        )
        if not self.model.config.tie_word_embeddings:
            kinds[_EMBEDDING] = "int8"
        return kinds
