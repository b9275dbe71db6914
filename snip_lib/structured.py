"""Structured pruning: whole units and filters go (SNAP), and the network that is left is really smaller.

Verdenius, Stol & Forre (2020): SNIP's criterion, for a gate on each unit in place of a switch on each
connection. ``prune(model, x, y, sparsity=0.5, structured=True)`` returns the mask, `shrink` the small network.
Which layers write and read a unit is found by Torch-Pruning (Fang et al., 2023), an optional extra.
Read `paths` next.
"""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .masks import Mask, apply_mask, keep_top, mask_of, n_kept
from .saliency import (
    CONNECTIONS,
    NORMS,
    computed,
    connection_gradients,
    each_tensor,
    evaluated,
    exact_arithmetic,
    held,
    one_example,
    placed,
    plain_copy,
    prunable,
    shape_of,
    tensors_of,
    why,
)

Places = tuple[Tensor, Tensor]  # rows or columns of a weight, and the unit that each of them belongs to

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BETWEEN = (nn.modules.batchnorm._BatchNorm, nn.PReLU)  # modules with parameters that treat each unit by itself


class Units(NamedTuple):
    """The `n` units of one layer, or of several whose outputs a shortcut adds: who computes and who uses them."""

    n: int
    written: dict[str, Places]  # by weight: the rows that compute a unit
    read: dict[str, Places]  # by weight: the columns that use it, after flattening several for each unit


def units_of(
    model: nn.Module, x: Tensor, *, only: str | Iterable[str] | None = None, exclude: str | Iterable[str] = ()
) -> dict[str, Units]:
    """Return the units that may be removed, by the name of the first layer that computes them.

    A unit is an output of a linear layer or a filter of a convolution. Where a shortcut adds the outputs of
    several layers, their units of one number are one unit. The outputs of the network stay, also where a layer
    reads them (what is detached, or an integer, does not show what it depends on), and those of the first layer
    unless `only` names it; so does what goes through a layer that mixes units, like layer norm, attention and
    grouped convolutions (but not depthwise ones), through one that is called twice, or through one that shares
    a parameter with another.

    `x` is an example, [B, ...]; `only` and `exclude` name layers, as in `prunable`.

    Raises:
        ValueError: the example does not fit, or no unit may be removed. ImportError: Torch-Pruning is missing.
    """
    groups, first = _follow(model, x)[2:]
    chosen = prunable(model, only=only, exclude=exclude)
    found = {}
    for name, (units, _) in groups.items():
        if all(weight in chosen for weight in units.written) and not (only is None and first in units.written):
            found[name] = units
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no unit to remove: that takes a linear or convolutional layer, not the "
            "first nor the last, with parameters of its own, whose outputs only such layers read (transposed "
            "convolutions are none)."
        )
    return found


