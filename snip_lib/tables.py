"""Tables: every number that a page prints, with the rows that it comes from.

A `Cell` is a number as it is printed; it knows how it was computed and the keys of its rows, and a
`Table` hands that on to the notebook, unseen, where a test recomputes it. Read `claims` next.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from statistics import NormalDist

import pandas as pd
import torch
from torch import Tensor, nn

from .masks import Mask
from .paths import report
from .robustness import ATTACK, RADII
from .runs import DEFAULTS
from .saliency import is_bias

# -------------------------------------------------------------------------------------- cells


class Cell(str):
    """A result as it is printed; `how` it was computed, and the keys of the rows it comes from.

    `how` is words: a statistic, then a column of the rows. A test computes every cell of every
    committed page again, from these and the row files alone.
    """

    how: str
    keys: tuple[tuple[str, ...], ...]  # one group a set of rows: ours, then theirs


MIME = "application/vnd.snip.cells+json"


class Table(pd.DataFrame):
    """A table whose display also carries, unseen, the keys behind each `Cell`: a second MIME type of the output.

    ``rows``: groups of keys; ``cells``: for each cell "line column groups how", the groups as their numbers.
    """

    @property
    def _constructor(self):
        return Table

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        groups, cells = {}, []
        for i, line in enumerate(self.to_numpy()):
            for j, value in enumerate(line):
                if isinstance(value, Cell):
                    numbers = [str(groups.setdefault(" ".join(keys), len(groups))) for keys in value.keys]
                    cells.append(f"{i} {j} {','.join(numbers)} {value.how}")
        return {MIME: {"rows": list(groups), "cells": cells}}


def cell(text: str, how: str, *groups: pd.DataFrame | tuple[str, ...]) -> Cell:
    """Return `text` as a `Cell` that comes from `groups` of rows, or of their keys."""
    made = Cell(text)
    made.how, made.keys = how, tuple(g if isinstance(g, tuple) else tuple(g["key"]) for g in groups)
    return made


def table(lines: list[dict], index: str) -> Table:
    """Return lines of cells as a table, indexed by their column `index`; one line stands for all if none has rows."""
    if len(lines) > 1 and all(line.get("n") == "not run yet" for line in lines):
        lines = [{index: f"all {len(lines)}", "n": "not run yet"}]
    return Table(lines, dtype=object).set_index(index)


def keyed(texts: pd.DataFrame, how: str, groups: dict[object, pd.DataFrame | tuple[pd.DataFrame, ...]]) -> Table:
    """Return a table of texts as one of cells; "" where a line has no rows.

    `how` is a statistic with {} for the title of a column, and `groups` has the rows, or groups of rows, of a line.
    """
    columns = []
    for j, title in enumerate(texts):
        found = [(text, groups.get(label, ())) for label, text in texts.iloc[:, j].items()]
        found = [(text, rows if isinstance(rows, tuple) else (rows,)) for text, rows in found]
        columns.append([cell(text, how.format(title), *rows) if rows else "" for text, rows in found])
    return Table(zip(*columns, strict=True), texts.index, texts.columns, dtype=object)


def quoted(lines: pd.DataFrame, places: int = 2) -> Cell | str:
    """Return the values of lines of `claims.published()` as a cell, with " → " between them; "" of no line."""
    text = " → ".join(digits(value, places) for value in lines["value"])
    return cell(text, " ".join(["paper", *map(str, lines.index)]), ()) if text else ""


def both(first: str, second: str) -> str:
    """Return two cells of the same rows as one, with a space between; without keys if one of them has none."""
    text, cells = f"{first} {second}".strip(), [c for c in (first, second) if isinstance(c, Cell)]
    return cell(text, ", ".join(c.how for c in cells), *first.keys) if len(cells) == 2 else text


# ------------------------------------------------------------------------------------ numbers


def settled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that did not diverge."""
    return rows[~rows["diverged"].astype(bool)]


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, field: str = "test_error") -> pd.Series:
    """Return `field` of our rows minus that of theirs, for each seed that has both; errors: as `by_seed`."""
    _one_a_seed(ours, theirs)
    return (ours.set_index("seed")[field].astype(float) - theirs.set_index("seed")[field].astype(float)).dropna()


