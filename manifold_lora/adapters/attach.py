"""Attach adapters to a model and merge them; the trees that the optimiser sees."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from manifold_lora.adapters.config import (
    AdapterConfig,
    check_names,
    check_targets,
    is_target,
    lookup,
    matches_end,
)
from manifold_lora.adapters.low_rank import LowRankLinear
from manifold_lora.adapters.options import adapter_class
from manifold_lora.adapters.scaled import ScaledLinear
from manifold_lora.distributed.sharding import logical_axes_tree
from manifold_lora.errors import InputError
from manifold_lora.manifolds import Manifold
from manifold_lora.models import Linear

# A decoder's projections; anything called with (x, key) and a layer axis in front.
PROJECTIONS = (Linear, LowRankLinear, ScaledLinear)


def projections(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Every stacked projection: its name in a layer, its parent and its attribute."""
    for path, module in list(nnx.iter_modules(model.layers)):
        for attribute, child in list(vars(module).items()):
            if isinstance(child, PROJECTIONS) and not isinstance(module, PROJECTIONS):
                yield ".".join([*map(str, path), attribute]), module, attribute


def adapters(model: Any) -> dict[str, LowRankLinear]:
    """The adapted projections by name, such as "self_attn.q_proj"."""
    modules = {}
    for name, parent, attribute in projections(model):
        module = getattr(parent, attribute)
        if isinstance(module, ScaledLinear):
            module = module.adapter
        if isinstance(module, LowRankLinear):
            modules[name] = module
    return modules


def full_names(model: Any, name: str) -> list[str]:
    """The names that Hugging Face gives a projection, one for each layer."""
    layers = range(model.config.num_hidden_layers)
    return [f"model.layers.{layer}.{name}" for layer in layers]


def check_bare(model: Any) -> None:
    """Raise `InputError` if the model has adapters already."""
    if modules := adapters(model):
        raise InputError(
            f"the model has adapters already ({', '.join(modules)}): merge them, or "
            "load the model again."
        )


