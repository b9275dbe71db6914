"""Verdicts follow from rows and criteria, and are never better than their evidence."""

import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_rows import wrong

from snip_lib import claims, tables
from snip_lib.runs import Run, at_profile, read_rows, rows_of, sweep

HEADER = "id,section,chapter,kind,model,dataset,sparsities,fields,against,paper,margin,min_n,statement,decided\n"
NO_LOSS = "C3,5.1,02,no_loss,lenet300,mnist,0.5 0.9,,,,0.3,5,No loss.,\n"
DENSE = "C1,5.2,02,value,lenet300,mnist,0,,,1.7,0.3,5,The dense network.,\n"
BETTER = "C9,5.2,02,better,lenet300,mnist,0.9,,,,0,5,Better than dense.,\n"


class World:
    """A folder of criteria and rows, in place of the committed ones."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = []

    def criteria(self, *lines):
        (self.folder / "claims.csv").write_text(HEADER + "".join(lines))

    def add(self, run, *, profile="paper", **columns):
        """Give `run` a row a seed, in place of those it has: a column is one value, or a list of one a seed."""
        n = max([len(v) for v in columns.values() if isinstance(v, list)], default=5)
        seeds = at_profile(profile, sweep(run, seed=range(20)))
        self.rows = [row for row in self.rows if row["key"] not in {one.key for one in seeds}]
        for seed, one in enumerate(seeds[:n]):
            told = {name: v[seed] if isinstance(v, list) else v for name, v in columns.items()}
            row = {"key": one.key, **dataclasses.asdict(one), "diverged": False, "time": "2026-12-01T00:00:00Z", **told}
            self.rows.append(row)
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def errors(self, by_sparsity, model="lenet300", **more):
        """Give a network on MNIST its test errors: sparsity -> one a seed."""
        run = Run(model, "mnist")
        for sparsity, errors in by_sparsity.items():
            self.add(dataclasses.replace(run, sparsity=sparsity), test_error=errors, **more)

    def judge(self, claim="C3", profile="paper"):
        """Judge a claim, and compute what it says once more from its rows, with other code."""
        verdict = claims.judge(claims.criteria().loc[claim], profile, claims.finder())
        rows = {row["key"]: row for row in self.rows}
        for test in (test for test in verdict.tests if test.n):
            assert not wrong(test.said, test.said.how, [[rows[key] for key in keys] for keys in test.said.keys])
        return verdict


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Return an empty `World` that the library takes for the committed one."""
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path))
    made = World(tmp_path)
    made.criteria(NO_LOSS)
    return made


# ------------------------------------------------------------------------------------ statistics

errors = st.lists(st.floats(0, 10, width=32), min_size=3, max_size=20).filter(lambda v: np.std(v) > 1e-3)


@given(errors)
def test_the_interval_is_students(values):
    mean, low, high = claims.interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), expected.low, expected.high), abs=1e-6)


@given(errors, st.floats(0.01, 5))
def test_within_the_margin_means_that_the_90_percent_interval_lies_inside(values, margin):
    """Two one-sided tests at 5 % are met exactly if the 90 % interval lies within the margin."""
    inner = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    inside = -margin < inner.low and inner.high < margin
    p = claims.p_within(pd.Series(values), margin)
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == inside


def test_one_value_proves_nothing_and_equal_ones_prove_what_they_are():
    assert claims.p_above([5.0], 0) == claims.p_above([], 0) == 1
    assert claims.p_above([0.3] * 3, 0.2) == 0 and claims.p_above([0.3] * 3, 0.3) == 1
    assert claims.p_above([0.9] * 13, 0.9) == 1 and claims.p_within([0.1] * 6, 0.1) == 1  # their sd is 1e-17, not 0


def test_what_is_missing_counts_nowhere_in_an_interval():
    assert claims.interval([0.1, math.nan, 0.2, 0.3]) == claims.interval([0.1, 0.2, 0.3])


def test_holm_on_a_worked_example():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values):
    corrected = claims.holm(p_values)
    assert all(c >= p for c, p in zip(corrected, p_values, strict=True)) and max(corrected) <= 1
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(corrected)[order], np.array(corrected)[order][1:], strict=False))


