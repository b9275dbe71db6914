"""Attacks: how far an image must move before a trained network takes it for something else.

Projected gradient descent (Madry et al., 2018), in pixel units. The robustness studies of Verdenius, Stol & Forre
(2020) attack one batch; `attacked` takes a sample of the test set, the same for every way to prune.
Read `models` next.
"""

import contextlib
from collections.abc import Iterable
from numbers import Integral

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .saliency import evaluated, shape_of

RELUS = (F.relu, torch.relu, Tensor.relu)  # by these names modules call it, too

# By how much the images of a run are changed (`Run.attacked`), in pixel units. 0.3 in "linf" is the attack on MNIST of
# Madry et al. (2018); the smaller ones are for networks without a defence. At the last radius of each norm every image
# of 28x28 pixels may become any other: what gradients alone leave there, they fail to find.
RADII = {"linf": (0.05, 0.1, 0.15, 0.3, 1.0), "l2": (0.5, 1.0, 1.5, 3.0, 28.0)}
ATTACKED = 50  # test images of each class
ATTACK = {"steps": 40, "restarts": 2, "leak": 0.2, "aims": 50}  # how rows are attacked, and what they say of it


@torch.inference_mode(False)  # else there are no gradients
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 40,
    restarts: int = 2,
    leak: float = 0.2,
    aims: int = 50,
    others: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images near `x` that `model` takes for something else, where projected gradient ascent finds any.

    `x` is [B, ...] in pixel units, in [0, 1], and so is what is returned; `model` takes such images (put the
    normalisation inside). They stay within `eps` of `x`: "linf", the largest change of a pixel, or "l2", the
    Euclidean length of the change. The first of the `restarts` begins at `x`, the others at random points of that
    ball, drawn from a CPU `generator` (None: one seeded with 0). Steps of 2.5 eps / steps go up the lead of the
    best wrong class over `y` (the margin loss of Carlini & Wagner, 2017) from the first start, and from the others
    up the odds against `y`, as cross-entropy does, whose own gradient would vanish where the network is sure of
    itself. Where the network is flat there is no gradient at all. So one more start, at `x`, goes up a gradient
    that passes through a ReLU that is off, `leak` times as large (backward pass differentiable approximation;
    Athalye et al., 2018; 0: no such start). And one needs no gradient (0 aims: none does): from `x` as far as
    allowed towards images that the model takes for another class, the `aims` nearest of `others` [N, ...] (None: of
    `x`); the best of these points is the start, and an image within `eps` is reached. An image that no step turns
    comes back as it was, and so does the model. `y` are the class numbers, [B].

    Raises:
        ValueError: a norm that is neither; a radius, leak or number of aims below 0, no step, no restart, half a step;
            pixels outside of [0, 1] or not floating-point; `y` that is not one class number for each image, or one
            that the network has no output for.
    """
    _check_images(x, y)
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm is "linf" or "l2", not {norm!r}.')
    if not all(isinstance(n, Integral) for n in (steps, restarts, aims)):
        raise ValueError(f"steps, restarts and aims are whole numbers, not {steps}, {restarts} and {aims}.")
    if not (eps >= 0 and leak >= 0 and aims >= 0 and steps >= 1 and restarts >= 1):
        numbers = f"{eps}, {leak}, {aims}, {steps} and {restarts}"
        raise ValueError(f"eps, leak and aims are 0 or more, steps and restarts 1 or more, not {numbers}.")
    starts = ["image", *["random"] * (restarts - 1), *["leaky"] * (leak > 0), *["towards"] * (aims > 0)]
    others = x if others is None else others
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found, held = x.clone(), torch.arange(len(x), device=x.device)  # held: which images no step has turned yet
    with torch.enable_grad(), evaluated(model):
        for start in starts if eps > 0 else []:
            if not len(held):
                break
            near = x[held]
            if start == "towards":
                near = _towards(model, near, y[held], others, eps, norm, aims)
            elif start == "random":
                draws = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)[held]
                near = (near + _shorten(2 * draws - 1, eps, norm, fill=True)).clamp(0, 1)
            for step in range(steps + 1):
                if not len(held):
                    break
                near = near.detach().requires_grad_(True)
                with _Leaking(leak) if start == "leaky" else contextlib.nullcontext():
                    output = model(near)
                lead = _lead(output, y[held])
                higher = lead if start == "image" else _odds(output, y[held])
                (up,) = torch.autograd.grad(higher.sum(), near)
                turned, near = lead > 0, near.detach()
                found[held[turned]] = near[turned]
                near, up, held = near[~turned], up[~turned], held[~turned]
                if step < steps:
                    up = up.sign() if norm == "linf" else up / _length(up)
                    moved = near + 2.5 * eps / steps * up
                    near = (x[held] + _shorten(moved - x[held], eps, norm)).clamp(0, 1)  # only brings it closer to x
    return found


def _lead(output: Tensor, y: Tensor) -> Tensor:
    """Return the lead of the best wrong class over `y`, [B]: above 0 where the image is turned."""
    _check_classes(output, y)
    own = F.one_hot(y, output.shape[1]).bool()
    return output.masked_fill(own, -torch.inf).amax(1) - output[own]


def _odds(output: Tensor, y: Tensor) -> Tensor:
    """Return the log odds against `y`, [B]: cross-entropy's way up, but not its vanishing gradient."""
    own = F.one_hot(y, output.shape[1]).bool()
    return output.masked_fill(own, -torch.inf).logsumexp(1) - output[own]


