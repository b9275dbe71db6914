"""Single-shot pruning: Algorithm 1 of the paper, for any network, and its repetition in rounds.

``mask = prune(model, x, y, sparsity=0.95)``: one forward and one backward pass. Read `structured` next.
"""

import itertools
import warnings
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from .masks import Mask, checked, collapsed, keep_top, keep_top_per_layer, n_kept
from .saliency import CRITERIA, DATA_FREE, SIGNED, Loss, Scores, computed, held, mask_at, prunable, shape_of
from .structured import SIGNED_UNIT_CRITERIA, UNIT_CRITERIA, keep_units, mask_of_units, read_under, units_of

# Bundles of choices where the paper's text and the released code differ, or we would choose otherwise today, as
# fields of `Run`: replace(run, **PROTOCOLS["code"]). Batch norm's eps is the network's own.
# augmentation (of CIFAR-10) and the rate's decay go by data set: "code" has augment="code" and, for VGG-D, decay=0.2.
PROTOCOLS: dict[str, dict] = {
    "text": {"prune_biases": True, "score_bn": "batch", "init": "vs_x", "train_init": "same"},
    "code": {"prune_biases": True, "score_bn": "fresh", "init": "lecun", "train_init": "fresh"},
    "modern": {
        **{"prune_biases": False, "score_bn": "batch", "init": "vs_h", "train_init": "same"},
        **{"batch_norm": "torch", "decayed": "weights"},
    },
}

SYNFLOW_ROUNDS = 100  # Tanaka et al. (2020), Section 6
EMA_DECAY = 0.9
NO_BATCH = "There is no batch to score: batches= is empty (an iterator is used up after one pass)."


def _check_schedule(sparsity: float, rounds: int) -> None:
    n_kept(1, sparsity)  # refuses a wrong sparsity
    if not isinstance(rounds, Integral) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds is how many times to score, 1 or more, not {rounds!r}.")


def snip_it_schedule(sparsity: float, rounds: int) -> list[float]:
    """Return SNIP-it's sparsities (Verdenius et al., 2020): half, then each time half of what is missing.

    k_i = L - (L - 0.5) * 0.5^i for i = 0 ... n - 2, then L itself; for L <= 0.5 in equal parts, L * i / n.

    Raises:
        ValueError: a sparsity outside [0, 1), or no round.
    """
    _check_schedule(sparsity, rounds)
    if sparsity <= 0.5:
        return [sparsity * i / rounds for i in range(1, rounds)] + [sparsity]
    return [sparsity - (sparsity - 0.5) * 0.5**i for i in range(rounds - 1)] + [sparsity]


def exponential_schedule(sparsity: float, rounds: int) -> list[float]:
    """Return sparsities whose density falls by the same factor each round (SynFlow; FORCE, Eq. 9).

    Raises:
        ValueError: as `snip_it_schedule`.
    """
    _check_schedule(sparsity, rounds)
    return [1 - (1 - sparsity) ** (i / rounds) for i in range(1, rounds)] + [sparsity]


# choice: book/choices.md#rounds
# "force" (de Jorge et al., 2021): the exponential schedule, and what was removed may return.
SCHEDULES = {"snip_it": snip_it_schedule, "exponential": exponential_schedule, "force": exponential_schedule}


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"batches= gives pairs (x, y), not a batch {shape_of(pair)}.")
    return pair[0], pair[1]


def _n_examples(x: Any, y: Any) -> int:
    """Return how many examples a batch has: the labels' first dimension or, without labels, that of `x`."""
    return next((len(t) for t in tree_leaves((y, x)) if isinstance(t, Tensor) and t.dim()), 1)


def accumulated(
    model: nn.Module,
    batches: Iterable[tuple],
    method: str,
    accumulate: str,
    *,
    criteria: dict = CRITERIA,
    signed: dict = SIGNED,
    **scoring,
) -> Scores:
    """Score several batches as one (Section 4.2: "accumulate ... or take an exponential moving average").

    "sum_then_abs": |sum g|, as if the batches were one (batch norm apart), for the criteria that are the absolute value
    of a derivative or a change (`SIGNED`), and "abs_then_sum" for the others; a batch weighs by its number of examples
    over the first one's, as in a mean loss over them all. "abs_then_sum": the sum of each batch's own scores (SNIP's:
    |g| / sum |g|, Eq. 6); "moving_average": s <- 0.9 s + 0.1 of the next batch's, from the first batch's on.
    """
    # choice: book/choices.md#several-batches
    before_abs = signed.get(method) if accumulate == "sum_then_abs" else None
    criterion, total, first = before_abs or criteria[method], None, None
    for pair in batches:
        x, y = _pair(pair)
        scores, n = criterion(model, x, y, **scoring), _n_examples(x, y)
        first = first or n
        if before_abs and n != first:  # a loader's last batch
            scores = {name: s * (n / first) for name, s in scores.items()}
        if total is None:
            total = scores
        elif accumulate == "moving_average":
            total = {name: EMA_DECAY * s + (1 - EMA_DECAY) * scores[name] for name, s in total.items()}
        else:
            total = {name: s + scores[name] for name, s in total.items()}
    if total is None:
        raise ValueError(NO_BATCH)
    return {name: s.abs() for name, s in total.items()} if before_abs else total


