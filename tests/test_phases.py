"""Masks in the course of training, after it, and without it; and the choices of where training starts."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from snip_lib import data, inits, models, saliency, train
from snip_lib.runs import Run, at_profile
from snip_lib.saliency import is_bias, prunable

SMALL = Run("lenet300", "digits", sparsity=0.9, steps=60, decay_every=20, batch_size=50, lr=0.05)
LATE = dataclasses.replace(SMALL, method="magnitude", delay=20, rounds=3, every=10)


def weights_after(run, folder):
    """Train `run` and return (outcome, its final tensors by name)."""
    checkpoint = folder / f"{run.key}.safetensors"
    outcome = train.train(run, checkpoint=checkpoint)
    return outcome, train.read_checkpoint(checkpoint)


def masks_in(tensors):
    return {name.removeprefix("mask."): t for name, t in tensors.items() if name.startswith("mask.")}


# ---------------------------------------------------------------------------------- when, how much


def test_masks_come_at_the_delay_and_then_every_so_many_steps():
    assert train.mask_times(SMALL) == {0: 0.9}
    assert train.mask_times(dataclasses.replace(SMALL, rounds=5)) == {0: 0.9}  # all at once
    assert train.mask_times(dataclasses.replace(SMALL, sparsity=0.0)) == {}
    assert train.mask_times(LATE) == pytest.approx({20: 0.5, 30: 0.7, 40: 0.9})
    exponential = dataclasses.replace(LATE, schedule="exponential", rounds=2, sparsity=0.99)
    assert train.mask_times(exponential) == pytest.approx({20: 0.9, 30: 0.99})


def test_the_rate_goes_on_or_begins_anew_after_each_mask():
    def rates(run):
        return [train.rate_at(run, step) / run.lr for step in (0, 19, 20, 29, 30, 39, 40, 59)]

    assert rates(LATE) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    anew = dataclasses.replace(LATE, retrain=0.5, decay_every=15)
    assert rates(anew) == pytest.approx([1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.05])
    before = dataclasses.replace(SMALL, retrain=0.5)  # a mask before training is no reason
    assert rates(before) == rates(SMALL)


def test_the_shapes_of_the_schedule_survive_a_shorter_profile():
    run = Run("lenet300", "mnist", sparsity=0.9, steps=250_000, delay=125_000, rounds=5, every=25_000, retrain=0.1)
    (short,), (smoke,) = at_profile("short", [run]), at_profile("smoke", [run])
    assert (short.steps, short.delay, short.every, short.decay_every) == (25_000, 12_500, 2_500, 2_500)
    assert (smoke.steps, smoke.delay, smoke.every) == (60, 30, 6) and len(train.mask_times(smoke)) == 5
    scored = dataclasses.replace(run, steps=0, delay=0, every=0, retrain=0.0)
    assert at_profile("short", [scored])[0].steps == at_profile("smoke", [scored])[0].steps == 0


# -------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_a_late_mask_removes_is_zero_to_the_end(optimizer, tmp_path):
    """Its momentum would carry a weight on, and its second moment an Adam step."""
    run = dataclasses.replace(LATE, optimizer=optimizer, lr=0.01, weight_decay=0.01)
    outcome, tensors = weights_after(run, tmp_path)
    mask = masks_in(tensors)
    assert sum(int(kept.sum()) for kept in mask.values()) == round(0.1 * outcome["n_prunable"])
    assert outcome["steps_before_mask"] == 20
    for name, kept in mask.items():
        assert not tensors[f"model.{name}"][~kept].any()
    assert any(kept.any() and not kept.all() for kept in mask.values())


def test_late_magnitude_masks_are_those_of_the_trained_weights(tmp_path):
    """With the last mask one step before the end, its smallest kept weight was above its largest removed one."""
    dense = dataclasses.replace(SMALL, sparsity=0.0, steps=59)
    _, trained = weights_after(dense, tmp_path)
    _, tensors = weights_after(dataclasses.replace(SMALL, method="magnitude", delay=59, decay_every=20), tmp_path)
    mask = masks_in(tensors)
    sizes = torch.cat([trained[f"model.{name}"].abs().flatten() for name in mask])
    kept = torch.cat([k.flatten() for k in mask.values()])
    assert sizes[kept].min() >= sizes[~kept].max()


def test_rounds_in_the_course_of_training_are_nested_and_end_at_the_target(tmp_path):
    found = []
    for steps, rounds, sparsity in ((31, 2, 0.7), (60, 3, 0.9)):  # the first run ends before the third round
        run = dataclasses.replace(LATE, method="snip", steps=steps, rounds=rounds, sparsity=sparsity)
        found.append(masks_in(weights_after(run, tmp_path)[1]))
    wide, narrow = found
    sizes = [sum(int(kept.sum()) for kept in mask.values()) for mask in found]
    assert sizes[1] == round(0.1 * sum(kept.numel() for kept in narrow.values())) < sizes[0]
    assert all(not (narrow[name] & ~wide[name]).any() for name in wide)


def test_rewinding_returns_the_weights_that_stay_to_where_they_began(tmp_path):
    run = dataclasses.replace(LATE, delay=59, rounds=1, every=0, rewind=True, lr=1e-12, weight_decay=0.0)
    _, tensors = weights_after(run, tmp_path)  # one more step, of no size
    beginning = prunable(train.initial_model(run, data.load("digits")))
    for name, kept in masks_in(tensors).items():
        torch.testing.assert_close(tensors[f"model.{name}"], beginning[name].detach() * kept, atol=1e-9, rtol=0)


def test_a_run_of_no_step_is_a_portrait_of_its_mask():
    run = dataclasses.replace(SMALL, steps=0)
    row = train.train(run)
    assert row["test_error"] is None and row["val_error"] is None and not row["diverged"]
    digits = data.load("digits")
    mask = train.mask_for(run, train.initial_model(run, digits), digits)
    assert row["picture"]["fc1.weight"] == mask["fc1.weight"].sum(0).tolist()  # per input
    assert row["picture"]["fc3.weight"] == mask["fc3.weight"].sum(1).tolist()  # per class
    images = data.load("digits", pixels="raw").x_train.mean(0).flatten()
    assert row["mean_correlation"] == pytest.approx(np.corrcoef(mask["fc1.weight"].sum(0), images)[0, 1], abs=1e-4)
    raw, _ = data.score_batch(data.load("digits", pixels="raw"), 50, 0)
    assert np.abs(np.array(row["mean_image"]) - 255 * raw.mean(0).flatten().numpy()).max() <= 0.5 + 1e-4
    assert row["kept"] == train.train(SMALL)["kept"]
    other = train.train(dataclasses.replace(run, seed=1))
    assert other["mask_sha"] != row["mask_sha"] and not {"picture", "class_correlations"} & other.keys()
    assert other["mean_correlation"] != row["mean_correlation"]
    for way in ({"method": "magnitude"}, {"rounds": 2}):
        small = train.train(dataclasses.replace(run, **way))
        more = {"picture", "mean_image", "gradient", "mean_correlation"}
        assert small["mask_sha"] != row["mask_sha"] and not more & small.keys()
    assert "mean_correlation" not in train.train(dataclasses.replace(run, model="gru_s"))  # row by row


@pytest.mark.parametrize(("name", "parts"), [("gru_s", ["reset", "update"]), ("lenet300", [])])
def test_a_portrait_has_the_norms_of_the_gradient_gate_by_gate(name, parts):
    run = dataclasses.replace(SMALL, model=name, steps=0)
    told, digits = train.train(run)["gradient"], data.load("digits")
    model, (x, y) = train.initial_model(run, digits).double(), train.score_batches(run, digits)[0]
    torch.nn.functional.cross_entropy(model(x.double()), y).backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    for kind in ("weight", "bias") if parts else ():
        whole = model.get_parameter(f"gates.{kind}").grad
        blocks = whole.view(len(parts), -1).norm(dim=1).tolist()  # as many units a gate
        norms |= {f"gates.{part}.{kind}": norm for part, norm in zip(parts, blocks, strict=True)}
        del norms[f"gates.{kind}"]
    assert told == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_mask_of_a_class_is_compared_with_the_mean_image_of_each_class(seed):
    run = dataclasses.replace(SMALL, steps=0, score_class=4, seed=seed)
    row, digits = train.train(run), data.load("digits", seed=seed)
    counts = train.mask_for(run, train.initial_model(run, digits), digits)["fc1.weight"].sum(0)
    raw = data.load("digits", seed=seed, pixels="raw")
    for c, (image, size) in enumerate(zip(row["class_correlations"], row["input_correlations"], strict=True)):
        for told, seen, form in ((image, raw, torch.Tensor.clone), (size, digits, torch.abs)):
            x, _ = data.same_class_batch(seen, c, run.score_examples or run.batch_size, seed)
            assert told == pytest.approx(np.corrcoef(counts, form(x.mean(0).flatten()))[0, 1], abs=1e-4)
    assert len(row["class_correlations"]) == 10 and ("picture" in row) == (seed == 0)


def test_gradients_of_a_portrait_are_those_of_the_scoring_batch():
    run = dataclasses.replace(SMALL, steps=0)
    digits = data.load("digits")
    model = train.initial_model(run, digits).double()
    x, y = data.score_batch(digits, 50, 0)
    F.cross_entropy(model(x.double()), y).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert train.train(run)["gradient"] == pytest.approx(norms, rel=1e-3)


# ------------------------------------------------------------------------ where training starts


def test_rescaling_two_layers_leaves_the_function_and_the_mask_of_snip_alone():
    runs = [dataclasses.replace(SMALL, steps=0, rescale=a, bias_init="random") for a in (1.0, 8.0)]
    digits = data.load("digits")
    nets = [train.initial_model(run, digits).double() for run in runs]
    x = digits.x_test[:20].double()
    torch.testing.assert_close(nets[0](x), nets[1](x))
    assert torch.equal(8 * nets[0].fc1.weight, nets[1].fc1.weight)
    shas = {m: [train.train(dataclasses.replace(r, method=m))["mask_sha"] for r in runs] for m in ("snip", "magnitude")}
    assert shas["snip"][0] == shas["snip"][1] and shas["magnitude"][0] != shas["magnitude"][1]


@pytest.mark.parametrize("name", ["alexnet_s", "wrn_16_8"])
def test_rescaling_a_layer_before_batch_norm_leaves_the_function_and_snip_alone_but_for_eps(name):
    """The less eps counts the less changes; without it the outputs and SNIP's scores are the same."""
    digits, away = data.load("digits"), []
    x, y = (part[:4] for part in data.score_batch(digits, 50, 0))
    pair = [train.initial_model(Run(name, "digits", rescale=a, bias_init="random"), digits).double() for a in (1, 8)]
    before, after = (dict(net.named_parameters()) for net in pair)
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["conv1.weight", "conv1.bias"]
    for eps in (1e-3, 1e-5, 1e-30):
        for norm in (module for net in pair for module in net.modules() if hasattr(module, "running_var")):
            norm.eps = eps
        one, other = (net(x.double()) for net in pair)
        away.append(((one - other).norm() / one.norm()).item())
    assert away[0] > 10 * away[1] and away[1] > 0 and away[2] < 1e-9
    scores = [saliency.snip(net, x.double(), y) for net in pair]
    torch.testing.assert_close(scores[0]["conv1.weight"], scores[1]["conv1.weight"], rtol=1e-6, atol=1e-12)


