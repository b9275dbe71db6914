"""Where pruning breaks: networks that are cut off, and networks that are attacked.

The studies of Verdenius, Stol & Forre (2020), with whole groups of rows in place of single runs. Attacks are
projected gradient descent (Madry et al., 2018), in pixel units. Tables are made as in `tables`.
"""

import contextlib
from collections.abc import Iterable, Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import Mask
from .paths import report
from .saliency import is_bias
from .tables import PLACES, Table, cell, difference, digits, estimate, table

# ------------------------------------------------------------------------------- tables by sparsity


def by_sparsity(groups: dict[str, pd.DataFrame], field: str = "test_error") -> Table:
    """Return a column of rows by group (a line) and sparsity (a column): mean [95 % interval] over all seeds.

    A run that failed counts with the value that it ended with, for to leave it out would favour the way that
    fails; "failed" counts those that diverged or only guess. `n` is the smallest number of seeds in a column.
    """
    lines = []
    for name, rows in groups.items():
        line = {"method": name, "n": cell(_seeds(rows), "fewest seeds", rows) if len(rows) else "not run yet"}
        line["failed"] = cell(str(int(rows["diverged"].astype(bool).sum())), "diverged", rows) if len(rows) else ""
        for sparsity in _sparsities(groups):
            group = rows[rows["sparsity"] == sparsity]
            values = group[field].astype(float).dropna()
            how, places = f"mean and interval {field}", PLACES.get(field, 2)
            shown = estimate(values, how, group, places=places, sign="") if len(values) else ""
            line[f"{100 * sparsity:g} %"] = shown
        lines.append(line)
    return table(lines, "method")


def gains(groups: dict[str, pd.DataFrame], pairs: Iterable[tuple[str, str]]) -> Table:
    """Return, by sparsity, the difference of test error between two groups, in points, paired by seed, for each pair.

    The mean with its 95 % interval; a run that failed counts with the error that it ended with.
    """
    lines, pairs = [], list(pairs)
    for sparsity in _sparsities({name: groups[name] for pair in pairs for name in pair}):
        line = {"sparsity %": f"{100 * sparsity:g}"}
        for ours, theirs in pairs:
            a, b = (groups[name][groups[name]["sparsity"] == sparsity] for name in (ours, theirs))
            found = difference(a, b)
            line[f"{ours} − {theirs}"] = found if found != "–" else "not run yet"
        lines.append(line)
    names = [f"{ours} − {theirs}" for ours, theirs in pairs]
    return table(lines, "sparsity %") if lines else Table(columns=names).rename_axis("sparsity %")


def _sparsities(groups: dict[str, pd.DataFrame]) -> list[float]:
    return sorted({s for rows in groups.values() for s in rows["sparsity"]})


def _seeds(rows: pd.DataFrame) -> str:
    return str(rows.groupby("sparsity").size().min())


def is_cut_off(rows: pd.DataFrame) -> pd.Series:
    """Tell for each row whether its network is disconnected: a layer keeps no weight, or no path goes through it."""
    empty = [any(n == 0 for name, n in kept.items() if name.endswith("weight")) for kept in rows["kept"]]
    return pd.Series(empty, index=rows.index, dtype=bool) | (rows["effective_sparsity"].astype(float) == 1)


def disconnection_table(groups: dict[str, pd.DataFrame]) -> Table:
    """Return how many networks `is_cut_off`, by group and sparsity, with exact 95 % binomial intervals in percent."""
    from scipy import stats

    lines = []
    for name, rows in groups.items():
        line = {"method": name, "n": cell(_seeds(rows), "fewest seeds", rows) if len(rows) else "not run yet"}
        for sparsity in _sparsities(groups):
            group, text = rows[rows["sparsity"] == sparsity], ""
            if len(group):
                cut = int(is_cut_off(group).sum())
                ends = stats.binomtest(cut, len(group)).proportion_ci(0.95)
                text = f"{cut} of {len(group)} [{', '.join(digits(100 * end, 1) for end in ends)}]"
            line[f"{100 * sparsity:g} %"] = cell(text, "disconnected", group) if text else ""
        lines.append(line)
    return table(lines, "method")


