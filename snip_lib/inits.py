"""Initialisers: where the weights start, and with them the connection sensitivity (Section 4.2).

``INITS[name](weight, generator, sd=1.0)`` fills one weight in place; `initialise` does a whole network.
RN and TN have the same standard deviation in every layer, which lets signals vanish or explode with
depth; the variance-scaling ones choose it from the layer's fans. Next: `data`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .saliency import prunable

# The standard deviation of a standard normal that is cut at two standard deviations.
CUT_SD = 0.8796256610342398


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight shaped [out, in, *kernel], each times the kernel's size."""
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


def rn(weight: Tensor, generator: torch.Generator, sd: float = 1.0) -> None:
    """RN, "random normal": mean 0, variance sd^2, the same in every layer."""
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * sd)


def tn(weight: Tensor, generator: torch.Generator, sd: float = 1.0) -> None:
    """TN, "truncated normal": a normal of this sd cut at two sd; variance after the cut 0.7737 sd^2.

    `sd` is the one before the cut, as in TensorFlow's `truncated_normal_initializer`.
    """
    _cut_normal(weight, (CUT_SD * sd) ** 2, generator)


def vs_x(weight: Tensor, generator: torch.Generator, sd: float = 1.0) -> None:
    """VS-X, Glorot & Bengio (2010): cut normal of variance 2 / (fan_in + fan_out) after the cut; `sd` unused."""
    _cut_normal(weight, 2 / sum(fans(weight)), generator)


def vs_h(weight: Tensor, generator: torch.Generator, sd: float = 1.0) -> None:
    """VS-H, He et al. (2015): cut normal of variance 2 / fan_in after the cut; `sd` unused."""
    _cut_normal(weight, 2 / fans(weight)[0], generator)


def lecun(weight: Tensor, generator: torch.Generator, sd: float = 1.0) -> None:
    """LeCun et al. (1998): cut normal of variance 1 / fan_in after the cut, the released code's; `sd` unused."""
    _cut_normal(weight, 1 / fans(weight)[0], generator)


# choice: book/choices.md#initialiser
INITS: dict[str, Callable[..., None]] = {draw.__name__: draw for draw in (rn, tn, vs_x, vs_h, lecun)}


BIAS_INITS = ("constant", "random")


def initialise(
    model: nn.Module, init: str, generator: torch.Generator, *, sd: float = 1.0, bias_init: str = "constant"
) -> None:
    """Draw every weight of `model` anew with `INITS[init]`, in module order; biases become 0.

    A module's biases start at its `bias_start` instead where it has one (the GRU's gates: 1). With
    ``bias_init="random"`` a bias starts as one more column of its layer's weights, drawn after all weights.
    `sd` is the standard deviation of RN and TN, which the paper does not state; 1 is TensorFlow's default.

    Raises:
        ValueError: unknown initialiser or `bias_init`, or `sd` is not positive.
    """
    if bias_init not in BIAS_INITS:
        raise ValueError(f"Unknown bias_init {bias_init!r}: choose one of {', '.join(BIAS_INITS)}.")
    if init not in INITS:
        raise ValueError(f"Unknown initialiser {init!r}: choose one of {', '.join(INITS)}.")
    if not 0 < sd < math.inf:
        raise ValueError(f"sd is the positive standard deviation of rn and tn, not {sd}.")
    with torch.no_grad():
        for name, parameter in prunable(model).items():  # weights come before biases
            module = model.get_submodule(name.rpartition(".")[0])
            if parameter.dim() > 1:
                INITS[init](parameter, generator, sd)
            elif bias_init == "random":
                column = torch.empty_like(module.weight)
                INITS[init](column, generator, sd)
                parameter.copy_(column.flatten(1)[:, 0])
            else:
                parameter.fill_(getattr(module, "bias_start", 0.0))
