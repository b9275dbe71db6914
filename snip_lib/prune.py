"""Single-shot pruning: Algorithm 1 of the paper, for any network.

``mask = prune(model, x, y, sparsity=0.95)``: one forward and one backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import Mask, keep_top, n_kept
from .saliency import CRITERIA, Loss


def prune(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sparsity: float,
    method: str = "snip",
    loss: Loss = F.cross_entropy,
    prune_biases: bool = True,
    score_bn: str = "batch",
    dtype: torch.dtype = torch.float32,
) -> Mask:
    """Return the mask that keeps the top kappa connections of `model` at this batch (Algorithm 1).

    `sparsity` is the fraction removed, over all prunable parameters together; the model stays
    exactly as it was. `x` is [B, ...]; `loss(model(x), y)` is a scalar.

    Raises:
        ValueError: unknown method, sparsity outside [0, 1), a loss or score that is not finite.
    """
    if method not in CRITERIA:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(CRITERIA)}.")
    n_kept(1, sparsity)  # refuses a wrong sparsity before the work
    scores = CRITERIA[method](model, x, y, loss=loss, biases=prune_biases, bn=score_bn, dtype=dtype)
    return keep_top(scores, n_kept(sum(s.numel() for s in scores.values()), sparsity))
