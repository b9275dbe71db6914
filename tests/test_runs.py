"""A run and its name; rows are written all or nothing, never twice, never lost."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
import weakref

import dask
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snip_lib import runs, train
from snip_lib.runs import Run, at_profile, collect, read_rows, rows_of, sweep, time_limit, write_rows

SMALL = Run("lenet300", "digits", steps=40, decay_every=20, batch_size=50)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Rows and checkpoints in folders of the test's own."""
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SNIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def a_row(run, **outcome):
    """Return a row as `collect` writes it, with an invented outcome."""
    return {"key": run.key, **runs.LEFT_OUT, **dataclasses.asdict(run), "test_error": 1.0, **outcome}


# ------------------------------------------------------------------------------------------ keys


def test_keys_stay_for_ever():
    """These names are in committed rows: a change here loses results."""
    assert Run("lenet300", "mnist").key == "ef77832fb77d"
    assert Run("lenet300", "mnist", sparsity=0.95, seed=3).key == "710cd9f14af9"
    assert Run("lenet5", "mnist", sparsity=0.99, lr=0.03, steps=12_500, decay_every=2_500).key == "4e872a440d56"
    assert Run("lenet5", "digits", method="snip", prune_biases=False, sparsity=0.5).key == "a8c5ccb94f3c"
    assert Run("lenet5", "mnist", sparsity=0.8, structured=True).key == "4376ff8938aa"
    assert Run("lenet5", "mnist", attacked=True).key == "cb9aacebdc27"


def test_a_key_is_the_hash_of_the_non_default_fields_alone():
    run = Run("lenet300", "mnist", sparsity=0.9)
    spelled_out = Run(**dataclasses.asdict(run))
    assert spelled_out.key == run.key
    assert len({r.key for r in sweep(run, seed=range(3), sparsity=[0.5, 0.9], lr=[0.1, 0.2])}) == 12


def test_a_dense_network_has_one_key_whatever_would_have_pruned_it():
    dense = Run("lenet300", "mnist")
    unpruned = {"prune_biases": False, "score_bn": "fresh", "score_examples": 7, "structured": True}
    assert dataclasses.replace(dense, **unpruned).key == dense.key
    assert dataclasses.replace(dense, attacked=True).key != dense.key  # its row says more


OF_THE_MASK = {  # with another value each
    **{"method": "magnitude", "rounds": 3, "schedule": "force", "prune_biases": False, "scope": "layer"},
    **{"control": "shuffle", "score_bn": "fresh", "score_examples": 7, "score_batches": 2, "score_split": "val"},
    **{"score_class": 3, "score_loss": "nll", "accumulate": "abs_then_sum", "delay": 5, "every": 6, "retrain": 0.1},
    **{"rewind": True, "structured": True},
}
OF_THE_NETWORK = {
    **{"seed": 1, "init": "vs_h", "train_init": "fresh", "optimizer": "adam", "lr": 0.03, "momentum": 0.8},
    **{"weight_decay": 0.0, "decay": 0.2, "decay_every": 100, "steps": 100, "batch_size": 50, "augment": "standard"},
    **{"random_labels": True, "recipe": 2, "init_sd": 0.1, "bias_init": "random", "rescale": 8.0, "pixels": "raw"},
    **{"batch_norm": "torch", "decayed": "weights", "precision": "bf16", "attacked": True},
}


def test_what_decides_only_the_mask_names_a_pruned_network_and_no_dense_one():
    assert {*OF_THE_MASK, *OF_THE_NETWORK} | {"model", "dataset", "sparsity"} == set(runs.DEFAULTS)
    dense, pruned = Run("lenet5", "mnist"), Run("lenet5", "mnist", sparsity=0.5)
    for name, value in (OF_THE_MASK | OF_THE_NETWORK).items():
        assert (dataclasses.replace(dense, **{name: value}).key == dense.key) == (name in OF_THE_MASK), name
        if name != "structured":
            assert dataclasses.replace(pruned, **{name: value}).key != pruned.key, name
    assert dataclasses.replace(pruned, structured=True).key != pruned.key


def test_the_last_mask_comes_before_the_last_step():
    late = {"sparsity": 0.9, "steps": 60, "delay": 20, "rounds": 3}
    assert Run("lenet5", "mnist", every=19, **late).every == 19  # at 20, 39 and 58
    assert Run("lenet5", "mnist", steps=60, delay=60) == Run("lenet5", "mnist", steps=60)  # dense: it has no mask
    with pytest.raises(ValueError, match="masks comes before the end"):
        Run("lenet5", "mnist", every=20, **late)


