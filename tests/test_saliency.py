"""Laws of the criteria: each is its equation, and scoring leaves the network as it was."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import snip_lib as snip
from snip_lib.models import MODELS
from snip_lib.saliency import CRITERIA, connection_gradients, exact_arithmetic, loss_changes, prunable

F64 = {"dtype": torch.float64}
BY_EXAMPLE = ["obd_fisher", "obd_gauss_newton"]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def mlp(seed=0, *, bias=True, sizes=(6, 8, 5, 3)):
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def batch(n=16, shape=(6,), classes=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


NETWORKS = {
    "linear": (lambda: mlp(), (6,)),
    "grouped strided conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (2, 4, 4),
    ),
    "transposed conv": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(28, 3)
        ),
        (2, 3),
    ),
    "dilated conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2, dilation=2), nn.Flatten(), nn.Linear(3, 3)),
        (1, 3, 3, 3),
    ),
    "max pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)
        ),
        (1, 5, 5),
    ),
    "RNN": (lambda: Recurrent(nn.RNN), (6, 4)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (6, 4)),
    "GRU": (lambda: Recurrent(nn.GRU), (6, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
}
each_network = pytest.mark.parametrize("network", NETWORKS)


def build(network):
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.train()
    return model, *batch(8, shape)


# --- Equation 5


class WithMask(nn.Module):
    """The definition: a network that computes with c * w, c a leaf."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.c = {name: torch.ones_like(p, requires_grad=True) for name, p in prunable(self.model).items()}

    def forward(self, x):
        w = dict(self.model.named_parameters())
        return torch.func.functional_call(self.model, {n: c * w[n] for n, c in self.c.items()}, (x,))


@each_network
def test_the_gradient_of_a_real_mask_is_weight_times_gradient_bit_for_bit(network):
    model, x, y = build(network)
    definition = WithMask(model)
    expected = torch.autograd.grad(F.cross_entropy(definition(x), y), list(definition.c.values()))
    g = connection_gradients(model, x, y, **F64)
    assert list(g) == list(definition.c)
    assert all(torch.equal(a, b) for a, b in zip(g.values(), expected, strict=True))
    assert flat(g).abs().max() > 0


@each_network
def test_the_gradient_is_a_finite_difference(network):
    model, x, y = build(network)
    definition, g, eps = WithMask(model), connection_gradients(model, x, y, **F64), 1e-5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, c in definition.c.items():
            for j in torch.randperm(c.numel(), generator=generator)[:4].tolist():
                loss = []
                for step in (eps, -eps):
                    c.view(-1)[j] = 1 + step
                    loss.append(F.cross_entropy(definition(x), y))
                c.view(-1)[j] = 1
                difference = (loss[0] - loss[1]) / (2 * eps)
                assert g[name].flatten()[j] == pytest.approx(difference.item(), rel=1e-4, abs=1e-9)


def test_scores_by_hand():
    # One linear unit per class, w = [[2, -1], [0, 3]], x = (1, 2), loss = sum of outputs: dL/dw = x, g = w * x.
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0], [0.0, 3.0]]))
    x, options = torch.tensor([[1.0, 2.0]]), {"loss": lambda out, y: out.sum()}
    assert connection_gradients(model, x, None, **options)["weight"].tolist() == [[2, -2], [0, 6]]
    scores = snip.CRITERIA["snip"](model, x, None, **options)["weight"].flatten()
    assert scores.tolist() == pytest.approx([0.2, 0.2, 0.0, 0.6])


def test_sensitivities_sum_to_one():
    scores = CRITERIA["snip"](mlp(), *batch(), **F64)
    assert flat(scores).sum().item() == pytest.approx(1, abs=1e-12) and flat(scores).min() >= 0


def test_a_loss_without_gradient_scores_zero():
    scores = CRITERIA["snip"](mlp(), *batch(), loss=lambda out, y: 0 * out.sum(), **F64)
    assert not flat(scores).any()


@given(st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_scaling_the_loss_scales_g_and_leaves_the_scores(scale):
    model, (x, y) = mlp(), batch()
    g = connection_gradients(model, x, y, **F64)
    scaled = connection_gradients(model, x, y, loss=lambda out, y: scale * F.cross_entropy(out, y), **F64)
    assert torch.allclose(flat(scaled), scale * flat(g), rtol=1e-10, atol=0)
    scores = [
        CRITERIA["snip"](model, x, y, loss=f, **F64)
        for f in (F.cross_entropy, lambda o, y: scale * F.cross_entropy(o, y))
    ]
    assert torch.allclose(*map(flat, scores), rtol=1e-10, atol=0)


def test_a_power_of_two_before_the_loss_leaves_the_mask_bit_for_bit():
    model, (x, y) = mlp(), batch()
    masks = [
        snip.prune(model, x, y, sparsity=0.7, loss=lambda out, y, k=k: k * F.cross_entropy(out, y), **F64)
        for k in (1, 2**-20, 2**30)
    ]
    assert all(torch.equal(flat(masks[0]), flat(m)) for m in masks)


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_permuting_hidden_units_permutes_the_scores(seed):
    model, (x, y) = mlp(seed), batch(seed=seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight[order])
        twin[0].bias.copy_(model[0].bias[order])
        twin[2].weight.copy_(model[2].weight[:, order])
    a, b = (CRITERIA["snip"](m, x, y, **F64) for m in (model, twin))
    close = {"rtol": 1e-9, "atol": 1e-15}
    assert torch.allclose(a["0.weight"][order], b["0.weight"], **close)
    assert torch.allclose(a["0.bias"][order], b["0.bias"], **close)
    assert torch.allclose(a["2.weight"][:, order], b["2.weight"], **close)
    assert torch.allclose(a["4.weight"], b["4.weight"], **close)


@pytest.mark.parametrize("method", ["snip", "obd", *BY_EXAMPLE])
@pytest.mark.parametrize("factor", [2.0**-7, 0.3, 16.0, 1000.0])
def test_moving_scale_between_relu_layers_leaves_the_scores(factor, method):
    """The Hessian's diagonal falls by the square of the factor by which the weight grows: w^2 H stays."""
    model, (x, y) = mlp(), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(factor), twin[0].bias.mul_(factor), twin[2].weight.div_(factor)
    a, b = (CRITERIA[method](m, x, y, **F64) for m in (model, twin))
    assert torch.allclose(flat(a), flat(b), rtol=1e-9, atol=1e-15) and flat(a).any()
    masks = [snip.prune(m, x, y, sparsity=0.8, method=method, **F64) for m in (model, twin)]
    assert torch.equal(*map(flat, masks))


@pytest.mark.parametrize("seed", range(3))
def test_signed_gradients_sum_to_the_same_in_each_bias_free_relu_layer(seed):
    model, (x, y) = mlp(seed, bias=False, sizes=(6, 9, 8, 7, 3)), batch(seed=seed)
    sums = [g.sum().item() for g in connection_gradients(model, x, y, **F64).values()]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-9) and abs(sums[0]) > 1e-6


