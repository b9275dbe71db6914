"""Training: one run from its first draw to its row, by the protocol of Section 5.

`train` is the definition: score once, then plain SGD (or Adam) on the weights that are left.
`runs.py` sends many runs here.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import AUGMENTATIONS, BatchOrder, Data, generator, load, score_batch
from .inits import initialise
from .masks import Mask, on_live_path, shuffle_within_layers
from .models import MODELS
from .prune import prune
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
    initialise(model, run.init, generator(run.seed, "init"), sd=run.init_sd)
    return model


def mask_for(run, model: nn.Module, data: Data) -> Mask | None:
    """Return the mask of `run` for its initial `model`, scored in float64; None for a dense run.

    The model is scored where the data are, or on the CPU if that device has no float64.
    """
    if run.sparsity == 0:
        return None
    device = data.x_train.device if data.x_train.device.type == "cuda" else torch.device("cpu")
    n = run.score_examples or run.batch_size
    if run.score_split == "val":
        data = dataclasses.replace(data, x_train=data.x_val, y_train=data.y_val)
    x, y = score_batch(data, n * run.score_batches, run.seed)
    batches = [(a.to(device), b.to(device)) for a, b in zip(x.split(n), y.split(n), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer removed whole is in the row: nothing of it is kept
        mask = prune(
            model.to(device),
            batches=batches,
            sparsity=run.sparsity,
            method=run.method,
            accumulate=run.accumulate,
            scope=run.scope,
            rounds=run.rounds if run.rounds > 1 else None,
            schedule=run.schedule if run.rounds > 1 else None,
            prune_biases=run.prune_biases,
            score_bn=run.score_bn,
            dtype=torch.float64,
            generator=generator(run.seed, "random mask"),
        )
    if run.control == "shuffle":
        mask = shuffle_within_layers(mask, generator(run.seed, "shuffle"))
    return mask


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
    """Return SGD with momentum, or Adam. Weight decay is on weights and biases, not on batch norm."""
    decayed = list(prunable(model).values())
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


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write weights, optimiser state and curves, all or nothing; no code is pickled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    tensors = {name: t.detach().cpu().contiguous() for name, t in _state(model, optimizer).items()}
    save_file(tensors, temporary, {"progress": json.dumps(progress)})
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Restore what `save_checkpoint` wrote and return its `progress`."""
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
        return json.loads(file.metadata()["progress"])


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
    data = load(run.dataset, seed=run.seed, device=device)
    began = time.perf_counter()
    model = initial_model(run, data)
    scoring_began = time.perf_counter()
    mask = mask_for(run, model, data)
    scoring_seconds = time.perf_counter() - scoring_began
    if run.train_init != "same":  # other weights than those that were scored
        init = run.init if run.train_init == "fresh" else run.train_init
        initialise(model, init, generator(run.seed, "train_init"), sd=run.init_sd)
    model.to(device, memory_format=torch.channels_last)
    parameters = prunable(model)
    masked = [(parameters[name], kept.to(device)) for name, kept in (mask or {}).items()]
    with torch.no_grad():
        for p, kept in masked:
            p.mul_(kept)
    kept_floats = [torch.empty_like(p).copy_(kept) for p, kept in masked]
    y_train = data.y_train
    if run.random_labels:
        y_train = y_train[torch.randperm(len(y_train), generator=generator(run.seed, "labels")).to(device)]

    order = BatchOrder(len(y_train), run.batch_size, run.seed)
    optimizer = make_optimizer(run, model)
    points = curve_points(run.steps)
    curve = {name: [] for name in ("step", "train_loss", "val_error", "test_error")}
    progress = {"step": 0, "loss_sum": 0.0, "loss_steps": 0, "curve": curve, "seconds": 0.0}
    if checkpoint and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
        curve = progress["curve"]
    seconds_before, saved = progress["seconds"], time.perf_counter()
    loss_sum = torch.tensor(progress["loss_sum"], dtype=torch.float64, device=device)
    loss_steps, step, diverged_step = progress["loss_steps"], progress["step"], progress.get("diverged_step")

    def save() -> None:
        elapsed = seconds_before + time.perf_counter() - began
        now = {"step": step, "loss_sum": loss_sum.item(), "loss_steps": loss_steps, "curve": curve}
        if checkpoint:
            save_checkpoint(checkpoint, model, optimizer, now | {"seconds": elapsed, "diverged_step": diverged_step})

    model.train()
    while step < run.steps and diverged_step is None:
        chosen = order.indices(step).to(device)
        x = AUGMENTATIONS[run.augment](data.x_train[chosen], generator(run.seed, "augment", step))
        loss = F.cross_entropy(model(x), y_train[chosen])
        optimizer.zero_grad()
        loss.backward()
        if masked:
            torch._foreach_mul_([p.grad for p, _ in masked], kept_floats)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * run.decay ** (step // run.decay_every)
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

    best = min(range(len(curve["step"])), key=curve["val_error"].__getitem__)
    last_five = [e for s, e in zip(curve["step"], curve["test_error"], strict=True) if s % 1000 == 0][-5:]
    live = on_live_path(model.cpu(), mask, data.x_test[:1].cpu()) if mask else None
    m = sum(p.numel() for p in parameters.values())
    return {
        "test_error": curve["test_error"][-1],
        "test_error_best_val": curve["test_error"][best],
        "test_error_best5": min(last_five, default=curve["test_error"][-1]),
        "val_error": curve["val_error"][-1],
        "train_loss": curve["train_loss"][-1],
        "diverged": diverged_step is not None or curve["val_error"][-1] >= DIVERGED_ERROR,
        "diverged_step": diverged_step,
        "steps_before_mask": 0,
        "curve": curve,
        "n_prunable": sum(kept.numel() for kept in mask.values()) if mask else m,
        "kept": {name: int(kept.sum()) for name, kept in mask.items()} if mask else {},
        "effective_sparsity": _round(1 - sum(int(k.sum()) for k in live.values()) / m, 6) if mask else 0.0,
        "scoring_seconds": _round(scoring_seconds),
        "seconds": _round(seconds_before + time.perf_counter() - began),
        "replicas": 1,
    }


def _round(value: float, digits: int = 4) -> float | None:
    """Four significant digits; None stands for a number that is not finite (JSON has none)."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