def test_what_is_removed_in_the_course_of_training_cannot_return():
    late = {"sparsity": 0.9, "steps": 60, "delay": 20, "rounds": 3, "every": 10}
    with pytest.raises(ValueError, match="stays removed"):
        Run("lenet5", "mnist", schedule="force", **late)
    assert Run("lenet5", "mnist", schedule="exponential", **late).schedule == "exponential"
    assert Run("lenet5", "mnist", schedule="force", **late | {"every": 0}).rounds == 3  # all of them at one step
    assert Run("lenet5", "mnist", schedule="force", **late | {"sparsity": 0.0}).schedule == "snip_it"  # dense


@pytest.mark.parametrize(
    "name", ["rounds", "decay_every", "batch_size", "lr", "score_batches", "rescale", "decay", "init_sd"]
)
def test_what_is_counted_or_multiplied_is_positive(name):
    with pytest.raises(ValueError, match=f"{name} is positive, not 0"):
        Run("lenet5", "mnist", sparsity=0.9, **{name: 0})


@pytest.mark.parametrize("name", ["steps", "score_examples", "delay", "every", "retrain", "momentum", "weight_decay"])
def test_what_may_be_none_is_not_negative(name):
    with pytest.raises(ValueError, match=f"{name} is 0 or more, not -1"):
        Run("lenet5", "mnist", sparsity=0.9, **{name: -1})


def test_committed_rows_keep_their_names(root):
    """Fields that came later have defaults that mean what was done before: old rows are found by their runs."""
    folder = root / "notebooks/results"
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) > 1_000
    for row in lines:
        assert Run(**{name: row[name] for name in runs.DEFAULTS if name in row}).key == row["key"]
    assert not any(name in row and row[name] == value for row in lines for name, value in runs.LEFT_OUT.items())


def test_defaults_stay_for_ever():
    """Rows leave them out, so another default would give all rows another meaning."""
    paper = {"method": "snip", "sparsity": 0.0, "rounds": 1, "seed": 0, "init": "vs_x", "train_init": "same"}
    paper |= {"prune_biases": True, "score_bn": "batch", "score_examples": 0, "optimizer": "sgd", "lr": 0.1}
    paper |= {"momentum": 0.9, "weight_decay": 5e-4, "decay": 0.1, "decay_every": 25_000, "steps": 125_000}
    paper |= {"batch_size": 100, "augment": "none", "random_labels": False, "recipe": 1}
    later = {"init_sd": 1.0, "score_batches": 1, "score_split": "train", "accumulate": "sum_then_abs"}
    later |= {"scope": "global", "schedule": "snip_it", "control": "none", "score_class": -1, "delay": 0, "every": 0}
    later |= {"score_loss": "cross_entropy", "retrain": 0.0, "rewind": False, "bias_init": "constant", "rescale": 1.0}
    later |= {"pixels": "normalised", "batch_norm": "tensorflow", "decayed": "all", "precision": "float32"}
    later |= {"structured": False, "attacked": False}
    untrained = dict.fromkeys(["test_error", "test_error_best_val", "test_error_best5", "val_error", "train_loss"])
    untrained |= {"dead_units": None, "dead_outputs": None}
    untrained |= {"diverged": False, "diverged_step": None, "steps_before_mask": 0, "replicas": 1, "dirty": False}
    untrained |= {"curve": {"step": [], "train_loss": [], "val_error": [], "test_error": []}}
    expected = {**paper, **later, **untrained}
    assert expected == {name: runs.LEFT_OUT[name] for name in expected}
    assert runs.LEFT_OUT == {**runs.DEFAULTS, **untrained}


def test_a_row_leaves_out_what_is_at_its_default_and_is_read_whole(tmp_path):
    row = a_row(dataclasses.replace(SMALL, seed=3))
    write_rows([row], tmp_path / "chapter.jsonl")
    written = json.loads((tmp_path / "chapter.jsonl").read_text())
    assert written["seed"] == 3 and "momentum" not in written and written.items() <= row.items()
    assert read_rows(tmp_path) == {row["key"]: row}


