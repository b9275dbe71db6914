"""Pages follow rows: every number of a table is computed here once more, and no row changes without its page."""

import copy
import csv
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from scipy import stats

from snip_lib import tables
from snip_lib.models import MODELS
from snip_lib.robustness import ATTACK, RADII
from snip_lib.runs import LEFT_OUT, Run, sweep

CHAPTER = "02_lenet_sweeps"
MIME = "application/vnd.snip.cells+json"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?")

# ------------------------------------------------------- every number, from the row files, with numpy


def mean_sd(values):
    """Return the mean, and from two values on the sample standard deviation; nothing of no value."""
    return [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else [*values]


def mean_interval(values, least=-np.inf, most=np.inf):
    """Return the mean, and from two values on the ends of its 95 % interval, of what can be; nothing of no value."""
    if len(values) < 2:
        return [*values]
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [np.mean(values), max(least, np.mean(values) - half), min(most, np.mean(values) + half)]


def pairs(groups):
    """Return [(our row, their row)] by seed."""
    theirs = {row["seed"]: row for row in groups[1]}
    assert len(theirs) == len(groups[1])
    return [(row, theirs[row["seed"]]) for row in groups[0] if row["seed"] in theirs]


def contrasts(rows):
    """Return, by seed, how much better the picture of a class goes with its own mean image than with the others'."""
    by_seed = {}
    for row in rows:
        rest = [r or 0.0 for r in row["class_correlations"]]
        own = rest.pop(row["score_class"])
        by_seed.setdefault(row["seed"], []).append(own - np.mean(rest))
    assert len({len(found) for found in by_seed.values()}) == 1  # all classes
    return [np.mean(found) for found in by_seed.values()]


def likeness(rows, what):
    """Return, by class scored and class compared, how the first layer's picture correlates with `what` of the class.

    What the last layer keeps of each output is itself such a matrix.
    """
    rows = sorted(rows, key=lambda row: row["score_class"])
    assert [row["score_class"] for row in rows] == list(range(10)) and len({row["pixels"] for row in rows}) == 1
    if what == "kept in fc3":
        return np.array([row["picture"]["fc3.weight"] for row in rows], dtype=float)
    pictures = np.array([row["picture"]["fc1.weight"] for row in rows], dtype=float)
    images = np.array([row["mean_image"] for row in rows], dtype=float)
    if what == "mean image when shuffled":
        pictures = np.random.default_rng(0).permuted(pictures, axis=1)
    elif what == "size of the mean input" and rows[0]["pixels"] != "raw":
        images = np.abs(images - np.mean(images))
    elif what == "what sets it apart":
        images = images - np.mean(images, axis=0)
    else:
        assert what in ("mean image", "size of the mean input")
    return np.array([[np.corrcoef(picture, image)[0, 1] for image in images] for picture in pictures])


def diagonal(how, matrix):
    """Return what `how` says of the diagonal of a matrix, line by line against the rest of the line."""
    own = [line[i] for i, line in enumerate(matrix)]
    rest = [np.delete(line, i) for i, line in enumerate(matrix)]
    match how:
        case "own":
            return [np.mean(own)]
        case "others":
            return [np.mean(rest)]
        case "own − others":
            return mean_interval(np.array(own) - [np.mean(others) for others in rest])
        case "own is best":
            return [(sum(a > max(others) for a, others in zip(own, rest, strict=True)), 0), (len(own), 0)]


def kept_where(rows, part):
    """Return the percentage of the 300 first-layer units that keep a pixel that is black in the mean image, or not."""
    assert part in ("black", "other")
    kept = [
        n
        for row in rows
        for n, grey in zip(row["picture"]["fc1.weight"], row["mean_image"], strict=True)
        if (grey == 0) == (part == "black")
    ]
    return 100 * np.mean(kept) / 300


def share_kept(rows, part):
    """Return the percentage that one draw of the weights keeps of a part: a layer, or one gate of a matrix of gates."""
    (row,) = rows
    gates = [name.split(".")[1] for name in row["gradient"] if name.startswith("gates.") and name.endswith(".weight")]
    name, parts = ("gates.weight", gates) if part in gates else (f"{part}.weight", [part])
    with torch.device("meta"):  # shapes without numbers
        size = dict(MODELS[row["model"]]((1, 28, 28), 10).named_parameters())[name].numel()
    counts = np.split(np.array(row["picture"][name]), len(parts))[parts.index(part)]
    return 100 * len(parts) * counts.sum() / size


def outputs_cut(rows):
    """Return how many outputs keep no connection at seed 0."""
    (picture,) = (row["picture"]["fc.weight"] for row in rows if row["seed"] == 0)
    return sum(n == 0 for n in picture)


DIGITS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # how often MNIST's training images show each


def bits_held(rows):
    """Return the bits that each connection holds of the labels of MNIST's 54,000 images that training sees."""
    kept = [sum(row["kept"].values()) or row["n_prunable"] for row in rows]  # a dense run says nothing by layer
    assert {row["dataset"] for row in rows} == {"mnist"} and len(set(kept)) == 1
    nats = 54_000 * (stats.entropy(DIGITS) - np.mean([row["train_loss"] for row in rows]))
    return nats / kept[0] / np.log(2)


def number_of_table1(row, printed):
    """Return the test error that Table 1 has for SNIP, or the dense network, at the sparsity of a row."""
    place = (row["model"], row["dataset"], row["sparsity"], "Table 1", "test_error")
    found = [
        float(line["value"])
        for line in printed
        if (line["model"], line["dataset"], float(line["sparsity"]), line["source"], line["quantity"]) == place
        and line["method"] in ("dense", "snip")
    ]
    assert len(found) == 1
    return found[0]


def share_closed(groups, printed, field="test_error"):
    """Return which share of the way from their mean error to the paper's the differences of our `field` close."""
    moved = np.mean([a[field] - b["test_error"] for a, b in pairs(groups)])
    return moved / (number_of_table1(groups[1][0], printed) - np.mean([row["test_error"] for row in groups[1]]))


def seeds_to_draw(rows, field, printed):
    """Return how many seeds it takes on average until an error, normally distributed, rounds to the paper's."""
    if len(rows) < 3:
        return "–"
    mean, sd = mean_sd([row[field] for row in rows])
    chance = stats.norm.cdf((number_of_table1(rows[0], printed) + 0.05 - mean) / sd)
    return f"{1 / chance:,.0f}" if chance > 1e-4 else "over 10,000"


def moved(ours, theirs):
    """Return the percentage of kept connections that are in another layer."""
    a, b = ([row["kept"][layer] for layer in sorted(row["kept"])] for row in (ours, theirs))
    return 50 * np.abs(np.subtract(a, b)).sum() / np.sum(a)


def cut_off(row):
    """Return whether a network is disconnected: no path of kept weights leads through it, or a layer keeps none."""
    if row.get("live_weights") is not None:
        return row["live_weights"] == 0
    cell = ("gates.", "candidate.")
    chain = [n for name, n in row["kept"].items() if name.endswith("weight") and not name.startswith(cell)]
    return row["effective_sparsity"] == 1 or 0 in chain


def loses_outputs(row):
    """Return whether a network has an output to which no path leads."""
    return row["dead_outputs"] > 0


def disconnected(groups, told=cut_off):
    """Return, of each group, how many networks are cut, of how many, and the binomial interval in percent."""
    found = []
    for rows in groups:
        cut = sum(map(told, rows))
        n = len(rows)  # Clopper and Pearson, by the beta distribution
        low = stats.beta.ppf(0.025, cut, n - cut + 1) if cut else 0.0
        high = stats.beta.ppf(0.975, cut + 1, n - cut) if cut < n else 1.0
        found += [cut, n, (100 * low, 1), (100 * high, 1)]
    return found


def stable_rate(groups):
    """Return the rate of the first group, if it has five dense runs of which none diverged, unlike in the others."""
    rates = [{row["lr"] for row in rows} for rows in groups]
    assert len(groups[0]) == 5 and not any(row["diverged"] for row in groups[0])
    assert all(any(row["diverged"] for row in rows) for rows in groups[1:])
    assert all(len(rate) == 1 for rate in rates) and len(groups) == sum(r >= min(rates[0]) for r in (0.1, 0.03, 0.01))
    return min(rates[0])


def fewest(groups):
    """Return the smallest number of seeds of one sparsity in any group."""
    seeds = [
        {row["seed"] for row in rows if row["sparsity"] == s} for rows in groups for s in {r["sparsity"] for r in rows}
    ]
    return min(map(len, seeds), default=0)


def fingerprint(rows):
    """Return the short hash of what the rows say beyond the defaults of a run."""
    defaults = {f.name: f.default for f in fields(Run) if f.default is not MISSING}

    def plain(value):
        return int(value) if isinstance(value, float) and value == int(value) else value

    told = [{k: plain(v) for k, v in row.items() if v is not None and v != defaults.get(k)} for row in rows]
    return hashlib.sha256("\n".join(sorted(json.dumps(d, sort_keys=True) for d in told)).encode()).hexdigest()[:8]


def recomputed(how, groups, printed=()):
    """Return what a cell should show: text, or numbers, each with its decimals (2 if it has none)."""
    if ", " in how:  # several things, one after the other; a dash is no number
        return [number for part in how.split(", ") for number in recomputed(part, groups) if number != "–"]
    rows = groups[0]
    how, _, share = how.partition(" after ")
    field = how.split()[-1]
    if share:  # not at the end, but after this share of the steps
        rows = [row | {field: dict(zip(*(row["curve"][k] for k in ("step", field)), strict=True))} for row in rows]
        rows = [row | {field: row[field][round(float(share) * row["steps"])]} for row in rows]
    values = [row[field] for row in rows if isinstance(row.get(field), int | float)]
    places = {"train_loss": 3, "steps": 0, "dead_units": 0}.get(field, 2)
    if how.startswith(("mean ± sd", "mean difference", "mean and interval")):
        for group in groups:  # one average never mixes runs that differ in more than their seed
            assert (
                len({tuple(row.get(f.name, f.default) for f in fields(Run) if f.name != "seed") for row in group}) <= 1
            )
    match how.split():
        case ["count"]:
            return [(len(rows), 0)]
        case ["pairs"]:
            return [(len(pairs(groups)), 0)]
        case ["mean", "difference", "of", "changes", _]:
            by_seed = [{row["seed"]: row[field] for row in group} for group in groups]  # ours: many, few; dense: same
            both = set.intersection(*map(set, by_seed))
            changes = [(a := by_seed)[0][s] - a[1][s] - (a[2][s] - a[3][s]) for s in sorted(both)]
            return mean_interval(changes, -200, 200)
        case ["diverged"]:
            return [(sum(row["diverged"] for row in rows), 0)]
        case ["fewest", "seeds"]:
            return [(fewest(groups), 0)]
        case ["mean", "±", "sd", "percent", part, "of", whole]:
            return [(v, 1) for v in mean_sd([100 * row[part] / row[whole] for row in rows])]
        case ["mean", "±", "sd", *whose, _]:
            assert whose == ["of", "all"] or not any(row["diverged"] for row in rows)
            return [(v, places) for v in mean_sd(values)] if values and len(values) == len(rows) else "–"
        case ["mean", "difference", _]:
            gaps, most = [a[field] - b[field] for a, b in pairs(groups)], 100 if field == "test_error" else np.inf
            return [(v, places) for v in mean_interval(gaps, -most, most)]
        case ["failed"]:
            return [(sum(row["diverged"] or cut_off(row) for row in rows), 0)]
        case ["median", "steps", "of", "scoring"]:
            scoring = [row["scoring_seconds"] for row in rows]
            a_step = [(row["seconds"] - s) / row["steps"] for row, s in zip(rows, scoring, strict=True)]
            return [(np.median(np.array(scoring) / a_step), 0)]
        case ["mean", "and", "interval", "test_error" | "train_loss"] if len(values) < len(rows):
            return "–"  # a run without a finite one has no place in a mean, and none is left out
        case ["mean", "and", "interval", _]:
            return [(v, places) for v in mean_interval(values, 0, np.inf if field == "train_loss" else 100)]
        case ["mean", "selection", "bias"]:
            return [np.mean([row["test_error"] for row in rows]) - np.mean([row["test_error_best5"] for row in rows])]
        case ["mean", "kept", "biases"]:
            return [(np.mean([sum(n for k, n in r["kept"].items() if k.endswith("bias")) for r in rows]), 0)]
        case ["mean", "kept", layer]:
            return [(np.mean([row["kept"][layer] for row in rows]), 0)]
        case ["mean", "percent", _]:
            return [100 * np.mean(values)]
        case ["mean" | "median" | "smallest" | "largest" as which, _]:
            value = {"mean": np.mean, "median": np.median, "smallest": min, "largest": max}[which](values)
            return [(value, places if "seconds" not in field else 3 if value < 10 else 0)]
        case ["hours", _]:
            return [np.sum(values) / 3600]
        case ["largest", "percent", part, "of", whole]:
            return [(100 * max(row[part] / row[whole] for row in rows), 3)]
        case ["equal", _]:
            return [(sum(a[field] == b[field] for a, b in pairs(groups)), 0), (len(pairs(groups)), 0)]
        case ["lower", _]:
            return [(sum(a[field] < b[field] for a, b in pairs(groups)), 0), (len(pairs(groups)), 0)]
        case ["least" | "largest" as which, "percent", "moved", "kept"]:
            return [{"least": min, "largest": max}[which](moved(a, b) for a, b in pairs(groups))]
        case ["contrast", "of", "class_correlations"]:
            return mean_interval(contrasts(rows))
        case ["own", "best", "class_correlations" | "input_correlations" as by]:
            looks = [[r or 0.0 for r in row[by]] for row in rows]
            owns = [look.pop(row["score_class"]) for look, row in zip(looks, rows, strict=True)]
            return [(sum(own > max(rest) for own, rest in zip(owns, looks, strict=True)), 0), (len(rows), 0)]
        case ["own" | "others", *_]:
            what, _, of = how.partition(" by ")
            return diagonal(what, likeness(rows, of))
        case ["hidden", "units", "alike"]:
            among = np.corrcoef([row["picture"]["fc2.weight"] for row in rows])
            return [np.mean(among[~np.eye(len(rows), dtype=bool)])]
        case [part, "kept", "%"]:
            return [(kept_where(rows, part), 1)]
        case ["correlation", "with", "mean_image"]:
            if not all(groups):
                return "–"
            ((ours,), (whole,)) = groups
            return [np.corrcoef(ours["picture"]["fc1.weight"], whole["mean_image"])[0, 1]]
        case ["gradient", part]:
            (name,) = (name for name in rows[0]["gradient"] if name.split(".")[-2:] == [part, "weight"])
            return f"{np.median([row['gradient'][name] for row in rows]):.3g}"
        case ["share", "kept", "of", part]:
            return f"{share_kept(rows, part):.2g}"
        case ["outputs", "cut"]:
            return [(outputs_cut(rows), 0)]
        case ["error", "at", "least"]:
            return [(10 * max(outputs_cut(rows) - 1, 0), 0)]
        case ["bits", "held"]:
            return [bits_held(rows)] if rows else "–"
        case ["mean", "paired", "closes"]:
            return [share_closed(groups, printed)] if pairs(groups) else "–"
        case ["mean", "paired", "closes", _]:
            return [share_closed(groups, printed, field)] if pairs(groups) else "–"
        case ["mean", "paired", _]:
            return [np.mean([a[field] - b[field] for a, b in pairs(groups)])] if pairs(groups) else "–"
        case ["seeds", "to", "draw", _]:
            return seeds_to_draw(rows, field, printed)
        case ["disconnected"] | ["losing", "outputs"]:
            told = cut_off if how == "disconnected" else loses_outputs
            return [v if isinstance(v, tuple) else (v, 0) for v in disconnected(groups, told)]
        case ["disconnected" | "losing" as what, *_, "by", "sparsity"]:
            told = cut_off if what == "disconnected" else loses_outputs
            found = {s: [row for row in rows if row["sparsity"] == s] for s in sorted({r["sparsity"] for r in rows})}
            also = recomputed(how, groups[1:]) if groups[1:] else []
            return [(n, 0) for by in found.values() for n in (sum(map(told, by)), len(by))] + also
        case ["stable", "rate"]:
            return f"{stable_rate(groups):g}"
        case ["names", _]:
            return ", ".join(sorted({row[field] for row in rows}))
        case ["fingerprint"]:
            return fingerprint(rows)
    raise AssertionError(f"no test knows how to compute {how!r}")


def not_of_lines(text, lines):
    """Return why a text is not made of the numbers of these lines of ``paper.csv``, each once, or nothing.

    A number of a line may be followed by that line's sparsity in percent, in brackets.
    """
    numbers, sparsities = re.sub(r"\([^)]*\)", "", text), re.findall(r"\(([\d.]+) %\)", text)
    shown, right = sorted(map(float, NUMBER.findall(numbers))), sorted(float(line["value"]) for line in lines)
    known = {round(100 * float(line["sparsity"]), 6) for line in lines}
    return "" if shown == right and {float(s) for s in sparsities} <= known else f"{text!r} is not {right}"


def of_the_paper(rows, printed, by_sparsity, method=""):
    """Return the paper's numbers for the network of some rows: all that it has, or SNIP's at their sparsity.

    The latter, too, where all rows are SNIP's at one sparsity. Only those of one method, if it is named.
    """
    kinds = {(row["method"], row["sparsity"]) for row in rows}
    by_sparsity = by_sparsity or (len(kinds) == 1 and "snip" in min(kinds) and min(kinds)[1] > 0)
    if method:
        return {float(line["value"]) for line in printed if line["method"] == method}
    for row in rows[:1]:
        printed = [line for line in printed if (line["model"], line["dataset"]) == (row["model"], row["dataset"])]
        if by_sparsity:
            ours = [line for line in printed if line["method"].startswith(("snip", "dense"))]
            printed = [line for line in ours if float(line["sparsity"]) == row["sparsity"]]
    numbers = {float(line[name]) for line in printed for name in ("value", "sd") if line[name]}
    return numbers if by_sparsity else numbers | {round(100 * float(line["sparsity"]), 6) for line in printed}


def wrong(text, how, groups, printed=(), by_sparsity=False):
    """Return why the text of a cell is not what its rows give, or nothing. `printed`: the lines of ``paper.csv``."""
    if re.fullmatch(r"paper[ \d]*", how) and not any(groups):
        return not_of_lines(text, [printed[int(number)] for number in how.split()[1:]])
    if how.startswith("paper"):
        allowed = of_the_paper(groups[0], printed, by_sparsity, how[6:])
        strange = [number for number in NUMBER.findall(text) if float(number) not in allowed]
        return f"{strange} is not in paper.csv" if strange else ""
    expected = recomputed(how, groups, printed)
    if isinstance(expected, str):
        return "" if text == expected else f"{text!r} is not {expected!r}"
    shown, right = NUMBER.findall(text), []
    for number in expected:
        value, places = number if isinstance(number, tuple) else (number, 2)
        away = np.floor(abs(value) * 10**places + 0.5 + 1e-6) / 10**places  # halves go away from 0
        right.append(f"{np.copysign(away, value):.{places}f}")
    same = len(shown) == len(right) and all(a.lstrip("+-") == b.lstrip("-") for a, b in zip(shown, right, strict=True))
    signs = all(float(a) == float(b) for a, b in zip(shown, right, strict=False))
    return "" if same and signs else f"{text!r} is not {right}"


def made(runs, failed=()):
    """Return invented rows of runs, no two numbers alike; those of the seeds `failed` diverged."""
    draw, rows = random.Random(0), []
    for run in runs:
        kept = {name: draw.randrange(1, 99) for name in ("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias")}
        row = {"key": run.key, **dataclasses.asdict(run), "diverged": run.seed in failed, "kept": kept}
        for name in ("test_error", "test_error_best_val", "test_error_best5", "train_loss"):
            row[name] = round(draw.uniform(1, 3) + 80 * row["diverged"], 4)
        row["curve"] = {"step": [run.steps // 2, run.steps], "train_loss": [draw.uniform(1, 3), row["train_loss"]]}
        row |= {"effective_sparsity": draw.uniform(run.sparsity, 1), "seconds": draw.uniform(5, 500) ** 2}
        row |= {"scoring_seconds": draw.uniform(0, 20), "dead_outputs": draw.randrange(3)}
        row["dead_units"] = draw.randrange(100)
        row |= {"attack": ATTACK, "attacked_images": 500, "attacked_right": draw.randrange(100, 500)}
        row |= {f"attacked_{norm}_{eps:g}": draw.uniform(0, 99) for norm, radii in RADII.items() for eps in radii}
        row |= {f"gradients_{norm}_{radii[-1]:g}": draw.uniform(0, 9) for norm, radii in RADII.items()}
        rows.append(row | {"device": draw.choice(["CPU", "GPU"])})
    return rows


def test_every_cell_of_every_kind_of_table_is_what_made_rows_give():
    """No table of the library is trusted to the chapters that happen to show it."""
    runs = sweep(Run("lenet300", "mnist"), sparsity=[0.0, 0.9, 0.95], seed=range(5))
    steps = sweep(Run("lenet300", "mnist", sparsity=0.9, rounds=7, steps=900), sparsity=[0.9, 0.95], seed=range(1, 6))[
        :-1
    ]
    masks = sweep(Run("lenet300", "mnist", steps=0, sparsity=0.9), seed=range(2))
    odd = sweep(Run("lenet300", "mnist", lr=0.07), sparsity=[0.9, 0.95], seed=range(3))
    rows = made([*odd, *runs, *steps, *masks, Run("lenet5", "mnist", lr=0.03)], failed=[3])
    rows[0]["train_loss"], rows[3]["live_weights"], rows[4]["live_weights"] = None, 0, 5  # not finite; cut off; not
    by_key, frame = {row["key"]: row for row in rows}, pd.DataFrame(rows)
    one, two = frame[frame["key"].isin([r.key for r in runs])], frame[frame["rounds"] == 7]
    longer = pd.DataFrame(made([dataclasses.replace(r, steps=999) for r in runs if r.seed < 4], failed=[2]))
    by_key |= {row["key"]: row for row in longer.to_dict("records")}
    deep = pd.DataFrame(made([dataclasses.replace(r, steps=998) for r in runs if r.seed < 2]))
    deep["kept"] = [{f"{layer}.weight": 7 * layer + i for layer in range(9)} for i in range(len(deep))]
    by_key |= {row["key"]: row for row in deep.to_dict("records")}
    methods = {"one": one[one["sparsity"] > 0], "two": two, "none": one.iloc[:0]}
    names = ("model", "dataset", "method", "sparsity", "quantity", "value", "sd")
    printed = [
        dict(zip(names, ("lenet300", "mnist", "snip", *line), strict=True))
        for line in (
            ("0.9", "test_error", "1.6", ""),
            ("0.9", "kept", "26661", ""),
            ("0.95", "test_error", "1.7", "0.1"),
        )
    ]
    paper = pd.DataFrame(printed).astype({"sparsity": float, "value": float})
    at = one[one["sparsity"] == 0.9]
    made_of = {
        "errors": tables.error_table(one, paper, paper[paper["quantity"] == "test_error"]),
        "groups": tables.group_table({"at 90": at}, also={"loss": "train_loss"}),
        "with failures": tables.group_table({"at 90": at, "two": two[two["sparsity"] == 0.9]}, dense=at, failed=True),
        "rates": tables.rate_table(frame[frame["sparsity"] == 0]),
        "lengths": tables.length_table(one, longer),
        "reports": tables.reporting_table(one),
        "layers": tables.layer_table(one),
        "many layers": tables.layer_table(deep),
        "cost": tables.cost_table(frame),
        "times": tables.time_table({"both": frame, "masks": frame[frame["steps"] == 0], "none": one.iloc[:0]}),
        "by sparsity": tables.by_sparsity(methods),
        "losses": tables.by_sparsity(methods, "train_loss"),
        "odd": tables.by_sparsity({"odd": frame[frame["lr"] == 0.07]}, "train_loss"),
        "scorings": tables.table([{"": "", "steps": tables.scoring_in_steps(g), "n": ""} for g in (one, two)], ""),
        "gains": tables.gains(methods, [("two", "one")]),
        "moved": tables.table([{"": "", "%": tables.moved_percent(at, g)} for g in (at, two[:5])], ""),
        "disconnected": tables.disconnection_table(methods),
        "losing outputs": tables.disconnection_table(methods, tables.loses_outputs),
        "half way": tables.table([{"": "", "at": tables.spread(at, "train_loss", s)} for s in (0.5, 1)], ""),
        **{norm: tables.attack_table(methods | {"two": two[two["sparsity"] == 0.9]}, norm) for norm in RADII},
    }
    made_of["l2"] = made_of["l2"].drop(index="one")  # of two sparsities: no chapter averages over them
    made_of["linf"] = made_of["linf"].drop(index="one")
    for name, table in made_of.items():
        cells = [value for line in table.to_numpy() for value in line if isinstance(value, tables.Cell)]
        assert len(cells) >= 2, name
        for value in cells:
            groups = [[by_key[key] for key in keys] for keys in value.keys]
            assert not wrong(value, value.how, groups, printed, by_sparsity=True), (name, value)

    def keys(rows):
        return tuple(rows["key"])

    whole = at[at["seed"] != 3]
    errors = made_of["errors"]
    assert errors.index.tolist() == ["0", "90", "95"] and errors["paper"].tolist() == ["", "1.6", "1.7"]
    assert errors["another reproduction"].tolist() == ["", "1.600", "1.700"]
    assert errors["n"].tolist() == ["4"] * 3 and errors["diverged"].tolist() == ["1"] * 3
    assert errors.loc["90", "diverged"].keys == (keys(at),) and errors.loc["90", "n"].keys == (keys(whole),)
    assert errors.loc["90", "test error %"].keys == (keys(whole),)
    dense = one[(one["sparsity"] == 0) & (one["seed"] != 3)]
    assert errors.loc["0", "pruned − dense"] == ""
    assert errors.loc["90", "pruned − dense"].keys == (keys(whole), keys(dense))
    assert made_of["reports"].loc["90", "last step"].keys == (keys(whole),)
    assert made_of["layers"].index.tolist() == ["90", "95"]
    assert made_of["layers"].loc["90", "fc1"].keys == (keys(at),)
    assert made_of["rates"].index.tolist() == ["0.1", "0.03"]
    assert made_of["cost"].index.tolist() == ["lenet300", "lenet300, only scored", "lenet5"]
    assert made_of["cost"]["steps a run"].tolist() == ["900 to 125000", "0", "125000"]
    trained = frame[(frame["model"] == "lenet300") & (frame["steps"] > 0)]
    assert made_of["cost"].loc["lenet300", "seconds a run (median)"].keys == (keys(trained),)
    assert made_of["times"]["steps"].tolist() == ["0 to 125000", "0", "not run yet"]
    assert made_of["by sparsity"].loc["two", "n"] == "4" and made_of["by sparsity"].loc["two", "failed"] == "2"
    assert made_of["by sparsity"].loc["one", "90 %"].keys == (keys(at),)  # failures count
    assert made_of["odd"].loc["odd", "failed"] == "1" and made_of["odd"].loc["odd", "90 %"] == "–"
    assert made_of["odd"].loc["odd", "95 %"].endswith("(1\u00a0failed)")
    assert "[" in made_of["odd"].loc["odd", "95 %"]
    both = two[(two["sparsity"] == 0.9) & two["seed"].isin(range(1, 5))], at[at["seed"].isin(range(1, 5))]
    assert made_of["gains"].loc["90", "two − one"].keys == tuple(map(keys, both))
    assert made_of["with failures"].loc["two", "pruned − dense"].keys == tuple(map(keys, both))
    assert made_of["with failures"].loc["at 90", "n"] == "5" and made_of["with failures"].loc["at 90", "failed"] == "1"
    assert made_of["l2"].loc["two", "n"].keys == (keys(two[(two["sparsity"] == 0.9) & (two["seed"] != 3)]),)
    assert made_of["disconnected"].loc["one", "90 %"].keys == (keys(at),)


class Lines(HTMLParser):
    """The text of an HTML table: `heads` and `labels`, the headings above and at the left, and `cells`."""

    def __init__(self, text):
        super().__init__()
        self.heads, self.labels, self.cells, self.target = [], [], [], None
        self.rows = self.heads
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.rows = self.labels if tag == "tbody" else self.rows
        if tag == "tr":
            self.rows.append([])
            self.cells += [[]] if self.rows is self.labels else []
        if tag in ("td", "th"):
            self.target = self.cells[-1] if tag == "td" else self.rows[-1]
            self.target.append("")

    def handle_endtag(self, tag):
        self.target = None if tag in ("td", "th") else self.target

    def handle_data(self, data):
        if self.target is not None:
            self.target[-1] += data


def lines_of(data):
    """Return what is shown of a table: the titles of its columns, its index's name, its labels and its cells."""
    if "text/html" in data:
        table = Lines(data["text/html"])
        width = len(table.cells[0]) if table.cells else 0
        titles = next(head[len(head) - width :] for head in table.heads if len(head) > width)  # no wider heading
        return titles, table.heads[-1][0], [label[-1] for label in table.labels], table.cells
    lines = [line.strip("| ").split(" | ") for line in data["text/markdown"].splitlines()]
    return lines[0], "", [line[0] for line in lines[2:]], lines[2:]


# Columns of tables with keys whose numbers have no row behind them: what stands in claims.csv, in paper.csv alone, and
# what is counted of a network. A table of a small live example has no keys at all. All these are compared with a new
# run of their page by nbval.
WITHOUT_ROWS = {
    *("claim", "criterion", "verdict", "quoted: error %", "quoted: at", "ours at", "its Δ", "paper: dense → pruned %"),
    *("paper: parameters", "ours: parameters", "sparsity", "κ", "bits to hold", "least loss"),
}


# A cell that calls one of these shows numbers of rows, each with its keys; other tables may be live.
OF_ROWS = re.compile(
    r"(claims\.(\w+_table|learning_rates)|tables\.(cost|error|group|layer|length|rate|reporting)_table)\("
)


def complaints(notebook, rows, printed):
    """Return what is wrong with the numbers in the tables of a chapter: one sentence each."""
    found = []
    for cell in notebook.cells:
        outputs = [output.get("data", {}) for output in cell.get("outputs", ())]
        makes = OF_ROWS.search(cell.source)
        makes = makes or "tables.table(" in cell.source and not any(MIME in data for data in outputs)
        for data in outputs:
            if MIME not in data:
                if makes and "text/html" in data:
                    found.append(f"{cell.id}: a table without keys")
                continue
            titles, index, labels, lines = lines_of(data)
            known = {}
            for entry in data[MIME]["cells"]:
                i, j, numbers, how = entry.split(" ", 3)
                groups = [data[MIME]["rows"][int(number)].split() for number in numbers.split(",")]
                known[int(i), int(j)] = how, groups
            for (i, j), text in numbered(lines):
                place = f"{cell.id}, {labels[i]}"
                if (i, j) not in known:
                    if titles[j] not in WITHOUT_ROWS and re.search(r"\d", text):
                        found.append(f"{place}: {text!r} has no keys")
                    continue
                how, groups = known[i, j]
                missing = [key for keys in groups for key in keys if key not in rows]
                if missing:
                    found.append(f"{place}: no row has the key {missing[0]}")
                    continue
                groups = [[rows[key] for key in keys] for keys in groups]
                apart = [abs(100 * row["sparsity"] - float(labels[i])) for row in groups[0] if index == "sparsity %"]
                if max(apart, default=0) > 1e-9:
                    found.append(f"{place}: rows of another sparsity")
                if why := wrong(text, how, groups, printed, index == "sparsity %"):
                    found.append(f"{place}: {why}")
            if set(known) - {place for place, _ in numbered(lines)}:
                found.append(f"{cell.id}: keys of a cell that is not shown")
    return found


def numbered(lines):
    """Yield ((line, column), text) of each cell."""
    for i, line in enumerate(lines):
        for j, text in enumerate(line):
            yield (i, j), text


@pytest.fixture(scope="module")
def committed_rows(root):
    """Every committed row, by its key."""
    lines = [line for path in (root / "notebooks/results").glob("*.jsonl") for line in path.read_text().splitlines()]
    rows = {row["key"]: {**LEFT_OUT, **row} for row in map(json.loads, lines)}
    for row in rows.values():  # ten points on the way, and the last five thousands
        of, last = row["steps"], row["steps"] // 1000
        points = {round(of * i / 10) for i in range(1, 11)} | {1000 * i for i in range(max(1, last - 4), last + 1)}
        row["curve"] = {"step": sorted(points - {0}), **row["curve"]}
    for row in rows.values():
        if isinstance(of := row.get("mean_image"), str):
            row["mean_image"] = rows[of]["mean_image"]  # the same picture, which stands there
    return rows


@pytest.fixture(scope="module")
def printed(root):
    """The paper's numbers, line by line."""
    with (root / "notebooks/results/paper.csv").open(newline="") as file:
        return list(csv.DictReader(file))


CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_every_number_of_a_table_is_what_its_rows_give(chapter, committed_rows, printed):
    """All but those of `WITHOUT_ROWS`, and of tables that no row is behind: a live example, or a network's sizes."""
    assert complaints(nbformat.read(chapter, as_version=4), committed_rows, printed) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_no_output_that_its_page_cannot_show(chapter):
    """The book does not warn of an unknown MIME type, for it would of the keys of tables; so this does."""
    outputs = [output for cell in nbformat.read(chapter, as_version=4).cells for output in cell.get("outputs", ())]
    shown = {"text/plain", "text/html", "text/markdown", "image/png"}
    for data in (output.get("data", {}) for output in outputs):
        assert set(data) <= shown | {MIME} and (MIME not in data or set(data) & {"text/html", "text/markdown"})


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_cell_with_a_figure_shows_nothing_else(chapter):
    """What is printed may stand there; but the book gives a table the figure's caption and name, too."""
    for cell in nbformat.read(chapter, as_version=4).cells:
        displayed = [output for output in cell.get("outputs", ()) if "data" in output]
        assert len(displayed) == 1 or "mystnb" not in cell.metadata, cell.id


def test_a_wrong_digit_or_a_missing_key_is_found(root, committed_rows, printed):
    """Plant every kind of fault in the tables of a committed chapter, one at a time: none goes unnoticed."""
    notebook, planted = nbformat.read(root / f"notebooks/{CHAPTER}.ipynb", as_version=4), 0
    draw = random.Random(0)

    def faulty(cell, output, change):
        nonlocal planted
        planted += 1
        only = nbformat.v4.new_notebook(cells=[copy.deepcopy(cell)])
        only.cells[0].outputs = [copy.deepcopy(output)]
        assert complaints(only, committed_rows, printed) == []
        change(only.cells[0].outputs[0]["data"])
        return complaints(only, committed_rows, printed)

    def another_digit(data):
        numbers = list(re.finditer(r"<td>[^<]*\d[^<]*</td>", data["text/html"]))
        start, end = draw.choice(numbers).span()
        place = draw.choice([i for i in range(start, end) if data["text/html"][i].isdigit()])
        digit = str((int(data["text/html"][place]) + draw.randint(1, 9)) % 10)
        data["text/html"] = data["text/html"][:place] + digit + data["text/html"][place + 1 :]

    def without_a_key(data):
        data[MIME]["rows"][-1] = data[MIME]["rows"][-1].partition(" ")[2]

    def with_an_unknown_key(data):
        data[MIME]["rows"][-1] = "0123456789ab" + data[MIME]["rows"][-1][12:]

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if MIME in output.get("data", {}):
                for _ in range(20):
                    assert faulty(cell, output, another_digit), cell.id
                assert faulty(cell, output, without_a_key), cell.id
                assert faulty(cell, output, with_an_unknown_key), cell.id
                assert faulty(cell, output, lambda data: data[MIME]["cells"].pop(0)), cell.id
                assert faulty(cell, output, lambda data: data.pop(MIME)), cell.id
    assert planted > 100


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_wrong_digit_is_found_in_every_kind_of_cell(chapter, committed_rows, printed):
    """Of each kind of number on a page, change every digit of one cell: no statistic lets one pass."""
    tried = {"paper"}  # this one lets any of the paper's numbers for a network pass
    for cell in nbformat.read(chapter, as_version=4).cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            _, index, _, lines = lines_of(data) if MIME in data else ([], "", [], [])
            shown = dict(numbered(lines))
            for entry in data.get(MIME, {}).get("cells", ()):
                i, j, numbers, how = entry.split(" ", 3)
                text = shown[int(i), int(j)]
                if how in tried or not re.search(r"\d", text):
                    continue
                tried.add(how)
                groups = [[committed_rows[k] for k in data[MIME]["rows"][int(n)].split()] for n in numbers.split(",")]
                assert not wrong(text, how, groups, printed, index == "sparsity %")
                for place in (i for i, letter in enumerate(text) if letter.isdigit()):
                    planted = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
                    assert wrong(planted, how, groups, printed, index == "sparsity %"), (how, planted)


# ------------------------------------------------------------------------------ pages follow rows


def texts(outputs):
    """Return what nbval compares of a cell's outputs: every text, no picture."""
    found = []
    for output in outputs:
        data = output.get("data", {}) if isinstance(output, dict) else output.data
        found += [str(data[kind]) for kind in ("text/plain", "text/markdown", "text/html") if kind in data]
    return found


def page(root):
    """Run the chapter's cells in this process and return the text outputs of each code cell."""
    main = sys.modules["__main__"]
    shell = InteractiveShell.instance()
    shell.reset(new_session=True)
    sys.modules["__main__"] = main  # the shell puts itself there, where a spawned process would look for ours
    plt.switch_backend("agg")
    shown = []
    for cell in nbformat.read(root / f"notebooks/{CHAPTER}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                shell.run_cell(cell.source).raise_error()
            shown.append([captured.stdout, *texts(captured.outputs)])
            plt.close("all")
    return shown


@pytest.fixture
def rows_folder(root, tmp_path, monkeypatch):
    """A copy of the committed rows that the chapter reads instead of them."""
    folder = tmp_path / "results"
    shutil.copytree(root / "notebooks/results", folder)
    monkeypatch.chdir(root / "notebooks")
    monkeypatch.setenv("SNIP_RESULTS", str(folder))
    return folder


def used_rows(folder):
    """Return the rows of the chapter's file: its page uses all of them that did not diverge."""
    lines = (folder / f"{CHAPTER}.jsonl").read_text().splitlines()
    return [{**LEFT_OUT, **json.loads(line)} for line in lines]


def rewrite(folder, rows):
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    (folder / f"{CHAPTER}.jsonl").write_text(text)


def test_changing_the_error_of_any_row_changes_the_page(root, rows_folder):
    committed = page(root)
    assert page(root) == committed
    rows = used_rows(rows_folder)
    for i in random.Random(len(rows)).sample([i for i, row in enumerate(rows) if not row["diverged"]], 4):
        error = rows[i]["test_error"]
        rows[i]["test_error"] = round(error + 0.01, 4)  # one image of 10,000
        rewrite(rows_folder, rows)
        assert page(root) != committed, rows[i]["key"]
        rows[i]["test_error"] = error
    rewrite(rows_folder, rows)
    assert page(root) == committed


def test_a_changed_row_makes_nbval_fail(root, rows_folder):
    rows = used_rows(rows_folder)
    rows[len(rows) // 2]["test_error"] += 0.01
    rewrite(rows_folder, rows)
    nbval = ["--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *nbval, root / f"notebooks/{CHAPTER}.ipynb"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1 and "Cell outputs differ" in done.stdout


def test_deleted_rows_are_named_by_the_page(root, rows_folder):
    def missing():
        said = "\n".join(text for cell in page(root) for text in cell)
        counts = re.findall(r"(\d+) of 260 runs have no row yet", said)
        return said, int(counts[0]) if counts else 0

    rows = used_rows(rows_folder)
    gone = [row for row in rows if row["model"] == "lenet300" and row["sparsity"] == 0.1 and row["seed"] in (3, 4, 7)]
    _, before = missing()
    rewrite(rows_folder, [row for row in rows if row not in gone])
    said, after = missing()
    assert {row["seed"] for row in gone} == {3, 4, 7} and after == before + 3  # of one length: the page's
    assert "lenet300 mnist snip 0.1, seeds 3-4, 7" in said


def test_without_any_row_the_page_still_says_so(root, rows_folder):
    rewrite(rows_folder, [])
    said = "\n".join(text for cell in page(root) for text in cell)
    assert "260 of 260 runs have no row yet" in said and "not tested (not run yet)" in said
    assert "reproduced:" not in said and "in part:" not in said