@torch.inference_mode(False)  # the graph is that of the gradients
def _follow(model: nn.Module, x: Tensor) -> tuple[nn.Module, Any, dict[str, tuple], str]:
    """Follow an example through a copy: (copy, its graph, {layer: (units, group)}, the first layer's weight)."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            'Structured pruning needs Torch-Pruning to follow a network: pip install "torch-pruning>=1.6".'
        ) from error
    twin = plain_copy(model).eval().requires_grad_(True)
    name_of = {module: name for name, module in twin.named_modules()}
    like = next(twin.parameters())
    x = placed(one_example(x), like.device, like.dtype)
    calls: list[nn.Module] = []
    layers = [module for module in twin.modules() if isinstance(module, CONNECTIONS)]
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in layers]
    # Where layers detach what they read, an output still depends on the units that reach it past all of them.
    for module in layers:
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1:
            hooks.append(module.register_forward_pre_hook(_detached, with_kwargs=True))
    try:
        with exact_arithmetic(twin):
            output = twin(x)
    except Exception as error:
        raise ValueError(f"The network refuses an example {shape_of(x)}: {why(error, x)}") from error
    for hook in hooks:
        hook.remove()
    outside = _leaves(output)
    graph = torch_pruning.DependencyGraph()
    try:
        with exact_arithmetic(twin):
            graph.build_dependency(twin, (x,), output_transform=_traced, verbose=False)
        followed = list(graph.get_all_groups(root_module_types=LAYERS))
    except Exception as error:
        raise ValueError(f"Torch-Pruning cannot follow this network ({error}): no unit is removed.") from error
    known, groups = prunable(twin, exclude=computed(twin)), {}
    places_of = Counter(id(p) for _, _, _, p in held(twin))
    for group in followed:
        written, read = {}, {}
        for item in group:
            module = item.dep.target.module
            if not _unit_by_unit(module) or any(places_of[id(p)] > 1 for p in module.parameters()):
                break
            if isinstance(module, LAYERS):
                weight = f"{name_of[module]}.weight"
                if weight not in known or calls.count(module) != 1:
                    break
                places = (torch.tensor(item.idxs), torch.tensor(item.root_idxs))
                writes = graph.is_out_channel_pruning_fn(item.dep.handler)
                if places[0].max() >= known[weight].shape[0 if writes else 1]:
                    break  # GLU, PixelShuffle: Torch-Pruning did not see that fewer come out than went in
                (written if writes else read)[weight] = places
        else:
            if read and not any(id(known[weight]) in outside for weight in written):
                name = min(written, key=list(known).index).removesuffix(".weight")
                groups[name] = Units(len(group[0].idxs), written, read), group
    order = [name for name in name_of.values() if name in groups]
    return twin, graph, {name: groups[name] for name in order}, f"{name_of[calls[0]]}.weight" if calls else ""


def _traced(output: Any) -> list[Tensor]:
    return [t for t in tensors_of(output) if t.requires_grad]


def _detached(_, args: tuple, kwargs: dict) -> tuple:
    return each_tensor(Tensor.detach, (args, kwargs))


def _leaves(output: Any) -> set[int]:
    """Return the ids of the parameters that an output depends on; no value, like 0 after a ReLU, can hide one."""
    seen, steps = set(), [t.grad_fn for t in tensors_of(output)]
    while steps:
        step = steps.pop()
        if step is not None and step not in seen:
            seen.add(step)
            steps += [before for before, _ in step.next_functions]
    return {id(step.variable) for step in seen if hasattr(step, "variable")}


def _unit_by_unit(module: Any) -> bool:
    """Tell whether a module, an operation or a parameter treats each unit by itself, or is a layer that ends it."""
    if isinstance(module, LAYERS):
        groups = getattr(module, "groups", 1)
        return groups == 1 or groups == module.in_channels == module.out_channels
    if isinstance(module, BETWEEN):
        return True
    return not isinstance(module, (nn.Parameter, *NORMS)) and next(module.parameters(), None) is None


# --- scoring and choosing --------------------------------------------------------------------------------


def gate_gradients(
    model: nn.Module, x: Any, y: Any, *, units: dict[str, Units], mask: Mask | None = None, **scoring
) -> dict[str, Tensor]:
    """Return dL/da of a gate a = 1 on every unit, [n] for each layer, by one forward and backward pass.

    The gate multiplies what other layers read of the unit, so its derivative is the sum of g = w * dL/dw over
    their weights of that unit. With only ReLU and max-pooling between two layers, this is also the sum over the
    unit's own weights and bias. With batch norm it is not: scaling a unit before its normalisation changes
    nothing, so a gate there would have no derivative. `scoring` as in `trial`; g is taken at `mask`.
    """
    # choice: book/choices.md#where-gates-stand
    g = connection_gradients(model, x, y, mask=mask, **scoring)
    gates = {}
    for name, layer in units.items():
        gates[name] = next(iter(g.values())).new_zeros(layer.n)
        for weight, (columns, unit) in layer.read.items():
            of_column = g[weight].transpose(0, 1).flatten(1).sum(1)  # [in]
            gates[name].index_add_(0, unit.to(of_column.device), of_column[columns])
    return gates


def snap(model: nn.Module, x: Any, y: Any, **scoring) -> dict[str, Tensor]:
    """Return SNAP's scores, the magnitudes of `gate_gradients`."""
    return {name: gate.abs() for name, gate in gate_gradients(model, x, y, **scoring).items()}