def test_a_row_names_the_steps_of_its_curve_only_where_they_are_others(tmp_path):
    paper = [12_500, 25_000, 37_500, 50_000, 62_500, 75_000, 87_500, 100_000, 112_500]
    paper += [121_000, 122_000, 123_000, 124_000, 125_000]
    row, stopped = a_row(Run("lenet5", "mnist")), a_row(Run("lenet5", "mnist", seed=1))
    for of, steps in ((row, paper), (stopped, [12_500, 13_000])):
        of["curve"] = {
            "step": steps,
            **{name: [1.0] * len(steps) for name in ("train_loss", "val_error", "test_error")},
        }
    write_rows([row, stopped], tmp_path / "chapter.jsonl")
    assert read_rows(tmp_path) == {of["key"]: of for of in (row, stopped)}
    lines = map(json.loads, (tmp_path / "chapter.jsonl").read_text().splitlines())
    assert {of["key"]: of["curve"].get("step") for of in lines} == {row["key"]: None, stopped["key"]: [12_500, 13_000]}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"model": "lenet400"}, "Unknown model 'lenet400': choose one of lenet300"),
        ({"dataset": "mnits"}, "Unknown dataset 'mnits': choose one of digits"),
        ({"method": "snap"}, "Unknown method 'snap'"),
        ({"init": "zeros"}, "Unknown init 'zeros'"),
        ({"optimizer": "lion"}, "Unknown optimizer 'lion'"),
        ({"sparsity": 1.0}, "sparsity is the fraction removed"),
        ({"sparsity": -0.1}, "sparsity is the fraction removed"),
        ({"sparsity": 95}, "sparsity is the fraction removed"),
        ({"steps": -1}, "steps is 0 or more, not -1"),
        ({"steps": 0}, "A run of no step is scored and not trained"),
        ({"sparsity": 0.9, "steps": 60, "delay": 60}, "masks comes before the end"),
        ({"pixels": "blue"}, "Unknown pixels"),
        ({"lr": -1.0}, "lr is positive"),
        ({"lr": math.nan}, "lr is positive, not nan"),
        ({"retrain": math.inf}, "retrain is 0 or more, not inf"),
        ({"sparsity": "0.9"}, "sparsity is a number, not '0.9'"),
        ({"steps": 10.5}, "steps is a whole number, not 10.5"),
        ({"seed": True}, "seed is a whole number, not True"),
        ({"rewind": 1}, "rewind is True or False, not 1"),
        ({"model": ["lenet300"]}, "model is a word"),
        ({"attacked": True, "steps": 0, "sparsity": 0.9}, "no trained network to attack"),
        ({"structured": True, "sparsity": 0.9, "model": "gru_s"}, "units of feed-forward networks, and gru_s is"),
        ({"structured": True, "sparsity": 0.9, "method": "grasp"}, "With structured, method is snip or random"),
        ({"structured": True, "sparsity": 0.9, "scope": "layer"}, "With structured, scope is global, not 'layer'"),
        ({"structured": True, "sparsity": 0.9, "control": "shuffle"}, "With structured, control is none"),
    ],
)
def test_a_wrong_run_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        Run(**({"model": "lenet300", "dataset": "mnist"} | wrong))
    assert "\n" not in str(refusal.value)


def test_sweep_is_every_combination():
    runs_ = sweep(SMALL, sparsity=[0.0, 0.5], seed=range(3))
    assert [(r.sparsity, r.seed) for r in runs_] == [(s, i) for s in (0.0, 0.5) for i in range(3)]
    assert sweep(SMALL) == [SMALL]


def test_short_is_a_tenth_of_the_paper_with_the_same_shape_of_schedule():
    (paper,), (short,) = (at_profile(p, [Run("lenet300", "mnist")]) for p in ("paper", "short"))
    assert (paper.steps, paper.decay_every) == (125_000, 25_000)
    assert (short.steps, short.decay_every) == (12_500, 2_500)
    assert dataclasses.replace(short, steps=125_000, decay_every=25_000) == paper
    scored = Run("lenet300", "mnist", sparsity=0.9, steps=0)
    assert at_profile("short", [scored]) == [scored]  # there is nothing to shorten
    (smoke,) = at_profile(
        "smoke", sweep(dataclasses.replace(paper, score_examples=10_000, sparsity=0.9), seed=range(5))
    )
    assert (smoke.dataset, smoke.seed, smoke.steps, smoke.score_examples) == ("digits", 0, 60, 500)
    early = dataclasses.replace(paper, sparsity=0.9, rounds=3, delay=100, every=200)
    brief = dataclasses.replace(early, steps=1000, delay=5, every=5, decay_every=5)
    (short,) = at_profile("short", [brief])
    assert (short.steps, short.delay, short.every, short.decay_every) == (100, 1, 1, 1)  # none becomes 0
    (smoke,) = at_profile("smoke", [early])
    assert (smoke.delay, smoke.every) == (1, 1)  # still in the course of training, and one after the other
    with pytest.raises(ValueError, match="Unknown profile 'long': choose one of smoke, short, paper"):
        at_profile("long", [paper])


# ------------------------------------------------------------------------------------------ rows


@given(st.permutations(range(6)))
def test_a_row_file_is_sorted_by_key_whatever_the_order_of_writing(tmp_path_factory, order):
    path = tmp_path_factory.mktemp("rows") / "chapter.jsonl"
    rows = [a_row(dataclasses.replace(SMALL, seed=i)) for i in range(6)]
    for i in order:
        write_rows([rows[i]], path)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys == sorted(row["key"] for row in rows)
    assert read_rows(path.parent) == {row["key"]: row for row in rows}