def test_random_biases_are_drawn_like_their_weights_and_change_no_weight():
    nets = [models.LeNet300() for _ in range(2)]
    for net, start in zip(nets, inits.BIAS_INITS, strict=True):
        inits.initialise(net, "vs_h", data.generator(0, "init"), bias_init=start)
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b) != is_bias(name, a)
    assert not nets[0].fc1.bias.any()
    assert nets[1].fc1.bias.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.15)  # 300 draws
    with pytest.raises(ValueError, match="Unknown bias_init"):
        inits.initialise(nets[0], "vs_h", data.generator(0, "init"), bias_init="zero")


def test_pixels_are_three_views_of_one_image():
    normal, inverted, raw = (data.load("digits", pixels=p) for p in ("normalised", "inverted", "raw"))
    assert torch.equal(inverted.x_test, -normal.x_test)
    assert raw.x_test.min() == 0 and raw.x_test.max() == 1
    flat, again = raw.x_test.flatten().double(), normal.x_test.flatten().double()
    assert np.corrcoef(flat, again)[0, 1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="Unknown pixels"):
        data.load("digits", pixels="negative")


def test_one_class_scores_when_asked():
    digits = data.load("digits")
    ((x, y),) = train.score_batches(dataclasses.replace(SMALL, score_class=7), digits)
    assert len(x) == 50 and set(y.tolist()) == {7}