def test_where_a_mask_is_zero_g_is_what_the_connection_would_bring():
    model, (x, y) = mlp(), batch()
    mask = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.5 for n, p in prunable(model).items()
    }
    definition = WithMask(model)
    with torch.no_grad():
        for name, c in definition.c.items():
            c.copy_(mask[name])
    expected = torch.autograd.grad(F.cross_entropy(definition(x), y), list(definition.c.values()))
    g = connection_gradients(model, x, y, mask=mask, **F64)
    assert all(torch.equal(a, b) for a, b in zip(g.values(), expected, strict=True))
    assert flat(g)[~flat(mask)].abs().max() > 0


def test_a_masked_model_scores_its_removed_weights_zero():
    model, (x, y) = mlp(), batch()
    mask = snip.prune(model, x, y, sparsity=0.5, **F64)
    snip.apply_mask(model, mask)
    F.cross_entropy(model(x), y).backward()
    scores = CRITERIA["snip"](model, x, y, **F64)
    assert list(scores) == list(mask) and not flat(scores)[~flat(mask)].any() and flat(scores).any()


# --- the other criteria


FEEDFORWARD = [n for n in NETWORKS if n not in ("RNN", "LSTM", "GRU")]


@pytest.mark.parametrize("network, bn", [(n, "batch") for n in FEEDFORWARD] + [("batch norm", "fresh")])
def test_exact_changes_are_those_of_removing_one_by_one(network, bn):
    model, x, y = build(network)
    changes = loss_changes(model, x, y, bn=bn, **F64)
    by_hand = copy.deepcopy(model)
    by_hand.train(bn == "batch")
    with torch.no_grad():
        whole = F.cross_entropy(by_hand(x), y)
        for name, p in prunable(by_hand).items():
            for j in range(p.numel()):
                value = p.view(-1)[j].item()
                p.view(-1)[j] = 0
                assert changes[name].flatten()[j].item() == pytest.approx(
                    (whole - F.cross_entropy(by_hand(x), y)).item(), abs=1e-12
                )
                p.view(-1)[j] = value


def test_exact_change_by_hand():
    # L = sum of outputs = w1 * 1 + w2 * 2 with w = (3, -1): removing w1 lowers L by 3, removing w2 raises it by 2.
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0]]))
    x, options = torch.tensor([[1.0, 2.0]]), {"loss": lambda out, y: out.sum()}
    assert loss_changes(model, x, None, **options)["weight"].tolist() == [[3, -2]]
    assert CRITERIA["exact"](model, x, None, **options)["weight"].tolist() == [[3, 2]]


def test_sensitivity_is_the_first_order_of_the_exact_change():
    # With weights scaled by t the change is g + O(t^2) per connection of a linear model with squared loss.
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 2).double(), *batch(9, (5,), 2)
    errors = []
    for t in (1.0, 0.1, 0.01):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.weight.mul_(t), scaled.bias.mul_(t)
        g, change = connection_gradients(scaled, x, y, **F64), loss_changes(scaled, x, y, **F64)
        errors.append((flat(g) - flat(change)).abs().max().item())
    assert errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


def test_exact_works_on_recurrent_networks():
    model, x, y = build("LSTM")
    changes = loss_changes(model, x, y, **F64)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        whole = F.cross_entropy(by_hand(x), y)
        by_hand.rnn.weight_hh_l0[2, 3] = 0
        expected = whole - F.cross_entropy(by_hand(x), y)
    assert changes["rnn.weight_hh_l0"][2, 3].item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_module_that_is_used_twice_is_removed_in_both_its_places():
    torch.manual_seed(0)
    twice, tied = nn.Linear(6, 6), nn.Linear(6, 6)
    tied.weight = twice.weight
    model = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), tied, nn.Linear(6, 3)).double()
    x, y = batch()
    changes = loss_changes(model, x, y, **F64)
    with torch.no_grad():
        whole = F.cross_entropy(model(x), y)
        for j in range(36):
            value = twice.weight.view(-1)[j].item()
            twice.weight.view(-1)[j] = 0
            expected = (whole - F.cross_entropy(model(x), y)).item()
            twice.weight.view(-1)[j] = value
            assert changes["0.weight"].flatten()[j].item() == pytest.approx(expected, abs=1e-12)
    assert list(changes) == ["0.weight", "5.weight", "0.bias", "4.bias", "5.bias"]


