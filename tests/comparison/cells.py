"""Results of runs that have not taken place, and the examples of a comparison."""

from manifold_lora.comparison.config import resolve_comparison
from manifold_lora.comparison.splits import split_held_out
from manifold_lora.data.tokens import load_tokenizer
from manifold_lora.training.data import load_data
from tests.configs import compare_config


def cell(method, seed, losses, curve, rates=(0.1,), **changes):
    """The result of a run whose curve has a point every 10 steps."""
    return {
        "method": method,
        "rank": 4,
        "trainable": 1000,
        "rates": list(rates),
        "seed": seed,
        "steps": len(losses),
        "diverged": False,
        "losses": losses,
        "curve": [{"step": 10 * i, "loss": x} for i, x in enumerate(curve)],
        "final": {
            "loss": curve[-1],
            "accuracy": 0.5 + 0.1 * seed,
            "exact_match": 0.2 + 0.2 * seed,
        },
        "largest_residual": 0.0,
        "last_residual": 0.0,
        "effective_rank_b": 3.0 + seed,
        "least_effective_rank_b": 2.0 + seed,
        "effective_rank_update": 2.5,
        "step_seconds": 0.5,
    } | changes


def splits_of(settings):
    """The examples of a comparison with these settings."""
    config = next(iter(resolve_comparison(compare_config(**settings)).runs.values()))
    return split_held_out(config, load_data(config, load_tokenizer(settings["model"])))
