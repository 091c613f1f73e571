"""The baselines against PEFT's, on PEFT's own orientation of the factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from manifold_lora import FactorSpec, lora_plus, scaled_gd
from tests.optimizers.numpy_reference import STEPS, TRAJECTORY

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")
pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PEFT = FactorSpec("lora_A/default/weight", "lora_B/default/weight", a_rank_axis=0)
RATE, DECAY = 0.05, 0.1


def peft_trajectory(make, **options):
    """The input, the target and the factors after every step of PEFT's optimiser."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 5))
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0", "1"])
    model = peft.get_peft_model(net, config).double()
    x, y = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    optimizer = make(
        model, torch.optim.AdamW, lr=RATE, weight_decay=DECAY, eps=1e-8, **options
    )

    def factors():
        return {
            name.split("model.")[-1].replace(".", "/"): p.detach().numpy().copy()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    layers = [module.base_layer for module in model.base_model.model]
    base = [(w.weight.detach().numpy(), w.bias.detach().numpy()) for w in layers]
    points = [factors()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum().backward()
        optimizer.step()
        points.append(factors())
    return base, x.numpy(), y.numpy(), points


def our_trajectory(tx, base, x, y, start):
    """The same network in JAX, with factors under the same names."""

    def loss(params):
        h = x
        for k, (w, c) in enumerate(base):
            a, b = (params[f"{k}/lora_{s}/default/weight"] for s in "AB")
            h = h @ w.T + c + (h @ a.T) @ b.T
        return jnp.sum((h - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=STEPS)[1])
    return jax.tree.map(np.asarray, run(start))


CASES = {
    "scaled_gd": (
        "create_riemannian_optimizer", {}, scaled_gd(RATE, PEFT, weight_decay=DECAY),
    ),
    "scaled_gd-damping": (
        "create_riemannian_optimizer",
        {"reg": 0.3},
        scaled_gd(RATE, PEFT, damping=0.3, weight_decay=DECAY),
    ),
    "lora_plus": (
        "create_loraplus_optimizer",
        {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": DECAY},
        lora_plus(RATE, PEFT, weight_decay=DECAY),
    ),
}  # fmt: skip


def difference(tx, maker, **options):
    """The largest difference of the two trajectories, and how far PEFT's went."""
    base, x, y, points = peft_trajectory(getattr(optimizers, maker), **options)
    with jax.enable_x64(True):
        ours = our_trajectory(tx, base, x, y, points[0])
    expected = {k: np.stack([p[k] for p in points[1:]]) for k in points[0]}
    largest = max(np.max(np.abs(ours[k] - expected[k])) for k in expected)
    return largest, min(
        np.max(np.abs(x[-1] - points[0][k])) for k, x in expected.items()
    )


@pytest.mark.parametrize(("maker", "options", "tx"), CASES.values(), ids=CASES)
def test_trajectories_are_those_of_peft(maker, options, tx):
    largest, moved = difference(tx, maker, **options)
    assert largest < TRAJECTORY and moved > 0.1


def test_parity_sees_another_damping():
    tx = scaled_gd(RATE, PEFT, damping=1e-3, weight_decay=DECAY)
    largest, _ = difference(tx, "create_riemannian_optimizer")
    assert largest > 1e-3
