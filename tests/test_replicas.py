"""Runs trained as one group are the single runs: stacked, up to rounding; side by side, to the last bit.

A stopped group goes on with the same bits.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from snip_lib import data, devices, replicas, robustness, runs, train
from snip_lib.models import MODELS, VGG
from snip_lib.runs import Run, sweep

SMALL = Run("lenet300", "digits", sparsity=0.9, steps=50, decay_every=20, batch_size=20, lr=0.05)
UNTIMED = ("seconds", "scoring_seconds", "replicas")


def varied(run):
    """Return five runs that differ in everything that runs of one group may differ in."""
    return [
        run,
        dataclasses.replace(run, sparsity=0.0),
        dataclasses.replace(run, seed=1, method="random", sparsity=0.5, lr=run.lr / 2, decay_every=15),
        dataclasses.replace(run, seed=2, random_labels=True, prune_biases=False),
        dataclasses.replace(run, train_init="fresh", init="lecun", rounds=2, sparsity=0.98, decay=0.5),
    ]


def alone(run, folder, **options):
    """Train `run` by the definition, in float64; return (outcome, final weights by name)."""
    path = folder / f"{run.key}.safetensors"
    outcome = train.train(run, checkpoint=path, dtype=torch.float64, **options)
    tensors = train.read_checkpoint(path)
    return outcome, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}


def grouped(runs, folder, dtype=torch.float64, **options):
    """Train `runs` as a group; return (outcomes, final tensors by name)."""
    path = folder / "group.safetensors"
    outcomes = replicas.train_replicas(runs, checkpoint=path, dtype=dtype, **options)
    return outcomes, train.read_checkpoint(path)


def growth(run, weights):
    """Return how far a change of 1e-15 of the first weights moves the last ones: no order of summation does better."""
    t = train.begin(run, data.load(run.dataset, seed=run.seed), dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in t.model.parameters():
            p.mul_(1 + 1e-15 * torch.randn(p.shape, generator=noise, dtype=torch.float64))
    train.drive(t, train.advance, train.look, lambda t: None, math.inf, lambda step: None)
    return max((p - weights[name]).abs().max().item() for name, p in t.model.named_parameters())


def check_group_is_single_runs(runs, folder, sensitive):
    """Compare weights and outcomes of a group with those of its runs alone, as far as rounding allows."""
    outcomes, tensors = grouped(runs, folder)
    tolerance = 1e-10
    for i, run in enumerate(runs):
        outcome, weights = alone(run, folder)
        if run in sensitive:
            tolerance = max(tolerance, 10 * growth(run, weights))
            assert tolerance < 1e-6, "training is chaotic here: this compares nothing"
        for name, expected in weights.items():
            torch.testing.assert_close(tensors[f"weight.{name}"][i], expected, rtol=0, atol=tolerance)
        assert {k: v for k, v in outcomes[i].items() if k not in UNTIMED} == {
            k: v for k, v in outcome.items() if k not in UNTIMED
        }
        assert outcomes[i]["replicas"] == len(runs)


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 1.0), ("adam", 0.02)])
@pytest.mark.parametrize(
    ("model", "lr"),
    [
        *(("lenet300", 0.05), ("lenet5", 0.02), ("lstm_s", 0.1), ("gru_s", 0.1)),
        *(pytest.param(model, 0.1, marks=pytest.mark.long) for model in ("lstm_b", "gru_b")),
    ],
)
def test_a_group_is_the_single_runs(model, lr, optimizer, factor, tmp_path, monkeypatch):
    run = dataclasses.replace(SMALL, model=model, optimizer=optimizer, lr=lr * factor)
    runs = varied(run)
    if model != "lenet300":
        runs = varied(dataclasses.replace(run, batch_size=10))[2:4]
        monkeypatch.setattr(train, "curve_points", lambda steps: [steps])  # ten evaluations take longer than training
    check_group_is_single_runs(runs, tmp_path, sensitive=runs[:1])


def test_attacked_and_structured_runs_of_a_group_have_the_rows_that_they_have_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "ATTACKED", 5)
    monkeypatch.setattr(robustness, "RADII", {"linf": (0.1, 1.0), "l2": (1.0,)})
    runs = [*varied(dataclasses.replace(SMALL, attacked=True))[:3], dataclasses.replace(SMALL, structured=True)]
    outcomes, _ = grouped(runs, tmp_path)
    for run, ours in zip(runs, outcomes, strict=True):
        expected = alone(run, tmp_path)[0] | {"replicas": 4}
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in expected.items() if "seconds" not in k
        }
        assert run.structured != ("attacked_linf_0.1" in ours) and run.structured == ("parameters_left" in ours)


@pytest.mark.long
def test_a_group_is_the_single_runs_for_a_thousand_steps(tmp_path):
    run = dataclasses.replace(SMALL, steps=1_000, decay_every=400, lr=0.01, batch_size=100)
    runs = sweep(run, sparsity=[0.0, 0.9], seed=[0, 1])
    check_group_is_single_runs(runs, tmp_path, sensitive=runs)


def test_a_replica_that_diverges_has_its_row_and_leaves_the_others_alone(tmp_path):
    runs = sweep(dataclasses.replace(SMALL, steps=250, decay_every=250), seed=range(3))
    tame, _ = grouped(runs, tmp_path)
    before = train.read_checkpoint(tmp_path / "group.safetensors")
    (tmp_path / "group.safetensors").unlink()
    wild = dataclasses.replace(runs[1], lr=1e6)
    outcomes, after = grouped([runs[0], wild, runs[2]], tmp_path)
    for name, t in before.items():
        if name != "count":
            assert torch.equal(t[0], after[name][0]) and torch.equal(t[2], after[name][2]), name
    expected, _ = alone(wild, tmp_path)
    untimed = [{k: v for k, v in o.items() if k not in UNTIMED} for o in (outcomes[1], expected, outcomes[0], tame[0])]
    assert untimed[0] == untimed[1] and untimed[2] == untimed[3]
    assert outcomes[1]["diverged"] and outcomes[1]["diverged_step"] <= 100 and not outcomes[0]["diverged"]
    json.dumps(outcomes, allow_nan=False)


def test_a_group_that_diverged_whole_ends_there(tmp_path):
    seen = []
    runs = sweep(dataclasses.replace(SMALL, lr=1e6, steps=5_000), seed=range(2))
    outcomes, _ = grouped(runs, tmp_path, tick=seen.append)
    assert [o["diverged_step"] for o in outcomes] == [100, 100] and seen[-1] == 100


class _Clock(float):
    """A deadline that comes when training reports a certain step."""

    def __new__(cls, step):
        self = super().__new__(cls, math.inf)
        self.step, self.now = step, 0
        return self

    def tick(self, step):
        self.now = step

    def __lt__(self, _):  # asked as `time.time() > deadline`
        return self.now >= self.step


def check_a_stopped_group_ends_with_the_same_bits(runs, folder, stops, **options):
    (folder / "whole").mkdir()
    whole, expected = grouped(runs, folder / "whole", torch.float32, **options)
    for stop in stops:
        clock = _Clock(stop)
        path = folder / "group.safetensors"
        ended = replicas.train_replicas(runs, checkpoint=path, deadline=clock, tick=clock.tick, **options)
        assert ended is None
        progress = train.read_progress(path)
        assert progress["step"] == stop
        assert [Run(**fields) for fields in progress["runs"]] == runs
    outcomes, tensors = grouped(runs, folder, torch.float32, **options)
    for name, t in expected.items():
        torch.testing.assert_close(tensors[name], t, rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(outcomes, whole, strict=True):
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_group_stopped_anywhere_ends_with_the_same_bits(optimizer, tmp_path):
    run = dataclasses.replace(SMALL, optimizer=optimizer, lr=0.01, steps=350, decay_every=130)
    runs = [*varied(run), dataclasses.replace(run, lr=1e8)]  # one diverges before the stops
    check_a_stopped_group_ends_with_the_same_bits(runs, tmp_path, [100, 300])


# ----------------------------------------------------------------------- side by side


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Return a run with batch norm, augmentation and bf16: a VGG of eight channels on a CIFAR-10 of eighty images."""
    monkeypatch.setitem(MODELS, "vgg_like", functools.partial(VGG, stages=(((8, 3),),) * 5, hidden=1))
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "tiny"))  # data sets are kept by folder
    chance = data.generator(0, "tiny")
    x = torch.randint(256, (80, 3, 32, 32), generator=chance, dtype=torch.uint8)
    y = torch.arange(80) % 10
    monkeypatch.setitem(data.DATASETS, "cifar10", lambda folder: data.Raw(x[:60], y[:60], x[60:], y[60:]))
    short = {"steps": 8, "decay_every": 3, "batch_size": 6, "lr": 0.01}
    return Run("vgg_like", "cifar10", sparsity=0.9, augment="standard", precision="bf16", **short)