@torch.no_grad()
def _towards(model: nn.Module, x: Tensor, y: Tensor, others: Tensor, eps: float, norm: str, aims: int) -> Tensor:
    """Return, of the points on the way from each image to others that `model` takes for another class, the best."""
    away = torch.cdist(x.flatten(1), others.flatten(1))
    away[y[:, None] == model(others).argmax(1)] = torch.inf  # to be tried last
    best, highest = x, torch.full_like(away[:, 0], -torch.inf)
    for aim in away.topk(min(aims, len(others)), largest=False).indices.T:
        near = (x + _shorten(others[aim] - x, eps, norm)).clamp(0, 1)
        lead = _lead(model(near), y)
        better = (lead > highest).view(-1, *[1] * (x.dim() - 1))
        best, highest = torch.where(better, near, best), lead.maximum(highest)
    return best


class _Leaking(TorchFunctionMode):
    """While this is on, gradients pass through a ReLU that is off, `leak` times as large; its output is the same."""

    def __init__(self, leak: float):
        super().__init__()
        self.leak = leak

    def __torch_function__(self, called, types, args=(), kwargs=None):
        if called not in RELUS:
            return called(*args, **kwargs or {})
        leaked = self.leak * args[0]  # before a ReLU that works in place
        output = called(*args, **kwargs or {})
        return output + torch.where(output > 0, 0, leaked - leaked.detach())


