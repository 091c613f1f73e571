"""Time, memory, accuracy and collectives of the optimiser step on LLaMA-3-8B's factors.

    python benchmarks/optimizer_step.py [--plot retractions.png]

All seven linears, 32 layers, rank 16, float32, jitted and donated. Ratios of medians of
interleaved runs, against Optax on the same tree and, with the [peers] extra, torch and
geoopt. Needs the [test] extra; four minutes on two cores.
"""

import argparse
import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

# Eight devices on a CPU, to compile the sharded step for; the timings use the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from flax import nnx

import manifold_lora as ml
from manifold_lora.adapters import axes, split
from manifold_lora.manifolds.stiefel import Retraction
from manifold_lora.training.step import TrainState, make_step

LAYERS, RANK, WIDTH, HIDDEN, KEYS = 32, 16, 4096, 14336, 1024
# Rows of A (inputs) and of B (outputs) of each linear.
LINEARS = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, KEYS),
    "v": (WIDTH, KEYS),
    "o": (WIDTH, WIDTH),
    "gate": (WIDTH, HIDDEN),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}
LLAMA_3_8B = ml.LlamaConfig(
    vocab_size=128256,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
FREE, STIEFEL, RATE = ml.Euclidean(), ml.Stiefel(), 1e-3


@functools.cache
def orthonormal(rows: int) -> np.ndarray:
    """A Haar-uniform point for each layer."""
    draw = jax.jit(STIEFEL.random_point, static_argnums=1)
    return np.asarray(draw(jax.random.key(rows), (LAYERS, rows, RANK)))


def pairs(names: tuple[str, str], middle: bool = False) -> dict[str, Any]:
    """The two factors of every linear, on the host, optionally with S = I."""
    eye = np.broadcast_to(np.eye(RANK, dtype=np.float32), (LAYERS, RANK, RANK))
    return {
        linear: dict(zip(names, map(orthonormal, rows), strict=True))
        | ({"s": eye} if middle else {})
        for linear, rows in LINEARS.items()
    }


class Step:
    """One compiled, donated optimiser step on its own copy of the factors."""

    def __init__(self, tx: optax.GradientTransformation, start: Any):
        def draw(x):
            return jax.random.normal(jax.random.key(x.size), x.shape)

        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.grads = jax.tree.map(draw, start)
        self.params = jax.tree.map(jnp.array, start)
        self.state = jax.jit(tx.init)(self.params)
        jitted = jax.jit(step, donate_argnums=(1, 2))
        self.compiled = jitted.lower(self.grads, self.state, self.params).compile()
        copy = sum(x.nbytes for x in jax.tree.leaves(self.params))
        analysis: Any = self.compiled.memory_analysis()
        self.temporaries = analysis.temp_size_in_bytes / copy

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self.params, self.state = self.compiled(self.grads, self.state, self.params)
        jax.block_until_ready(self.params)


def medians(
    calls: dict[str, Callable[[], None]], repeats: int = 15
) -> dict[str, float]:
    """The median milliseconds of each call, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, optimizers: dict[str, Any], start: Any, target: dict[str, float]):
    """Print the steps of one tree of factors, relative to the first."""
    steps = {name: Step(tx, start) for name, tx in optimizers.items()}
    times = medians({**steps})
    baseline = next(iter(steps))
    print(f"\n{title}\n{'':34}    ms  ratio  target  extra temporaries, copies")
    for name, step in steps.items():
        limit = f"≤ {target[name]}" if name in target else ""
        extra = step.temporaries - steps[baseline].temporaries
        ratio = times[name] / times[baseline]
        print(f"{name:34} {times[name]:5.0f}  {ratio:5.2f}  {limit:6}  {extra:+.2f}")
    return times


def stiefel_steps() -> float:
    """Stiefel steps over AdamW; the time of the one with both factors, in ms."""
    adamw = optax.adamw(RATE)
    of_b = {linear: {"a": FREE, "b": STIEFEL} for linear in LINEARS}
    times = table(
        "Stiefel, AdamW inside",
        {
            "optax.adamw": adamw,
            "both factors": ml.riemannian(adamw, STIEFEL),
            "B only": ml.riemannian(adamw, of_b),
            "both factors, QR": ml.riemannian(adamw, ml.Stiefel("qr")),
            "both factors, transported": ml.riemannian(adamw, STIEFEL, transport=True),
            "landing, both factors": ml.landing(adamw, STIEFEL),
        },
        pairs(("a", "b")),
        {"both factors": 1.6, "B only": 1.25},
    )
    return times["both factors"]


def low_rank_steps() -> None:
    """Steps of the coupled manifolds over Adam, with and without the transport."""
    adam = optax.adam(RATE)
    bounded, fixed = ml.BoundedRank(), ml.FixedRank("orthographic")
    cases = {bounded: (pairs(("v", "a")), 1.6), fixed: (pairs(("v", "u"), True), 3.0)}
    for manifold, (start, most) in cases.items():
        table(
            f"{manifold}, Adam inside",
            {
                "optax.adam": adam,
                "riemannian(adam)": ml.riemannian(adam, manifold),
                "loram": ml.loram(RATE, manifold),
                "loram, coordinate": ml.loram(
                    RATE, manifold, second_moment="coordinate"
                ),
            },
            start,
            {"riemannian(adam)": most, "loram": most},
        )


def reference(name: str, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The retraction in float64 by dense factorisations."""
    r = x.shape[-1]
    if name == "polar":
        u, _, vt = np.linalg.svd(x + v, full_matrices=False)
        return u @ vt
    if name == "qr":
        q, upper = np.linalg.qr(x + v)
        return q * np.sign(np.diagonal(upper, axis1=-2, axis2=-1))[..., None, :]
    a = x.swapaxes(-1, -2) @ v
    normal = v - x @ a
    n = normal.swapaxes(-1, -2) @ normal
    if name == "cayley":
        half = np.eye(r) - a / 2 + n / 4
        return x + (v - x @ n / 2) @ np.linalg.inv(half)
    eye, zero = np.broadcast_to(np.eye(r), n.shape), np.zeros_like(n)
    e = scipy.linalg.expm(np.block([[a, -n], [eye, zero]]))
    return x @ e[..., :r, :r] + normal @ e[..., r:, :r]


def retractions(plot: str | None) -> None:
    """Time of projection and retraction over an Adam update, and the accuracy."""
    x = jnp.asarray(orthonormal(WIDTH))
    adam = Step(optax.adam(RATE), {"x": x})
    sizes = [1e-3, 0.1, 1.0, 10.0, 100.0]
    layer = x[:2]  # accuracy on two layers
    d = STIEFEL.random_tangent(jax.random.key(1), layer)
    d = d / jnp.linalg.norm(d, ord=2, axis=(-2, -1), keepdims=True)
    names: list[Retraction] = list(get_args(Retraction))
    moves, errors, residuals = {"adam": adam}, {}, {}
    for name in names:
        manifold = ml.Stiefel(name)
        moves[name] = Step(ml.riemannian(optax.sgd(RATE), manifold), {"x": x})
        retract = jax.jit(manifold.retract)
        points = [retract(layer, size * d) for size in sizes]
        exact = [
            reference(
                name, np.asarray(layer, np.float64), np.asarray(size * d, np.float64)
            )
            for size in sizes
        ]
        errors[name] = [
            np.max(np.abs(np.float64(y) - t))
            for y, t in zip(points, exact, strict=True)
        ]
        residuals[name] = max(float(manifold.residual(y).max()) for y in points)
    times = medians(moves)
    print("\nRetractions of (32, 4096, 16): SGD step with projection, × an Adam step;")
    print("largest error of an entry against float64 at spectral norm ‖v‖")
    print(f"{'':8} time  " + "".join(f"{size:>9g}" for size in sizes) + "  residual")
    for name in names:
        values = "".join(f"{error:9.1e}" for error in errors[name])
        ratio = times[name] / times["adam"]
        print(f"{name:8} {ratio:4.2f}  {values}  {residuals[name]:.1e}")
    if plot:
        draw(plot, sizes, errors, {k: times[k] / times["adam"] for k in names})


def draw(path: str, sizes: list[float], errors: dict, ratios: dict) -> None:
    """The table of retractions as a picture."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, values in errors.items():
        left.loglog(sizes, values, "o-", label=name)
    left.set(
        xlabel="‖v‖₂",
        ylabel="error against float64",
        title="accuracy in float32",
    )
    left.legend()
    right.barh(list(ratios), list(ratios.values()), color="tab:gray")
    right.set(title="project and retract, × an Adam step", xlabel="(32, 4096, 16)")
    right.invert_yaxis()
    figure.savefig(path, dpi=120)


def long_run(steps: int = 2000) -> None:
    """The residual after many float32 steps with large and small learning rates."""
    x = jnp.asarray(orthonormal(WIDTH)[:2])
    for name in get_args(Retraction):
        manifold = ml.Stiefel(name)
        tx = ml.riemannian(
            optax.adam(optax.cosine_decay_schedule(0.1, steps)), manifold
        )

        def move(carry, key, tx=tx):
            x, state = carry
            updates, state = tx.update(jax.random.normal(key, x.shape), state, x)
            return (optax.apply_updates(x, updates), state), None

        keys = jax.random.split(jax.random.key(2), steps)
        start = (x, tx.init(x))
        (end, _), _ = jax.jit(lambda c, k, f=move: jax.lax.scan(f, c, k))(start, keys)
        print(f"{name:8} {float(manifold.residual(end).max()):.1e}")


def collectives() -> None:
    """The collectives of one step on eight devices, by the sharding of the factors."""
    if len(jax.devices()) < 8:
        return print("  needs eight devices: not measured")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cases = {
        "Stiefel": (STIEFEL, pairs(("a", "b"))),
        "BoundedRank": (ml.BoundedRank(), pairs(("v", "a"))),
        "FixedRank": (ml.FixedRank("orthographic"), pairs(("v", "u"), True)),
    }
    for name, (manifold, start) in cases.items():
        tx = ml.riemannian(optax.adamw(RATE), manifold, transport=True)
        for axis, what in ((0, "layers"), (1, "rows")):

            def spec(x, axis=axis):
                sharded = x.ndim == 3 and (axis == 0 or x.shape[1] > RANK)
                names = ("x" if sharded and k == axis else None for k in range(x.ndim))
                sharding = jax.NamedSharding(mesh, jax.P(*names))
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            params = jax.tree.map(spec, start)
            state = jax.tree.map(spec, jax.eval_shape(tx.init, params))
            text = (
                jax.jit(tx.update).lower(params, state, params).compile().as_text()
                or ""
            )
            operations = re.findall(
                r"= (.*?) (all-\w+|collective-\w+|reduce-\w+er)\(", text
            )
            shapes = sorted(
                {s for shape, _ in operations for s in re.findall(r"\[.*?\]", shape)}
            )
            kinds = sorted({kind for _, kind in operations}) or ["none"]
            print(f"{name:12} over {what:7} {', '.join(kinds)} {' '.join(shapes)}")


def share_of_training(ours: float, config: ml.LlamaConfig, tokens: int) -> None:
    """The optimiser's share of a training step with random bfloat16 weights."""
    model = ml.Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    ml.attach(model, ml.AdapterConfig("stiefel", rank=RANK))
    rebuild, factors, frozen = split(model)
    tags = ml.manifold_tree(model)
    tx = ml.stiefel_lora(0.1, tags)
    ones = jnp.ones((1, tokens), jnp.int32)
    batch = {name: ones for name in ("input_ids", "segment_ids")}
    batch |= {"positions": jnp.arange(tokens)[None], "loss_mask": jnp.ones((1, tokens))}
    step = make_step(rebuild, tx, tags, axes(model))
    latest = [TrainState(factors, jax.jit(tx.init)(factors), jax.random.key(0))]

    def once() -> None:
        latest[0] = jax.block_until_ready(step(latest[0], frozen, batch))[0]

    whole = medians({"step": once}, repeats=7)["step"]
    print(f"  {ours:.2f} of {whole:.0f} ms: {100 * ours / whole:.1f} %, target ≤ 1 %")


def torch_peers(ours: float) -> None:
    """Geoopt's RiemannianAdam and StelLA's recipe (AdamW, batched SVD) in torch."""
    try:
        import geoopt  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("  torch and geoopt are not installed ([peers]): not measured")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = [x for pair in pairs(("a", "b")).values() for x in pair.values()]

    def tensors():
        made = [torch.tensor(x, device=device) for x in arrays]
        for x in made:
            x.grad = torch.randn_like(x)
        return made

    def waits(step):
        def call():
            step()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    manifold = geoopt.EuclideanStiefel()
    points = [geoopt.ManifoldParameter(x, manifold=manifold) for x in tensors()]
    for x in points:
        x.grad = torch.randn_like(x)
    riemannian = geoopt.optim.RiemannianAdam(points, lr=RATE)
    factors = tensors()
    adamw = torch.optim.AdamW(factors, lr=RATE)
    plain = torch.optim.AdamW(tensors(), lr=RATE)

    @torch.no_grad()
    def stella():
        for x in factors:  # the canonical gradient
            x.grad -= x @ (x.grad.mT @ x)
        before = [x.clone() for x in factors]
        adamw.step()
        for x, old in zip(factors, before, strict=True):
            d = x - old
            w = old.mT @ d
            u, _, vt = torch.linalg.svd(
                old + d - old @ (w + w.mT) / 2, full_matrices=False
            )
            x.copy_(u @ vt)

    calls = {
        "torch AdamW": waits(plain.step),
        "geoopt RiemannianAdam": waits(riemannian.step),
        "AdamW and SVD polar": waits(stella),
    }
    for name, value in medians(calls, repeats=5).items():
        print(f"{name:34} {value:5.0f}  {value / ours:5.2f} × our both factors")


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", help="write the table of retractions as a picture")
    plot = parser.parse_args().plot
    print(jax.devices()[0].device_kind)
    ours = stiefel_steps()
    low_rank_steps()
    print("\nPeers, same factors, same machine (ms, ratio)")
    torch_peers(ours)
    print("\nShare of a step of LLaMA-3-8B, 2,048 tokens, bfloat16 (a GPU of 40 GB)")
    if jax.default_backend() != "cpu":
        share_of_training(ours, LLAMA_3_8B, 2048)
    retractions(plot)
    print("\nResidual after 2,000 float32 steps of Adam, rate from 0.1 to 0")
    long_run()
    print("\nCollectives of a compiled step on eight devices, with transport")
    collectives()


if __name__ == "__main__":
    main()
