"""Saliency criteria: how much each connection of a network matters, before any training.

Section 4.1 of the paper, Equations 4-6. A criterion is a function ``(model, x, y, ...) -> scores``;
`masks.py` turns scores into a mask, `prune.py` is the two together.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# The modules whose parameters are connections. Normalisation layers only rescale: they are never pruned.
CONNECTIONS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def prunable(model: nn.Module, *, biases: bool = True) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name: all weights, then all biases, each in module order.

    A weight is a parameter with two or more dimensions of a linear, convolutional, recurrent or
    attention module, a bias one with a single dimension; the order decides ties (DESIGN 3).

    Raises:
        ValueError: the model has no prunable parameter.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, CONNECTIONS):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if all(parameter is not other for other in found.values()):
                    found[name] = parameter
    weights = {name: p for name, p in found.items() if p.dim() > 1}
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no prunable parameter: it holds no linear, convolutional, "
            "recurrent or attention weight."
        )
    return weights | ({name: p for name, p in found.items() if p.dim() == 1} if biases else {})


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Switch autocast and every reduced-precision matrix product off, and restore them afterwards."""
    tf32, cudnn_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_float32_matmul_precision(tf32)
        torch.backends.cudnn.allow_tf32 = cudnn_tf32


def scoring_copy(model: nn.Module, *, dtype: torch.dtype, bn: str) -> nn.Module:
    """Copy `model` for scoring, so that the original stays exactly as it was.

    ``bn="batch"``: batch norm uses the statistics of the scoring batch, as in training.
    ``bn="fresh"``: batch norm is in inference mode with mean 0 and variance 1. Dropout is off.
    """
    if bn not in ("batch", "fresh"):
        raise ValueError(f'score_bn is "batch" or "fresh", not {bn!r}.')
    twin = copy.deepcopy(model).to(dtype).eval()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if bn == "fresh":
                module.reset_running_stats()
            else:
                module.train()
        elif isinstance(module, nn.RNNBase):
            module.train().dropout = 0.0  # cuDNN has a backward pass in training mode only
    return twin


def connection_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    biases: bool = True,
    bn: str = "batch",
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Return g = dL/dc at c = 1 (Eq. 5) for every prunable parameter, by one forward and backward pass.

    The network computes with c * w, so by the chain rule g = w * dL/dw: no mask variable is needed.
    `x` is [B, ...] and `y` what `loss(model(x), y)` takes; g is signed and shaped like the parameters.

    Raises:
        ValueError: the loss is not finite, or no prunable parameter.
    """
    device = x.device
    twin = scoring_copy(model, dtype=dtype, bn=bn)
    parameters = prunable(twin, biases=biases)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    with exact_arithmetic(device), torch.enable_grad():
        value = loss(twin(x.to(dtype) if x.is_floating_point() else x), y)
        if not torch.isfinite(value):
            raise ValueError(f"The loss of the scoring batch is {value.item()}: no connection can be scored.")
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(w) if grad is None else (w * grad).detach()
        for (name, w), grad in zip(parameters.items(), gradients, strict=True)
    }


def snip(model: nn.Module, x: Tensor, y: Tensor, **scoring) -> Scores:
    """Return the connection sensitivity s = |g| / sum |g| (Eq. 6); `scoring` as in `connection_gradients`."""
    scores = {name: g.abs() for name, g in connection_gradients(model, x, y, **scoring).items()}
    total = sum(s.sum() for s in scores.values())
    return {name: s / total for name, s in scores.items()} if total > 0 else scores


CRITERIA: dict[str, Callable[..., Scores]] = {"snip": snip}
