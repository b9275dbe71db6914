"""Many small networks at once: R runs of one architecture and one schedule, *stacked* or *side by side*.

A figure of Section 5 is 260 LeNets, of which one keeps no GPU busy. Stacked, the network stays the plain module of
`models.py`: `torch.func` calls it with weights stacked over R. `train.train` stays the definition, and
`train_replicas` is tested against it in float64. Each run has its own weights, mask, split, order, labels and rate.
Side by side, where batch norm, augmentation or bf16 forbid that, each run is a `train.Training` of its own, and a
step of the group is a step of each: `train.train` to the last bit.
"""

import copy
import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from . import train as single
from .data import BatchOrder, Data, data_folder, load, read_raw, split
from .devices import arithmetic, fastest, free_memory, in_turn, side_by_side
from .models import MODELS
from .saliency import prunable

# What the runs of a group have in common. Rates differ at no cost, so `lr` and its decay are not here.
SHARED = (
    *("model", "dataset", "pixels", "steps", "batch_size", "optimizer", "momentum", "weight_decay", "decayed"),
    *("augment", "precision"),
)
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, as in `torch.optim`
COMPILE_STEPS = 40_000  # model-steps after which half a minute of compiling has paid; measured on a CPU
CPU_REPLICAS = 4  # measured: 1.8 times the steps of single runs where compiled, and little more beyond
# Side by side on a GPU, at most. Measured on an H200 at batch 128 (tests/bench.py): a step of six AlexNets-s takes
# 3.3 ms, of two VGG-D 3.5 and of six 8.7, for the kernels of the late layers (images of 1 to 8 pixels a side) are too
# small to fill the GPU. Those of a wide residual network are not: it is trained alone.
ABREAST = 8
LARGE = ("wrn_16_8", "wrn_16_10", "wrn_22_8")


# ----------------------------------------------------------------- which runs, how many


@functools.cache
def _plain(model: str) -> nn.Module:
    """Return the network without weights, to look at its modules."""
    with torch.device("meta"):
        return MODELS[model]()


def together(run) -> tuple | None:
    """Return what the runs that can be trained together with `run` have in common; None if it is trained alone.

    Alone are runs with masks in the course of training or without a step, and networks that fill a GPU.
    """
    if not run.steps or run.delay or run.every or run.model in LARGE:
        return None
    return tuple(getattr(run, name) for name in SHARED)


def stacked(run) -> bool:
    """Tell whether a group of runs like `run` is stacked; else its networks are trained side by side.

    Those are networks with batch norm, whose statistics are no function of the weights, and runs with augmentation
    or in bf16.
    """
    plain = run.augment == "none" and run.precision == "float32"
    return plain and not any(True for _ in _plain(run.model).buffers())


def pays_to_compile(run, n_replicas: int, device: torch.device) -> bool:
    """Tell whether compiling the step of a group pays: enough steps, no convolution, and on a CPU a compiler."""
    if run.steps * n_replicas < COMPILE_STEPS or any(isinstance(m, nn.Conv2d) for m in _plain(run.model).modules()):
        return False
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def how_many(run, device: torch.device | str) -> int:
    """Return R for `run` on this device: as many as fit on a GPU; on a CPU as many as pay, which is mostly one.

    Side by side there are at most `ABREAST` on a GPU, and one on a CPU. Measured on a CPU: a LeNet-5-Caffe is
    slower in a group; LeNet-300-100 and the recurrent networks are 1.8 times as fast where the step is compiled,
    and 0.9 to 1.2 times where it is not.
    """
    device = torch.device(device)
    if together(run) is None:
        return 1
    if device.type == "cuda":
        return fitting(run, device) if stacked(run) else min(ABREAST, fitting(run, device))
    return CPU_REPLICAS if stacked(run) and pays_to_compile(run, CPU_REPLICAS, device) else 1


