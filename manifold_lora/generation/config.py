"""How tokens are chosen."""

import dataclasses
from typing import Annotated

from msgspec import Meta

from manifold_lora.configuration.parts import Part
from manifold_lora.settings import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    raise_all,
    setting,
    validate,
)

Share = Annotated[float, Meta(gt=0, le=1)]
Beams = Annotated[int, Meta(ge=1, le=64)]
LengthPenalty = Annotated[float, Meta(ge=-100, le=100)]


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Part):
    """How tokens are chosen, with the names and meanings of Hugging Face.

    Raises:
        InputError: a value out of range, or sampling with beams.

    Examples:
        >>> GenerationConfig(temperature=0.7, top_p=0.9).max_new_tokens
        64
    """

    max_new_tokens: PositiveInt = setting(64, "tokens to generate at most")
    temperature: NonNegativeFloat = setting(
        0.0, "the logits are divided by it before sampling; 0: greedy"
    )
    top_k: PositiveInt | None = setting(
        None, "sample among the so many most likely tokens", default_text="all"
    )
    top_p: Share = setting(
        1.0, "sample among the fewest tokens with this probability together"
    )
    min_p: Annotated[float, Meta(ge=0, le=1)] = setting(
        0.0, "sample among tokens with this share of the largest probability"
    )
    repetition_penalty: PositiveFloat = setting(
        1.0, "divides positive, multiplies negative logits of earlier tokens"
    )
    num_beams: Beams = setting(1, "of a beam search; 1: none", name="beams")
    length_penalty: LengthPenalty = setting(
        1.0, "a finished beam scores log-likelihood / length^penalty"
    )
    seed: Seed = setting(0, "of sampling")

    def __post_init__(self):
        validate(self)
        problems = []
        if self.num_beams > 1 and self.temperature:
            problems.append(
                f"num_beams {self.num_beams} searches, temperature "
                f"{self.temperature:g} samples: set num_beams to 1 or temperature to 0"
            )
        if not self.temperature:
            limits = {"top_k": self.top_k is not None, "top_p": self.top_p < 1}
            limits["min_p"] = self.min_p > 0
            problems += [
                f"{name} limits what is sampled, but temperature is 0, which is greedy:"
                f" set temperature or leave out {name}"
                for name, is_set in limits.items()
                if is_set
            ]
        raise_all(problems)
