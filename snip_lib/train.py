"""Training: one run from its first draw to its row, by the protocol of Section 5.

`train` is the definition: score once, then plain SGD (or Adam) on the weights that are left.
`runs.py` sends many runs here.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import AUGMENTATIONS, BatchOrder, Data, generator, load, same_class_batch, score_batch
from .inits import initialise
from .masks import Mask, on_live_path, shuffle_within_layers
from .models import BATCH_NORMS, MODELS
from .prune import SCHEDULES, prune
from .saliency import prunable

CHECKPOINT_S = 45.0  # a killed run loses at most about this much work
DIVERGED_ERROR = 80.0  # percent of the validation set: no better than two classes of ten


@contextlib.contextmanager
def fast_cpu() -> Iterator[None]:
    """Train on one thread with the faster float32 matrix product, if it is as exact; restore both.

    "medium" lets oneDNN multiply float32 matrices (on AMD twice as fast as MKL, and still float32);
    on a processor with bfloat16 tiles it would round, so a probe against float64 decides. One thread,
    because two OpenMP threads on a shared machine wait for each other.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        a, b = torch.randn(2, 256, 256, generator=generator(0, "probe"), dtype=torch.float64)
        torch.set_float32_matmul_precision("medium")
        error = (a.float() @ b.float() - a @ b).abs().max().item()
        if error > 1e-3:  # float32 gives about 4e-5, bfloat16 about 0.1
            torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def initial_model(run, data: Data) -> nn.Module:
    """Build the network of `run` with the weights that are scored, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):  # modules draw weights of their own, replaced at once
        model = MODELS[run.model](data.shape, data.n_classes)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            vars(module).update(BATCH_NORMS[run.batch_norm])
    initialise(model, run.init, generator(run.seed, "init"), sd=run.init_sd, bias_init=run.bias_init)
    if run.rescale != 1:  # for a network of ReLUs, whose second layer divides what the first multiplies
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        (first, w1), (_, w2) = list(weights.items())[:2]
        bias = model.get_submodule(first.rpartition(".")[0]).bias
        with torch.no_grad():
            w1.mul_(run.rescale), bias.mul_(run.rescale), w2.div_(run.rescale)
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
            prune_biases=run.prune_biases,
            score_bn=run.score_bn,
            dtype=torch.float64,
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
    last five checkpoints, one every 1,000 steps."""
    along = {round(steps * i / 10) for i in range(1, 11)}
    return sorted((along | set(range(0, steps + 1, 1000)[-5:])) - {0})


def error_percent(model: nn.Module, x: Tensor, y: Tensor, *, chunk: int = 1000) -> float:
    """Return the share of examples whose highest output is not their label, in percent."""
    training = model.training
    model.eval()
    with torch.no_grad():
        wrong = sum((model(a).argmax(1) != b).sum() for a, b in zip(x.split(chunk), y.split(chunk), strict=True))
    model.train(training)
    return 100 * wrong.item() / len(y)


def make_optimizer(run, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum, or Adam. Weight decay is on weights and, mostly, biases; not on batch norm."""
    decayed = [p for p in prunable(model).values() if run.decayed == "all" or p.dim() > 1]
    rest = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if run.optimizer == "adam":
        return torch.optim.Adam(groups, lr=run.lr, fused=True)
    return torch.optim.SGD(groups, lr=run.lr, momentum=run.momentum, fused=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that changes while training, as named tensors (the live ones, not copies)."""
    state = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state |= {f"optimizer.{i}.{name}": t for name, t in optimizer.state[p].items() if t is not None}
    return state


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mask | None, progress: dict
) -> None:
    """Write weights, optimiser state, mask and curves, all or nothing; no code is pickled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    tensors = _state(model, optimizer) | {f"mask.{name}": kept for name, kept in (mask or {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, temporary, {"progress": json.dumps(progress)})
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Mask | None, dict]:
    """Restore what `save_checkpoint` wrote and return its mask (None before the first one) and its `progress`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with safe_open(path, "pt") as file:
        weights = {n.removeprefix("model."): file.get_tensor(n) for n in file.keys() if n.startswith("model.")}
        model.load_state_dict(weights)
        for n in file.keys():
            if n.startswith("optimizer."):
                i, name = n.split(".")[1:]
                tensor = file.get_tensor(n)
                p = parameters[int(i)]
                # Laid out as the parameter is: fused updates of two layouts differ in the last bit.
                optimizer.state[p][name] = torch.empty_like(p).copy_(tensor) if tensor.dim() else tensor
        names = [n for n in prunable(model) if f"mask.{n}" in file.keys()]  # the file's order is the alphabet's
        mask = {n: file.get_tensor(f"mask.{n}") for n in names}
        return mask or None, json.loads(file.metadata()["progress"])