class Bag(nn.Module):
    """An input that is a dict or a tuple, and so is the output."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.key = mlp(), "a" if kind is dict else 0

    def forward(self, x):
        return {self.key: self.net(x[self.key])} if self.key == "a" else (self.net(x[0]), x[1])


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("method", [m for m in CRITERIA if m not in BY_EXAMPLE])
def test_batches_may_be_tuples_and_dicts(method, kind):
    model, (x, y) = Bag(kind), batch()
    loss = lambda out, y: F.cross_entropy(out[model.key], y[model.key])  # noqa: E731
    pack = (lambda t: {"a": t}) if kind is dict else (lambda t: (t, torch.zeros(1, dtype=torch.float32)))
    expected = CRITERIA[method](model.net, x.float(), y, **F64)
    scores = CRITERIA[method](model, pack(x.float()), pack(y), loss=loss, **F64)  # its tensors follow the dtype
    if method == "synflow" and kind is tuple:  # one more output, and no weight touches it
        assert all(torch.allclose(scores[f"net.{n}"], s) for n, s in expected.items())
    else:
        assert all(torch.equal(scores[f"net.{n}"], s) for n, s in expected.items())


def test_a_packed_sequence_is_scored_in_either_precision():
    torch.manual_seed(0)
    rnn, head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def pack(x):
        return pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)

    class Net(nn.Module):
        def __init__(self, packs):
            super().__init__()
            self.rnn, self.head, self.packs = rnn, head, packs

        def forward(self, x):
            return self.head(self.rnn(pack(x) if self.packs else x)[1][0][0])

    x, y = torch.randn(4, 3, 4), torch.tensor([0, 1, 2])
    packed = pack(x)
    for dtype in (torch.float32, torch.float64):
        inside, outside = (connection_gradients(Net(p), v, y, dtype=dtype) for p, v in ((True, x), (False, packed)))
        assert all(torch.equal(outside[name], g) and g.dtype == dtype for name, g in inside.items())
    flow, of_ones = (CRITERIA["synflow"](Net(False), pack(v)) for v in (x, torch.ones_like(x)))
    assert all(torch.equal(of_ones[name], s) for name, s in flow.items())
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(Net(False)).items()}
    assert snip.on_live_path(Net(False), mask, packed)["rnn.weight_ih_l0"].all()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11's own, when it compiles first
@pytest.mark.parametrize("method", ["grasp", "obd", *BY_EXAMPLE])
def test_a_compiled_network_is_scored_as_the_one_inside(method):
    model, (x, y) = mlp(), batch()
    scores = CRITERIA[method](torch.compile(model), x, y, **F64)
    assert all(torch.equal(scores[f"_orig_mod.{n}"], s) for n, s in CRITERIA[method](model, x, y, **F64).items())


def test_outputs_without_a_tensor_are_refused_and_what_is_none_among_them_is_passed_over():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"logits": self.net(x), "loss": None} if len(x.shape) == 2 else None

    model, (x, _) = Named(), batch()
    expected = CRITERIA["synflow"](model.net, x)
    assert all(torch.equal(s, expected[name[4:]]) for name, s in CRITERIA["synflow"](model, x).items())
    with pytest.raises(ValueError, match="output .NoneType. is no tensor"):
        CRITERIA["synflow"](model, x[None])


@pytest.mark.parametrize("method", BY_EXAMPLE)
def test_examples_that_come_one_by_one_lie_in_the_first_dimension_of_output_and_labels(method):
    model, (x, y) = Bag(dict), batch()
    loss = lambda out, y: F.cross_entropy(out if isinstance(out, torch.Tensor) else out["a"], y)  # noqa: E731
    with pytest.raises(ValueError, match=f"{method} takes examples one by one: the output and y are tensors"):
        CRITERIA[method](model, {"a": x}, y, loss=loss, **F64)
    with pytest.raises(ValueError, match=f"{method} takes examples one by one"):
        CRITERIA[method](mlp(), x, y[:-1], loss=lambda out, y: F.cross_entropy(out[: len(y)], y), **F64)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model.net

        def forward(self, x):
            return self.net(x["a"])

    scores = CRITERIA[method](Named(), {"a": x.float()}, y, **F64)  # the input may be anything
    for name, expected in CRITERIA[method](model.net, x.float(), y, **F64).items():
        assert torch.equal(scores[f"net.{name}"], expected)


def test_a_network_may_change_its_input_in_place_and_keep_a_state():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.states = mlp(), ()

        def forward(self, x):
            hidden = self.net[0](x.mul_(2))
            self.states = (hidden, [hidden])
            return self.net[1:](hidden)

    model, (x, y) = Stateful(), batch()
    before = x.clone()
    expected = connection_gradients(mlp(), 2 * x, y, **F64)
    for _ in range(2):
        g = connection_gradients(model, x, y, **F64)
        assert torch.equal(x, before) and all(torch.equal(g[f"net.{n}"], e) for n, e in expected.items())
        model(x.clone())  # leaves a state that is computed, and that deepcopy would refuse
    changes, expected = (loss_changes(m, x * by, y, **F64) for m, by in ((Stateful(), 1), (mlp(), 2)))
    assert all(torch.allclose(changes[f"net.{n}"], e, atol=1e-12) for n, e in expected.items())


def test_magnitude_is_the_absolute_weight_and_needs_no_data():
    model = mlp()
    scores = CRITERIA["magnitude"](model, **F64)
    assert all(torch.equal(scores[name], p.abs()) for name, p in prunable(model).items())
    assert snip.prune(model, sparsity=0.5, method="magnitude")["0.weight"].any()
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in prunable(model).items()}
    under = CRITERIA["magnitude"](model, mask=mask, **F64)  # a weight is as large whether it is kept or not
    assert all(torch.equal(under[name], s) for name, s in scores.items())


def test_random_scores_are_those_of_their_generator():
    model = mlp()
    a, b, c, d = (
        flat(CRITERIA["random"](model, generator=g and torch.Generator().manual_seed(g))) for g in (None, 7, 7, 8)
    )
    assert torch.equal(b, c) and not torch.equal(b, d) and not torch.equal(a, b)
    assert torch.equal(a, flat(CRITERIA["random"](model))) and 0 <= b.min() and b.max() < 1
    assert torch.equal(a, flat(CRITERIA["random"](model, generator=torch.Generator().manual_seed(0))))
    assert abs(b.mean() - 0.5) < 5 / (12 * b.numel()) ** 0.5


class Quadratic(nn.Module):
    """L(w) = w'Aw / 2 for a hand-made A; the batch is not used."""

    def __init__(self, a, w):
        super().__init__()
        self.a = torch.tensor(a, dtype=torch.float64)
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return (self.w @ self.a @ self.w.T).squeeze() / 2


