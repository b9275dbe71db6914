"""Saliency criteria: how much each connection of a network matters, before any training.

Section 4.1 of the paper, Equations 4-6, and the criteria that it is compared with. A criterion is a
function ``(model, x, y, **scoring) -> scores``; `masks.py` turns scores into a mask (the highest stay),
`prune.py` is the two together.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map_only

Scores = dict[str, Tensor]
Loss = Callable[[Any, Any], Tensor]

# The modules whose parameters are connections.
CONNECTIONS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
# Normalisation layers only rescale: they are never pruned.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def held(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield (module, attribute, name, parameter) for each place that holds a parameter, in module order.

    A tied parameter comes once for each of its places. One that is masked by `torch.nn.utils.prune`,
    which stores it as ``weight_orig``, goes by its own name, ``weight``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The network is a torch.nn.Module, not {type(model).__name__}.")
    for prefix, module in model.named_modules():
        for stored, parameter in module._parameters.items():
            attribute = stored.removesuffix("_orig")
            if mask_at(module, attribute) is None:
                attribute = stored
            name = f"{prefix}.{attribute}".lstrip(".")
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"{name} is lazy and has no shape yet: call model(x) once first.")
            if parameter is not None:
                yield module, attribute, name, parameter


def mask_at(module: nn.Module, attribute: str) -> Tensor | None:
    """Return the mask that `torch.nn.utils.prune` holds of a parameter; a module may have a buffer of that name."""
    return module._buffers.get(f"{attribute}_mask") if f"{attribute}_orig" in module._parameters else None


def is_bias(name: str, parameter: Tensor) -> bool:
    """Tell biases from weights: one dimension, or a name like attention's ``bias_k``, shaped [1, 1, E]."""
    return parameter.dim() < 2 or name.rpartition(".")[2].startswith("bias")


def computed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return what the names of its parts begin with, for each weight of a connection that is computed from others."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CONNECTIONS):
            dot = f"{name}." if name else ""
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, (WeightNorm, SpectralNorm)):
                    found[f"{dot}{hook.name}"] = tuple(f"{dot}{hook.name}_{part}" for part in ("g", "v", "orig"))
            for attribute in module.parametrizations if parametrize.is_parametrized(module) else ():
                found[f"{dot}{attribute}"] = (f"{dot}parametrizations.{attribute}.",)
    return found


def _names(choice: Any) -> list[str]:
    names = [choice] if isinstance(choice, str | nn.Module) or not isinstance(choice, Iterable) else list(choice)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"only= and exclude= are names of parameters or modules, not {type(name).__name__}.")
    return names


