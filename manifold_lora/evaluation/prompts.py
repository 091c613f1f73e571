"""Checks of the prompts that a protocol generates from."""

from collections.abc import Sequence

from manifold_lora.data.records import MAX_PROBLEMS
from manifold_lora.errors import InputError
from manifold_lora.models import LlamaConfig


def check_lengths(
    file: str, prompts: Sequence[Sequence[int]], shape: LlamaConfig, new: int
) -> None:
    """Raise `InputError` if a prompt and its response do not fit into the context.

    Args:
        file: for the message.
        prompts: the tokens of every prompt.
        shape: of the model.
        new: tokens to generate.
    """
    context = shape.max_position_embeddings
    problems = [
        f"{file}, record {number}: the prompt has {len(ids)} tokens"
        for number, ids in enumerate(prompts, start=1)
        if len(ids) > context - new
    ]
    if problems:
        raise InputError(
            f"{listed(problems)}\nWith --max-new-tokens {new} there is room for "
            f"{context - new} (max_position_embeddings {context}): leave these records "
            "out, or lower --max-new-tokens."
        )


def listed(problems: Sequence[str]) -> str:
    """The first problems, and how many there are more."""
    more = len(problems) - MAX_PROBLEMS
    shown = [*problems[:MAX_PROBLEMS], *[f"... and {more} more"] * (more > 0)]
    return "\n".join(shown)
