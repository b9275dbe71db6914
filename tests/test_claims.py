"""Verdicts follow from rows and criteria, and are never better than their evidence."""

import dataclasses
import datetime
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from snip_lib import claims
from snip_lib.runs import OUTCOMES, Run, read_rows, rows_of

HEADER = "id,section,chapter,kind,model,dataset,sparsities,paper,margin,min_n,statement,decided\n"
NO_LOSS = "C3,5.1,02,no_loss,lenet300,mnist,0.5 0.9,,0.3,5,No loss.,\n"
DENSE = "C1,5.2,02,value,lenet300,mnist,0,1.7,0.3,5,The dense network.,\n"
BETTER = "C9,5.2,02,better,lenet300,mnist,0.9,,0,5,Better than dense.,\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes a ``claims.csv`` of the given lines where the library looks."""

    def write(*lines):
        (tmp_path / "claims.csv").write_text(HEADER + "".join(lines))
        monkeypatch.setattr(claims, "FOLDER", tmp_path)

    return write


def rows(errors, diverged=()):
    """Return rows of LeNet-300-100 from sparsity -> test errors by seed."""
    made = [
        dataclasses.asdict(Run("lenet300", "mnist", sparsity=s, seed=i))
        | {"test_error": e, "diverged": (s, i) in diverged, "key": f"{s}-{i}"}
        for s, values in errors.items()
        for i, e in enumerate(values)
    ]
    return pd.DataFrame(made)


def judge(frame, claim="C3", profile="paper", **options):
    return claims.judge(claim, frame, profile=profile, **options)


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


def test_holm_on_a_worked_example():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values):
    corrected = claims.holm(p_values)
    assert all(c >= p for c, p in zip(corrected, p_values, strict=True)) and max(corrected) <= 1
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(corrected)[order], np.array(corrected)[order][1:], strict=False))


# -------------------------------------------------------------------------------------- verdicts

STEADY = [1.60, 1.62, 1.58, 1.61, 1.59, 1.60]


def plus(values, difference):
    """Return the values with a difference added that wobbles a little from seed to seed."""
    return [v + difference + 0.01 * (-1) ** i for i, v in enumerate(values)]


def test_no_loss_is_reproduced_where_every_difference_lies_within_the_margin(written):
    written(NO_LOSS)
    verdict = judge(rows({0.0: STEADY, 0.5: plus(STEADY, 0.0), 0.9: plus(STEADY, 0.2)}))
    assert verdict.verdict == "reproduced" and verdict.met
    assert "+0.20 points" in verdict.evidence and "at 90 %" in verdict.evidence and "n = 6" in verdict.evidence


def test_a_clear_loss_is_not_reproduced_and_a_loss_at_one_sparsity_only_in_part(written):
    written(NO_LOSS)
    assert judge(rows({0.0: STEADY, 0.5: plus(STEADY, 0.5), 0.9: plus(STEADY, 2.0)})).verdict == "not reproduced"
    assert judge(rows({0.0: STEADY, 0.5: plus(STEADY, 0.0), 0.9: plus(STEADY, 2.0)})).verdict == "in part"


def test_an_absent_difference_is_not_a_proof(written):
    """Noise so large that nothing differs significantly does not make "no loss" true."""
    written(NO_LOSS)
    noisy = [0.3, 3.1, 1.9, 0.2, 2.8, 1.4]
    verdict = judge(rows({0.0: STEADY, 0.5: noisy, 0.9: noisy}))
    assert verdict.verdict.startswith("not tested (undecided") and not verdict.met


def test_seeds_are_paired(written):
    """A spread over seeds that dense and pruned share does not hide that they agree."""
    written(NO_LOSS)
    spread = [1.0, 3.0, 1.5, 2.5, 2.0, 4.0]
    assert judge(rows({0.0: spread, 0.5: plus(spread, 0.1), 0.9: plus(spread, 0.1)})).verdict == "reproduced"
    shuffled = plus(spread, 0.1)[::-1]
    assert judge(rows({0.0: spread, 0.5: shuffled, 0.9: shuffled})).verdict != "reproduced"


@pytest.mark.parametrize(
    ("limit", "options", "seeds"),
    [
        ("the short profile", {"profile": "short"}, 6),
        ("only 4 seeds", {}, 4),
        ("a dense network that does not agree", {"baseline": False}, 6),
    ],
)
def test_what_holds_a_verdict_back(written, limit, options, seeds):
    written(NO_LOSS)
    frame = rows({s: plus(STEADY, 0.0)[:seeds] for s in (0.0, 0.5, 0.9)})
    assert judge(rows({s: plus(STEADY, 0.0) for s in (0.0, 0.5, 0.9)})).verdict == "reproduced"
    held = judge(frame, **options)
    assert held.verdict == "in part" and f"limited by {limit}" in held.evidence


def test_a_diverged_run_is_counted_and_never_averaged(written):
    written(NO_LOSS)
    frame = rows(
        {0.0: [*STEADY, 90.2], 0.5: [*plus(STEADY, 0.0), 1.6], 0.9: [*plus(STEADY, 0.0), 1.6]}, diverged={(0.0, 6)}
    )
    verdict = judge(frame)
    assert verdict.verdict == "in part" and "1 diverged runs" in verdict.evidence and "n = 6" in verdict.evidence
    table = claims.error_table(frame, pd.DataFrame({"sparsity": [], "quantity": [], "value": []}))
    assert list(table["diverged"]) == [1, 0, 0] and table.loc["0", "test error %"].startswith("1.60")