def by_seed(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of rows of one seed, a line each: ``<field>_x`` is ours, ``<field>_y`` theirs.

    Raises:
        ValueError: a seed occurs twice among ours, or among theirs.
    """
    _one_a_seed(ours, theirs)
    return ours.merge(theirs, on="seed")


def _one_a_seed(*groups: pd.DataFrame) -> None:
    for rows in groups:
        if rows["seed"].duplicated().any():
            raise ValueError("Rows are paired by seed, so a group has one row a seed: these are of several runs.")


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval (Student's t); NaN ends below two values."""
    from scipy import stats

    values = pd.Series(list(values), dtype=float).dropna()
    mean, n = values.mean(), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf(0.975, n - 1) * values.std() / math.sqrt(n)
    return mean, mean - half, mean + half


PLACES = {"train_loss": 3, "steps": 0}  # decimals; all else has 2


def places_of(field: str, value: float) -> int:
    """Return with how many decimals a value of a column is printed; seconds have 3 below 10, from there on none."""
    if field in ("seconds", "scoring_seconds"):
        return 0 if value >= 10 else 3
    return PLACES.get(field, 2)


def digits(value: float, places: int = 2, sign: str = "") -> str:
    """Return a number as every page prints it: halves away from 0, whatever the last bits of the float say.

    1.575 is 1.58, whether it was added up as 1.5749999999999997 or as 1.5750000000000002; NaN is a dash.
    """
    if not math.isfinite(value):
        return "–"
    rounded = Decimal(f"{value:.10g}").quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return f"{rounded:{sign}f}"


def spread(rows: pd.DataFrame, field: str = "test_error", after: float | None = None, failed: bool = False) -> Cell:
    """Return "mean ± sample sd" over the rows that did not diverge; on their curves, `after` a share of the steps.

    With `failed`, over all rows: a run that diverged counts with what it ended with. "–" where a row, of an older
    version of the library, does not say.
    """
    rows, how = rows if failed else settled(rows), f"mean ± sd {'of all ' if failed else ''}{field}"
    values = rows[field]
    if after is not None:
        curves, how = rows["curve"] if len(rows) else [], f"{how} after {after:g}"
        values = pd.Series([c[field][c["step"].index(round(after * c["step"][-1]))] for c in curves])
    values = values.astype(float) if values.notna().all() else pd.Series(dtype=float)
    shown = [digits(number, PLACES.get(field, 2)) for number in (values.mean(), values.std())]
    return cell(" ± ".join(shown[: len(values)] or shown[:1]), how, rows)


def estimate(values: pd.Series, how: str, *groups: pd.DataFrame, places: int = 2, sign: str = "+") -> Cell:
    """Return "mean [its 95 % interval]" of values, which come from the rows of `groups` as `how` says.

    The interval ends where the quantity does: no error is below 0 or above 100 %, whatever few seeds leave open.
    """
    field = how.split()[-1]
    most = 100 if field == "test_error" or field.startswith("attacked") else math.inf
    if "changes" in how:  # a difference of two differences
        most *= 2
    least = 0 if how == f"mean and interval {field}" else -most
    mean, *ends = interval(values)
    mean, *ends = (digits(number, places, sign) for number in (mean, *(min(max(end, least), most) for end in ends)))
    return cell(f"{mean} [{', '.join(ends)}]" if len(values) > 1 else mean, how, *groups)


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, field: str = "test_error") -> Cell:
    """Return the mean of the differences paired by seed, ours minus theirs, with its 95 % interval."""
    values = paired(ours, theirs, field)
    ours, theirs = (rows[rows["seed"].isin(values.index)] for rows in (ours, theirs))
    return estimate(values, f"mean difference {field}", ours, theirs, places=PLACES.get(field, 2))


