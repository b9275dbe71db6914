"""Training is masked SGD and nothing else; a stopped run goes on as if it had never stopped."""

import dataclasses
import json
import math
import os
import random
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from snip_lib import data, devices, paths, robustness, train
from snip_lib.data import BatchOrder
from snip_lib.masks import n_kept
from snip_lib.models import MODELS
from snip_lib.runs import Run, read_rows, sweep
from snip_lib.saliency import prunable
from snip_lib.structured import read_under, shrink, units_of
from snip_lib.tables import is_cut_off

SMALL = Run("lenet300", "digits", sparsity=0.9, steps=40, decay_every=20, batch_size=50)


def weights_after(run, folder, **options):
    """Train `run` and return (outcome, its final tensors by name)."""
    checkpoint = folder / f"{run.key}.safetensors"
    outcome = train.train(run, checkpoint=checkpoint, **options)
    return outcome, train.read_checkpoint(checkpoint)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["lenet300", "lenet5"])
def test_pruned_weights_stay_zero_with_momentum_and_decay(model, optimizer, tmp_path):
    run = dataclasses.replace(SMALL, model=model, optimizer=optimizer, lr=0.01, weight_decay=0.01)
    _, tensors = weights_after(run, tmp_path)
    digits = data.load("digits", seed=run.seed)
    mask = train.mask_for(run, train.initial_model(run, digits), digits)
    for name, kept in mask.items():
        weight = tensors[f"model.{name}"]
        assert not weight[~kept].any()
        assert not kept.any() or weight[kept].any()


