"""SNIP: single-shot network pruning based on connection sensitivity (Lee, Ajanthan & Torr, 2019).

    mask = snip_lib.prune(model, x, y, sparsity=0.95)

Read in this order: `saliency`, `masks`, `prune` (the algorithm); `models`, `inits`, `data`, `train`,
`runs` (the reproduction); `claims`, `plots` (the report).
"""

from .masks import keep_top
from .prune import prune
from .saliency import CRITERIA

__all__ = ["CRITERIA", "keep_top", "prune"]