def prunable(
    model: nn.Module,
    *,
    biases: bool = True,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name: all weights, then all biases, each in module order.

    They are those of linear, convolutional, recurrent and attention modules, frozen or not; the order decides ties.
    `only` and `exclude` are names of parameters or modules, with ``*`` for anything ("layer1.*", "head");
    what `only` names may belong to any module except normalisation, so to one you wrote yourself.
    A tied parameter comes once, by the name it has in its first connection.

    Raises:
        ValueError: there is no prunable parameter, a pattern matches none, or a weight is computed from others or lazy.
    """
    only, exclude = only if only is None else _names(only), _names(() if exclude is None else exclude)
    aliases: dict[int, list[str]] = {}
    places, candidates, parts = list(held(model)), [], computed(model)
    for module, _, name, parameter in places:
        whole = [weight for weight, begin in parts.items() if name.startswith(begin)]
        aliases.setdefault(id(parameter), []).extend([name, *whole])
        if not isinstance(module, NORMS):
            candidates.append((not isinstance(module, CONNECTIONS), name, parameter))
    # Connections first in the choice of a tied parameter's name; the order stays that of the modules.
    name_of: dict[int, str] = {}
    for _, name, parameter in sorted(candidates, key=lambda c: c[0]):
        name_of.setdefault(id(parameter), name)

    used = set()

    def matches(names: list[str], patterns: list[str]) -> bool:
        hits = {p for p in patterns for n in names if fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*")}
        used.update(hits)
        return bool(hits)

    for name in parts:
        if (only is None or matches([name], only)) and not matches([name], exclude):
            holder, _, weight = name.rpartition(".")
            raise ValueError(
                f"{(holder or type(model).__name__)!r} computes its {weight} (weight_norm, spectral_norm, "
                f"parametrize): undo that, or exclude it, as in exclude={name!r}."
            )
    found = {}
    for foreign, name, parameter in candidates:
        names = aliases[id(parameter)]
        chosen, left_out = matches(names, only) if only is not None else not foreign, matches(names, exclude)
        if name_of[id(parameter)] == name and chosen and not left_out:
            found[name] = parameter
    if unused := [p for p in [*(only or ()), *exclude] if p not in used]:
        raise ValueError(
            f"No prunable parameter of {type(model).__name__} matches {', '.join(map(repr, unused))}: "
            f"there are {', '.join([*name_of.values()][:8])}{', ...' if len(name_of) > 8 else '.'}"
        )
    weights = {name: p for name, p in found.items() if not is_bias(name, p)}
    # choice: book/choices.md#biases
    every_bias = {name: p for name, p in found.items() if is_bias(name, p)} if biases else {}
    if not weights | every_bias or (only is None and not weights):
        if any(not is_bias(name, p) for foreign, name, p in candidates if only or not foreign):
            raise ValueError(
                f"only={only}, exclude={exclude} and prune_biases={biases} leave no prunable parameter "
                f"of {type(model).__name__}."
            )
        raise ValueError(
            f"{type(model).__name__} has no prunable parameter: no linear, convolutional, recurrent or "
            "attention weight is left. Name those of your own modules with only=."
        )
    return weights | every_bias


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output, which may hold something else too (a loss that is None); ValueError: none."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(f"The network's output ({type(output).__name__}) is no tensor, nor a tuple or dict of them.")
    return tensors


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Compute in true float32 where `torch.backends` may say otherwise, and restore what it said."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    knobs = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]  # TF32
    knobs += [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]  # bfloat16 and TF32 on CPUs
    before = [knob.fp32_precision for knob in knobs]
    # The older switches go along: torch refuses to read those that differ from these, and `cudnn.flags`, which
    # a network may enter in its forward pass, reads them. Where they differ already they stay.
    products, tf32 = "highest", False
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        tf32 = cudnn.allow_tf32
    try:
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        if tf32:
            cudnn.allow_tf32 = False
        for knob in knobs:
            if knob.fp32_precision != "ieee":
                knob.fp32_precision = "ieee"
        yield
    finally:
        if products != "highest":
            torch.set_float32_matmul_precision(products)
        if tf32:
            cudnn.allow_tf32 = True
        for knob, value in zip(knobs, before, strict=True):
            if knob.fp32_precision != value:
                knob.fp32_precision = "none"  # so that what is inherited stays so
            if knob.fp32_precision != value:
                knob.fp32_precision = value


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while; each of its modules is then in its own mode again."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def exact_arithmetic(model: nn.Module) -> Iterator[None]:
    """Switch autocast and reduced-precision products off and restore them, and the RNG state, afterwards."""
    devices = {p.device for p in model.parameters()}
    with true_float32(), contextlib.ExitStack() as stack:
        for kind in {"cpu", *(device.type for device in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == "cuda"]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any("_orig_mod" in module._modules for module in model.modules()):
            # Compiled graphs have no second derivatives, and are good for one backward pass.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def recompute(module: nn.Module, inputs: tuple = ()) -> None:
    """Compute w * c anew for every masked weight inside `module`; a forward pre-hook of what may read them.

    The stock hook runs when the holder of a weight is called, but attention reads ``out_proj.weight``, and a
    language model its ``encoder.weight``, without that call. It holds no state, so a copied or pickled
    model has its own.
    """
    for inner in module.modules():
        for hook in inner._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                setattr(inner, hook._tensor_name, hook.apply_mask(inner))


def rename_in_place(module: nn.Module, old: str, new: str, rename: Callable[[], object]) -> None:
    """Call `rename`, by which torch makes parameter `old` of `module` the parameter `new`, and keep its place.

    Torch puts it last, and an optimiser's state knows parameters by their order.
    """
    order = [new if name == old else name for name in module._parameters]
    rename()
    held_now = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update((name, held_now[name]) for name in order)


@torch.inference_mode(False)  # else the weights could not be trained with
def remove_mask(model: nn.Module) -> nn.Module:
    """Make every weight of `model` that `torch.nn.utils.prune` masks plain again, in place, and return the model.

    What was removed is 0, and may be trained again; the parameters are the same objects in the same order. Nothing
    of this library is left in the model.
    """
    for module, attribute, _, _ in list(held(model)):
        if mask_at(module, attribute) is not None:
            rename_in_place(module, f"{attribute}_orig", attribute, partial(torch_prune.remove, module, attribute))
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is recompute:
                del module._forward_pre_hooks[key]
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its mask (`remove_mask`). ValueError: it cannot be copied."""
    # A masked weight is computed, like a state kept between batches, and deepcopy refuses what is: hand it the values.
    results = [t for m in model.modules() for t in tree_leaves(vars(m)) if isinstance(t, Tensor) and not t.is_leaf]
    try:
        twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in results})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"The network is worked on as a copy, and copy.deepcopy refuses it: {error}") from error
    return remove_mask(twin)


