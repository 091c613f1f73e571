"""Results of runs that have not taken place."""


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