def test_batch_norm_has_the_constants_that_are_asked_for():
    cifar = data.Data(*(torch.zeros(1, 3, 32, 32), torch.zeros(1).long()) * 3, 10)
    for choice, (eps, momentum) in {"tensorflow": (1e-3, 0.01), "torch": (1e-5, 0.1)}.items():
        net = train.initial_model(Run("alexnet_s", "cifar10", batch_norm=choice), cifar)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 7 and {(m.eps, m.momentum) for m in norms} == {(eps, momentum)}


def test_decay_is_on_weights_and_biases_or_on_weights_alone():
    net = models.LeNet300()
    for choice, n in {"all": 6, "weights": 3}.items():
        decayed, *rest = train.make_optimizer(dataclasses.replace(SMALL, decayed=choice), net).param_groups
        assert len(decayed["params"]) == n and decayed["weight_decay"] == SMALL.weight_decay
        assert not rest or rest[0]["weight_decay"] == 0


def test_the_scored_loss_is_a_choice():
    digits = data.load("digits")
    run = dataclasses.replace(SMALL, score_loss="nll")
    model = train.initial_model(run, digits)
    ((x, y),) = train.score_batches(run, digits)
    scores = saliency.snip(model, x, y, loss=F.nll_loss, dtype=torch.float64)
    edge = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[26_661 - 1]
    mask = train.mask_for(run, model, digits)
    assert all(bool((scores[name][kept] >= edge).all()) for name, kept in mask.items())


def test_shifting_moves_digits_and_never_mirrors_them():
    x = torch.zeros(200, 1, 12, 12)
    x[:, 0, 5:7, 4] = x[:, 0, 5, 5] = 1.0  # an L, whose mirror image is another one
    moved = data.move(x, data.shift(len(x), data.generator(0, "augment")))
    for image in moved:
        where = image[0].nonzero() - image[0].nonzero().min(0).values
        assert where.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 40
