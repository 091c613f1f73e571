"""Every tolerance of the tests, by name."""

FLOAT64 = 1e-12  # laws in float64
FLOAT32 = 5e-6  # laws in float32, relative to the size of the numbers
RESIDUAL = 1e-6  # distance from a manifold in float32
BFLOAT16 = 8e-3  # one rounding of a stored bfloat16 number near 1
LOGITS = 5e-5  # logits against another implementation, float32
CONVERGENCE = 1e-5  # a found optimum against the known one, float32
SLOPE = 0.15  # a fitted order against the claimed one
MOMENTS = 1e-4  # moments after a step of which some are solutions of equations, float32
ADAM = 1e-2  # of what a factor has moved: Adam divides small gradients by themselves
EFFECTIVE_RANK = 1e-3  # entropy effective rank against r
HYPERPARAMETER = 2e-5  # a step with 1 − β in float32 instead of float64
ANY_STEP = 1e-5  # constraint violation after a step of any finite length, float32