def scoring_copy(model: nn.Module, *, dtype: torch.dtype, bn: str) -> nn.Module:
    """Copy `model` for scoring, so that the original stays exactly as it was.

    ``bn="batch"``: batch norm uses the statistics of the scoring batch, as in training.
    ``bn="fresh"``: batch norm is in inference mode with mean 0 and variance 1. Instance norm takes each example's own
    statistics either way. Dropout is off.

    Raises:
        ValueError: another `bn`, or a dtype that is neither float32 nor float64.
    """
    if bn not in ("batch", "fresh"):
        raise ValueError(f'score_bn is "batch" or "fresh", not {bn!r}.')
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Scores are computed in torch.float32 or torch.float64, not {dtype}.")
    twin = plain_copy(model)._apply(lambda t: t.to(dtype) if t.is_floating_point() else t).eval()  # complex as it is
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # choice: book/choices.md#batch-norm-while-scoring
            if bn == "batch":
                module.train()
            elif module.running_mean is None:  # track_running_stats=False would use the batch
                like = next(twin.parameters())
                module.running_mean = torch.zeros(module.num_features).to(like)
                module.running_var = torch.ones(module.num_features).to(like)
            else:
                module.reset_running_stats()
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.train()  # its statistics are those of each example, as in training
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # a sparse gradient has no place in a product with its weight
        elif isinstance(module, nn.RNNBase):
            module.train().dropout = 0.0  # cuDNN has a backward pass in training mode only
    return twin


class Trial(NamedTuple):
    """What a criterion works on: a copy of the network that computes with c * w, and its batch."""

    model: nn.Module
    weights: dict[str, Tensor]  # w, whether c keeps it or not
    masked: dict[str, nn.Parameter]  # c * w, the leaves that the network computes with
    x: Any
    y: Any
    loss: Loss

    def input(self) -> Any:
        """Return the batch anew: a network may change its input in place."""
        return each_tensor(torch.clone, self.x)

    def output(self) -> Any:
        if isinstance(self.x, Tensor) and self.x.dim() and not len(self.x):
            raise ValueError(f"The scoring batch {shape_of(self.x)} is empty.")
        try:
            return self.model(self.input())
        except Exception as error:
            alone = "Expected more than 1 value per channel" in str(error)  # batch norm's words
            remedy = "give x and y one by one" if isinstance(self.x, (tuple, list)) else ""
            if "required positional argument" in str(error):
                remedy = "x is one argument: wrap a network that takes several"
            words = why(error, self.x, 'give a larger batch, or score_bn="fresh"' if alone else remedy)
            raise ValueError(f"The network refuses the scoring batch {shape_of(self.x)}: {words}") from error

    def loss_of(self, output: Any, y: Any) -> Tensor:
        try:
            value = self.loss(output, y)
        except Exception as error:
            numbers = "give y" if y is None else "give class numbers as int64, 0 to classes - 1"
            if isinstance(output, Tensor) and isinstance(y, Tensor) and output.shape[:1] != y.shape[:1]:
                numbers = "give a label for each example"
            elif isinstance(y, list):
                numbers = "make a tensor of y with torch.tensor"
            elif "can't be cast" in str(error):
                numbers = "give y as y.float()"
            elif isinstance(output, (tuple, dict)):
                numbers = "wrap a network that returns several tensors in one that returns the logits"
            elif self.loss is not F.cross_entropy and y is not None:
                numbers = ""  # what this loss wants, its own words say
            words = why(error, y, numbers and f"{numbers}, or your own loss=lambda output, y: ...")
            raise ValueError(
                f"The loss refuses the output {shape_of(output)} with the labels {shape_of(y)}: {words}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"The loss of a batch is a tensor of one number, not a value {shape_of(value)}: take its mean."
            )
        if not torch.isfinite(value).all():
            told = f"The loss of the scoring batch is {value.item()}: no connection can be scored."
            raise ValueError(f"{told} Look for nan or inf in the weights, in x and in y, or for a loss that overflows.")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError("The loss has no gradient: it or the network is detached, under no_grad, or only counts.")
        return value.squeeze()

    def value(self) -> Tensor:
        return self.loss_of(self.output(), self.y)