def test_equal_numbers_make_one_run_whatever_their_type():
    run = Run("lenet300", "mnist", lr=1.0, sparsity=0.5, steps=7)
    for other in ({"lr": 1, "steps": np.int64(7)}, {"lr": np.float64(1.0), "sparsity": np.float32(0.5)}):
        other = dataclasses.replace(run, **other)
        assert other == run and other.key == run.key
        assert json.loads(json.dumps(vars(other))) == vars(run)


def test_blank_lines_at_the_end_of_a_file_lose_nothing(tmp_path):
    path = tmp_path / "chapter.jsonl"
    rows = [a_row(dataclasses.replace(SMALL, seed=i)) for i in range(2)]
    write_rows([rows[0]], path)
    path.write_text(path.read_text() + "\n \n")
    write_rows([rows[1]], path)
    assert read_rows(tmp_path) == {row["key"]: row for row in rows}


def test_a_damaged_line_is_reported_with_file_and_line_and_not_dropped(tmp_path):
    path = tmp_path / "02_lenet_sweeps.jsonl"
    for i in range(3):
        write_rows([a_row(dataclasses.replace(SMALL, seed=i))], path)
    lines = path.read_text().splitlines()
    other = json.loads(lines[0]) | {"seed": 77}
    damages = {"cut": lines[1][:40], "no key": "{}", "a field changed": json.dumps(other), "twice": lines[0], "": ""}
    for damage in damages.values():
        path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
        with pytest.raises(ValueError, match=r"02_lenet_sweeps.jsonl, line 2 (is damaged|repeats)"):
            read_rows(tmp_path)
        with pytest.raises(ValueError, match="line 2"):  # nor does a writer drop what it cannot read
            write_rows([a_row(SMALL)], path)
        assert len(path.read_text().splitlines()) == 3


def test_rows_with_one_mean_image_hold_it_once(tmp_path):
    path, images = tmp_path / "chapter.jsonl", ([0, 5, 250], [0, 5, 250], [0, 5, 251], None)
    rows = [a_row(dataclasses.replace(SMALL, seed=i)) for i in range(len(images))]
    rows = [row | ({"mean_image": image} if image else {}) for row, image in zip(rows, images, strict=True)]
    for row in rows:
        write_rows([row], path)
    assert read_rows(tmp_path) == {row["key"]: row for row in rows}
    lines = path.read_text().splitlines()
    held = [json.loads(line).get("mean_image") for line in lines]
    first = next(json.loads(line)["key"] for line in lines if "[0,5,250]" in line)
    assert sorted(map(str, held)) == sorted(["[0, 5, 250]", "[0, 5, 251]", first, "None"])
    path.write_text("\n".join(line for line in lines if "[0,5,250]" not in line) + "\n")
    with pytest.raises(ValueError, match=f"is damaged .its mean image is that of the row {first}, which is not above"):
        read_rows(tmp_path)


def test_a_key_occurs_once_in_the_whole_folder(tmp_path):
    row, other = a_row(SMALL), a_row(dataclasses.replace(SMALL, seed=1))
    write_rows([row], tmp_path / "a.jsonl")
    write_rows([row, other], tmp_path / "b.jsonl")
    assert len(read_rows(tmp_path)) == 2 and len((tmp_path / "b.jsonl").read_text().splitlines()) == 1
    (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    with pytest.raises(ValueError, match=r"b.jsonl, line 1 repeats the key .* of .*a.jsonl, line 1"):
        read_rows(tmp_path)


def test_who_reads_a_file_while_it_is_written_sees_the_old_rows_whole(tmp_path):
    path = tmp_path / "chapter.jsonl"
    write_rows([a_row(SMALL)], path)
    before = path.read_text()
    with path.open() as reader:
        write_rows([a_row(dataclasses.replace(SMALL, seed=1))], path)
        assert reader.read() == before
    assert len(read_rows(tmp_path)) == 2


def _write_many(path, seeds):
    for seed in seeds:
        write_rows([a_row(dataclasses.replace(SMALL, seed=seed))], path)


def test_two_writers_at_once_lose_no_row(tmp_path):
    path = tmp_path / "chapter.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, range(i, 40, 2))) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(row["seed"] for row in read_rows(tmp_path).values()) == list(range(40))


def test_what_another_chapter_trained_meanwhile_is_not_written_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path))
    work = runs._work

    def overtaken(*arguments):
        for group, made in work(*arguments):
            write_rows([made[0]], tmp_path / "other.jsonl")
            yield group, made

    monkeypatch.setattr(runs, "_work", overtaken)
    declared = [dataclasses.replace(SMALL, steps=0, sparsity=0.5, seed=seed) for seed in range(2)]
    assert len(runs.collect(declared, "mine", train_missing=True)) == len(read_rows(tmp_path)) == 2


