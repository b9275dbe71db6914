"""Initialisers: where the weights start, and with them the connection sensitivity (Section 4.2).

``INITS[name](weight, generator)`` fills one weight in place; `initialise` does a whole network.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .saliency import prunable

# The standard deviation of a standard normal that is cut at two standard deviations.
CUT_SD = 0.8796256610342398


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight shaped [out, in, *kernel]."""
    receptive = math.prod(weight.shape[2:])
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def _cut_normal(weight: Tensor, variance: float, generator: torch.Generator) -> None:
    """Fill with a normal cut at two sd whose variance after the cut is `variance`.

    Drawn in float64 by inverting the distribution function, since float32 draws differ between CPUs.
    """
    edge = math.erf(math.sqrt(2))  # P(|z| < 2)
    uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    z = math.sqrt(2) * torch.erfinv((2 * uniform - 1) * edge)
    weight.copy_(z.clamp(-2, 2) * math.sqrt(variance) / CUT_SD)


def vs_x(weight: Tensor, generator: torch.Generator) -> None:
    """VS-X, Glorot & Bengio (2010): cut normal of variance 2 / (fan_in + fan_out)."""
    _cut_normal(weight, 2 / sum(fans(weight)), generator)


INITS: dict[str, Callable[[Tensor, torch.Generator], None]] = {"vs_x": vs_x}


def initialise(model: nn.Module, init: str, generator: torch.Generator) -> None:
    """Draw every weight of `model` anew with `INITS[init]`, in module order; biases become 0."""
    with torch.no_grad():
        for parameter in prunable(model).values():
            if parameter.dim() > 1:
                INITS[init](parameter, generator)
            else:
                parameter.zero_()