def test_training_is_masked_sgd_with_momentum_written_by_hand(tmp_path):
    """v = 0.9 v + m * (grad + 5e-4 w), w = w - lr v, on the batches of the run, in plain tensors."""
    run = dataclasses.replace(SMALL, steps=12, decay_every=5, seed=3)
    _, tensors = weights_after(run, tmp_path)
    digits = data.load("digits", seed=3)
    model = train.initial_model(run, digits)
    mask = train.mask_for(run, model, digits)
    w = {name: p.detach().double() * mask[name] for name, p in prunable(model).items()}
    v = {name: torch.zeros_like(t) for name, t in w.items()}
    order = BatchOrder(len(digits.y_train), run.batch_size, 3)
    for step in range(run.steps):
        (chosen,) = order.indices(range(step, step + 1))
        leaves = {name: t.clone().requires_grad_() for name, t in w.items()}
        output = torch.func.functional_call(model, leaves, (digits.x_train[chosen].double(),))
        grads = torch.autograd.grad(F.cross_entropy(output, digits.y_train[chosen]), list(leaves.values()))
        for (name, t), grad in zip(w.items(), grads, strict=True):
            v[name] = 0.9 * v[name] + mask[name] * (grad + 5e-4 * t)
            w[name] = t - 0.1 * 0.1 ** (step // 5) * v[name]
    for name, t in w.items():
        torch.testing.assert_close(tensors[f"model.{name}"].double(), t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["lenet300", "lenet5"])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(model, optimizer, tmp_path):
    run = dataclasses.replace(SMALL, model=model, optimizer=optimizer, lr=0.01, steps=500, decay_every=200)
    run = dataclasses.replace(run, steps=300) if model == "lenet5" else run
    (tmp_path / "whole").mkdir()
    whole, expected = weights_after(run, tmp_path / "whole")
    stops = random.Random(f"{model}{optimizer}").sample([100, 200, 400] if model == "lenet300" else [100, 200], 2)

    for stop in sorted(stops):
        deadline = _Clock(stop)
        outcome = train.train(
            run, checkpoint=tmp_path / f"{run.key}.safetensors", deadline=deadline, tick=deadline.tick
        )
        assert outcome is None
        assert json.loads(_metadata(tmp_path / f"{run.key}.safetensors")["progress"])["step"] == stop
    outcome, tensors = weights_after(run, tmp_path)

    assert tensors.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(tensors[name], t), name
    seconds = ("seconds", "scoring_seconds")
    assert {k: v for k, v in outcome.items() if k not in seconds} == {
        k: v for k, v in whole.items() if k not in seconds
    }


def test_where_steps_are_slow_a_run_stops_between_two_looks_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    run, path = dataclasses.replace(SMALL, steps=200), tmp_path / "run.safetensors"
    (tmp_path / "whole").mkdir()
    _, expected = weights_after(run, tmp_path / "whole")
    with monkeypatch.context() as slow:
        slow.setattr(train, "CLOCK_S", 0.0)
        for stop in (1, 37, 137):
            deadline = _Clock(stop)
            assert train.train(run, checkpoint=path, deadline=deadline, tick=deadline.tick) is None
            assert train.read_progress(path)["step"] == stop
    (tmp_path / f"{run.key}.safetensors").write_bytes(path.read_bytes())
    _, tensors = weights_after(run, tmp_path)
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    """A version that did not time the scoring wrote no `scoring_seconds`; one before wrote every tensor whole."""
    run, path = dataclasses.replace(SMALL, steps=200), tmp_path / "run.safetensors"
    deadline = _Clock(100)
    assert train.train(run, checkpoint=path, deadline=deadline, tick=deadline.tick) is None
    progress = train.read_progress(path)
    del progress["scoring_seconds"]
    save_file(train.read_checkpoint(path), path, {"progress": json.dumps(progress)})
    assert train.train(run, checkpoint=path)["scoring_seconds"] == 0


def test_a_damaged_checkpoint_is_named_and_stays(tmp_path):
    run, path = dataclasses.replace(SMALL, steps=200), tmp_path / "run.safetensors"
    deadline = _Clock(100)
    assert train.train(run, checkpoint=path, deadline=deadline, tick=deadline.tick) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{path} is damaged .*: delete it, and its run begins anew"):
        train.train(run, checkpoint=path)
    assert path.exists()


def test_a_checkpoint_gives_back_every_tensor_and_of_many_zeros_holds_only_what_lives(tmp_path):
    some = torch.Generator().manual_seed(0)
    live = torch.rand(40, 50, generator=some) < 0.03
    weight = torch.randn(40, 50, generator=some) * live
    tensors = {"weight": weight, "momentum": 3 * weight, "mask": live, "dense": torch.randn(7, generator=some)}
    tensors |= {"none": torch.zeros(3, 5), "step": torch.tensor(9.0), "zero": torch.tensor(0.0), "no": torch.empty(0)}
    tensors |= {"count": torch.tensor([0, 0, 2**40, 0]), "nan": torch.tensor([0.0] * 50 + [math.nan, -math.inf])}
    tensors |= {"turned": weight.T, "1.weight": weight[0], "double": weight.double()}
    path = tmp_path / "some.safetensors"
    train.write_checkpoint(path, tensors, {"step": 9})
    found = train.read_checkpoint(path)
    assert found.keys() == tensors.keys() and train.read_progress(path) == {"step": 9}
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True)
    assert train.read_checkpoint(path, "1.").keys() == {"weight"}
    kept, places = {name: tensors[name] for name in ("weight", "momentum", "mask")}, live.numel() // 8
    train.write_checkpoint(path, kept, {})
    assert path.stat().st_size < int(live.sum()) * (4 + 4 + 1) + places + 1000 < 9 * live.numel() / 4


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


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_dense_and_pruned_of_one_seed_share_split_weights_and_batches():
    digits = {seed: data.load("digits", seed=seed) for seed in (0, 1)}
    models = {run: train.initial_model(run, digits[run.seed]) for run in sweep(SMALL, sparsity=[0.0, 0.9], seed=[0, 1])}
    flat = {run: torch.cat([p.flatten() for p in model.parameters()]) for run, model in models.items()}
    dense0, dense1, pruned0, pruned1 = flat.values()
    assert torch.equal(dense0, pruned0) and torch.equal(dense1, pruned1) and not torch.equal(dense0, dense1)
    assert not torch.equal(digits[0].x_val, digits[1].x_val)