def statistic(rows: pd.DataFrame, how: str) -> Cell | str:
    """Return what `how` says of all the rows: words of a statistic, and a column; "" of no row.

    Known are mean, mean percent (of a fraction), median, smallest and largest; several, with ", " between, give
    as many numbers with " to " between.
    """
    if not len(rows):
        return ""
    known = {"mean": pd.Series.mean, "median": pd.Series.median, "smallest": pd.Series.min, "largest": pd.Series.max}
    numbers = []
    for part in how.split(", "):
        name, *percent, field = part.split()
        number = known[name](rows[field].astype(float)) * (100 if percent else 1)
        numbers.append(digits(number, places_of(field, number)))
    return cell(" to ".join(numbers), how, rows)


def extremes(rows: pd.DataFrame, field: str) -> Cell | str:
    """Return "smallest to largest" of a column, or the one value that it has; "" of no row."""
    return statistic(rows, f"smallest {field}" + (f", largest {field}" if rows[field].nunique() > 1 else ""))


def agreement(ours: pd.DataFrame, theirs: pd.DataFrame, field: str) -> Cell | str:
    """Return for how many of the seeds that both have `field` is the same: "5 of 5"; "not run yet" without any."""
    if ours.empty or theirs.empty:  # then the column may be missing, too
        return "not run yet"
    pairs = by_seed(ours, theirs)
    same = pairs[f"{field}_x"] == pairs[f"{field}_y"]
    return cell(f"{same.sum()} of {len(same)}", f"equal {field}", ours, theirs) if len(same) else "not run yet"


def lower(ours: pd.DataFrame, theirs: pd.DataFrame) -> Cell | str:
    """Return for how many of the seeds that both have our test error is lower; "" of none, and of the same rows."""
    gaps = paired(ours, theirs)
    same = set(ours["key"]) == set(theirs["key"])
    return "" if same or not len(gaps) else cell(f"{(gaps < 0).sum()} of {len(gaps)}", "lower test_error", ours, theirs)