def quadratic(criterion, a, w, **options):
    options |= {"only": "w", "loss": lambda out, y: out, **F64}
    return CRITERIA[criterion](Quadratic(a, w), torch.zeros(1), None, **options)["w"][0].tolist()


def test_grasp_keeps_the_connections_that_carry_the_gradient_flow():
    # A = diag(1, 3), w = (1, 1): g = (1, 3), gradient flow g'g = 10, H g = (1, 9), so scores w * Hg = (1, 9).
    assert quadratic("grasp", [[1.0, 0], [0, 3]], [1.0, 1.0]) == [1, 9]
    # Keeping the second leaves a flow of 9, keeping the first one of 1.
    model = Quadratic([[1.0, 0], [0, 3]], [1.0, 1.0])
    mask = snip.prune(
        model, torch.zeros(1), sparsity=0.5, method="grasp", only="w", loss=lambda out, y: out, score_bn="batch", **F64
    )
    assert mask["w"].tolist() == [[False, True]]


def test_grasp_is_signed():
    # A = [[1, -2], [-2, 1]], w = (3, 1): g = (1, -5), Hg = (11, -7), w * Hg = (33, -7): the second hinders the flow.
    a, w = [[1.0, -2.0], [-2.0, 1.0]], [3.0, 1.0]
    assert quadratic("grasp", a, w) == [33, -7]
    # -2 w_j (Hg)_j is the first-order change of g'g when w_j shrinks.
    for j, expected in enumerate((-66, 14)):
        eps, flows = 1e-6, []
        for t in (0, eps):
            v = torch.tensor(w, dtype=torch.float64)
            v[j] *= 1 - t
            flows.append((torch.tensor(a, dtype=torch.float64) @ v).square().sum())
        assert ((flows[1] - flows[0]) / eps).item() == pytest.approx(expected, rel=1e-4)


def test_obd_is_half_the_curvature_times_the_square():
    # H = A: scores a_jj w_j^2 / 2, signed; off-diagonal terms play no part.
    assert quadratic("obd", [[4.0, 1.0], [1.0, -2.0]], [3.0, 2.0]) == [18, -4]