def shape_of(value: Any) -> str:
    """Describe a batch in an error."""
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"({type(value).__name__})"


def why(error: Exception, given: Any, remedy: str = "") -> str:
    """Say why a batch is refused: the first line of torch's own words, without its signatures, and what to do."""
    leaves = tree_leaves(given)
    if any(isinstance(v, np.ndarray) for v in leaves):
        return "make tensors of numpy arrays with torch.as_tensor."
    words = re.split(", but expected one of|\n", str(error))[0].rstrip(".")
    if "type" in words and any(isinstance(v, Tensor) and not v.is_floating_point() for v in leaves):
        remedy = remedy or "give images as x.float(), tokens as x.long()"
    return f"{words} ({remedy})." if remedy else f"{words}."


@contextlib.contextmanager
def trial(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    loss: Loss = F.cross_entropy,
    biases: bool = True,
    bn: str = "batch",
    dtype: torch.dtype = torch.float32,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    mask: dict[str, Tensor] | None = None,
) -> Iterator[Trial]:
    """Set one scoring up: these keywords are the `scoring` of every criterion.

    `x` and `y` are tensors, or tuples and dicts of them; `loss(model(x), y)` is a scalar; `biases`, `only`, `exclude`
    as in `prunable`; `bn` as in `scoring_copy`; `mask` is the c at which the scores are taken (None: all ones).
    """
    if isinstance(loss, type):
        raise ValueError(f"loss={loss.__name__} is a class, not a function of (output, y): write {loss.__name__}().")
    for _, _, name, p in held(model):
        if p.is_meta or p.is_complex():
            raise ValueError(f"{name} is {'on the meta device' if p.is_meta else 'complex'}: it cannot be scored.")
    with exact_arithmetic(model):
        twin = scoring_copy(model, dtype=dtype, bn=bn)
        masked = prunable(twin, biases=biases, only=only, exclude=exclude)
        weights = {name: p.detach().clone() for name, p in masked.items()}
        with torch.no_grad():
            for name, p in masked.items():
                p.requires_grad_(True).grad = None
                if mask is not None:
                    p.mul_(mask[name].to(p.device))
        device = next(iter(masked.values())).device
        yield Trial(twin, weights, masked, placed(x, device, dtype), placed(y, device, dtype), loss)


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change a tensor, each of those in tuples and dicts, or the data of a packed sequence."""

    def changed(v: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(v, Tensor):
            return change(v)
        data = change(v.data)
        return v.to(data.device)._replace(data=data)

    return tree_map_only((Tensor, PackedSequence), changed, value, is_leaf=_packed)


def one_example(value: Any) -> Any:
    """Return the first example of a batch, [1, ...]; a packed sequence stays whole."""
    return tree_map_only(Tensor, lambda t: t[:1] if t.dim() else t, value, is_leaf=_packed)


def _packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Copy a batch to the network; real numbers take its dtype, class and token numbers keep theirs."""

    def copied(t: Tensor) -> Tensor:
        if t.is_meta:
            raise ValueError(f"The scoring batch {shape_of(t)} is on the meta device, where tensors hold no numbers.")
        # A network may change its input in place, and one made in inference mode is of no use for gradients.
        return t.detach().clone().to(device, dtype if t.is_floating_point() else None)

    return each_tensor(copied, value)


