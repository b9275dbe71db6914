"""Laws of the initialisers: moments, bounds, fans, and weights that no change of the code may move."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snip_lib.data import generator
from snip_lib.inits import CUT_SD, INITS, fans, initialise
from snip_lib.models import MODELS
from snip_lib.saliency import prunable

CONV = (40, 30, 5, 7)  # fan_in 30 * 35 = 1050, fan_out 40 * 35 = 1400
VARIANCE = {
    "rn": lambda fan_in, fan_out, sd: sd**2,
    "tn": lambda fan_in, fan_out, sd: (CUT_SD * sd) ** 2,
    "vs_x": lambda fan_in, fan_out, sd: 2 / (fan_in + fan_out),
    "vs_h": lambda fan_in, fan_out, sd: 2 / fan_in,
    "lecun": lambda fan_in, fan_out, sd: 1 / fan_in,
}
GOLDEN = {  # sha256 of the state, in module order, before there were other networks and initialisers
    ("lenet300", 0): "a03cf509551df281",
    ("lenet300", 7): "a106450a606bf413",
    ("lenet5", 0): "6e5d1d6328ca4c6b",
    ("lenet5", 7): "dff83751d4d7e298",
}


def drawn(init, shape=CONV, seed=0, sd=0.1, dtype=torch.float64):
    weight = torch.empty(shape, dtype=dtype)
    INITS[init](weight, generator(seed, "test"), sd)
    return weight


@pytest.mark.parametrize(("name", "seed"), GOLDEN)
def test_initial_weights_of_the_committed_rows_never_change(name, seed):
    model = MODELS[name]()
    initialise(model, "vs_x", generator(seed, "init"))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values()))
    assert digest.hexdigest()[:16] == GOLDEN[name, seed]


def test_random_biases_of_the_committed_rows_never_change_and_have_the_sd_of_their_weights():
    model = MODELS["lenet300"]()
    initialise(model, "vs_x", generator(0, "init"), bias_init="random")
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values()))
    assert digest.hexdigest()[:16] == "30159bdfaeebb222"
    initialise(model, "rn", generator(0, "init"), sd=0.01, bias_init="random")
    assert 0.008 < model.fc1.bias.std() < 0.012


def test_every_initialiser_has_its_variance_here():
    assert list(INITS) == list(VARIANCE)


@pytest.mark.parametrize("shape", [CONV, (300, 784), (20, 1, 5, 5), (10, 2000)])
@pytest.mark.parametrize("init", INITS)
def test_mean_and_variance_are_as_documented(init, shape):
    weight = drawn(init, shape)
    n, variance = weight.numel(), VARIANCE[init](*fans(weight), 0.1)
    assert abs(weight.mean()) < 5 * math.sqrt(variance / n)
    assert abs(weight.var() / variance - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("init", ["tn", "vs_x", "vs_h", "lecun"])
def test_cut_normals_stop_at_two_sd_and_have_their_fourth_moment(init):
    weight = drawn(init)
    edge = 2 * math.sqrt(VARIANCE[init](*fans(weight), 0.1)) / CUT_SD
    assert 0.999 * edge < weight.abs().max() <= edge
    # E[z^4] of the cut standard normal is 3 - (3 z + z^3) 2 phi(z) / P at z = 2, that is 1.4160
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    fourth = 3 - 14 * 2 * density / inside
    z = 2 * weight / edge
    assert abs((z**4).mean() - fourth) < 5 * z.pow(4).std() / math.sqrt(weight.numel())


def test_the_constant_is_the_sd_after_the_cut():
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert pytest.approx(math.sqrt(1 - 4 * density / inside), rel=1e-12) == CUT_SD


def test_rn_is_not_cut():
    weight = drawn("rn")
    assert weight.abs().max() > 3.5 * 0.1
    assert abs((weight / 0.1).pow(4).mean() - 3) < 5 * math.sqrt(96 / weight.numel())


@pytest.mark.parametrize("sd", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("init", ["rn", "tn"])
def test_sd_scales_the_same_draw(init, sd):
    torch.testing.assert_close(drawn(init, sd=sd), sd * drawn(init, sd=1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("init", ["vs_x", "vs_h", "lecun"])
def test_variance_scaling_ignores_sd(init):
    assert torch.equal(drawn(init, sd=0.01), drawn(init, sd=1.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_fans_count_what_a_unit_sees_and_feeds(shape):
    """fan_in: products summed into one output; fan_out: outputs that one input away from any border goes to."""
    c_out, c_in, *kernel = shape
    if not kernel:
        assert fans(torch.empty(shape)) == (c_in, c_out)
        return
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel) - 1]
    weight = torch.ones(shape)
    output = convolve(torch.ones(1, c_in, *kernel), weight)
    assert fans(weight)[0] == output.flatten()[0]
    x = torch.zeros(1, c_in, *(2 * k - 1 for k in kernel))
    x[(0, 0, *(k - 1 for k in kernel))] = 1
    assert fans(weight)[1] == convolve(x, weight).sum()


@pytest.mark.parametrize("init", INITS)
def test_draws_come_from_the_generator_alone_and_in_float64(init):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    weight = drawn(init)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, drawn(init))
    assert not torch.equal(weight, drawn(init, seed=1))
    assert torch.equal(drawn(init, dtype=torch.float32), weight.float())


def test_he_has_twice_the_variance_of_lecun():
    torch.testing.assert_close(drawn("vs_h"), math.sqrt(2) * drawn("lecun"))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["lenet300", "lstm_s", "gru_s"])
def test_biases_start_at_zero_but_the_grus_gates_at_one(name, init):
    model = MODELS[name]()
    initialise(model, init, generator(0, "init"), sd=0.1)
    for parameter_name, parameter in prunable(model).items():
        if parameter.dim() == 1:
            start = 1.0 if (name, parameter_name) == ("gru_s", "gates.bias") else 0.0
            assert (parameter == start).all(), parameter_name
        else:
            assert parameter.std() > 0, parameter_name


def test_initialise_hands_sd_on():
    model = nn.Linear(200, 200)
    initialise(model, "rn", generator(0, "init"), sd=0.01)
    assert 0.0095 < model.weight.std() < 0.0105
    initialise(model, "rn", generator(0, "init"))
    assert 0.95 < model.weight.std() < 1.05


def test_batch_norm_keeps_its_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight.data.fill_(3.0)
    initialise(model, "vs_x", generator(0, "init"))
    assert (model[1].weight == 3).all()


def test_an_unknown_initialiser_or_a_wrong_sd_gets_a_sentence():
    with pytest.raises(ValueError, match=r"Unknown initialiser 'glorot': choose one of rn, tn, vs_x, vs_h, lecun\."):
        initialise(nn.Linear(2, 2), "glorot", generator(0, "init"))
    for sd in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sd is the positive standard deviation"):
            initialise(nn.Linear(2, 2), "rn", generator(0, "init"), sd=sd)
