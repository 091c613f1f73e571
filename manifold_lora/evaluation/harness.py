"""A model of EleutherAI's lm-evaluation-harness, under the name `manifold_lora`.

Importing this file registers it; it needs the extra `lm-eval`:

    from manifold_lora.evaluation import harness
    lm_eval.simple_evaluate(
        "manifold_lora", model_args={"pretrained": DIR, "adapter": DIR}, tasks=[...]
    )

The harness' tasks are not the commonsense protocol of `manifold-lora evaluate`: their
prompts and scores differ, also where the names are the same.
"""

# pyright: reportMissingImports=false
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from manifold_lora.checkpoints.adapter_file import adapter_directory
from manifold_lora.checkpoints.peft import load_adapter
from manifold_lora.configuration.parts import BaseConfig
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.distributed.arrays import shard_module
from manifold_lora.distributed.mesh import make_mesh, read_mesh
from manifold_lora.errors import InputError
from manifold_lora.evaluation.likelihood import Likelihoods
from manifold_lora.evaluation.systems import System
from manifold_lora.generation.model import load_base

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
except ImportError as error:
    raise InputError(
        "the harness is not installed: pip install 'manifold-lora[lm-eval]'."
    ) from error

# Arguments of generation that the harness' tasks have, and we too.
_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")
_MAX_NEW_TOKENS = 256  # where a task does not say


@register_model("manifold_lora")
class ManifoldLoraLM(TemplateLM):
    """A LLaMA, with an adapter or without, for tasks of the harness.

    Args:
        pretrained: Hugging Face directory of the base.
        adapter: directory of an adapter or of a run.
        dtype: of the base; by default float32 on CPU, else bfloat16.
        base_dtype: what its projections are stored in; by default that.
        batch_size: rows of a batch.
        max_length: tokens of the context; by default the model's.
        mesh: sizes of the mesh axes, as in fsdp=4,tensor=2.
        others: of the harness' own command: device and max_batch_size, without effect.

    Raises:
        InputError: the model or the adapter cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        base_dtype: Literal["int8", "nf4"] | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        mesh: str | None = None,
        **others: Any,
    ):
        super().__init__()
        if unknown := sorted(others.keys() - {"device", "max_batch_size"}):
            raise InputError(f"unknown arguments of manifold_lora: {unknown}.")
        source = Path(pretrained)
        self._mesh = make_mesh(read_mesh(mesh))
        with jax.set_mesh(self._mesh):
            model = load_base(BaseConfig(source, dtype, base_dtype))
            if adapter is not None:
                load_adapter(model, adapter_directory(Path(adapter)))
                shard_module(model)
            self.tokenizer: Any = load_tokenizer(source)
            self._system = System(model, self.tokenizer, source)
            self.batch_size = int(batch_size)
            self._likelihoods = Likelihoods(self._system, self.batch_size)
        self.max_length = max_length or model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, with one BOS at most, as the harness' `hf` has them."""
        del kwargs
        if add_special_tokens is None:
            bos = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not string.startswith(bos)
        return self.tokenizer.encode(
            string, add_special_tokens=add_special_tokens, verbose=False
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of continuations; contexts are truncated on the left."""
        del kwargs
        pairs = []
        for _, context, continuation in requests:
            whole = [*context, *continuation][-(self.max_length + 1) :]
            start = max(len(whole) - len(continuation), 1)
            pairs.append((whole[:start], whole[start:]))
        with jax.set_mesh(self._mesh):
            found = self._likelihoods(pairs)
        for (request, *_), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, tuple(answer))
        return [(answer.logprob, answer.greedy) for answer in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context's length."""
        del disable_tqdm
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens(sum(windows, [])))
        return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Continuations up to a stop string; those of equal settings are batched."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        for indices in groups.values():
            settings = dict(requests[indices[0]].args[1])
            eos = self.tokenizer.decode(self.eot_token_id)
            until = handle_stop_sequences(settings.pop("until", None), eos=eos)
            options = _options(settings)
            room = self.max_length - options["max_new_tokens"]
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in indices]
            with jax.set_mesh(self._mesh):
                found = self._system.generate(prompts, self.batch_size, **options)
            for index, ids in zip(indices, found, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[index] = postprocess_generated_text(text, until, None)
        return [texts[index] for index in range(len(requests))]


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's arguments of generation as ours."""
    new = settings.pop("max_gen_toks", settings.pop("max_new_tokens", _MAX_NEW_TOKENS))
    if settings.pop("do_sample", False):
        settings.setdefault("temperature", 1.0)
    else:  # greedy, whatever else is given
        for name in ("temperature", "top_k", "top_p", "min_p"):
            settings.pop(name, None)
    if unknown := sorted(settings.keys() - {*_OPTIONS}):
        raise InputError(
            f"the task generates with {', '.join(unknown)}, which manifold_lora does "
            f"not have. Known: {', '.join(_OPTIONS)}."
        )
    return settings | {"max_new_tokens": new}