def connection_gradients(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return g = dL(c * w)/dc (Eq. 5) for every prunable parameter, by one forward and backward pass.

    By the chain rule g = w * dL/d(c * w): no mask variable is needed. At c = 1, and with `scoring` as in
    `trial`; where a given mask is 0, g is what the connection would bring if it came back (FORCE).
    `x` is [B, ...]; g is signed and shaped like the parameters.

    Raises:
        ValueError: the batch does not fit, the loss is not finite, or no parameter is prunable.
    """
    with trial(model, x, y, **scoring) as t:
        grads = torch.autograd.grad(t.value(), list(t.masked.values()), allow_unused=True, materialize_grads=True)
        return {name: (w * grad).detach() for (name, w), grad in zip(t.weights.items(), grads, strict=True)}


def snip(model: nn.Module, x: Any, y: Any, *, mask: dict[str, Tensor] | None = None, **scoring) -> Scores:
    """Return the connection sensitivity s = |g| / sum |g| (Eq. 6); `scoring` as in `trial`.

    The sum goes over the connections that `mask` keeps: how much a batch counts beside others does not hang on
    what was removed, for which g is what its return would bring.
    """
    scores = {name: g.abs() for name, g in connection_gradients(model, x, y, mask=mask, **scoring).items()}
    total = sum((s if mask is None else s * mask[name].to(s.device)).sum() for name, s in scores.items())
    return {name: s / total for name, s in scores.items()} if total > 0 else scores


def loss_changes(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return Delta L_j = L(c * w) - L((c - e_j) * w) (Eq. 4): each connection is really removed, alone.

    Signed: positive where the removal lowers the loss, to first order equal to g. One forward pass for
    each connection, batched, so for small networks; float32 cancels, so ask for dtype=torch.float64.
    """
    with trial(model, x, y, **scoring) as t, torch.no_grad():
        for module in t.model.modules():  # statistics of the batch need no buffers, and vmap allows no update
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                module.running_mean = module.running_var = None
        t.value()  # refuses a bad batch with a sentence, before vmap can fail with its own
        changes = {}
        for name, w in t.masked.items():
            index = torch.arange(w.numel(), device=w.device)
            places = [n for _, _, n, p in held(t.model) if p is w]  # not by tie_weights: it mistakes a shared module

            def loss_without(j: Tensor, places=places, w=w, index=index) -> Tensor:
                removed = torch.where(index == j, 0, w.flatten()).view_as(w)  # j = -1 removes nothing
                replaced = dict.fromkeys(places, removed)
                return t.loss(torch.func.functional_call(t.model, replaced, (t.input(),), tie_weights=False), t.y)

            js = torch.cat([index.new_tensor([-1]), index])
            if any(isinstance(module, nn.RNNBase) for module in t.model.modules()):  # vmap has no rule for these
                losses = torch.stack([loss_without(j) for j in js])
            else:
                at_once = min(256, max(1, 2**22 // w.numel()))  # copies of w, at most about 32 MB of float64
                try:
                    losses = torch.vmap(loss_without, randomness="same", chunk_size=at_once)(js)
                except RuntimeError as error:
                    raise ValueError(f"Connections of this network cannot be removed in batches: {error}") from error
            changes[name] = (losses[0] - losses[1:]).view_as(w)
        return changes


def exact(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return |Delta L_j| (Eq. 4), which the connection sensitivity approximates; see `loss_changes`."""
    return {name: change.abs() for name, change in loss_changes(model, x, y, **scoring).items()}


def magnitude(model: nn.Module, x: Any = None, y: Any = None, **scoring) -> Scores:
    """Return |w| (Han et al., 2015); no data is used."""
    with trial(model, None, None, **scoring) as t:
        return {name: w.abs() for name, w in t.weights.items()}


def random(
    model: nn.Module, x: Any = None, y: Any = None, *, generator: torch.Generator | None = None, **scoring
) -> Scores:
    """Return uniform draws in [0, 1) from a CPU `generator` (None: one seeded with 0); no data is used.

    Drawn in float64 on the CPU, so that they are the same for every device and practically without ties.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with trial(model, None, None, **scoring) as t:
        draws = {n: torch.rand(w.shape, generator=generator, dtype=torch.float64) for n, w in t.weights.items()}
        return {name: draw.to(t.weights[name].device) for name, draw in draws.items()}


def grasp(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return w * Hg, what a connection adds to the gradient flow (GraSP; Wang, Zhang & Grosse, 2020, Eq. 8).

    Removing w_j changes g'g by -2 w_j (Hg)_j to first order. GraSP's own score is S = -w * Hg and it removes
    the highest; this is -S, signed, and as for every criterion the highest stay. H and g are those of the
    loss in the prunable parameters; the authors divide the logits by 200, which is a `loss` you can give.
    """
    with trial(model, x, y, **scoring) as t, _second_derivatives():
        leaves = list(t.masked.values())
        options = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(t.value(), leaves, create_graph=True, **options)
        flow = sum((g * g.detach()).sum() for g in grads)  # its derivative is Hg
        hg = torch.autograd.grad(flow, leaves, **options)
        return {name: (w * h).detach() for (name, w), h in zip(t.weights.items(), hg, strict=True)}


def synflow(model: nn.Module, x: Any, y: Any = None, **scoring) -> Scores:
    """Return |w| * dR/d|w| with R = 1'(product of the |W_l|)1, the synaptic flow (Tanaka et al., 2020, Eq. 2).

    R is the summed output of the network for one input of ones, with every parameter replaced by its absolute
    value and batch norm in inference mode at mean 0, variance 1. `x` gives only the shape of an input (token
    numbers are kept). Always float64: R overflows float32 in deep networks. This is one of the 100
    iterations that `prune(..., method="synflow")` makes.
    """
    scoring |= {"bn": "fresh", "dtype": torch.float64}
    with trial(model, one_example(x), None, **scoring) as t:
        with torch.no_grad():
            for p in t.model.parameters():
                p.abs_()
        t = t._replace(x=each_tensor(lambda v: torch.ones_like(v) if v.is_floating_point() else v, t.x))
        flow = sum(v.sum() for v in tensors_of(t.output()))
        if not torch.isfinite(flow):
            raise ValueError(f"The synaptic flow is {flow.item()} in float64: too deep, or a weight is not finite.")
        grads = torch.autograd.grad(flow, list(t.masked.values()), allow_unused=True, materialize_grads=True)
        return {name: (w.abs() * grad).detach() for (name, w), grad in zip(t.weights.items(), grads, strict=True)}


def obd(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return h_jj w_j^2 / 2 with the exact diagonal of the Hessian (Optimal Brain Damage; LeCun et al., 1990, Eq. 5).

    By automatic differentiation, one row of the Hessian for each connection: for small networks. At a
    minimum it is non-negative; at initialisation it is signed, and the highest stay.
    """
    with trial(model, x, y, **scoring) as t, _second_derivatives():
        options = {"allow_unused": True, "materialize_grads": True}
        value, scores = t.value(), {}
        for name, p in t.masked.items():
            (grad,) = torch.autograd.grad(value, p, create_graph=True, **options)
            diagonal = torch.zeros_like(p).flatten()
            if grad.requires_grad:
                for js in torch.arange(p.numel(), device=p.device).split(max(1, 2**22 // p.numel())):
                    units = F.one_hot(js, p.numel()).to(p).view(-1, *p.shape)
                    (rows,) = torch.autograd.grad(grad, p, units, retain_graph=True, is_grads_batched=True, **options)
                    diagonal[js] = rows.flatten(1).gather(1, js[:, None]).squeeze(1)
            scores[name] = diagonal.view_as(p) * t.weights[name] ** 2 / 2
        return {name: s.detach() for name, s in scores.items()}


def obd_fisher(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return f_jj w_j^2 / 2 with the empirical Fisher f = mean over examples of (dL_b/dw)^2 for the Hessian.

    It equals the Hessian's expectation where the network's probabilities are right (Theis et al., 2018), and
    is an approximation elsewhere: hence the name of its own. Non-negative; one backward pass for each example
    of the batch, which are the first dimension of the output and of `y`.

    Raises:
        ValueError: the output or `y` is no tensor, or they differ in that dimension.
    """
    with trial(model, x, y, **scoring) as t:
        output, leaves = _by_example(t, "obd_fisher"), list(t.masked.values())
        fisher = {name: torch.zeros_like(w) for name, w in t.weights.items()}
        for b in range(len(output)):
            value = t.loss_of(output[b : b + 1], t.y[b : b + 1])
            grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for f, grad in zip(fisher.values(), grads, strict=True):
                f += grad**2 / len(output)
        return {name: f * t.weights[name] ** 2 / 2 for name, f in fisher.items()}


def obd_gauss_newton(model: nn.Module, x: Any, y: Any, **scoring) -> Scores:
    """Return n_jj w_j^2 / 2 with n = sum over examples of J_b' H_b J_b, the Gauss-Newton part of the Hessian.

    J_b is the derivative of the output of example b in the weights, H_b the Hessian of the loss in that output
    [K, K]. Where the output is piecewise linear in each single weight, as with ReLU and max pooling, without
    statistics of the batch and with no weight in two layers or time steps, the other part has no diagonal: these are
    the scores of `obd`, exactly, by one backward pass for each example and output and not for each connection.
    Elsewhere it is an approximation. (LeCun et al., 1990, carry only the diagonal of second derivatives from layer to
    layer, which is cheaper, and another approximation.) The loss is a sum or mean over examples, which is not
    checked. Non-negative, up to rounding, where it is convex in the output, like cross-entropy.

    Raises:
        ValueError: the output or `y` is no tensor, or they differ in their first dimension.
    """
    # choice: book/choices.md#the-diagonal-of-the-hessian
    with trial(model, x, y, **scoring) as t:
        output, leaves = _by_example(t, "obd_gauss_newton"), list(t.masked.values())
        t.loss_of(output, t.y)  # refuses what cannot be scored
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        with _second_derivatives():  # of the loss alone
            logits = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(t.loss_of(logits, t.y), logits, create_graph=True)
            columns = slope.reshape(len(output), -1).sum(0)  # of one example each: no other enters its derivative
            if not columns.requires_grad:  # the loss is linear in the output
                columns = columns + 0 * logits.sum()
            rows = [torch.autograd.grad(column, logits, **options)[0].view(len(output), -1) for column in columns]
        values, vectors = torch.linalg.eigh(torch.stack(rows, 1))  # H_b = sum of value * vector vector'
        diagonal = {name: torch.zeros_like(w) for name, w in t.weights.items()}
        for one, scales, directions in zip(output.reshape(len(output), -1), values, vectors.mT, strict=True):
            for scale, direction in zip(scales, directions, strict=True):
                grads = torch.autograd.grad(one @ direction, leaves, **options)
                for n, grad in zip(diagonal.values(), grads, strict=True):
                    n += scale * grad**2
        return {name: n * t.weights[name] ** 2 / 2 for name, n in diagonal.items()}


def _by_example(t: Trial, method: str) -> Tensor:
    """Return the output, one line an example; ValueError: it is not, or `y` is not."""
    output = t.output()
    if not all(isinstance(part, Tensor) and part.dim() for part in (output, t.y)) or len(output) != len(t.y):
        raise ValueError(
            f"{method} takes examples one by one: the output and y are tensors with the same first dimension, "
            f"not {shape_of(output)} and {shape_of(t.y)}."
        )
    return output


@contextlib.contextmanager
def _second_derivatives() -> Iterator[None]:
    """Use kernels that have second derivatives: cuDNN's recurrent ones and fused attention have none."""
    before = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        raise ValueError(f"This criterion takes second derivatives, and this network's failed: {error}") from error
    finally:
        torch.backends.cudnn.enabled = before


CRITERIA: dict[str, Callable[..., Scores]] = {
    "snip": snip,
    "exact": exact,
    "magnitude": magnitude,
    "random": random,
    "grasp": grasp,
    "synflow": synflow,
    "obd": obd,
    "obd_fisher": obd_fisher,
    "obd_gauss_newton": obd_gauss_newton,
}
# Criteria that are the absolute value of something signed, which adds up over batches before it is taken.
SIGNED: dict[str, Callable[..., Scores]] = {"snip": connection_gradients, "exact": loss_changes}
# Criteria that look at no example: several batches would only repeat them.
DATA_FREE = ("magnitude", "random", "synflow")
