"""What only one method has: its options, declared beside its adapter."""

import abc
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import optax

from manifold_lora.errors import InputError
from manifold_lora.methods import METHODS, check_method
from manifold_lora.optimizers.named import named_optimizer
from manifold_lora.settings import (
    UNSET,
    decode,
    number,
    raise_all,
    setting,
    type_hints,
    validate,
)

if TYPE_CHECKING:
    from manifold_lora.adapters.low_rank import LowRankLinear

# What an option decides: the parametrisation (saved with the adapter), the optimiser,
# one of its learning rates, or what is exported.
Role = Literal["adapter", "optimizer", "rate", "export"]


class LearningRates(NamedTuple):
    """Learning rates of a method: defaults, and the grid that `compare` searches."""

    default: float
    builtin: float  # default for the small built-in base, which needs larger ones
    grid: tuple[float, ...] = ()  # around the paper's

    def for_base(self, builtin: bool) -> float:
        """The default for the built-in base, or for any other."""
        return self.builtin if builtin else self.default

    def text(self) -> str:
        """Both defaults in words."""
        return f"{number(self.default)}, built-in base {number(self.builtin)}"


class OptimizerInputs(NamedTuple):
    """What a method's optimiser is made of, beside the method's own options."""

    manifolds: Any  # prefix tree of the factors
    learning_rate: optax.Schedule  # of constrained factors, or of all
    free_learning_rate: optax.Schedule | None  # of the others, where a method has one
    weight_decay: float
    hidden_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions(abc.ABC):
    """The options of a method; every adapter has a subclass of its own.

    Flags, TOML keys, checks, `manifold-lora methods` and the files of the adapter
    follow from the fields (made by `settings.setting`, with a `role`) and from the
    class variables.
    """

    update: ClassVar[str]  # formula of ΔW
    paper: ClassVar[str]
    learning_rates: ClassVar[LearningRates]
    free_learning_rates: ClassVar[LearningRates | None] = None
    recipe: ClassVar[str]  # the optimiser, a function of Optax or of this library
    export: ClassVar[str] = "LoRA"  # PEFT's name for the exported adapter

    init: str = UNSET  # every subclass has a default

    def __post_init__(self):
        validate(self, self.problems())

    def problems(self) -> list[str]:
        """Options that exclude each other; an empty list if there are none."""
        return []

    def rank_problems(self, ranks: Sequence[int]) -> list[str]:
        """Ranks that the options exclude."""
        del ranks
        return []

    def values(self, role: Role) -> dict[str, Any]:
        """The options of one role by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["role"] == role
        }

    @abc.abstractmethod
    def transformation(self, inputs: OptimizerInputs) -> optax.GradientTransformation:
        """The Optax transformation that trains the factors of this method."""


def initialisation(default: str) -> Any:
    """The field `init` of a method's options; its type lists the initialisations."""
    return setting(default, "initialisation of the factors", role="adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrapperOptions(MethodOptions):
    """Options of a method that any Optax optimiser can train."""

    optimizer: str = setting(
        "adamw", "Optax optimiser by name, such as adamw or lion", role="optimizer"
    )

    def inner(self, inputs: OptimizerInputs) -> Any:
        """The wrapped optimiser as a function of its learning rate."""
        return named_optimizer(self.optimizer, inputs.weight_decay)


def adapter_class(method: str) -> "type[LowRankLinear]":
    """The class of a method's adapter; its file is imported on first use."""
    check_method(method)
    file, _, name = METHODS[method].partition(".")
    module = importlib.import_module(f"manifold_lora.adapters.{file}")
    return getattr(module, name)


def options_class(method: str) -> type[MethodOptions]:
    """The class of a method's options."""
    return adapter_class(method).options


def fields_by_option() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    """Every option of any method, with the field of each method that has it."""
    options: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for method in METHODS:
        for field in dataclasses.fields(options_class(method)):
            options.setdefault(field.name, {})[method] = field
    return options


def make_options(
    method: str,
    values: Mapping[str, Any],
    *,
    from_text: bool = False,
    label: Callable[[str], str] = str,
) -> MethodOptions:
    """The options of a method from values by name.

    Args:
        method: its name.
        values: by the names of the options; others take their defaults.
        from_text: whether the values are text from the command line.
        label: how messages call an option, such as --diagonal-s.

    Raises:
        InputError: options of other methods, values of a wrong type or out of range,
            and options that exclude each other, all in one message.

    Examples:
        >>> make_options("stella", {"diagonal_s": True}).init
        'random'
        >>> make_options("lora", {"diagonal_s": True})
        Traceback (most recent call last):
        manifold_lora.errors.InputError: method lora and diagonal_s=True exclude each \
other: diagonal_s goes with stella.
    """
    kind = options_class(method)
    hints = type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    problems, decoded = [], {}
    for name, value in values.items():
        if name not in names:
            problems.append(_excluded(method, name, value))
            continue
        try:
            decoded[name] = decode(value, hints[name], from_text=from_text)
        except ValueError as error:
            known = name == "init" and _inits_excluded(method, value)
            problems.append(known or f"{label(name)} {error}")
    try:
        options = kind(**decoded)
    except InputError as error:
        raise_all([*problems, str(error)])
        raise
    raise_all(problems)
    return options


def _excluded(method: str, name: str, value: Any) -> str:
    others = fields_by_option().get(name)
    if others is None:
        return f"method {method} has no option {name!r}"
    return (
        f"method {method} and {name}={value} exclude each other: {name} goes with "
        + ", ".join(others)
    )


def inits(method: str) -> tuple[str, ...]:
    """The initialisations of a method, the default first."""
    kind = options_class(method)
    return type_hints(kind)["init"].__args__


def _inits_excluded(method: str, value: Any) -> str:
    others = [name for name in METHODS if value in inits(name)]
    text = (
        f"method {method} and init={value} exclude each other: {method} has "
        + ", ".join(inits(method))
    )
    return text + (f"; {value} goes with {', '.join(others)}" if others else "")


def by_method(texts: Mapping[str, str]) -> str:
    """Texts of several methods in one, each with the methods that it is for.

    >>> by_method({"lora": "2e-4", "dora": "2e-4", "stella": "5e-4"})
    '2e-4 (lora, dora); 5e-4 (stella)'
    """
    methods: dict[str, list[str]] = {}
    for method, text in texts.items():
        methods.setdefault(text, []).append(method)
    if len(methods) == 1:
        return next(iter(methods))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in methods.items())


def describe_learning_rates() -> str:
    """The default learning rates, method by method."""
    return by_method(
        {method: options_class(method).learning_rates.text() for method in METHODS}
    )
