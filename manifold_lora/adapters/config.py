"""The configuration of an adapter: method, rank, scale and targets."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from manifold_lora.errors import InputError, check_choice, nearest
from manifold_lora.methods import find_method, problems

T = TypeVar("T")
FixedA = Literal["random", "projection"]


def _pattern() -> Any:
    # Left out of the hash: a config stands in the static part of a module.
    return dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The choice of an adapter, in the words of PEFT.

    Args:
        method: one of `manifold_lora.methods.METHODS`, such as "stiefel".
        rank: columns r of the factors.
        alpha: numerator of the scale; None takes 2·rank.
        rslora: scale by alpha/√r instead of alpha/r.
        dropout: probability of dropping an input of the adapter in training.
        targets: "all-linear", a module name such as "q_proj", a list of names, or a
            regular expression for the whole name, "model.layers.0.self_attn.q_proj".
        rank_pattern: rank by module name or regular expression for the end of it.
        alpha_pattern: alpha likewise.
        init: initialisation of the factors; None takes the method's first.
        fixed_a: of "lora" and "stiefel": A is not trained, but fixed at "random", or
            at a "projection" of the weight.
        diagonal_s: of "stella": S is a diagonal.
        diagonal_scaling: of "lora" and LoRAM: D₁ W D₂ + ΔW in place of W + ΔW.

    Raises:
        InputError: for a value out of range, and for a method and an option that
            exclude each other, all in one message.

    Examples:
        >>> AdapterConfig(method="lora", rank=8, targets=["q_proj", "v_proj"]).alpha
        16
    """

    method: str = "stiefel"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = _pattern()
    alpha_pattern: Mapping[str, float] = _pattern()
    init: str | None = None
    fixed_a: FixedA | None = None
    diagonal_s: bool = False
    diagonal_scaling: bool = False

    def __post_init__(self):
        wrong = problems(self.method, vars(self))
        if self.fixed_a is not None:
            check_choice("AdapterConfig", "fixed_a", self.fixed_a, FixedA)
        filled: dict[str, Any] = {}
        if self.alpha is None:
            filled["alpha"] = 2 * self.rank
        filled["init"] = self.init or find_method(self.method).inits[0]
        if not isinstance(self.targets, str):
            filled["targets"] = tuple(self.targets)
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        assert self.alpha is not None
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                wrong.append(f"rank must be at least 1, got {rank} for {name}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not 0 < alpha < math.inf:
                wrong.append(f"alpha must be positive, got {alpha} for {name}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            wrong.append("targets must name at least one module")
        if self.init == "orthogonal":
            odd = [r for r in (self.rank, *self.rank_pattern.values()) if r % 2]
            if odd:
                wrong.append(f"init orthogonal needs even ranks, got {odd[0]}")
        if wrong:
            raise InputError("; ".join(wrong) + ".")

    def scale(self, rank: int) -> float:
        """The s of ΔW without patterns: alpha/r, or alpha/√r with `rslora`."""
        assert self.alpha is not None
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def is_target(targets: str | Sequence[str], name: str) -> bool:
    """Whether the module of that full name is meant, by the rules of PEFT."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return name.endswith(f".{targets}") or _full_match(targets, name)
    return any(name == t or name.endswith(f".{t}") for t in targets)


def lookup(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key that matches the end of a module's name."""
    return next((v for key, v in pattern.items() if matches_end(key, name)), default)


def matches_end(key: str, name: str) -> bool:
    """Whether a pattern's key means the module, by the rule of PEFT."""
    return _full_match(rf"(.*\.)?({key})", name)


def check_names(
    what: str,
    given: Iterable[str],
    names: Sequence[str],
    matches: Callable[[str, str], bool],
) -> None:
    """Raise `InputError` for one of the given that `matches` none of the names."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    for one in given:
        if not any(matches(one, name) for name in names):
            raise InputError(
                f"{what} {one!r} matches no module. {nearest(one, kinds)} A regular "
                f"expression must match a whole name, such as {names[0]}."
            )


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(
            f"{pattern!r} is not a regular expression: {error}."
        ) from error