def fitting(run, device: torch.device) -> int:
    """Return how many replicas of `run` fit into four fifths of the memory that is free."""
    data, each = memory(run)
    return max(1, int((0.8 * free_memory(device) - data) // each))


def memory(run, itemsize: int = 4) -> tuple[int, int]:
    """Return the bytes that a group takes whatever its size, and those of each replica, at most."""
    raw, _ = read_raw(run.dataset, data_folder())
    n, shape = len(raw.y_train), tuple(raw.x_train.shape[1:])
    with torch.device("meta"):
        model = MODELS[run.model](shape, raw.n_classes)
        model = by_patches(model) if stacked(run) else model
        x, y = torch.empty(run.batch_size, *shape), torch.zeros(run.batch_size, dtype=torch.int64)
    kept_for_backward, width = 0, 2 if run.precision == "bf16" else itemsize  # of a number in the passes

    def weigh(t: Tensor) -> Tensor:
        nonlocal kept_for_backward
        kept_for_backward += t.numel() * (width if t.is_floating_point() else max(t.element_size(), itemsize))
        return t

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda t: t):
        F.cross_entropy(model(x), y)
    weights = sum(t.numel() for t in (*model.parameters(), *model.buffers())) * itemsize
    # Weights, mask and gradient; each moment, and a copy of all that a step changes.
    copies = 4 + 2 * (2 if run.optimizer == "adam" else 1)
    tables = 8 * 2 * n + 8 * n // 10
    images = (raw.x_train.numel() + raw.x_test.numel()) * itemsize
    if stacked(run):
        # Three more that come and go. Twice the images: one split of them while it scores. Activations, their
        # gradients, and what a convolution unfolds.
        return 2 * images, (copies + 3) * weights + 3 * kept_for_backward + tables
    # Every run has its own split of the images, and its own activations, for all steps are under way at once. While
    # one scores, in float64, there are six of its size: the network, its gradient, the scores and their order.
    batches = math.ceil((run.score_examples or run.batch_size) / run.batch_size)
    scoring = 12 * weights + 2 * kept_for_backward * 8 // width * batches
    return images + scoring, copies * weights + 2 * kept_for_backward + images + tables


# ------------------------------------------------------------------------- set up


class Cut(torch.autograd.Function):
    """The patches of images [B, C, H, W], as of `F.unfold`: [B, C k k, h w].

    On a GPU `F.unfold` launches a kernel an image. This is one copy of a view, and its derivative, `F.fold`, one
    kernel, too; that of the view would go image by image where it is stacked.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: tuple[int, int]) -> Tensor:
        view = x.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1)  # [B, C, h, w, k, k]
        return view.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.size, ctx.kernel = inputs[0].shape[2:], inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.fold(grad, ctx.size, ctx.kernel), None


class Patches(nn.Conv2d):
    """A convolution of stride 1 without padding, as one matrix product over the patches of each image.

    It is exact up to rounding: the same products, added up in another order. Stacked, it is R x B matrix products at
    once, where a convolution is one of R groups, for which a GPU has slow kernels. (`matmul` would make one product
    of all images, whose gradient is a sum over all their places.)
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = [side - k + 1 for side, k in zip(x.shape[-2:], self.kernel_size, strict=True)]
        weights = weight.flatten(1).expand(len(x), -1, -1)  # [B, C', C k k]
        return (torch.bmm(weights, Cut.apply(x, self.kernel_size)) + bias[:, None]).unflatten(2, size)


def by_patches(net: nn.Module) -> nn.Module:
    """Return a copy of `net` whose plain convolutions, with a bias, of stride 1 and without padding, are `Patches`."""
    net = copy.deepcopy(net)
    for module in net.modules():
        plain = type(module) is nn.Conv2d and module.padding == (0, 0) and module.groups == 1
        if plain and module.stride == module.dilation == (1, 1) and module.bias is not None:
            module.__class__ = Patches
    return net


@dataclass
class Group:
    """R runs on their way. What changes lies in `weights`, `moments`, `count`, `loss_sum` and `progress`."""

    runs: list
    net: nn.Module  # its forward pass is that of all; its own weights are not used
    fast: nn.Module  # the same, as it is fastest here
    weights: dict[str, Tensor]  # by name, [R, *shape]
    masks: dict[str, Tensor]  # the same, 1.0 where kept
    moments: dict[str, list[Tensor]]  # the same: momentum, or Adam's mean and mean of squares
    count: Tensor  # optimiser steps, []
    rates: Tensor  # learning rates, [R]
    data: Data  # of all runs, without a split
    seen: Tensor  # which images are a run's training examples, [R, N]
    labels: Tensor  # and their labels, [R, N]
    held_out: Tensor  # which images validate a run, [R, V]
    orders: list[BatchOrder]
    loss_sum: Tensor  # since the last point of the curve, [R]
    progress: dict  # the rest of a checkpoint, as JSON
    began: float
    compiled: bool
    learn: Callable[[Tensor], None] | None = None  # the fastest form of the step here, once there is one

    @property
    def run(self):
        """One of the runs, for what they share."""
        return self.runs[0]

    @property
    def over(self) -> bool:
        """Tell whether every run has diverged."""
        return None not in self.progress["diverged_steps"]

    def seconds(self) -> float:
        """Return the seconds spent on the group, those before it was interrupted included."""
        return self.progress["seconds"] + time.perf_counter() - self.began

    def state(self) -> dict[str, Tensor]:
        """Return everything that a step changes, as named tensors (the live ones)."""
        moments = {f"moment.{n}.{i}": t for n, pair in self.moments.items() for i, t in enumerate(pair)}
        return {f"weight.{n}": w for n, w in self.weights.items()} | moments | {"count": self.count}


def train_replicas(
    runs: list,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    tick: Callable[[int], None] = lambda step: None,
    dtype: torch.dtype = torch.float32,
    compiled: bool | None = None,
) -> list[dict] | None:
    """Train `runs` as one group; return what their rows say, in their order, or None as `train.train` does.

    The same as `train.train` of each, up to rounding; side by side, exactly. A run that diverges has its row and
    leaves the others alone. `compiled`: whether the whole step of stacked runs is (None: where it pays). A row's
    `seconds` are its share of the group's.

    Raises:
        ValueError: runs that cannot be trained together, or more than the memory that is free.
    """
    device, runs = torch.device(device), list(runs)
    kinds = {together(run) for run in runs}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"Runs in a group share {', '.join(SHARED)} and have at least one step, no later mask, and a network "
            "that does not fill a GPU by itself: these do not."
        )
    (fixed, each), free = memory(runs[0], dtype.itemsize), free_memory(device)
    if fixed + len(runs) * each > free:
        raise ValueError(
            f"{len(runs)} replicas of {runs[0].model} take about {(fixed + len(runs) * each) / 1e9:.3g} GB and "
            f"{free / 1e9:.3g} GB are free: ask for at most {max(1, int((free - fixed) // each))}, or let R be chosen."
        )
    if compiled is None:
        compiled = pays_to_compile(runs[0], len(runs), device)
    with arithmetic(device):
        if stacked(runs[0]):
            g, work = begin(runs, device, checkpoint, dtype, compiled), (advance, look, save, outcomes)
        else:
            work = (advance_each, look_at_each, save_each, outcome_of_each)
            g = begin_each(runs, device, checkpoint, dtype)
        take, see, keep, tell = work
        if not single.drive(g, take, see, functools.partial(keep, path=checkpoint), deadline, tick):
            return None
        return tell(g)


