"""Paths: what a mask leaves alive, weight by weight and layer by layer.

A kept connection counts only if it lies on a path of kept connections from an input to an output; the others
are as good as removed, and the *effective sparsity* says so. The paper does not look at this; see also
Verdenius et al. (2020) on disconnected layers. The masks themselves are in `masks.py`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple
from torch.overrides import TorchFunctionMode

from .masks import Mask, mask_of, named, sparsity_of
from .saliency import (
    CONNECTIONS,
    each_tensor,
    exact_arithmetic,
    held,
    is_bias,
    one_example,
    plain_copy,
    shape_of,
    tensors_of,
    why,
)

if TYPE_CHECKING:
    import pandas as pd


def _between(t: Tensor) -> Tensor:
    """Bring what is not 0 between a quarter and one in size: no depth overflows, and 0 stays 0.

    By a factor drawn each time: else the largest is always one, and cancels where a layer is used twice.
    """
    return t.sign() * (1 + t.abs() / t.abs().max().clamp_min(1e-300)) * (1 + torch.rand(())) / 4


def _straight(t: Tensor) -> Tensor:
    """Return `t` with the values of `_between`; a gradient goes straight through."""
    return t + (_between(t) - t).detach()


def _mean_pool(pool, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **_) -> Tensor:
    """Return the mean over each window of `pool`, a function like `max_pool2d`; torch's own has no dilation."""
    stride = stride or kernel_size
    shape = pool(input, kernel_size, stride, padding, dilation, ceil_mode).shape
    n = int(pool.__name__[-2])
    windows = map(_ntuple(n), (kernel_size, stride, padding, dilation))
    for dim, (k, step, pad, gap) in zip(range(-n, 0), zip(*windows, strict=True), strict=True):
        input = nn.functional.pad(input, (0, 0) * (-1 - dim) + (pad, pad + step))  # one window more, for ceil_mode
        input = input.unfold(dim, gap * (k - 1) + 1, step)[..., ::gap].mean(-1).narrow(dim, 0, shape[dim])
    return input


