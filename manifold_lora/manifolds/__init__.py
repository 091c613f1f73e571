"""Pure geometry of matrix manifolds, batched over leading axes.

Start with `oblique.py`, then `manifold.py` (what a manifold offers) and `stiefel.py`.
"""

from manifold_lora.manifolds.bounded_rank import BoundedRank as BoundedRank
from manifold_lora.manifolds.euclidean import Euclidean as Euclidean
from manifold_lora.manifolds.fixed_rank import FixedRank as FixedRank
from manifold_lora.manifolds.manifold import Manifold as Manifold
from manifold_lora.manifolds.oblique import Oblique as Oblique
from manifold_lora.manifolds.stiefel import Stiefel as Stiefel
from manifold_lora.manifolds.truncation import truncate as truncate