def _still_open(targets: list[float], so_far: Mask, scope: str = "global") -> list[float]:
    """Return the sparsities of a schedule that a mask so far does not pass already; refuse to end below it."""
    sizes = {name: (k.numel(), int(k.sum())) for name, k in so_far.items()}
    if scope == "global":
        sizes = {"": tuple(map(sum, zip(*sizes.values(), strict=True)))}
    for name, (m, left) in sizes.items():
        if (n := n_kept(m, targets[-1])) > left:
            of = f" of {name}" if name else ""
            raise ValueError(f"within= keeps {left} of {m}{of}, fewer than the {n} of sparsity {targets[-1]:g}.")
    return [target for target in targets if all(n_kept(m, target) <= left for m, left in sizes.values())]


def prune(
    model: nn.Module,
    x: Any = None,
    y: Any = None,
    *,
    sparsity: float,
    method: str = "snip",
    loss: Loss = F.cross_entropy,
    batches: Iterable[tuple] | None = None,
    accumulate: str = "sum_then_abs",
    scope: str = "global",
    rounds: int | None = None,
    schedule: str | None = None,
    within: Mask | None = None,
    prune_biases: bool = True,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    score_bn: str = "batch",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    on_collapse: str = "warn",
    structured: bool = False,
) -> Mask:
    """Return the mask that keeps the top kappa connections of `model` at this batch (Algorithm 1).

    The model stays exactly as it was; give it the mask with `apply_mask`.

    Args:
        x: the scoring batch, [B, ...] (a tuple or dict of tensors if the network takes such as its one argument); `y`
            what ``loss(model(x), y)`` takes, and that is a scalar. A copy is scored: what a loss takes from the network
            itself, like a penalty on its weights, is not seen.
        sparsity: the fraction removed, in [0, 1).
        method: one of `CRITERIA`. "exact" takes a forward pass for each connection and "obd" a row of the Hessian:
            for networks of some thousand connections ("obd_gauss_newton" is the same for feed-forward
            ReLU networks, by a pass for each example and output).
        batches: pairs (x, y) in place of one batch; `accumulate` says how they add up (`accumulated`).
        scope: "global": kappa over all prunable parameters together; "layer": in each by itself.
        rounds: how many times to score, removing more each time by `schedule`, one of `SCHEDULES` (None: 100 and
            "exponential" for SynFlow, else 1 and "snip_it"). What is removed stays so, except by "force".
        within: a mask to prune further, for example after some training: what it removes scores at weight 0, and
            stays out, except by "force". It keeps at least as much as `sparsity` does.
        prune_biases, only, exclude: which parameters (`prunable`), frozen or not.
        score_bn: "batch" or "fresh", what batch norm does while scoring (`scoring_copy`).
        dtype: of the scoring, float32 or float64.
        generator: of ``method="random"`` (None: one seeded with 0, so every call draws the same mask).
        on_collapse: a weight removed whole, or every score 0: "warn" or "raise". (Whether a path is left through what
            stays, `report` tells by an example.)
        structured: remove whole units and filters (SNAP; in `rounds`, SNAP-it), by "snip" or at "random".
            `sparsity` is then the fraction removed of the units that may go, which `structured.units_of` lists: of
            hidden layers whose outputs only linear and convolutional layers read; each layer keeps one or more.
            `structured.shrink` makes the network small, or says that it cannot: try it before training.
            Torch-Pruning follows the network; one that reshapes and permutes much (torchvision's swin_t) may take
            it more memory than there is.

    Raises:
        ValueError: an argument that is none of these; no prunable parameter; a batch that does not fit; a
            loss or score that is not finite; with ``on_collapse="raise"``, a weight removed whole or every score 0.
        TypeError: `model` is no module. ImportError: `structured`, and Torch-Pruning is not installed.
    """
    for name, value, known in (
        ("method", method, UNIT_CRITERIA if structured else CRITERIA),
        ("accumulate", accumulate, ("sum_then_abs", "abs_then_sum", "moving_average")),
        ("scope", scope, ("global",) if structured else ("global", "layer")),
        ("schedule", schedule, (None, *SCHEDULES)),
        ("on_collapse", on_collapse, ("warn", "raise")),
    ):
        if value not in tuple(known):
            hint = str(value).lower().replace("-", "_") in ("snip_it", "snipit", "force", "iterative_snip")
            ways = '; SNIP-it is "snip" with rounds=, FORCE the same with schedule="force"' if hint else ""
            raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(map(str, known))}{ways}.")
    if rounds is None and schedule and within is None and method != "synflow":
        raise ValueError(f"schedule={schedule!r} says how the sparsity rises over several rounds: give rounds=, too.")
    if rounds is None:
        rounds, schedule = (SYNFLOW_ROUNDS, schedule or "exponential") if method == "synflow" else (1, schedule)
    _check_schedule(sparsity, rounds)
    blind = method in ("magnitude", "random") and not structured  # an example shows which units belong together
    if (batches is None) == (x is None) and not (x is None and blind):
        raise ValueError("Give one scoring batch, x and y, or several as batches=, pairs (x, y).")
    if isinstance(x, DataLoader):
        raise ValueError("A loader is given as batches=, and every batch of it is scored; x is one batch.")
    if batches is not None and not isinstance(batches, Iterable):
        raise ValueError(f"batches= is several scoring batches, pairs (x, y), such as a loader, not {batches!r}.")
    if not callable(loss):
        raise ValueError(f"loss is a function of the output and the labels, such as F.mse_loss, not {loss!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a torch.Generator, such as torch.Generator().manual_seed(0), not {generator!r}."
        )
    batches = [(x, y)] if batches is None else batches
    batches = itertools.islice(batches, 1) if method in DATA_FREE else batches
    batches = list(batches) if rounds > 1 or structured else batches  # every round sees the same examples
    chosen = {"exclude": computed(model)} if structured else {"only": only, "exclude": exclude}
    scoring = {"loss": loss, "biases": prune_biases, "bn": score_bn, "dtype": dtype, **chosen}
    if method == "random":
        scoring["generator"] = generator

    mask = None if within is None else dict(checked(within))
    if mask is None and any(mask_at(module, attribute) is not None for module, attribute, *_ in held(model)):
        warnings.warn(
            "The network has a mask, and without within=snip.mask_of(network) what it removed may be kept again.",
            stacklevel=2,
        )
    if mask is not None:
        found = prunable(model, biases=prune_biases, **chosen)
        if {n: k.shape for n, k in mask.items()} != {n: p.shape for n, p in found.items()}:
            odd = next(n for n in (*found, *mask) if n not in mask or n not in found or mask[n].shape != found[n].shape)
            raise ValueError(
                "within= is a mask of exactly the parameters that are pruned: names and shapes differ, as of "
                f"{odd}. Give prune_biases=, only= and exclude= as for that mask."
            )
    schedule = schedule or "snip_it"
    targets, returning = SCHEDULES[schedule](sparsity, rounds), schedule == "force"
    if returning and method == "exact":
        raise ValueError('"exact" tells what a removal changes, nothing of what is removed: "force" is for the others.')
    if structured:
        if not batches:
            raise ValueError(NO_BATCH)
        units = units_of(model, _pair(batches[0])[0], only=only, exclude=exclude)
        scoring |= {"criteria": UNIT_CRITERIA, "signed": SIGNED_UNIT_CRITERIA, "units": units}
        kept, scored = (None, None) if mask is None else (read_under(units, mask), mask)
        for target in targets if kept is None else _still_open(targets, kept):
            scores = accumulated(model, batches, method, accumulate, mask=scored, **scoring)
            kept = keep_units(scores, target, among=None if returning else kept)
            # Only what reads the units is masked while scoring, so that a gate at 0 still has its derivative.
            scored, last = (mask_of_units(model, units, kept, biases=prune_biases, rows=rows) for rows in (False, True))
            if mask is not None and not returning:
                scored, last = ({name: k & mask[name].to(k.device) for name, k in m.items()} for m in (scored, last))
        mask = last
    else:
        for target in targets if mask is None else _still_open(targets, mask, scope):
            scores = accumulated(model, batches, method, accumulate, mask=mask, **scoring)
            among = None if returning else mask
            if scope == "layer":
                mask = keep_top_per_layer(scores, target, among=among)
            else:
                mask = keep_top(scores, n_kept(sum(s.numel() for s in scores.values()), target), among=among)
    sentence = ""
    at = f"At sparsity {sparsity:.10g}"
    if not any(s.any() for s in scores.values()):
        sentence = (
            f"{at} every score is 0, so the order of the parameters alone chose the mask: a layer that starts at 0, "
            "like the head of torchvision's vision transformers, lets no gradient through, or the loss does not "
            "depend on the output, as cross-entropy of a single one: give loss=."
        )
    elif gone := collapsed(mask):
        more = f" and {len(gone) - 5} more" if len(gone) > 6 else ""
        sentence = f"{at} nothing is left of {', '.join(gone[:5] if more else gone)}{more}: see report()."
    if sentence and on_collapse == "raise":
        raise ValueError(sentence)
    if sentence:
        warnings.warn(sentence, stacklevel=2)
    return mask