def test_masks_of_one_scoring_are_nested_and_have_the_asked_size():
    digits = data.load("digits")
    model = train.initial_model(SMALL, digits)
    sizes = {0.5: 133_305, 0.9: 26_661, 0.95: 13_331, 0.99: 2_666}
    masks = [train.mask_for(dataclasses.replace(SMALL, sparsity=s), model, digits) for s in sizes]
    for mask, size in zip(masks, sizes.values(), strict=True):
        assert sum(int(kept.sum()) for kept in mask.values()) == size
    for wide, narrow in zip(masks, masks[1:], strict=False):
        assert not any((narrow[name] & ~wide[name]).any() for name in wide)


def test_fresh_weights_keep_the_mask_and_change_the_weights(tmp_path):
    run = dataclasses.replace(SMALL, steps=1, lr=1e-12, weight_decay=0.0)
    _, same = weights_after(run, tmp_path)
    _, fresh = weights_after(dataclasses.replace(run, train_init="fresh"), tmp_path)
    name = "model.fc1.weight"
    assert torch.equal(same[name] != 0, fresh[name] != 0)
    assert not torch.isclose(same[name], fresh[name]).logical_and(same[name] != 0).any()


def test_augmentation_changes_training_but_not_the_mask(tmp_path):
    plain, before = weights_after(SMALL, tmp_path)
    shifted, after = weights_after(dataclasses.replace(SMALL, augment="standard"), tmp_path)
    assert plain["kept"] == shifted["kept"]
    assert not torch.equal(before["model.fc1.weight"], after["model.fc1.weight"])


@pytest.mark.parametrize(
    "other",
    [
        {"score_batches": 3},
        {"score_batches": 3, "accumulate": "abs_then_sum"},
        {"score_split": "val"},
        {"score_examples": 10},
        {"scope": "layer"},
        {"rounds": 3},
        {"rounds": 3, "schedule": "force"},
        {"control": "shuffle"},
        {"method": "random"},
        {"init": "rn", "init_sd": 0.1},
        {"prune_biases": False},
    ],
    ids=str,
)
def test_every_choice_of_scoring_makes_another_mask_of_the_same_size(other):
    digits = data.load("digits")
    run = dataclasses.replace(SMALL, **other)
    assert run.key != SMALL.key
    ours, usual = (train.mask_for(r, train.initial_model(r, digits), digits) for r in (run, SMALL))
    assert any(not torch.equal(ours[name], usual[name]) for name in ours)
    m = sum(kept.numel() for kept in ours.values())
    size = sum(int(kept.sum()) for kept in ours.values())
    assert abs(size - round(0.1 * m)) <= (3 if other.get("scope") == "layer" else 0)  # rounded in each layer


def test_random_labels_change_training_but_not_the_mask(tmp_path):
    true, _ = weights_after(dataclasses.replace(SMALL, steps=200, decay_every=200), tmp_path)
    wrong, _ = weights_after(dataclasses.replace(SMALL, steps=200, decay_every=200, random_labels=True), tmp_path)
    assert true["kept"] == wrong["kept"]
    assert true["test_error"] < 30 < 70 < wrong["test_error"]
    assert not wrong["diverged"]  # no better than guessing, as it should be


def test_a_run_that_diverges_is_an_outcome_and_not_a_crash(tmp_path):
    outcome, _ = weights_after(dataclasses.replace(SMALL, lr=1e6, steps=200), tmp_path)
    assert outcome["diverged"] and outcome["diverged_step"] == outcome["curve"]["step"][-1] <= 100
    assert outcome["test_error"] > 80 and outcome["train_loss"] is None
    json.dumps(outcome, allow_nan=False)