def random_units(
    model: nn.Module, x: Any, y: Any, *, units: dict[str, Units], generator: torch.Generator | None = None, **scoring
) -> dict[str, Tensor]:
    """Return a uniform draw in [0, 1) for every unit from a CPU `generator` (None: one seeded with 0)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return {name: torch.rand(layer.n, generator=generator, dtype=torch.float64) for name, layer in units.items()}


UNIT_CRITERIA = {"snip": snap, "random": random_units}
SIGNED_UNIT_CRITERIA = {"snip": gate_gradients}


def keep_units(scores: dict[str, Tensor], sparsity: float, *, among: Mask | None = None) -> Mask:
    """Keep exactly ``n_kept(number of units, sparsity)`` units: the best of each layer, then the best of all.

    Raises:
        ValueError: fewer units would stay than there are layers, or more than `among` keeps.
    """
    m = sum(s.numel() for s in scores.values())
    n = n_kept(m, sparsity)
    if n < len(scores):
        raise ValueError(
            f"At sparsity {sparsity:g} {n} of {m} units stay, but each layer keeps one: that makes {len(scores)}."
        )
    top, spared = max(s.max() for s in scores.values()) + 1, {}
    for name, s in scores.items():
        best = s if among is None else torch.where(among[name].to(s.device), s, -torch.inf)
        spared[name] = s.index_fill(0, best.argmax(), top.item())
    return keep_top(spared, n, among=among)


def read_under(units: dict[str, Units], mask: Mask) -> Mask:
    """Return which units are read by a kept connection, [n] for each layer; a weight that is not in `mask` is whole."""
    found = {}
    for name, layer in units.items():
        found[name] = torch.zeros(layer.n, dtype=torch.bool)
        for weight, (columns, unit) in layer.read.items():
            if weight in mask:
                unit = unit[mask[weight].transpose(0, 1).flatten(1).any(1).cpu()[columns]]
            found[name][unit] = True
    return found


def mask_of_units(
    model: nn.Module, units: dict[str, Units], kept: Mask, *, biases: bool = True, rows: bool = True
) -> Mask:
    """Return the mask of connections that keeps the units `kept`.

    Nobody reads a removed unit, so whatever constant its bias or a batch norm's shift would still make of it
    reaches no output. Its own weights and bias go too, with `rows`.
    """
    parameters = prunable(model, biases=biases, exclude=computed(model))
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for name, layer in units.items():
        gone = ~kept[name].cpu()
        for weight, (columns, unit) in layer.read.items():
            mask[weight][:, columns[gone[unit]]] = False
        for weight, (lines, unit) in layer.written.items() if rows else ():
            mask[weight][lines[gone[unit]]] = False
            if (bias := weight.removesuffix("weight") + "bias") in mask:
                mask[bias][lines[gone[unit]]] = False
    return mask


# --- making it small -------------------------------------------------------------------------------------


@torch.inference_mode(False)  # else its parameters could not be trained
def shrink(model: nn.Module, mask: Mask | None, x: Tensor) -> nn.Module:
    """Return a smaller copy that computes what `model` under `mask` does (None: the mask it holds).

    Units that no kept connection reads go: rows, columns, and their share of batch norm; one of each layer
    stays. What else the mask removes is 0 in the copy, whose parameters are plain. Made for the masks of
    ``prune(..., structured=True)``; any other will do where it leaves units unread. `x` is an example, [B, ...].

    Raises:
        ValueError: a mask or an example that does not fit, or a network whose operations mix units in a way
            that was not seen: the outputs for `x` and for `x` times random numbers, in evaluation mode, are compared,
            to the square root of the precision, integers exactly, and whether training mode runs. ImportError: no
            Torch-Pruning.
    """
    mask = mask_of(model) if mask is None else mask
    twin, graph, groups, _ = _follow(apply_mask(plain_copy(model), mask), x)
    like = next(twin.parameters())
    x = placed(x, like.device, like.dtype)
    # One example may hide that units are mixed. The second is made of it, so that the network can take it, too.
    examples = [x, x.flip(0)]
    if x.is_floating_point():
        examples[1] *= 0.5 + torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) / 2

    def outputs() -> list[list[Tensor]]:
        with exact_arithmetic(twin), torch.no_grad():  # both times from the same state of the random numbers
            return [tensors_of(twin(example.clone())) for example in examples]

    def sound(found: list[Tensor]) -> bool:
        return all(t.numel() and torch.isfinite(t).all() for t in found)

    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point() and not a.is_complex():
            return torch.equal(a, b)
        return a.shape == b.shape and bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * a.abs().max())

    before = outputs()
    if not sound(before[0]):
        raise ValueError(f"For the example {shape_of(x)} the network has no output, or one that is not finite.")
    trained = {name: p.requires_grad for _, _, name, p in held(model)}
    try:
        for name, kept in read_under({name: units for name, (units, _) in groups.items()}, mask).items():
            if not kept.any():
                kept[0] = True
            if not kept.all():
                root = groups[name][1][0].dep
                graph.get_pruning_group(root.target.module, root.handler, (~kept).nonzero().flatten().tolist()).prune()
        same = all(
            close(a, b)
            for whole, small in zip(before, outputs(), strict=True)
            for a, b in zip(whole, small, strict=True)
            if sound(whole)
        )
    except (RuntimeError, ValueError, IndexError):  # a width in the forward pass, a mean in the output
        same = False
    if not same:
        raise ValueError(
            f"{type(model).__name__} cannot be made small: without the units that nobody reads it computes something "
            "else, or nothing. Its forward pass mixes units or draws random numbers for them, or their number is "
            "written into it or into a buffer."
        )
    for name, p in twin.named_parameters():
        p.requires_grad_(trained[name])
    if _trains(plain_copy(model), x) and not _trains(plain_copy(twin), x):
        raise ValueError(
            f"{type(model).__name__} cannot be made small: in training mode it calls layers that an example in "
            "evaluation mode does not show, such as auxiliary heads, and these read units that would go."
        )
    for small, module in zip(twin.modules(), model.modules(), strict=True):
        small.training = module.training
    return twin


def _trains(model: nn.Module, x: Tensor) -> bool:
    """Tell whether the forward pass runs in training mode, where batch norm takes two examples or more."""
    try:
        with exact_arithmetic(model), torch.no_grad():
            model.train()(torch.cat([x, x]) if len(x) == 1 else x.clone())
    except Exception:
        return False
    return True


def measure(model: nn.Module, x: Tensor, *, repeats: int = 5) -> dict[str, float]:
    """Return what a network costs: its `parameters`, `multiply_adds` for one example, and `seconds` for the batch `x`.

    Multiply-adds are those of linear layers and convolutions, transposed ones too. Seconds are the shortest of
    `repeats` forward passes in evaluation mode, after one to warm up.

    Raises:
        ValueError: a batch that is empty or that the network refuses; no repeat.
    """
    if repeats < 1 or (isinstance(x, Tensor) and not len(x)):
        raise ValueError(f"A batch has 1 example or more, and repeats is 1 or more, not {shape_of(x)} and {repeats}.")
    counts, took = [], []

    def count(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        many = output if isinstance(module, LAYERS) else tensors_of((args, kwargs))[0]  # `weight[0]` is of one input
        counts.append(many[0].numel() * module.weight[0].numel())

    kinds = (*LAYERS, nn.modules.conv._ConvTransposeNd)
    counted = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_hook(count, with_kwargs=True) for module in counted]
    try:
        with torch.inference_mode(), evaluated(model):
            try:
                model(x)
            except Exception as error:
                raise ValueError(f"The network refuses the batch {shape_of(x)}: {why(error, x)}") from error
            for hook in hooks:
                hook.remove()
            for _ in range(repeats):
                begun = time.perf_counter()
                if tensors_of(model(x))[0].is_cuda:
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - begun)
    finally:
        for hook in hooks:
            hook.remove()
    n = sum(p.numel() for p in model.parameters())
    return {"parameters": n, "multiply_adds": sum(counts), "seconds": min(took)}
