"""Laws of attacks, against closed forms, and of the tables of what breaks."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snip_lib import data, plots, robustness
from snip_lib.models import LeNet5, LeNet300
from snip_lib.robustness import attack_success, attacked, pgd
from snip_lib.runs import read_rows
from snip_lib.tables import (
    attack_table,
    by_outputs,
    by_sparsity,
    disconnection_table,
    gains,
    has_failed,
    is_cut_off,
    loses_outputs,
    mask_table,
)

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def linear(seed=0, classes=2, side=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes)).double()


def images(n=60, side=5, seed=0):
    """Images far enough from black and white that the closed forms need no clipping."""
    return 0.4 + 0.2 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_digits(sparsity):
    """Train LeNet-300-100 on digits, at a random mask; return it with a hundred test images that it gets right."""
    digits, g = data.load("digits", pixels="raw"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = LeNet300()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (2 / p.shape[1]) ** 0.5 if p.dim() > 1 else 0 * p)
    kept = [torch.rand(p.shape, generator=g) >= sparsity for p in model.parameters()]
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        chosen = torch.randint(len(digits.y_train), (100,), generator=g)
        adam.zero_grad()
        F.cross_entropy(model(digits.x_train[chosen]), digits.y_train[chosen]).backward()
        adam.step()
        with torch.no_grad():
            for p, k in zip(model.parameters(), kept, strict=True):
                p.mul_(k)
    right = (model(digits.x_test).argmax(1) == digits.y_test).nonzero().flatten()[:100]
    return model.requires_grad_(False), digits.x_test[right], digits.y_test[right]


@pytest.fixture(scope="module")
def dense():
    return on_digits(0)


@pytest.fixture(scope="module")
def flat():
    """Few of its units are on at any image, and most ways to turn one lead through those that are off."""
    return on_digits(0.98)


def turned_by(attack, model, x, y, **how):
    return (attack(model, x, y, **how) != x).flatten(1).any(1)


# --- attacks


@NORMS
def test_on_a_linear_network_the_attack_is_the_closed_form(norm):
    model, x = linear(), images()
    y = model(x).argmax(1)
    z, w = model(x).detach(), (model[1].weight[0] - model[1].weight[1]).detach()
    # The lead falls by eps times the dual norm of w, no more: an image turns exactly where that is enough.
    radius = (z[:, 0] - z[:, 1]).abs() / (w.abs().sum() if norm == "linf" else w.norm())
    for eps in radius.quantile(torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)).tolist():
        near = pgd(model, x, y, eps=eps, norm=norm, restarts=1)
        turned = model(near).argmax(1) != y
        assert turned[radius < 0.999999 * eps].all() and not turned[radius > eps].any()
        found = attack_success(model, x, y, eps=[eps], norm=norm, restarts=1)[eps]
        assert found == pytest.approx(100 * turned.double().mean().item())


@NORMS
def test_attacked_images_are_images_within_the_radius(norm):
    torch.manual_seed(0)
    model = LeNet5()
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # black and white
    y, eps = model(x).argmax(1), {"linf": 0.1, "l2": 2.0}[norm]
    near = pgd(model, x, y, eps=eps, norm=norm, steps=10)
    change = (near - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert near.min() >= 0 and near.max() <= 1 and size.max() <= eps * (1 + 1e-5)
    turned = model(near).argmax(1) != y
    assert turned.any() and torch.equal(turned, size > 0)  # what did not turn comes back as it was


@NORMS
def test_being_sure_is_no_defence(norm):
    """Logits a million times as large leave no gradient of cross-entropy; the decisions are the same."""
    torch.manual_seed(0)
    model = LeNet300()
    x = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y, radii = model(x).argmax(1), [0.01, 0.03] if norm == "linf" else [0.1, 0.5]
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.fc3.weight.mul_(2.0**20), loud.fc3.bias.mul_(2.0**20)
    a, b = (attack_success(net, x, y, eps=radii, norm=norm, steps=10) for net in (model, loud))
    assert 0 < a.iloc[0] < 100 and b.tolist() == pytest.approx(a.tolist(), abs=4)  # an image


def test_the_first_start_goes_up_the_lead_and_the_others_up_the_odds():
    seen = []

    class Fork(nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return torch.stack([0 * x[:, 0] + 9, x[:, 0] + 0.5, x[:, 1]], 1)

    x, y = torch.full((1, 2), 0.5), torch.zeros(1, dtype=torch.long)
    pgd(Fork(), x, y, eps=0.1, norm="l2", steps=1, restarts=1, aims=0)
    z = x.clone().requires_grad_(True)
    F.cross_entropy(Fork()(z), y).backward()
    torch.testing.assert_close(seen[1] - x, torch.tensor([[0.1, 0]]))
    torch.testing.assert_close(seen[3] - x, 0.1 * F.normalize(z.grad))


@NORMS
def test_the_last_step_counts_so_that_one_step_is_an_attack(norm):
    model, x = linear(), images()
    y, eps = model(x).argmax(1), 1.0
    assert not torch.equal(pgd(model, x, y, eps=eps, norm=norm, steps=1, restarts=1), x)


@NORMS
def test_a_step_is_two_and_a_half_of_its_share_of_the_radius(norm):
    """The first step beyond the edge is what comes back: of steps of 0.025 towards an edge at 0.03, the second."""

    class Edge(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), x.flatten() - 0.53], 1)

    near = pgd(Edge(), torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.long), eps=0.1, norm=norm, steps=10)
    assert near.item() == pytest.approx(0.55, abs=1e-6)


def test_a_network_that_cannot_decide_is_not_turned_yet():
    class Torn(nn.Module):
        def forward(self, x):
            return torch.stack([torch.full((len(x),), 0.5), x.flatten()], 1)

    near = pgd(Torn(), torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.long), eps=0.1)
    assert near.item() > 0.5


@NORMS
def test_other_starts_lie_on_all_sides_and_out_to_the_edge_of_the_ball(norm):
    starts = []

    class Still(nn.Module):
        def forward(self, x):
            starts.append(x.detach().clone())
            return torch.stack([1 + 0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    x = torch.full((50, 1, 5, 5), 0.5)
    pgd(Still(), x, torch.zeros(50, dtype=torch.long), eps=0.1, norm=norm, steps=1, restarts=2, leak=0, aims=0)
    assert len(starts) == 4 and torch.equal(starts[0], x)
    change = (starts[2] - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.1 + 1e-6 and size.max() > 0.099 and abs(change.mean()) < 0.01 * size.mean() + 0.005
    assert (change > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    starts.clear()
    x = x[:, :, :1, :1]  # where draws from [-1, 1] may be shorter than the radius
    pgd(Still(), x, torch.zeros(50, dtype=torch.long), eps=0.4, norm=norm, steps=1, restarts=2, leak=0, aims=0)
    sizes = (starts[2] - x).abs()
    assert sizes.max() <= 0.4 + 1e-6 and (sizes.min() > 0.399) == (norm == "l2")


@NORMS
def test_without_gradients_the_other_images_of_the_sample_show_the_way(norm):
    """Two plateaus: whoever walks towards a brighter image is over the edge where the mean grey is a half."""

    class Plateaus(nn.Module):
        def forward(self, x):
            bright = (x.flatten(1).mean(1) > 0.5).to(x) + 0 * x.flatten(1).sum(1)
            return torch.stack([1 - bright, bright], 1)

    x = images()
    x = x - x.mean((1, 2, 3), keepdim=True) + torch.tensor([0.25, 0.75]).repeat_interleave(30).view(-1, 1, 1, 1)
    y, radii = Plateaus()(x).argmax(1), [0.24, 0.4] if norm == "linf" else [1.24, 1.6]  # 1.25 is five times 0.25
    assert y.tolist() == [0] * 30 + [1] * 30
    assert attack_success(Plateaus(), x, y, eps=radii, norm=norm, steps=3, aims=0).tolist() == [0, 0]
    for chunk in (7, 500):  # those of other chunks count, too
        assert attack_success(Plateaus(), x, y, eps=radii, norm=norm, steps=3, chunk=chunk).tolist() == [0, 100]
    alone = attack_success(Plateaus(), x[:30], y[:30], eps=[0, 28.0], norm=norm, steps=3, restarts=1)
    assert alone.tolist() == [0, 0]  # one class only: nowhere to go


def test_the_last_start_is_the_best_on_the_way_to_the_nearest_images_of_another_class():
    class Land(nn.Module):
        """Flat, but for two islands and a slope, which leads to the other class where p > 0.5 and q > 0.47."""

        def forward(self, x):
            p, q = x.flatten(1).T
            lead = torch.where(p > 0.5, q - 0.47, torch.where((p < 0.2) | (q > 0.95), 1.0, -1.0))
            return torch.stack([0 * lead, lead], 1)

    x, y = torch.tensor([[0.4, 0.4]]), torch.zeros(1, dtype=torch.long)
    # From far to near: an island, the slope, an island, and one of the same class, which shows nothing.
    others = torch.tensor([[0.4, 0.99], [0.9, 0.56], [0.1, 0.4], [0.45, 0.45]])
    how = {"eps": 0.15, "norm": "l2", "restarts": 1, "others": others}
    turned = [not torch.equal(pgd(Land(), x, y, aims=aims, **how), x) for aims in range(6)]
    assert turned == [False, False, True, True, True, True]


def test_an_attack_has_forty_steps():
    torch.manual_seed(0)
    model, x = LeNet300(), torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    usual, forty, fewer = (pgd(model, x, y, eps=0.02, **how) for how in ({}, {"steps": 40}, {"steps": 39}))
    assert torch.equal(usual, forty) and not torch.equal(usual, fewer)


def test_committed_rows_were_attacked_at_these_radii_with_so_many_images(root):
    """What no row has, no table shows."""
    fields = {f"attacked_{norm}_{eps:g}" for norm, radii in robustness.RADII.items() for eps in radii}
    rows = [row for row in read_rows(root / "notebooks/results").values() if row.get("attacked_images")]
    assert rows
    for row in rows:
        assert {name for name in row if name.startswith(("attacked_linf", "attacked_l2"))} == fields, row["key"]
        assert row["attacked_images"] == 10 * robustness.ATTACKED, row["key"]


@NORMS
def test_success_of_gradients_alone_rises_with_the_radius_to_all_images(dense, norm):
    """Each radius is attacked by itself, from the images."""
    turned = [
        int(turned_by(pgd, *dense, eps=eps, norm=norm, restarts=1, leak=leak, aims=0).sum())
        for leak in (0, 0.2)
        for eps in robustness.RADII[norm]
    ]
    assert turned[:5] == sorted(turned[:5]) and turned[5:] == sorted(turned[5:])
    assert turned[0] < 50 and turned[4] == turned[9] == 100


def misled(row):
    """Return whether gradients alone leave images at the last radius, where any image may become any other."""
    return any(row[f"gradients_{norm}_{radii[-1]:g}"] != 0 for norm, radii in robustness.RADII.items())


def test_a_row_says_that_gradients_mislead_the_attack(dense, monkeypatch):
    monkeypatch.setattr(robustness, "ATTACKED", 3)
    monkeypatch.setattr(robustness, "RADII", {"linf": (0.1, 1.0), "l2": (1.5, 28.0)})
    how = {"generator": torch.Generator().manual_seed(0)}
    assert not misled(attacked(*dense, **how))
    monkeypatch.setattr(torch.autograd, "grad", lambda _, x: (torch.zeros_like(x),))
    found = attacked(*dense, **how)
    assert misled(found) and found["gradients_linf_1"] == found["gradients_l2_28"] == 100
    assert found["attacked_linf_1"] == found["attacked_l2_28"] == 0  # the start that needs no gradient would not tell


def test_gradients_mislead_the_attack_on_no_dense_network(root):
    rows = [row for row in read_rows(root / "notebooks/results").values() if row.get("attacked_images")]
    now = [row for row in rows if row.get("attack") == robustness.ATTACK and not row["sparsity"]]
    if not now:
        pytest.skip("no dense row of this attack yet")
    assert not [row["key"] for row in now if misled(row)]


@NORMS
def test_where_the_network_is_flat_leaks_and_odds_find_more(flat, norm, monkeypatch):
    def success(**how):
        return attack_success(*flat, eps=robustness.RADII[norm], norm=norm, **how)

    usual, tight, alone = success(), success(leak=0), success(leak=0, aims=0)
    assert (success(aims=0) >= alone).all() and success(aims=0).sum() > alone.sum() + 10  # percent, over all radii
    monkeypatch.setattr(robustness, "_odds", robustness._lead)
    assert (usual >= tight).all() and (tight >= success(leak=0)).all() and usual.sum() > success(leak=0).sum() + 10


@pytest.mark.parametrize("relu", [F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), nn.ReLU(inplace=True)])
def test_gradients_pass_through_a_relu_that_is_off_and_nothing_else_changes(relu):
    class Off(nn.Module):
        """Flat up to 0.6, and turned from 0.65 on."""

        def forward(self, x):
            return torch.stack([torch.full_like(x[:, 0], 0.05), relu(x[:, 0] - 0.6)], 1)

    x, y = torch.full((1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    how = {"restarts": 1, "aims": 0}
    assert not turned_by(pgd, Off(), x, y, eps=0.2, leak=0, **how)
    assert turned_by(pgd, Off(), x, y, eps=0.2, leak=0.2, **how) and not turned_by(pgd, Off(), x, y, eps=0.14, **how)
    z = torch.tensor([-2.0, -0.0, 3.0], requires_grad=True)
    with robustness._Leaking(0.25):
        output = relu(z * 1)
    assert output.tolist() == [0, 0, 3]
    assert torch.autograd.grad(output.sum(), z)[0].tolist() == [0.25, 0.25, 1]


@NORMS
def test_success_rises_with_the_radius_to_all_images(norm):
    model, x = linear(classes=10), images()
    y = model(x).argmax(1)
    radii = [0, 0.1, 0.15, 0.3, 1.0] if norm == "linf" else [0, 0.5, 0.8, 1.2, 5]
    success = attack_success(model, x, y, eps=reversed(radii), norm=norm, chunk=7, steps=20)
    assert success.index.tolist() == radii and success.is_monotonic_increasing
    assert success.iloc[0] == 0 and success.iloc[-1] == 100 and 0 < success.iloc[1] + success.iloc[2] < 200
    assert attack_success(model, x, y, eps=[radii[2]] * 2, norm=norm, chunk=7, steps=20).to_dict() == {
        radii[2]: success[radii[2]]
    }


def test_images_that_are_wrong_already_do_not_count():
    model, x = linear(), images()
    y = model(x).argmax(1)
    y[:45] = 1 - y[:45]
    success = attack_success(model, x, y, eps=[1.0])
    assert success.attrs["right"] == 15 and success[1.0] == 100
    assert attack_success(model, x[:45], y[:45], eps=[1.0])[1.0] == 0  # none is right: none can be turned


def test_restarts_find_what_one_start_does_not():
    """The loss is flat but for a hole of a fifth of the way: only a start inside finds it."""

    class Hole(nn.Module):
        def forward(self, x):
            depth = torch.relu(0.02 - (x.flatten(1) - 0.55).abs()).sum(1)
            return torch.stack([torch.full_like(depth, 1e-3), depth], 1)

    x = torch.full((200, 1, 1, 1), 0.5)
    y = torch.zeros(200, dtype=torch.long)
    one, many = (attack_success(Hole(), x, y, eps=[0.1], restarts=r, leak=0, steps=5)[0.1] for r in (1, 20))
    assert one == 0 and many > 90
    usual = attack_success(Hole(), x, y, eps=[0.1], leak=0, steps=5)[0.1]
    assert usual == attack_success(Hole(), x, y, eps=[0.1], restarts=2, leak=0, steps=5)[0.1] > 0


def test_the_model_stays_as_it_was():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(18, 2)
    model = nn.Sequential(*layers).train()
    model[2].eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = images().float()
    y = torch.zeros(60, dtype=torch.long)
    attack_success(model, x, y, eps=[0.1], steps=3)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training and model[1].training and not model[2].training
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    again = [pgd(model, x, y, eps=0.1, steps=3) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"norm": "l1"}, 'norm is "linf" or "l2"'),
        ({"x": 3 * images()}, "pixel units"),
        ({"x": images() * float("nan")}, "pixel units"),
        ({"x": images().numpy()}, r"x is a tensor of floating-point images in \[0, 1\], not \(ndarray\)."),
        ({"x": images().round().long()}, r"floating-point images in \[0, 1\], not torch.int64."),
        ({"eps": -0.1}, "eps, leak and aims are 0 or more"),
        ({"eps": float("nan")}, "eps, leak and aims are 0 or more"),
        ({"leak": -0.1}, "eps, leak and aims are 0 or more"),
        ({"aims": -1}, "eps, leak and aims are 0 or more"),
        ({"steps": 0}, "steps and restarts 1 or more"),
        ({"restarts": 0}, "steps and restarts 1 or more"),
        ({"steps": 2.5}, "steps, restarts and aims are whole numbers, not 2.5, 2 and 50."),
        ({"y": [0] * 60}, "one class number of type int64"),
        ({"y": torch.full((60,), 12)}, "y has class 12, but the network's 2 outputs are classes from 0."),
        ({"y": torch.zeros(59, dtype=torch.long)}, "one class number of type int64 for each of the 60 images"),
        ({"y": torch.zeros(60)}, "of type int64"),
        ({"y": torch.full((60,), -1)}, "one class number"),
    ],
)
def test_bad_input_gets_a_sentence(change, words):
    arguments = {"x": images(), "y": torch.zeros(60, dtype=torch.long), "eps": 0.1} | change
    with pytest.raises(ValueError, match=words):
        pgd(linear(), **arguments)
    with pytest.raises(ValueError, match=words):
        attack_success(linear(), **arguments | {"eps": [arguments["eps"]]})
    if not {"x", "y"} & set(change):  # even if there is nothing to attack
        x = images()
        with pytest.raises(ValueError, match=words):
            attack_success(linear(), **arguments | {"eps": [arguments["eps"]], "y": 1 - linear()(x).argmax(1)})


@pytest.mark.parametrize("change", [{"eps": 0.1}, {"chunk": 0}])
def test_bad_radii_and_chunks_get_a_sentence(change):
    with pytest.raises(ValueError, match="eps is a list of radii and chunk 1 or more"):
        attack_success(linear(), images(), torch.zeros(60, dtype=torch.long), **{"eps": [0.1]} | change)


def test_attacks_need_gradients_and_turn_them_on():
    model, x = linear(), images(20)
    y = model(x).argmax(1)
    expected = pgd(model, x, y, eps=0.3, steps=3)
    assert not torch.equal(expected, x)
    with torch.no_grad():
        assert torch.equal(pgd(model, x, y, eps=0.3, steps=3), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(pgd(model, images(20), y, eps=0.3, steps=3), expected)


def test_a_row_has_the_accuracy_of_the_same_number_of_images_of_each_class(monkeypatch):
    monkeypatch.setattr(robustness, "ATTACKED", 6)
    monkeypatch.setattr(robustness, "RADII", {"linf": (0.01, 0.03, 1.0), "l2": (0.05, 0.2, 28.0)})
    model, x = linear(classes=3), images(90)
    y = torch.arange(90) % 3  # so that some are wrong already

    def at(seed):
        return attacked(model, x, y, generator=torch.Generator().manual_seed(seed))

    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    chosen = torch.cat([order[y[order] == label][:6] for label in range(3)])
    assert torch.bincount(y[chosen]).tolist() == [6, 6, 6]
    found = at(1)
    assert found["attacked_images"] == 18 and found["attacked_right"] == int((model(x).argmax(1) == y)[chosen].sum())
    assert 0 < found["attacked_right"] < 18
    for norm, radii in robustness.RADII.items():
        accuracy = [found[f"attacked_{norm}_{eps:g}"] for eps in radii]
        success = attack_success(model, x[chosen], y[chosen], eps=radii, norm=norm)
        alone = attack_success(model, x[chosen], y[chosen], eps=radii, norm=norm, restarts=1, aims=0)
        assert found[f"gradients_{norm}_{radii[-1]:g}"] == pytest.approx(100 - alone.iloc[-1], abs=0.005)
        assert accuracy == pytest.approx((100 - success).tolist(), abs=0.005)
        assert accuracy == sorted(accuracy, reverse=True) and accuracy[0] > 0
        assert accuracy[-1] == 0
    assert at(1) == found and len({str(at(seed)) for seed in range(5)}) > 1
    assert found["attack"] == {"steps": 40, "restarts": 2, "leak": 0.2, "aims": 50}
    seen = []
    monkeypatch.setattr(robustness, "ATTACK", {"steps": 3, "restarts": 4, "leak": 0.3, "aims": 5})
    monkeypatch.setattr(robustness, "pgd", lambda model, x, y, **how: seen.append((len(x), how)) or x)
    assert at(1)["attack"] == robustness.ATTACK  # what a row says is what was done
    seen = [how for n, how in seen if n]  # with none the arguments are checked
    assert all(how["others"].shape == (18, 1, 5, 5) for how in seen)
    assert all(
        how.items() >= (robustness.ATTACK | {"aims": how["aims"], "restarts": how["restarts"]}).items() for how in seen
    )
    tried = [(how["restarts"], how["aims"], how["eps"]) for how in seen]
    assert tried[:4] == [(4, 5, 0.01), (4, 5, 0.03), (4, 5, 1.0), (1, 0, 1.0)] and len(tried) == 8


def test_a_network_that_is_always_wrong_has_no_accuracy_under_attack():
    model, x = linear(), images(20)
    found = attacked(model, x, 1 - model(x).argmax(1), generator=torch.Generator().manual_seed(0))
    assert found["attacked_right"] == 0 and found["attacked_linf_0.1"] is found["gradients_linf_1"] is None


@NORMS
def test_a_maintained_library_turns_no_more_images_of_a_dense_network(dense, norm):
    """Auto-PGD (Croce and Hein, 2020) with either of its losses, whose images count together."""
    evasion = pytest.importorskip("art.attacks.evasion", reason="needs the Adversarial Robustness Toolbox")
    from art.estimators.classification import PyTorchClassifier

    model, x, y = dense
    np.random.seed(0)  # noqa: NPY002 (the library draws from it)
    for eps in robustness.RADII[norm][1:3]:
        theirs = torch.zeros(len(x), dtype=torch.bool)
        for loss in ("cross_entropy", "difference_logits_ratio"):
            wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0.0, 1.0))
            how = {"norm": {"linf": "inf", "l2": 2}[norm], "eps": eps, "eps_step": 2 * eps, "loss_type": loss}
            attack = evasion.AutoProjectedGradientDescent(
                wrapped, **how, max_iter=50, nb_random_init=2, batch_size=100, verbose=False
            )
            near = torch.from_numpy(attack.generate(x.numpy(), F.one_hot(y, 10).float().numpy()))
            theirs |= model(near).argmax(1) != y
        ours = turned_by(pgd, model, x, y, eps=eps, norm=norm)
        assert ours.sum() >= theirs.sum() - 2  # percent


# --- tables


def rows(*lines):
    names = ("key", "seed", "sparsity", "test_error", "diverged", "effective_sparsity", "kept")
    return pd.DataFrame(lines, columns=names).assign(steps=9)


FULL = {"fc1.weight": 9, "fc2.weight": 1, "fc1.bias": 0}


def test_every_run_counts_with_the_error_that_it_ended_with():
    ours = rows(
        ("a", 0, 0.98, 3.0, False, 0.98, FULL),
        ("b", 1, 0.98, 4.0, False, 0.98, FULL),
        ("c", 0, 0.995, 90.0, True, 1.0, FULL),
    )
    table = by_sparsity({"SNIP": ours, "FORCE": ours.iloc[:0]})
    unfinished = by_sparsity({"SNIP": ours.assign(test_error=[3.0, None, 90.0])}).loc["SNIP"].tolist()
    assert unfinished == ["1", "1", "–", "90.00 (1\u00a0failed)"]  # one of two has no value: there is no mean of all
    cut = ours.assign(diverged=False, kept=[FULL | {"fc2.weight": 0}, FULL, FULL])
    assert by_sparsity({"SNIP": cut}, "effective_sparsity").loc["SNIP", "failed"] == "2"  # whatever its labels
    assert table.columns.tolist() == ["n", "failed", "98 %", "99.5 %"]
    # 3.5 ± 12.706 (Student's t with one degree of freedom) * 0.7071 / sqrt(2), cut at 0
    assert table.loc["SNIP"].tolist() == ["1", "1", "3.50 [0.00, 9.85]", "90.00 (1\u00a0failed)"]
    assert table.loc["FORCE"].tolist() == ["not run yet", "", "", ""]
    assert table.loc["SNIP", "98 %"].keys == (("a", "b"),)
    assert by_sparsity({"SNIP": ours.iloc[:0]}).loc["SNIP"].tolist() == ["not run yet", ""]
    none = by_sparsity({"SNIP": ours.iloc[:0], "FORCE": ours.iloc[:0]})  # one line for all of them
    assert none.index.tolist() == ["all 2"] and none["n"].tolist() == ["not run yet"]
    assert by_sparsity({"SNIP": ours}, "effective_sparsity").loc["SNIP", "99.5 %"] == "1.00 (1\u00a0failed)"


def test_gains_are_paired_by_seed():
    a = rows(
        ("a", 0, 0.98, 3.0, False, 0, FULL), ("b", 1, 0.98, 4.0, False, 0, FULL), ("x", 2, 0.98, 9, False, 0, FULL)
    )
    b = rows(("c", 1, 0.98, 6.0, False, 0, FULL), ("d", 0, 0.98, 90.0, True, 0, FULL))
    more = pd.concat([a, a.assign(sparsity=0.99)])  # whose pairs are not there
    groups = {"SNIP-it": more, "SNIP": b, "GraSP": b.iloc[:0], "FORCE": a.iloc[:1].assign(sparsity=0.95)}
    table = gains(groups, [("SNIP-it", "SNIP"), ("SNIP-it", "GraSP"), ("FORCE", "FORCE")])
    assert table.columns.tolist() == ["SNIP-it − SNIP", "FORCE − FORCE"] and table.index.tolist() == ["95", "98"]
    assert table.loc["98", "SNIP-it − SNIP"].startswith("-44.50 [") and table.loc["98"].iloc[1] == "not run yet"
    assert table.loc["98", "SNIP-it − SNIP"].endswith("] (2)")
    assert [sorted(keys) for keys in table.loc["98", "SNIP-it − SNIP"].keys] == [["a", "b"], ["c", "d"]]
    assert gains({"a": a.iloc[:0], "b": b.iloc[:0]}, [("a", "b")]).columns.tolist() == ["a − b"]


def test_a_network_is_cut_off_without_a_path_or_without_a_layer():
    found = rows(
        ("a", 0, 0.98, None, False, 0.985, FULL),
        ("b", 1, 0.98, None, False, 1.0, FULL),
        ("c", 2, 0.98, None, False, 0.99, FULL | {"fc2.weight": 0}),
    )
    assert is_cut_off(found).tolist() == [False, True, True]  # biases may all go
    assert is_cut_off(found.iloc[:0]).tolist() == []
    live = found.assign(live_weights=[0, None, 7], effective_sparsity=[0.99, 1.0, 1.0], kept=[FULL] * 3)
    assert is_cut_off(live).tolist() == [True, True, False]  # the last rounds to 1
    gate = found.assign(kept=[FULL | {"gates.weight": 0, "candidate.weight": 0}] * 3)
    assert is_cut_off(gate).tolist() == [False, True, False]  # without its gates, and whole


def test_trained_rows_are_split_by_the_outputs_that_their_masks_cut_off():
    masks = rows(*[(f"m{i}", i, 0.99, None, False, 0.99, FULL) for i in range(3)]).assign(dead_outputs=[0, 2, 0])
    trained = rows(*[(f"t{i}", i, 0.99, 5.0, i == 2, 0.99, FULL) for i in (1, 2, 7)])
    split = by_outputs(trained, masks, "SNIP")
    assert {name: list(group["key"]) for name, group in split.items()} == {
        "SNIP, a path to each output": ["t2"],
        "SNIP, an output without": ["t1"],
    }  # of seed 7 there is no mask
    assert loses_outputs(masks).tolist() == [False, True, False]
    table = disconnection_table({"SNIP": masks.assign(dead_outputs=[0, None, 1])}, loses_outputs)  # one is older
    assert table.loc["SNIP"].tolist() == ["2", "1 of 2 [1.3, 98.7]"]
    assert has_failed(trained).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="make it again"):
        loses_outputs(masks.assign(dead_outputs=[0, None, 1]))


def test_masks_are_compared_layer_by_layer_and_connection_by_connection():
    model = linear(classes=2, side=2)  # 4 -> 2
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    second = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    masks = {name: {"1.weight": kept, "1.bias": kept[0, :2]} for name, kept in {"a": first, "b": second}.items()}
    table = mask_table(model, masks, images(n=1, side=2), like="a")
    assert table.columns.tolist() == ["1", "dead units", "effective sparsity %", "in common with a %"]
    # a keeps 2 weights and 2 biases, b 3 and 1; both keep one weight and one bias, either 4 and 2. All is live.
    assert table.loc["a"].tolist() == [2, 1, "60.00", "100"] and table.loc["b"].tolist() == [3, 0, "60.00", "33"]


def test_intervals_of_disconnection_are_binomial():
    whole = rows(*[(f"w{i}", i, 0.99, None, False, 0.99, FULL) for i in range(20)])
    cut = rows(*[(f"c{i}", i, 0.999, None, False, 1.0 if i < 5 else 0.999, FULL) for i in range(20)])
    table = disconnection_table({"one shot": pd.concat([whole, cut]), "rounds": whole.iloc[:0]})
    # Clopper-Pearson: 1 - 0.025^(1/20) = 16.8 %; 5 of 20 gives 8.7 % to 49.1 % (Beta quantiles).
    assert table.loc["one shot"].tolist() == ["20", "0 of 20 [0.0, 16.8]", "5 of 20 [8.7, 49.1]"]
    assert table.loc["rounds"].tolist() == ["not run yet", "", ""]


def test_networks_that_only_guess_do_not_count_as_robust():
    ours = rows(*[(key, i, 0.98, 3.0, i == 2, 0.98, FULL) for i, key in enumerate("abc")])
    for norm, radii in robustness.RADII.items():
        for eps in radii:
            ours[f"attacked_{norm}_{eps:g}"] = [90.0, 80.0, 100.0]
        ours[f"gradients_{norm}_{radii[-1]:g}"] = [0.0, 5.0, 100.0]
    ours = ours.assign(attacked_images=500, attacked_right=[480, 471, 50], attack=[dict(robustness.ATTACK)] * 3)
    groups = {"SNIP": ours, "random": ours.iloc[:0], "alone": ours.iloc[:1], "old": ours.drop(columns="attack")}
    mixed = pd.concat([ours.iloc[:1], ours.iloc[1:].assign(attack=[None, {"steps": 1}])])
    table = attack_table(groups | {"mixed": mixed, "older": mixed.iloc[1:]}, "l2")
    assert table.columns.tolist() == ["n", "diverged", "right %", "0.5", "1", "1.5", "3", "28, gradients alone"]
    assert table.loc["SNIP", "diverged"] == "1" and table.loc["SNIP", "28, gradients alone"] == "2.50 [0.00, 34.27]"
    # 85 ± 12.706 (Student's t with one degree of freedom) * 7.071 / sqrt(2), cut at 100
    assert table.loc["SNIP"].tolist()[2:4] == ["95.1 ± 1.3", "85.00 [21.47, 100.00]"]  # 480 and 471 of 500
    assert table.loc["SNIP", "1"].keys == (("a", "b"),) and table.loc["alone", "1"] == "90.00"
    assert table.loc["mixed"].tolist()[:4] == ["1", "0", "96.0", "90.00"]  # rows of another attack are of another table
    for name in ("random", "old", "older"):
        assert table.loc[name].tolist() == ["not run yet", *[""] * (2 + len(robustness.RADII["l2"]))]


def test_the_figure_shows_the_mean_over_every_run_and_each_of_them():
    ours = rows(
        ("a", 0, 0.98, 3.0, False, 0.98, FULL),
        ("b", 1, 0.98, 5.0, False, 0.98, FULL),
        ("c", 0, 0.995, 10.0, False, 0.98, FULL),
        ("d", 1, 0.995, 90.0, True, 1.0, FULL),
    )
    masks, none = rows(*[(f"m{i}", i, 0.999, 0, False, float(i < 3), FULL) for i in range(4)]), ours.iloc[:0]
    panels = {"some": ({"SNIP": ours, "FORCE": none}, {"SNIP": masks, "FORCE": none}), "none": ({"SNIP": none}, {})}
    figure = plots.errors_by_method(panels)
    some, empty, cut, no_cut = figure.axes
    guess, means, seeds, *others = some.lines
    assert means.get_ydata().tolist() == [4, 50] and seeds.get_ydata().tolist() == [3, 5, 10, 90]
    assert not any(len(line.get_ydata()) for line in others) and guess.get_ydata() == [90, 90]
    assert [label.get_text() for label in some.get_xticklabels()] == ["98", "99.5"]
    assert empty.get_title() == "none: not run yet"
    ((share, _, (bar,)),) = cut.containers
    assert share.get_ydata() == [75] and not no_cut.containers
    assert bar.get_segments()[0][:, 1] == pytest.approx([19.41, 99.37], abs=0.01)  # Clopper and Pearson, 3 of 4
    plt.close("all")