def train(
    run,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    tick: Callable[[int], None] = lambda step: None,
) -> dict | None:
    """Train `run` and return what its row says about the outcome; None if the `deadline` came first.

    Protocol `text`: connection sensitivity at one batch, the scored weights are trained, the rate is
    multiplied by `decay` every `decay_every` steps, and the error is that of the last step. Pruned
    weights stay exactly 0: they start at 0 and their gradients are multiplied by the mask, so neither
    momentum nor decay moves them. A loss that is not finite ends the run as *diverged*.

    `deadline` is a `time.time()`; `tick(step)` is called now and then, for progress.
    """
    device = torch.device(device)
    with fast_cpu() if device.type == "cpu" else contextlib.nullcontext():
        return _train(run, device, checkpoint, deadline, tick)


def _train(run, device, checkpoint, deadline, tick) -> dict | None:
    data = load(run.dataset, seed=run.seed, device=device, pixels=run.pixels)
    began, scoring_seconds = time.perf_counter(), 0.0
    model, mask, times = initial_model(run, data), None, mask_times(run)
    parameters, resumed = prunable(model), bool(checkpoint and checkpoint.exists())
    if run.delay == 0 and not resumed:  # before the weights are drawn anew, and laid out for speed
        mask = mask_for(run, model, data)
        scoring_seconds = time.perf_counter() - began
    if run.steps == 0:
        outcome = _outcome(run, model, mask, data, NO_CURVE) | _portrait(run, model, mask, data)
        seconds = time.perf_counter() - began
        return outcome | {"scoring_seconds": _round(scoring_seconds), "seconds": _round(seconds)}
    if run.train_init != "same":  # other weights than those that were scored
        init = run.init if run.train_init == "fresh" else run.train_init
        draw = generator(run.seed, "train_init")
        initialise(model, init, draw, sd=run.init_sd, bias_init=run.bias_init)
    model.to(device, memory_format=torch.channels_last)
    beginning = [p.detach().clone() for p in parameters.values()] if run.rewind else []
    y_train = data.y_train
    if run.random_labels:
        y_train = y_train[torch.randperm(len(y_train), generator=generator(run.seed, "labels")).to(device)]

    order = BatchOrder(len(y_train), run.batch_size, run.seed)
    optimizer = make_optimizer(run, model)
    points = curve_points(run.steps)
    curve = {name: [] for name in ("step", "train_loss", "val_error", "test_error")}
    progress = {"step": 0, "loss_sum": 0.0, "loss_steps": 0, "curve": curve, "seconds": 0.0}
    if resumed:
        mask, progress = load_checkpoint(checkpoint, model, optimizer)
        curve, scoring_seconds = progress["curve"], progress["scoring_seconds"]
    masked = _apply(mask, parameters, optimizer)
    seconds_before, saved = progress["seconds"], time.perf_counter()
    loss_sum = torch.tensor(progress["loss_sum"], dtype=torch.float64, device=device)
    loss_steps, step, diverged_step = progress["loss_steps"], progress["step"], progress.get("diverged_step")

    def save() -> None:
        elapsed = seconds_before + time.perf_counter() - began
        now = {"step": step, "loss_sum": loss_sum.item(), "loss_steps": loss_steps, "curve": curve}
        now |= {"seconds": elapsed, "scoring_seconds": scoring_seconds, "diverged_step": diverged_step}
        if checkpoint:
            save_checkpoint(checkpoint, model, optimizer, mask, now)

    model.train()
    while step < run.steps and diverged_step is None:
        if step in times and step > 0:
            scoring_began = time.perf_counter()
            mask = mask_for(run, model, data, step=step, within=mask)
            if run.rewind:
                optimizer.state.clear()
                with torch.no_grad():
                    torch._foreach_copy_(list(parameters.values()), beginning)
            masked = _apply(mask, parameters, optimizer)
            scoring_seconds += time.perf_counter() - scoring_began
        chosen = order.indices(step).to(device)
        x = AUGMENTATIONS[run.augment](data.x_train[chosen], generator(run.seed, "augment", step))
        loss = F.cross_entropy(model(x), y_train[chosen])
        optimizer.zero_grad()
        loss.backward()
        if masked:
            torch._foreach_mul_([p.grad for p, _ in masked], [kept for _, kept in masked])
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, step)
        optimizer.step()
        loss_sum += loss.detach()
        loss_steps += 1
        step += 1
        at_point = step in points
        if at_point or step % 100 == 0:  # looking at the loss is a wait for a GPU: only now and then
            tick(step)
            if not math.isfinite(loss_sum.item()):
                diverged_step = step
        if at_point or diverged_step is not None:
            curve["step"].append(step)
            curve["train_loss"].append(_round(loss_sum.item() / loss_steps))
            curve["val_error"].append(_round(error_percent(model, data.x_val, data.y_val)))
            curve["test_error"].append(_round(error_percent(model, data.x_test, data.y_test)))
            loss_sum.zero_()
            loss_steps = 0
        if step % 100 == 0 and step < run.steps:
            stop = time.time() > deadline
            if stop or time.perf_counter() - saved > CHECKPOINT_S:
                save()
                saved = time.perf_counter()
            if stop:
                return None
    save()
    seconds = seconds_before + time.perf_counter() - began
    return {
        **_outcome(run, model, mask, data, curve, diverged_step),
        "scoring_seconds": _round(scoring_seconds),
        "seconds": _round(seconds),
    }


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