@pytest.mark.parametrize("steps", [1, 7, 40, 999, 1_000, 12_500, 60_000, 125_000, 150_000])
def test_curves_end_with_the_last_step_and_are_short(steps):
    points = train.curve_points(steps)
    assert points == sorted(set(points)) and points[-1] == steps and points[0] > 0 and len(points) <= 20
    released = list(range(1000, steps + 1, 1000))[-5:]  # the released code's last checkpoints
    assert set(released) <= set(points)


def test_the_reported_error_is_that_of_the_last_step(tmp_path):
    outcome, tensors = weights_after(dataclasses.replace(SMALL, steps=400, decay_every=400), tmp_path)
    digits = data.load("digits")
    model = train.initial_model(SMALL, digits)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    with torch.no_grad():
        wrong = (model(digits.x_test).argmax(1) != digits.y_test).double().mean().item()
    assert outcome["test_error"] == pytest.approx(100 * wrong, rel=1e-3)
    assert outcome["test_error_best5"] <= max(outcome["curve"]["test_error"])
    assert min(outcome["curve"]["test_error"]) <= outcome["test_error_best_val"]


def test_rates_fall_by_a_tenth_at_each_boundary(monkeypatch, tmp_path):
    seen = []
    step = torch.optim.SGD.step

    def spy(self, *args):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    weights_after(dataclasses.replace(SMALL, steps=12, decay_every=4), tmp_path)
    assert seen == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)


def test_the_fast_matrix_product_is_float32_and_is_switched_off_again():
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with devices.fast_cpu():
        assert torch.get_num_threads() == 1
        error = (a.float() @ b.float() - a @ b).abs().max().item()
    assert error < 1e-3
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before


def test_scoring_stays_exact_inside_training_settings():
    digits = data.load("digits")
    model = train.initial_model(SMALL, digits)
    plain = train.mask_for(SMALL, model, digits)
    with devices.fast_cpu():
        fast = train.mask_for(SMALL, model, digits)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    weights_after(SMALL, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    _, before = weights_after(SMALL, tmp_path)
    path = tmp_path / f"{SMALL.key}.safetensors"

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights_after(SMALL, tmp_path)
    assert train.read_checkpoint(path).keys() == before.keys()


def test_rewinding_takes_batch_norm_along(monkeypatch, tmp_path):
    """Scale, shift and running statistics go back too; LeNets have none of them."""

    def net(shape, n_classes):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), n_classes), torch.nn.BatchNorm1d(n_classes)
        )

    monkeypatch.setitem(MODELS, "with batch norm", net)
    run = dataclasses.replace(SMALL, model="with batch norm", delay=39, rewind=True, steps=40, lr=0.1)
    kept = {}

    def mask_again(t, plain=train.mask_again):
        kept["trained"] = {name: value.clone() for name, value in t.model.state_dict().items()}
        plain(t)
        kept["rewound"] = {name: value.clone() for name, value in t.model.state_dict().items()}

    monkeypatch.setattr(train, "mask_again", mask_again)
    _, tensors = weights_after(run, tmp_path)
    beginning = train.initial_model(run, data.load("digits")).state_dict()
    assert {name for name in beginning if name.startswith("2.")} > {"2.weight", "2.bias", "2.running_mean"}
    for name, value in beginning.items():
        assert not torch.equal(kept["trained"][name], value), name
        assert torch.equal(kept["rewound"][name], value * tensors.get(f"mask.{name}", torch.tensor(True))), name


