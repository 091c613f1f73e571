"""Adapters into a model, and the trees that the optimiser sees."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from manifold_lora.adapters.config import (
    AdapterConfig,
    check_names,
    is_target,
    lookup,
    matches_end,
)
from manifold_lora.adapters.lora import LoRALinear
from manifold_lora.adapters.stiefel import StiefelLinear
from manifold_lora.errors import InputError, nearest
from manifold_lora.models import Linear

METHODS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "stiefel": StiefelLinear}
# A decoder's projections; anything called with (x, key) and a layer axis in front.
PROJECTIONS = (Linear, LoRALinear)


def projections(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Every stacked projection: its name in a layer, its parent and its attribute."""
    for path, module in list(nnx.iter_modules(model.layers)):
        for attribute, child in list(vars(module).items()):
            if isinstance(child, PROJECTIONS) and not isinstance(module, PROJECTIONS):
                yield ".".join([*map(str, path), attribute]), module, attribute


def adapters(model: Any) -> dict[str, LoRALinear]:
    """The adapted projections by name, such as "self_attn.q_proj"."""
    found = ((name, getattr(parent, at)) for name, parent, at in projections(model))
    return {name: module for name, module in found if isinstance(module, LoRALinear)}


def full_names(model: Any, name: str) -> list[str]:
    """The names that Hugging Face gives a projection, one for each layer."""
    layers = range(model.config.num_hidden_layers)
    return [f"model.layers.{layer}.{name}" for layer in layers]


def check_bare(model: Any) -> None:
    """Raise `InputError` if the model has adapters already."""
    if found := adapters(model):
        raise InputError(
            f"the model has adapters already ({', '.join(found)}): merge them, or load "
            "the model again."
        )


def attach(model: Any, config: AdapterConfig, seed: int = 0) -> None:
    """Replace the targeted projections of a model by adapted ones, in place.

    The base weights are shared, not copied or changed. Layers are stacked, so a
    projection is adapted in all layers or in none.

    Args:
        model: a `Llama` without adapters.
        config: what to attach.
        seed: of the random start.

    Raises:
        InputError: for an unknown method, targets or pattern keys that match
            nothing, layers that would differ, or a rank larger than a layer.

    Examples:
        >>> from flax import nnx
        >>> import manifold_lora as ml
        >>> config = ml.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        ...     head_dim=4)
        >>> model = ml.Llama(config, rngs=nnx.Rngs(0))
        >>> ml.attach(model, ml.AdapterConfig("stiefel", rank=2, targets="q_proj"))
        >>> ml.factors(model)["layers"]["self_attn"]["q_proj"]["b"].shape
        (2, 8, 2)
    """
    if config.method not in METHODS:
        raise InputError(
            f"unknown method {config.method!r}. {nearest(config.method, METHODS)}"
        )
    check_bare(model)
    sites = list(projections(model))
    names = [full for name, *_ in sites for full in full_names(model, name)]
    if isinstance(config.targets, str):
        check_names("target", [config.targets], names, is_target)
    else:
        check_names("target", config.targets, names, lambda t, n: is_target([t], n))
    for what in ("rank_pattern", "alpha_pattern"):
        check_names(what, getattr(config, what), names, matches_end)

    chosen = []
    for index, (name, parent, attribute) in enumerate(sites):
        full = full_names(model, name)
        if not _equal(
            f"targets for {name}", [is_target(config.targets, n) for n in full]
        ):
            continue
        ranks = [lookup(config.rank_pattern, n, config.rank) for n in full]
        alphas = [lookup(config.alpha_pattern, n, config.alpha) for n in full]
        try:
            adapter = METHODS[config.method](
                getattr(parent, attribute),
                rank=_equal(f"ranks of {name}", ranks),
                alpha=_equal(f"alphas of {name}", alphas),
                rslora=config.rslora,
                dropout=config.dropout,
                key=jax.random.fold_in(jax.random.key(seed), index),
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        chosen.append((parent, attribute, adapter))
    for parent, attribute, adapter in chosen:
        setattr(parent, attribute, adapter)


def _equal(what: str, values: list[Any]) -> Any:
    """The one value that all layers share."""
    if len(set(values)) > 1:
        shown = ", ".join(f"layer {i}: {value}" for i, value in enumerate(values))
        raise InputError(
            f"the {what} differ between layers ({shown}), but the layers of a module "
            "are stacked and share them. Write the pattern for all layers."
        )
    return values[0]


def factors(model: Any) -> dict[str, Any]:
    """The trainable arrays as a nested dict, for Optax: float32, layer axis first."""
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def set_factors(model: Any, factors: dict[str, Any]) -> None:
    """Put arrays of the structure of `factors(model)` into the model, in place.

    Raises:
        InputError: for factors that are missing, unknown or of another shape.
    """
    state = nnx.state(model, nnx.LoRAParam)
    needed, given = _shapes(nnx.to_pure_dict(state)), _shapes(factors)
    bad = [
        f"{name}: found {given.get(name)}, needed {needed.get(name)}"
        for name in sorted({*needed, *given})
        if given.get(name) != needed.get(name)
    ]
    if bad:
        raise InputError("the factors are not of this model:\n  " + "\n  ".join(bad))
    nnx.replace_by_pure_dict(state, factors)
    nnx.update(model, state)


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def manifolds(model: Any) -> dict[str, Any]:
    """The manifold of every factor, from the tag beside it; like `factors(model)`."""
    state = nnx.state(model, nnx.LoRAParam)
    tags = jax.tree.map(
        lambda variable: variable.manifold,
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return nnx.to_pure_dict(tags)


def split(model: Any) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    """A model as a function of its factors and its frozen rest, for `jax.grad`.

    Returns:
        `rebuild`, `factors`, `frozen` with `rebuild(factors, frozen)` the model again;
        both arguments are pytrees of arrays, `factors` as Optax wants it.
    """
    graph, state, frozen = nnx.split(model, nnx.LoRAParam, ...)
    treedef = jax.tree.structure(state)
    pure = nnx.to_pure_dict(state)
    # Leaves are matched by order, so both trees must flatten alike.
    assert [path for path, _ in nnx.to_flat_state(state)] == _paths(pure)

    def rebuild(factors: dict[str, Any], frozen: Any) -> Any:
        return nnx.merge(graph, treedef.unflatten(jax.tree.leaves(factors)), frozen)

    return rebuild, pure, frozen


def _paths(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [tuple(key.key for key in path) for path, _ in leaves]


def merge(model: Any) -> None:
    """Add every ΔW into its base kernel, in place, and take the adapters out.

    Summed in float32 and rounded once to the dtype of the base. Use it before
    `save_llama`; keep the adapter itself with `save_adapter` where it can be kept.
    """
    for _, parent, attribute in list(projections(model)):
        module = getattr(parent, attribute)
        if isinstance(module, LoRALinear):
            setattr(parent, attribute, module.fuse())