def _check_images(x: Tensor, y: Tensor) -> None:
    """Refuse what is no batch of images in pixel units with their classes."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        what = x.dtype if isinstance(x, Tensor) else shape_of(x)
        raise ValueError(f"x is a tensor of floating-point images in [0, 1], not {what}.")
    if not ((x >= 0) & (x <= 1)).all():  # nan is neither
        raise ValueError("Attacks are in pixel units: x lies in [0, 1], and the normalisation belongs to the model.")
    if not isinstance(y, Tensor) or y.shape != x.shape[:1] or y.dtype != torch.long or (y < 0).any():
        raise ValueError(f"y is one class number of type int64 for each of the {len(x)} images.")


def _check_classes(output: Tensor, y: Tensor) -> None:
    """Refuse classes that the network has no output for."""
    if (y >= output.shape[1]).any():
        raise ValueError(f"y has class {int(y.max())}, but the network's {output.shape[1]} outputs are classes from 0.")


def _length(change: Tensor) -> Tensor:
    """Return the Euclidean length of each example of a batch, never 0, shaped to divide it."""
    length = change.flatten(1).norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
    return length.view(-1, *[1] * (change.dim() - 1))


def _shorten(change: Tensor, eps: float, norm: str, *, fill: bool = False) -> Tensor:
    """Project a batch of changes on the ball of radius eps; with `fill` scale draws from [-1, 1] to it."""
    if norm == "linf":
        return eps * change if fill else change.clamp(-eps, eps)
    scale = eps / _length(change)
    return change * (scale if fill else scale.clamp(max=1))


def attack_success(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: Iterable[float], chunk: int = 500, **attack
) -> pd.Series:
    """Return the share of the images that `model` gets right and `pgd` turns, in percent, by radius `eps`.

    Images that are wrong already do not count; ``.attrs["right"]`` is how many are right. What a smaller radius
    turns counts as turned at a larger one, so that the share cannot fall. Where every image may become any other it
    reaches 100 % through the start that needs no gradient, unless the model takes all of `x` for one class: with
    ``aims=0`` it shows whether gradients find the way. `attack` and errors: as in `pgd`, but that `others` are all of
    `x`; a ValueError also for a single radius, and for a `chunk` below 1.
    """
    if not isinstance(eps, Iterable) or chunk < 1:
        raise ValueError(f"eps is a list of radii and chunk 1 or more, not {eps} and {chunk}.")
    _check_images(x, y)
    attack = {"others": x} | attack
    radii, right = sorted(set(eps)), 0
    for radius in radii:
        pgd(model, x[:0], y[:0], eps=radius, **attack)  # refuses what is no attack, even if no image is right
    turned = dict.fromkeys(radii, 0)
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        with torch.no_grad(), evaluated(model):
            output = model(a)
        _check_classes(output, b)
        ok = output.argmax(1) == b
        a, b, right = a[ok], b[ok], right + int(ok.sum())
        for radius in radii:
            if len(b):
                near = pgd(model, a, b, eps=radius, **attack)
                held = (near == a).flatten(1).all(1)
                a, b = a[held], b[held]
            turned[radius] += int(ok.sum()) - len(b)
    success = pd.Series({radius: 100 * n / max(1, right) for radius, n in turned.items()}, name="success %")
    success.attrs = {"right": right}
    return success.rename_axis("eps")


def attacked(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> dict:
    """Return what a row says of a network under attack: accuracies at each of `RADII`, by `attack_success`.

    `x` and `y` are the test set in pixel units, of which `ATTACKED` images of each class are drawn from a CPU
    `generator` (all, of a class that has fewer). ``attacked_linf_0.1`` is the percentage of those that `model` gets
    right and still gets right when each pixel may change by 0.1; ``attacked_images`` how many are drawn, and
    ``attacked_right`` how many are right (where none is, there is no accuracy: None). ``gradients_linf_1`` and
    ``gradients_l2_28`` are the accuracies at the last radius of each norm, where any image may become any other, from
    the starts at the image alone, which nothing but gradients leads away: 0, unless these mislead the attack.
    ``attack`` is `ATTACK`: of rows that were attacked in another way, none is to be compared with these.
    """
    order = torch.randperm(len(y), generator=generator)
    labels = y.cpu()[order]
    chosen = torch.cat([order[labels == label][:ATTACKED] for label in labels.unique()]).to(x.device)
    x, y = x[chosen], y[chosen]
    found: dict = {"attack": dict(ATTACK), "attacked_images": len(chosen)}  # choice: book/choices.md#attacks
    for norm, radii in RADII.items():
        every = attack_success(model, x, y, eps=radii, norm=norm, chunk=100, **ATTACK)
        by_gradients = ATTACK | {"restarts": 1, "aims": 0}  # noise or a look at other images turns many by itself
        alone = attack_success(model, x, y, eps=radii[-1:], norm=norm, chunk=100, **by_gradients)
        found["attacked_right"] = right = every.attrs["right"]
        for name, success in (("attacked", every), ("gradients", alone)):
            held = {eps: round(100 - share, 2) if right else None for eps, share in success.items()}
            found |= {f"{name}_{norm}_{eps:g}": share for eps, share in held.items()}
    return found