class Diagonal(nn.Module):
    """L(w) = sum_j j w_j^2 / 2, for more connections than `obd` takes at once."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 2200))

    def forward(self, x):
        return (torch.arange(2200) * self.w**2).sum() / 2


def test_obd_takes_the_hessian_of_a_large_weight_in_pieces():
    scores = CRITERIA["obd"](Diagonal(), torch.zeros(1), None, only="w", loss=lambda out, y: out, **F64)["w"]
    assert torch.equal(scores[0], torch.arange(2200, dtype=torch.float64) / 2)


@pytest.mark.parametrize("network", FEEDFORWARD)
def test_obd_is_the_diagonal_of_the_full_hessian(network):
    model, x, y = build(network)
    scores = CRITERIA["obd"](model, x, y, **F64)
    w = {n: p.detach() for n, p in prunable(model).items()}

    def loss(name, value):
        return F.cross_entropy(torch.func.functional_call(copy.deepcopy(model), {name: value}, (x,)), y)

    for name, p in w.items():
        hessian = torch.autograd.functional.hessian(lambda value, name=name: loss(name, value), p)
        diagonal = hessian.reshape(p.numel(), p.numel()).diagonal()
        assert torch.allclose(scores[name].flatten(), diagonal * p.flatten() ** 2 / 2, rtol=1e-8, atol=1e-14)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 3, 2).repeat(1, 1, 2)).mean(1))


def test_attention_has_second_derivatives():
    model, (x, y) = Attentive().train(), batch()
    name, h = "layer.self_attn.in_proj_weight", 1e-4
    half = CRITERIA["obd"](model, x, y, only=name, biases=False, **F64)[name]
    flow = CRITERIA["grasp"](model, x, y, only=name, biases=False, **F64)[name]
    p = dict(model.named_parameters())[name]

    def at(j, change):
        with torch.no_grad():
            value = p.view(-1)[j].item()
            p.view(-1)[j] += change
        loss = F.cross_entropy(model(x), y)
        (g,) = torch.autograd.grad(loss, p)
        with torch.no_grad():
            p.view(-1)[j] = value
        return g, value

    for j in (0, 13, 37):
        (up, value), (down, _) = at(j, h), at(j, -h)
        row = (up - down) / (2 * h)  # the row of the Hessian
        assert half.view(-1)[j].item() == pytest.approx((row.view(-1)[j] * value**2 / 2).item(), rel=1e-5, abs=1e-10)
        g, _ = at(j, 0)
        assert flow.view(-1)[j].item() == pytest.approx((value * (row * g).sum()).item(), rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("method", ["grasp", "obd"])
def test_a_network_without_second_derivatives_is_refused(method):
    model, (x, y) = mlp(), batch()
    model[1] = nn.Hardsigmoid()
    enabled = torch.backends.cudnn.enabled
    with pytest.raises(ValueError, match="takes second derivatives, and this network's failed: .*hardsigmoid"):
        CRITERIA[method](model, x, y, **F64)
    assert torch.backends.cudnn.enabled == enabled and torch.backends.cuda.flash_sdp_enabled()


def test_obd_fisher_is_the_mean_square_of_gradients_by_example():
    model, (x, y) = mlp(), batch()
    scores = CRITERIA["obd_fisher"](model, x, y, **F64)
    squares = {name: torch.zeros_like(p) for name, p in prunable(model).items()}
    for a, b in zip(x, y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), list(prunable(model).values()))
        for s, grad in zip(squares.values(), grads, strict=True):
            s += grad**2 / len(x)
    for name, p in prunable(model).items():
        assert torch.allclose(scores[name], squares[name] * p.detach() ** 2 / 2, rtol=1e-9, atol=0)


def obd_both_ways(model, x, y, **scoring):
    return (flat(CRITERIA[method](model, x, y, **F64, **scoring)) for method in ("obd", "obd_gauss_newton"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("network", ["linear", "max pooling"])
def test_obd_gauss_newton_is_the_hessian_where_the_output_is_piecewise_linear_in_each_weight(
    network, masked, reduction
):
    model, x, y = build(network)
    half = {n: torch.arange(p.numel()).view_as(p) % 2 == 0 for n, p in prunable(model).items()}
    loss = lambda out, y: F.cross_entropy(out, y, reduction=reduction)  # noqa: E731
    exact, scores = obd_both_ways(model, x, y, loss=loss, mask=half if masked else None)
    assert torch.allclose(scores, exact, rtol=1e-8, atol=1e-15) and exact.any()


def test_obd_gauss_newton_takes_outputs_of_any_shape():
    x, y = batch()
    one = nn.Sequential(mlp(sizes=(6, 5, 1)), nn.Flatten(0))  # a number for each example
    binary = lambda out, y: F.binary_cross_entropy_with_logits(out, (y > 0).to(out))  # noqa: E731
    tokens = nn.Sequential(mlp(sizes=(6, 5, 6)), nn.Unflatten(1, (3, 2)))  # three classes for each of two
    for model, labels, loss in ((one, y, binary), (tokens, torch.stack([y, 2 - y], 1), F.cross_entropy)):
        exact, scores = obd_both_ways(model, x, labels, loss=loss)
        assert torch.allclose(scores, exact, rtol=1e-8, atol=1e-15) and exact.any()


@pytest.mark.parametrize("network", ["twice", "RNN", "batch norm"])
def test_obd_gauss_newton_is_not_the_hessian_where_a_weight_acts_twice_or_a_batch_is_normalised(network):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    twice = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3)).double()
    model, x, y = (twice, *batch()) if network == "twice" else build(network)
    exact, scores = obd_both_ways(model, x, y)
    assert (scores - exact).abs().max() > 0.01 * exact.abs().max()


def test_obd_gauss_newton_leaves_out_the_curvature_of_the_network():
    """z = tanh(w), L = z^2: the Hessian is 2 z'^2 + 2 z z''; the Gauss-Newton part is the first term."""
    model, w = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()), torch.tensor(0.7, dtype=torch.float64)
    with torch.no_grad():
        model.double()[0].weight.fill_(0.7)
    one, square = torch.ones(1, 1), lambda out, y: (out - y).square().sum()
    z, first = torch.tanh(w), 1 - torch.tanh(w) ** 2
    gauss_newton, hessian = (
        CRITERIA[m](model, one, 0 * one, loss=square, **F64)["0.weight"].item() for m in ("obd_gauss_newton", "obd")
    )
    assert gauss_newton == pytest.approx((first**2 * w**2).item(), rel=1e-12)
    assert hessian == pytest.approx(((first**2 - 2 * z * z * first) * w**2).item(), rel=1e-12)


def test_a_loss_that_is_linear_in_the_output_has_no_gauss_newton_part():
    model, (x, y) = mlp(), batch()
    assert not flat(CRITERIA["obd_gauss_newton"](model, x, y, loss=lambda out, y: F.nll_loss(out, y), **F64)).any()


def test_synflow_by_hand():
    # R = sum_ijk |v_ij| |w_jk| for w = [[1, -2], [3, 0]], v = [[-1, 2]]: paths through unit 0: 3, through unit 1: 6.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[-1.0, 2.0]]))
    scores = CRITERIA["synflow"](model, -7 * torch.rand(5, 2), None)
    assert scores["0.weight"].tolist() == [[1, 2], [6, 0]] and scores["2.weight"].tolist() == [[3, 6]]


def test_synaptic_flow_is_conserved_by_layer_and_needs_float64():
    model = nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(30)])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    scores = CRITERIA["synflow"](model, torch.zeros(1, 200), None)
    sums = [s.sum().item() for s in scores.values()]
    assert sums[0] > torch.finfo(torch.float32).max and sums == pytest.approx([sums[0]] * 30, rel=1e-9)


def test_synflow_ignores_signs_data_and_batch_norm_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    twin = copy.deepcopy(model)
    twin(torch.randn(50, 4) * 9)  # moves the running statistics
    with torch.no_grad():
        twin[0].weight.neg_()
    a, b = (flat(CRITERIA["synflow"](m, torch.randn(3, 4), None)) for m in (model, twin))
    assert torch.equal(a, b)
    with torch.no_grad():  # those of what is not scored, too
        twin[0].bias.neg_(), twin[1].weight.neg_(), twin[3].weight.neg_()
    some = {"biases": False, "exclude": "3"}
    a, b = (flat(CRITERIA["synflow"](m, torch.randn(3, 4), None, **some)) for m in (model, twin))
    assert torch.equal(a, b) and a.any()


