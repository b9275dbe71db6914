"""Laws of live paths where a network hides them: outputs that sum to a constant, masked attention, pooling."""

import pytest
import torch
import torch.nn.functional as F
from test_masks import same, some_mask
from torch import nn

import snip_lib as snip


class Two(nn.Module):
    """Two layers, what is between them and what comes last."""

    def __init__(self, *, between=F.relu, last=lambda h: h):
        super().__init__()
        self.a, self.b, self.between, self.last = nn.Linear(4, 6), nn.Linear(6, 6), between, last

    def forward(self, x):
        return self.last(self.b(self.between(self.a(x))))


@pytest.mark.parametrize(
    "last",
    [
        nn.Softmin(1),
        lambda h: h.view(-1, 2).exp() / h.view(-1, 2).exp().sum(1, keepdim=True),
        lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
        lambda h: F.relu(h - h.mean()),
        lambda h: h - h.flip(1),
        lambda h: {"waves": torch.fft.fft(h - h.flip(1)), "rounded": (h - h.flip(1)).float(), "choice": h.argmax(1)},
    ],
    ids=["softmin", "softmax by hand", "layer norm by hand", "centred", "difference", "several"],
)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_outputs_that_sum_to_a_constant_leave_the_paths_to_each(last, keep):
    mask, x = some_mask(Two(), keep=keep), torch.ones(1, 4)
    live = snip.on_live_path(Two(last=last), mask, x)
    assert same(live, snip.on_live_path(Two(), mask, x)) and same(live, mask) == (keep == 1)


def test_the_advantages_of_a_duelling_network_are_live():
    class Duel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.v, self.a = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x):
            h = self.body(x).relu()
            return self.v(h) + self.a(h) - self.a(h).mean(1, keepdim=True)

    model = Duel()
    mask = some_mask(model, keep=1.0)
    mask["body.weight"][2] = mask["v.weight"][:] = False
    live = snip.on_live_path(model, mask, torch.ones(1, 4))
    mask["a.weight"][:, 2] = False
    assert same(live, mask)


@pytest.mark.parametrize("units", [1, 7])
def test_a_network_used_twice_is_live_where_the_results_are_subtracted(units):
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())
            self.head = nn.Linear(units, 3)

        def forward(self, pair):
            return self.head(self.f(pair[0])) - self.head(self.f(pair[1]))

    model = Siamese()
    mask = {n: kept for n, kept in some_mask(model, keep=1.0).items() if "weight" in n}
    assert same(snip.on_live_path(model, mask, (torch.ones(1, 4), torch.ones(1, 4))), mask)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: (h - h.amin(1, keepdim=True)) / (h.amax(1, keepdim=True) - h.amin(1, keepdim=True)),
        lambda h: h / (h.max(1, keepdim=True)[0] - h.min(1, keepdim=True)[0]),
        lambda h: torch.maximum(h, h.flip(1)) - torch.minimum(h, h.flip(1)),
    ],
    ids=["of a dimension", "with places", "of two"],
)
def test_the_largest_less_the_smallest_is_not_0(between):
    model = Two(between=between)
    mask = some_mask(model, keep=1.0)
    assert same(snip.on_live_path(model, mask, torch.ones(1, 4)), mask)
    mask["b.weight"][:] = False
    assert not snip.on_live_path(model, mask, torch.ones(1, 4))["a.weight"].any()


class Attention(nn.Module):
    """Attention of one head by hand; each place sees those before it, the others get `hidden`."""

    def __init__(self, hidden):
        super().__init__()
        self.q, self.k, self.v, self.o, self.head = (nn.Linear(8, 8) for _ in range(5))
        self.hidden = hidden

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT / 8**0.5
        if self.hidden is not None:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, self.hidden)
        return self.head(self.o(scores.softmax(-1) @ self.v(x)))


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float64).min, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("cut", [(), ("v",), ("o",), ("head",), ("q", "k")], ids="-".join)
def test_hiding_later_places_from_attention_changes_no_path(hidden, cut):
    mask, x = some_mask(Attention(None), keep=0.7), torch.ones(1, 5, 8)
    for name in cut:
        mask[f"{name}.weight"][:] = mask[f"{name}.bias"][:] = False
    live = snip.on_live_path(Attention(hidden), mask, x)
    assert same(live, snip.on_live_path(Attention(None), mask, x))
    assert live["v.weight"].any() == (not cut)