def test_a_writer_that_never_lets_go_is_named(tmp_path, monkeypatch):
    path = tmp_path / "chapter.jsonl"
    write_rows([a_row(SMALL)], path)
    monkeypatch.setattr(runs, "LOCK_WAIT_S", 0.2)
    with runs.FileLock(path.with_name("rows.lock")):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} on .* has kept .*chapter.jsonl locked"):
            write_rows([a_row(dataclasses.replace(SMALL, seed=1))], path)
    write_rows([a_row(dataclasses.replace(SMALL, seed=1))], path)
    assert len(read_rows(tmp_path)) == 2


def test_a_full_disk_leaves_the_old_rows_whole(tmp_path, monkeypatch):
    path = tmp_path / "chapter.jsonl"
    write_rows([a_row(SMALL)], path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="chapter.jsonl cannot be written .*No space left.* untouched"):
        write_rows([a_row(dataclasses.replace(SMALL, seed=1))], path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert list(read_rows(tmp_path)) == [SMALL.key]


@pytest.mark.parametrize(("variable", "what"), [("SNIP_RESULTS", "Rows"), ("SNIP_CACHE", "Checkpoints")])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, variable, what):
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path / "results"))
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    monkeypatch.setattr(runs, "make_rows", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(OSError, match=f"{what} cannot be written to .*: no run was started"):
        collect([SMALL], "chapter", train_missing=True)


def test_a_row_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chapter.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chapter.jsonl is damaged .*UTF-8"):
        read_rows(tmp_path)


# --------------------------------------------------------------------------------------- collect


def test_collect_says_what_is_missing_and_trains_only_that(folders, capsys):
    four = sweep(SMALL, sparsity=[0.0, 0.9], seed=range(2))
    assert len(collect(four[:1], "chapter", train_missing=True)) == 1
    first = (folders / "results/chapter.jsonl").read_text()
    capsys.readouterr()
    assert len(collect(four, "chapter")) == 1
    told = capsys.readouterr()
    assert (
        "3 of 4 runs have no row yet: lenet300 digits snip 0.0, seed 1; lenet300 digits snip 0.9, seeds 0-1."
        in told.out
    )
    assert not told.err  # nothing is shown there unless something is trained
    table = collect(four, "another", train_missing=True)
    assert [*zip(table["sparsity"], table["seed"], strict=True)] == [(r.sparsity, r.seed) for r in four]
    assert (folders / "results/chapter.jsonl").read_text() == first
    assert len(read_rows(folders / "results")) == 4
    assert not list((folders / "cache").glob("*"))  # a finished run leaves no checkpoint


def test_a_group_writes_no_row_that_another_chapter_has_already(folders, monkeypatch):
    two = sweep(SMALL, seed=range(2))
    write_rows([a_row(two[0])], folders / "results/another.jsonl")
    monkeypatch.setattr(runs, "_work", lambda *_: iter([(two, [a_row(run) for run in two])]))
    assert len(collect(two, "chapter", train_missing=True)) == 2
    assert len(read_rows(folders / "results")) == 2  # which refuses a key that occurs twice


def test_rows_say_everything_about_where_they_come_from(folders):
    row = collect([SMALL], "chapter", train_missing=True).iloc[0]
    assert row["key"] == SMALL.key and row["steps"] == 40
    assert row[["commit", "dirty", "library", "torch", "device", "time", "seconds", "replicas"]].notna().all()
    assert len((folders / "results/chapter.jsonl").read_text()) < 2000


def test_a_row_names_the_code_that_was_there_when_its_run_began(folders, monkeypatch):
    """A library that is edited during a run did not make its row."""
    state = {"commit": "before"}
    monkeypatch.setattr(runs, "provenance", lambda: dict(state))
    monkeypatch.setattr(runs, "train", lambda *_, **__: state.update(commit="after") or {"curve": {}})
    assert runs.make_rows([SMALL])[0]["commit"] == "before"


def test_no_run_starts_after_the_budget_is_spent(folders, capsys):
    assert time_limit(0) == float("inf")
    assert collect([SMALL], "chapter", train_missing=True, until=time.time() - 1).empty
    assert "1 of 1 run has no row yet" in capsys.readouterr().out


def test_after_the_budget_nothing_is_even_scored(folders, monkeypatch):
    monkeypatch.setattr(runs, "make_rows", lambda *_, **__: pytest.fail("a run was started"))
    assert collect([SMALL], "chapter", train_missing=True, until=time.time() - 1).empty


def test_a_run_that_is_asked_for_twice_is_one_row(folders):
    write_rows([a_row(SMALL)], folders / "results/chapter.jsonl")
    assert len(rows_of([SMALL, SMALL])) == len(collect([SMALL, SMALL], "chapter")) == 1


def test_what_is_missing_is_named_by_ranges_of_seeds(folders, capsys):
    collect(sweep(SMALL, seed=[0, 1, 2, 7]), "chapter")
    assert "4 of 4 runs have no row yet: lenet300 digits snip 0.0, seeds 0-2, 7." in capsys.readouterr().out


def test_an_existing_row_gains_new_fields_with_their_defaults(folders):
    row = a_row(SMALL)
    del row["random_labels"]
    write_rows([row], folders / "results/chapter.jsonl")
    assert not rows_of([SMALL])["random_labels"].any()


def same_outcomes(ours, theirs):
    """Tell whether two tables say the same, apart from when and where."""
    columns = ("key", "test_error", "val_error", "train_loss", "curve", "kept", "diverged", "replicas")
    return all(list(ours[column]) == list(theirs[column]) for column in columns)


def test_groups_are_of_one_kind_and_of_the_asked_size_and_in_order(folders):
    others = [dataclasses.replace(SMALL, model="lenet5"), dataclasses.replace(SMALL, delay=5, sparsity=0.5)]
    runs_ = [*sweep(SMALL, sparsity=[0.0, 0.9], seed=range(3))[:5], *others, dataclasses.replace(SMALL, steps=50)]
    sizes = [[runs_.index(run) for run in group] for group in runs.groups_of(runs_, lambda run: 2)]
    assert sizes == [[0, 1], [2, 3], [4], [5], [6], [7]]
    assert [len(g) for g in runs.groups_of(sweep(SMALL, seed=range(7)), lambda run: 100)] == [7]
    longer = [dataclasses.replace(SMALL, sparsity=0.5, **after) for after in ({"attacked": True}, {"structured": True})]
    mixed = [longer[0], SMALL, longer[1], dataclasses.replace(SMALL, seed=1)]
    assert [len(group) for group in runs.groups_of(mixed, lambda run: 100)] == [1, 2, 1]


def test_a_group_is_chosen_by_replicas_and_its_rows_say_so(folders):
    five = [*sweep(SMALL, sparsity=[0.0, 0.9], seed=range(2)), dataclasses.replace(SMALL, steps=45)]
    table = collect(five, "chapter", train_missing=True, replicas=3)
    assert list(table["key"]) == [run.key for run in five] and list(table["replicas"]) == [3, 3, 3, 1, 1]
    assert not list((folders / "cache").glob("*"))
    with pytest.raises(ValueError, match="replicas is how many networks .* not -1"):
        collect(five, "chapter", replicas=-1)


def test_an_interrupted_group_goes_on_with_its_members_whatever_is_asked_for_next(folders, monkeypatch, capsys):
    run = dataclasses.replace(SMALL, steps=300, decay_every=150, lr=0.01)
    four, seen = sweep(run, seed=range(4)), []
    whole = collect(four, "whole", train_missing=True, replicas=3)
    (folders / "results/whole.jsonl").unlink()
    train_replicas = runs.train_replicas

    def stopped(group, *, deadline, tick, **options):
        seen.append(group)
        return train_replicas(group, deadline=0.0 if len(seen) == 1 else deadline, tick=tick, **options)

    monkeypatch.setattr(runs, "train_replicas", stopped)
    assert list(collect(four[:3], "chapter", train_missing=True, replicas=3)["seed"]) == []
    asked = [four[3], four[1]]  # another order and another composition
    assert list(collect(asked, "chapter", train_missing=True, replicas=2)["seed"]) == [3, 1]
    assert seen == [four[:3], four[:3]]
    assert same_outcomes(rows_of(four), whole)
    assert not list((folders / "cache").glob("*"))


def test_a_run_that_fails_stops_no_other_and_is_told(folders, monkeypatch, capsys):
    three = sweep(SMALL, seed=range(3))
    train_ = runs.train

    def fails(run, **options):
        if run.seed == 1:
            raise ValueError("this run fails")
        return train_(run, **options)

    monkeypatch.setattr(runs, "train", fails)
    with pytest.raises(ValueError, match="this run fails"):
        collect(three, "chapter", train_missing=True)
    told = capsys.readouterr().err
    assert "2/3" in told and "0 diverged, 1 failed" in told and "1 x lenet300" in told
    assert list(rows_of(three)["seed"]) == [0, 2]


@pytest.mark.parametrize("cluster", ["", "local"])
def test_a_run_that_cannot_be_scored_fails_no_other_of_its_group(cluster, folders, capsys):
    four = sweep(SMALL, sparsity=[0.9], seed=range(4))
    five = [*four[:2], dataclasses.replace(four[0], init="rn", init_sd=1e60), *four[2:]]
    with pytest.raises(ValueError, match="no connection can be scored"):
        collect(five, "chapter", train_missing=True, replicas=5, cluster=cluster)
    assert "0 diverged, 1 failed" in capsys.readouterr().err
    assert list(rows_of(five)["replicas"]) == [2, 2, 2, 2]  # of two, of three the first fails, and of the other two


def test_what_fails_after_a_checkpoint_waits_there_whole(folders, monkeypatch, capsys):
    groups = []

    def fails(group, *, checkpoint, **options):
        groups.append(group)
        if len(group) == 3:
            checkpoint.touch()
        raise ValueError("this group fails")

    monkeypatch.setattr(runs, "train_replicas", fails)
    for three in (sweep(SMALL, seed=range(3)), sweep(SMALL, seed=range(3, 6))):
        with pytest.raises(ValueError, match="this group fails"):
            collect(three, "chapter", train_missing=True, replicas=3)
        assert "0 diverged, 3 failed" in capsys.readouterr().err
    assert [len(group) for group in groups] == [3, 3]


def test_what_fails_leaves_no_tensor_behind(folders, monkeypatch):
    held = []

    def begun():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise MemoryError(f"no room for {tensor.numel()} numbers")

    def fails(run, **options):
        assert all(other() is None for other in held)  # of the runs before
        try:
            begun()
        except MemoryError as error:
            raise ValueError("this run fails") from error

    monkeypatch.setattr(runs, "train", fails)
    with pytest.raises(ValueError, match="this run fails"):
        collect(sweep(SMALL, seed=range(3)), "chapter", train_missing=True)
    assert len(held) == 3


def test_what_would_meet_every_run_stops_at_once(folders, monkeypatch):
    calls = []

    def no_data(run, **options):
        calls.append(run)
        raise FileNotFoundError("there is no such data set")

    monkeypatch.setattr(runs, "train", no_data)
    with pytest.raises(FileNotFoundError, match="no such data set"):
        collect(sweep(SMALL, seed=range(3)), "chapter", train_missing=True)
    assert len(calls) == 1


def test_the_rows_of_a_group_are_written_all_or_none(folders, monkeypatch):
    path = folders / "results/chapter.jsonl"
    three, fsync, full = sweep(SMALL, seed=range(3)), os.fsync, [True]

    def once_full(descriptor):
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", once_full)
    with pytest.raises(OSError, match="No space left"):
        collect(three, "chapter", train_missing=True, replicas=3)
    assert not path.exists() and len(list((folders / "cache").glob("group-*"))) == 1
    assert len(collect(three, "chapter", train_missing=True, replicas=3)) == 3


def test_every_core_gives_the_same_rows(folders, monkeypatch, capsys):
    runs_ = [*sweep(SMALL, sparsity=[0.0, 0.9], seed=range(3)), dataclasses.replace(SMALL, model="lenet5", lr=0.01)]
    here = collect(runs_, "chapter", train_missing=True, replicas=3)
    monkeypatch.setenv("SNIP_RESULTS", str(folders / "elsewhere"))
    there = collect(runs_, "chapter", train_missing=True, replicas=3, cluster="local")
    assert same_outcomes(here, there) and set(here["replicas"]) == {1, 3}
    assert "7/7" in capsys.readouterr().err


def _collect_in(folder, runs_):
    os.environ |= {"SNIP_RESULTS": f"{folder}/results", "SNIP_CACHE": f"{folder}/cache"}
    with open(os.devnull, "w") as sys.stderr:
        collect(runs_, "chapter", train_missing=True)


def test_killed_ten_times_at_random_no_finished_row_is_lost_and_none_is_made_twice(tmp_path):
    run = dataclasses.replace(SMALL, steps=400, decay_every=200)
    runs_ = sweep(run, sparsity=[0.0, 0.9], seed=range(12))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snip_lib.runs", "sklearn.datasets", "torch._dynamo"])  # import once
    chance, seen = random.Random(1), {}
    for attempt in range(11):
        process = context.Process(target=_collect_in, args=(tmp_path, runs_))
        process.start()
        if attempt < 10:
            while process.is_alive() and len(read_rows(tmp_path / "results")) == len(seen):  # not yet at work
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.7))
            process.kill()
        process.join()
        rows = read_rows(tmp_path / "results")
        assert seen.items() <= rows.items()  # the very same rows, time stamps included
        seen = rows
    assert process.exitcode == 0
    assert seen.keys() == {run.key for run in runs_}