def test_a_bias_that_lives_is_no_path():
    """Three layers that keep a weight each, of three separate units, and the bias of an output."""
    images, run = data.load("digits"), dataclasses.replace(SMALL, steps=0)
    model = train.initial_model(run, images)
    mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in prunable(model).items()}
    mask["fc1.weight"][0, 0] = mask["fc2.weight"][1, 1] = mask["fc3.weight"][2, 2] = mask["fc3.bias"][0] = True
    row = train.outcome(run, model, mask, images, train.NO_CURVE)
    assert row["live_weights"] == 0 and row["effective_sparsity"] == 0.999996 and sum(row["kept"].values()) == 4
    assert row["dead_units"] == 300 + 100 + 10 and row["dead_outputs"] == 10
    mask["fc2.weight"][1, 0] = mask["fc3.weight"][2, 1] = True  # a path of three weights
    more = train.outcome(run, model, mask, images, train.NO_CURVE)
    assert more["live_weights"] == 3 and more["dead_units"] == 299 + 99 + 9 and more["dead_outputs"] == 9
    assert is_cut_off(pd.DataFrame([row, more])).tolist() == [True, False]
    assert train.outcome(run, model, None, images, train.NO_CURVE)["live_weights"] is None
    weights = {name: torch.ones_like(kept) for name, kept in mask.items() if "weight" in name}  # no bias is pruned
    row = train.outcome(dataclasses.replace(run, prune_biases=False), model, weights, images, train.NO_CURVE)
    assert row["n_prunable"] == row["live_weights"] == 266_200 and row["effective_sparsity"] == 0


# ------------------------------------------------------------------------ attacked, structured


@pytest.fixture
def few(monkeypatch):
    """Attack few images, at few radii."""
    monkeypatch.setattr(robustness, "ATTACKED", 4)
    monkeypatch.setattr(robustness, "RADII", {"linf": (0.1, 1.0), "l2": (1.0, 28.0)})


def trained(run, tensors, images):
    """Return the network of `run` with the weights of its last checkpoint."""
    model = train.initial_model(run, images)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    return model


@pytest.mark.parametrize("pixels", ["normalised", "inverted"])
def test_the_attack_in_a_row_is_the_attack_on_the_network_that_was_trained(pixels, few, tmp_path):
    run = dataclasses.replace(SMALL, pixels=pixels, steps=150, decay_every=100, seed=2, attacked=True)
    outcome, tensors = weights_after(run, tmp_path)
    seen, grey = (data.load("digits", seed=2, pixels=p) for p in (pixels, "raw"))
    model, x, y = trained(run, tensors, seen), grey.x_test, grey.y_test
    expected = model(seen.x_test)
    scale, offset = np.polyfit(x.flatten().double(), seen.x_test.flatten().double(), 1)
    with torch.no_grad():  # the rescaling goes into the first layer
        model.fc1.bias += offset * model.fc1.weight.sum(1)
        model.fc1.weight *= scale
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    order = torch.randperm(len(y), generator=data.generator(2, "attack"))
    chosen = torch.cat([order[y[order] == label][:4] for label in range(10)])
    right = chosen[model(x[chosen]).argmax(1) == y[chosen]]
    assert (outcome["attacked_images"], outcome["attacked_right"]) == (40, len(right))
    for norm, radii in robustness.RADII.items():
        for eps in radii:
            near = robustness.pgd(model, x[right], y[right], eps=eps, norm=norm)
            held = 100 * (model(near).argmax(1) == y[right]).double().mean().item()
            assert outcome[f"attacked_{norm}_{eps:g}"] == pytest.approx(held, abs=100.5 / len(right))  # an image
    assert outcome["attacked_linf_1"] == outcome["attacked_l2_28"] == 0
    assert 0 < outcome["attacked_l2_1"] < 100
    plain, same = weights_after(dataclasses.replace(run, attacked=False), tmp_path)
    assert all(torch.equal(tensors[name], t) for name, t in same.items())
    assert {k: v for k, v in outcome.items() if k in plain and "seconds" not in k} == {
        k: v for k, v in plain.items() if "seconds" not in k
    }
    assert {k for k in outcome if k not in plain} == {k for k in outcome if k.startswith(("attack", "gradients"))}