def test_places_that_attention_never_sees_are_not_live():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.ones(5, 3))

        def forward(self, x):
            return (x @ x.mT).masked_fill(torch.arange(5) > 2, -torch.inf).softmax(-1) @ self.values

    live = snip.on_live_path(Looking(), {"values": torch.ones(5, 3, dtype=torch.bool)}, torch.ones(1, 5, 8))
    assert live["values"].all(1).tolist() == live["values"].any(1).tolist() == [True] * 3 + [False] * 2


def test_a_derivative_that_is_not_finite_is_no_path():
    model = Two(between=lambda h: h / h.norm(dim=1, keepdim=True))
    mask = some_mask(model, keep=1.0)
    assert same(snip.on_live_path(model, mask, torch.ones(1, 4)), mask)
    mask["a.weight"][:] = mask["a.bias"][:] = False
    said = r"^The derivatives in a.weight, b.weight, a.bias are not finite, so their paths cannot be followed\.$"
    with pytest.raises(ValueError, match=said):
        snip.report(model, mask, torch.ones(1, 4))


class Last(nn.Module):
    """A recurrent layer and what reads its last state."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    "make, x",
    [
        (Two, torch.ones(1, 4)),
        (lambda: nn.Sequential(nn.Embedding(9, 4), Two()), torch.tensor([[1, 2]])),
        (lambda: nn.Sequential(nn.Linear(4, 5), Last()), torch.ones(1, 3, 4)),
    ],
    ids=["numbers", "tokens", "recurrent"],
)
def test_paths_are_the_same_in_inference_mode(make, x):
    model = make()
    mask = some_mask(model, keep=0.3)
    expected = snip.report(model, mask, x)
    with torch.inference_mode():
        assert snip.report(model, mask, x.clone()).equals(expected)
        assert snip.report(make(), mask, x.clone()).equals(expected)  # parameters that are made in it too
        model(x)
        assert snip.report(snip.apply_mask(model, mask), x=x).equals(expected)
        model(x)
        assert snip.report(model, x=x).equals(expected)
    assert 0 < expected["live"]["total"] < expected["kept"]["total"]


def test_a_parameter_that_is_not_used_is_not_live():
    class Unused(Two):
        def forward(self, x):
            return self.a(x)

    mask = {"b.weight": torch.ones(6, 6, dtype=torch.bool)}
    table = snip.report(Unused(), mask, torch.ones(1, 4))
    assert table["live"].to_list() == [0, 0] and table.attrs["collapsed"] == ["b.weight"]


def test_a_network_of_choices_alone_has_no_paths_to_follow():
    model = Two(last=lambda h: h.argmax(1))
    said = r"^No output of Two has a gradient, so no path to one can be followed\.$"
    with pytest.raises(ValueError, match=said):
        snip.report(model, some_mask(model, keep=1.0), torch.ones(1, 4))


@pytest.mark.parametrize(
    "pool, shape",
    [
        (nn.MaxPool1d(2, 1, dilation=3), (6,)),
        (nn.MaxPool2d(2, 1, dilation=2), (4, 5)),
        (nn.MaxPool2d((3, 2), (1, 2), padding=(1, 0), dilation=(2, 1), ceil_mode=True), (5, 5)),
        (nn.MaxPool3d(2, 1, dilation=(1, 2, 1)), (2, 3, 3)),
        (lambda t: torch.max_pool2d(t, 3, 2, 0, 1, True), (6, 4)),
        (nn.MaxPool2d(2), (4, 5)),
    ],
    ids=["1d", "2d", "2d padded", "3d", "by place", "plain"],
)
def test_a_maximum_over_a_window_lets_each_of_its_numbers_through(pool, shape):
    class Pooled(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(shape)), nn.Linear(n, 1)

        def forward(self, x):
            return self.head(pool(self.scale * x).flatten(1))

    n = torch.ones(shape).numel()
    reaches = pool(torch.eye(n).view(n, 1, *shape)).flatten(1) > 0  # [inputs, windows]
    for window in range(reaches.shape[1]):
        mask = {"scale": torch.ones(shape, dtype=torch.bool), "head.weight": torch.zeros(1, reaches.shape[1]).bool()}
        mask["head.weight"][0, window] = True
        live = snip.on_live_path(Pooled(reaches.shape[1]), mask, torch.ones(1, 1, *shape))
        assert torch.equal(live["scale"].flatten(), reaches[:, window]) and same(live, mask | {"scale": live["scale"]})


def test_looking_leaves_the_random_numbers_of_a_network_that_draws_some():
    model = Two(between=lambda h: h + torch.randn_like(h))
    before = torch.get_rng_state()
    snip.report(model, some_mask(model, keep=0.5), torch.ones(1, 4))
    assert torch.equal(torch.get_rng_state(), before)