class PathCounting(TorchFunctionMode):
    """Let a network compute paths: products and sums as they are, everything that could hide a path undone.

    Normalisation, rectifiers and thresholds are the identity, a maximum, median or choice of the largest (of which only
    the winner has a gradient) is a mean, every row of an embedding is looked up, values and gradients are rescaled
    after each product, and values before a function that is flat where they are large.
    """

    IDENTITY = frozenset(
        "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ celu selu gelu silu mish hardswish hardtanh softplus prelu"
        " batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize"
        " clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip threshold _threshold threshold_ hardshrink"
        " softshrink sign"
        " softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout".split()
    )
    CHOOSING = frozenset("amax amin max min maximum minimum median nanmedian topk".split())
    FLATTENING = frozenset("tanh tanh_ sigmoid sigmoid_ hardsigmoid logsigmoid softsign tanhshrink erf glu".split())
    PRODUCTS = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # What the backward pass needs is kept: gradient checkpointing would compute it anew, with nothing undone.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return self.undone(func, args, kwargs or {})

    def undone(self, func, args: tuple, kwargs: dict):
        name = getattr(func, "__name__", "")
        if name in self.IDENTITY:
            t = args[0] if args else kwargs["input"]
            # What a softmax is given as -inf, or as the lowest number, has weight 0.
            return torch.where(t.abs() < 1e30, t, 0) if "softmax" in name else t
        if name.startswith("max_pool") and "with_indices" not in name:
            return _mean_pool(func, *args, **kwargs)
        if name.startswith("adaptive_max_pool") and "with_indices" not in name:
            return getattr(nn.functional, name.replace("max", "avg"))(*args[:2])
        t = args[0] if args else kwargs.get("input")
        real = isinstance(t, Tensor) and t.is_floating_point() and t.numel()
        if name in self.CHOOSING | self.FLATTENING and not real:  # places and counts carry no path
            return func(*args, **kwargs)
        share = 0.25 if "min" in name else 0.5  # a network may divide by the largest less the smallest: not 0
        if name in ("amax", "amin"):
            return torch.mean(*args, **kwargs) * share
        if name in ("maximum", "minimum", "max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
            return torch.lerp(*args[:2], share)
        if name in self.FLATTENING:
            args, kwargs = (_straight(t), *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
        if name in ("median", "nanmedian") and len(args) == 1 and not kwargs:
            return torch.mean(*args)
        result = func(*args, **kwargs)
        if name in ("max", "min", "median", "nanmedian") and isinstance(result, tuple):  # over a dimension
            return type(result)((torch.mean(*args, **kwargs) * share, result.indices))
        if name == "topk":
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            return type(result)((torch.mean(t, dim, keepdim=True).expand_as(result.values), result.indices))
        if name in self.PRODUCTS and result.requires_grad:
            straight = _straight(result)
            straight.register_hook(_between)
            return straight
        if name in ("embedding", "embedding_bag") and isinstance(result, Tensor):
            weight = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            return result + weight.mean(0)
        return result


def on_live_path(model: nn.Module, mask: Mask, x: Tensor) -> Mask:
    """Return which kept connections lie on a path of kept weights from an input to an output.

    With every weight replaced by 0 where it is pruned and by a number drawn from [0.5, 1] elsewhere (so that no two
    paths cancel where a network subtracts), every bias by 0 and everything that could hide a path undone
    (`PathCounting`), an output is a sum over paths, so its derivative is not 0 exactly on the live ones.
    A bias is live where its unit reaches an output. `x` is a batch, [B, ...], or a tuple or dict of tensors; the
    shape of one example is used (token numbers are kept). All rows of an embedding count as looked up, but where a
    network indexes a parameter itself, or chooses by index among its parts, only what it takes for that example does.
    Gates and attention are followed as they compute: with a sigmoid or a softmax inside a fused kernel a closed gate
    still lets its product through.

    Raises:
        ValueError: the mask or the input does not fit, no output has a gradient, or a derivative is not finite.
    """
    named(model, mask)
    with exact_arithmetic(model):
        return _on_live_path(model, mask, x)


def _on_live_path(model: nn.Module, mask: Mask, x: Tensor) -> Mask:
    twin = plain_copy(model).double().eval()
    parameters = named(twin, mask)
    generator = torch.default_generator.manual_seed(0)  # `exact_arithmetic` restores it

    def positive(t: Tensor) -> Tensor:
        return (0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64) / 2).to(t.device)

    with torch.no_grad():
        for module, _, name, p in held(twin):
            added = is_bias(name, p) and "bias" in name.rpartition(".")[2]  # of attention, in_proj_bias
            p.copy_(torch.zeros_like(p) if added else positive(p))
            if p.dim() > 1 and isinstance(module, CONNECTIONS):
                p /= p[0].numel()  # averages stay where a tanh is not flat
        for name, p in parameters.items():
            p.mul_(mask[name].to(p.device))
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module.train().dropout = 0.0
    device = next(iter(parameters.values())).device

    def example(t: Tensor) -> Tensor:
        # In general position: what attention and gates compare must not be equal.
        return (positive(t) if t.is_floating_point() else t.clone()).to(device)

    if isinstance(x, Tensor) and x.dim() and not len(x):
        raise ValueError(f"The example {shape_of(x)} is empty.")
    x = each_tensor(example, one_example(x))
    for p in twin.parameters():  # all: an output that depends on none of those of the mask has a gradient too
        p.requires_grad_(p.is_floating_point() or p.is_complex())
    with PathCounting():
        try:
            output = twin(x)
        except Exception as error:
            raise ValueError(f"The network refuses an input {shape_of(x)}: {why(error, x)}") from error
    outputs = [t for t in tensors_of(output) if t.requires_grad]
    if not outputs:
        raise ValueError(f"No output of {type(model).__name__} has a gradient, so no path to one can be followed.")
    # Each output weighs differently: those of a softmax or of a difference from the mean have a constant sum.
    cotangents = [positive(t).to(t.dtype) for t in outputs]
    masked = list(parameters.values())
    grads = torch.autograd.grad(outputs, masked, cotangents, allow_unused=True, materialize_grads=True)
    grads = dict(zip(parameters, grads, strict=True))
    if lost := [name for name, grad in grads.items() if not torch.isfinite(grad).all()]:
        raise ValueError(f"The derivatives in {', '.join(lost[:3])} are not finite, so their paths cannot be followed.")
    return {name: mask[name] & (grad != 0).to(mask[name].device) for name, grad in grads.items()}


def _has_input(module: nn.Module, kept: Tensor) -> Tensor:
    """Return which units of a weight have a connection: [n_units]; a unit is one number of what comes out."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):  # [tokens, out]
        kept = kept.transpose(0, 1)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # [in, out / groups, *kernel]
        kept = kept.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return kept.flatten(1).any(1)


def report(model: nn.Module, mask: Mask | None = None, x: Tensor | None = None) -> "pd.DataFrame":
    """Return what a mask (None: the one `model` holds) leaves, one line for each parameter and a last for all.

    Columns: ``prunable`` and ``kept`` connections, ``density``, ``units`` and ``dead_units`` (without any kept
    connection into them or, with `x`, any live one), and, with an example `x` [1, ...], ``live``: kept connections on
    a path from an input to an output, and biases with one to an output, whether an input has one or not; and
    ``effective_sparsity``, the fraction that is not live. ``.attrs`` has `sparsity`, `effective_sparsity` (None without
    `x`) and `collapsed`, the names of weights with no (live) connection.

    Raises:
        ValueError: the mask or the example does not fit, or `on_live_path` cannot follow the paths.
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
