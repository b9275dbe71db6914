"""Masks: which connections stay. Selection of exactly kappa, and what a mask does to a network.

Equation 7 of the paper. A mask is ``dict[str, BoolTensor]``, parameter name -> True where kept, with all
weights before all biases, each in module order. Read `prune.py` next.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from .saliency import CONNECTIONS, Scores, held, is_bias, mask_at, recompute, rename_in_place

Mask = dict[str, Tensor]
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile; DataParallel and its kin


# --- choosing -------------------------------------------------------------------------------------------


def n_kept(m: int, sparsity: float) -> int:
    """Return kappa = round((1 - sparsity) * m), the number of connections that stay.

    Raises:
        ValueError: sparsity is no number in [0, 1).
    """
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction removed, a plain number in [0, 1), not {sparsity!r}.")
    return round((1 - sparsity) * m)  # choice: book/choices.md#how-many-are-kept


def keep_top(scores: Scores, n_keep: int, *, among: Mask | None = None) -> Mask:
    """Keep exactly the `n_keep` highest scores over all parameters (Eq. 7), of those that `among` keeps.

    Equal scores are kept in order: lower index first, in the order of the dict. The result is
    the same on every device and depends on the order of the scores alone; so masks of the same
    scores are nested.

    Raises:
        ValueError: there is no score, one is not finite, or `n_keep` is not between 0 and their number.
    """
    if not scores:
        raise ValueError("There are no scores to choose from.")
    device = next(iter(scores.values())).device
    flat = torch.cat([s.detach().flatten().to(device) for s in scores.values()])
    if not torch.isfinite(flat).all():
        bad = [name for name, s in scores.items() if not torch.isfinite(s).all()]
        raise ValueError(f"The scores of {', '.join(bad)} are not finite: nothing was pruned.")
    n_choices = flat.numel()
    if among is not None:
        eligible = torch.cat([among[name].flatten().to(device) for name in scores])
        flat, n_choices = torch.where(eligible, flat, -torch.inf), int(eligible.sum())
    if not 0 <= n_keep <= n_choices:
        raise ValueError(f"n_keep is between 0 and {n_choices}, not {n_keep}.")
    kept = torch.zeros_like(flat, dtype=torch.bool)
    if n_keep:
        threshold = flat.kthvalue(flat.numel() - n_keep + 1).values  # the n_keep-th largest
        kept = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        kept[ties[: n_keep - int(kept.sum())]] = True  # choice: book/choices.md#ties
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: part.view(s.shape).to(s.device) for (n, s), part in zip(scores.items(), parts, strict=True)}


def keep_top_per_layer(scores: Scores, sparsity: float, *, among: Mask | None = None) -> Mask:
    """Keep the highest `n_kept(numel, sparsity)` scores of each parameter by itself."""
    return {
        name: keep_top({name: s}, n_kept(s.numel(), sparsity), among=among and {name: among[name]})[name]
        for name, s in scores.items()
    }


def invert(scores: Scores) -> Scores:
    """Reverse the order of the scores, so that `keep_top` keeps the least salient (0 is no trap, as in 1/s)."""
    return {name: -s for name, s in scores.items()}


def random_at_densities(densities: dict[str, float], shapes: dict[str, Iterable[int]], generator) -> Mask:
    """Draw a mask with round(density * numel) connections in each parameter, placed uniformly at random.

    `shapes` gives the order and the shapes, e.g. ``{n: p.shape for n, p in prunable(model).items()}``;
    `generator` is a CPU `torch.Generator`; the mask is on the CPU.

    Raises:
        ValueError: a density that is missing, or outside [0, 1].
    """
    mask = {}
    for name, shape in shapes.items():
        if not 0 <= densities.get(name, -1) <= 1:
            raise ValueError(f"The density of {name} is a fraction in [0, 1], not {densities.get(name)}.")
        kept = torch.zeros(tuple(shape), dtype=torch.bool)
        order = torch.randperm(kept.numel(), generator=generator)
        kept.view(-1)[order[: round(densities[name] * kept.numel())]] = True
        mask[name] = kept
    return mask


def shuffle_within_layers(mask: Mask, generator: torch.Generator) -> Mask:
    """Return a new mask with the same number kept in each parameter, at places drawn from a CPU `generator`."""
    shuffled = random_at_densities(densities(mask), {name: kept.shape for name, kept in mask.items()}, generator)
    return {name: kept.to(mask[name].device) for name, kept in shuffled.items()}


def densities(mask: Mask) -> dict[str, float]:
    """Return the fraction kept of each parameter."""
    return {name: int(kept.sum()) / max(1, kept.numel()) for name, kept in checked(mask).items()}


def sparsity_of(mask: Mask) -> float:
    """Return the fraction of connections that a mask removes."""
    kept = checked(mask).values()
    return 1 - sum(int(k.sum()) for k in kept) / sum(k.numel() for k in kept)


def collapsed(mask: Mask) -> list[str]:
    """Return the weights of which nothing is kept, by name."""
    return [name for name, kept in mask.items() if not is_bias(name, kept) and not kept.any()]


# --- applying -------------------------------------------------------------------------------------------


class MaskedWeight(Tensor):
    """A computed weight, w * c, that can be deep-copied: `torch.nn.utils.prune` leaves it on the module."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors, as of nn.Parameter

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), self.detach().clone())  # computed anew before its next use


