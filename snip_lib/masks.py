"""Masks: which connections stay. Selection of exactly kappa, and what a mask does to a network.

Equation 7 of the paper. A mask is ``dict[str, BoolTensor]``, parameter name -> True where kept, with all
weights before all biases, each in module order. Read `prune.py` next.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.overrides import TorchFunctionMode

from .saliency import CONNECTIONS, Scores, held, is_bias, plain_copy

if TYPE_CHECKING:
    import pandas as pd

Mask = dict[str, Tensor]


# --- choosing -------------------------------------------------------------------------------------------


def n_kept(m: int, sparsity: float) -> int:
    """Return kappa = round((1 - sparsity) * m), the number of connections that stay.

    Raises:
        ValueError: sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the fraction removed, in [0, 1), not {sparsity}.")
    return round((1 - sparsity) * m)


def keep_top(scores: Scores, n_keep: int, *, among: Mask | None = None) -> Mask:
    """Keep exactly the `n_keep` highest scores over all parameters (Eq. 7), of those that `among` keeps.

    Equal scores are kept in order: lower index first, in the order of the dict. The result is
    the same on every device and depends on the order of the scores alone; so masks of the same
    scores are nested.

    Raises:
        ValueError: a score is not finite, or `n_keep` is not between 0 and the number of scores.
    """
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
        kept[ties[: n_keep - int(kept.sum())]] = True
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
        ValueError: a density outside [0, 1].
    """
    mask = {}
    for name, shape in shapes.items():
        if not 0 <= densities[name] <= 1:
            raise ValueError(f"The density of {name} is a fraction in [0, 1], not {densities[name]}.")
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
    return {name: int(kept.sum()) / kept.numel() for name, kept in mask.items()}


def sparsity_of(mask: Mask) -> float:
    """Return the fraction of connections that a mask removes."""
    return 1 - sum(int(kept.sum()) for kept in mask.values()) / sum(kept.numel() for kept in mask.values())


# --- applying -------------------------------------------------------------------------------------------


class MaskedWeight(Tensor):
    """A computed weight, w * c, that can be deep-copied: `torch.nn.utils.prune` leaves it on the module."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors, as of nn.Parameter

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), self.detach().clone())  # computed anew before its next use