# --- batch norm


def test_fresh_batch_norm_is_mean_zero_variance_one_with_the_modules_eps():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5, eps=1e-3).double()
    model = nn.Sequential(nn.Linear(6, 5).double(), norm, nn.ReLU(), nn.Linear(5, 3).double())
    x, y = batch()
    model.train()(x * 3 + 1)  # the running statistics are far from fresh
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.uniform_(-1, 1)
    g = connection_gradients(model, x, y, bn="fresh", **F64)
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    h = F.linear(x, w["0.weight"], w["0.bias"]) / (1 + 1e-3) ** 0.5 * w["1.weight"] + w["1.bias"]
    loss = F.cross_entropy(F.linear(h.relu(), w["3.weight"], w["3.bias"]), y)
    for name in g:
        (grad,) = torch.autograd.grad(loss, w[name], retain_graph=True)
        assert torch.allclose(g[name], w[name] * grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("mode", [True, False])
def test_batch_statistics_are_those_of_the_batch_whatever_the_mode(mode):
    model, x, y = build("batch norm")
    model.train(mode)
    definition = WithMask(copy.deepcopy(model).train())
    expected = torch.autograd.grad(F.cross_entropy(definition(x), y), list(definition.c.values()))
    g = connection_gradients(model, x, y, **F64)
    assert all(torch.equal(a, b) for a, b in zip(g.values(), expected, strict=True))
    fresh = connection_gradients(model, x, y, bn="fresh", **F64)
    assert not torch.allclose(flat(fresh), flat(g), rtol=1e-3)


def test_fresh_statistics_hold_for_batch_norm_that_tracks_none():
    model, x, y = build("batch norm")
    untracked = copy.deepcopy(model)
    untracked[1] = nn.BatchNorm1d(5, track_running_stats=False).double()
    a, b = (flat(connection_gradients(m, x, y, bn="fresh", **F64)) for m in (model, untracked))
    assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "exact"])
def test_instance_norm_uses_the_statistics_of_each_example_as_in_training(method):
    def build(track):
        torch.manual_seed(0)
        norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=track)
        return nn.Sequential(nn.Conv1d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))

    x, y = torch.randn(5, 2, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    a, b = (CRITERIA[method](build(track), x, y, **F64) for track in (False, True))
    assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize("method", ["snip", "grasp", "obd", "obd_fisher"])
def test_an_embedding_with_sparse_gradients_scores_as_one_without(method):
    def build(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))

    x, y = torch.randint(0, 7, (5, 3)), torch.tensor([0, 1, 2, 0, 1])
    model = build(True)
    a, b = (CRITERIA[method](m, x, y, only="*", **F64) for m in (build(False), model))
    assert torch.equal(flat(a), flat(b)) and model[0].sparse


def test_dropout_between_recurrent_layers_is_off_as_all_dropout_is():
    torch.manual_seed(0)
    model, (x, y) = Recurrent(lambda a, b, batch_first: nn.LSTM(a, b, 2, batch_first=batch_first)), batch(8, (6, 4))
    dropped = copy.deepcopy(model)
    dropped.rnn.dropout = 0.5
    a, b = (connection_gradients(m, x, y, **F64) for m in (model, dropped))
    assert torch.equal(flat(a), flat(b)) and dropped.rnn.dropout == 0.5


# --- scoring leaves no trace