class Connectivity(torch_prune.CustomFromMask):
    """`torch.nn.utils.prune.custom_from_mask`, with a weight that can be deep-copied."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        weight = super().apply_mask(module)
        return weight if torch.compiler.is_exporting() else weight.as_subclass(MaskedWeight)


def checked(mask: Mask) -> Mask:
    """Return `mask`; ValueError if it is none, or empty."""
    if not isinstance(mask, dict) or not mask:
        kind = "empty" if isinstance(mask, dict) else type(mask).__name__
        hint = "; load_mask returns (mask, metadata)" if isinstance(mask, tuple) else ""
        raise ValueError(f"The mask is {kind}: it names no parameter{hint}.")
    for name, kept in mask.items():
        kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        if kind != torch.bool:
            raise ValueError(f"The mask of {name} is {kind}, not torch.bool: True is kept.")
    return mask


def _remedy(mask: Mask, every: Iterable[str]) -> str:
    """Return what to do where only a wrapper's prefix tells the names of a mask from those of the network."""
    for prefix in WRAPPERS:
        if set(mask) <= {name.removeprefix(prefix) for name in every}:
            return f". The network is wrapped: mask the one inside, .{prefix[:-1]}, and wrap it afterwards"
        if {name.removeprefix(prefix) for name in mask} <= set(every):
            return f". The mask is of a wrapped network: without the {prefix!r} before its names it fits"
    return ""