class Connectivity(torch_prune.CustomFromMask):
    """`torch.nn.utils.prune.custom_from_mask`, with a weight that can be deep-copied."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        return super().apply_mask(module).as_subclass(MaskedWeight)


def recompute(module: nn.Module, inputs: tuple = ()) -> None:
    """Compute w * c anew for every masked weight inside `module`; a forward pre-hook of what may read them.

    The stock hook runs when the holder of a weight is called, but attention reads ``out_proj.weight``, and a
    language model its ``encoder.weight``, without that call. It holds no state, so a copied or pickled
    model has its own, and after `prune.remove` there is nothing left for it to do.
    """
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                setattr(inner, hook._tensor_name, hook.apply_mask(inner))


def named(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """Return the parameter that each name of `mask` means.

    Raises:
        ValueError: the mask is empty or no boolean, names a parameter that is not there or one twice (by
            two of its tied names), or has another shape.
    """
    every = {name: parameter for _, _, name, parameter in held(model)}
    if not mask:
        raise ValueError("The mask is empty: it names no parameter.")
    if unknown := [name for name in mask if name not in every]:
        raise ValueError(
            f"The mask is of another network: {type(model).__name__} has no {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; it has {', '.join(list(every)[:3])}, ..."
        )
    for name, kept in mask.items():
        if kept.shape != every[name].shape:
            raise ValueError(f"The mask of {name} is {list(kept.shape)}, the parameter {list(every[name].shape)}.")
        if kept.dtype != torch.bool:
            raise ValueError(f"The mask of {name} is {kept.dtype}, not torch.bool: True is kept.")
    found = {name: every[name] for name in mask}
    if len({id(p) for p in found.values()}) < len(found):
        twice = [n for n in found if sum(found[n] is p for p in found.values()) > 1]
        raise ValueError(f"{' and '.join(twice)} are one tied parameter: the mask names it more than once.")
    return found


def apply_mask(model: nn.Module, mask: Mask) -> nn.Module:
    """Mask `model` in place with PyTorch's own `torch.nn.utils.prune`, and return it.

    The weights that go become 0 at once, and every use of a weight is w * c, so that no optimiser moves
    them. Every module that holds a tied parameter is masked. `torch.nn.utils.prune.remove(module, "weight")`
    makes a weight plain again, with its zeros. Create the optimiser before or after: the parameters are the
    same objects. A second mask may only take away.

    Raises:
        ValueError: names or shapes that do not fit, or a mask that wants removed connections back.
    """
    parameters = named(model, mask)
    name_of = {id(p): name for name, p in parameters.items()}
    places = [(m, a, name_of[id(p)]) for m, a, _, p in held(model) if id(p) in name_of]
    for module, attribute, name in places:
        before = module._buffers.get(f"{attribute}_mask")
        if before is not None and (mask[name].to(before.device) & (before == 0)).any():
            raise ValueError(f"The mask wants connections of {name} back that an earlier mask removed.")
    with torch.no_grad():
        for name, p in parameters.items():
            p.mul_(mask[name].to(p.device))
    for module, attribute, name in places:
        if (before := module._buffers.get(f"{attribute}_mask")) is not None:
            before.copy_(mask[name])
        else:
            Connectivity.apply(module, attribute, mask=mask[name].to(parameters[name].device))
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
        kept = module._buffers.get(f"{attribute}_mask")
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
            p.mul_(mask[name].to(p.device))
    recompute(model)


# --- looking --------------------------------------------------------------------------------------------


def _between(t: Tensor) -> Tensor:
    """Bring what is not 0 between a half and one in size: no depth overflows, and 0 stays 0."""
    return t.sign() * (1 + t.abs() / t.abs().max().clamp_min(1e-300)) / 2


class PathCounting(TorchFunctionMode):
    """Let a network compute paths: products and sums as they are, everything that could hide a path undone.

    Normalisation and rectifiers are the identity, a maximum (of which only the winner has a gradient) is a
    mean, and values and gradients are rescaled after each product.
    """

    IDENTITY = frozenset(
        "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ celu selu gelu silu mish hardswish hardtanh softplus prelu"
        " batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize"
        " softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout".split()
    )
    PRODUCTS = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in self.IDENTITY:
            return args[0] if args else kwargs["input"]
        if name.startswith(("max_pool", "adaptive_max_pool")) and "with_indices" not in name:
            pool = getattr(nn.functional, name.replace("max", "avg"))
            given = {k: v for k, v in kwargs.items() if k in ("kernel_size", "stride", "padding", "ceil_mode")}
            return pool(*args[:4], **given)
        result = func(*args, **kwargs)
        if name in self.PRODUCTS and result.requires_grad:
            straight = result + (_between(result) - result).detach()
            straight.register_hook(_between)
            return straight
        return result


def on_live_path(model: nn.Module, mask: Mask, x: Tensor) -> Mask:
    """Return which kept connections lie on a path of kept weights from an input to an output.

    With every weight replaced by its mask, every bias by 0 and everything that could hide a path undone
    (`PathCounting`), an output is a sum over paths, so its derivative is not 0 exactly on the live ones.
    A bias is live where its unit reaches an output. `x` is a batch of which one example's shape is used,
    [1, ...] (token numbers are kept). Gates and attention are followed as they compute: with a sigmoid or
    a softmax inside a fused kernel a closed gate still lets its product through.

    Raises:
        ValueError: the mask or the input does not fit.
    """
    named(model, mask)
    twin = plain_copy(model).double().eval().requires_grad_(False)
    parameters = named(twin, mask)
    with torch.no_grad():
        for module, _, name, p in held(twin):
            p.fill_(0 if is_bias(name, p) and name.rpartition(".")[2].startswith("bias") else 1)
            if p.dim() > 1 and isinstance(module, CONNECTIONS):
                p /= p[0].numel()  # averages stay where a tanh is not flat
        for name, p in parameters.items():
            if not is_bias(name, p):
                p.mul_(mask[name].to(p.device))
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module.train().dropout = 0.0
    device = next(iter(parameters.values())).device
    # Inputs in general position: what attention and gates compare must not be equal.
    draws = torch.rand(x[:1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (0.5 + draws / 2 if x.is_floating_point() else x[:1]).to(device)
    with torch.enable_grad(), PathCounting():
        for p in parameters.values():
            p.requires_grad_(True)
        try:
            output = twin(x)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"The network refuses an input of shape {list(x.shape)}: {error}") from error
    leaves = torch.utils._pytree.tree_leaves(output)
    total = sum(t.sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad)
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {n: mask[n] & (grad != 0).to(mask[n].device) for n, grad in zip(parameters, grads, strict=True)}


def _has_input(module: nn.Module, kept: Tensor) -> Tensor:
    """Return which units of a weight have a connection: [n_units]; a unit is a row, of what comes out."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # [in, out / groups, *kernel]
        kept = kept.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return kept.flatten(1).any(1)