NO_CURVE = {"step": [], "train_loss": [], "val_error": [], "test_error": []}


def _outcome(run, model: nn.Module, mask: Mask | None, data: Data, curve: dict, diverged_step=None) -> dict:
    """Return what a row says of the trained network; without a step there are no errors (None)."""
    tested, validated = curve["test_error"] or [None], curve["val_error"] or [None]
    best = min(range(len(validated)), key=validated.__getitem__)
    last_five = [e for s, e in zip(curve["step"], curve["test_error"], strict=True) if s % 1000 == 0][-5:]
    live = on_live_path(model.cpu(), mask, data.x_test[:1].cpu()) if mask else None
    m = sum(p.numel() for p in prunable(model).values())
    return {
        "test_error": tested[-1],
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
        "n_prunable": sum(kept.numel() for kept in mask.values()) if mask else m,
        "kept": {name: int(kept.sum()) for name, kept in mask.items()} if mask else {},
        "effective_sparsity": _round(1 - sum(int(k.sum()) for k in live.values()) / m, 6) if mask else 0.0,
        "replicas": 1,
    }


def _portrait(run, model: nn.Module, mask: Mask, data: Data) -> dict:
    """Return what the row of a run without a step keeps of its mask, so that pages can show it.

    `mask_sha` names the mask. `gradient` is the norm of each parameter's gradient at the first scoring batch.
    For seed 0, `picture` counts, of each linear weight, how many connections are kept: per input of the
    first one, per output of the others; and `mean_image` is the mean of the scoring batches, 0 ... 255.
    """
    bits = torch.cat([kept.flatten() for kept in mask.values()]).cpu().numpy()
    x, y = score_batches(run, data)[0]
    loss = SCORE_LOSSES[run.score_loss](model.to(x.device).double()(x.double()), y)
    parameters = prunable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    found = {
        "mask_sha": hashlib.sha256(np.packbits(bits).tobytes()).hexdigest()[:12],
        "gradient": {n: _round(g.norm().item()) for n, g in zip(parameters, gradients, strict=True)},
    }
    if run.seed == 0:
        linear = [(name, kept) for name, kept in mask.items() if kept.dim() == 2]
        raw = load(run.dataset, seed=run.seed, device=data.x_train.device, pixels="raw")
        images = torch.cat([x for x, _ in score_batches(run, raw)])
        found["picture"] = {name: kept.sum(0 if i == 0 else 1).tolist() for i, (name, kept) in enumerate(linear)}
        found["mean_image"] = (255 * images.mean(0)).round().int().flatten().tolist()
    return found


def _round(value: float, digits: int = 4) -> float | None:
    """Four significant digits; None stands for a number that is not finite (JSON has none)."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