class Noisy(nn.Module):
    """Batch norm, dropout, a frozen layer, a layer in evaluation and a gradient: much that could change."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.requires_grad_(False).eval()
        self.a.weight.grad = torch.full_like(self.a.weight, 7.0)

    def forward(self, x):
        return self.c(F.dropout(self.b(self.drop(torch.relu(self.bn(self.a(x))))), 0.1, training=True))


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("bn", ["batch", "fresh"])
def test_scoring_leaves_the_network_and_the_random_state_as_they_were(method, bn):
    torch.manual_seed(0)
    model, (x, y) = Noisy(), batch()
    x = x.float()
    tensors = {id(t): (t, t.detach().clone(), t.requires_grad) for t in [*model.parameters(), *model.buffers(), x, y]}
    modes = [m.training for m in model.modules()]
    grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    rng = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    snip.prune(model, x, y, sparsity=0.3, method=method, score_bn=bn)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert all(map(torch.equal, torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [], rng[1]))
    assert [id(t) for t in [*model.parameters(), *model.buffers()]] == list(tensors)[:-2]
    assert all(torch.equal(t, was) and t.requires_grad == flag for t, was, flag in tensors.values())
    assert modes == [m.training for m in model.modules()]
    for p, was in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if was is None else p.grad is was[0] and torch.equal(*was)


class Rotated(nn.Module):
    """Pairs of outputs turned by complex numbers, as in rotary embeddings."""

    def __init__(self, kept_in):
        super().__init__()
        self.q, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        turn = torch.polar(torch.ones(2), torch.tensor([0.7, 2.1]))
        setattr(self, "turn", turn) if kept_in == "attribute" else self.register_buffer("turn", turn)

    def forward(self, x):
        pairs = torch.view_as_complex(self.q(x).unflatten(1, (2, 2)))
        return self.head(torch.view_as_real(pairs * self.turn).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_complex_buffer_scores_like_the_same_numbers_kept_elsewhere(dtype):
    scores = []
    for kept_in in ("buffer", "attribute"):
        torch.manual_seed(1)
        scores.append(connection_gradients(Rotated(kept_in), *batch(), dtype=dtype))
    assert torch.equal(flat(scores[0]), flat(scores[1]))


def test_scoring_is_exact_whatever_arithmetic_is_around_it():
    model, (x, y) = mlp().float(), batch()
    x = x.float()
    expected = connection_gradients(model, x, y)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            g = connection_gradients(model, x, y)
            assert model(x).dtype == torch.bfloat16  # autocast is back on
        with torch.inference_mode():
            inferred = connection_gradients(model, x.clone(), y.clone())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for other in (g, inferred):
        assert all(torch.equal(other[n], expected[n]) and other[n].dtype == torch.float32 for n in expected)


B = torch.backends
KNOBS = [B.cuda.matmul, B.cudnn.conv, B.cudnn.rnn, B.mkldnn.matmul, B.mkldnn.conv, B.mkldnn.rnn]


def said_of_products():
    """Return what torch says of its float32 products, by the newer switches and, where it can, by the older ones."""
    said = [knob.fp32_precision for knob in [B, B.cudnn, B.mkldnn, *KNOBS]]
    for older in (torch.get_float32_matmul_precision, lambda: B.cuda.matmul.allow_tf32, lambda: B.cudnn.allow_tf32):
        try:
            said.append(older())
        except RuntimeError:  # they differ
            said.append(None)
    return said


@pytest.fixture
def fresh_products():
    """Return what puts the precision of products back as torch begins with, and do so at the end."""

    def fresh():
        torch.set_float32_matmul_precision("highest")
        for knob in [B, B.cudnn, B.mkldnn, *KNOBS]:
            knob.fp32_precision = "none"
        B.cudnn.allow_tf32 = True

    fresh()
    yield fresh
    fresh()


def products(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def switch(*knobs, **values):
    return lambda: [setattr(knob, name, value) for knob in knobs for name, value in values.items()]


@pytest.mark.parametrize(
    "set_up",
    [
        lambda: None,
        products("high"),
        products("medium"),
        switch(B.cudnn, allow_tf32=False),
        switch(B, fp32_precision="tf32"),
        switch(B, fp32_precision="ieee"),
        switch(B.cudnn, fp32_precision="ieee"),
        switch(*KNOBS, fp32_precision="tf32"),
        switch(*KNOBS, fp32_precision="none"),
        switch(B.cudnn.conv, fp32_precision="ieee"),
        switch(B.mkldnn.matmul, fp32_precision="tf32"),
    ],
)
def test_reduced_precision_is_off_while_scoring_and_is_then_as_it_was(set_up, fresh_products):
    def what_follows():  # what inherits is known by what it does when the whole changes
        return [said_of_products() for B.fp32_precision in ("tf32", "ieee", "none")]

    set_up()
    before = said_of_products()
    expected = what_follows()
    fresh_products()
    set_up()
    with pytest.raises(KeyError), exact_arithmetic(mlp()):
        assert [knob.fp32_precision for knob in KNOBS] == ["ieee"] * 6
        readable = [older for older, was in zip(said_of_products()[-3:], before[-3:], strict=True) if was is not None]
        assert set(readable) <= {"highest", False}
        raise KeyError
    assert said_of_products() == before and what_follows() == expected


def test_a_network_may_set_cudnn_flags_while_it_is_scored():
    class WithoutCudnn(nn.Sequential):  # as for second derivatives of a recurrent layer
        def forward(self, x):
            with torch.backends.cudnn.flags(enabled=False):
                return super().forward(x)

    plain, (x, y) = mlp(), batch()
    model = WithoutCudnn(*copy.deepcopy(plain))
    masks = [snip.prune(net, x, y, sparsity=0.5).values() for net in (model, plain)]
    assert all(map(torch.equal, *masks))


def test_a_half_precision_model_is_scored_in_float32():
    model, (x, y) = mlp(), batch()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    g = connection_gradients(copy.deepcopy(model).bfloat16(), x, y)
    assert all(torch.equal(g[n], e) for n, e in connection_gradients(model, x, y).items())


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize(
    "model, words",
    [
        (lambda: mlp().to("meta"), "0.weight is on the meta device"),
        (lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)), "0.weight is complex"),
        (lambda: nn.utils.parametrizations.weight_norm(mlp()[0]), "'ParametrizedLinear' computes its weight"),
        (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(mlp()[0])), "'0' computes its weight"),
    ],
)
def test_weights_that_have_no_score_are_refused(method, model, words):
    with pytest.raises(ValueError, match=words):
        CRITERIA[method](model(), *batch())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="is a torch.nn.Module, not dict"):
        CRITERIA["snip"]({}, *batch())


@pytest.mark.parametrize("method", ["snip", "grasp", "obd", *BY_EXAMPLE])
@pytest.mark.parametrize("loss", [lambda out, y: F.cross_entropy(out.detach(), y), lambda out, y: torch.tensor(1.0)])
def test_a_loss_that_is_cut_off_is_refused(method, loss):
    with pytest.raises(ValueError, match="The loss has no gradient"):
        CRITERIA[method](mlp(), *batch(), loss=loss, **F64)


@pytest.mark.parametrize("method", [m for m in CRITERIA if m not in ("magnitude", "random")])
def test_an_empty_batch_is_refused(method):
    x, y = batch()
    with pytest.raises(ValueError, match=r"scoring batch of shape \[0, 6\] is empty"):
        CRITERIA[method](mlp(), x[:0], y[:0], **F64)


# --- which parameters


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("place", [nn.utils, nn.utils.parametrizations], ids=["old", "new"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_is_refused_unless_it_is_left_out(norm, place):
    model = mlp()
    getattr(place, norm)(model[2])
    for choice in ({}, {"only": "2"}, {"only": "2.weight"}, {"only": ["0", "2"]}, {"exclude": "0"}):
        with pytest.raises(ValueError, match="'2' computes its weight .* exclude it"):
            prunable(model, **choice)
    for choice in ({"exclude": "2"}, {"exclude": "2.weight"}, {"exclude": "2.*"}, {"only": ["0", "4"]}):
        assert list(prunable(model, biases=False, **choice)) == ["0.weight", "4.weight"]
    assert list(prunable(model, only="*", exclude="2.weight")) == ["0.weight", "4.weight", "0.bias", "2.bias", "4.bias"]


def test_weights_come_before_biases_each_in_module_order():
    model = nn.ModuleDict({"z": nn.Linear(2, 2), "bn": nn.BatchNorm1d(2), "a": nn.LSTM(2, 2), "e": nn.Embedding(3, 2)})
    assert list(prunable(model)) == [
        "z.weight", "a.weight_ih_l0", "a.weight_hh_l0", "z.bias", "a.bias_ih_l0", "a.bias_hh_l0",
    ]  # fmt: skip
    assert list(prunable(model, biases=False)) == ["z.weight", "a.weight_ih_l0", "a.weight_hh_l0"]


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Linear(3, 2), nn.Bilinear(2, 3, 4), nn.MultiheadAttention(4, 2)),
        *(nn.Conv1d(2, 3, 2), nn.Conv2d(2, 3, 2), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2)),
        *(nn.RNN(2, 3), nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNNCell(2, 3), nn.LSTMCell(2, 3), nn.GRUCell(2, 3)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_parameter_of_a_connection_is_prunable(module):
    assert set(prunable(nn.ModuleList([module]))) == {f"0.{name}" for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)],
    ids=lambda norm: type(norm).__name__,
)
def test_normalisation_is_never_pruned_whatever_is_asked_for(norm):
    assert list(norm.parameters())
    assert list(prunable(nn.Sequential(nn.Linear(4, 4), norm), only="*")) == ["0.weight", "0.bias"]


def test_attention_biases_with_three_dimensions_are_biases():
    names = list(prunable(nn.MultiheadAttention(4, 2, add_bias_kv=True), biases=False))
    assert names == ["in_proj_weight", "out_proj.weight"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.norm, self.head = nn.Parameter(torch.ones(4, 4)), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x @ self.kernel))


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({}, ["head.weight", "head.bias"]),
        ({"only": "kernel"}, ["kernel"]),
        ({"only": ["kernel", "head.*"]}, ["kernel", "head.weight", "head.bias"]),
        ({"only": "*"}, ["kernel", "head.weight", "head.bias"]),
        ({"only": "head"}, ["head.weight", "head.bias"]),
        ({"only": "*", "exclude": "head.bias"}, ["kernel", "head.weight"]),
        ({"exclude": ["*.bias"]}, ["head.weight"]),
        ({"only": "kernel", "exclude": "head"}, ["kernel"]),
    ],
)
def test_only_and_exclude_choose_by_name(choice, expected):
    assert list(prunable(Scaled(), **choice)) == expected


@pytest.mark.parametrize("choice", [{"only": "nothing.*"}, {"exclude": "kernal"}, {"only": "norm"}, {"only": []}])
def test_a_choice_that_matches_nothing_is_refused(choice):
    with pytest.raises(ValueError, match="prunable parameter"):
        prunable(Scaled(), **choice)


def test_a_network_without_connections_is_refused():
    with pytest.raises(ValueError, match="BatchNorm1d has no prunable parameter"):
        prunable(nn.BatchNorm1d(3))


# --- the released code's rules, and NumPy


def test_a_numpy_forward_and_backward_pass_of_lenet_300_100_gives_the_same_mask():
    torch.manual_seed(0)
    model, (x, y) = MODELS["lenet300"]().double(), batch(100, (1, 28, 28), 10)
    x = x * (torch.rand(784, generator=torch.Generator().manual_seed(3)).view(1, 28, 28) < 0.6)  # borders are black
    w = {n: p.detach().numpy() for n, p in model.named_parameters()}
    a0 = x.flatten(1).numpy()
    z1 = a0 @ w["fc1.weight"].T + w["fc1.bias"]
    a1 = np.maximum(z1, 0)
    z2 = a1 @ w["fc2.weight"].T + w["fc2.bias"]
    a2 = np.maximum(z2, 0)
    z3 = a2 @ w["fc3.weight"].T + w["fc3.bias"]
    p = np.exp(z3 - z3.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    d3 = (p - np.eye(10)[y.numpy()]) / 100
    d2 = (d3 @ w["fc3.weight"]) * (z2 > 0)
    d1 = (d2 @ w["fc2.weight"]) * (z1 > 0)
    grads = [d1.T @ a0, d2.T @ a1, d3.T @ a2, d1.sum(0), d2.sum(0), d3.sum(0)]
    names = ["fc1.weight", "fc2.weight", "fc3.weight", "fc1.bias", "fc2.bias", "fc3.bias"]
    scores = np.concatenate([np.abs(w[n] * g).ravel() for n, g in zip(names, grads, strict=True)])
    for sparsity in (0.5, 0.9, 0.95, 0.99):
        kept = np.zeros(scores.size, bool)
        kept[np.argsort(-scores, kind="stable")[: round((1 - sparsity) * scores.size)]] = True
        mask = snip.prune(model, x, y, sparsity=sparsity, **F64)
        assert list(mask) == names and np.array_equal(flat(mask).numpy(), kept)
        single = snip.prune(model, x, y, sparsity=sparsity)
        assert (flat(single).numpy() != kept).sum() <= 4  # a handful of borderline weights


def test_zero_biases_are_all_removed_while_enough_weights_score():
    torch.manual_seed(0)
    model, (x, y) = MODELS["lenet300"](), batch(100, (1, 28, 28), 10)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    mask = snip.prune(model, x.float(), y, sparsity=0.95, score_bn="fresh")
    assert sum(int(k.sum()) for k in mask.values()) == 13_331
    assert not any(k.any() for n, k in mask.items() if n.endswith("bias"))