def begin(runs: list, device: torch.device, checkpoint: Path | None, dtype: torch.dtype, compiled: bool) -> Group:
    """Score, mask and stack the networks of `runs` on `device`; or go on from the `checkpoint`."""
    began, n_runs, run = time.perf_counter(), len(runs), runs[0]
    data = load(run.dataset, seed=None, device=device, pixels=run.pixels)
    splits = [[part.to(device) for part in split(len(data.y_train), run.seed)] for run in runs]
    labels = torch.stack(
        [single.train_labels(r, data.y_train[seen]) for r, (seen, _) in zip(runs, splits, strict=True)]
    )
    net = single.initial_model(run, data)
    weights = {name: torch.empty(n_runs, *p.shape, dtype=dtype, device=device) for name, p in net.named_parameters()}
    n_moments = 2 if run.optimizer == "adam" else 1
    progress = {
        **{"runs": [dataclasses.asdict(r) for r in runs], "step": 0, "loss_steps": 0, "loss_sum": [0.0] * n_runs},
        **{"curves": [{name: [] for name in single.NO_CURVE} for _ in runs], "diverged_steps": [None] * n_runs},
        **{"seconds": 0.0, "scoring_seconds": [0.0] * n_runs, "compiled": compiled},
    }
    g = Group(
        runs=runs,
        net=net,
        fast=by_patches(net) if device.type == "cuda" else net,
        weights=weights,
        masks={name: torch.ones_like(w) for name, w in weights.items()},
        moments={name: [torch.zeros_like(w) for _ in range(n_moments)] for name, w in weights.items()},
        count=torch.zeros((), dtype=torch.float64, device=device),
        rates=torch.zeros(n_runs, dtype=dtype, device=device),
        data=dataclasses.replace(data, x_train=data.x_train.to(dtype), x_test=data.x_test.to(dtype)),
        seen=torch.stack([seen for seen, _ in splits]),
        labels=labels,
        held_out=torch.stack([held_out for _, held_out in splits]),
        orders=[BatchOrder(labels.shape[1], r.batch_size, r.seed) for r in runs],
        loss_sum=torch.zeros(n_runs, dtype=torch.float64, device=device),
        progress=progress,
        began=began,
        compiled=compiled,
    )
    if checkpoint and checkpoint.exists():
        restore(g, checkpoint)
    else:
        score(g)
    return g