def test_without_rows_nothing_is_claimed(written):
    written(DENSE, NO_LOSS)
    empty = pd.DataFrame(columns=["key", *(f.name for f in dataclasses.fields(Run)), *OUTCOMES])
    for verdict in claims.judge_chapter("02", empty, profile="paper"):
        assert verdict.verdict == "not tested (fewer than two seeds)" and not verdict.met
    full = rows({s: plus(STEADY, 0.0) for s in (0.0, 0.5, 0.9)})
    assert judge(full, profile="smoke").verdict == "not tested (the smoke profile)"


def test_better_needs_a_difference_below_zero(written):
    written(BETTER)
    assert judge(rows({0.0: STEADY, 0.9: plus(STEADY, -0.2)}), "C9").verdict == "reproduced"
    assert judge(rows({0.0: STEADY, 0.9: plus(STEADY, 0.2)}), "C9").verdict == "not reproduced"


def test_a_pruned_claim_is_limited_where_the_dense_network_disagrees(written):
    written(DENSE, NO_LOSS)
    off = [e + 1 for e in STEADY]
    first, second = claims.judge_chapter("02", rows({s: plus(off, 0.0) for s in (0.0, 0.5, 0.9)}), profile="paper")
    assert first.verdict == "not reproduced"
    assert second.verdict == "in part" and "dense network" in second.evidence


def test_the_stable_rate_is_the_largest_at_which_no_dense_seed_diverges():
    asked = []

    def get(runs):
        asked.append({r.lr for r in runs} | {r.sparsity for r in runs} | {len(runs)})
        return pd.DataFrame({"diverged": [r.lr > 0.05 and r.seed == 4 for r in runs]})

    assert claims.stable_rate(Run("lenet5", "mnist", sparsity=0.9), "paper", get) == 0.03
    assert asked == [{0.1, 0.0, 5}, {0.03, 0.0, 5}]
    with pytest.raises(ValueError, match="lenet5 on mnist diverges at every rate"):
        claims.stable_rate(Run("lenet5", "mnist"), "paper", lambda runs: pd.DataFrame({"diverged": [True]}))


def test_a_fingerprint_changes_with_any_value_and_not_with_the_order():
    frame = rows({0.0: STEADY, 0.5: STEADY})
    same = frame.iloc[::-1].assign(empty=None, recipe=Run("lenet300", "mnist").recipe)
    assert claims.fingerprint(same) == claims.fingerprint(frame)
    for column in ("test_error", "seed", "key", "diverged"):
        changed = frame.astype({column: object})
        changed.loc[3, column] = "another"
        assert claims.fingerprint(changed) != claims.fingerprint(frame), column


# --------------------------------------------------------------------------- what is committed


@pytest.fixture
def committed(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks")
    return root / "notebooks/results"


def test_criteria_are_well_formed(committed, root):
    lines = claims.criteria()
    assert lines.index.is_unique and set(lines["kind"]) <= {"value", "no_loss", "better", "learning_rate"}
    for claim, line in lines.iterrows():
        assert Run(line["model"], line["dataset"]) and all(0 <= float(s) < 1 for s in line["sparsities"].split()), claim
        assert (root / f"notebooks/{line['chapter']}.ipynb").exists(), claim
        assert line["kind"] != "value" or float(line["paper"]) > 0, claim
    published = claims.published()
    for _, line in lines[lines["kind"] == "value"].iterrows():  # a claim's number is the paper's
        same = (published[["model", "dataset"]] == [line["model"], line["dataset"]]).all(axis=1)
        values = published[
            same & (published["sparsity"] == float(line["sparsities"])) & (published["source"] == "Table 1")
        ]
        assert float(line["paper"]) in set(values["value"]), line["statement"]


def test_criteria_were_committed_before_the_rows_they_judge(committed, root):
    log = ["git", "-C", root, "log", "--diff-filter=A", "--format=%cI", "--", "notebooks/results/claims.csv"]
    done = subprocess.run(log, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        pytest.skip("no git history here")
    first = datetime.datetime.fromisoformat(done.stdout.split()[-1])
    rows_ = read_rows(committed).values()
    assert rows_ and all(datetime.datetime.fromisoformat(row["time"]) > first for row in rows_)


def test_the_rates_written_down_are_what_the_rule_gives(committed):
    lines = claims.criteria()
    for claim, line in lines[lines["kind"] == "learning_rate"].iterrows():
        for decision in filter(None, line["decided"].split("; ")):
            profile, rate = decision.split(": ")
            assert claims.stable_rate(Run(line["model"], line["dataset"]), profile, _complete) == float(rate), claim


def _complete(runs):
    found = rows_of(runs)
    assert len(found) == len(runs), "a rate may be written down only when all of its seeds have rows"
    return found


def test_no_row_was_made_with_uncommitted_changes(committed):
    assert not any(row["dirty"] for row in read_rows(committed).values())


def test_rows_stay_small(committed):
    files = list(committed.iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert all(len(line) < 2_500 for file in files if file.suffix == ".jsonl" for line in file.read_text().splitlines())


def test_summaries_name_every_claim(committed):
    summary, headline = claims.summary_markdown(), claims.headline_markdown()
    judged = claims.verdicts()
    assert [v.claim for v in judged] == [c for c in claims.criteria().index if not c.startswith("L")]
    for verdict in judged:
        assert verdict.statement in summary and f"**{verdict.verdict}**" in summary
    assert headline.count("\n") == 3
