"""Pure geometry of matrix manifolds, batched over leading axes.

Start with `manifold.py` (what a manifold offers) and `stiefel.py`.
"""

from manifold_lora.manifolds.euclidean import Euclidean as Euclidean
from manifold_lora.manifolds.manifold import Manifold as Manifold
from manifold_lora.manifolds.stiefel import Stiefel as Stiefel