@given(st.lists(st.decimals(0, 100, places=2), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_mean_is_printed_in_one_way_whatever_the_order_of_its_rows(values, order):
    """Half away from zero of the exact mean, as on paper; never what the last bits of a float happen to say."""
    exact = sum(map(Fraction, values)) / len(values)
    hundredths = int(exact * 100 + Fraction(1, 2))
    shuffled = order.sample(values, len(values))
    for same in (values, shuffled):
        means = pd.Series([float(v) for v in same]).mean(), sum(float(v) for v in same) / len(same)
        assert {tables.digits(mean) for mean in means} == {f"{Decimal(hundredths) / 100:.2f}"}


def test_digits_of_the_example_of_the_rule():
    assert [tables.digits(v) for v in (1.575, 1.5749999999999997, 1.5750000000000002, -1.575)] == [
        *["1.58"] * 3,
        "-1.58",
    ]
    assert tables.digits(0.25, sign="+") == "+0.25" and tables.digits(float("nan")) == "–"
    assert tables.digits(2.5, 0) == "3" and tables.digits(123456789.0, 0) == "123456789"


# -------------------------------------------------------------------------------------- verdicts

STEADY = [1.60, 1.62, 1.58, 1.61, 1.59, 1.60]


def plus(values, difference):
    """Return the values with a difference added that wobbles a little from seed to seed."""
    return [round(v + difference + 0.01 * (-1) ** i, 4) for i, v in enumerate(values)]


def test_no_loss_is_reproduced_where_every_difference_lies_within_the_margin(world):
    world.errors({0.0: STEADY, 0.5: plus(STEADY, 0.0), 0.9: plus(STEADY, 0.2)})
    verdict = world.judge()
    assert verdict.verdict == "reproduced" and verdict.met and verdict.profile == "paper"
    assert "difference +0.20 [" in verdict.evidence and "at 90 %" in verdict.evidence and "n = 6" in verdict.evidence


def test_a_clear_loss_is_not_reproduced_and_a_loss_at_one_sparsity_only_in_part(world):
    world.errors({0.0: STEADY, 0.5: plus(STEADY, 0.5), 0.9: plus(STEADY, 2.0)})
    assert world.judge().verdict == "not reproduced"
    world.errors({0.5: plus(STEADY, 0.0)})
    assert world.judge().verdict == "in part"


def test_an_absent_difference_is_not_a_proof(world):
    """Noise so large that nothing differs significantly does not make "no loss" true."""
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    world.errors({0.0: STEADY, 0.5: noisy, 0.9: noisy})
    verdict = world.judge()
    assert verdict.verdict.startswith("undecided (neither") and not verdict.met


def test_seeds_are_paired(world):
    """A spread over seeds that dense and pruned share does not hide that they agree."""
    spread = [1.0, 3.0, 1.5, 2.5, 2.0, 4.0]
    world.errors({0.0: spread, 0.5: plus(spread, 0.1), 0.9: plus(spread, 0.1)})
    assert world.judge().verdict == "reproduced"
    shuffled = plus(spread, 0.1)[::-1]
    world.errors({0.5: shuffled, 0.9: shuffled})
    assert world.judge().verdict != "reproduced"


def test_a_group_of_two_runs_is_not_paired():
    twice = pd.DataFrame({"seed": [0, 0], "test_error": [1.0, 2.0]})
    with pytest.raises(ValueError, match="one row a seed"):
        tables.paired(twice, twice.iloc[:1])


def test_the_short_profile_and_too_few_seeds_hold_a_verdict_back(world):
    world.errors({s: plus(STEADY, 0.0) for s in (0.0, 0.5, 0.9)}, profile="short")
    held = world.judge(profile="short")
    assert held.verdict == "in part" and held.met and "limited by the short profile" in held.evidence
    world.errors({s: plus(STEADY, 0.0)[:4] for s in (0.0, 0.5, 0.9)})
    held = world.judge()
    assert held.verdict == "in part" and "limited by only 4 seeds" in held.evidence
    world.errors({s: plus(STEADY, 0.0) for s in (0.0, 0.5, 0.9)})
    assert world.judge().verdict == "reproduced"


def test_a_diverged_run_is_counted_and_never_averaged(world):
    failed = [*[False] * 6, True]
    world.errors({0.0: [*STEADY, 90.2]}, diverged=failed)
    world.errors({s: [*plus(STEADY, 0.0), 1.6] for s in (0.5, 0.9)})
    verdict = world.judge()
    assert verdict.verdict == "in part" and "2 diverged runs" in verdict.evidence and "n = 6" in verdict.evidence
    assert world.judge().limits == ("2 diverged runs",)  # one group of dense networks, in two tests
    table = tables.error_table(pd.DataFrame(world.rows), pd.DataFrame({"sparsity": [], "quantity": [], "value": []}))
    assert list(table["diverged"]) == ["1", "0", "0"] and table.loc["0", "test error %"].startswith("1.60")


def test_where_every_run_diverged_there_are_rows_and_too_few_of_them_to_judge(world):
    world.criteria(DENSE.replace("mnist,0,", "mnist,0.9,"))
    world.errors({0.9: [90.0] * 5}, diverged=True)
    assert world.judge("C1").verdict == "not tested (too few seeds)"


def test_without_rows_nothing_is_claimed(world):
    world.criteria(DENSE, NO_LOSS)
    for verdict in claims.judge_chapter("02", profile="paper"):
        assert verdict.verdict == "not tested (not run yet)" and not verdict.met
    world.errors({0.0: STEADY})
    assert world.judge("C1").verdict == "reproduced"
    assert world.judge().verdict == "not tested (not run yet)"
    world.errors({0.5: STEADY})
    assert world.judge().verdict == "not tested (too few seeds in 1 of 2 tests)"
    assert world.judge(profile="smoke").verdict == "not tested (the smoke profile)"


def test_a_claim_that_another_one_replaces_is_not_judged_though_it_has_rows(world):
    world.criteria(DENSE, DENSE.replace("C1", "C9").rstrip("\n") + "replaced by C1\n")
    world.errors({0.0: STEADY})
    assert world.judge("C1").verdict == "reproduced"
    replaced = world.judge("C9")
    assert replaced.verdict == "not tested (replaced by C1)" and replaced.reason == "replaced" and not replaced.met
    assert replaced.evidence == "no evidence" and not replaced.tests  # on no page
    (world.folder / "paper.csv").write_text("source,model,dataset,method,sparsity,quantity,value\n")
    (shown,) = claims.claim_table([replaced], "02").to_dict("records")
    assert shown["ours"] == "–" and shown["verdict"] == "**not tested (replaced by C1)**"


def test_a_claim_that_is_not_tested_has_a_reason_and_no_other_has_one(world):
    world.criteria(NO_LOSS.replace("0.5 0.9", "0.9"))
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    cases = [(noisy[:0], "not run yet"), (noisy[:1], "too few seeds"), (noisy, "undecided")]
    cases += [(STEADY, ""), (STEADY[:4], ""), (plus(STEADY, 1), "")]
    for pruned, reason in cases:
        world.errors({0.0: STEADY, 0.9: pruned})
        verdict = world.judge()
        assert verdict.reason == reason, verdict
        assert (verdict.verdict in claims.WORDS) == (reason == ""), verdict
        word = "undecided (" if reason == "undecided" else f"not tested ({reason}"
        assert not reason or verdict.verdict.startswith(word), verdict
    assert world.judge(profile="smoke").reason == "other"


def test_a_value_lies_within_the_margin_around_the_papers(world):
    world.criteria(DENSE)
    for shift, verdict in ((0.0, "reproduced"), (0.3, "reproduced"), (0.5, "not reproduced"), (-0.5, "not reproduced")):
        world.errors({0.0: [e + shift for e in STEADY]})
        assert world.judge("C1").verdict == verdict, shift
    world.errors({0.0: [0.2, 3.1, 1.9, 0.3, 2.8, 1.9]})
    assert world.judge("C1").verdict.startswith("undecided (neither")


def test_better_needs_a_difference_below_zero(world):
    world.criteria(BETTER)
    for shift, verdict in ((-0.2, "reproduced"), (0.2, "not reproduced"), (0.0, "undecided (neither")):
        world.errors({0.0: STEADY, 0.9: plus(STEADY, shift)})
        assert world.judge("C9").verdict.startswith(verdict), shift
    world.criteria(BETTER.replace(",0,5,", ",0.5,5,"))  # or below minus a margin
    for shift, verdict in ((-0.7, "reproduced"), (-0.3, "not reproduced"), (-0.5, "undecided (neither")):
        world.errors({0.0: STEADY, 0.9: plus(STEADY, shift)})
        assert world.judge("C9").verdict.startswith(verdict), shift


@pytest.mark.parametrize(
    ("kind", "edge", "beyond"),
    [("no_loss", 0.3, 1), ("no_loss", -0.3, -1), ("no_worse", 0.3, 1), ("better", -0.3, 1), ("worse", 0.3, -1)],
)
def test_a_claim_is_refuted_by_its_whole_interval_and_not_by_the_mean(world, kind, edge, beyond):
    """A mean that misses the margin by less than the interval is wide leaves the claim open."""
    world.criteria(NO_LOSS.replace("no_loss", kind).replace("0.5 0.9", "0.9"))
    for missed, verdict in ((0.005, "undecided (neither"), (0.5, "not reproduced")):
        world.errors({0.0: STEADY, 0.9: plus(STEADY, edge + missed * beyond)})
        assert world.judge().verdict.startswith(verdict), missed


@pytest.mark.parametrize("beyond", [1, -1])
def test_a_value_is_refuted_by_its_whole_interval_and_not_by_the_mean(world, beyond):
    world.criteria(DENSE)
    for missed, verdict in ((0.005, "undecided (neither"), (0.5, "not reproduced")):
        world.errors({0.0: [1.7 + e - 1.6 + beyond * (0.3 + missed) for e in STEADY]})
        assert world.judge("C1").verdict.startswith(verdict), missed


SINGLE = {  # kinds that judge every seed by itself, with a row that meets the criterion
    "cost": ("", {"scoring_seconds": 0.5, "seconds": 100.0}, {}),
    "same_mask": ("rounds=1", {"mask_sha": "a"}, {"mask_sha": "a"}),
    "other_mask": ("rounds=1", {"kept": {"a.weight": 1, "b.weight": 9}}, {"kept": {"a.weight": 9, "b.weight": 1}}),
    "same_layers": ("rounds=1", {"kept": {"a.weight": 5, "b.weight": 5}}, {"kept": {"a.weight": 5, "b.weight": 5}}),
    "fits": ("", {"train_loss": 0.001}, {}),
    "does_not_fit": ("", {"train_loss": 2.0}, {"train_loss": 0.01}),
}


@pytest.mark.parametrize("kind", [k for k in claims.KINDS if k not in claims.POOLED])  # those count classes and masks
def test_one_seed_judges_only_what_is_said_of_every_seed_and_two_judge_the_rest(world, kind):
    against, ours, theirs = SINGLE.get(kind, ("rounds=1", {}, {}))
    world.criteria(f"X1,5,03,{kind},lenet300,mnist,0.9,rounds=7,{against},1.6,0.05,5,So it is.,\n")
    shift = {"value": 0, "no_loss": 0, "no_worse": 0, "better": -1}.get(kind, 1)
    for n, verdict in ((1, "in part" if kind in SINGLE else "not tested (too few seeds)"), (2, "in part")):
        other = SHOT if against else dataclasses.replace(SHOT, sparsity=0.0)
        judged = dict.fromkeys(("test_error", "train_loss", "mean_correlation"), 1.6)  # what a kind may look at
        world.add(other, **{name: [v] * n for name, v in (judged | theirs).items()})
        world.add(STEPS, **{name: [v] * n for name, v in (judged | ours).items()})
        if kind not in SINGLE:
            world.add(STEPS, **dict.fromkeys(judged, [1.6 + shift, 1.601 + shift][:n]))
        assert (world.judge("X1").verdict, world.judge("X1").n) == (verdict, n)


def test_several_tests_of_one_claim_are_corrected_by_holm(world):
    """A difference that convinces where it is the only one does not where it is one of two."""
    errors = [round(e - 0.08 + 0.1 * w, 4) for e, w in zip(STEADY, (-1, 1, -1, 1, 0, 0), strict=True)]
    world.errors({0.0: STEADY, 0.5: errors, 0.9: errors})
    world.criteria(BETTER, BETTER.replace("C9", "C90").replace("0.9,", "0.5 0.9,"))
    assert 0.025 < world.judge("C9").tests[0].p < 0.05
    assert world.judge("C9").verdict == "reproduced" and not world.judge("C90").met


SHOT, STEPS = Run("lenet300", "mnist", sparsity=0.9), Run("lenet300", "mnist", sparsity=0.9, rounds=7)


def compared(kind, margin, **columns):
    """Return a criterion of SNIP in seven rounds against one shot."""
    return f"X1,5,09,{kind},lenet300,mnist,0.9,rounds=7,rounds=1,,{margin},5,Some way is {kind}.,\n"


def test_no_worse_allows_a_difference_below_the_margin_however_low(world):
    world.criteria(compared("no_worse", 0.3))
    world.add(SHOT, test_error=STEADY)
    cases = ((0.2, "reproduced"), (-5, "reproduced"), (0.5, "not reproduced"), (0.3, "undecided (neither"))
    for shift, verdict in cases:
        world.add(STEPS, test_error=plus(STEADY, shift))
        assert world.judge("X1").verdict.startswith(verdict), shift


def test_worse_needs_a_difference_above_the_margin(world):
    world.criteria(compared("worse", 10))
    world.add(SHOT, test_error=STEADY)
    for shift, verdict in ((12, "reproduced"), (1, "not reproduced"), (10, "undecided (neither")):
        world.add(STEPS, test_error=plus(STEADY, shift))
        assert world.judge("X1").verdict.startswith(verdict), shift


def test_ways_are_compared_with_their_failures(world):
    """Of two ways to prune, one that fails in some seeds must not look better for it; against dense it is left out."""
    world.criteria(compared("better", 0), BETTER)
    world.add(SHOT, test_error=STEADY)
    fails = {"test_error": [*plus(STEADY, -0.1)[:4], 88.65, 88.65], "diverged": [*[False] * 4, True, True]}
    world.add(STEPS, **fails)
    assert world.judge("X1").n == 6 and not world.judge("X1").met
    world.add(SHOT, test_error=88.65, diverged=True)
    world.add(STEPS, test_error=[80.0] * 5)
    assert world.judge("X1").verdict == "reproduced"
    world.add(Run("lenet300", "mnist"), test_error=STEADY)
    world.add(SHOT, **fails)
    assert world.judge("C9").n == 4 and "2 diverged runs" in world.judge("C9").evidence


def test_differs_is_about_the_training_loss_in_either_direction(world):
    world.criteria(compared("differs", 0.05))
    losses = [0.50, 0.52, 0.48, 0.51, 0.49]
    world.add(SHOT, train_loss=losses, test_error=90.0)
    cases = ((0.2, "reproduced"), (-0.2, "reproduced"), (0.0, "not reproduced"))
    cases += ((0.05, "undecided (neither"), (-0.05, "undecided (neither"))
    for shift, verdict in cases:
        world.add(STEPS, train_loss=plus(losses, shift), test_error=90.0)
        assert world.judge("X1").verdict.startswith(verdict), shift
    world.add(STEPS, train_loss=plus(losses, 0.2), test_error=90.0, diverged=[True, *[False] * 4])
    held = world.judge("X1")
    assert held.n == 4 and held.verdict == "in part" and "1 diverged run" in held.evidence


def test_a_difference_in_either_direction_is_tested_on_both_sides(world):
    world.criteria(compared("differs", 0))
    losses, others = [0.50, 0.52, 0.48, 0.51, 0.49], [0.53, 0.51, 0.52, 0.50, 0.53]
    world.add(SHOT, train_loss=losses, test_error=90.0)
    world.add(STEPS, train_loss=others, test_error=90.0)
    assert world.judge("X1").tests[0].p == pytest.approx(stats.ttest_rel(losses, others).pvalue)


def test_cost_holds_in_every_run(world):
    world.criteria("X1,5,03,cost,lenet300,mnist,0.9,,,,0.01,5,It costs nothing.,\n")
    world.add(SHOT, scoring_seconds=[0.5] * 5, seconds=100.0, test_error=STEADY[0])
    verdict = world.judge("X1")
    assert verdict.verdict == "reproduced" and "scoring takes at most 0.500 %" in verdict.evidence
    world.add(SHOT, scoring_seconds=[*[0.5] * 4, 1.0], seconds=100.0, test_error=STEADY[0])
    assert world.judge("X1").verdict == "not reproduced"
    world.add(SHOT, scoring_seconds=[0.5] * 5, seconds=100.0, test_error=STEADY[0], replicas=5)
    assert "trained together" in world.judge("X1").verdict


def test_rows_that_were_there_before_a_criterion_about_them_alone_do_not_judge_it(world, monkeypatch):
    world.criteria("X1,5,03,cost,lenet300,mnist,0.9,,,,0.01,5,It costs nothing.,\n")
    monkeypatch.setitem(claims.SINCE, "X1", "2026-12-02T00:00:00Z")
    assert world.judge("X1").verdict == "not tested (not run yet)"
    world.add(SHOT, scoring_seconds=[0.5] * 5, seconds=100.0)
    assert world.judge("X1").verdict == "not tested (not run yet; rows older than the criterion do not count)"
    world.add(SHOT, scoring_seconds=[0.5] * 5, seconds=100.0, time="2026-12-02T00:00:00Z")
    assert world.judge("X1").verdict == "reproduced"


MASKS = "X1,3,03,{kind},lenet300,mnist,0.95,steps=0 rescale=8,steps=0 rescale=1,,{margin},5,Masks.,\n"
SCORED = Run("lenet300", "mnist", sparsity=0.95, steps=0)
RESCALED = dataclasses.replace(SCORED, rescale=8.0)


def test_same_mask_means_every_bit_for_every_seed(world):
    world.criteria(MASKS.format(kind="same_mask", margin=""))
    names = [f"mask {seed}" for seed in range(5)]
    world.add(SCORED, mask_sha=names)
    world.add(RESCALED, mask_sha=names)
    verdict = world.judge("X1")
    assert verdict.verdict == "reproduced" and "5 of 5 seeds" in verdict.evidence and verdict.profile == "own"
    world.add(RESCALED, mask_sha=[*names[:4], "another"])
    assert world.judge("X1").verdict == "not reproduced"


def test_other_mask_counts_what_changes_layer(world):
    world.criteria(MASKS.format(kind="other_mask", margin=0.1))
    world.add(SCORED, kept=[{"a.weight": 60, "b.weight": 40}] * 5)
    world.add(RESCALED, kept=[{"a.weight": 49, "b.weight": 51}] * 5)
    verdict = world.judge("X1")
    assert verdict.verdict == "reproduced" and "at least 11.00 %" in verdict.evidence
    world.add(RESCALED, kept=[*[{"a.weight": 49, "b.weight": 51}] * 4, {"a.weight": 50, "b.weight": 50}])
    assert world.judge("X1").verdict == "not reproduced"  # a tenth is not more than a tenth


def test_same_layers_is_what_other_mask_denies(world):
    """Of both at one margin exactly one holds where all seeds are on one side of it; on the margin neither does."""
    lines = MASKS.format(kind="same_layers", margin=0.1), MASKS.format(kind="other_mask", margin=0.1)
    world.criteria(lines[0], lines[1].replace("X1", "X2"))
    same = [{"a.weight": 60, "b.weight": 40}] * 5
    world.add(SCORED, kept=same)
    for first, verdicts in ((51, ["reproduced", "not reproduced"]), (50, ["not reproduced"] * 2)):
        world.add(RESCALED, kept=[*same[:4], {"a.weight": first, "b.weight": 100 - first}])
        assert [world.judge(claim).verdict for claim in ("X1", "X2")] == verdicts
    world.add(RESCALED, kept=[{"a.weight": 51, "b.weight": 49}] * 5)
    assert "at most 9.00 %" in world.judge("X1").evidence


def test_a_chapter_away_from_its_book_is_told_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (claims.criteria, claims.published):
        with pytest.raises(FileNotFoundError, match="a chapter runs in the folder `notebooks` of a clone"):
            read()


@pytest.mark.parametrize(("turn", "verdict"), [(0, "in part"), (1, "not reproduced"), (None, "undecided (neither")])
def test_follows_class_asks_whether_the_mask_looks_like_its_own_class(world, turn, verdict):
    """The mask of each class looks like its own mean image, like another class's, or like any, by chance."""
    draw = np.random.default_rng(0)
    world.criteria("X1,5.4,05,follows_class,lenet300,mnist,0.9,steps=0 score_class=0|1|2|3|4|5,,,0,5,They do.,\n")
    for c in range(6):
        looks = draw.normal(0, 0.1, (4 + (c == 5), 6))  # of a fifth seed there is one class, too few
        if turn is not None:
            looks[:, (c + turn) % 6] += 0.5
        world.add(dataclasses.replace(SCORED, sparsity=0.9, score_class=c), class_correlations=looks.tolist())
    judged = world.judge("X1")
    assert judged.verdict.startswith(verdict) and judged.n == 4  # seeds: the classes of a seed are one result


TEN = "0.9,steps=0 score_class=0|1|2|3|4|5|6|7|8|9"
NAMED_BY = {
    "class_correlations": f"X1,5.4,05,names_class,lenet300,mnist,{TEN},,,0.9,5,It tells.,\n",
    "input_correlations": f"X1,5.4,05,names_input,lenet300,mnist,{TEN},,,0.9,5,It tells.,\n",
}


@pytest.mark.parametrize("by", NAMED_BY)
@pytest.mark.parametrize(("turned", "verdict"), [(0, "reproduced"), (1, "undecided (neither"), (3, "not reproduced")])
def test_names_class_asks_how_often_the_own_class_fits_best(world, turned, verdict, by):
    """Of ten classes all look like themselves, or a tenth or more of them like another one, differently by seed."""
    world.criteria(NAMED_BY[by])
    for c in range(10):
        looks = np.full((5, 10), 0.1)
        for seed in range(5):
            wrong = c < turned + (turned and seed % 2)
            looks[seed, (c + wrong) % 10] = 0.5
        world.add(dataclasses.replace(SCORED, sparsity=0.9, score_class=c), **{by: looks.tolist()})
    judged = world.judge("X1")
    assert judged.verdict.startswith(verdict) and judged.n == 5
    assert judged.tests[0].said == f"{50 - 5 * turned - 2 * bool(turned)} of 50 masks"


@pytest.mark.parametrize(("gain", "verdict"), [(0.3, "reproduced"), (0.1, "undecided (neither"), (0.0, "not repr")])
def test_nears_mean_asks_for_a_gain_above_the_margin(world, gain, verdict):
    fields = "steps=0 score_examples=100,score_examples=1"
    world.criteria(f"X1,5.5,06,nears_mean,lenet300,mnist,0.9,{fields},,0.1,5,It nears the mean.,\n")
    few, jitter = np.array([0.2, 0.3, 0.4, 0.5, 0.6]), np.array([-0.02, 0.02, 0.0, -0.01, 0.01])
    for n, looks in ((1, few), (100, few + gain + jitter)):
        run = dataclasses.replace(SCORED, sparsity=0.9, score_examples=n)
        world.add(run, mean_correlation=looks.tolist())
    judged = world.judge("X1")
    assert judged.verdict.startswith(verdict) and judged.n == 5


def test_a_mask_without_any_likeness_counts_as_one_of_no_likeness(world):
    world.criteria("X1,5.4,05,follows_class,lenet300,mnist,0.9,steps=0 score_class=0|1,,,0,2,They do.,\n")
    for c, looks in enumerate(([0.5, 0.1], [None, None])):
        world.add(dataclasses.replace(SCORED, sparsity=0.9, score_class=c), class_correlations=[looks, [0.3, 0.3]])
    (test,) = claims.tests_of(claims.criteria().loc["X1"], "paper", claims.finder())
    assert test.n == 2 and test.said.startswith("+0.10 [")  # of 0.4 and 0 at one seed, 0 and 0 at the other


def test_fits_asks_every_seed(world):
    world.criteria("X1,5.6,07,fits,lenet5,mnist,0 0.99,steps=60000 decay=1.0 weight_decay=0,,,0.05,3,It fits.,\n")
    run = Run("lenet5", "mnist", steps=60_000, decay=1.0, weight_decay=0.0)
    world.add(run, train_loss=[0.01, 0.02, 0.03])
    world.add(dataclasses.replace(run, sparsity=0.99), train_loss=[0.01])
    held = world.judge("X1", profile="short")  # its own length: the profile changes nothing
    assert held.verdict == "in part" and held.evidence.endswith("limited by only 1 seed") and held.profile == "own"
    world.add(dataclasses.replace(run, sparsity=0.99), train_loss=[0.01, 0.02, 0.03])
    assert world.judge("X1").verdict == "reproduced"
    world.add(dataclasses.replace(run, sparsity=0.99), train_loss=[0.01, 0.02, 0.04])
    assert "training loss at most 0.040" in world.judge("X1").evidence  # the worst of those that are met
    world.add(dataclasses.replace(run, sparsity=0.99), train_loss=[0.01, 0.02, 0.05])
    assert world.judge("X1").verdict == "in part"
    world.add(run, train_loss=[0.01, 0.02, 0.06])
    assert world.judge("X1").verdict == "not reproduced"


def test_a_network_does_not_fit_only_where_the_dense_one_does(world):
    world.criteria("X1,5.6,07,does_not_fit,lenet5,mnist,0.99,steps=60000 random_labels=true,,,1.0,3,It does not.,\n")
    dense = Run("lenet5", "mnist", steps=60_000, random_labels=True)
    pruned = dataclasses.replace(dense, sparsity=0.99)
    world.add(pruned, train_loss=[2.1, 2.2, 2.0])
    assert world.judge("X1").verdict == "not tested (the dense network is not run yet)"
    world.add(dense, train_loss=[0.05, 0.1])  # one seed that ends at 0.1 is enough
    assert world.judge("X1").verdict == "not tested (too short, the dense network does not fit either)"
    world.add(dense, train_loss=[0.05, 0.02])
    assert world.judge("X1").n == 2 and world.judge("X1").verdict == "in part"  # the third seed has no dense one
    world.add(dense, train_loss=[0.05, 0.02, 0.01])
    assert world.judge("X1").verdict == "reproduced"
    world.add(pruned, train_loss=[2.1, 2.2, 0.9])
    assert world.judge("X1").verdict == "not reproduced"


DISCONNECTS = "X1,S,09,disconnects,lenet300,mnist,0.99 0.999,steps=0 rounds=7,steps=0 rounds=1,,0,20,It does.,\n"


@pytest.mark.parametrize(
    ("one_shot", "in_steps", "verdict"),
    [
        (12, 2, "reproduced"),
        (0, 0, "not reproduced"),  # one shot never does it
        (2, 12, "not reproduced"),  # small steps do it more often
        (12, 11, "undecided (neither"),
    ],
)
def test_disconnects_compares_how_often(world, one_shot, in_steps, verdict):
    world.criteria(DISCONNECTS)
    whole, empty = {"a.weight": 5, "b.weight": 5, "b.bias": 0}, {"a.weight": 10, "b.weight": 0, "b.bias": 0}
    for rounds, cut in ((1, one_shot), (7, in_steps)):
        for sparsity in (0.99, 0.999):
            run = dataclasses.replace(SCORED, sparsity=sparsity, rounds=rounds)
            live = [0] * (cut // 2) + [None] * (cut - cut // 2) + [9] * (20 - cut)  # older rows: an empty layer
            kept = [whole] * (cut // 2) + [empty] * (cut - cut // 2) + [whole] * (20 - cut)
            world.add(run, effective_sparsity=0.99, live_weights=live, kept=kept)
    judged = world.judge("X1")
    assert judged.verdict.startswith(verdict) and judged.n == 20
    only_one_shot, only_in_steps = max(0, one_shot - in_steps), max(0, in_steps - one_shot)  # seeds, not masks
    assert judged.tests[0].p == pytest.approx(1.0 if only_in_steps else 0.5**only_one_shot)
    assert judged.tests[0].said == f"{in_steps} of 20, {in_steps} of 20 against {one_shot} of 20, {one_shot} of 20"


@pytest.mark.parametrize(("one_shot", "in_steps", "verdict"), [(12, 2, "reproduced"), (0, 4, "not reproduced")])
def test_outputs_count_that_are_cut_off_alone(world, one_shot, in_steps, verdict):
    """Networks that are whole otherwise; rows older than the field say nothing, for or against."""
    world.criteria(DISCONNECTS.replace(",disconnects,", ",cuts_outputs,"))
    for rounds, cut in ((1, one_shot), (7, in_steps)):
        for sparsity in (0.99, 0.999):
            run = dataclasses.replace(SCORED, sparsity=sparsity, rounds=rounds)
            outputs = [3] * cut + [0] * (20 - cut) + [None] * 5
            world.add(run, effective_sparsity=0.99, live_weights=9, kept=[{"a.weight": 5}] * 25, dead_outputs=outputs)
    judged = world.judge("X1")
    assert judged.verdict == verdict and judged.n == 20
    assert judged.tests[0].said == f"{in_steps} of 20, {in_steps} of 20 against {one_shot} of 20, {one_shot} of 20"


def test_disconnection_is_as_well_known_as_at_the_sparsity_with_fewest_masks(world):
    world.criteria(DISCONNECTS)
    for rounds, sparsity, n in ((1, 0.99, 20), (7, 0.99, 20), (1, 0.999, 20), (7, 0.999, 12)):
        run = dataclasses.replace(SCORED, sparsity=sparsity, rounds=rounds)
        world.add(run, effective_sparsity=[1.0 if rounds == 1 else 0.99] * n, kept=[{"a.weight": 5}] * n)
    judged = world.judge("X1")
    assert judged.n == 12 and judged.met and judged.limits == ("only 12 seeds",)


def test_masks_of_one_seed_are_one_witness_of_disconnection(world):
    """Two seeds that are cut at two sparsities are two, not four; and with few seeds "none" refutes nothing."""
    world.criteria(DISCONNECTS.replace(",0,20,", ",0,5,"))
    for rounds, cut in ((1, 2), (7, 0)):
        for sparsity in (0.99, 0.999):
            run = dataclasses.replace(SCORED, sparsity=sparsity, rounds=rounds)
            world.add(
                run, effective_sparsity=0.99, live_weights=[0] * cut + [9] * (5 - cut), kept=[{"a.weight": 5}] * 5
            )
    judged = world.judge("X1")
    assert judged.tests[0].p == 0.25 and judged.verdict.startswith("undecided")


@pytest.mark.parametrize(("n", "verdict"), [(4, "undecided"), (5, "not reproduced")])
def test_that_nothing_is_disconnected_refutes_with_as_many_seeds_as_the_claim_needs(world, n, verdict):
    world.criteria(DISCONNECTS.replace(",0,20,", ",0,5,"))
    for rounds, sparsity in itertools.product((1, 7), (0.99, 0.999)):
        run = dataclasses.replace(SCORED, sparsity=sparsity, rounds=rounds)
        world.add(run, effective_sparsity=0.99, live_weights=[9] * n, kept=[{"a.weight": 5}] * n)
    assert world.judge("X1").verdict.startswith(verdict)


def test_every_kind_has_a_test_here():
    """Each kind of claim is judged in some test above in more than one way."""
    assert set(claims.KINDS) == {
        *("value", "no_loss", "no_worse", "better", "worse", "differs", "cost", "same_mask", "other_mask"),
        *("same_layers", "follows_class", "fits", "does_not_fit", "disconnects"),
        *("cuts_outputs", "names_class", "names_input", "nears_mean"),
    }
    above = Path(__file__).read_text(encoding="utf-8").partition("def test_every_kind_has_a_test_here")[0]
    for kind in claims.KINDS:  # a line of criteria, or a part of one
        assert re.search(rf',{kind},|compared\("{kind}"|kind="{kind}"|",{kind},"', above), kind


# ---------------------------------------------------------------------------- baselines, profiles


def test_a_pruned_claim_is_limited_where_the_dense_network_disagrees(world):
    other = "C20,5.5,06,no_loss,lenet300,mnist,0.9,,score_examples=10000,,0.3,5,One batch is enough.,\n"
    adam = "C34,5.5,06,better,lenet300,mnist,0.9,optimizer=adam lr=0.001 init=vs_h,init=vs_x,,0,5,VS-H is best.,\n"
    world.criteria(DENSE, NO_LOSS, other, adam)
    off = [e + 1 for e in STEADY]
    world.errors({s: plus(off, 0.0) for s in (0.0, 0.5, 0.9)})
    world.add(dataclasses.replace(SHOT, score_examples=10_000), test_error=off)
    run = dataclasses.replace(SHOT, optimizer="adam", lr=0.001)
    world.add(run, test_error=off)
    world.add(dataclasses.replace(run, init="vs_h"), test_error=plus(off, -0.2))
    dense, *pruned, apart = claims.verdicts()
    assert dense.verdict == "not reproduced" and dense.limits == ()  # it is not its own baseline
    for verdict in pruned:  # in other chapters too, where the same dense network is its start
        assert verdict.verdict == "in part" and verdict.met and "dense network not shown to agree" in verdict.evidence
    assert apart.verdict == "reproduced"  # the paper has no number for its dense network
    world.errors({s: plus(STEADY, 0.0) for s in (0.0, 0.5, 0.9)})
    assert world.judge().verdict == "reproduced"


def test_a_dense_network_must_be_shown_to_agree_by_the_seeds_that_settled(world):
    """Noise does not show it; a run that diverged is counted, and no reason to say that the others disagree."""
    world.criteria(DENSE, NO_LOSS)
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    world.errors({s: plus(noisy, 0.0) for s in (0.0, 0.5, 0.9)})
    assert world.judge("C1").verdict.startswith("undecided (neither")
    assert world.judge().limits == ("a dense network not shown to agree with the paper's",) and world.judge().met
    world.errors({s: [*STEADY, 90.0] for s in (0.0, 0.5, 0.9)}, diverged=[*[False] * 6, True])
    assert world.judge().limits == ("4 diverged runs",)


def test_no_loss_with_a_number_of_the_paper_has_a_baseline_of_its_own(world):
    world.criteria("C25,5.3,04,no_loss,lstm_s,mnist,0.95,,,1.88,1.0,5,It loses little.,\n")
    for shift, verdict in ((0.0, "reproduced"), (3.0, "in part")):
        world.errors({s: plus(STEADY, shift) for s in (0.0, 0.95)}, "lstm_s")
        assert world.judge("C25").verdict == verdict


def test_each_claim_is_judged_at_its_own_best_profile(world):
    world.criteria(DENSE, NO_LOSS)
    world.errors(dict.fromkeys((0.0, 0.5, 0.9), STEADY), profile="short")
    assert [v.profile for v in claims.verdicts()] == ["short", "short"]
    world.errors(dict.fromkeys((0.0, 0.5, 0.9), STEADY[:2]))
    assert [v.profile for v in claims.verdicts()] == ["short", "short"]
    world.errors({0.0: STEADY, 0.5: STEADY})
    assert [(v.profile, v.n) for v in claims.verdicts()] == [("paper", 6), ("short", 6)]
    world.errors({0.9: STEADY[:5]})
    assert [(v.profile, v.n) for v in claims.verdicts()] == [("paper", 6), ("paper", 5)]
    world.errors({0.9: [e + 9 for e in STEADY]}, profile="short")  # no average mixes two profiles
    assert claims.verdicts()[1].verdict == "reproduced"


def test_where_neither_profile_has_the_seeds_the_one_with_more_judges(world):
    world.criteria(DENSE)
    for n_short, n_paper, profile in ((3, 2, "short"), (3, 3, "paper"), (2, 4, "paper"), (0, 2, "paper")):
        world.rows = []
        world.errors({0.0: STEADY[:n_short]}, profile="short")
        world.errors({0.0: STEADY[:n_paper]})
        (verdict,) = claims.judge_chapter("02", profile="best")
        assert (
            (verdict.profile, verdict.n)
            == (profile, max(n_short, n_paper))
            == (claims.verdicts()[0].profile, verdict.n)
        )


def test_the_weakest_of_equal_tests_is_one_that_is_refuted():
    tests = [claims.Test(5, 1.0, refuted, tables.cell("1", "count")) for refuted in (False, True, False)]
    assert claims._weakest(tests) is tests[1]


def test_each_test_of_a_claim_is_met_refuted_open_or_not_run(world):
    world.criteria(NO_LOSS.replace("0.5 0.9", "0.5 0.8 0.9 0.95"))
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    world.errors({0.0: STEADY, 0.5: STEADY, 0.8: noisy, 0.9: plus(STEADY, 2.0)})
    table = claims.test_table(world.judge())
    assert list(table["criterion"]) == ["met", "open", "refuted", ""] and list(table["n"]) == ["6", "6", "6", "0"]
    assert list(table["ours"])[3] == "not run yet"


# ------------------------------------------------------------------------- from a claim to its runs


def runs_of(line, profile="paper"):
    """Return [(words, our run, their run)] of one line of criteria, where there is no row."""
    line = pd.read_csv(io.StringIO(HEADER + line), index_col="id", dtype=str, keep_default_na=False).iloc[0]
    return list(claims.claimed_runs(line, profile, lambda runs: pd.DataFrame({"diverged": []})))


def test_models_alternatives_and_sparsities_are_tests_of_their_own(world):
    line = "C34,5,06,no_loss,lenet300 lenet5,mnist,0.5 0.9,lr=0.001 init=rn|tn init_sd=0.1,init=vs_x|vs_h,,0.3,5,X.,\n"
    shown = {"rn": "RN", "tn": "TN", "vs_x": "VS-X", "vs_h": "VS-H"}
    found = runs_of(line)
    assert len(found) == len({words for words, *_ in found}) == 2 * 2 * 2 * 2
    expected = itertools.product(["lenet300", "lenet5"], ["rn", "tn"], ["vs_x", "vs_h"], [0.5, 0.9])
    for (words, ours, theirs), (model, init, other, sparsity) in zip(found, expected, strict=True):
        assert ours == Run(model, "mnist", sparsity=sparsity, lr=0.001, init=init, init_sd=0.1)
        assert theirs == dataclasses.replace(ours, init=other)
        assert words == f"{claims.NAMES[model]}, init {shown[init]} against {shown[other]}, at {100 * sparsity:g} %"


def test_constants_of_batch_norm_are_told_by_what_they_are(world):
    line = "C47,4,03,same_layers,alexnet_s,cifar10,0.9,batch_norm=tensorflow|torch steps=0,rounds=7,,0.01,5,X.,\n"
    words = [f"batch norm eps {eps}, at 90 %" for eps in ("0.001", "1e-05")]
    assert [where for where, *_ in runs_of(line)] == words


def test_without_a_comparator_the_dense_network_of_the_same_run_is_it(world):
    ((_, ours, theirs),) = runs_of("X,5,06,no_loss,lenet300,mnist,0.9,init=vs_h rounds=7,,,0.3,5,X.,\n")
    assert theirs == Run("lenet300", "mnist", init="vs_h") and ours.rounds == 7
    ((_, ours, theirs),) = runs_of("X,5,06,value,lenet300,mnist,0.9,,,1.6,0.3,5,X.,\n")
    assert theirs is None and ours == Run("lenet300", "mnist", sparsity=0.9)


def test_long_runs_are_scaled_and_a_claim_that_states_less_is_not(world):
    line = "X,5,03,no_worse,lenet300,mnist,0.9,,steps=250000 delay=125000 rounds=5 every=25000,,0.3,5,X.,\n"
    ((_, ours, theirs),) = runs_of(line, "short")
    assert (ours.steps, theirs.steps, theirs.delay, theirs.every) == (12_500, 25_000, 12_500, 2_500)
    ((_, ours, _),) = runs_of("X,5,04,no_loss,vgg_d,cifar10,0.9,steps=150000 decay_every=30000,,,1,5,X.,\n", "short")
    assert (ours.steps, ours.decay_every) == (15_000, 3_000)
    for steps in (0, 60_000):
        ((_, ours, theirs),) = runs_of(f"X,5,07,no_loss,lenet5,mnist,0.9,steps={steps},rounds=7,,1,5,X.,\n", "short")
        assert (ours.steps, theirs.steps) == (steps, steps) and ours.decay_every == 25_000


def test_runs_trained_by_sgd_have_the_stable_rate_of_their_model(world):
    rate = "L1,5,02,learning_rate,lenet5,mnist,0,,,,,5,The rule.,\n"
    claim = "X,5,06,better,lenet5,mnist,0.9,{fields},rounds=7,,0,5,X.,\n"
    world.criteria(rate, claim.format(fields=""))
    world.add(Run("lenet5", "mnist"), test_error=90.0, diverged=True)
    find = claims.finder()
    cases = (("", 0.03), ("lr=0.1", 0.1), ("optimizer=adam lr=0.001", 0.001), ("optimizer=adam", 0.1), ("steps=0", 0.1))
    for fields, lr in cases:
        world.criteria(rate, claim.format(fields=fields))
        for _, ours, theirs in claims.claimed_runs(claims.criteria().loc["X"], "paper", find):
            assert ours.lr == theirs.lr == lr, fields


def test_the_stable_rate_is_that_of_the_profile_the_data_set_and_the_fields_of_its_line(world):
    """A rate that fails at one length, on one data set or with one batch size says nothing of another."""
    run = Run("lenet5", "mnist", batch_size=128)
    world.criteria(
        "L1,5,02,learning_rate,lenet5,mnist,0,batch_size=128,,,,5,The rule.,\n",
        "L2,5,02,learning_rate,lenet5,fashion_mnist,0,batch_size=64,,,,5,The rule.,\n",
        *(f"X{i},5,06,better,lenet5,{d},0.9,,rounds=7,,0,5,X.,\n" for i, d in enumerate(("mnist", "fashion_mnist"))),
    )
    world.add(run, profile="short", test_error=90.0, diverged=[*[False] * 4, True])
    find = claims.finder()
    for profile, claim, lr in (("short", "X0", 0.03), ("paper", "X0", 0.1), ("short", "X1", 0.1)):
        for _, ours, theirs in claims.claimed_runs(claims.criteria().loc[claim], profile, find):
            assert ours.lr == theirs.lr == lr, (profile, claim)
    world.add(dataclasses.replace(run, dataset="fashion_mnist", batch_size=64), test_error=90.0, diverged=True)
    rates = [r.lr for _, r, _ in claims.claimed_runs(claims.criteria().loc["X1"], "paper", claims.finder())]
    assert rates == [0.03]


SPARSITIES = (0.0, 0.5, 0.9)
SWEEP = sweep(Run("lenet300", "mnist"), sparsity=SPARSITIES, seed=range(20))


def best(runs=SWEEP, profile="best", **more):
    return claims.best_profile(profile, runs, claims.finder(), **more)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4))
def test_the_best_profile_is_the_papers_where_every_group_has_five_seeds_or_as_many_as_short(counts):
    groups = {s / 10: n for s, n in enumerate(counts)}
    runs = sweep(Run("lenet300", "mnist", optimizer="adam"), sparsity=groups, seed=range(20))

    def find(asked):
        return [r for r in asked if r.seed < groups[r.sparsity][r.steps == 125_000]]

    complete = all(many >= 5 or 0 < many >= few for few, many in counts)
    assert claims.best_profile("best", runs, find) == ("paper" if complete else "short")
    assert claims.best_profile("best", [*runs, *runs[::-1]], find) == ("paper" if complete else "short")


def test_one_group_without_long_runs_keeps_the_whole_experiment_short(world):
    assert best() == "short"
    world.errors(dict.fromkeys(SPARSITIES, STEADY), profile="short")
    for sparsity in SPARSITIES:
        assert best() == "short"
        world.errors({sparsity: STEADY[:5]})
    assert best() == "paper"
    assert best([*SWEEP, *sweep(STEPS, seed=range(20))]) == "short"  # neither length has them
    world.errors({0.9: STEADY[:4]})
    assert best() == "short"
    world.errors({0.9: STEADY[:4]}, profile="short")
    assert best() == "paper"


def test_the_best_of_a_definite_profile_is_that_profile_and_only_that_one_trains(world):
    for profile in ("smoke", "short", "paper"):
        assert best(profile=profile) == best(profile=profile, train_missing=True) == profile
    with pytest.raises(ValueError, match='To train, choose a definite profile, "smoke", "short" or "paper"'):
        best(train_missing=True)
    with pytest.raises(ValueError, match="Unknown profile 'best'"):
        at_profile("best", SWEEP)


def test_an_experiment_never_mixes_profiles_and_each_profile_has_its_own_rate(world):
    run = Run("lenet5", "mnist", sparsity=0.9)
    own = [dataclasses.replace(run, **fields) for fields in ({"lr": 0.01}, {"optimizer": "adam"}, {"steps": 0})]
    dense = dataclasses.replace(run, sparsity=0.0)
    world.add(dense, profile="short", diverged=True)
    for one, (lr, profile) in itertools.product((dense, run), ((0.03, "short"), (0.1, "paper"))):
        world.add(dataclasses.replace(one, lr=lr), profile=profile)
    for profile, lr, steps in (("short", 0.03, 12_500), ("paper", 0.1, 125_000)):
        at = claims.at_rate(profile, [dense, run], claims.finder())
        assert {(r.lr, r.steps) for r in at} == {(lr, steps)}
        assert claims.at_rate(profile, own, claims.finder()) == at_profile(profile, own)
    assert best([dense, run]) == "paper"


@pytest.mark.parametrize("text", ["colour=red", "rounds", "rounds=", "rounds=one", "structured=yes"])
def test_a_field_that_no_run_has_is_refused(text):
    with pytest.raises(ValueError, match=f"claims.csv: '{text}' should be name=value, a field of Run"):
        claims.settings(text)


def test_the_stable_rate_is_the_largest_at_which_no_dense_seed_diverges():
    asked = []

    def get(runs):
        asked.append({r.lr for r in runs} | {r.sparsity for r in runs} | {len(runs)})
        return pd.DataFrame({"diverged": [r.lr > 0.05 and r.seed == 4 for r in runs]})

    assert claims.stable_rate(Run("lenet5", "mnist", sparsity=0.9), "paper", get) == 0.03
    assert asked == [{0.1, 0.0, 5}, {0.03, 0.0, 5}]
    with pytest.raises(ValueError, match="lenet5 on mnist diverges at every rate"):
        claims.stable_rate(Run("lenet5", "mnist"), "paper", lambda runs: pd.DataFrame({"diverged": [True]}))


def test_a_fingerprint_changes_with_any_value_and_not_with_the_order(world):
    world.errors({0.0: STEADY, 0.5: STEADY})
    frame = pd.DataFrame(world.rows)
    same = frame.iloc[::-1].assign(empty=None, recipe=Run("lenet300", "mnist").recipe)
    assert tables.fingerprint(same) == tables.fingerprint(frame)
    for column in ("test_error", "seed", "key", "diverged"):
        changed = frame.astype({column: object})
        changed.loc[3, column] = "another"
        assert tables.fingerprint(changed) != tables.fingerprint(frame), column


# --------------------------------------------------------------------------- what is committed


@pytest.fixture
def committed(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    return root / "notebooks/results"


def test_criteria_are_well_formed(committed, root):
    lines = claims.criteria()
    assert lines.index.is_unique and set(lines["kind"]) <= {*claims.KINDS, "learning_rate"}
    published = claims.published()
    for claim, line in lines.iterrows():
        assert all(0 <= float(s) < 1 for s in line["sparsities"].split()) and int(line["min_n"]) > 0, claim
        if line["kind"] == "learning_rate":
            assert Run(line["model"], line["dataset"], **claims.settings(line["fields"])[0]).sparsity == 0, claim
            continue
        runs = list(claims.claimed_runs(line, "paper", lambda runs: pd.DataFrame({"diverged": []})))
        assert len({words for words, *_ in runs}) == len(runs) > 0, claim
        assert all(ours != theirs for _, ours, theirs in runs), claim
        assert line["kind"] == "same_mask" or float(line["margin"]) >= 0, claim
        assert line["kind"] != "better" or float(line["margin"]) == 0, claim  # as the criterion's words say
        assert line["statement"].endswith("."), claim
        assert (line["kind"] == "value") <= (line["paper"] != ""), claim
        if line["paper"]:  # a claim's number is the paper's: of the network it names, or of the dense one
            sparsity = float(line["sparsities"]) if line["kind"] == "value" else 0.0
            same = (
                published[["model", "dataset", "sparsity", "quantity"]]
                == [line["model"], line["dataset"], sparsity, "test_error"]
            ).all(axis=1)
            assert float(line["paper"]) in set(published[same]["value"]), line["statement"]


def test_a_chapter_may_be_missing_only_while_no_row_judges_it(committed, root):
    for verdict in claims.verdicts():
        chapter = claims.criteria().loc[verdict.claim, "chapter"]
        assert (root / f"notebooks/{chapter}.ipynb").exists() or verdict.n == 0, (verdict.claim, chapter)


def git(root, *words):
    """Return what git says, or skip where there is no history, or only the end of it."""

    def said(*words):
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False)
        return "" if done.returncode else done.stdout

    if said("rev-parse", "--is-shallow-repository").strip() != "false" or not said(*words).strip():
        pytest.skip("no git history here")
    return said(*words)


def first_commits(root):
    """Return when each criterion first appeared as it stands: claim -> time of the commit."""
    path, now = "notebooks/results/claims.csv", claims.criteria()
    decisive = ["kind", "model", "dataset", "sparsities", "fields", "against", "paper", "margin", "min_n"]
    since = {}
    for entry in reversed(git(root, "log", "--format=%H %cI", "--", path).splitlines()):  # the oldest first
        commit, time = entry.split()
        text = git(root, "show", f"{commit}:{path}")
        then = pd.read_csv(io.StringIO(text), index_col="id", dtype=str, keep_default_na=False)
        then = then.reindex(columns=now.columns, fill_value="")  # a column that came later was empty before
        for claim in then.index.intersection(now.index):
            if (then.loc[claim, decisive] == now.loc[claim, decisive]).all():
                since.setdefault(claim, datetime.datetime.fromisoformat(time))
            else:
                since.pop(claim, None)  # it was changed since
    return since


def began_after(row, moment):
    """Return whether the run of a row began after a moment: its time is when it ended."""
    ended = datetime.datetime.fromisoformat(row["time"])
    return ended - datetime.timedelta(seconds=row["seconds"]) > moment


def test_criteria_were_committed_before_the_rows_they_judge(committed, root):
    """No criterion was written when its outcome could be known.

    A claim about one group of runs is older than each of its rows; one that compares two groups is older
    than all rows of one of them (the other may be there from another chapter), in each of its tests.
    """
    since, rows, find, judged = first_commits(root), read_rows(committed), claims.finder(), 0
    assert set(since) == set(claims.criteria().index)
    for profile, (claim, line) in itertools.product(("short", "paper"), claims.criteria().iterrows()):
        if line["kind"] == "learning_rate":
            continue
        for test in claims.tests_of(line, profile, find):
            groups = [[rows[key] for key in keys] for keys in test.said.keys]
            judged += test.n
            assert not test.n or any(all(began_after(row, since[claim]) for row in g) for g in groups), claim
    assert judged


def test_the_rates_written_down_are_what_the_rule_gives(committed):
    lines, n_decided = claims.criteria(), 0
    for claim, line in lines[lines["kind"] == "learning_rate"].iterrows():
        for decision in filter(None, line["decided"].split("; ")):
            profile, rate = decision.split(": ")
            run = Run(line["model"], line["dataset"], **claims.settings(line["fields"])[0])
            assert claims.stable_rate(run, profile, _complete) == float(rate), claim
            n_decided += 1
        shown = claims.learning_rates().filter(like=f"{claim}: ", axis=0).iloc[0]
        found = [f"{p}: {shown[p]}" for p in ("short", "paper") if re.fullmatch(r"[\d.]+", shown[p])]
        assert line["decided"] == "; ".join(found), f"{claim}: a rate that the rule gives is written down"
    assert n_decided


def _complete(runs):
    found = rows_of(runs)
    assert len(found) == len(runs), "a rate may be written down only when all of its seeds have rows"
    return found


def test_a_rate_is_shown_once_all_of_its_seeds_have_rows(world):
    world.criteria("L1,5,02,learning_rate,lenet5,mnist,0,,,,,5,The rule.,\n")
    run, L1 = Run("lenet5", "mnist"), "L1: LeNet-5-Caffe on mnist"
    assert list(claims.learning_rates().loc[L1]) == ["not run yet", "not run yet"]
    world.add(run, profile="short", test_error=90.0, diverged=True)
    assert claims.learning_rates().loc[L1, "short"] == "not run yet"
    world.add(dataclasses.replace(run, lr=0.03), profile="short", test_error=STEADY[:4])
    assert claims.learning_rates().loc[L1, "short"] == "4 seeds so far"  # a fifth one may still diverge
    world.add(dataclasses.replace(run, lr=0.03), profile="short", test_error=STEADY[:5])
    shown = claims.learning_rates().loc[L1]
    assert (
        shown["short"] == "0.03" and shown["paper"] == "not run yet" and list(map(len, shown["short"].keys)) == [5, 5]
    )


def test_no_row_was_made_with_uncommitted_changes(committed):
    assert not any(row["dirty"] for row in read_rows(committed).values())


def test_every_row_was_made_with_the_library_of_its_commit(committed, root):
    history = {commit[:12] for commit in git(root, "rev-list", "HEAD").split()}
    for commit, library in {(row["commit"], row["library"]) for row in read_rows(committed).values()}:
        assert commit in history  # `git` skips where it says nothing, so a commit made up would pass
        files = sorted(f for f in git(root, "ls-tree", "--name-only", commit, "snip_lib/").split() if f.endswith(".py"))
        sources = "".join(git(root, "show", f"{commit}:{file}") for file in files)
        assert hashlib.sha256(sources.encode()).hexdigest()[:12] == library, commit


def test_rows_stay_small(committed):
    files = list(committed.iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    for row in read_rows(committed).values():  # the picture of one seed's mask is the only large part
        assert len(json.dumps({k: v for k, v in row.items() if k not in ("picture", "mean_image")})) < 3_000


def test_front_pages_name_every_claim(committed):
    summary, headline = claims.summary_markdown(), claims.headline_markdown()
    judged = claims.verdicts()
    assert [v.claim for v in judged] == [c for c in claims.criteria().index if not c.startswith("L")]
    for verdict in judged:
        assert re.search(rf"\b{verdict.claim}\b", summary), verdict.claim
        assert re.search(rf"\b{verdict.claim}\b", headline), verdict.claim
        share = f"{verdict.claim} ({sum(test.met for test in verdict.tests)} of {len(verdict.tests)} tests"
        assert (share in headline) == (verdict.verdict == "in part" and not verdict.met), verdict.claim
        assert verdict.reason in ("", *claims.REASONS) and (verdict.reason == "") == (verdict.verdict in claims.WORDS)
    assert headline.count("\n") <= 26 and claims.answer_markdown(judged) in headline
    counts = [int(n) for n in re.findall(r"\((\d+) of \d+\)", headline)]
    assert sum(counts) == len(judged)


def test_what_is_called_table_1_in_the_answer_is_the_whole_of_it(committed):
    """The claims of a value of a pruned network are SNIP's four lines of Table 1."""
    lines, printed = claims.criteria(), claims.published()
    lines = lines[(lines["kind"] == "value") & (lines["sparsities"] != "0")]
    printed = printed[(printed["source"] == "Table 1") & (printed["method"] == "snip")]
    printed = printed[printed["quantity"] == "test_error"]
    assert {(m, float(s), float(v)) for m, s, v in lines[["model", "sparsities", "paper"]].to_numpy()} == set(
        printed[["model", "sparsity", "value"]].itertuples(index=False, name=None)
    )


def test_the_front_pages_tell_what_was_tested_and_undecided_from_what_was_not(world):
    lines = [f"X{i},5,02,no_loss,lenet300,mnist,{s},,,,0.3,{n},No.,\n" for i, (s, n) in enumerate(UNTESTED)]
    world.criteria(*lines, "X9,our reading of SNIP-it,02,no_loss,lenet300,mnist,0.1,,,,0.3,5,No loss.,replaced by X1\n")
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    world.errors({0.0: STEADY, 0.1: noisy, 0.2: noisy, 0.4: noisy[:1], 0.5: plus(STEADY, 0)})
    headline, summary = claims.headline_markdown(), claims.summary_markdown()
    assert "Of the 6 claims (5 of the paper, 1 of SNIP-it or our reading of it, 0 ours):" in headline
    assert "- **undecided** (2 of 6): X0, X1 (only 6 seeds)\n" in headline
    assert "(1 of 6): X3 (only 1 seed)\n- **not run yet** (1 of 6): X2\n- **replaced** (1 of 6): X9\n" in headline
    assert "| X4 |  |  | X0, X1 | too few seeds: X3; not run yet: X2; replaced: X9 |\n" in summary
    assert "| 1 |  |  | 2 | too few seeds: 1; not run yet: 1; replaced: 1 |\n" in summary


UNTESTED = [(0.1, 5), (0.2, 7), (0.3, 5), (0.4, 5), (0.5, 5)]  # sparsity, and seeds that are asked for


def test_a_claim_is_linked_to_the_verdicts_of_its_chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path / "results")
    assert claims.chapter_link("C1", "02") == "C1"
    for heading, anchor in (("Verdict", "verdict"), ("Verdict, and what it cost", "verdict-and-what-it-cost")):
        (tmp_path / "02.ipynb").write_text(json.dumps({"source": [f"## {heading}\n", "Computed."]}))
        assert claims.chapter_link("C1", "02", "../") == f"[C1](../02.ipynb#{anchor})"


def test_the_answer_follows_the_verdicts(world):
    world.criteria(
        "C4,5,02,no_loss,lenet300,mnist,0.5 0.9,,,,0.3,5,No loss.,\n",
        "C5,5,02,value,lenet300,mnist,0.9,,,1.6,0.3,5,A value.,\n",
        "C11,5,03_comparisons,no_worse,lenet300,mnist,0.9,,method=magnitude,,0.3,5,As good.,\n",
        "C52,5,03_comparisons,no_worse,lenet300,mnist,0.9,,method=obd_gauss_newton,,0.3,5,As good.,\n",
        "S1,5,09_snip_it,better,lenet300,mnist,0.9,rounds=7,rounds=1,,0,5,Better.,\n",
    )
    empty = claims.answer_markdown(claims.verdicts())
    assert "No network is shown yet" in empty and "none is tested yet" in empty
    assert (
        "Is one shot no worse than training first and pruning then?* Not run yet for LeNet-300-100 (by magnitude), "
        in empty
    )
    world.errors({0.0: STEADY, 0.5: STEADY, 0.9: plus(STEADY, 1.0)})
    world.add(dataclasses.replace(SHOT, method="magnitude"), test_error=plus(STEADY, 2.0))
    world.add(STEPS, test_error=plus(STEADY, 3.0))
    full = claims.answer_markdown(claims.verdicts())
    assert (
        "(at most the margin of 0.3 points of error): LeNet-300-100 at 50 % (the full training)" in full
        and "at 90 %, with 2.60 % where the paper has 1.6 %" in full
    )
    told = "Yes for LeNet-300-100 (by magnitude, n = 6); not run yet for LeNet-300-100 (by the Hessian)."
    assert f"no worse than training first and pruning then?* {told}" in full
    assert "better than one shot?* No for LeNet-300-100 (n = 6)." in full
    assert "Of the 4 claims that are *reproduced*, *in part* or *not reproduced*, 0 rest on a" in full
    assert "none is reached" in full


def test_the_answer_calls_undecided_what_is_undecided(world):
    world.criteria("S1,5,09_snip_it,better,lenet300,mnist,0.9,rounds=7,rounds=1,,0,5,Better.,\n")
    world.errors({0.0: STEADY, 0.9: STEADY})
    world.add(STEPS, test_error=[e + (-1) ** i for i, e in enumerate(STEADY)])
    assert world.judge("S1").verdict.startswith("undecided (neither")
    answer = claims.answer_markdown(claims.verdicts())
    assert "do better than one shot?* Undecided for LeNet-300-100 (n = 6)." in answer
    world.add(STEPS, test_error=STEADY[:1])  # what has too few seeds to be decided is not undecided
    assert "do better than one shot?* One seed only for LeNet-300-100." in claims.answer_markdown(claims.verdicts())


def test_the_answer_says_where_the_dense_network_is_not_the_papers(world):
    modern = "C{},5.3,04_modern_architectures,no_loss,{},mnist,0.9,,,{},1.0,5,Little.,\n"
    world.criteria(modern.format(25, "lstm_s", 1.6), modern.format(26, "lstm_b", 9.0), modern.format(27, "gru_s", 9.0))
    for model in ("lstm_s", "lstm_b"):
        world.errors({0.0: STEADY, 0.9: plus(STEADY, 3)}, model)
    apart = "no (with a dense network not shown to agree with the paper's) for LSTM-b (n = 6)"
    answer = f"within 1.0 points of their dense ones?* No for LSTM-s (n = 6); {apart}; not run yet for GRU-s."
    assert answer in claims.answer_markdown(claims.verdicts())


def test_the_answer_tells_what_rests_on_a_tenth_of_the_training(world):
    late = "S8,5,09_snip_it,better,lenet300,mnist,0.9,rounds=7 delay=25000 every=5000,delay=0 every=0,,0,5,Late.,\n"
    world.criteria(NO_LOSS, "S1,5,09_snip_it,better,lenet300,mnist,0.9,rounds=7,rounds=1,,0,5,Better.,\n", late)
    world.errors(dict.fromkeys((0.0, 0.5, 0.9), STEADY), profile="short")
    world.add(STEPS, test_error=plus(STEADY, 3.0), profile="short")
    answer = claims.answer_markdown(claims.verdicts())
    assert "at up to 90 %, the highest sparsity that this claim asks about (a tenth of the training)." in answer
    assert "better than one shot?* No for LeNet-300-100 (n = 6); at a tenth of the training." in answer
    assert "One scoring before training, where networks are trained one by one: not run yet." in answer


def test_the_answer_counts_where_other_masks_do_worse(world):
    for masks in ("random masks", "SNIP's own masks, shuffled within their layers", "those of the largest weights"):
        assert f"than with {masks}: not run yet" in _beside()
    for sparsity, random in ((0.95, plus(STEADY, 2.0)), (0.98, [e + (-1) ** i for i, e in enumerate(STEADY)])):
        run = Run("lenet300", "mnist", sparsity=sparsity)
        world.add(run, test_error=STEADY, profile="short")
        world.add(dataclasses.replace(run, method="random"), test_error=random, profile="short")
    world.add(dataclasses.replace(run, method="synflow"), test_error=plus(STEADY, -0.5), profile="short")
    assert "random masks: lower in 1, not told apart in 1 of 2 places (means from -2.00 to +0.00 points)" in _beside()
    assert "SynFlow's (no example seen): higher in 1 of 1 place (means from +0.50 to +0.50 points)" in _beside()
    assert "n = 6 to 6, at a tenth of the training" in _beside()


def test_the_answer_says_where_pruning_is_shown_to_cost_more_than_the_margin(world):
    world.criteria(NO_LOSS)
    assert "o cost more" not in claims.answer_markdown([])
    for sparsity, gap in {0.0: 0, 0.95: 0.2, 0.98: 2.0}.items():
        errors = [e + gap + bool(sparsity) * i / 100 for i, e in enumerate(STEADY)]
        world.add(Run("lenet300", "mnist", sparsity=sparsity), profile="short", test_error=errors)
    answer = claims.answer_markdown([])
    assert "whether a claim asks for it or not): LeNet-300-100 at 98 % (a tenth of the training)." in answer
    for sparsity, gap in {0.0: 0, 0.95: 0.5, 0.98: 0.0}.items():
        assert "(a tenth of the training)" in claims.answer_markdown([])  # until the longer runs are complete
        errors = [e + gap + bool(sparsity) * i / 100 for i, e in enumerate(STEADY)]
        world.add(Run("lenet300", "mnist", sparsity=sparsity), test_error=errors)
    answer = claims.answer_markdown([])
    assert "whether a claim asks for it or not): LeNet-300-100 at 95 % (the full training)." in answer
    for sparsity, gap in {0.0: 0, 0.98: 0.0, 0.99: 3.0}.items():
        errors = [e + gap + bool(sparsity) * i / 100 for i, e in enumerate(STEADY)]
        world.add(Run("lenet5", "mnist", sparsity=sparsity), profile="short", test_error=errors)
    errors = [e + (-0.2, 0.9)[i % 2] for i, e in enumerate(STEADY)]  # neither within the margin of 0.3 nor beyond
    assert "**Undecided**" not in claims.answer_markdown([])
    world.add(Run("lenet5", "mnist", sparsity=0.98), profile="short", test_error=errors)
    assert "**Undecided**" in claims.answer_markdown([])
    both = "LeNet-300-100 at 95 % (the full training); LeNet-5-Caffe at 99 % (a tenth of the training)."
    assert both in claims.answer_markdown([])
    more = "95 % from LeNet-300-100 or 99 % from LeNet-5-Caffe (a tenth of the training)"
    first = f"No network is shown yet to lose nothing where SNIP prunes it; taking {more} is shown to cost more.\n"
    assert f"**In short:** {first}" in claims.answer_markdown([])  # one rule for what is gained and for what is lost


def test_the_answer_says_what_is_undecided_between_no_cost_and_a_cost(world):
    world.criteria(NO_LOSS.replace("0.5 0.9", "0.5 0.8 0.9 0.95"))  # at 95 % it asks what is told anyway, once
    cost = [e + 2 + i / 100 for i, e in enumerate(STEADY)]
    world.errors({0.0: STEADY, 0.5: STEADY, 0.8: plus(STEADY, 0.3), 0.9: cost, 0.95: cost})
    world.add(Run("lenet300", "mnist", sparsity=0.98), test_error=cost)
    answer = claims.answer_markdown(claims.verdicts())
    first, _, free, between, more, *_ = answer.splitlines()
    assert "can take, before any training, 50 % from LeNet-300-100 at no cost" in first
    assert "taking 90 % from LeNet-300-100 is shown to cost" in first
    assert "LeNet-300-100 at 50 % (" in free and "as its claim" not in free
    assert "Undecided" in between and "LeNet-300-100 at 80 %, where it costs +0.30 [+0.29, +0.31] points" in between
    assert "LeNet-300-100 at 90 %, LeNet-300-100 at 95 %, LeNet-300-100 at 98 % (the full training)" in more


def test_the_answer_tells_what_is_about_masks_alone(world):
    same = "X1,4,03,same_mask,lenet300,mnist,0.95,steps=0,rescale=8.0,,,5,The same mask.,\n"
    world.criteria(DENSE, same)
    world.errors({0.0: STEADY})
    for run in (SCORED, RESCALED):
        world.add(run, mask_sha=list("abcdef"))
    answer = claims.answer_markdown(claims.verdicts())
    assert "; *reproduced* are 2: 1 about masks alone, without any training, none after a length" in answer
    assert " of training of their own, 1 after the full one (C1)." in answer


def _beside():
    """Return the last line of the answer."""
    return claims.answer_markdown(claims.verdicts()).splitlines()[-1]


def test_an_interval_ends_where_the_quantity_can():
    rows = pd.DataFrame({"key": ["a", "b"], "seed": [0, 1], "test_error": [0.1, 99.0], "train_loss": [0.1, 3.0]})
    assert claims.estimate(rows["test_error"], "mean and interval test_error", rows, sign="") == "49.55 [0.00, 100.00]"
    loss = claims.estimate(rows["train_loss"], "mean and interval train_loss", rows, sign="")
    assert loss.startswith("1.55 [0.00, ") and float(loss[:-1].split()[-1]) == pytest.approx(19.97, abs=0.01)
    gaps = claims.difference(rows, rows.assign(test_error=[99.0, 99.0]))
    assert gaps == "-49.45 [-100.00, +100.00]"
    contrast = claims.estimate(rows["test_error"], "contrast of class_correlations", rows)  # this has no such ends
    low, high = map(float, contrast.removeprefix("+49.55 [").removesuffix("]").split(", "))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 1, 49.55, stats.sem(rows["test_error"])), abs=0.006)