def collapsed(mask: Mask) -> list[str]:
    """Return the weights of which nothing is kept, by name."""
    return [name for name, kept in mask.items() if not is_bias(name, kept) and not kept.any()]


def report(model: nn.Module, mask: Mask | None = None, x: Tensor | None = None) -> "pd.DataFrame":
    """Return what a mask (None: the one `model` holds) leaves, one line for each parameter and a last for all.

    Columns: ``prunable`` and ``kept`` connections, ``density``, ``units`` and ``dead_units`` (without any
    connection that counts), and, with an example `x` [1, ...], ``live``: kept connections on a path from an input
    to an output, and ``effective_sparsity``, the fraction that is not live. ``.attrs`` has `sparsity`,
    `effective_sparsity` (None without `x`) and `collapsed`, the names of weights with no (live) connection.

    Raises:
        ValueError: the mask or the example does not fit.
    """
    import pandas as pd

    mask = mask_of(model) if mask is None else mask
    parameters = named(model, mask)
    live = on_live_path(model, mask, x) if x is not None else mask
    module_of = {name: module for module, _, name, _ in held(model)}
    lines = {}
    for name, p in parameters.items():
        inputs = _has_input(module_of[name], live[name]) if not is_bias(name, p) else torch.ones(0)
        lines[name] = {
            "prunable": p.numel(),
            "kept": int(mask[name].sum()),
            "live": int(live[name].sum()),
            "units": inputs.numel(),
            "dead_units": int((~inputs.bool()).sum()),
        }
    table = pd.DataFrame.from_dict(lines, orient="index")
    gone = table.index[(table["live"] == 0) & (table["units"] > 0)].to_list()
    table.loc["total"] = table.sum()
    table.insert(2, "density", table["kept"] / table["prunable"])
    table["effective_sparsity"] = 1 - table["live"] / table["prunable"]
    effective = float(table["effective_sparsity"].iloc[-1])
    if x is None:
        table = table.drop(columns=["live", "effective_sparsity"])
    table.attrs = {
        "sparsity": sparsity_of(mask),
        "effective_sparsity": effective if x is not None else None,
        "collapsed": gone,
    }
    return table


# --- keeping --------------------------------------------------------------------------------------------


def save_mask(mask: Mask, path: str | Path, **metadata) -> None:
    """Write a mask as safetensors (one byte a connection) with its sparsity, order and any JSON `metadata`.

    E.g. ``save_mask(mask, "mask.safetensors", method="snip", sparsity=0.95)``.
    """
    from safetensors.torch import save_file

    metadata = {"sparsity": sparsity_of(mask)} | metadata | {"order": list(mask)}
    tensors = {name: kept.detach().cpu().clone() for name, kept in mask.items()}  # slices of one memory are refused
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()})


def load_mask(path: str | Path) -> tuple[Mask, dict]:
    """Return the mask that `save_mask` wrote, on the CPU and in its order, and its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in metadata.pop("order")}, metadata