def score(g: Group) -> None:
    """Fill in the weights and masks of all runs, scored one after another as `train.train` does."""
    seed, device = None, g.loss_sum.device
    for i in sorted(range(len(g.runs)), key=lambda i: g.runs[i].seed):
        if (run := g.runs[i]).seed != seed:
            seed, data = run.seed, load(run.dataset, seed=run.seed, device=device, pixels=run.pixels)
        began = time.perf_counter()
        model, mask = single.scored(run, data)
        g.progress["scoring_seconds"][i] = time.perf_counter() - began
        single.draw_again(run, model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g.weights[name][i] = p
            for name, kept in (mask or {}).items():
                g.masks[name][i] = kept
    for name, w in g.weights.items():
        w.mul_(g.masks[name])


# --------------------------------------------------------------------------- steps


def step_of(g: Group) -> Callable[[Tensor], None]:
    """Return the step of all runs: gather, forward, backward and masked update. Only tensors, and no look at any."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(g.fast, weights, (x,)), y)

    gradients = vmap(grad_and_value(loss))  # a network at a time, as written; R at a time, as computed

    def step(chosen: Tensor) -> None:  # [R, B]
        x = g.data.x_train[g.seen.gather(1, chosen)]  # [R, B, C, H, W]
        y = g.labels.gather(1, chosen)  # [R, B]
        grads, losses = gradients(g.weights, x, y)
        update(g, grads)
        g.loss_sum.add_(losses)

    return step


def update(g: Group, grads: dict[str, Tensor]) -> None:
    """Take a step of SGD with momentum, or of Adam, in place: `torch.optim`'s formulas with m * grad for grad.

    d = m * grad + decay * w. SGD: v <- mu v + d, w <- w - lr v. Adam (Kingma & Ba, 2015): a <- b1 a + (1 - b1) d,
    s <- b2 s + (1 - b2) d^2, w <- w - lr a' / (sqrt(s') + eps) with a' = a / (1 - b1^t), s' = s / (1 - b2^t).
    """
    run, decayed = g.run, prunable(g.net)
    g.count.add_(1)
    for name, w in g.weights.items():
        rate = g.rates.view(-1, *[1] * (w.dim() - 1))  # [R, 1, ...]
        decay = run.weight_decay if name in decayed and (run.decayed == "all" or decayed[name].dim() > 1) else 0.0
        d = (grads[name] * g.masks[name]).add_(w, alpha=decay)
        if run.optimizer == "adam":
            (a, s), (b1, b2) = g.moments[name], BETAS
            a.mul_(b1).add_(d, alpha=1 - b1)
            s.mul_(b2).addcmul_(d, d, value=1 - b2)
            size = (s / (1 - b2**g.count)).sqrt_().add_(EPS)
            w.sub_((a * (rate / (1 - b1**g.count))).div_(size))
        else:
            (v,) = g.moments[name]
            v.mul_(run.momentum).add_(d)
            w.sub_(rate * v)


def advance(g: Group, table: Tensor) -> None:
    """Take a step on each batch of `table` [steps, R, B]."""
    decays = {run.decay_every for run in g.runs}
    for i, chosen in enumerate(table):
        step = g.progress["step"]
        if i == 0 or any(step % every == 0 for every in decays):
            g.rates.copy_(torch.tensor([single.rate_at(run, step) for run in g.runs], dtype=torch.float64))
        if g.learn is None:
            plain = step_of(g)
            if g.compiled:
                torch.compiler.reset()  # a process compiles one function eight times at most, and each group anew
            forms = [torch.compile(plain, dynamic=False), plain] if g.compiled else [plain]
            g.learn = fastest(forms, [chosen], lambda: g.state() | {"loss_sum": g.loss_sum})
        g.learn(chosen)
        g.progress["step"] += 1
        g.progress["loss_steps"] += 1


# ------------------------------------------------------------------ look, save, tell


def look(g: Group) -> None:
    """Look which losses are finite, and at a point of the curve, or where a run ends, at the errors."""
    at, step = g.progress, g.progress["step"]
    losses = g.loss_sum.tolist()
    ended = at["diverged_steps"]
    fresh = [i for i, loss in enumerate(losses) if not math.isfinite(loss) and ended[i] is None]
    for i in fresh:
        ended[i] = step
    point = step in single.curve_points(g.run.steps)
    if point or fresh:
        val, test = errors(g)
        for i in range(len(g.runs)) if point else fresh:
            if ended[i] in (None, step):
                single.note(at["curves"][i], step, losses[i] / at["loss_steps"], val[i], test[i])
    if point:
        g.loss_sum.zero_()
        at["loss_steps"] = 0


def errors(g: Group) -> tuple[list[float], list[float]]:
    """Return the validation and test errors of all runs in percent, by batches, which fit where a step does."""

    def answer(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(g.fast, weights, (x,)).argmax(1)

    own, common, size = vmap(answer), vmap(answer, in_dims=(0, None)), g.run.batch_size
    x, y, tests = g.data.x_train, g.data.y_train, zip(g.data.x_test.split(size), g.data.y_test.split(size), strict=True)
    with torch.no_grad():
        val = sum((own(g.weights, x[some]) != y[some]).sum(1) for some in g.held_out.split(size, 1))  # [R]
        test = sum((common(g.weights, a) != b).sum(1) for a, b in tests)  # [R]
    n_val, n_test = g.held_out.shape[1], len(g.data.y_test)
    return [100 * n / n_val for n in val.tolist()], [100 * n / n_test for n in test.tolist()]


def save(g: Group, path: Path | None) -> None:
    """Write the checkpoint of a group: its members too, so that it goes on with the same R."""
    if path:
        masks = {f"mask.{name}": m.bool() for name, m in g.masks.items()}
        progress = g.progress | {"loss_sum": g.loss_sum.tolist(), "seconds": g.seconds()}
        single.write_checkpoint(path, g.state() | masks, progress)


def restore(g: Group, path: Path) -> None:
    """Go on where `save` left a group, with the same bits."""
    tensors = single.read_checkpoint(path)
    for name, t in (g.state() | {f"mask.{name}": m for name, m in g.masks.items()}).items():
        t.copy_(tensors[name])
    g.progress = single.read_progress(path)
    g.compiled = g.progress["compiled"]
    g.loss_sum.copy_(torch.tensor(g.progress["loss_sum"], dtype=torch.float64))


def outcomes(g: Group) -> list[dict]:
    """Return what the rows of the runs say, in their order."""
    rows, at, n_runs = [], g.progress, len(g.runs)
    for i, run in enumerate(g.runs):
        names = prunable(g.net, biases=run.prune_biases) if run.sparsity else {}
        mask = {name: g.masks[name][i].bool() for name in names} or None
        rows.append(single.outcome(run, g.net, mask, g.data, at["curves"][i], at["diverged_steps"][i]))
        if run.attacked or run.structured:
            net = copy.deepcopy(g.net).to(g.loss_sum.device, next(iter(g.weights.values())).dtype)
            net.load_state_dict({name: w[i] for name, w in g.weights.items()})
            rows[i] |= single.afterwards(run, net, mask, g.data, at["diverged_steps"][i])
    share = single.rounded(g.seconds() / n_runs)
    for row, scoring_seconds in zip(rows, at["scoring_seconds"], strict=True):
        row |= {"replicas": n_runs, "scoring_seconds": single.rounded(scoring_seconds), "seconds": share}
    return rows


# -------------------------------------------------------------------- side by side


@dataclass
class Abreast:
    """R runs on their way, each with a network of its own. What changes lies in `members`."""

    members: list[single.Training]
    began: float
    learn: Callable[[Tensor], None] | None = None  # the fastest form of a step of those that go on, once there is one

    def __post_init__(self):
        first = self.members[0]
        self.run, self.loss_sum = first.run, first.loss_sum  # for what they share: the schedule, the device
        self.orders = [t.orders[0] for t in self.members]

    @property
    def progress(self) -> dict:
        """That of the run which came furthest: one that diverged stays where it did."""
        return max((t.progress for t in self.members), key=lambda progress: progress["step"])

    @property
    def over(self) -> bool:
        """Tell whether every run has diverged."""
        return all(t.over for t in self.members)

    def share(self) -> float:
        """Return a run's share of the seconds spent on the group, those before it was interrupted included."""
        before = sum(t.progress["seconds"] for t in self.members)
        return (before + time.perf_counter() - self.began) / len(self.members)