def test_a_run_killed_under_attack_attacks_again_and_has_the_same_row(few, tmp_path, monkeypatch):
    run = dataclasses.replace(SMALL, steps=120, sparsity=0.5, structured=True, attacked=True)
    (tmp_path / "whole").mkdir()
    whole, _ = weights_after(run, tmp_path / "whole")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(train, "attacked", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        weights_after(run, tmp_path)
    after, _ = weights_after(run, tmp_path)
    assert {k: v for k, v in after.items() if "seconds" not in k} == {
        k: v for k, v in whole.items() if "seconds" not in k
    }


def test_there_is_nothing_to_attack_where_the_loss_was_not_finite(tmp_path):
    wild = dataclasses.replace(SMALL, lr=1e6, steps=200, sparsity=0.5, structured=True, attacked=True)
    outcome, _ = weights_after(wild, tmp_path)
    assert outcome["diverged"] and not [k for k in outcome if "left" in k or "attacked" in k]
    json.dumps(outcome, allow_nan=False)


@pytest.mark.parametrize("fields", [{}, {"rounds": 3}, {"method": "random"}, {"rounds": 2, "delay": 10, "every": 15}])
def test_a_structured_row_is_about_a_network_that_was_really_made_smaller(fields, tmp_path):
    run = dataclasses.replace(SMALL, model="lenet5", lr=0.01, sparsity=0.8, structured=True, **fields)
    outcome, tensors = weights_after(run, tmp_path)
    digits = data.load("digits", seed=run.seed)
    model, x = trained(run, tensors, digits), digits.x_test[:7]
    mask = {n: tensors[f"mask.{n}"].bool() for n in prunable(model)}
    assert outcome["kept"] == {n: int(kept.sum()) for n, kept in mask.items()}
    units = units_of(model, x)
    kept = sum(int(k.sum()) for k in read_under(units, mask).values())
    assert kept == n_kept(sum(layer.n for layer in units.values()), 0.8) == 110
    small = shrink(model, mask, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)  # its removed weights are 0
    n = sum(p.numel() for p in small.parameters())
    assert n == sum(outcome["kept"].values()) < 0.3 * outcome["n_prunable"]
    assert outcome["parameters_left"] == pytest.approx(100 * n / outcome["n_prunable"], rel=1e-3)
    whole = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10
    places = {"conv1.weight": 24 * 24, "conv2.weight": 8 * 8}
    left = sum(places.get(name, 1) * k for name, k in outcome["kept"].items() if name.endswith("weight"))
    assert outcome["multiply_adds_left"] == pytest.approx(100 * left / whole, rel=1e-3)
    assert 0 < outcome["seconds_left"] < 100 and outcome["whole_seconds"] > 0
    dense = dataclasses.replace(run, sparsity=0.0, steps=1)
    assert "parameters_left" not in train.train(dense)


@pytest.mark.skipif("SNIP_DATA" not in os.environ, reason="SNIP_DATA names no folder with the real data sets")
def test_committed_rows_have_the_masks_that_the_library_makes(root):
    """Three rows at random: same split, weights, batch and scores give the counts written there."""
    rows = read_rows(root / "notebooks/results").values()
    files = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    here = {name for name, its in files.items() if data._missing(data.data_folder(), its) is None}
    committed = [r for r in rows if r["sparsity"] > 0 and not r.get("delay")]  # masks of the initial weights
    # In FORCE's rounds, and in thirty, rounding errors may decide, and they are another processor's (the log).
    settled = [r for r in committed if r["rounds"] < 30 and (r["rounds"] == 1 or r["schedule"] != "force")]
    committed = [r for r in settled if r["dataset"] in here]
    for row in random.Random(time.strftime("%Y-%m")).sample(committed, 3):
        run = Run(**{f.name: row[f.name] for f in dataclasses.fields(Run) if f.name in row})
        images = data.load(run.dataset, seed=run.seed, pixels=run.pixels)
        model = train.initial_model(run, images)
        mask = train.mask_for(run, model, images)
        assert {name: int(kept.sum()) for name, kept in mask.items()} == row["kept"], row["key"]
        live = paths.on_live_path(model, mask, images.x_test[:1])
        effective = 1 - sum(int(kept.sum()) for kept in live.values()) / row["n_prunable"]
        assert effective == pytest.approx(row["effective_sparsity"], abs=1e-6)
