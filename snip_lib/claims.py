"""Claims: what the paper says, what the rows say, and the verdict between them.

``claims.csv`` holds the criteria, committed before the rows they judge; ``paper.csv`` the published
numbers. In reading order: statistics; how a line of ``claims.csv`` becomes runs (`claimed_runs`) and
tests; one function a kind of claim (`KINDS`); verdicts; and what the front pages show of them. Read `plots` next.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from .inits import INITS
from .models import BATCH_NORMS
from .runs import DEFAULTS, Run, at_profile, read_rows, results_folder, stamp_of, sweep
from .tables import (
    Cell,
    Table,
    both,
    by_seed,
    cell,
    difference,
    digits,
    estimate,
    interval,
    is_cut_off,
    loses_outputs,
    moved,
    paired,
    settled,
    spread,
    table,
)

FOLDER = Path("results")  # beside the chapters, wherever the rows themselves go
RATES = (0.1, 0.03, 0.01)  # the protocol's learning rate, and where to go when it diverges
RATE_SEEDS = 5
SEEDS = range(20)  # as many as the paper's Figure 1 and Table 3 have
COMPLETE = 5  # seeds at the paper's length that stand for a group of runs, however many shorter ones there are
SIGNIFICANCE = 0.05
DENSE_FITS = 0.1  # training loss: until the dense network is there, others cannot be said not to fit
NAMES = {
    **{"lenet300": "LeNet-300-100", "lenet5": "LeNet-5-Caffe", "alexnet_s": "AlexNet-s", "alexnet_b": "AlexNet-b"},
    **{"vgg_c": "VGG-C", "vgg_d": "VGG-D", "vgg_like": "VGG-like", "wrn_16_8": "WRN-16-8", "wrn_16_10": "WRN-16-10"},
    **{"wrn_22_8": "WRN-22-8", "lstm_s": "LSTM-s", "lstm_b": "LSTM-b", "gru_s": "GRU-s", "gru_b": "GRU-b"},
}


def published() -> pd.DataFrame:
    """Return what papers print: source, section, model, dataset, method, sparsity, quantity, value, sd."""
    return _csv("paper.csv")


def criteria() -> pd.DataFrame:
    """Return the claims and their criteria, one a line, indexed by id."""
    return _csv("claims.csv", index_col="id", dtype=str, keep_default_na=False)


def _csv(name: str, **options) -> pd.DataFrame:
    if not (FOLDER / name).exists():
        where = f"There is no {FOLDER / name} in {Path.cwd()}"
        raise FileNotFoundError(f"{where}: a chapter runs in the folder `notebooks` of a clone of the book.")
    return pd.read_csv(FOLDER / name, **options)


# ------------------------------------------------------------------------------------ statistics


def p_above(values: Iterable[float], bound: float) -> float:
    """Return the p-value of the one-sided t test that the mean lies above `bound`."""
    from scipy import stats

    values = pd.Series(list(values), dtype=float).round(10)  # differences that are equal are so to the last bit
    if len(values) < 2:
        return 1.0
    if values.nunique() == 1:  # their standard deviation need not be 0 to the last bit
        return 0.0 if values.iloc[0] > bound else 1.0
    return float(stats.ttest_1samp(values, bound, alternative="greater").pvalue)


def p_within(values: Iterable[float], margin: float) -> float:
    """Return the p-value of the equivalence test that the mean lies within ± `margin` (two one-sided tests)."""
    values = pd.Series(list(values), dtype=float)
    return max(p_above(values, -margin), p_above(-values, -margin))


def holm(p_values: Iterable[float]) -> list[float]:
    """Return the p-values after Holm's step-down correction, in the same order."""
    p_values = list(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def stable_rate(run: Run, profile: str, get: Callable[[list[Run]], pd.DataFrame]) -> float:
    """Return the largest of 0.1, 0.03, 0.01 at which none of 5 dense seeds of `run` diverges.

    The rule for a protocol that diverges (the claims L1, L2, ...). `get` returns the rows of runs:
    `runs.rows_of`, or `collect` with its options, which trains what is missing.
    """
    for rate in RATES:
        dense = sweep(replace(run, sparsity=0.0, lr=rate), seed=range(RATE_SEEDS))
        if not get(at_profile(profile, dense))["diverged"].any():
            return rate
    raise ValueError(f"{run.model} on {run.dataset} diverges at every rate of {RATES}: no rate to train at.")


def at_rate(profile: str, runs: Iterable[Run], find: Callable) -> list[Run]:
    """Return runs, declared at the paper's length and rate, at a profile and the rate that is stable there.

    That is the `stable_rate` of their model and data set. What trains by Adam, at another rate or not at all keeps its
    own.
    """
    rate = functools.cache(lambda model, dataset: _rate(model, dataset, profile, find))

    def stable(run: Run) -> Run:
        own = run.optimizer != "sgd" or run.lr != DEFAULTS["lr"] or not run.steps
        return run if own else replace(run, lr=rate(run.model, run.dataset))

    return at_profile(profile, map(stable, runs))


def best_profile(profile: str, runs: Iterable[Run], find: Callable, *, train_missing: bool = False) -> str:
    """Return the profile that an experiment is shown at: the one asked for, or what "best" means for its runs.

    That is `paper` where the experiment is complete there, else `short`: every group (all fields of a run but its
    seed) has five seeds, or as many as at `short` where these are fewer, and one at least. The runs are declared at
    the paper's length and rate, and each profile has its own (`at_rate`).

    Raises:
        ValueError: the best is to be trained; that depends on the rows there are, so it is not definite.
    """
    if profile != "best":
        return profile
    if train_missing:
        raise ValueError('To train, choose a definite profile, "smoke", "short" or "paper": "best" only shows rows.')
    runs, groups = list(runs), {}
    for run, *pair in zip(runs, *(at_rate(length, runs, find) for length in ("paper", "short")), strict=True):
        groups.setdefault(replace(run, seed=0), {})[run] = pair
    counts = [[len(find(side)) for side in zip(*group.values(), strict=True)] for group in groups.values()]
    return "paper" if all(many >= min(COMPLETE, max(few, 1)) for many, few in counts) else "short"


# -------------------------------------------------------------------------- from a claim to rows


@dataclass(frozen=True)
class Test:
    """One comparison of a claim: what the rows say, and what the criterion says of it."""

    n: int  # seeds, or pairs of seeds
    p: float  # of the statistical test; 0 or 1 where the criterion is about every single seed
    refuted: bool  # the 95 % interval lies wholly outside of what the claim allows, or a single seed does
    said: Cell
    barred: str = ""  # why these rows can say nothing
    where: str = ""  # which comparison this is
    left_out: int = 0  # runs that diverged
    older: int = 0  # runs from before the criterion (`SINCE`)
    excess: float = 0.0  # where every single seed is judged: by how much the worst one passes its bound
    met: bool = False  # p < 0.05 after Holm's correction over the claim


def finder() -> Callable[[Iterable[Run]], pd.DataFrame]:
    """Return a function from runs to the rows there are of them, like `runs.rows_of`, that has read every row."""
    folder = results_folder()
    return _finder(folder, stamp_of(folder))


@functools.lru_cache(maxsize=1)  # a page asks many times
def _finder(folder: Path, stamp: tuple) -> Callable[[Iterable[Run]], pd.DataFrame]:
    known = {Run(**{name: row[name] for name in DEFAULTS if name in row}): row for row in read_rows(folder).values()}
    columns = ["key", "seed", "sparsity", "score_class", "time", "diverged", "test_error", "train_loss", "kept"]
    columns += ["effective_sparsity", "live_weights", "mask_sha", "class_correlations", "scoring_seconds", "seconds"]
    columns += ["replicas", "dead_outputs", "mean_correlation", "input_correlations"]
    return lambda runs: pd.DataFrame([known[r] for r in runs if r in known], columns=columns, dtype=object)


def settings(text: str) -> list[dict]:
    """Read ``name=a|b name=c``, fields of `Run`: every combination of the alternatives."""
    chosen = []
    for part in text.split():
        name, _, values = part.partition("=")
        kind = type(DEFAULTS.get(name))
        read = {"true": True, "false": False}.__getitem__ if kind is bool else kind
        try:
            chosen.append([(name, read(value)) for value in values.split("|")])
        except (TypeError, ValueError, KeyError):
            words = "should be name=value, a field of Run with a value of its kind"
            raise ValueError(f"claims.csv: {part!r} {words}.") from None
    return [dict(choice) for choice in itertools.product(*chosen)]


def own_length(line: pd.Series) -> bool:
    """Return whether a claim states a length of its own, shorter than the protocol's 125,000 steps."""
    return any(fields.get("steps", DEFAULTS["steps"]) < DEFAULTS["steps"] for fields in settings(line["fields"]))


def claimed_runs(line: pd.Series, profile: str, find: Callable) -> Iterator[tuple[str, Run, Run | None]]:
    """Yield every comparison of a line of ``claims.csv``: in words, our run, and the run it is compared with.

    Our run is ``Run(model, dataset, sparsity)`` with the line's `fields`. The other one is ours with `against`
    on top; where that is empty, the dense network of our run; and None for the kinds of `ALONE`. Several
    models are separated by blanks, alternatives by ``|``: each is a comparison of its own, at each sparsity.

    A run that is trained by SGD has the stable rate of its model and data set at this profile (`stable_rate`,
    with the fields of their line of kind `learning_rate`), unless the claim gives `lr`.

    Runs are scaled to the profile, and so are longer ones (train, prune, retrain) and those of CIFAR-10. But
    where `fields` has fewer steps than the protocol's 125,000 (none, or the 60,000 of Section 5.6), the claim
    states its own length (`own_length`): its runs are as declared, and the profile does not limit its verdict.
    """
    varied = {part.split("=")[0] for part in f"{line['fields']} {line['against']}".split() if "|" in part}
    choices = itertools.product(line["model"].split(), settings(line["fields"]), settings(line["against"]))
    for model, ours, theirs in choices:
        base = {"model": model, "dataset": line["dataset"], **ours}
        if "lr" not in ours and ours.get("optimizer") != "adam" and ours.get("steps") != 0:
            base["lr"] = _rate(model, line["dataset"], profile, find)
        for sparsity in map(float, line["sparsities"].split()):
            words = [NAMES[model]] if " " in line["model"] else []
            words += [_told(name, value) for name, value in ours.items() if name in varied and name not in theirs]
            words += [_told(name, ours.get(name), value) for name, value in theirs.items() if name in varied]
            runs = [Run(**base, sparsity=sparsity)]
            if line["kind"] not in ALONE:
                runs.append(Run(**{**base, "sparsity": sparsity if theirs else 0.0, **theirs}))
            if not own_length(line):
                runs = at_profile(profile, runs)
            yield ", ".join([*words, f"at {100 * sparsity:g} %"]), runs[0], (*runs, None)[1]


def _told(name: str, *values) -> str:
    """Return a field of a run and its values in words: "init RN against VS-X", "batch norm eps 0.001"."""
    if name == "batch_norm":  # what its two settings differ in where nothing is trained
        name, values = "batch norm eps", [BATCH_NORMS[v]["eps"] for v in values]
    values = [str(v).upper().replace("_", "-") if v in INITS else str(v).replace("_", " ") for v in values]
    return f"{name.replace('_', ' ')} {' against '.join(values)}"


def _rate(model: str, dataset: str, profile: str, find: Callable) -> float:
    lines = criteria()
    lines = lines[(lines["kind"] == "learning_rate") & (lines["model"] == model) & (lines["dataset"] == dataset)]
    (fields,) = settings(lines.iloc[0]["fields"] if len(lines) else "")
    return stable_rate(Run(model, dataset, **fields), profile, find)


# Rows that were there when a criterion about a single group of runs was written do not judge it.
SINCE = {"C13": "2026-11-21T09:55:24Z", "C44": "2026-11-21T15:17:00Z"}
SINCE |= dict.fromkeys(("S8", "S9"), "2026-11-27T09:03:12Z") | dict.fromkeys(("C53", "C54"), "2026-11-27T09:18:26Z")
SINCE |= {"C55": "2026-11-27T13:23:19Z", "C60": "2026-11-27T20:09:30Z", "S12": "2026-11-28T04:57:24Z"}


def tests_of(line: pd.Series, profile: str, find: Callable) -> list[Test]:
    """Return the tests of a claim by the rows there are at a profile: one a comparison, or one a model (`POOLED`).

    Where networks are compared with their dense ones or with a number, runs that diverged are left out and
    counted. Where two ways to prune are compared (`against`), every run counts with the error that it ended
    with: leaving failures out would favour the way that fails.
    """
    judge_kind, keep_all = KINDS[line["kind"]][0], line["against"] and line["kind"] != "differs"
    pools: dict[str, list] = {}
    for where, run, other in claimed_runs(line, profile, find):
        pair = [find(sweep(r, seed=SEEDS)) if r else None for r in (run, other)]
        pools.setdefault(NAMES[run.model] if line["kind"] in POOLED else where, []).append(pair)
    tests = []
    for where, pairs in pools.items():
        found = [None if rows[0] is None else pd.concat(rows) for rows in zip(*pairs, strict=True)]
        older = found[0]["time"] < SINCE.get(line.name, "")
        found[0] = found[0][~older]
        used = [rows if rows is None or keep_all else settled(rows) for rows in found]
        left_out = sum(len(a) - len(b) for a, b in zip(found, used, strict=True) if a is not None)
        tests.append(replace(judge_kind(*used, line), where=where, left_out=left_out, older=int(older.sum())))
    corrected = holm(test.p for test in tests)
    return [replace(test, met=bool(p < SIGNIFICANCE)) for test, p in zip(tests, corrected, strict=True)]


# ------------------------------------------------------------------------------ kinds of claims


def value(ours: pd.DataFrame, theirs: None, line: pd.Series) -> Test:
    """The mean test error lies within the margin around the paper's: two one-sided tests."""
    paper, margin, errors = float(line["paper"]), float(line["margin"]), ours["test_error"].astype(float)
    _, low, high = interval(errors)
    said = estimate(errors, "mean and interval test_error", ours, sign="")
    return Test(len(errors), p_within(errors - paper, margin), low > paper + margin or high < paper - margin, said)


def no_loss(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The mean difference of the test error, paired by seed, lies within ± the margin: two one-sided tests."""
    gaps, margin = paired(ours, theirs), float(line["margin"])
    _, low, high = interval(gaps)
    return Test(len(gaps), p_within(gaps, margin), low > margin or high < -margin, difference(ours, theirs))


def no_worse(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The mean difference of the test error, paired by seed, lies below the margin: one-sided."""
    gaps, margin = paired(ours, theirs), float(line["margin"])
    return Test(len(gaps), p_above(-gaps, -margin), interval(gaps)[1] > margin, difference(ours, theirs))


def better(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The mean difference of the test error, paired by seed, lies below minus the margin: one-sided."""
    gaps, margin = paired(ours, theirs), float(line["margin"])
    return Test(len(gaps), p_above(-gaps, margin), interval(gaps)[1] > -margin, difference(ours, theirs))


def worse(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The mean difference of the test error, paired by seed, lies above the margin: one-sided."""
    gaps, margin = paired(ours, theirs), float(line["margin"])
    return Test(len(gaps), p_above(gaps, margin), interval(gaps)[2] < margin, difference(ours, theirs))


def differs(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The mean difference of the last training loss, paired by seed, lies above + or below - the margin.

    Two-sided: met if the 95 % interval lies wholly on one side, refuted if it lies wholly between.
    """
    gaps, margin = paired(ours, theirs, "train_loss"), float(line["margin"])
    p = min(1.0, 2 * min(p_above(gaps, margin), p_above(-gaps, margin)))
    _, low, high = interval(gaps)
    said = difference(ours, theirs, "train_loss")
    return Test(len(gaps), p, -margin < low and high < margin, said)


def _each(excess: pd.Series, said: Cell, **more) -> Test:
    """Return the test that `excess`, by how much each seed passes its bound, is below 0: one that is not refutes it."""
    allowed = excess < 0
    p = 0.0 if len(allowed) and allowed.all() else 1.0
    return Test(len(allowed), p, not allowed.all(), said, excess=excess.max(), **more)


def cost(ours: pd.DataFrame, theirs: None, line: pd.Series) -> Test:
    """In every run, scoring takes less than this share of all its seconds.

    Runs that were trained together share the seconds of their steps and are scored one after another: of such
    rows nothing can be said.
    """
    shares = ours["scoring_seconds"] / ours["seconds"]
    said = cell(f"{digits(100 * shares.max(), 3)} %", "largest percent scoring_seconds of seconds", ours)
    barred = "trained together, so that the seconds of a run are a share" if (ours["replicas"] > 1).any() else ""
    return _each(shares - float(line["margin"]), said, barred=barred)


def same_mask(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """For every seed the two masks are the same, bit by bit."""
    pairs = by_seed(ours, theirs)
    equal = pairs["mask_sha_x"] == pairs["mask_sha_y"]
    said = cell(f"{equal.sum()} of {len(equal)}", "equal mask_sha", tuple(pairs["key_x"]), tuple(pairs["key_y"]))
    return _each(-equal.astype(float), said)


def other_mask(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """For every seed, more than this share of the kept connections is kept in another layer.

    `tables.moved` says how the share is counted.
    """
    shares = moved(ours, theirs)
    said = cell(f"{digits(100 * shares.min())} %", "least percent moved kept", ours, theirs)
    return _each(float(line["margin"]) - shares, said)


def same_layers(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """For every seed, less than this share of the kept connections is kept in another layer.

    `tables.moved` says how the share is counted.
    """
    shares = moved(ours, theirs)
    said = cell(f"{digits(100 * shares.max())} %", "largest percent moved kept", ours, theirs)
    return _each(shares - float(line["margin"]), said)


def follows_class(ours: pd.DataFrame, theirs: None, line: pd.Series) -> Test:
    """Over seeds, the kept connections of a pixel go with the mean image of the class that was scored.

    For each class: the correlation over pixels of the connections kept with its own mean image, minus the mean
    of those with the other classes' images. A seed has the mean of that over its classes; a one-sided t test
    that the mean over seeds is above the margin.
    """
    shown, found, own = _likeness(ours, line)
    contrasts = (own - (found.sum(axis=1) - own) / (found.shape[1] - 1)).groupby(shown["seed"]).mean()
    margin = float(line["margin"])
    best = int(_own_is_best(found, own).sum())
    said = f"{estimate(contrasts, 'contrast of class_correlations')} (own class best in {best} of {len(own)} masks)"
    said = cell(said, "contrast of class_correlations, own best class_correlations", shown)
    return Test(len(contrasts), p_above(contrasts, margin), interval(contrasts)[2] < margin, said)


def names_class(ours: pd.DataFrame, theirs: None, line: pd.Series, by: str = "class_correlations") -> Test:
    """Over seeds, the kept connections of a pixel go best with the mean image of the class that was scored.

    A seed has the share of its classes of which that is true, by the correlations of `follows_class`; a one-sided t
    test that the mean share over seeds is above the margin.
    """
    shown, found, own = _likeness(ours, line, by)
    best = _own_is_best(found, own)
    shares, margin = best.groupby(shown["seed"]).mean().astype(float), float(line["margin"])
    said = cell(f"{int(best.sum())} of {len(own)} masks", f"own best {by}", shown)
    return Test(len(shares), p_above(shares, margin), interval(shares)[2] < margin, said)


def names_input(ours: pd.DataFrame, theirs: None, line: pd.Series) -> Test:
    """As `names_class`, by the size of the mean input: how far a mean image is from the grey that is fed as 0."""
    return names_class(ours, theirs, line, "input_correlations")


def nears_mean(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """Our kept connections go with the mean of all images more than theirs do, by more than the margin: one-sided.

    Compared are the correlations over pixels (`mean_correlation` of a row), paired by seed.
    """
    gaps, margin = paired(ours, theirs, "mean_correlation"), float(line["margin"])
    said = difference(ours, theirs, "mean_correlation")
    return Test(len(gaps), p_above(gaps, margin), interval(gaps)[2] < margin, said)


def _likeness(
    rows: pd.DataFrame, line: pd.Series, by: str = "class_correlations"
) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series]:
    """Return the rows of seeds with all classes, their correlations with each class, and with the own one."""
    shown = rows.dropna(subset=[by])
    shown = shown[shown.groupby("seed")["seed"].transform("size") == len(settings(line["fields"]))]
    found = pd.DataFrame(shown[by].tolist(), index=shown.index, dtype=float)
    found = found.fillna(0.0)  # undefined where each pixel keeps as many connections: no likeness
    own = [row[c] for row, c in zip(found.to_numpy(), shown["score_class"], strict=True)]
    return shown, found, pd.Series(own, shown.index, dtype=float)


def _own_is_best(found: pd.DataFrame, own: pd.Series) -> pd.Series:
    return found.ge(own, axis=0).sum(axis=1) == 1  # none is as high but itself


def fits(ours: pd.DataFrame, theirs: None, line: pd.Series) -> Test:
    """The training loss at the last step is below this for every seed."""
    losses = ours["train_loss"].astype(float)
    said = cell(digits(losses.max(), 3), "largest train_loss", ours)
    return _each(losses - float(line["margin"]), said)


def does_not_fit(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The training loss at the last step is above this for every seed, where each dense network ends below 0.1."""
    ours = ours[ours["seed"].isin(theirs["seed"])] if len(theirs) else ours
    losses, dense = ours["train_loss"].astype(float), theirs["train_loss"].astype(float)
    barred = "" if (dense < DENSE_FITS).all() else "too short, the dense network does not fit either"
    barred = barred if len(dense) else "the dense network is not run yet"
    said = cell(digits(losses.min(), 3), "smallest train_loss", ours)
    return _each(float(line["margin"]) - losses, said, barred=barred)


def disconnects(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """The other way disconnects a network in some seed, and ours does so less often: a sign test over the seeds.

    *Disconnected*: nothing that is kept lies on a path from input to output, or a layer keeps no weight. The masks of
    a seed at several sparsities depend on each other, so a seed counts once: for the way with more networks whole.
    """
    return _less_often(ours, theirs, line, is_cut_off, "disconnected")


def cuts_outputs(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series) -> Test:
    """As `disconnects`, of networks with an output to which no path leads."""
    tell = (rows[rows["dead_outputs"].notna()] for rows in (ours, theirs))  # older rows do not
    return _less_often(*tell, line, loses_outputs, "losing outputs")


def _less_often(ours: pd.DataFrame, theirs: pd.DataFrame, line: pd.Series, told: Callable, how: str) -> Test:
    from scipy import stats

    marked = [rows.assign(cut=told(rows).astype(int)) for rows in (ours, theirs)]
    groups = [[rows[rows["sparsity"] == float(s)] for s in line["sparsities"].split()] for rows in marked]
    cut = [[int(group["cut"].sum()) for group in by] for by in groups]
    pairs = marked[0].merge(marked[1], on=["seed", "sparsity"])
    fewer = (pairs["cut_y"] - pairs["cut_x"]).groupby(pairs["seed"]).sum()  # by how many ours cuts fewer, by seed
    decided = [int((fewer > 0).sum()), int((fewer < 0).sum())]  # for us, and for the other way
    less, more = (stats.binomtest(k, max(1, sum(decided)), alternative="greater").pvalue for k in decided)
    never = min(map(len, groups[1])) >= int(line["min_n"]) and sum(cut[1]) == 0
    words = []
    for n, by in zip(cut, groups, strict=True):
        counts = [f"{k} of {len(group)}" for k, group in zip(n, by, strict=True) if len(group)]
        words.append(", ".join(counts) or "–")
    said = cell(" against ".join(words), f"{how} by sparsity", ours, theirs)
    return Test(min(len(group) for by in groups for group in by), less, never or more < SIGNIFICANCE, said)


KINDS = {  # of claims: the test, what it is about, and the criterion in words
    "value": (value, "test error {said} %", "within {margin} of {paper}"),
    "no_loss": (no_loss, "difference {said} points", "within ±{margin}"),
    "no_worse": (no_worse, "difference {said} points", "below +{margin}"),
    "better": (better, "difference {said} points", "below 0"),
    "worse": (worse, "difference {said} points", "above +{margin}"),
    "differs": (differs, "difference of the training loss {said}", "outside of ±{margin}"),
    "cost": (cost, "scoring takes at most {said} of a run", "below {percent:g} % in every run"),
    "same_mask": (same_mask, "the same mask for {said} seeds", "the same for every seed"),
    "other_mask": (other_mask, "at least {said} of what is kept changes layer", "above {percent:g} % for every seed"),
    "same_layers": (same_layers, "at most {said} of what is kept changes layer", "below {percent:g} % for every seed"),
    "follows_class": (follows_class, "own class minus others, mean over classes, {said}", "above {margin}"),
    "names_class": (names_class, "own class fits best in {said}", "above {percent:g} % of the classes"),
    "names_input": (names_input, "own class fits best in {said}", "above {percent:g} % of the classes"),
    "nears_mean": (nears_mean, "gain of the correlation {said}", "above +{margin}"),
    "fits": (fits, "training loss at most {said}", "below {margin} for every seed"),
    "does_not_fit": (does_not_fit, "training loss at least {said}", "above {margin} for every seed"),
    "disconnects": (disconnects, "disconnected {said}", "less often, {places} % together, by seeds"),
    "cuts_outputs": (cuts_outputs, "an output cut off in {said}", "less often, {places} % together, by seeds"),
}
ALONE = ("value", "cost", "follows_class", "names_class", "names_input", "fits")  # compare with nothing
POOLED = ("follows_class", "names_class", "names_input", "disconnects", "cuts_outputs")  # one test a model
OF_ERRORS = ("value", "no_loss", "no_worse", "better", "worse")
OF_SINGLE_SEEDS = ("cost", "same_mask", "other_mask", "same_layers", "fits", "does_not_fit")  # one suffices


# -------------------------------------------------------------------------------------- verdicts

WORDS = ("reproduced", "in part", "not reproduced")
REASONS = ("undecided", "too few seeds", "not run yet", "replaced", "other")  # for none of `WORDS`
DENSE_APART = "a dense network not shown to agree with the paper's"


@dataclass(frozen=True)
class Verdict:
    """A claim judged: `verdict` is *reproduced*, *in part*, *not reproduced*, *undecided* or *not tested (why)*."""

    claim: str
    verdict: str
    statement: str
    evidence: str
    met: bool  # the data meet the criterion, whatever else holds the verdict back
    profile: str  # that its rows are of; "own": the claim states its own length
    n: int  # seeds of the test that has fewest
    tests: tuple[Test, ...] = field(default=(), repr=False)
    limits: tuple[str, ...] = field(default=(), repr=False)  # why it cannot be better than in part
    reason: str = field(default="", repr=False)  # one of `REASONS` where it is undecided or not tested

    def _repr_markdown_(self) -> str:
        return f"**{self.claim} {self.verdict}:** {self.statement} *Evidence:* {self.evidence}."


def judge(line: pd.Series, profile: str, find: Callable) -> Verdict:
    """Judge one line of ``claims.csv`` by the rows that `find` (see `finder`) gives at one profile.

    A test is met if p < 0.05 after Holm's correction over the claim, refuted if the 95 % interval lies wholly
    outside of what the claim allows. All met: reproduced; some: in part; none, and one refuted: not
    reproduced; else *undecided*. At most *in part*: fewer seeds than `min_n`, diverged
    runs left out, another profile than `paper`, and a dense network not shown to agree with the paper's. A claim
    that is decided in ``claims.csv`` is not judged, and has no evidence.
    """

    def verdict(words: str, tests=(), evidence="no evidence", met=False, limits=(), reason="") -> Verdict:
        fewest = min((test.n for test in tests), default=0)
        length = "own" if own_length(line) else profile
        told = (line.name, words, line["statement"], evidence, met, length, fewest)
        return Verdict(*told, tuple(tests), tuple(limits), reason)

    if profile == "smoke":
        return verdict("not tested (the smoke profile)", reason="other")
    if line["decided"]:  # nothing more is run for it
        return verdict(f"not tested ({line['decided']})", reason="replaced")
    tests = tests_of(line, profile, find)
    too_few = [test for test in tests if test.n < (1 if line["kind"] in OF_SINGLE_SEEDS else 2)]
    barred = [test.barred for test in tests if test.barred]
    older = "; rows older than the criterion do not count" if any(test.older for test in tests) else ""
    if not any(test.n or test.left_out for test in tests):
        return verdict(f"not tested (not run yet{older})", tests, reason="not run yet")
    met, evidence = sum(test.met for test in tests), "no evidence"
    if weakest := _weakest(tests):
        evidence = f"{KINDS[line['kind']][1].format(said=weakest.said)}, criterion: {_words(line)}"
        evidence += f"; {weakest.where}, n = {weakest.n}"
        evidence += ", the paper profile" if profile == "paper" and not own_length(line) else ""
        if len(tests) > 1:
            evidence = f"met in {met} of {len(tests)} tests, the weakest: {evidence}"
    if too_few:
        share = f" in {len(too_few)} of {len(tests)} tests" if len(tests) > 1 else ""
        return verdict(f"not tested (too few seeds{share}{older})", tests, evidence, reason="too few seeds")
    if barred:
        return verdict(f"not tested ({barred[0]})", tests, evidence, reason="other")

    fewest, left_out = min(test.n for test in tests), sum(test.left_out for test in tests)
    limits = {
        f"only {counted(fewest, 'seed')}": fewest < int(line["min_n"]),
        counted(left_out, "diverged run"): left_out > 0,
        f"the {profile} profile": profile != "paper" and not own_length(line),
        DENSE_APART: not _baseline_agrees(line, profile, find),
    }
    limits, reason = [why for why, applies in limits.items() if applies], ""
    if met == len(tests):
        words = "in part" if limits else "reproduced"
    elif met:
        words = "in part"
    elif any(test.refuted for test in tests):
        words = "not reproduced"
    else:
        words, reason = "undecided (neither shown nor refuted)", "undecided"
    if limits:
        evidence += f"; limited by {', '.join(limits)}"
    return verdict(words, tests, evidence, met == len(tests), limits, reason)


def counted(n: int, thing: str) -> str:
    """Return "1 seed", "2 seeds"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def _words(line: pd.Series) -> str:
    places = ", ".join(f"{100 * float(s):g}" for s in line["sparsities"].split())
    return KINDS[line["kind"]][2].format(**line, percent=100 * float(line["margin"] or 0), places=places)


def _weakest(tests: Iterable[Test]) -> Test | None:
    """Return the test that is met least clearly, of those that have rows."""
    return max((t for t in tests if t.n), key=lambda test: (test.p, test.refuted, test.excess), default=None)


def _baseline_agrees(line: pd.Series, profile: str, find: Callable) -> bool:
    """Return whether the dense network of a claim's runs has the paper's error, where the paper prints one.

    It prints one for the claims of a dense network's *value*, and for those of *no_loss* with a number.
    """
    lines = criteria()
    lines = lines[(lines["paper"] != "") & ((lines["kind"] == "no_loss") | (lines["sparsities"] == "0"))]
    lines = lines[lines["model"].isin(line["model"].split()) & (lines["dataset"] == line["dataset"])]
    if line["kind"] not in OF_ERRORS or line["sparsities"] == "0":
        return True
    starts = {replace(run, sparsity=0.0) for _, run, _ in claimed_runs(line, profile, find)}
    for _, other in lines.iterrows():
        dense = next(replace(run, sparsity=0.0) for _, run, _ in claimed_runs(other, profile, find))
        rows = settled(find(sweep(dense, seed=SEEDS)))
        if dense in starts and value(rows, None, other).p >= SIGNIFICANCE:
            return False
    return True


def judge_at_best(line: pd.Series, profile: str, find: Callable) -> Verdict:
    """Judge one claim at a profile, or at the `best` of its own.

    That is `paper` where each of its tests has the seeds that it needs there, else the profile with more seeds.
    """
    if profile != "best":
        return judge(line, profile, find)
    paper, short = (judge(line, profile, find) for profile in ("paper", "short"))
    return paper if paper.n >= min(int(line["min_n"]), max(short.n, 1)) else short


def judge_chapter(chapter: str, *, profile: str) -> list[Verdict]:
    """Judge every claim of a chapter, in the order of ``claims.csv``, at a profile or each at the `best` of its own."""
    lines, find = criteria(), finder()
    lines = lines[(lines["chapter"] == chapter) & (lines["kind"] != "learning_rate")]
    return [judge_at_best(line, profile, find) for _, line in lines.iterrows()]


def verdicts(profile: str = "best") -> list[Verdict]:
    """Judge every claim there is, at one profile, or each at the `best` of its own (see `judge_at_best`)."""
    lines, find = criteria(), finder()
    return [judge_at_best(line, profile, find) for _, line in lines[lines["kind"] != "learning_rate"].iterrows()]


# --------------------------------------------------------------- what the front pages show of them


class Linked(Table):
    """A table shown as Markdown, so that its links lead to chapters wherever it is read."""

    _repr_html_ = None

    def _repr_markdown_(self) -> str:
        lines = [self.columns, ["---"] * self.shape[1], *self.to_numpy()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chapter_link(text: str, chapter: str, folder: str = "") -> str:
    """Return a Markdown link to the verdicts of a chapter, or the text alone while there is no such chapter."""
    heading = _heading(chapter, "## Verdict")
    if not heading:
        return text
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")  # as GitHub and Sphinx name headings
    return f"[{text}]({folder}{chapter}.ipynb#{anchor})"


def _heading(chapter: str, begins: str) -> str:
    """Return the first heading of a chapter that begins so, without its marks; "" while there is none."""
    page = FOLDER.parent / f"{chapter}.ipynb"
    found = re.search(rf'"({begins}[^"\\]*)', page.read_text(encoding="utf-8")) if page.exists() else None
    return found[1].lstrip("# ") if found else ""


def claim_table(judged: Iterable[Verdict], chapter: str) -> Linked:
    """Return one line a claim of a chapter: the paper's number, ours in the weakest test, criterion, verdict.

    After the verdict stands the profile of the rows, and what else keeps it from being better than in part.
    """
    lines, found = criteria(), []
    for v in judged:
        line, weakest = lines.loc[v.claim], _weakest(v.tests)
        if line["chapter"] != chapter:
            continue
        shown = {"claim": f"{chapter_link(v.claim, chapter)} ({line['section']}): {v.statement}"}
        shown |= {"paper": paper_errors(line), "ours": "–", "criterion": _words(line)}
        verdict = f"**{v.verdict}**"
        if weakest:
            ours = f"{KINDS[line['kind']][1].format(said=weakest.said)}, n = {weakest.n}"
            shown["ours"] = cell(ours, f"{weakest.said.how}, fewest seeds", *weakest.said.keys)
            shown["criterion"] += f", {weakest.where}"
            shown["criterion"] += f" (the weakest of {len(v.tests)} tests)" if len(v.tests) > 1 else ""
            profile = "its own length" if v.profile == "own" else f"the {v.profile} profile"
            met = [f"met in {sum(t.met for t in v.tests)} of {len(v.tests)} tests"] if len(v.tests) > 1 else []
            verdict += f" ({', '.join(dict.fromkeys([*met, profile, *v.limits]))})"
        found.append(shown | {"verdict": verdict})
    return Linked(found, dtype=object)


def paper_errors(line: pd.Series) -> Cell:
    """Return the test errors that the paper prints for the runs of a claim, "against" those that it compares with.

    By model, in percent; a number of another sparsity with that in brackets; a dash where the paper prints none. The
    cell knows the lines of ``paper.csv`` by their numbers.
    """
    texts, used = [], []
    runs = (
        claimed_runs(line, "paper", lambda runs: pd.DataFrame(columns=["diverged"]))
        if line["kind"] in OF_ERRORS
        else []
    )
    for _, pairs in itertools.groupby(runs, key=lambda found: found[1].model):
        pairs = [[_published(run) for run in pair if run] for _, *pair in pairs]
        pairs = [pair for pair in pairs if all(pair)]
        sides = [list(dict.fromkeys(side)) for side in zip(*pairs, strict=True)]  # ours, theirs: each line once
        texts += [" against ".join(", ".join(text for _, text in side) for side in sides)] if sides else []
        used += [str(number) for side in sides for number, _ in side]
    return cell("; ".join(texts) or "–", " ".join(["paper", *used]), ())


QUOTED = {"magnitude": "lwc", "obd_gauss_newton": "obd"}  # the names in Table 1 of what prunes a trained network


def _published(run: Run) -> tuple[int, str] | None:
    """Return the number of the line of ``paper.csv`` with the paper's test error of a run, and that error as text."""
    free = ("model", "dataset", "sparsity", "lr", "batch_size", "augment", "decay_every", "steps", "precision")
    plain = all(getattr(run, name) == default for name, default in DEFAULTS.items() if name not in free)
    lines = published().query("source.str.startswith('Table') and quantity == 'test_error'")
    lines = lines[(lines["model"] == run.model) & (lines["dataset"] == run.dataset)]
    if run.optimizer == "adam" and run.init_sd == DEFAULTS["init_sd"]:  # Table 3
        lines = lines[(lines["method"] == f"snip {run.init}") & (lines["sparsity"] == run.sparsity)]
    elif run.delay and run.method in QUOTED:  # trained first; the paper quotes it at a sparsity of its own
        lines = lines[lines["method"] == QUOTED[run.method]]
    else:
        method = "snip" if run.sparsity else "dense"
        lines = lines[(lines["method"] == method) & (lines["sparsity"] == run.sparsity) & plain]
    for number, value, sparsity in lines[["value", "sparsity"]].itertuples():
        places = 1 if lines.loc[number, "source"] == "Table 1" else 2  # as they are printed there
        return number, f"{value:.{places}f}" + (f" ({100 * sparsity:g} %)" if sparsity != run.sparsity else "")
    return None


def test_table(verdict: Verdict) -> Table:
    """Return one line a test of a claim: what was compared, seeds, what the rows say, and whether it is met."""
    kind = criteria().loc[verdict.claim, "kind"]
    lines = []
    for test in verdict.tests:
        said = cell(KINDS[kind][1].format(said=test.said), test.said.how, *test.said.keys) if test.n else "not run yet"
        n = cell(str(test.n), "fewest seeds", *test.said.keys)
        judged = "met" if test.met else "refuted" if test.refuted else "open"
        lines.append({"test": test.where, "n": n, "ours": said, "criterion": judged if test.n else ""})
    return table(lines, "test") if lines else Table(columns=["n", "ours", "criterion"]).rename_axis("test")


def learning_rates() -> Table:
    """Return the rate that `stable_rate` gives for each claim of a rate, or how many of its seeds have rows so far."""
    lines, find, found = criteria(), finder(), []
    for claim, line in lines[lines["kind"] == "learning_rate"].iterrows():
        run = Run(line["model"], line["dataset"], **settings(line["fields"])[0])
        shown = {"claim": f"{claim}: {NAMES[run.model]} on {run.dataset}"}
        for profile in ("short", "paper"):
            rate = stable_rate(run, profile, find)
            tried = [r for r in RATES if r >= rate][::-1]
            rows = [find(at_profile(profile, sweep(replace(run, lr=r), seed=range(RATE_SEEDS)))) for r in tried]
            known = cell(f"{counted(len(rows[0]), 'seed')} so far", "count", rows[0]) if len(rows[0]) else "not run yet"
            shown[profile] = cell(f"{rate:g}", "stable rate", *rows) if len(rows[0]) == RATE_SEEDS else known
        found.append(shown)
    return table(found, "claim")


def answer_markdown(judged: list[Verdict]) -> str:
    """Return what SNIP is good for, as far as the verdicts say: a sentence, what is behind it, and four questions."""
    done = [(criteria().loc[v.claim], v) for v in judged if not v.reason]
    found = [*_costs_of_pruning(done), _printed_errors(done), _lengths(done), "", "By question:", ""]
    return "\n".join([*found, *_questions(judged), _price(done), _beside_other_masks()])


def _costs_of_pruning(done: list[tuple[pd.Series, Verdict]]) -> Iterator[str]:
    """Yield a sentence on how much can go at which cost, and a line each of what costs nothing, is open, costs more."""
    free, between, costly = {}, {}, {}  # profile -> what was found there
    can, cannot, margins = {}, {}, []  # network -> the most that is free, the least that is not
    margin = criteria().query("kind == 'no_loss' and model in ['lenet300', 'lenet5']")["margin"].astype(float).max()

    def of_short(profile: str) -> str:  # what a short training costs, a longer one may not
        return LENGTHS["short"] if profile == "short" else ""

    for line, v in done:
        met, name = list(itertools.takewhile(lambda test: test.met, v.tests)), NAMES.get(line["model"])
        if line["kind"] != "no_loss" or line["against"] or not met:
            continue
        share = met[-1].where.removeprefix("at ")
        can[name] = f"{share} from {name}{of_short(v.profile)}"
        end = ", the highest sparsity that this claim asks about" if len(met) == len(v.tests) else ""
        up_to = "at up to" if len(met) > 1 else "at"
        free.setdefault(v.profile, []).append(f"{name} {up_to} {share}{end}")
        margins.append(line["margin"])
        for test in v.tests[len(met) :]:
            if test.refuted and test.said.startswith("+"):
                costly.setdefault(v.profile, []).append(f"{name} {test.where}")
                cannot.setdefault(name, f"{test.where.removeprefix('at ')} from {name}{of_short(v.profile)}")
            elif not test.met and not test.refuted:
                between.setdefault(v.profile, []).append(f"{name} {test.where}, where it costs {test.said} points")
    for at, length, rows in _ways({"SNIP": {}, "dense": {"sparsity": 0.0}}, "best"):
        (name, share), (low, high) = at.split(", "), _cost_of(rows)
        if low > margin:
            costly.setdefault(length, []).append(f"{name} at {share}")
            cannot.setdefault(name, f"{share} from {name}{of_short(length)}")
        elif high > margin:
            said = difference(rows["SNIP"], rows["dense"])
            between.setdefault(length, []).append(f"{name} at {share}, where it costs {said} points")
    first = "No network is shown yet to lose nothing where SNIP prunes it"
    if can:
        taken = " and ".join(can.values())
        first = f"Of a network's connections SNIP can take, before any training, {taken} at no cost that counts"
    more = " or ".join(cannot.values())
    more = f"; taking {more} is shown to cost more" if more else ""
    yield f"**In short:** {first}{more}."
    yield ""
    if free:
        within = f"at most the margin of {' or '.join(dict.fromkeys(margins))} points of error"
        yield f"- **No cost that counts** ({within}): {_by_length(free)}."
    if between:
        yield f"- **Undecided** (not shown to lie within the margin, nor beyond it): {_by_length(between)}."
    if costly:
        beyond = "the whole 95 % interval lies beyond the margin, whether a claim asks for it or not"
        yield f"- **Shown to cost more** ({beyond}): {_by_length(costly)}."


def _printed_errors(done: list[tuple[pd.Series, Verdict]]) -> str:
    """Return in a line how many of Table 1's errors of LeNets pruned by SNIP are reached, and the farthest one."""
    lines = criteria()
    printed = lines[(lines["kind"] == "value") & (lines["sparsities"] != "0")]
    far = [(line, v) for line, v in done if line.name in printed.index]
    if not far:
        return "- **The paper's own errors:** Of those of Table 1 for the LeNets pruned by SNIP, none is tested yet."
    line, v = max(far, key=lambda pair: abs(float(pair[1].tests[0].said.split()[0]) - float(pair[0]["paper"])))
    met, test = sum(v.met for _, v in far), v.tests[0]
    reached = {0: "none is", 1: "one is"}.get(met, f"{met} are")
    reached += " reached within the margin"
    left = len(printed) - len(far)
    return (
        f"- **The paper's own errors:** Of the {len(printed)} errors of Table 1 for the LeNets pruned by SNIP, "
        f"{reached}{f', {left} not decided' if left else ''}; the farthest is {NAMES[line['model']]} {test.where}"
        f"{_trained(v).replace(';', ',')}, with {test.said.split()[0]} % where the paper has {line['paper']} %."
    )


def _lengths(done: list[tuple[pd.Series, Verdict]]) -> str:
    """Return in a line how many verdicts rest on shorter training, and on what those rest that are reproduced."""
    of_short = sum(v.profile == "short" for _, v in done)
    decided = "that are *reproduced*, *in part* or *not reproduced*"
    text = f"The paper states none; *full* is {DEFAULTS['steps']:,} steps here for MNIST. "
    text += f"Of the {len(done)} claims {decided}, {of_short} rest on a tenth of it"
    whole = {"masks": [], "own": [], "paper": []}  # what a claim rests on -> the claims that are reproduced
    for line, v in done:
        if v.verdict == "reproduced":
            scored = all(fields.get("steps") == 0 for fields in settings(line["fields"]))
            whole["masks" if scored else v.profile].append(line.name)
    masks, own, paper = (len(named) or "none" for named in whole.values())
    if n := sum(map(len, whole.values())):
        text += f"; *reproduced* are {n}: {masks} about masks alone, without any training, "
        text += f"{own} after a length of training of their own, {paper} after the full one"
        text += f" ({', '.join(whole['paper'])})" if whole["paper"] else ""
    return f"- **Length of training:** {text}."


PRUNED_BY = {"method=magnitude": "by magnitude", "method=obd_gauss_newton": "by the Hessian"}


def _questions(judged: list[Verdict]) -> list[str]:
    """Return questions about kinds of claims, a line each, with the answer for each network."""
    lines = criteria()
    asked = [  # "in training": of masks in the course of it
        ("03_comparisons", "no_worse", "Is one shot no worse than training first and pruning then?"),
        ("04_modern_architectures", "no_loss", "Do modern networks stay within {margin} points of their dense ones?"),
        ("09_snip_it", "better", "Does pruning in small steps, still before training, do better than one shot?"),
        ("09_snip_it", "better in training", "Do small steps in the course of training do better than before it?"),
    ]
    order = ("yes", "in", "no", "undecided", "one", "too", "not", "other")  # first words of `_standing`
    questions = []
    for chapter, kind, question in asked:
        kind, _, meanwhile = kind.partition(" ")
        found = lines[(lines["chapter"] == chapter) & (lines["kind"] == kind)]
        delay = found["fields"].str.extract(r"\bdelay=(\d+)", expand=False)  # the step before the first mask
        found = found[delay.notna() == bool(meanwhile)]
        by_standing: dict[tuple[str, str], list[str]] = {}
        of = [v for v in judged if v.claim in found.index and v.reason != "replaced"]
        for v in sorted(of, key=lambda v: order.index(_standing(v).split()[0])):
            about = ["whole units"] if "structured=true" in found.loc[v.claim, "fields"] else []
            about += [f"from {100 * int(delay[v.claim]) / DEFAULTS['steps']:g} % of the run on"] if meanwhile else []
            about += [PRUNED_BY[part] for part in found.loc[v.claim, "against"].split() if part in PRUNED_BY]
            most = max((test.n for test in v.tests), default=0)
            about += [f"n = {v.n}{f' to {most}' if most > v.n else ''}"] if v.n > 1 else []
            who = NAMES[found.loc[v.claim, "model"]] + (f" ({', '.join(about)})" if about else "")
            by_standing.setdefault((_standing(v), _trained(v)), []).append(who)
        lengths = {trained for how, trained in by_standing if how != "not run yet"}
        parts = [
            f"{how} for {', '.join(who)}{trained * (len(lengths) > 1)}" for (how, trained), who in by_standing.items()
        ]
        answer = ("; ".join(parts) or "not asked yet") + (lengths.pop() if len(lengths) == 1 else "")
        asking = question.format(margin=" or ".join(dict.fromkeys(found["margin"])))
        questions.append(f"- *{asking}* {answer[0].upper()}{answer[1:]}.")
    return questions


def _cost_of(rows: dict[str, pd.DataFrame]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of SNIP's error minus the dense network's; NaN below two pairs."""
    return interval(paired(rows["SNIP"], rows["dense"]))[1:]


LENGTHS = {"short": " (a tenth of the training)", "paper": " (the full training)"}


def _by_length(found: dict[str, list[str]]) -> str:
    """Return what was found at each profile, with the length in words, each once: "A, B (a tenth of the training)"."""
    return "; ".join(", ".join(dict.fromkeys(names)) + LENGTHS.get(profile, "") for profile, names in found.items())


def _trained(v: Verdict) -> str:
    """Return how long the runs of a verdict trained, where that is not the full length."""
    return "; at a tenth of the training" if v.profile == "short" and v.n else ""


def _price(done: list[tuple[pd.Series, Verdict]]) -> str:
    """Return in a line what scoring costs, the most of any test, and what it does not buy."""
    tests = [(test, v) for line, v in done if line["kind"] == "cost" for test in v.tests if test.n]
    most = "not run yet"
    if tests:
        test, v = max(tests, key=lambda found: float(found[0].said.split()[0]))
        where = f"{test.where}, n = {test.n}{_trained(v).replace(';', ',')}"
        most = f"at most {test.said} of a run's time ({where})"
    return (
        f"- *What does it cost, and save?* One scoring before training, where networks are trained one by one: {most}. "
        "Our runs keep the removed weights as zeros, so that a step takes as long as before; sparse storage and "
        "arithmetic are not tested. Where whole units go, the network is really made smaller."
    )


def _beside_other_masks() -> str:
    """Return in a line how SNIP's errors stand to those of other masks of untrained networks, in `_ways`."""
    others = {"shuffled": {"control": "shuffle"}, "magnitude": {"method": "magnitude"}, "GraSP": {"method": "grasp"}}
    parts, seeds, lines = [], [], list(_ways(BEFORE | others))  # which reads every row
    asked = {"at random": "random masks", "shuffled": "SNIP's own masks, shuffled within their layers"}
    asked |= {
        "magnitude": "those of the largest weights",
        "GraSP": "GraSP's (its criterion on 100 examples)",
        "SynFlow": "SynFlow's (no example seen)",
    }
    for way, words in asked.items():
        gaps = [gap for _, _, rows in lines if len(gap := paired(rows["SNIP"], rows[way])) > 1]
        ends, means = [interval(gap)[1:] for gap in gaps], [gap.mean() for gap in gaps]
        below, above = sum(high < 0 for _, high in ends), sum(low > 0 for low, _ in ends)
        told = {"lower": below, "higher": above, "not told apart": len(ends) - below - above}
        standing = ", ".join(f"{word} in {n}" for word, n in told.items() if n) + f" of {counted(len(ends), 'place')}"
        by = f" (means from {digits(min(means), sign='+')} to {digits(max(means), sign='+')} points)" if gaps else ""
        parts.append(f"than with {words}: {standing}{by}" if gaps else f"than with {words}: not run yet")
        seeds += map(len, gaps)
    n = f"n = {min(seeds)} to {max(seeds)}" if seeds else "no seed yet"
    return (
        "- *Is its error lower than with other masks that need no training?* By paired 95 % intervals (in points: "
        f"SNIP's minus theirs), {'; '.join(parts)} (each LeNet at two sparsities, {n}, at a tenth of the training)."
    )


def _standing(v: Verdict) -> str:
    """Return what a verdict answers to the question whether its claim holds, in a word or a few."""
    met, n = [test.where for test in v.tests if test.met], len(v.tests)
    part = f"in {len(met)} of {n} tests ({', '.join(met)})"
    answer = "yes" if len(met) == n else "no" if v.verdict == "not reproduced" else part
    answer = ("one seed only" if v.reason == "too few seeds" and v.n == 1 else v.reason) or answer
    return answer + (f" (with {DENSE_APART})" if DENSE_APART in v.limits else "")


def ways_table() -> Table:
    """Return the test errors of the LeNets by sparsity and way to prune, at the `short` profile: mean ± sample sd (n).

    Runs that failed count with the error that they ended with. The last column is what SNIP is compared with in
    C11 and C12: trained to the end, then pruned by magnitude and retrained, which takes twice the steps.
    """
    (first,) = settings(criteria().loc["C11", "against"])
    lines, index = [], "network, a tenth of the training"
    for name, _, groups in _ways({"dense": {"sparsity": 0.0}} | BEFORE | {"trained first": first}):
        line = {index: name}
        for way, rows in groups.items():
            n = cell(f"({len(rows)})", "count", rows)
            line[way] = both(spread(rows, failed=True), n) if len(rows) else "not run yet"
        lines.append(line)
    return table(lines, index)


# Ways to prune that need no training first.
BEFORE = {"SNIP": {}, "SynFlow": {"method": "synflow"}, "at random": {"method": "random"}}


def _ways(ways: dict[str, dict], profile: str = "short") -> Iterator[tuple[str, str, dict[str, pd.DataFrame]]]:
    """Yield each line of `ways_table`: network and sparsity in words, the profile, the rows of each way to prune it.

    The profile is that of a network's two lines (`best_profile`).
    """
    find = finder()
    for model, sparsities in {"lenet300": (0.95, 0.98), "lenet5": (0.98, 0.99)}.items():
        run = Run(model, "mnist")
        asked = {(s, way): {"sparsity": s} | fields for s in sparsities for way, fields in ways.items()}
        groups = {at: sweep(replace(run, **fields), seed=SEEDS) for at, fields in asked.items()}
        length = best_profile(profile, sum(groups.values(), []), find)
        rows = {at: find(at_rate(length, group, find)) for at, group in groups.items()}
        for s in sparsities:
            yield f"{NAMES[model]}, {100 * s:g} %", length, {way: rows[s, way] for way in ways}


def cost_markdown() -> str:
    """Return in a sentence what all rows cost."""
    rows = pd.DataFrame(list(read_rows(results_folder()).values()), columns=["seconds", "device", "steps"])
    devices = ", ".join(f"{device} ({n})" for device, n in rows["device"].value_counts().items())
    trained = int((rows["steps"] > 0).sum())
    return (
        f"Cost so far: {trained} trained networks and {len(rows) - trained} that were only scored, "
        f"{digits(rows['seconds'].sum() / 3600, 1)} hours; rows by device: {devices}."
    )


def _by_standing(judged: list[Verdict]) -> dict[str, list[Verdict]]:
    """Return the verdicts by their word, and those of claims that are not tested by the reason."""
    return {word: [v for v in judged if (v.reason or v.verdict) == word] for word in (*WORDS, *REASONS)}


def summary_markdown() -> str:
    """Return the answer, how the verdicts stand section by section, with links, and what the rows cost."""
    judged, lines = verdicts(), criteria()
    heads = (*WORDS, "undecided", "no verdict")

    def links(found: list[Verdict]) -> str:
        return ", ".join(chapter_link(v.claim, lines.loc[v.claim, "chapter"], "../notebooks/") for v in found)

    def table_line(about: str, of: list[Verdict], told: Callable[[list[Verdict]], str]) -> str:
        by = {word: told(found) for word, found in _by_standing(of).items() if found}
        without = "; ".join(f"{reason}: {by[reason]}" for reason in REASONS[1:] if reason in by)
        return f"| {about} | {' | '.join([*(by.get(word, '') for word in heads[:-1]), without])} |"

    table_lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for chapter, group in lines[lines["kind"] != "learning_rate"].groupby("chapter", sort=False):
        about = f"{_heading(chapter, '# ') or chapter} ({', '.join(sorted(set(group['section'])))})"
        about = chapter_link(about, chapter, "../notebooks/")
        table_lines.append(table_line(about, [v for v in judged if v.claim in group.index], links))
    table_lines.append(table_line(f"**all {len(judged)}**", judged, lambda found: str(len(found))))
    return "\n\n".join([answer_markdown(judged), "\n".join(table_lines), cost_markdown(), ""])


def headline_markdown() -> str:
    """Return the answer and the verdicts in a few lines, for the README."""
    judged, least = verdicts(), criteria()["min_n"]
    sections = list(criteria().loc[[v.claim for v in judged], "section"])
    ours, followed = sections.count("ours"), sum("SNIP-it" in section for section in sections)
    whose = f"{len(judged) - ours - followed} of the paper, {followed} of SNIP-it or our reading of it, {ours} ours"
    found = [answer_markdown(judged), "", f"Of the {len(judged)} claims ({whose}):", ""]
    for word, group in _by_standing(judged).items():
        named = []
        for v in group:
            met, n = sum(test.met for test in v.tests), len(v.tests)
            told = [f"{met} of {n} tests"] * (v.verdict == "in part" and met < n)
            told += [f"only {counted(v.n, 'seed')}"] * (0 < v.n < int(least[v.claim]))
            named.append(v.claim + f" ({', '.join(told)})" * bool(told))
        if group or word in WORDS:
            found.append(f"- **{word}** ({len(group)} of {len(judged)}){': ' * bool(named)}{', '.join(named)}")
    return "\n".join(found) + "\n"