def begin_each(runs: list, device: torch.device, checkpoint: Path | None, dtype: torch.dtype) -> Abreast:
    """Begin each run as `train.train` does, or go on from the `checkpoint`; runs of one seed share the images."""
    began, data = time.perf_counter(), {}
    for run in runs:
        if run.seed not in data:
            data[run.seed] = load(run.dataset, seed=run.seed, device=device, pixels=run.pixels)
    return Abreast([single.begin(run, data[run.seed], checkpoint, dtype, i) for i, run in enumerate(runs)], began)


def advance_each(g: Abreast, table: Tensor) -> None:
    """Take a step on each line of `table` (`train.examples`) with every run that has not diverged.

    On a GPU all are one graph, each run on a stream of its own; on a CPU they go in turn.
    """
    going = [i for i, t in enumerate(g.members) if not t.over]
    trained, stay = [g.members[i] for i in going], len(going) == len(g.members)
    for i, lines in enumerate(table if stay else table[:, going]):
        for t in trained:
            single.set_rate(t, anew=i == 0)
        if g.learn is None:
            kinds = list(zip(*(single.forms(t) for t in trained), strict=True))  # the fastest of all, ..., the plain
            on_gpu = [side_by_side(steps) for steps in kinds] if lines.is_cuda else []
            g.learn = fastest(
                [*on_gpu, in_turn(kinds[-1])],
                [lines],
                lambda: {f"{i}.{name}": x for i, t in enumerate(trained) for name, x in single.state(t).items()},
            )
        g.learn(lines)
        for t in trained:
            t.progress["step"] += 1
            t.progress["loss_steps"] += 1


def look_at_each(g: Abreast) -> None:
    """Look at every run that goes on; where one diverged, the next step is one of those that are left."""
    for t in g.members:
        if not t.over:
            single.look(t)
            if t.over:
                g.learn = None


def save_each(g: Abreast, path: Path | None) -> None:
    """Write one checkpoint of all runs, whole or not at all: its members too, so that it goes on with the same R."""
    if path:
        tensors, members, share = {}, [], g.share()
        for i, t in enumerate(g.members):
            own, progress = single.snapshot(t)
            tensors |= {f"{i}.{name}": x for name, x in own.items()}
            members.append(progress | {"seconds": share})
        runs = [dataclasses.asdict(t.run) for t in g.members]
        single.write_checkpoint(path, tensors, {"runs": runs, "step": g.progress["step"], "members": members})


def outcome_of_each(g: Abreast) -> list[dict]:
    """Return what the rows of the runs say, in their order."""
    rows = [single.finish(t) for t in g.members]
    return [row | {"replicas": len(rows), "seconds": single.rounded(g.share())} for row in rows]