# ------------------------------------------------------------------------ nothing is lost


WHEN_AND_HOW_LONG = {"seconds", "scoring_seconds", "time", "commit", "dirty"}
MANY = [  # two groups of three, one of which holds a run that diverges, and runs of their own
    *sweep(dataclasses.replace(SMALL, steps=1_500, decay_every=600, lr=0.02), sparsity=[0.0, 0.9], seed=range(2)),
    dataclasses.replace(SMALL, steps=1_500, decay_every=600, lr=1e6),
    dataclasses.replace(SMALL, steps=1_500, decay_every=600, sparsity=0.5, random_labels=True),
    dataclasses.replace(SMALL, steps=1_500, decay_every=600, sparsity=0.9, delay=400, every=250, rounds=3, rewind=True),
    dataclasses.replace(SMALL, model="lenet5", steps=220, decay_every=120, lr=0.02, sparsity=0.95, optimizer="sgd"),
    dataclasses.replace(SMALL, sparsity=0.9, steps=0),
]
EAGER = "import snip_lib.train\nsnip_lib.train.CHECKPOINT_S = 0.0\n"


def _sweep_in(folder, disturbance, after):
    """Collect `MANY` with a checkpoint every 100 steps, and meet the disturbance after so many calls."""
    os.environ |= {"SNIP_RESULTS": f"{folder}/results", "SNIP_CACHE": f"{folder}/cache"}
    train.CHECKPOINT_S, calls = 0.0, itertools.count()
    preload = folder / "eager.py"
    preload.write_text(EAGER)

    def then(error, call):
        def disturbed(*args, **options):
            if next(calls) == after:
                raise error
            return call(*args, **options)

        return disturbed

    if disturbance == "full disk":  # for checkpoints, and for rows
        full = OSError(errno.ENOSPC, "No space left on device")
        train.save_file, os.fsync = then(full, train.save_file), then(full, os.fsync)
    elif disturbance == "exception":
        train.examples = then(RuntimeError("something unforeseen"), train.examples)
    preloaded = dask.config.set({"distributed.worker.preload": [str(preload)]})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), preloaded:
        collect(MANY, "chapter", train_missing=True, replicas=3, cluster="local" if disturbance == "worker" else "")


