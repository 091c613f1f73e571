"""What an adapter is to be: method, rank, scale and targets."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from manifold_lora.adapters.options import MethodOptions, make_options, options_class
from manifold_lora.errors import InputError, nearest
from manifold_lora.settings import (
    UNSET,
    PositiveNumber,
    Probability,
    Rank,
    setting,
    validate,
)

T = TypeVar("T")
_MATCH_SECONDS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """What adapters of all methods have in common: rank, scale and targets."""

    rank: Rank = setting(16, "columns r of the factors")
    alpha: PositiveNumber = setting(
        UNSET, "numerator of the scale s = alpha/rank of ΔW", default_text="2·rank"
    )
    rslora: bool = setting(False, "scale by alpha/√rank instead")
    dropout: Probability = setting(0.0, "of the adapters' inputs")
    targets: str | Sequence[str] = setting(
        "all-linear",
        "names of modules, or one regular expression for whole names",
        single=True,  # in a file or as a flag, a list of one is that one
    )
    rank_pattern: Mapping[str, Rank] = setting(
        {}, "rank by module, as in: q_proj 8 mlp.* 32"
    )
    alpha_pattern: Mapping[str, PositiveNumber] = setting({}, "alpha by module")

    def __post_init__(self):
        self._validate([])

    def _validate(self, problems: Sequence[str]) -> None:
        if not self.targets:
            problems = [*problems, "targets must name at least one module"]
        validate(self, problems)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))  # to be hashable


@dataclasses.dataclass(frozen=True)
class AdapterConfig(LowRankConfig):
    """The adapter: its method, with the method's options, and its low rank.

    PEFT has other words for the same:

    | here | `peft.LoraConfig` |
    |---|---|
    | `rank` | `r` |
    | `alpha` | `lora_alpha` |
    | `rslora` | `use_rslora` |
    | `dropout` | `lora_dropout` |
    | `targets` | `target_modules` |
    | `rank_pattern`, `alpha_pattern` | the same |
    | `method="dora"` | `use_dora` |
    | `options={"init": …}` | `init_lora_weights` |

    Args:
        method: one of `manifold_lora.methods.METHODS`, such as "stiefel".
        options: the method's own options: an instance of its class, or a dict by name.
        rank: columns r of the factors.
        alpha: numerator of the scale s; by default 2·rank.
        rslora: s = alpha/√r instead of alpha/r.
        dropout: probability of dropping an input of the adapter in training.
        targets: "all-linear", a module name such as "q_proj", a list of names, or a
            regular expression for the whole name, "model.layers.0.self_attn.q_proj".
        rank_pattern: rank by module name or regular expression for the end of it.
        alpha_pattern: alpha likewise.

    Raises:
        InputError: for values out of range, and for a method and an option that
            exclude each other, all in one message.

    Examples:
        >>> AdapterConfig("lora", rank=8, targets=["q_proj", "v_proj"]).alpha
        16
        >>> AdapterConfig("lora", {"init": "pissa"}).options.init
        'pissa'
    """

    method: str = setting("stiefel", "as listed by `manifold-lora methods`")
    options: Any = UNSET  # `MethodOptions` once the configuration exists

    def __post_init__(self):
        problems: list[str] = []
        filled: dict[str, Any] = {}
        try:
            filled["options"] = options = self._options()
            pattern = self.rank_pattern
            others = pattern.values() if isinstance(pattern, Mapping) else ()
            ranks = [rank for rank in (self.rank, *others) if isinstance(rank, int)]
            problems += options.rank_problems(ranks)
        except InputError as error:
            problems.append(str(error))
        if self.alpha is UNSET and isinstance(self.rank, int):
            filled["alpha"] = 2 * self.rank
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        self._validate(problems)

    def _options(self) -> MethodOptions:
        options = self.options
        if not isinstance(options, MethodOptions):
            return make_options(self.method, {} if options is UNSET else options)
        if type(options) is not options_class(self.method):
            raise InputError(
                f"method {self.method} and {type(options).__name__} exclude each other"
            )
        return options

    @property
    def merge_only(self) -> bool:
        """Whether the adapter can only be merged: no adapter file can hold it."""
        return getattr(self.options, "diagonal_scaling", False)

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """The s of ΔW: alpha/r, or alpha/√r with `rslora`; by default of this alpha."""
        alpha = self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_target(targets: str | Sequence[str], name: str) -> bool:
    """Whether the module of that full name is meant, by the rules of PEFT."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return name.endswith(f".{targets}") or full_match(targets, name)
    return any(name == t or name.endswith(f".{t}") for t in targets)


def lookup(pattern: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key that matches the end of a module's name."""
    return next((v for key, v in pattern.items() if matches_end(key, name)), default)


def matches_end(key: str, name: str) -> bool:
    """Whether a pattern's key means the module, by the rule of PEFT."""
    return full_match(rf"(.*\.)?({key})", name)


def check_targets(targets: str | Sequence[str], names: Sequence[str]) -> None:
    """Raise `InputError` for a target that is none of the names."""
    given = [targets] if isinstance(targets, str) else targets
    as_list = not isinstance(targets, str)  # which has no regular expressions
    check_names(
        "target", given, names, lambda t, n: is_target([t] if as_list else t, n)
    )


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


def full_match(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a whole name, in a second at most."""
    import regex  # unlike re's, its matches can be stopped

    try:
        return regex.fullmatch(pattern, name, timeout=_MATCH_SECONDS) is not None
    except regex.error as error:
        raise InputError(
            f"{pattern!r} is not a regular expression: {error}."
        ) from error
    except TimeoutError as error:
        raise InputError(
            f"the regular expression {pattern!r} takes more than {_MATCH_SECONDS} "
            f"seconds to match {name}: make it simpler, or list the names."
        ) from error