def named(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """Return the parameter that each name of `mask` means.

    Raises:
        ValueError: the mask is empty or no boolean, names a parameter that is not there or one twice (by
            two of its tied names), or has another shape.
    """
    every = {name: parameter for _, _, name, parameter in held(model)}
    if unknown := [str(name) for name in checked(mask) if name not in every]:
        raise ValueError(
            f"The mask is of another network: {type(model).__name__} has no {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; it has "
            f"{', '.join(list(every)[:3])}, ...{_remedy(mask, every)}"
        )
    for name, kept in mask.items():
        if kept.shape != every[name].shape:
            raise ValueError(f"The mask of {name} is {list(kept.shape)}, the parameter {list(every[name].shape)}.")
    found = {name: every[name] for name in mask}
    if len({id(p) for p in found.values()}) < len(found):
        twice = [n for n in found if sum(found[n] is p for p in found.values()) > 1]
        raise ValueError(f"{' and '.join(twice)} are one tied parameter: the mask names it more than once.")
    return found


@torch.inference_mode(False)  # else the masks could not be trained with
def apply_mask(model: nn.Module, mask: Mask) -> nn.Module:
    """Mask `model` in place with PyTorch's own `torch.nn.utils.prune`, and return it.

    The weights that go become 0 at once, and every use of a weight is w * c, so that they have no effect whatever an
    optimiser does (momentum from before the mask still moves the ``weight_orig`` behind it). Every module that holds
    a tied parameter is masked. `remove_mask` makes the model plain again, with its zeros. Create the optimiser before
    or after: the parameters are the same objects, in the same order. A second mask may only take away. A checkpoint
    of the masked model (``weight_orig``, ``weight_mask``) loads into a model that any mask of these parameters was
    applied to. A product is computed once for each module that its weight lies in, since any of them may be called by
    itself: deep nesting costs time in small batches. What is not called computes nothing: after a step or
    ``load_state_dict``, a method other than ``forward`` finds the weights of the last call.

    Raises:
        ValueError: names or shapes that do not fit, a module's own buffer where torch keeps a mask, or a mask that
            wants removed connections back.
    """
    parameters = named(model, mask)
    name_of = {id(p): name for name, p in parameters.items()}
    places = [(m, a, name_of[id(p)]) for m, a, _, p in held(model) if id(p) in name_of]
    for module, attribute, name in places:
        before = mask_at(module, attribute)
        if before is None and hasattr(module, f"{attribute}_mask"):
            raise ValueError(f"{name} has a {attribute}_mask of its own, where torch keeps masks: rename it.")
        if before is not None and (mask[name].to(before.device) & (before == 0)).any():
            raise ValueError(f"The mask wants connections of {name} back that an earlier mask removed (see within=).")
    with torch.no_grad():
        for name, p in parameters.items():
            p.masked_fill_(~mask[name].to(p.device), 0)  # inf times 0 is nan
    for module, attribute, name in places:
        if (before := mask_at(module, attribute)) is not None:
            before.copy_(mask[name])
        else:
            kept = mask[name].to(parameters[name].device)
            masking = partial(Connectivity.apply, module, attribute, mask=kept)
            rename_in_place(module, attribute, f"{attribute}_orig", masking)
    holders = {module for module, _, _ in places}
    for module in model.modules():
        masked_inside = any(inner in holders for inner in module.modules() if inner is not module)
        if masked_inside and recompute not in module._forward_pre_hooks.values():
            # First, so that whatever hook comes later already sees the weights.
            module.register_forward_pre_hook(recompute, prepend=True)
    recompute(model)
    return model


def mask_of(model: nn.Module) -> Mask:
    """Return the mask that `torch.nn.utils.prune` (so also `apply_mask`) holds in `model`, weights before biases.

    Raises:
        ValueError: nothing is masked.
    """
    # A tied parameter goes by the name that `prunable` gives it.
    first = sorted(held(model), key=lambda place: not isinstance(place[0], CONNECTIONS))
    name_of: dict[int, str] = {}
    for _, _, name, p in first:
        name_of.setdefault(id(p), name)
    mask = {}
    for module, attribute, name, p in held(model):
        kept = mask_at(module, attribute)
        if kept is not None and name_of[id(p)] == name:
            mask[name] = kept.bool()
    if not mask:
        raise ValueError(f"{type(model).__name__} has no mask: apply_mask(model, mask) gives it one.")
    return dict(sorted(mask.items(), key=lambda item: is_bias(*item)))


def redraw(
    model: nn.Module, mask: Mask, init: Callable[[Tensor, torch.Generator], object], generator: torch.Generator
) -> None:
    """Draw the weights under `mask` anew, in place: the connections stay, their values change.

    `init(weight, generator)` fills a tensor in place, e.g. one of `INITS`; biases and everything else keep
    their values, and what the mask removes is 0.

    Raises:
        ValueError: a mask that does not fit.
    """
    with torch.no_grad():
        for name, p in named(model, mask).items():
            if not is_bias(name, p):
                init(p, generator)
            p.masked_fill_(~mask[name].to(p.device), 0)  # inf times 0 is nan
    recompute(model)


# --- keeping --------------------------------------------------------------------------------------------


def save_mask(mask: Mask, path: str | Path, /, **metadata) -> None:
    """Write a mask as safetensors (one bit a connection) with its sparsity and any other JSON `metadata`.

    E.g. ``save_mask(mask, "mask.safetensors", method="snip", sparsity=0.95)``.

    Raises:
        ValueError: it is no mask, or metadata that JSON cannot say. OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"sparsity": sparsity_of(mask)} | metadata
    metadata |= {"order": list(mask), "shapes": [list(kept.shape) for kept in mask.values()]}
    try:
        words = {name: json.dumps(value) for name, value in metadata.items()}
    except TypeError as error:
        raise ValueError(f"The metadata of a mask is what JSON can say ({error}): nothing was written.") from error
    tensors = {name: torch.from_numpy(np.packbits(kept.detach().cpu().numpy())) for name, kept in mask.items()}
    try:
        save_file(tensors, path, words)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}): nothing was saved.") from error


@contextlib.contextmanager
def opened(path: str | Path, remedy: str) -> Iterator:
    """Open a file of safetensors; where it is damaged or none, ValueError says which one and what to do."""
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the file in it.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {remedy}.") from error


def load_mask(path: str | Path) -> tuple[Mask, dict]:
    """Return the mask that `save_mask` wrote, on the CPU, in its order, and its metadata.

    Raises:
        ValueError: `save_mask` did not write it. FileNotFoundError: there is no such file.
    """
    with opened(path, "save it again with save_mask") as file:
        if "order" not in (metadata := file.metadata() or {}):
            raise ValueError(f"{path} is no mask that save_mask wrote.")
        metadata = {name: json.loads(value) for name, value in metadata.items()}
        names = metadata.pop("order")
        mask = {name: file.get_tensor(name) for name in names}
        if "shapes" in metadata:  # older files have a byte a connection
            for name, shape in zip(names, metadata.pop("shapes"), strict=True):
                bits = np.unpackbits(mask[name].numpy(), count=math.prod(shape)).astype(bool)
                mask[name] = torch.from_numpy(bits).view(shape)
        return mask, metadata