def outcomes_in(folder):
    """Return the rows by key, without when they were made and how long that took."""
    rows = read_rows(folder / "results").items()
    return {key: {k: v for k, v in row.items() if k not in WHEN_AND_HOW_LONG} for key, row in rows}


def workers_of(pid):
    """Return the processes that Dask started for the process `pid`."""
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    except psutil.Error:
        return []


@pytest.mark.long
def test_a_sweep_disturbed_at_twenty_moments_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    """SIGKILL of the process and of workers, a full disk, an exception: the same keys, masks, curves and errors."""
    chance, context = random.Random(2), multiprocessing.get_context("spawn")

    def start(folder, disturbance="none", after=0):
        folder.mkdir(exist_ok=True)
        process = context.Process(target=_sweep_in, args=(folder, disturbance, after))
        process.start()
        return process

    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.join()
    expected = outcomes_in(tmp_path / "undisturbed")
    assert undisturbed.exitcode == 0 and expected.keys() == {run.key for run in MANY}

    kinds = itertools.cycle(["kill", "full disk", "kill", "exception"])
    n_met, folder, attempt = 0, tmp_path / "0", 0
    while n_met < 20:
        disturbance = next(kinds) if attempt else "worker"
        process, killed = start(folder, disturbance, chance.randrange(12)), 0
        while disturbance == "kill" and process.is_alive() and not killed:
            if (folder / "cache").exists():  # at work
                time.sleep(chance.uniform(0, 2))
                process.kill()
                killed = 1
            time.sleep(0.01)
        while disturbance == "worker" and process.is_alive() and killed < 4:
            if (workers := workers_of(process.pid)) and any((folder / "cache").glob("*")):
                time.sleep(chance.uniform(0, 4))
                with contextlib.suppress(psutil.NoSuchProcess):
                    chance.choice(workers).kill()
                    killed += 1
            time.sleep(0.05)
        process.join()
        n_met += killed if disturbance in ("kill", "worker") else process.exitcode != 0
        made = outcomes_in(folder)
        assert made.items() <= expected.items(), disturbance
        attempt += 1
        if made.keys() == expected.keys():  # once more from the beginning
            assert not list((folder / "cache").glob("*.safetensors"))
            folder = tmp_path / str(attempt)
    last = start(folder)
    last.join()
    assert last.exitcode == 0 and outcomes_in(folder) == expected
    assert not list((folder / "cache").glob("*.safetensors"))
