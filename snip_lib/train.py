"""Training: one run from its first draw to its row, by the protocol of Section 5.

`train` is the definition: score once, then plain SGD (or Adam) on the weights that are left. In the order of
the work: `begin` (score, draw, lay out), `advance` and `learn` (one step), `look` (evaluate), `save`.
`replicas.py` trains many runs at once, tested against this; `runs.py` sends runs here.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import (
    AUGMENTATIONS,
    PIXELS,
    BatchOrder,
    Data,
    data_folder,
    generator,
    load,
    move,
    read_raw,
    same_class_batch,
    score_batch,
)
from .devices import arithmetic, fastest
from .inits import initialise
from .masks import Mask, opened, shuffle_within_layers
from .models import BATCH_NORMS, MODELS
from .paths import report
from .prune import SCHEDULES, prune
from .robustness import attacked
from .saliency import evaluated, is_bias, prunable
from .structured import measure, shrink

CHECKPOINT_S = 45.0  # a killed run loses at most about this much work
# choice: book/choices.md#divergence
DIVERGED_ERROR = 80.0  # percent of the validation set: no better than two classes of ten
LOOK_EVERY = 100  # steps: looking at a number makes a GPU wait
AGAIN = "delete it, and its run begins anew"  # what to do with a damaged checkpoint
CLOCK_S = 5.0  # where LOOK_EVERY steps take longer, the clock is read in between
# Steps that pay for compiling a network for CIFAR-10. Measured on an H200: compiling WRN-16-8 takes 15 s and saves
# 2.3 ms a step; compiling VGG-D takes 20 s, and its step alone is then no faster than one of two side by side.
COMPILE_FROM = {"wrn_16_8": 7_000, "wrn_16_10": 7_000, "wrn_22_8": 7_000}
PRECISIONS = ("float32", "bf16")  # "bf16": forward and backward pass in autocast; weights and updates stay float32


def initial_model(run, data: Data) -> nn.Module:
    """Build the network of `run` with the weights that are scored, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):  # modules draw weights of their own, replaced at once
        model = MODELS[run.model](data.shape, data.n_classes)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        vars(norm).update(BATCH_NORMS[run.batch_norm])
    initialise(model, run.init, generator(run.seed, "init"), sd=run.init_sd, bias_init=run.bias_init)
    if run.rescale != 1:  # batch norm behind the first layer divides it out; else, behind a ReLU, the second layer
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        (first, w1), (_, w2) = list(weights.items())[:2]
        bias = model.get_submodule(first.rpartition(".")[0]).bias
        with torch.no_grad():
            w1.mul_(run.rescale), bias.mul_(run.rescale), w2.div_(1 if norms else run.rescale)
    return model


SCORE_LOSSES = {"cross_entropy": F.cross_entropy, "nll": F.nll_loss}