def attach(model: Any, config: AdapterConfig, seed: int = 0) -> None:
    """Replace the targeted projections of a model by adapted ones, in place.

    The base weights are shared, not copied or changed. Layers are stacked: where
    they differ in rank, or some are not adapted, the smaller ones are padded to the
    largest, which costs memory and changes no output and no gradient. Two optimisers
    count the padding: `loram` with "row" second moments takes larger steps in such
    layers, `stella` with a hidden size slightly smaller ones.

    Args:
        model: a `Llama` without adapters.
        config: what to attach.
        seed: for the random initialisation.

    Raises:
        InputError: for targets or pattern keys that match nothing, or a rank larger
            than a layer.

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
    check_bare(model)
    sites = list(projections(model))
    names = [full for name, *_ in sites for full in full_names(model, name)]
    check_targets(config.targets, names)
    for what in ("rank_pattern", "alpha_pattern"):
        check_names(what, getattr(config, what), names, matches_end)

    made = []
    for index, (name, parent, attribute) in enumerate(sites):
        full = full_names(model, name)
        ranks = [
            lookup(config.rank_pattern, n, config.rank)
            if is_target(config.targets, n)
            else 0
            for n in full
        ]
        if not any(ranks):
            continue
        try:
            adapter = adapter_class(config.method)(
                getattr(parent, attribute),
                config,
                ranks=ranks,
                alphas=[lookup(config.alpha_pattern, n, config.alpha) for n in full],
                key=jax.random.fold_in(jax.random.key(seed), index),
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        made.append((parent, attribute, adapter))
    for parent, attribute, adapter in made:
        install(parent, attribute, adapter)


def install(parent: Any, attribute: str, adapter: LowRankLinear) -> None:
    """Replace a projection by its adapter, in a `ScaledLinear` if it asks for one."""
    scaled = adapter.config.merge_only
    setattr(parent, attribute, ScaledLinear(adapter) if scaled else adapter)


def factors(model: Any) -> dict[str, Any]:
    """The trainable arrays as a nested dict, for Optax: float32, layer axis first."""
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def set_factors(model: Any, factors: dict[str, Any]) -> None:
    """Set the factors of a model, in place, from a tree like `factors(model)`.

    Raises:
        InputError: for factors that are missing, unknown or of another shape.
    """
    state = nnx.state(model, nnx.LoRAParam)
    needed, given = _shapes(nnx.to_pure_dict(state)), _shapes(factors)
    errors = [
        f"{name}: found {given.get(name)}, needed {needed.get(name)}"
        for name in sorted({*needed, *given})
        if given.get(name) != needed.get(name)
    ]
    if errors:
        raise InputError("the factors do not fit the model:\n  " + "\n  ".join(errors))
    nnx.replace_by_pure_dict(state, factors)
    nnx.update(model, state)


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def manifold_tree(model: Any) -> dict[str, Any]:
    """The manifolds of the factors as a tree, for the optimisers.

    A prefix tree of `factors(model)`: where factors are the parts of one point, such as
    u, s and v of `FixedRank`, their manifold stands in place of the dict of them.

    Examples:
        >>> import manifold_lora as ml
        >>> from manifold_lora.data.builtin import BASE
        >>> model = ml.load_llama(BASE)
        >>> ml.attach(model, ml.AdapterConfig("stella", rank=2, targets="q_proj"))
        >>> ml.manifold_tree(model)["layers"]["self_attn"]["q_proj"]["s"]
        Euclidean()
    """
    state = nnx.state(model, nnx.LoRAParam)
    tags = jax.tree.map(
        lambda variable: variable.manifold,
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return _coupled(nnx.to_pure_dict(tags))


def axes(model: Any) -> dict[str, Any]:
    """The names of the axes of every factor, in the structure of `factors(model)`."""
    return nnx.to_pure_dict(logical_axes_tree(nnx.state(model, nnx.LoRAParam)))


def _coupled(tags: Any) -> Any:
    """The tree with one manifold for every dict of its parts."""
    if isinstance(tags, Manifold):
        return tags
    first = next(iter(tags.values()), None)
    if isinstance(first, Manifold) and first.is_point(tags):
        return first
    return {key: _coupled(subtree) for key, subtree in tags.items()}


def split(model: Any) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    """Split a model into its factors and its frozen rest, for `jax.grad` and Optax.

    Use it to write a training step of your own: only the factors are differentiated,
    and the base is an argument of the compiled step instead of a constant in it.

    Args:
        model: a `Llama` with adapters; it is not changed.

    Returns:
        `(rebuild, factors, frozen)`, where `rebuild(factors, frozen)` is the model
        again. `factors` is the nested dict of float32 arrays that `factors(model)`
        gives, and `frozen` a pytree of all other arrays.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> import manifold_lora as ml
        >>> from manifold_lora.data.builtin import BASE
        >>> model = ml.load_llama(BASE)
        >>> ml.attach(model, ml.AdapterConfig("stiefel", rank=2))
        >>> rebuild, factors, frozen = ml.split(model)
        >>> tx = ml.riemannian(optax.adam(1e-2), ml.manifold_tree(model))
        >>> state, ids = tx.init(factors), jnp.arange(8)[None]
        >>> def loss(factors, frozen):
        ...     logits = rebuild(factors, frozen)(ids)
        ...     return optax.softmax_cross_entropy_with_integer_labels(
        ...         logits[:, :-1], ids[:, 1:]).mean()
        >>> @jax.jit
        ... def step(factors, state, frozen):
        ...     value, gradients = jax.value_and_grad(loss)(factors, frozen)
        ...     updates, state = tx.update(gradients, state, factors)
        ...     return optax.apply_updates(factors, updates), state, value
        >>> losses = []
        >>> for _ in range(3):
        ...     factors, state, value = step(factors, state, frozen)
        ...     losses.append(float(value))
        >>> losses[0] > losses[1] > losses[2]
        True
        >>> ml.set_factors(model, factors)
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
    """Add every ΔW to its base kernel, in place, and remove the adapters.

    The sum is in float32 and rounded once to the dtype of the base. Use it before
    `save_llama`; to keep the adapter by itself, use `save_adapter` instead.
    """
    for _, parent, attribute in list(projections(model)):
        module = getattr(parent, attribute)
        if isinstance(module, LowRankLinear | ScaledLinear):
            setattr(parent, attribute, module.merge())