def test_the_answer_names_the_farthest_number_and_the_sparsity_up_to_which_nothing_is_lost(world):
    world.criteria(
        "C4,5,02,no_loss,lenet300,mnist,0.5 0.8 0.9,,,,0.3,5,No loss.,\n",
        "C5,5,02,value,lenet300,mnist,0.9,,,1.6,0.3,5,A value.,\n",
        "C6,5,02,value,lenet300,mnist,0.5,,,4.0,0.3,5,A value.,\n",
        "C32,5,06,no_loss,lenet300,mnist,0.95,,score_examples=10000,,0.3,5,One batch is enough.,\n",
    )
    world.errors({0.0: STEADY, 0.5: STEADY, 0.8: plus(STEADY, 1.0), 0.9: plus(STEADY, 0.0), 0.95: STEADY})
    world.add(Run("lenet300", "mnist", sparsity=0.95, score_examples=10_000), test_error=STEADY)
    answer = claims.answer_markdown(claims.verdicts())
    assert (
        "points of error): LeNet-300-100 at 50 % (the full training)." in answer
    )  # not 90 %, nor 95 % of another claim
    assert "Of the 2 errors" in answer and "one is reached" in answer
    assert "the farthest is LeNet-300-100 at 50 %, with 1.60 % where the paper has 4.0 %" in answer  # the better one


@pytest.mark.parametrize(("claim", "method"), [("C11", "lwc"), ("C52", "obd")])
def test_the_papers_column_has_what_it_quotes_of_networks_that_were_trained_first(committed, claim, method):
    quoted = claims.published().query("source == 'Table 1' and model == 'lenet300' and method == @method").iloc[0]
    against = f" against {quoted['value']:.1f} ({100 * quoted['sparsity']:g} %)"
    assert claims.paper_errors(claims.criteria().loc[claim]).endswith(against)