def score_batches(run, data: Data) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that score `run`: of all classes or of one, from the train or the validation set."""
    n = run.score_examples or run.batch_size
    if run.score_split == "val":
        data = dataclasses.replace(data, x_train=data.x_val, y_train=data.y_val)
    if run.score_class >= 0:
        x, y = same_class_batch(data, run.score_class, n * run.score_batches, run.seed)
    else:
        x, y = score_batch(data, n * run.score_batches, run.seed)
    return list(zip(x.split(n), y.split(n), strict=True))


def mask_times(run) -> dict[int, float]:
    """Return the steps before which `run` is masked, with the sparsity after each; {} for a dense run."""
    if run.sparsity == 0:
        return {}
    targets = SCHEDULES[run.schedule](run.sparsity, run.rounds) if run.every else [run.sparsity]
    return {run.delay + i * run.every: target for i, target in enumerate(targets)}


def mask_for(run, model: nn.Module, data: Data, *, step: int | None = None, within: Mask | None = None) -> Mask | None:
    """Return the mask of `run` for `model` before step `step` (None: the first), scored in float64.

    None for a dense run. The model is scored where the data are, or on the CPU if that device has no
    float64. `within` is the mask so far.
    """
    if run.sparsity == 0:
        return None
    device = data.x_train.device if data.x_train.device.type == "cuda" else torch.device("cpu")
    batches = [(x.to(device), y.to(device)) for x, y in score_batches(run, data)]
    rounds = run.rounds if run.rounds > 1 and not run.every else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer removed whole is in the row: nothing of it is kept
        mask = prune(
            model.to(device),
            batches=batches,
            sparsity=mask_times(run)[run.delay if step is None else step],
            method=run.method,
            loss=SCORE_LOSSES[run.score_loss],
            accumulate=run.accumulate,
            scope=run.scope,
            rounds=rounds,
            schedule=run.schedule if rounds else None,
            within=within,
            structured=run.structured,
            prune_biases=run.prune_biases,
            score_bn=run.score_bn,
            dtype=torch.float64,  # choice: book/choices.md#precision-of-scores
            generator=generator(run.seed, "random mask"),
        )
    if run.control == "shuffle":
        mask = shuffle_within_layers(mask, generator(run.seed, "shuffle"))
    return mask


def rate_at(run, step: int) -> float:
    """Return the learning rate of step `step`: `lr` times `decay` every `decay_every` steps.

    With `retrain`, that schedule begins anew at ``lr * retrain`` after each mask but one before training.
    """
    last = max((t for t in mask_times(run) if t <= step), default=0) if run.retrain else 0
    return run.lr * (run.retrain if last else 1.0) * run.decay ** ((step - last) // run.decay_every)


def curve_points(steps: int) -> list[int]:
    """Return the steps after which a run is evaluated: ten along the way, and the released code's
    last five checkpoints, one every 1,000 steps. Files of rows leave them out, so this never changes."""
    along = {round(steps * i / 10) for i in range(1, 11)}
    return sorted((along | set(range(0, steps + 1, 1000)[-5:])) - {0})


def error_percent(model: nn.Module, x: Tensor, y: Tensor, *, chunk: int = 1000) -> float:
    """Return the share of examples whose highest output is not their label, in percent."""
    with torch.no_grad(), evaluated(model):
        wrong = sum((model(a).argmax(1) != b).sum() for a, b in zip(x.split(chunk), y.split(chunk), strict=True))
    return 100 * wrong.item() / len(y)


def make_optimizer(run, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum, or Adam. Weight decay is on weights and, mostly, biases; not on batch norm."""
    # choice: book/choices.md#weight-decay
    decayed = [p for p in prunable(model).values() if run.decayed == "all" or p.dim() > 1]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"  # where a graph replays the step, it reads the rate from a tensor, always float32
    lr = torch.tensor(run.lr, dtype=torch.float32, device=device) if on_gpu else run.lr
    if run.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, fused=True, capturable=on_gpu)
    return torch.optim.SGD(groups, lr=lr, momentum=run.momentum, fused=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that changes while training, as named tensors (the live ones, not copies)."""
    state = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state |= {f"optimizer.{i}.{name}": t for name, t in optimizer.state[p].items() if t is not None}
    return state


def write_checkpoint(path: Path, tensors: dict[str, Tensor], progress: dict) -> None:
    """Write tensors and `progress`, all or nothing; no code is pickled.

    A tensor with many zeros goes as the numbers that live and one bit for each place, shared by tensors that
    live at the same places: a pruned network takes little room. The sign of a zero is not kept, and no training
    feels it.
    """
    stored, at, places = {}, {}, {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        live = t != 0
        bits = np.packbits(live.flatten().numpy())
        if int(live.sum()) * t.itemsize + len(bits) < t.nbytes:
            of = at.setdefault(bits.tobytes(), f"live in {name}")
            stored[of], places[name], t = torch.from_numpy(bits), [of, *t.shape], t[live]
        stored[name] = t
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(stored, temporary, {"progress": json.dumps(progress), "places": json.dumps(places)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk is not made fuller


def read_progress(path: Path) -> dict:
    """Return the `progress` that `write_checkpoint` wrote."""
    with opened(path, AGAIN) as file:
        return json.loads(file.metadata()["progress"])


def read_checkpoint(path: Path, own: str = "") -> dict[str, Tensor]:
    """Return the tensors that `write_checkpoint` wrote whose names begin with `own`, by the rest of their names."""
    tensors = {}
    with opened(path, AGAIN) as file:
        places = json.loads(file.metadata().get("places", "{}"))  # an older version wrote every tensor whole
        bits = {of for of, *_ in places.values()}
        for name in file.keys():
            if name.startswith(own) and name not in bits:
                t = file.get_tensor(name)
                if name in places:
                    of, *shape = places[name]
                    live = np.unpackbits(file.get_tensor(of).numpy(), count=math.prod(shape)).astype(bool)
                    whole = torch.zeros(math.prod(shape), dtype=t.dtype)
                    whole[torch.from_numpy(live)] = t
                    t = whole.view(shape)
                tensors[name.removeprefix(own)] = t
    return tensors


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, member: int | None = None
) -> tuple[Mask | None, dict]:
    """Restore what `snapshot` held of a run, or of one `member` of a group, whose names begin with its number.

    Return its mask (None before the first one) and its `progress`.
    """
    tensors = read_checkpoint(path, "" if member is None else f"{member}.")
    parameters, progress = [p for group in optimizer.param_groups for p in group["params"]], read_progress(path)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for n, tensor in tensors.items():
        if n.startswith("optimizer."):
            i, name = n.split(".")[1:]
            p = parameters[int(i)]
            # Laid out as the parameter is: fused updates of two layouts differ in the last bit.
            optimizer.state[p][name] = torch.empty_like(p).copy_(tensor) if tensor.dim() else tensor.to(p.device)
    mask = {n: tensors[f"mask.{n}"] for n in prunable(model) if f"mask.{n}" in tensors}  # a file's order is another
    return mask or None, progress if member is None else progress["members"][member]


def train(
    run,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    tick: Callable[[int], None] = lambda step: None,
    dtype: torch.dtype = torch.float32,
) -> dict | None:
    """Train `run` and return what its row says about the outcome; None if the `deadline` came first.

    Protocol `text`: connection sensitivity at one batch, the scored weights are trained, the rate is
    multiplied by `decay` every `decay_every` steps, and the error is that of the last step. Pruned
    weights stay exactly 0: they start at 0 and their gradients are multiplied by the mask, so neither
    momentum nor decay moves them. A loss that is not finite ends the run as *diverged*.

    `deadline` is a `time.time()`; `tick(step)` is called now and then, for progress. `dtype` is that of
    the weights; tests take float64.
    """
    device = torch.device(device)
    with arithmetic(device):
        data = load(run.dataset, seed=run.seed, device=device, pixels=run.pixels)
        if run.steps == 0:
            return _only_scored(run, data)
        t = begin(run, data, checkpoint, dtype)
        if not drive(t, advance, look, partial(save, path=checkpoint), deadline, tick):
            return None
        return finish(t)


# ------------------------------------------------------------------- score and set up


def scored(run, data: Data) -> tuple[nn.Module, Mask | None]:
    """Return the network of `run` with the weights that are scored, and its mask if it comes before training."""
    model = initial_model(run, data)
    return model, mask_for(run, model, data) if run.delay == 0 else None


def draw_again(run, model: nn.Module) -> None:
    """Give `model` other weights than those that were scored, where `run` says so."""
    if run.train_init != "same":  # choice: book/choices.md#weights-trained
        init = run.init if run.train_init == "fresh" else run.train_init
        initialise(model, init, generator(run.seed, "train_init"), sd=run.init_sd, bias_init=run.bias_init)


def train_labels(run, labels: Tensor) -> Tensor:
    """Return the labels of the training examples [N], in random order where `run` says so."""
    if not run.random_labels:
        return labels
    # choice: book/choices.md#random-labels
    order = torch.randperm(len(labels), generator=generator(run.seed, "labels"))
    return labels[order.to(labels.device)]


@dataclass
class Training:
    """One run on its way. What changes lies in the model, the optimiser, `mask`, `loss_sum` and `progress`."""

    run: Any
    data: Data
    labels: Tensor  # of the training examples, [N]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mask: Mask | None
    masked: list[tuple[Tensor, Tensor]]  # each masked parameter with its mask as numbers
    beginning: dict[str, Tensor]  # where the network began, batch norm included, for a run that goes back there
    orders: list[BatchOrder]  # one
    loss_sum: Tensor  # since the last point of the curve, []
    progress: dict  # the rest of a checkpoint, as JSON
    began: float
    learn: Callable[[Tensor], None] | None = None  # the fastest form of `learn` here, once there is one

    @property
    def over(self) -> bool:
        """Tell whether there is nothing left to train."""
        return self.progress["diverged_step"] is not None

    def seconds(self) -> float:
        """Return the seconds spent on the run, those before it was interrupted included."""
        return self.progress["seconds"] + time.perf_counter() - self.began


def begin(
    run, data: Data, checkpoint: Path | None = None, dtype: torch.dtype = torch.float32, member: int | None = None
) -> Training:
    """Score, mask and lay out the network of `run` where the data are; or go on from the `checkpoint`.

    `member` is its number in the checkpoint of a group.
    """
    began, device = time.perf_counter(), data.x_train.device
    resumed = bool(checkpoint and checkpoint.exists())
    model, mask = (initial_model(run, data), None) if resumed else scored(run, data)
    progress = {"step": 0, "loss_sum": 0.0, "loss_steps": 0, "curve": {name: [] for name in NO_CURVE}, "seconds": 0.0}
    progress |= {"scoring_seconds": time.perf_counter() - began if mask else 0.0, "diverged_step": None}
    draw_again(run, model)
    model.to(device, dtype, memory_format=torch.channels_last).train()
    beginning = {name: value.clone() for name, value in model.state_dict().items()} if run.rewind else {}
    optimizer = make_optimizer(run, model)
    if resumed:
        mask, found = load_checkpoint(checkpoint, model, optimizer, member)
        progress |= found  # an older version of the library may have noted less
    masked = _apply(mask, prunable(model), optimizer)
    loss_sum = torch.tensor(progress["loss_sum"], dtype=torch.float64, device=device)
    data = dataclasses.replace(data, **{x: getattr(data, x).to(dtype) for x in ("x_train", "x_val", "x_test")})
    labels, orders = train_labels(run, data.y_train), [BatchOrder(len(data.y_train), run.batch_size, run.seed)]
    return Training(run, data, labels, model, optimizer, mask, masked, beginning, orders, loss_sum, progress, began)


# ------------------------------------------------------------------------------ steps


def drive(t, advance, look, save, deadline: float, tick: Callable[[int], None]) -> bool:
    """Train from look to look until the last step, or until `t` is over; False if the `deadline` came first.

    A look is at every point of the curve and every `LOOK_EVERY` steps, for it makes a GPU wait. The
    examples of the steps up to the next look are drawn before this one, while a GPU is still at work.
    The clock is read more often where steps are slow: it decides when to save and stop, and nothing else.
    """
    saved, steps, pace = time.perf_counter(), t.run.steps, 1
    looks = sorted({*curve_points(steps), *range(LOOK_EVERY, steps, LOOK_EVERY)})

    def table() -> Tensor:
        step = t.progress["step"]
        last = looks[bisect_right(looks, step)] if step < steps else step
        return examples(t.run.augment, t.orders, range(step, last), t.loss_sum.device)

    ahead = table()
    while len(ahead) and not t.over:
        now, ahead, began = ahead[:pace], ahead[pace:], time.perf_counter()
        advance(t, now)
        step, taken = t.progress["step"], (time.perf_counter() - began) / len(now)
        pace = min(LOOK_EVERY, max(1, int(CLOCK_S / taken)))
        if not len(ahead):
            ahead = table()
            look(t)
        tick(step)
        if step < steps:
            stop = time.time() > deadline
            if stop or time.perf_counter() - saved > CHECKPOINT_S:
                save(t)
                saved = time.perf_counter()
            if stop:
                return False
    save(t)
    return True


def examples(augment: str, orders: list[BatchOrder], steps: range, device: torch.device) -> Tensor:
    """Return what each of R runs sees at some steps, on `device` without a wait for it.

    Int64 [steps, R, B]: the numbers of the examples. Where they are augmented, [steps, R, B, 4]: the number, and
    the `moves` of the image.
    """
    if not steps:
        return torch.empty(0, device=device)
    seen = {}  # runs of one seed see the same
    for order in orders:
        if (name := (order.n, order.batch_size, order.seed)) not in seen:
            seen[name] = order.indices(steps)
            if draw := AUGMENTATIONS[augment]:
                chances = [generator(order.seed, "augment", step) for step in steps]
                moves = torch.stack([draw(order.batch_size, chance) for chance in chances])
                seen[name] = torch.cat([seen[name][..., None], moves], -1)
    table = torch.stack([seen[order.n, order.batch_size, order.seed] for order in orders], 1)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def advance(t: Training, table: Tensor) -> None:
    """Take a step on each line of `table` (`examples`); a mask in the course of training comes before its step."""
    times = mask_times(t.run)
    for i, seen in enumerate(table[:, 0]):
        step = t.progress["step"]
        if step in times and step > 0:
            mask_again(t)
        set_rate(t, anew=i == 0)
        if t.learn is None:
            t.learn = fastest(forms(t), [seen], partial(state, t))
        t.learn(seen)
        t.progress["step"] += 1
        t.progress["loss_steps"] += 1


def set_rate(t: Training, *, anew: bool) -> None:
    """Set the rate of the next step: `anew`, or where it differs from that of the last one."""
    rate = rate_at(t.run, t.progress["step"])
    if anew or rate != rate_at(t.run, t.progress["step"] - 1):
        for group in t.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a graph reads it there
            else:
                group["lr"] = rate


def batch(t: Training, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images [B, C, H, W] and labels [B] that a step sees: `seen` [B], or [B, 4] where augmented."""
    chosen = seen if seen.dim() == 1 else seen[:, 0]
    x = t.data.x_train[chosen]
    return x if seen.dim() == 1 else move(x, seen[:, 1:]), t.labels[chosen]


def forms(t: Training) -> list[Callable[[Tensor], None]]:
    """Return `learn` in each form that may work here, the fastest first and the plain one last."""
    plain = partial(learn, t, t.model)
    if t.loss_sum.is_cuda and t.run.precision == "bf16" and t.run.steps >= COMPILE_FROM.get(t.run.model, 40_000):
        return [partial(learn, t, torch.compile(t.model)), plain]
    return [plain]


def state(t: Training) -> dict[str, Tensor]:
    """Return everything that `learn` changes, as named tensors (the live ones)."""
    return _state(t.model, t.optimizer) | {"loss_sum": t.loss_sum}


def learn(t: Training, forward: Callable[[Tensor], Tensor], seen: Tensor) -> None:
    """Take one masked step on what is `seen`: only tensors, and no look at any, so that a GPU can replay it.

    Masking the gradient is exact: w is 0 where it is pruned, so with m * g momentum and decay are 0 there too.
    """
    (x, y), reduced = batch(t, seen), t.run.precision == "bf16"
    with torch.autocast(x.device.type, torch.bfloat16) if reduced else contextlib.nullcontext():
        loss = F.cross_entropy(forward(x), y)
    t.optimizer.zero_grad()
    loss.backward()
    if t.masked:
        torch._foreach_mul_([p.grad for p, _ in t.masked], [kept for _, kept in t.masked])
    t.optimizer.step()
    t.loss_sum += loss.detach()


def mask_again(t: Training) -> None:
    """Score the network as it is now and mask it further."""
    began = time.perf_counter()
    # choice: book/choices.md#masks-in-the-course-of-training
    t.mask = mask_for(t.run, t.model, t.data, step=t.progress["step"], within=t.mask)
    if t.run.rewind:
        t.optimizer.state.clear()
        t.model.load_state_dict(t.beginning)
    t.masked, t.learn = _apply(t.mask, prunable(t.model), t.optimizer), None
    t.progress["scoring_seconds"] += time.perf_counter() - began


def _apply(mask: Mask | None, parameters: dict, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Set pruned weights and their momenta to 0; return each masked parameter with its mask as numbers."""
    masked = []
    with torch.no_grad():
        for name, kept in (mask or {}).items():
            p = parameters[name]
            masked.append((p, torch.empty_like(p).copy_(kept)))
            p.mul_(masked[-1][1])
            for value in optimizer.state.get(p, {}).values():  # else what was moving would go on moving
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.mul_(masked[-1][1])
    return masked


# ------------------------------------------------------------------- look, save, tell


NO_CURVE = {"step": [], "train_loss": [], "val_error": [], "test_error": []}


def look(t: Training) -> None:
    """Look whether the loss is finite, and at a point of the curve, or at the end, at the errors."""
    at, step = t.progress, t.progress["step"]
    loss = t.loss_sum.item()
    if not math.isfinite(loss):
        at["diverged_step"] = step
    if step in curve_points(t.run.steps) or t.over:
        val, test = (
            error_percent(t.model, x, y) for x, y in ((t.data.x_val, t.data.y_val), (t.data.x_test, t.data.y_test))
        )
        note(at["curve"], step, loss / at["loss_steps"], val, test)
        t.loss_sum.zero_()
        at["loss_steps"] = 0


def note(curve: dict, step: int, loss: float, val_error: float, test_error: float) -> None:
    """Add a point to a curve."""
    for name, value in zip(NO_CURVE, (step, loss, val_error, test_error), strict=True):
        curve[name].append(value if name == "step" else rounded(value))


def save(t: Training, path: Path | None) -> None:
    """Write the checkpoint of a run."""
    if path:
        write_checkpoint(path, *snapshot(t))


def snapshot(t: Training) -> tuple[dict[str, Tensor], dict]:
    """Return what a checkpoint holds of a run: weights, optimiser state and mask; and its `progress`."""
    masks = {f"mask.{name}": kept for name, kept in (t.mask or {}).items()}
    progress = t.progress | {"loss_sum": t.loss_sum.item(), "seconds": t.seconds()}
    return _state(t.model, t.optimizer) | masks, progress


def finish(t: Training) -> dict:
    """Return what the row of a run says once it is trained."""
    ended = t.progress["diverged_step"]
    more = afterwards(t.run, t.model, t.mask, t.data, ended)
    seconds = {"scoring_seconds": rounded(t.progress["scoring_seconds"]), "seconds": rounded(t.seconds())}
    return outcome(t.run, t.model, t.mask, t.data, t.progress["curve"], ended) | more | seconds


def outcome(
    run, model: nn.Module, mask: Mask | None, data: Data, curve: dict, diverged_step: int | None = None
) -> dict:
    """Return what a row says of the trained network; without a step there are no errors (None)."""
    tested, validated = curve["test_error"] or [None], curve["val_error"] or [None]
    best = min(range(len(validated)), key=validated.__getitem__)
    last_five = [e for s, e in zip(curve["step"], curve["test_error"], strict=True) if s % 1000 == 0][-5:]
    m = sum(part.numel() for part in (mask or prunable(model)).values())
    left = report(model.cpu(), mask, data.x_test[:1].cpu()).loc[list(mask)] if mask else None
    weights = left[[not is_bias(name, kept) for name, kept in mask.items()]] if mask else None
    return {
        "test_error": tested[-1],  # choice: book/choices.md#reported-error
        "test_error_best_val": tested[best],
        "test_error_best5": min(last_five, default=tested[-1]),
        "val_error": validated[-1],
        "train_loss": (curve["train_loss"] or [None])[-1],
        # A network that memorises random labels is wrong about true ones by design.
        "diverged": diverged_step is not None
        or (run.steps > 0 and not run.random_labels and validated[-1] >= DIVERGED_ERROR),
        "diverged_step": diverged_step,
        "steps_before_mask": run.delay,
        "curve": curve,
        "n_prunable": m,
        "kept": {name: int(kept.sum()) for name, kept in mask.items()} if mask else {},
        # Biases that reach an output live too, also where no path from an input does.
        "live_weights": int(weights["live"].sum()) if mask else None,
        "effective_sparsity": rounded(1 - float(left["live"].sum()) / m, 6) if mask else 0.0,
        # To which no live connection leads, in all layers and in the last one, whose units are the outputs.
        "dead_units": int(weights["dead_units"].sum()) if mask else None,
        "dead_outputs": int(weights["dead_units"].iloc[-1]) if mask else None,
        "replicas": 1,
    }


def afterwards(run, model: nn.Module, mask: Mask | None, data: Data, diverged_step: int | None) -> dict:
    """Return what the row of a run that is `attacked` or `structured` says beyond `outcome`.

    A structured row has what is left after `shrink`, in percent of the whole network: its parameters, its
    multiply-adds, and the seconds that the device of the run takes for a batch of 10. An attacked one has what
    `robustness.attacked` returns. A loss that is not finite leaves no network to look at, and nothing is returned.
    """
    found: dict = {}
    if diverged_step is not None or not (run.attacked or run.structured):
        return found
    model = copy.deepcopy(model).to(data.x_test.device, memory_format=torch.channels_last)
    if run.structured:
        x = data.x_test[:10].to(next(model.parameters()).dtype)  # what fits a cache is timed alike again and again
        small = shrink(model, mask, x).to(memory_format=torch.channels_last)  # as the whole one lies
        turns = [[measure(net, x, repeats=3) for net in (model, small)] for _ in range(30)]  # both meet what disturbs
        whole, left = (cost | {"seconds": min(turn[i]["seconds"] for turn in turns)} for i, cost in enumerate(turns[0]))
        found |= {f"{name}_left": rounded(100 * left[name] / whole[name]) for name in whole}
        found |= {"whole_seconds": rounded(whole["seconds"])}
    if run.attacked:
        began = time.perf_counter()
        network, x, y = in_pixel_units(run, model)
        found |= attacked(network, x, y, generator=generator(run.seed, "attack"))
        found |= {"attack_seconds": rounded(time.perf_counter() - began)}
    return found


class InPixelUnits(nn.Module):
    """A network of images in pixel units, [B, C, H, W] in [0, 1], which rescales them as its data set is."""

    def __init__(self, model: nn.Module, black: Tensor, white: Tensor):
        super().__init__()
        self.model, self.black, self.white = model, black.view(-1, 1, 1), white.view(-1, 1, 1)  # [C, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.black + x * (self.white - self.black))


def in_pixel_units(run, model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network of `run` as one of images in pixel units, and the test set: images in [0, 1] and labels."""
    like, (raw, table) = next(model.parameters()), read_raw(run.dataset, data_folder())
    brightest = int(raw.x_train.max())
    values = PIXELS[run.pixels](table, brightest).to(like)  # [C, 256]
    x = raw.x_test.to(like) / brightest
    return InPixelUnits(model, values[:, 0], values[:, brightest]), x, raw.y_test.to(like.device)


def _only_scored(run, data: Data) -> dict:
    """Return what the row of a run without a step says."""
    began = time.perf_counter()
    model, mask = scored(run, data)
    scoring_seconds = time.perf_counter() - began
    found = outcome(run, model, mask, data, NO_CURVE) | _portrait(run, model, mask, data)
    seconds = time.perf_counter() - began
    return found | {"scoring_seconds": rounded(scoring_seconds), "seconds": rounded(seconds)}


def _portrait(run, model: nn.Module, mask: Mask, data: Data) -> dict:
    """Return what the row of a run without a step keeps of its mask, so that pages can show it.

    `mask_sha` names the mask. There is more of one shot of SNIP alone. `gradient` is the norm of each parameter's
    gradient at the first scoring batch, gate by gate (`gates.reset.weight`) where a layer names its `parts`. For seed
    0, `picture` counts, of each linear weight, how many connections are kept: per input of the first one, per output
    of the others; and `mean_image` is the mean of the scoring batches, 0 ... 255. Where the first layer is linear in
    the pixels, `mean_correlation` is the correlation over them of the connections kept with the mean of all training
    images; and where one class was scored, `class_correlations` has, class by class, that with the mean image of the
    batches that would have scored it, and `input_correlations` that with the size of the mean input |x̄| of those
    batches, as the network sees them.
    """
    bits = torch.cat([kept.flatten() for kept in mask.values()]).cpu().numpy()
    found: dict = {"mask_sha": hashlib.sha256(np.packbits(bits).tobytes()).hexdigest()[:12]}
    if run.method != "snip" or run.rounds > 1 or run.structured:
        return found
    x, y = score_batches(run, data)[0]
    loss = SCORE_LOSSES[run.score_loss](model.to(x.device).double()(x.double()), y)
    parameters = prunable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    found["gradient"] = {}
    for name, g in zip(parameters, gradients, strict=True):
        layer, _, kind = name.rpartition(".")
        parts = getattr(model.get_submodule(layer), "parts", ())
        names = [f"{layer}.{part}.{kind}" for part in parts] or [name]
        found["gradient"] |= {n: rounded(of.norm().item()) for n, of in zip(names, g.chunk(len(names)), strict=True)}
    linear = [(name, kept) for name, kept in mask.items() if kept.dim() == 2]
    sees_pixels = bool(linear) and linear[0][1].shape[1] == data.x_train[0].numel()
    if run.seed and not sees_pixels:
        return found
    raw = load(run.dataset, seed=run.seed, device=data.x_train.device, pixels="raw")

    def mean_input(run, data: Data) -> Tensor:
        return torch.cat([x for x, _ in score_batches(run, data)]).mean(0).flatten()

    def correlations(images: list[Tensor]) -> list[float | None]:  # of what is kept of each pixel
        both = torch.stack([linear[0][1].sum(0), *images]).double()
        return [rounded(r) for r in torch.corrcoef(both)[0, 1:].tolist()]

    if run.seed == 0:
        found["picture"] = {name: kept.sum(0 if i == 0 else 1).tolist() for i, (name, kept) in enumerate(linear)}
        found["mean_image"] = (255 * mean_input(run, raw)).round().int().tolist()
    if sees_pixels:
        (found["mean_correlation"],) = correlations([raw.x_train.mean(0).flatten()])
    if sees_pixels and run.score_class >= 0:
        of_class = [dataclasses.replace(run, score_class=c) for c in range(int(raw.y_train.max()) + 1)]
        found["class_correlations"] = correlations([mean_input(one, raw) for one in of_class])
        found["input_correlations"] = correlations([mean_input(one, data).abs() for one in of_class])
    return found


def rounded(value: float, digits: int = 4) -> float | None:
    """Four significant digits; None stands for a number that is not finite (JSON has none)."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
