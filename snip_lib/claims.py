"""Claims: what the paper says, what the rows say, and the verdict between them.

``claims.csv`` holds the criteria, committed before the rows they judge; ``paper.csv`` the published
numbers. Dense and pruned networks are paired by seed; "no loss" is an equivalence claim, so it needs
two one-sided tests, and several sparsities in one claim Holm's correction.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from .runs import DEFAULTS, Run, at_profile, read_rows, results_folder, rows_of, sweep

FOLDER = Path("results")  # beside the chapters, wherever the rows themselves go
RATES = (0.1, 0.03, 0.01)  # the protocol's learning rate, and where to go when it diverges
RATE_SEEDS = 5
SIGNIFICANCE = 0.05
NAMES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5-Caffe"}


def published() -> pd.DataFrame:
    """Return the paper's numbers: source, section, model, dataset, method, sparsity, quantity, value, sd."""
    return pd.read_csv(FOLDER / "paper.csv")


def criteria() -> pd.DataFrame:
    """Return the claims and their criteria, one a line, indexed by id."""
    return pd.read_csv(FOLDER / "claims.csv", index_col="id", dtype=str, keep_default_na=False)


# ------------------------------------------------------------------------------------ statistics


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval (Student's t); NaN ends below two values."""
    from scipy import stats

    values = pd.Series(list(values), dtype=float)
    mean, n = values.mean(), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf(0.975, n - 1) * values.std() / math.sqrt(n)
    return mean, mean - half, mean + half


def p_above(values: Iterable[float], bound: float) -> float:
    """Return the p-value of the one-sided t test that the mean lies above `bound`."""
    from scipy import stats

    values = pd.Series(list(values), dtype=float)
    if len(values) < 2:
        return 1.0
    if values.std() == 0:
        return 0.0 if values.mean() > bound else 1.0
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


# ---------------------------------------------------------------------------------- experiments


def stable_rate(run: Run, profile: str, get: Callable[[list[Run]], pd.DataFrame]) -> float:
    """Return the largest of 0.1, 0.03, 0.01 at which none of 5 dense seeds of `run` diverges.

    The rule for a protocol that diverges (claims L1, L2). `get` returns the rows of runs:
    `runs.rows_of`, or `collect` with its options, which trains what is missing.
    """
    for rate in RATES:
        dense = sweep(replace(run, sparsity=0.0, lr=rate), seed=range(RATE_SEEDS))
        if not get(at_profile(profile, dense))["diverged"].any():
            return rate
    raise ValueError(f"{run.model} on {run.dataset} diverges at every rate of {RATES}: no rate to train at.")


def paired_differences(rows: pd.DataFrame, sparsity: float) -> pd.Series:
    """Return test error of the pruned minus that of the dense network, in points, for each seed that has both."""
    settled = rows[~rows["diverged"].astype(bool)]
    errors = settled.pivot_table(index="seed", columns="sparsity", values="test_error")
    if sparsity not in errors or 0.0 not in errors:
        return pd.Series(dtype=float)
    return (errors[sparsity] - errors[0.0]).dropna()


def error_table(rows: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Return one line a sparsity: seeds, diverged runs, error, difference to dense, the paper's error.

    `rows` are of one model and data set, `paper` lines of `published()`. Errors are in percent, mean ±
    sample sd over the runs that did not diverge; differences in points, paired by seed, with their
    95 % interval.
    """
    lines = []
    for sparsity, group in rows.groupby("sparsity"):
        settled = group.loc[~group["diverged"].astype(bool), "test_error"]
        printed = paper[(paper["sparsity"] == sparsity) & (paper["quantity"] == "test_error")]["value"]
        mean, low, high = interval(paired_differences(rows, sparsity))
        ends = f" [{low:+.2f}, {high:+.2f}]" if low == low else ""  # no interval from one seed
        lines.append(
            {
                "sparsity %": f"{100 * sparsity:g}",
                "n": len(settled),
                "diverged": int(group["diverged"].sum()),
                "test error %": spread(settled),
                "pruned − dense": f"{mean:+.2f}{ends}" if sparsity and mean == mean else "",
                "paper": " / ".join(f"{v:.1f}" for v in printed.unique()),
            }
        )
    columns = ["sparsity %", "n", "diverged", "test error %", "pruned − dense", "paper"]
    return pd.DataFrame(lines, columns=columns).set_index("sparsity %")


def group_table(
    groups: dict[str, pd.DataFrame],
    *,
    dense: pd.DataFrame | None = None,
    paper: dict[str, str] | None = None,
    label: str = "method",
) -> pd.DataFrame:
    """Return one line a group of rows: seeds, diverged runs, error, difference to dense, the paper's number.

    Errors are in percent, mean ± sample sd over the runs that did not diverge; "pruned − dense" is in points,
    paired by seed, with its 95 % interval, if the rows of the `dense` network are given. `paper` is what the
    paper prints for a group. A group without rows is "not run yet". The index is called `label`.
    """
    lines = []
    for name, rows in groups.items():
        settled = rows[~rows["diverged"].astype(bool)]
        line = {label: name, "n": len(settled), "diverged": int(rows["diverged"].sum())}
        line["test error %"] = spread(settled["test_error"]) if len(rows) else "not run yet"
        if dense is not None:
            reference = dense[~dense["diverged"].astype(bool)].set_index("seed")["test_error"]
            values = (settled.set_index("seed")["test_error"] - reference).dropna()
            mean, low, high = interval(values)
            ends = f" [{low:+.2f}, {high:+.2f}]" if low == low else ""  # no interval from one seed
            line["pruned − dense"] = f"{mean:+.2f}{ends}" if mean == mean else ""
        if paper is not None:
            line["paper"] = paper.get(name, "")
        lines.append(line)
    return pd.DataFrame(lines).set_index(label)


def rate_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line a learning rate: how many dense runs diverged, and the error of the others."""
    lines = [
        {
            "learning rate": f"{rate:g}",
            "dense runs": len(group),
            "diverged": int(group["diverged"].sum()),
            "test error %": spread(group.loc[~group["diverged"].astype(bool), "test_error"]),
        }
        for rate, group in rows.groupby("lr", sort=False)
    ]
    return pd.DataFrame(lines, columns=["learning rate", "dense runs", "diverged", "test error %"]).set_index(
        "learning rate"
    )


def reporting_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by sparsity, the error at the last step and what two other ways to report it would give.

    *best validation*: the test error where the validation error was lowest; *best test*: the lowest
    test error of the last five checkpoints, as the released code reports; both in percent.
    """
    settled = rows[~rows["diverged"].astype(bool)]
    ways = {"test_error": "last step", "test_error_best_val": "best validation", "test_error_best5": "best test"}
    means = settled.groupby("sparsity")[list(ways)].mean().rename(columns=ways)
    means["last − best test"] = means["last step"] - means["best test"]
    means.index = [f"{100 * s:g}" for s in means.index]
    return means.rename_axis("sparsity %").map("{:.2f}".format)


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean number of weights kept per layer, of all biases, and the effective sparsity."""
    pruned = rows[rows["sparsity"] > 0]
    lines = [
        {layer.removesuffix(".weight"): n for layer, n in kept.items() if layer.endswith("weight")}
        | {"biases": sum(n for layer, n in kept.items() if not layer.endswith("weight"))}
        for kept in pruned.get("kept", [])
    ]
    means = pd.DataFrame(lines, index=pruned["sparsity"]).groupby(level=0).mean().round().astype(int)
    means["effective sparsity %"] = [f"{100 * s:.2f}" for s in pruned.groupby("sparsity")["effective_sparsity"].mean()]
    means.index = [f"{100 * s:g}" for s in means.index]
    return means.rename_axis("sparsity %")


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, by network, how many runs there are, their steps, seconds, `fingerprint` and device."""
    groups = rows.groupby("model", sort=False)
    table = pd.DataFrame(
        {
            "runs": groups.size(),
            "steps a run": groups["steps"].max(),
            "seconds a run (median)": groups["seconds"].median().round(0),
            "hours in all": (groups["seconds"].sum() / 3600).round(2),
            "fingerprint": [fingerprint(group) for _, group in groups],
            "device": groups["device"].agg(lambda names: ", ".join(sorted(set(names)))) if len(rows) else [],
        }
    )
    return table.rename_axis("network")


def fingerprint(rows: pd.DataFrame) -> str:
    """Return 8 hex digits that change with anything in any of the rows, so that a page is tied to them."""
    # Defaults do not count, so that a new field of `Run` leaves the fingerprints of old rows alone.
    known = [
        {name: v for name, v in row.items() if v is not None and v == v and v != DEFAULTS.get(name)}
        for row in rows.to_dict("records")
    ]
    text = "\n".join(sorted(json.dumps(row, sort_keys=True) for row in known))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def spread(values: pd.Series) -> str:
    """Return "mean ± sample sd" with two decimals."""
    if len(values) == 0:
        return "–"
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


# -------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """A claim judged: `verdict` is *reproduced*, *in part*, *not reproduced* or *not tested (why)*."""

    claim: str
    verdict: str
    statement: str
    evidence: str
    met: bool  # the data meet the criterion, whatever else holds the verdict back

    def _repr_markdown_(self) -> str:
        return f"**{self.claim} {self.verdict}:** {self.statement} *Evidence:* {self.evidence}."


@dataclass(frozen=True)
class Test:
    """One sparsity of a claim: seeds, the mean with its 95 % interval, and what the criterion says."""

    sparsity: float
    n: int
    mean: float
    low: float
    high: float
    p: float
    refuted: bool  # the interval lies wholly outside of what the claim allows


def _test(line: pd.Series, rows: pd.DataFrame, sparsity: float) -> Test:
    margin = float(line["margin"])
    if line["kind"] == "value":
        settled = rows[(rows["sparsity"] == sparsity) & ~rows["diverged"].astype(bool)]
        values, offset = settled["test_error"], float(line["paper"])
    else:
        values, offset = paired_differences(rows, sparsity), 0.0
    mean, low, high = interval(values)
    if line["kind"] == "better":
        p, refuted = p_above(-values, 0.0), low > 0
    else:
        p, refuted = p_within(values - offset, margin), low > offset + margin or high < offset - margin
    return Test(sparsity, len(values), mean, low, high, p, refuted)


def judge(claim: str, rows: pd.DataFrame, *, profile: str, baseline: bool = True) -> Verdict:
    """Judge one claim of ``claims.csv`` by rows of one profile, each model at one learning rate.

    Every sparsity of the claim is one test: *value*: the mean error lies within the margin around the
    paper's; *no_loss*: the paired difference to dense lies within the margin; *better*: it is below 0.
    A test is met if p < 0.05 after Holm's correction, refuted if the 95 % interval lies wholly outside.
    All met: reproduced; some: in part; none, and one refuted: not reproduced; else undecided, which is
    *not tested*. At most *in part*: fewer seeds than `min_n`, a diverged run, another profile than
    `paper`, and a dense network that does not agree with the paper's (`baseline` False).
    """
    line = criteria().loc[claim]
    rows = rows[(rows["model"] == line["model"]) & (rows["dataset"] == line["dataset"])]
    tests = [_test(line, rows, float(s)) for s in line["sparsities"].split()]
    fewest = min(t.n for t in tests)
    if profile == "smoke" or fewest < 2:
        why = "the smoke profile" if profile == "smoke" else "fewer than two seeds"
        return Verdict(claim, f"not tested ({why})", line["statement"], "no evidence", False)

    met = [p < SIGNIFICANCE for p in holm(t.p for t in tests)]
    dense = [0.0] if line["kind"] != "value" else []
    diverged = int(rows.loc[rows["sparsity"].isin([*dense, *(t.sparsity for t in tests)]), "diverged"].sum())
    limits = {
        f"only {fewest} seeds": fewest < int(line["min_n"]),
        f"{diverged} diverged runs": diverged > 0,
        f"the {profile} profile": profile != "paper",
        "a dense network that does not agree with the paper's": not baseline,
    }
    limits = [why for why, applies in limits.items() if applies]
    if all(met):
        verdict = "in part" if limits else "reproduced"
    elif any(met):
        verdict = "in part"
    elif any(t.refuted for t in tests):
        verdict = "not reproduced"
    else:
        verdict = "not tested (undecided, the intervals cross the margin)"

    words = {
        "value": f"test error {{:.2f}} % [{{:.2f}}, {{:.2f}}] against {line['paper']} ± {line['margin']}",
        "no_loss": f"pruned − dense {{:+.2f}} points [{{:+.2f}}, {{:+.2f}}], to lie within ±{line['margin']}",
        "better": "pruned − dense {:+.2f} points [{:+.2f}, {:+.2f}], to lie below 0",
    }[line["kind"]]
    worst = max(tests, key=lambda t: t.p)
    evidence = f"{words.format(worst.mean, worst.low, worst.high)} at {100 * worst.sparsity:g} %, n = {worst.n}"
    if len(tests) > 1:
        evidence = f"met at {sum(met)} of {len(tests)} sparsities, the weakest: {evidence}"
    if limits:
        evidence += f"; limited by {', '.join(limits)}"
    return Verdict(claim, verdict, line["statement"], evidence, all(met))


def judge_chapter(chapter: str, *, profile: str) -> list[Verdict]:
    """Judge every claim of a chapter by the rows there are, in the order of ``claims.csv``: dense networks first."""
    lines = criteria()
    lines = lines[(lines["chapter"] == chapter) & (lines["kind"] != "learning_rate")]
    rows = claimed_rows(chapter, profile)
    agrees, verdicts = {}, []
    for claim, line in lines.iterrows():
        if (
            line["kind"] not in ("value", "no_loss", "better")
            or line["fields"]
            or line["against"]
            or " " in line["model"]
        ):
            verdicts.append(Verdict(claim, "not tested (not run yet)", line["statement"], "no evidence", False))
            continue
        is_dense = line["kind"] == "value" and line["sparsities"] == "0"
        verdict = judge(claim, rows, profile=profile, baseline=is_dense or agrees.get(line["model"], True))
        if is_dense:
            agrees[line["model"]] = verdict.met
        verdicts.append(verdict)
    return verdicts


def claimed_rows(chapter: str, profile: str, *, seeds: int = 20) -> pd.DataFrame:
    """Return the rows there are of what the claims of a chapter are about, each model at its stable rate."""
    lines = criteria()
    lines = lines[(lines["chapter"] == chapter) & (lines["fields"] == "") & (lines["against"] == "")]
    lines = lines[~lines["model"].str.contains(" ")]
    found = [rows_of([])]
    for (model, dataset), group in lines.groupby(["model", "dataset"]):
        run = Run(model, dataset)
        run = replace(run, lr=stable_rate(run, profile, rows_of))
        sparsities = sorted({float(s) for text in group["sparsities"] for s in text.split()})
        found.append(rows_of(at_profile(profile, sweep(run, sparsity=sparsities, seed=range(seeds)))))
    return pd.concat(found, ignore_index=True)


def verdicts() -> list[Verdict]:
    """Judge every claim there is by the committed rows, chapter by chapter, at the best complete profile."""
    judged = []
    for chapter in criteria()["chapter"].unique():
        paper = judge_chapter(chapter, profile="paper")
        complete = not any(v.verdict.startswith("not tested") or "only" in v.evidence for v in paper)
        judged += paper if complete else judge_chapter(chapter, profile="short")
    return judged


def summary_markdown() -> str:
    """Return the verdicts as a Markdown table, each claim linked to its chapter, and what the rows cost."""
    chapters = criteria()["chapter"]
    lines = ["| | claim | verdict | evidence |", "|---|---|---|---|"]
    for v in verdicts():
        link = f"[{v.claim}](../notebooks/{chapters[v.claim]}.ipynb)"
        lines.append(f"| {link} | {v.statement} | **{v.verdict}** | {v.evidence} |")
    rows = pd.DataFrame(list(read_rows(results_folder()).values()), columns=["seconds", "device"])
    devices = ", ".join(f"{device} ({n})" for device, n in rows["device"].value_counts().items())
    hours = rows["seconds"].sum() / 3600
    cost = f"Cost so far: {len(rows)} trained networks, {hours:.1f} hours; runs by device: {devices}."
    return "\n".join([*lines, "", cost, ""])


def headline_markdown() -> str:
    """Return the verdicts in three lines, for the README."""
    judged = verdicts()
    names = ("reproduced", "in part", "not reproduced")
    lines = []
    for name in names:
        claims = [v for v in judged if v.verdict == name]
        what = "; ".join(f"{v.claim}: {v.statement.rstrip('.')}" for v in claims) or "none"
        lines.append(f"- **{name}** ({len(claims)} of {len(judged)}): {what}.")
    return "\n".join(lines) + "\n"
