"""Masks: which connections stay. Selection of exactly kappa, and what a mask does to a network.

Equation 7 of the paper. A mask is ``dict[str, BoolTensor]``, parameter name -> True where kept.
"""

import copy

import torch
from torch import Tensor, nn

from .saliency import Scores, prunable

Mask = dict[str, Tensor]


def n_kept(m: int, sparsity: float) -> int:
    """Return kappa = round((1 - sparsity) * m), the number of connections that stay.

    Raises:
        ValueError: sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction removed, in [0, 1), not {sparsity}.")
    return round((1 - sparsity) * m)


def keep_top(scores: Scores, n_keep: int) -> Mask:
    """Keep exactly the `n_keep` highest scores over all parameters (Eq. 7).

    Equal scores are kept in order: lower index first, in the order of the dict. The result is
    the same on every device and depends on the order of the scores alone.

    Raises:
        ValueError: a score is not finite, or `n_keep` is not between 0 and the number of scores.
    """
    flat = torch.cat([s.detach().flatten() for s in scores.values()])
    if not torch.isfinite(flat).all():
        bad = [name for name, s in scores.items() if not torch.isfinite(s).all()]
        raise ValueError(f"The scores of {', '.join(bad)} are not finite: nothing was pruned.")
    if not 0 <= n_keep <= flat.numel():
        raise ValueError(f"n_keep is between 0 and {flat.numel()}, not {n_keep}.")
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if n_keep:
        threshold = flat.kthvalue(flat.numel() - n_keep + 1).values  # the n_keep-th largest
        kept = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        kept[ties[: n_keep - int(kept.sum())]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def on_live_path(model: nn.Module, mask: Mask, x: Tensor) -> Mask:
    """Return which kept connections lie on a path of kept weights from an input to an output.

    With every weight replaced by its mask and every bias by 0, the output for an input of ones
    counts paths, so its derivative is positive exactly on the live ones. A bias is live where its
    unit reaches an output. `x` is one example's worth of shape, [1, ...]; float64 keeps counts exact.
    """
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, p in prunable(twin).items():
            kept = mask.get(name, torch.ones_like(p))
            # Scaled by the fan-in: the sign of a path count is what matters, and it cannot overflow.
            p.copy_(kept.double() / p[0].numel() if p.dim() > 1 else torch.zeros_like(p))
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.reset_parameters()
    parameters = {name: p for name, p in prunable(twin).items() if name in mask}
    output = twin(torch.ones_like(x, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(output, list(parameters.values()))
    return {name: mask[name] & (grad > 0) for name, grad in zip(parameters, gradients, strict=True)}


def sparsity_of(mask: Mask) -> float:
    """Return the fraction of connections that a mask removes."""
    return 1 - sum(int(kept.sum()) for kept in mask.values()) / sum(kept.numel() for kept in mask.values())