def mask_table(model: nn.Module, masks: dict[str, Mask], x: Tensor, *, like: str) -> pd.DataFrame:
    """Return one line a mask of `model`: weights kept by layer, effective sparsity, what it has in common with `like`.

    That is the number of connections that both keep, in percent of those that either keeps. `x`: an example, [1, ...].
    """
    lines = {}
    for name, mask in masks.items():
        found = report(model, mask, x)
        lines[name] = {n.removesuffix(".weight"): int(found["kept"][n]) for n in mask if not is_bias(n, mask[n])}
        lines[name]["effective sparsity %"] = digits(100 * found.attrs["effective_sparsity"])
        pairs = [(kept, masks[like][n]) for n, kept in mask.items()]
        both, either = (sum(int(join(a, b).sum()) for a, b in pairs) for join in (torch.logical_and, torch.logical_or))
        lines[name][f"in common with {like} %"] = digits(100 * both / either, 0)
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("mask")


# ---------------------------------------------------------------------------------------- attacks


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 40,
    restarts: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images near `x` that `model` takes for something else, where projected gradient ascent finds any.

    `x` is [B, ...] in pixel units, in [0, 1], and so is what is returned; `model` takes such images (put the
    normalisation inside). They stay within `eps` of `x`: "linf", the largest change of a pixel, or "l2", the
    Euclidean length of the change. The first of the `restarts` begins at `x`, the others at random points of that
    ball, drawn from a CPU `generator` (None: one seeded with 0). Steps of 2.5 eps / steps go up the lead of the
    best wrong class over `y`: the gradient of cross-entropy would vanish where the network is sure of itself. An
    image that no step turns comes back as it was, and so does the model.

    Raises:
        ValueError: a norm that is neither; pixels outside of [0, 1].
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm is "linf" or "l2", not {norm!r}.')
    if x.min() < 0 or x.max() > 1:
        raise ValueError("Attacks are in pixel units: x lies in [0, 1], and the normalisation belongs to the model.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found = x.clone()
    with _evaluated(model):
        for restart in range(restarts if eps > 0 else 0):
            near = x
            if restart:
                draws = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
                near = (x + _shorten(2 * draws - 1, eps, norm, fill=True)).clamp(0, 1)
            for step in range(steps + 1):
                near = near.detach().requires_grad_(True)
                output = model(near)
                wrong = ~F.one_hot(y, output.shape[1]).bool()
                lead = output[wrong].view(len(y), -1).amax(1) - output[~wrong]
                found[lead > 0] = near.detach()[lead > 0]
                if step < steps:
                    (up,) = torch.autograd.grad(lead.sum(), near)
                    up = up.sign() if norm == "linf" else up / _length(up)
                    moved = near.detach() + 2.5 * eps / steps * up
                    near = (x + _shorten(moved - x, eps, norm)).clamp(0, 1)  # which only brings it closer to x
    return found


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


def _length(change: Tensor) -> Tensor:
    """Return the Euclidean length of each example of a batch, never 0, shaped to divide it."""
    length = change.flatten(1).norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
    return length.view(-1, *[1] * (change.dim() - 1))


def _shorten(change: Tensor, eps: float, norm: str, *, fill: bool = False) -> Tensor:
    """Project a batch of changes on the ball of radius eps; with `fill` scale draws from [-1, 1] to it."""
    if norm == "linf":
        return eps * change if fill else change.clamp(-eps, eps)
    scale = eps / _length(change)
    return change * (scale if fill else scale.clamp(max=1))


def attack_success(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: Iterable[float], chunk: int = 500, **attack
) -> pd.Series:
    """Return the share of the images that `model` gets right and `pgd` turns, in percent, by radius `eps`.

    Images that are wrong already do not count; ``.attrs["right"]`` is how many are right. What a smaller radius
    turns is turned at a larger one, so the share cannot fall; where every image may become any other it
    reaches 100 %, unless the gradients mislead the attack: look there first. `attack`: as in `pgd`.
    """
    radii, right = sorted(eps), 0
    turned = dict.fromkeys(radii, 0)
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        with torch.no_grad(), _evaluated(model):
            ok = model(a).argmax(1) == b
        a, b, right = a[ok], b[ok], right + int(ok.sum())
        for radius in radii:
            if len(b):
                near = pgd(model, a, b, eps=radius, **attack)
                held = (near == a).flatten(1).all(1)
                a, b = a[held], b[held]
            turned[radius] += int(ok.sum()) - len(b)
    success = pd.Series({radius: 100 * n / max(1, right) for radius, n in turned.items()}, name="success %")
    success.attrs = {"right": right}
    return success.rename_axis("eps")