def check_side_by_side_is_alone(runs, folder, **options):
    """Compare the bits of the last checkpoint, and the rows, of a group with those of its runs alone."""
    outcomes, tensors = grouped(runs, folder, torch.float32, **options)
    assert {name.partition(".")[0] for name in tensors} == {str(i) for i in range(len(runs))}
    for i, (run, ours) in enumerate(zip(runs, outcomes, strict=True)):
        path = folder / f"{run.key}.safetensors"
        theirs, expected = train.train(run, checkpoint=path), train.read_checkpoint(path)
        own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
        assert own.keys() == expected.keys()
        for name, t in expected.items():
            torch.testing.assert_close(own[name], t, rtol=0, atol=0, equal_nan=True)
        assert {k: v for k, v in ours.items() if k not in UNTIMED} == {
            k: v for k, v in theirs.items() if k not in UNTIMED
        }
        assert ours["replicas"] == len(runs)
    return outcomes


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"precision": "float32", "augment": "code", "optimizer": "adam", "lr": 0.001},
        {"model": "lenet5", "augment": "shift"},
        pytest.param({"model": "alexnet_s"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_side_by_side_every_run_is_the_run_alone_to_the_last_bit(other, tiny, tmp_path):
    run = dataclasses.replace(tiny, **other)
    dense, odd = dataclasses.replace(run, sparsity=0.0), dataclasses.replace(run, seed=1, random_labels=True, decay=0.5)
    check_side_by_side_is_alone([run, odd, dense], tmp_path)


def test_side_by_side_the_order_of_the_runs_is_that_of_their_rows(tiny, tmp_path):
    members = sweep(dataclasses.replace(tiny, model="lenet300"), seed=[2, 0, 1])
    rows, turned = (
        [{k: v for k, v in row.items() if k not in UNTIMED} for row in replicas.train_replicas(group)]
        for group in (members, members[::-1])
    )
    assert rows == turned[::-1] and rows[0] != rows[1]


def test_side_by_side_seconds_are_a_share_of_those_of_the_group(tiny):
    whole = time.perf_counter()
    rows = replicas.train_replicas(sweep(dataclasses.replace(tiny, model="lenet300"), seed=range(3)))
    whole = time.perf_counter() - whole
    seconds = [row["seconds"] for row in rows]  # rounded, and each sums its parts by itself
    assert seconds == pytest.approx([seconds[0]] * 3, rel=1e-3) and 0 < 3 * seconds[0] <= whole * 1.01


@pytest.mark.parametrize("model", ["vgg_like", "lenet300"])
def test_side_by_side_a_group_stopped_anywhere_ends_with_the_same_bits(model, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CLOCK_S", 0.0)  # so that it may stop at any step
    run = dataclasses.replace(tiny, model=model)
    members = [run, dataclasses.replace(run, seed=1, sparsity=0.0)]
    if model == "lenet300":
        members.append(dataclasses.replace(run, lr=1e30))  # diverges before the first stop
    check_a_stopped_group_ends_with_the_same_bits(members, tmp_path, [3, 4, 7])


def test_side_by_side_a_run_that_diverges_has_its_row_and_leaves_the_others_alone(tiny, tmp_path):
    members = sweep(dataclasses.replace(tiny, model="lenet300"), seed=range(3))
    members[1] = dataclasses.replace(members[1], lr=1e30)
    rows = check_side_by_side_is_alone(members, tmp_path)
    assert [row["diverged_step"] is None for row in rows] == [True, False, True]
    assert rows[1]["diverged_step"] < 8 and rows[1]["diverged"]
    json.dumps(rows, allow_nan=False)


def test_side_by_side_a_group_that_diverged_whole_ends_there(tiny, tmp_path):
    wild = sweep(dataclasses.replace(tiny, model="lenet300", lr=1e30), seed=range(2))
    seen = []
    rows = check_side_by_side_is_alone(wild, tmp_path, tick=seen.append)
    assert seen[-1] == max(row["diverged_step"] for row in rows) < 8


def test_side_by_side_a_checkpoint_that_cannot_be_written_loses_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_S", 0.0)  # at every look, which is at every step here
    members = sweep(dataclasses.replace(tiny, model="lenet300"), seed=range(2))
    save_file, calls = train.save_file, itertools.count()

    def full_at_the_third(tensors, path, metadata):
        if next(calls) == 2:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    (tmp_path / "group").mkdir()
    path = tmp_path / "group" / "group.safetensors"
    monkeypatch.setattr(train, "save_file", full_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        replicas.train_replicas(members, checkpoint=path)
    assert list(path.parent.iterdir()) == [path] and train.read_progress(path)["step"] == 2
    (tmp_path / "group.safetensors").write_bytes(path.read_bytes())
    check_side_by_side_is_alone(members, tmp_path)


def test_side_by_side_groups_are_collected_and_wait_as_others_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SNIP_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SNIP_CACHE", str(tmp_path / "cache"))
    three = sweep(dataclasses.replace(SMALL, augment="shift", steps=12), seed=range(3))
    assert runs.make_rows(three[:2], deadline=0.0) == []
    assert list(runs.waiting_groups()) == [three[:2]]
    table = runs.collect(three, "chapter", train_missing=True, replicas=3)
    assert list(table["replicas"]) == [2, 2, 1] and not list((tmp_path / "cache").glob("*"))
    for run, row in zip(three, table.to_dict("records"), strict=True):
        expected = train.train(run)
        assert {k: row[k] for k in expected if k not in UNTIMED} == {
            k: v for k, v in expected.items() if k not in UNTIMED
        }


# ------------------------------------------------------------------------- fast forms


@pytest.mark.long
def test_the_compiled_step_is_the_step_and_goes_on_with_the_same_bits(tmp_path):
    runs = sweep(dataclasses.replace(SMALL, steps=300, decay_every=130), sparsity=[0.0, 0.9], seed=range(2))
    fifty = [dataclasses.replace(run, steps=50) for run in runs]
    plain, expected = grouped(fifty, tmp_path, compiled=False)
    (tmp_path / "group.safetensors").unlink()
    compiled, tensors = grouped(fifty, tmp_path, compiled=True)
    for name, t in expected.items():
        torch.testing.assert_close(tensors[name], t, rtol=0, atol=1e-10)
    (tmp_path / "group.safetensors").unlink()
    check_a_stopped_group_ends_with_the_same_bits(runs, tmp_path, [100, 200], compiled=True)


def test_every_group_of_a_process_is_compiled(monkeypatch):
    """PyTorch gives a function up that was compiled eight times, without a word: the ninth group would be slow."""
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for seed in range(2):
            pair = sweep(dataclasses.replace(SMALL, steps=5), seed=range(seed, seed + 2))
            replicas.train_replicas(pair, compiled=True)


def test_without_a_compiler_the_plain_step_is_taken_and_this_is_said_once(tmp_path, monkeypatch):
    runs = sweep(dataclasses.replace(SMALL, steps=120), seed=range(2))
    _, expected = grouped(runs, tmp_path)
    (tmp_path / "group.safetensors").unlink()

    def no_compiler(step, **_):
        def fails(*inputs):
            step(*inputs)  # fails late: what it changed is taken back
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning, match=r"fast form of the training step .*\(no C\+\+ compiler\)") as told:
        _, tensors = grouped(runs, tmp_path, compiled=True)
    assert len(told) == 1
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())


def through_buffers(forms, inputs, state):
    """Do what `devices.captured` does, without a GPU: warm up, and read every batch from the same tensors."""
    buffers = [x.clone() for x in inputs]
    devices.warm_up(forms[-1], buffers, state)

    def replay(*batch):
        for buffer, x in zip(buffers, batch, strict=True):
            buffer.copy_(x)
        forms[-1](*buffers)

    return replay


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_a_gpu_replays_reads_nothing_but_its_buffers_and_leaves_no_trace_of_the_warm_up(
    optimizer, tmp_path, monkeypatch
):
    run = dataclasses.replace(SMALL, optimizer=optimizer, lr=0.01, delay=20, every=10, rounds=2, rewind=True)
    runs = varied(dataclasses.replace(SMALL, optimizer=optimizer, lr=0.01))[:3]
    (tmp_path / "plain").mkdir()
    _, expected = alone(run, tmp_path / "plain")
    _, expected_group = grouped(runs, tmp_path / "plain")
    monkeypatch.setattr(train, "fastest", through_buffers)
    monkeypatch.setattr(replicas, "fastest", through_buffers)
    _, weights = alone(run, tmp_path)
    _, tensors = grouped(runs, tmp_path)
    assert all(torch.equal(weights[name], t) for name, t in expected.items())
    assert all(torch.equal(tensors[name], t) for name, t in expected_group.items())


@pytest.fixture
def streams(monkeypatch):
    """Put CUDA's streams on record, without a GPU: return what they were told, and the stream in use."""
    told = []

    class Stream(str):
        def __new__(cls):
            return super().__new__(cls, f"side {sum(words[0] == 'made' for words in told)}")

        def __init__(self):
            told.append(("made", self))

        def wait_stream(self, other):
            told.append((self, "waits for", other))

    trunk = str.__new__(Stream, "trunk")
    current = [trunk]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    return told, current


def test_every_side_stream_forks_from_the_trunk_and_all_join_it_at_the_end(streams):
    told, current = streams
    steps = [lambda line, i=i: told.append((current[-1], "takes", i, line)) for i in range(3)]
    step = devices.side_by_side(steps)
    del told[:]
    for _ in range(2):  # as often as one likes, on the same streams
        step("abc")
    forked = [
        *(("side 0", "waits for", "trunk"), ("side 0", "takes", 0, "a")),
        *(("side 1", "waits for", "trunk"), ("side 1", "takes", 1, "b")),
        *(("side 2", "waits for", "trunk"), ("side 2", "takes", 2, "c")),
    ]
    assert told == 2 * [*forked, *(("trunk", "waits for", f"side {i}") for i in range(3))]
    assert current == ["trunk"]
    with pytest.raises(ValueError, match="zip"):
        step("ab")  # a step without a line


def test_what_a_gpu_replays_side_by_side_leaves_no_trace_of_the_warm_up(streams, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "fastest", through_buffers)
    monkeypatch.setattr(replicas, "in_turn", devices.side_by_side)
    check_side_by_side_is_alone(sweep(tiny, seed=range(2)), tmp_path)
    (tmp_path / "group.safetensors").unlink()
    wild = sweep(dataclasses.replace(tiny, model="lenet300", optimizer="adam"), seed=range(3))
    wild[0] = dataclasses.replace(wild[0], lr=1e30)
    assert check_side_by_side_is_alone(wild, tmp_path)[0]["diverged"]  # after which there is another graph, of two


def test_a_graph_is_prepared_without_the_words_that_are_known_and_with_all_others(streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    folder = Path(torch.__file__).parent
    source = "".join((folder / file).read_text() for file in ("optim/optimizer.py", "_inductor/compile_fx.py"))
    words = iter([*devices.KNOWN, "Something else"])

    def step(x):
        for sentence in words:  # each is said once, and not while the graph is captured
            warnings.warn(f"{sentence} is so.", stacklevel=2)

    with pytest.warns(UserWarning, match="Something else is so") as told:
        devices.captured(step, [torch.zeros(1)], dict)
    assert len(told) == 1 and all(sentence in source for sentence in devices.KNOWN)


def test_of_a_capture_that_fails_the_reason_is_told(monkeypatch):
    def captured(form, inputs, state):
        try:
            raise ValueError("a look at a number")
        finally:
            raise RuntimeError("the capture failed")

    monkeypatch.setattr(devices, "captured", captured)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match=r"\(the capture failed: a look at a number\)"):
        assert devices.fastest([print], [on_gpu], dict) is print


class Launched(TorchDispatchMode):
    """The names of all operations meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# A GPU waits for these: numbers or shapes that are read from a tensor, or a tensor that is made of the host's numbers.
LOOKS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "_unique2", "_assert_async"}


def test_a_look_is_seen():
    with Launched() as launched:
        x = torch.tensor([1.0, 2.0])
        assert (x > 1).any() and len(x[x > 1]) == 1
    assert {"_local_scalar_dense", "lift_fresh"} <= launched.names & LOOKS


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["lenet5", "gru_s", "vgg_like"])
def test_what_a_gpu_replays_looks_at_no_tensor_and_leaves_no_autograd_graph(model, optimizer, tiny):
    run = dataclasses.replace(SMALL, model=model, optimizer=optimizer, method="magnitude")
    if model == "vgg_like":  # trained alone, and side by side
        t = train.begin(dataclasses.replace(tiny, optimizer=optimizer), data.load("cifar10"))
        step = train.forms(t)[-1]
    else:  # stacked
        t = replicas.begin(sweep(run, seed=range(2)), torch.device("cpu"), None, torch.float32, False)
        step = replicas.step_of(t)
    table = train.examples(t.run.augment, t.orders, range(1), torch.device("cpu"))[0]
    inputs = [table[0] if model == "vgg_like" else table]
    step(*inputs)
    with Launched() as launched:
        step(*inputs)
    assert len(launched.names) > 20 and not launched.names & LOOKS

    def accumulators():  # what adds up the gradient of a parameter; a graph that is left keeps it, and its stream
        return [p.view_as(p).grad_fn.next_functions[0][0].metadata for p in t.model.parameters()]

    if model == "vgg_like":
        for kept in accumulators():
            kept["seen"] = True
        assert not any(accumulators())
        loss = t.model(train.batch(t, *inputs)[0]).sum()
        for kept in accumulators():
            kept["seen"] = True
        assert all(accumulators()) and loss.requires_grad


@pytest.mark.parametrize("model", ["lenet5", "lenet300", "alexnet_s"])
def test_a_network_by_patches_is_the_network(model):
    net = MODELS[model]((1, 28, 28), 10).double()
    fast, x = replicas.by_patches(net), torch.randn(3, 1, 28, 28, generator=data.generator(0, "x"), dtype=torch.float64)
    n_patches = sum(isinstance(module, replicas.Patches) for module in fast.modules())
    assert n_patches == {"lenet5": 2, "lenet300": 0, "alexnet_s": 0}[model]
    assert not any(isinstance(module, replicas.Patches) for module in net.modules())
    outputs = [n(x) for n in (net, fast)]
    gradients = [
        torch.autograd.grad(out.square().sum(), list(n.parameters()))
        for out, n in zip(outputs, (net, fast), strict=True)
    ]
    for ours, theirs in ((outputs[1], outputs[0]), *zip(*gradients, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)


def test_stacked_networks_by_patches_cut_them_at_once_and_multiply_each_image_by_itself():
    n_runs, n_images, shapes = 2, 3, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("im2col", "convolution", "convolution_backward"), name
            if name in ("bmm", "mm", "addmm"):
                shapes.append([list(t.shape) for t in args[-2:]])
            return func(*args, **(kwargs or {}))

    net = replicas.by_patches(MODELS["lenet5"]((1, 28, 28), 10).double())
    rng = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(n_runs, *p.shape, generator=rng, dtype=p.dtype) for n, p in net.named_parameters()}
    x = torch.randn(n_runs, n_images, 1, 28, 28, generator=rng, dtype=torch.float64)

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    with Products():
        gradients = torch.func.vmap(torch.func.grad(loss))(weights, x)
    by_convolution = MODELS["lenet5"]((1, 28, 28), 10).double()
    for i in range(n_runs):
        by_convolution.load_state_dict({name: w[i] for name, w in weights.items()})
        expected = torch.autograd.grad(by_convolution(x[i]).square().sum(), list(by_convolution.parameters()))
        for (name, ours), theirs in zip(gradients.items(), expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-9, atol=1e-9, msg=name)
    places = [pair for pair in shapes if any(size in (24 * 24, 8 * 8) for t in pair for size in t[1:])]
    assert len(places) >= 5 and {t[0] for pair in places for t in pair} == {n_runs * n_images}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["lenet300", "lenet5", "gru_s"])
def test_a_gpu_trains_what_a_cpu_trains(model, optimizer, tmp_path):
    rates = {"lr": 2**-10, "decay": 2**-3}  # exact in the float32 that a graph reads its rate from
    runs = varied(dataclasses.replace(SMALL, model=model, optimizer=optimizer, **rates))[:3]
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
    _, single = alone(runs[0], tmp_path / "cpu")
    _, captured = alone(runs[0], tmp_path / "cuda", device="cuda")
    _, expected = grouped(runs, tmp_path / "cpu")
    _, tensors = grouped(runs, tmp_path / "cuda", device="cuda")
    for ours, theirs in ((captured, single), (tensors, expected)):
        for name, t in theirs.items():
            torch.testing.assert_close(ours[name], t, rtol=0, atol=1e-9)


@needs_gpu
@pytest.mark.parametrize("model", ["alexnet_s", "vgg_c"])
def test_a_gpu_trains_side_by_side_what_it_trains_alone(model, tiny, tmp_path):
    members = sweep(dataclasses.replace(tiny, model=model, precision="float32"), sparsity=[0.0, 0.9], seed=range(2))
    _, tensors = grouped(members, tmp_path, device="cuda")
    for i, run in enumerate(members):
        for name, t in alone(run, tmp_path, device="cuda")[1].items():
            torch.testing.assert_close(tensors[f"{i}.model.{name}"], t, rtol=0, atol=1e-9)
    rows = replicas.train_replicas(sweep(tiny, seed=range(3)), device="cuda")  # bf16, compiled; a warning is an error
    assert all(math.isfinite(row["train_loss"]) for row in rows)


@needs_gpu
@pytest.mark.parametrize("precision", train.PRECISIONS)
def test_a_gpu_trains_batch_norm_as_one_graph_without_a_warning(precision, tmp_path):
    run = dataclasses.replace(SMALL, model="alexnet_s", augment="standard", precision=precision)
    outcome = train.train(run, device="cuda", checkpoint=tmp_path / "run.safetensors")
    assert math.isfinite(outcome["train_loss"]) and not outcome["diverged"]


# ---------------------------------------------------------------------- which, how many


@pytest.mark.parametrize(
    "other",
    [
        *({"model": "wrn_16_8"}, {"model": "wrn_16_10", "augment": "standard", "precision": "bf16"}, {"delay": 5}),
        *({"steps": 0}, {"every": 5, "rounds": 3}),
    ],
    ids=str,
)
def test_what_cannot_be_trained_together_is_trained_alone(other):
    run = dataclasses.replace(SMALL, **other)
    assert replicas.together(run) is None and replicas.together(SMALL) is not None
    assert replicas.how_many(run, "cpu") == 1
    with pytest.raises(ValueError, match="Runs in a group share model, dataset, .* these do not"):
        replicas.train_replicas([run, dataclasses.replace(run, seed=1)])


@pytest.mark.parametrize("other", [{"steps": 60}, {"model": "lenet5"}, {"batch_size": 10}, {"optimizer": "adam"}])
def test_a_group_has_one_architecture_and_one_schedule(other):
    with pytest.raises(ValueError, match="Runs in a group share"):
        replicas.train_replicas([SMALL, dataclasses.replace(SMALL, **other)])


@pytest.mark.parametrize("other", [{"augment": "shift"}, {"precision": "bf16"}, {"model": "alexnet_s"}], ids=str)
def test_what_cannot_be_stacked_goes_side_by_side_on_a_gpu_as_far_as_it_pays_and_fits(other, monkeypatch):
    run = dataclasses.replace(SMALL, steps=125_000, **other)
    assert replicas.stacked(SMALL) and not replicas.stacked(run) and replicas.together(run)
    assert replicas.how_many(run, "cpu") == 1
    fixed, each = replicas.memory(run)
    for n, expected in ((100, replicas.ABREAST), (5, 5), (0, 1)):
        monkeypatch.setattr(replicas, "free_memory", lambda device, n=n: (fixed + (n + 0.5) * each) / 0.8)
        assert replicas.how_many(run, "cuda") == expected
    monkeypatch.setattr(replicas, "free_memory", lambda device: fixed + 3.5 * each)
    with pytest.raises(ValueError, match=r"20 replicas of .* take about .* GB .* ask for at most 3"):
        replicas.train_replicas(sweep(run, seed=range(20)))


def test_the_memory_of_a_run_counts_its_batch_norm_and_its_bf16():
    run = dataclasses.replace(SMALL, model="alexnet_s")
    (fixed, each), (half_fixed, half) = (replicas.memory(r) for r in (run, dataclasses.replace(run, precision="bf16")))
    assert half < each < 2 * half
    assert half_fixed == pytest.approx(fixed, rel=0.05)  # scores are float64 in either case
    norms = train.initial_model(run, data.load("digits"))
    kept_by_norms = run.batch_size * 4 * (96 * 14**2 + 256 * 7**2)  # the inputs of the first two
    assert each > kept_by_norms + 4 * 4 * sum(t.numel() for t in norms.state_dict().values())


def test_a_cpu_takes_groups_where_they_were_measured_to_pay(monkeypatch):
    paper = Run("lenet300", "digits", sparsity=0.9)
    monkeypatch.setattr(replicas.shutil, "which", lambda name: "/usr/bin/g++")
    assert replicas.how_many(paper, "cpu") > 1
    assert replicas.how_many(dataclasses.replace(paper, model="lenet5"), "cpu") == 1
    assert replicas.how_many(dataclasses.replace(paper, steps=60), "cpu") == 1
    monkeypatch.setattr(replicas.shutil, "which", lambda name: None)
    assert replicas.how_many(paper, "cpu") == 1


def test_r_follows_the_memory_and_too_many_are_refused_with_a_sentence(monkeypatch):
    fixed, each = replicas.memory(SMALL)
    monkeypatch.setattr(replicas, "free_memory", lambda device: fixed + 10 * each)
    fits = replicas.fitting(SMALL, torch.device("cpu"))
    assert 1 < fits <= 10
    monkeypatch.setattr(replicas, "free_memory", lambda device: 0)
    assert replicas.fitting(SMALL, torch.device("cpu")) == 1
    monkeypatch.setattr(replicas, "free_memory", lambda device: fixed + 3.5 * each)
    with pytest.raises(ValueError, match=r"20 replicas of lenet300 take about .* GB .* ask for at most 3"):
        replicas.train_replicas(sweep(SMALL, seed=range(20)))


MEASURE = """
import sys
from pathlib import Path
from snip_lib import replicas
from snip_lib.runs import Run, sweep
model, n, optimizer = sys.argv[1], int(sys.argv[2]), sys.argv[3]
augment = "shift" if model == "alexnet_s" else "none"
run = Run(model, "digits", sparsity=0.9, steps=2, decay_every=2, optimizer=optimizer, lr=0.001, augment=augment)
peak = lambda: next(int(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
replicas.train_replicas(sweep(run, seed=range(1)))  # what is loaded once is not the group's
before = peak()
replicas.train_replicas(sweep(run, seed=range(n)))
fixed, each = replicas.memory(run)
print(1024 * (peak() - before), fixed + n * each)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("model", "n", "optimizer"),
    [("lenet300", 40, "sgd"), ("lenet300", 30, "adam"), ("lenet5", 8, "sgd")]
    + [pytest.param("alexnet_s", 6, "sgd", marks=pytest.mark.long)],
)
def test_the_peak_memory_stays_within_what_r_was_chosen_for(model, n, optimizer):
    done = subprocess.run([sys.executable, "-c", MEASURE, model, str(n), optimizer], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, promised = map(int, done.stdout.split())
    assert 0 < peak <= promised
    assert promised < 6 * peak  # nor is memory left empty for nothing


# -------------------------------------------------------------------------- precision


def test_bf16_is_for_the_passes_and_leaves_weights_scores_and_evaluation_in_float32(tmp_path):
    run = dataclasses.replace(SMALL, precision="bf16")
    outcomes, tensors = [], []
    for each in (SMALL, run):
        outcomes.append(train.train(each, checkpoint=tmp_path / f"{each.key}.safetensors"))
        tensors.append(train.read_checkpoint(tmp_path / f"{each.key}.safetensors"))
    assert all(t.dtype in (torch.float32, torch.bool) for t in tensors[1].values())
    assert outcomes[0]["kept"] == outcomes[1]["kept"]
    name = "model.fc1.weight"
    assert not torch.equal(tensors[0][name], tensors[1][name])
    torch.testing.assert_close(tensors[0][name], tensors[1][name], rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="Unknown precision 'half': choose one of float32, bf16"):
        dataclasses.replace(SMALL, precision="half")