def moved(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.Series:
    """Return for each seed that both have which share of the kept connections is kept in another layer.

    Half the sum over layers of the absolute difference of what they keep, over all that is kept.
    """
    pairs = by_seed(ours, theirs)
    kept = zip(pairs["kept_x"], pairs["kept_y"], strict=True)
    shares = [sum(abs(n - b[layer]) for layer, n in a.items()) / 2 / sum(a.values()) for a, b in kept]
    return pd.Series(shares, dtype=float)


def moved_percent(ours: pd.DataFrame, theirs: pd.DataFrame) -> Cell | str:
    """Return the least and the largest of `moved` in percent; "not run yet" where no seed has both."""
    if ours.empty or theirs.empty or (shares := 100 * moved(ours, theirs)).empty:
        return "not run yet"
    how = "least percent moved kept, largest percent moved kept"
    return cell(f"{digits(shares.min())} to {digits(shares.max())}", how, ours, theirs)


def scoring_in_steps(rows: pd.DataFrame) -> Cell | str:
    """Return how many training steps of the same run all its scorings take, the median; "not run yet" of no row."""
    if not len(rows):
        return "not run yet"
    a_step = (rows["seconds"] - rows["scoring_seconds"]) / rows["steps"]
    steps = (rows["scoring_seconds"] / a_step).astype(float).median()
    return cell(digits(steps, 0), "median steps of scoring", rows)


def seeds_to_draw(rows: pd.DataFrame, printed: float, field: str = "test_error") -> Cell | str:
    """Return how many seeds one would have to train, on average, until one rounds to `printed` or less.

    1 / P(error < printed + 0.05), with errors as a normal variable of the rows' mean and sample sd; "–" of
    fewer than three rows.
    """
    if len(rows) < 3:
        return "–"
    errors = rows[field].astype(float)
    chance = NormalDist(errors.mean(), errors.std() or 1e-9).cdf(printed + 0.05)
    seeds = f"{1 / chance:,.0f}" if chance > 1e-4 else "over 10,000"
    return cell(seeds, f"seeds to draw {field}", rows)


def kept_by_layer(rows: pd.DataFrame, layers: int | None = None) -> Cell | str:
    """Return the mean number of weights kept in each layer, or the first `layers`; "not run yet" of no row."""
    kept = pd.DataFrame(list(rows["kept"])).filter(regex="weight$").mean().iloc[:layers]
    how = ", ".join(f"mean kept {name}" for name in kept.index)
    return cell(", ".join(digits(n, 0) for n in kept), how, rows) if len(rows) else "not run yet"


# ------------------------------------------------------------------------------------- tables


def group_table(
    groups: dict[str, pd.DataFrame],
    *,
    dense: pd.DataFrame | None = None,
    paper: dict[str, str] | None = None,
    label: str = "method",
    also: dict[str, str] | None = None,
    failed: bool = False,
) -> Table:
    """Return one line a group of rows: seeds, diverged runs, error, difference to dense, the paper's number.

    Errors are in percent, mean ± sample sd over the runs that did not diverge; "pruned − dense" is in points,
    paired by seed, with its 95 % interval, if the rows of the `dense` network are given. `paper` is what the
    paper prints for a group, shown where that has rows.
    `also` adds columns: title -> a column of the rows, shown as mean ± sd. A group
    without rows is "not run yet". The index is called `label`. With `failed`, the error is that of all runs, each
    with what it ended with: where ways to prune are compared, to leave failures out would favour the way that fails;
    and those that `has_failed` tells are counted.
    """
    lines = []
    for name, rows in groups.items():
        used = rows if failed else settled(rows)
        line = {label: name, "n": cell(str(len(used)), "count", used)}
        if failed:
            line["failed"] = cell(str(int(has_failed(rows).sum())), "failed", rows)
        else:
            line["diverged"] = cell(str(int(rows["diverged"].sum())), "diverged", rows)
        for title, field in {"test error %": "test_error", **(also or {})}.items():
            line[title] = spread(rows, field, failed=failed) if len(rows) else "not run yet"
        if dense is not None:
            compared = difference(used, dense if failed else settled(dense))
            same = set(rows["key"]) <= set(dense["key"])  # the dense network itself, or no row at all
            line["pruned − dense"] = compared if compared != "–" and not same else ""
        if paper is not None:
            line["paper"] = cell(paper.get(name, ""), "paper", rows) if len(rows) else ""
        lines.append(line)
    return table(lines, label) if lines else Table(columns=["n", "diverged", "test error %"]).rename_axis(label)


def error_table(rows: pd.DataFrame, paper: pd.DataFrame, others: pd.DataFrame | None = None) -> Table:
    """Return `group_table` of one model and data set by sparsity, with a column for another reproduction.

    `paper` and `others` hold their lines of `published()`.
    """
    printed = paper[paper["quantity"] == "test_error"].groupby("sparsity")["value"].unique()
    printed = {f"{100 * s:g}": " / ".join(str(v) for v in values) for s, values in printed.items()}
    groups = {f"{100 * s:g}": group for s, group in rows.groupby("sparsity")}
    found = group_table(groups, dense=rows[rows["sparsity"] == 0], paper=printed, label="sparsity %")
    if others is not None:
        theirs = {f"{100 * s:g}": quoted(lines, 3) for s, lines in others.groupby("sparsity")}
        found["another reproduction"] = [theirs.get(sparsity, "") for sparsity in found.index]
    return found


def rate_table(rows: pd.DataFrame) -> Table:
    """Return `group_table` of dense runs by learning rate."""
    return group_table({f"{r:g}": group for r, group in rows.groupby("lr", sort=False)}, label="learning rate")


def reporting_table(rows: pd.DataFrame) -> Table:
    """Return, by sparsity, the error at the last step and what two other ways to report it would give.

    *best validation*: the test error where the validation error was lowest; *best test*: the lowest
    test error of the last five checkpoints, as the released code reports; both in percent.
    """
    lines = []
    for sparsity, group in settled(rows).groupby("sparsity"):
        means = group[["test_error", "test_error_best_val", "test_error_best5"]].astype(float).mean()
        line = [cell(digits(mean), f"mean {name}", group) for name, mean in means.items()]
        bias = cell(digits(means["test_error"] - means["test_error_best5"]), "mean selection bias", group)
        names = ("last step", "best validation", "best test", "last − best test")
        lines.append({"sparsity %": f"{100 * sparsity:g}"} | dict(zip(names, [*line, bias], strict=True)))
    return table(lines, "sparsity %") if lines else Table(columns=["last step"]).rename_axis("sparsity %")


def length_table(few: pd.DataFrame, many: pd.DataFrame) -> Table:
    """Return, by sparsity, what longer training changes: rows of few steps and of many, over the seeds that both have.

    *change*: many minus few, in points, with its 95 % interval; *beyond dense*: that, minus the dense network's
    change at the same seed, so what longer training does to the price of pruning; *price, many*: what is left of
    it, pruned minus dense after many steps.
    """
    lines, few, many = [], settled(few), settled(many)
    dense = paired(*(rows[rows["sparsity"] == 0] for rows in (many, few)))
    for sparsity in sorted(set(many["sparsity"])):
        ours = [rows[rows["sparsity"] == sparsity] for rows in (many, few)]
        change = paired(*ours)
        line = {"sparsity %": f"{100 * sparsity:g}", "n": cell(str(len(change)), "pairs", *ours)}
        used = [rows[rows["seed"].isin(change.index)] for rows in ours]
        line |= {"few steps": spread(used[1]), "many": spread(used[0]), "change": difference(*ours)}
        beyond = (change - dense).dropna()
        groups = [
            rows[(rows["sparsity"] == s) & rows["seed"].isin(beyond.index)]
            for s in (sparsity, 0)
            for rows in (many, few)
        ]
        shown = estimate(beyond, "mean difference of changes test_error", *groups)
        line["beyond dense"] = shown if sparsity and len(beyond) else ""
        price = difference(ours[0], many[many["sparsity"] == 0])
        lines.append(line | {"price, many": price if sparsity and price.keys[0] else ""})
    return table(lines, "sparsity %") if lines else Table(columns=["n", "change"]).rename_axis("sparsity %")


def layer_table(rows: pd.DataFrame) -> Table:
    """Return, by sparsity, the mean number of weights kept per layer, of all biases, and the effective sparsity.

    And the mean number of dead units, those to which no live connection leads, if every row tells it. Many layers go
    from top to bottom, and the sparsities from left to right.
    """
    lines, weights = [], []
    for sparsity, group in rows[rows["sparsity"] > 0].groupby("sparsity"):
        kept = pd.DataFrame(list(group["kept"]))
        weights = [name for name in kept if name.endswith("weight")]
        line = {n.removesuffix(".weight"): cell(digits(kept[n].mean(), 0), f"mean kept {n}", group) for n in weights}
        biases = kept.drop(columns=weights).sum(axis=1).mean()
        line["biases"] = cell(digits(biases, 0), "mean kept biases", group)
        effective = digits(100 * group["effective_sparsity"].mean())
        line["effective sparsity %"] = cell(effective, "mean percent effective_sparsity", group)
        if "dead_units" in rows and rows.loc[rows["sparsity"] > 0, "dead_units"].notna().all():
            line["dead units"] = cell(digits(group["dead_units"].astype(float).mean(), 0), "mean dead_units", group)
        lines.append({"sparsity %": f"{100 * sparsity:g}"} | line)
    if not lines:
        return Table(columns=["effective sparsity %"]).rename_axis("sparsity %")
    shown = table(lines, "sparsity %")
    if len(weights) <= 8:  # as many columns as a page is wide
        return shown
    return shown.T.rename_axis(index="layer", columns=None).add_suffix(" %")


def cost_table(rows: pd.DataFrame) -> Table:
    """Return, by network, trained runs and only scored ones apart: how many, steps, seconds, `fingerprint`, device."""
    lines = []
    for model, every in rows.groupby("model", sort=False):
        trained = every["steps"] > 0
        for name, group in {model: every[trained], f"{model}, only scored": every[~trained]}.items():
            if len(group):
                line = {"network": name, "runs": cell(str(len(group)), "count", group)}
                line["steps a run"] = extremes(group, "steps")
                line["seconds a run (median)"] = statistic(group, "median seconds")
                line["hours in all"] = cell(digits(group["seconds"].sum() / 3600), "hours seconds", group)
                line["fingerprint"] = cell(fingerprint(group), "fingerprint", group)
                lines.append(line | {"device": cell(", ".join(sorted(set(group["device"]))), "names device", group)})
    return table(lines or [{"network": "all", "runs": "not run yet"}], "network")


def time_table(groups: dict[str, pd.DataFrame], *, label: str = "method") -> Table:
    """Return, by group, the steps of a run, the median seconds of scoring, all seconds from smallest to largest.

    And the largest share that scoring had of a run, in percent. What a step takes depends on what else the machine
    does: compare the seconds of scoring with those of the same run, not the runs of two groups.
    """
    lines = []
    for name, rows in groups.items():
        line = {label: name, "n": cell(str(len(rows)), "count", rows)}
        line |= {
            "steps": extremes(rows, "steps"),
            "seconds of scoring (median)": statistic(rows, "median scoring_seconds"),
            "seconds of a run": extremes(rows, "seconds"),
            "scoring at most %": "",
        }
        if len(rows):
            share = 100 * (rows["scoring_seconds"] / rows["seconds"]).astype(float).max()
            how = "largest percent scoring_seconds of seconds"
            line["scoring at most %"] = cell(digits(share, 3), how, rows)
        lines.append({title: text or "not run yet" for title, text in line.items()})
    return table(lines, label)


def fingerprint(rows: pd.DataFrame) -> str:
    """Return 8 hex digits that change with anything in any of the rows, so that a page is tied to them."""
    # Defaults do not count, so that a new field of `Run` leaves the fingerprints of old rows alone.
    # Neither does whether a table, for want of a value elsewhere in a column, made an integer a float.
    known = [
        {
            name: int(v) if isinstance(v, float) and v.is_integer() else v
            for name, v in row.items()
            if v is not None and v == v and v != DEFAULTS.get(name)
        }
        for row in rows.to_dict("records")
    ]
    text = "\n".join(sorted(json.dumps(row, sort_keys=True) for row in known))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ------------------------------------------------------------- tables of many ways to prune


def by_sparsity(groups: dict[str, pd.DataFrame], field: str = "test_error") -> Table:
    """Return a column of rows by group (a line) and sparsity (a column): mean [95 % interval] over all seeds.

    A run that failed counts with the value that it ended with, for to leave it out would favour the way that
    fails; a dash stands where one ended without a finite value. Failed are those that diverged or only guess, and
    those that are disconnected (`is_cut_off`), whatever their labels: a cell says how many of its runs did, "failed"
    counts them in all. `n` is the smallest number of seeds in a column.
    """
    lines = []
    for name, rows in groups.items():
        line = {"method": name, "n": cell(_seeds(rows), "fewest seeds", rows) if len(rows) else "not run yet"}
        failed = has_failed(rows)
        line["failed"] = cell(str(failed.sum()), "failed", rows) if len(rows) else ""
        for sparsity in _sparsities(groups):
            group = rows[rows["sparsity"] == sparsity]
            values, how = group[field].astype(float), f"mean and interval {field}"
            shown = cell("–", how, group) if len(group) else ""
            if len(group) and values.notna().all():
                shown = estimate(values, how, group, places=PLACES.get(field, 2), sign="")
            if n := failed[group.index].sum():  # no line breaks between the number and its word
                shown = both(shown, cell(f"({n}\u00a0failed)", "failed", group))
            line[f"{100 * sparsity:g} %"] = shown
        lines.append(line)
    return table(lines, "method")


def gains(groups: dict[str, pd.DataFrame], pairs: Iterable[tuple[str, str]]) -> Table:
    """Return, by sparsity, the difference of test error between two groups, in points, paired by seed, for each pair.

    The mean with its 95 % interval, and (the number of seeds); a run that failed counts with the error that it ended
    with. A pair or a sparsity of which nothing is run is left out.
    """
    lines, pairs = [], list(pairs)
    for sparsity in _sparsities({name: groups[name] for pair in pairs for name in pair}):
        line = {"sparsity %": f"{100 * sparsity:g}"}
        for ours, theirs in pairs:
            a, b = (groups[name][groups[name]["sparsity"] == sparsity] for name in (ours, theirs))
            found = difference(a, b)
            n = cell(f"({len(paired(a, b))})", "pairs", *found.keys)
            line[f"{ours} − {theirs}"] = both(found, n) if found != "–" else "not run yet"
        lines.append(line)
    names = [f"{ours} − {theirs}" for ours, theirs in pairs]
    shown = table(lines, "sparsity %") if lines else Table(columns=names).rename_axis("sparsity %")
    run = shown != "not run yet"
    return shown.loc[run.any(axis=1), run.any()] if run.any(axis=None) else shown


def where_lower(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Return at which sparsities our test error is lower than theirs, at which higher, and at which neither.

    It is where the whole interval of the difference, paired by seed, lies on that side of 0; by how many points is
    its mean. Sparsities with fewer than two pairs are left out.
    """
    found: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart": []}
    for s in sorted(set(ours["sparsity"]) & set(theirs["sparsity"])):
        mean, low, high = interval(paired(ours[ours["sparsity"] == s], theirs[theirs["sparsity"] == s]))
        if not math.isnan(low):
            how = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
            points = "" if how == "not told apart" else f" (by {digits(abs(mean))} points)"
            found[how].append(f"{100 * s:g} %{points}")
    return "; ".join(f"{how} at {', '.join(places)}" for how, places in found.items() if places) or "not compared yet"


def _sparsities(groups: dict[str, pd.DataFrame]) -> list[float]:
    return sorted({s for rows in groups.values() for s in rows["sparsity"]})


def _seeds(rows: pd.DataFrame) -> str:
    return str(rows.groupby("sparsity").size().min())


CELL = ("gates.", "candidate.")  # layers of a recurrent network, which is whole without them


def is_cut_off(rows: pd.DataFrame) -> pd.Series:
    """Tell for each row whether its network is disconnected: no path of kept weights goes through it, none lives.

    So it is where a layer of a chain keeps no weight; a GRU without a gate is another network, and whole. A row older
    than `live_weights` says only whether a layer is empty, or no connection lives, which is the same where no bias is
    kept.
    """

    def chain(kept: dict[str, int]) -> list[int]:
        return [n for name, n in kept.items() if name.endswith("weight") and not name.startswith(CELL)]

    empty = [0 in chain(kept) for kept in rows["kept"]]
    dead = pd.Series(empty, index=rows.index, dtype=bool) | (rows["effective_sparsity"].astype(float) == 1)
    if "live_weights" in rows:
        live = rows["live_weights"].astype(float)
        dead = (live == 0) | (live.isna() & dead)
    return dead


def has_failed(rows: pd.DataFrame) -> pd.Series:
    """Tell for each row whether its run diverged or only guesses, or whether its network `is_cut_off`."""
    return rows["diverged"].astype(bool) | is_cut_off(rows)


def loses_outputs(rows: pd.DataFrame) -> pd.Series:
    """Tell for each row whether its network has an output to which no path of kept weights leads from an input.

    Raises:
        ValueError: a row is older than `dead_outputs` and cannot tell.
    """
    dead = rows["dead_outputs"].astype(float)
    if dead.isna().any():
        raise ValueError("A row without dead_outputs does not tell: leave it out, or make it again.")
    return dead > 0


def cut_off(rows: pd.DataFrame, told: Callable[[pd.DataFrame], pd.Series] = is_cut_off) -> tuple[int, float, float]:
    """Return how many of the `rows`, one or more, are of disconnected networks, and the exact 95 % interval in percent.

    `told` is what counts as that: `is_cut_off`, or `loses_outputs`.
    """
    from scipy import stats

    n = int(told(rows).sum())
    ends = stats.binomtest(n, len(rows)).proportion_ci(0.95)
    return n, 100 * ends.low, 100 * ends.high


def disconnection_table(
    groups: dict[str, pd.DataFrame], told: Callable[[pd.DataFrame], pd.Series] = is_cut_off
) -> Table:
    """Return how many networks are `cut_off`, by group and sparsity, with the interval.

    Of lost outputs only rows tell that are not older than `dead_outputs`; others are left out.
    """
    lines, how = [], {is_cut_off: "disconnected", loses_outputs: "losing outputs"}[told]
    for name, rows in groups.items():
        rows = rows[rows["dead_outputs"].notna()] if told is loses_outputs else rows
        line = {"method": name, "n": cell(_seeds(rows), "fewest seeds", rows) if len(rows) else "not run yet"}
        for sparsity in _sparsities(groups):
            group, text = rows[rows["sparsity"] == sparsity], ""
            if len(group):
                n, *ends = cut_off(group, told)
                text = f"{n} of {len(group)} [{', '.join(digits(end, 1) for end in ends)}]"
            line[f"{100 * sparsity:g} %"] = cell(text, how, group) if text else ""
        lines.append(line)
    return table(lines, "method")


def by_outputs(rows: pd.DataFrame, masks: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    """Split rows of trained networks by whether their masks leave every output a path (`loses_outputs`).

    `masks` has rows of the same masks alone, found by sparsity and seed: trained ones may be older than
    `dead_outputs`. Rows without a mask there are left out.
    """
    masks = masks[masks["dead_outputs"].notna()]
    told = dict(zip(zip(masks["sparsity"], masks["seed"], strict=True), loses_outputs(masks), strict=True))
    lost = pd.Series([told.get(pair) for pair in zip(rows["sparsity"], rows["seed"], strict=True)], rows.index, object)
    groups = {f"{name}, a path to each output": rows[lost.eq(False)], f"{name}, an output without": rows[lost.eq(True)]}
    return {label: group for label, group in groups.items() if len(group)}


def mask_table(model: nn.Module, masks: dict[str, Mask], x: Tensor, *, like: str) -> pd.DataFrame:
    """Return one line a mask of `model`: weights kept by layer, dead units, effective sparsity, overlap with `like`.

    A unit is dead if no live connection leads to it. In common are the connections that both masks keep, in percent
    of those that either keeps. `x`: an example, [1, ...].
    """
    lines = {}
    for name, mask in masks.items():
        found = report(model, mask, x)
        lines[name] = {n.removesuffix(".weight"): int(found["kept"][n]) for n in mask if not is_bias(n, mask[n])}
        lines[name]["dead units"] = int(found["dead_units"]["total"])
        lines[name]["effective sparsity %"] = digits(100 * found.attrs["effective_sparsity"])
        pairs = [(kept, masks[like][n]) for n, kept in mask.items()]
        both, either = (sum(int(join(a, b).sum()) for a, b in pairs) for join in (torch.logical_and, torch.logical_or))
        lines[name][f"in common with {like} %"] = digits(100 * both / either, 0)
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("mask")


def attack_table(groups: dict[str, pd.DataFrame], norm: str) -> Table:
    """Return the accuracy under attack in percent, by group and radius: mean [95 % interval] over the seeds.

    Of the test images of `robustness.attacked` that the network gets right; "right %" are these, of all that were
    drawn (mean ± sample sd). Runs that diverged are left out and counted, for a network that only guesses cannot be
    misled; rows of another attack than `robustness.ATTACK` are left out. At the last radius stands what gradients
    alone leave.
    """
    *radii, last = (f"{eps:g}" for eps in RADII[norm])
    shown = {eps: f"attacked_{norm}_{eps}" for eps in radii} | {f"{last}, gradients alone": f"gradients_{norm}_{last}"}
    lines = []
    for name, rows in groups.items():
        rows = rows[rows["attack"].map(lambda attack: attack == ATTACK).astype(bool)] if "attack" in rows else rows[:0]
        whole = settled(rows)
        line = {"method": name, "n": cell(str(len(whole)), "count", whole) if len(rows) else "not run yet"}
        line["diverged"] = cell(str(int(rows["diverged"].sum())), "diverged", rows) if len(rows) else ""
        line["right %"] = ""
        if len(whole):
            right = 100 * whole["attacked_right"].astype(float) / whole["attacked_images"]
            told = " ± ".join(digits(value, 1) for value in (right.mean(), right.std())[: len(right)])
            line["right %"] = cell(told, "mean ± sd percent attacked_right of attacked_images", whole)
        for title, field in shown.items():
            values = whole[field].astype(float).dropna() if len(whole) else []
            line[title] = estimate(values, f"mean and interval {field}", whole, sign="") if len(values) else ""
        lines.append(line)
    return table(lines, "method")
