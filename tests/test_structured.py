"""Laws of structured pruning: gates, whole units, and a small network that is exactly the masked one."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import snip_lib as snip
from snip_lib.masks import n_kept
from snip_lib.models import VGG, LeNet5, LeNet300, WideResNet
from snip_lib.saliency import connection_gradients, held
from snip_lib.structured import gate_gradients, keep_units, mask_of_units, measure, read_under, shrink, units_of

F64 = {"dtype": torch.float64}


class Gated(nn.Module):
    """A convolution, a residual block, flattening and two linear layers, with a real gate on every unit."""

    def __init__(self, norm=True):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.a = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Linear(6 * 9, 7)
        self.d = nn.Linear(7, 3)
        self.gates = {}

    def gate(self, name, x):
        return x * self.gates[name].view(-1, *[1] * (x.dim() - 2)) if name in self.gates else x

    def forward(self, x):
        x = F.relu(self.norm(self.a(F.relu(self.first(x)))))
        x = self.gate("a", x + self.b(self.gate("a", x)))  # the shortcut makes one unit of one of a and one of b
        x = F.max_pool2d(x, 2)
        return self.d(self.gate("c", torch.tanh(self.c(x.flatten(1)))))


def images(side=8, channels=1, n=12, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, side, side, generator=g), torch.randint(classes, (n,), generator=g)


def worn(model, seed=0):
    """Give every bias, shift and running statistic a value, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "running_mean")):
                t.copy_(0.3 * torch.randn(t.shape, generator=g))
            elif name.endswith("running_var") or (t.dim() == 1 and t.is_floating_point()):
                t.copy_(0.5 + torch.rand(t.shape, generator=g))
    return model


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def depthwise():
    layers = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.PReLU(10)
    layers += nn.Conv2d(10, 10, 3, groups=10), nn.SiLU(), nn.Conv2d(10, 5, 1), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(5 * 36, 10))


NARROW = ((6, 3),) * 2, ((8, 3),) * 2, ((10, 3), (10, 3), (10, 1))
NETWORKS = {
    "lenet300": (LeNet300, lambda: images(28, classes=10)),
    "lenet5": (LeNet5, lambda: images(28, classes=10)),
    "vgg": (lambda: VGG(stages=NARROW), lambda: images(8, 3, classes=10)),
    "wrn": (lambda: WideResNet(depth=10, width=1), lambda: images(16, 3, classes=10)),
    "depthwise": (depthwise, lambda: images(8, 3, classes=10)),
    "resnet18": (resnet18, lambda: images(32, 3, classes=10)),
}
every = pytest.mark.parametrize("network", NETWORKS)


def build(network):
    torch.manual_seed(0)
    make, data = NETWORKS[network]
    return make(), *data()


def count(kept):
    return {name: int(k.sum()) for name, k in kept.items()}


# --- gates


@pytest.mark.parametrize("norm", [True, False])
def test_the_score_of_a_unit_is_the_derivative_of_a_real_gate(norm):
    torch.manual_seed(0)
    model, (x, y) = worn(Gated(norm)).double(), images()
    units = units_of(model, x)
    assert {name: layer.n for name, layer in units.items()} == {"a": 6, "c": 7}
    found = gate_gradients(model, x, y, units=units, **F64)
    model.gates = {name: torch.ones(layer.n, dtype=torch.float64, requires_grad=True) for name, layer in units.items()}
    loss = F.cross_entropy(model(x.double()), y)
    for name, gradient in zip(units, torch.autograd.grad(loss, list(model.gates.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("network", ["lenet300", "lenet5"])
def test_a_gate_is_the_sum_over_the_weights_and_the_bias_of_its_unit(network):
    model, x, y = build(network)
    units = units_of(model, x)
    g = connection_gradients(model, x, y, **F64)
    for name, gate in gate_gradients(model, x, y, units=units, **F64).items():
        own = g[f"{name}.weight"].flatten(1).sum(1) + g[f"{name}.bias"]
        torch.testing.assert_close(gate, own, rtol=1e-9, atol=1e-14)


def test_before_batch_norm_a_gate_would_have_no_derivative():
    model, x, y = build("vgg")
    g = connection_gradients(model, x, y, **F64)
    gates = gate_gradients(model, x, y, units=units_of(model, x), **F64)
    before = g["conv3.weight"].flatten(1).sum(1) + g["conv3.bias"]
    assert before.abs().max() < 0.02 * gates["conv3"].abs().max()  # 0 but for the eps of batch norm


def test_a_removed_unit_changes_the_loss_as_its_gate_says():
    model, x, y = build("lenet300")
    with torch.no_grad():
        model.fc2.weight[:, :5] *= 1e-3  # so that the first order is all there is
    units = units_of(model, x, only="fc1")
    gates = gate_gradients(model.double(), x, y, units=units, **F64)["fc1"]
    for unit in range(5):
        kept = {"fc1": torch.arange(300) != unit}
        twin = snip.apply_mask(copy.deepcopy(model), mask_of_units(model, units, kept))
        change = F.cross_entropy(model(x.double()), y) - F.cross_entropy(twin(x.double()), y)
        assert change.item() == pytest.approx(gates[unit].item(), rel=0.02)


# --- the mask


@every
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8])
def test_exactly_so_many_units_stay_and_one_of_each_layer(network, sparsity):
    model, x, y = build(network)
    units = units_of(model, x)
    mask = snip.prune(model, x, y, sparsity=sparsity, structured=True)
    kept = count(read_under(units, mask))
    m = sum(layer.n for layer in units.values())
    assert sum(kept.values()) == n_kept(m, sparsity) and min(kept.values()) >= 1
    assert list(mask) == list(snip.prunable(model))


@every
def test_a_mask_of_units_is_of_whole_rows_and_columns(network):
    model, x, y = build(network)
    units = units_of(model, x)
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    kept = read_under(units, mask)
    assert all(torch.equal(mask[n], k) for n, k in mask_of_units(model, units, kept).items())
    for name, layer in units.items():
        for weight, (rows, unit) in layer.written.items():
            assert not mask[weight][rows[~kept[name][unit]]].any()
            assert mask[weight][rows[kept[name][unit]]].flatten(1).any(1).all()
    order = list(mask)
    weights = [name for name in order if name.endswith("weight")]
    assert mask[weights[0]].all() or network == "resnet18"  # the first layer's units stay
    assert mask[weights[-1]].flatten(1).any(1).all()  # and the outputs


def test_every_layer_keeps_a_unit_even_where_all_its_scores_are_the_lowest():
    model, x, y = build("lenet300")
    model = nn.Sequential(nn.Flatten(), model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), nn.Linear(100, 40), nn.ReLU())
    model.append(nn.Linear(40, 10))
    with torch.no_grad():
        model[5].weight.mul_(1e-9)
    kept = count(read_under(units_of(model, x), snip.prune(model, x, y, sparsity=0.9, structured=True)))
    assert sum(kept.values()) == 14 and min(kept.values()) == 1


def test_a_layer_keeps_the_best_of_the_units_that_it_still_has():
    scores = {"a": torch.tensor([9.0, 1.0]), "b": torch.tensor([5.0, 4.0, 3.0])}
    among = {"a": torch.tensor([False, True]), "b": torch.tensor([True, True, True])}
    kept = keep_units(scores, 0.6, among=among)
    assert kept["a"].tolist() == [False, True] and kept["b"].tolist() == [True, False, False]
    kept = keep_units({"a": torch.tensor([2.0, 2.0, 2.0]), "b": torch.tensor([1.0, 0.0])}, 0.6)  # whatever ties
    assert kept["a"].tolist() == [True, False, False] and kept["b"].tolist() == [True, False]


@pytest.mark.parametrize("schedule", ["snip_it", "exponential", "force"])
def test_rounds_are_nested_unless_units_may_return(schedule):
    model, x, y = build("vgg")
    units = units_of(model, x)
    nested = []
    for rounds, sparsity in ((1, 0.5), (2, 0.75)):  # the second run's first round is the first run
        path = {"schedule": schedule, "rounds": rounds}
        mask = snip.prune(model, x, y, sparsity=sparsity, structured=True, **path)
        nested.append(torch.cat(list(read_under(units, mask).values())))
    m = len(nested[0])
    assert [int(k.sum()) for k in nested] == [n_kept(m, 0.5), n_kept(m, 0.75)]
    assert bool((nested[1] & ~nested[0]).any()) == (schedule == "force")
    one = snip.prune(model, x, y, sparsity=0.75, structured=True)
    again = snip.prune(model, x, y, sparsity=0.75, structured=True, rounds=1, schedule=schedule)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(torch.cat(list(read_under(units, one).values())), nested[1])


def test_a_second_round_scores_the_network_that_is_left():
    model, x, y = build("vgg")
    units = units_of(model, x)
    first = snip.prune(model, x, y, sparsity=0.5, structured=True, **F64)
    gates = gate_gradients(snip.apply_mask(copy.deepcopy(model), first), x, y, units=units, **F64)
    left = read_under(units, first)
    scores = torch.cat([gates[name].abs() for name in units])
    assert not scores[~torch.cat(list(left.values()))].any()
    second = snip.prune(model, x, y, sparsity=0.75, structured=True, rounds=2, **F64)
    kept = torch.cat(list(read_under(units, second).values()))
    lowest = scores[kept].sort().values[len(units) :].min()  # but for one a layer, that stays whatever its score
    assert (scores[~kept] > lowest).sum() == 0


def test_batches_add_up_before_or_after_the_absolute_value():
    model, x, y = build("vgg")
    units, halves = units_of(model, x), [(x[:6], y[:6]), (x[6:], y[6:])]
    gates = [torch.cat(list(gate_gradients(model, *half, units=units, **F64).values())) for half in halves]
    expected = {"sum_then_abs": sum(gates).abs(), "abs_then_sum": sum(gate.abs() for gate in gates)}
    found = {}
    for accumulate, scores in expected.items():
        options = {"accumulate": accumulate, "sparsity": 0.4, "structured": True, **F64}
        mask = snip.prune(model, batches=iter(halves), **options)
        found[accumulate] = torch.cat(list(read_under(units, mask).values()))
        lowest = scores[found[accumulate]].sort().values[len(units) :].min()  # one of each layer stays anyway
        assert scores[~found[accumulate]].max() < lowest
    assert not torch.equal(*found.values())


def test_a_mask_so_far_is_pruned_further():
    model, x, y = build("lenet5")
    first = snip.prune(model, x, y, sparsity=0.5, structured=True)
    more = snip.prune(model, x, y, sparsity=0.8, structured=True, within=first)
    assert all(not (more[name] & ~first[name]).any() for name in first)
    units = units_of(model, x)
    assert sum(count(read_under(units, more)).values()) == n_kept(sum(u.n for u in units.values()), 0.8)
    in_rounds = snip.prune(model, x, y, sparsity=0.8, structured=True, within=first, rounds=2)  # 0.5, then 0.8
    assert all(torch.equal(in_rounds[name], more[name]) for name in first)
    holes = snip.prune(model, x, y, sparsity=0.9)  # of connections, not of units
    both = snip.prune(model, x, y, sparsity=0.5, structured=True, within=holes)
    assert all(not (both[name] & ~holes[name]).any() for name in first)
    with pytest.raises(ValueError, match="within= keeps"):
        snip.prune(model, x, y, sparsity=0.2, structured=True, within=first)


def test_layers_are_chosen_by_name_and_the_first_only_so():
    model, x, y = build("lenet5")
    assert list(units_of(model, x)) == ["conv2", "fc1"]
    assert list(units_of(model, x, exclude="fc1")) == ["conv2"]
    assert list(units_of(model, x, only=["conv1", "fc1"])) == ["conv1", "fc1"]
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, only="conv1")
    assert int(mask["conv1.weight"].flatten(1).any(1).sum()) == 10 and int(mask["conv1.bias"].sum()) == 10
    assert mask["fc1.weight"].all()
    without = snip.prune(model, x, y, sparsity=0.5, structured=True, prune_biases=False)
    assert list(without) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]


def test_units_that_a_shortcut_adds_are_one():
    model, x, _ = build("wrn")
    units = units_of(model, x)
    inner = {name for name in units if name.endswith("conv1")}
    assert inner == {f"blocks.group{i}_block1.conv1" for i in (1, 2, 3)} - {"conv1"}
    stream = units["blocks.group2_block1.conv2"]
    assert set(stream.written) == {f"blocks.group2_block1.{n}.weight" for n in ("conv2", "shortcut")}
    assert set(stream.read) == {f"blocks.group3_block1.{n}.weight" for n in ("conv1", "shortcut")}


def test_a_depthwise_filter_is_one_with_the_unit_that_it_reads():
    model, x, _ = build("depthwise")
    units = units_of(model, x)
    assert set(units["2"].written) == {"2.weight", "5.weight"} and set(units["2"].read) == {"7.weight"}
    assert {name: layer.n for name, layer in units.items()} == {"2": 10, "7": 5}


class Ending(nn.Module):
    """A network whose output is any function of what its block, c and d, reads and returns."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.end = end

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x.flatten(1)))))
        return self.end(h, self.d(torch.relu(self.c(h))))


ENDS = {
    "residual": lambda h, o: h + o,
    "slice": lambda h, o: o[:, :3] + h[:, :3],
    "cat": lambda h, o: torch.cat([o, h], 1),
    "tuple": lambda h, o: (o, h),
    "penalty": lambda h, o: {"logits": o, "penalty": h.square().mean()},
    "dead": lambda h, o: (o, torch.relu(h - 100)),  # 0 for these examples, and so is its derivative
}


def of_first(output, y):
    return F.cross_entropy(next(iter(output.values())) if isinstance(output, dict) else output[0], y)


@pytest.mark.parametrize("end", ENDS)
def test_units_that_also_reach_an_output_past_the_layers_that_read_them_stay(end):
    torch.manual_seed(0)
    model, (x, y) = Ending(ENDS[end]), images()
    assert list(units_of(model, x)) == ["c"] and list(units_of(model, x, only="*")) == ["a", "c"]
    loss = F.cross_entropy if end in ("residual", "slice", "cat") else of_first
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, loss=loss)
    assert mask["b.weight"].all() and mask["d.weight"].any(1).all()
    small = shrink(model, mask, x)
    torch.testing.assert_close(small(x), snip.apply_mask(model, mask)(x), rtol=1e-5, atol=1e-6)
    assert small.c.out_features == 4


def test_without_its_head_a_network_keeps_the_units_that_the_head_read():
    model, x, _ = build("resnet18")
    whole = units_of(model, x)
    model.fc = nn.Identity()
    assert set(whole) - set(units_of(model, x)) == {"layer4.0.conv2"}


@pytest.mark.parametrize("shared", ["weight", "bias", "prelu"])
def test_units_of_a_layer_that_shares_a_parameter_with_another_stay(shared):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 8)]
    for _ in range(4):
        layers += [nn.PReLU(8), nn.Linear(8, 8)]
    model, (x, y) = nn.Sequential(nn.Flatten(), *layers, nn.PReLU(8), nn.Linear(8, 3)), images()
    assert list(units_of(model, x)) == ["3", "5", "7", "9"]
    if shared == "prelu":
        model[8].weight = model[4].weight
        left = ["5", "9"]
    else:
        setattr(model[7], shared, getattr(model[3], shared))
        left = ["9"]  # 5 is read by 7
    assert list(units_of(model, x)) == left
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    rows = {name: kept.flatten(1).any(1).all().item() for name, kept in mask.items() if name.endswith("weight")}
    assert [name for name, whole in rows.items() if not whole] == [f"{name}.weight" for name in left]
    small = shrink(model, mask, x)
    assert [len({id(p) for _, _, _, p in held(net)}) - len([*held(net)]) for net in (model, small)] == [-1, -1]
    torch.testing.assert_close(small(x), snip.apply_mask(model, mask)(x), rtol=1e-5, atol=1e-6)


def test_random_units_are_a_control_that_the_generator_decides():
    model, x, y = build("lenet5")

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return snip.prune(model, x, y, sparsity=0.5, structured=True, method="random", generator=g)["fc1.weight"]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


# --- the small network


@every
@pytest.mark.parametrize("training", [False, True])
def test_the_small_network_is_the_masked_one(network, training):
    model, x, y = build(network)
    mask = snip.prune(model, x, y, sparsity=0.6, structured=True)
    masked = snip.apply_mask(worn(model).double(), mask)  # removed units would emit a constant, were they read
    small, x = shrink(masked, None, x), x.double()
    masked.train(training), small.train(training)
    out = masked(x)
    assert out.std(0).min() > 1e-6
    torch.testing.assert_close(small(x), out, rtol=1e-9, atol=1e-12)
    weights = dict(small.named_parameters())
    assert {name: weights[name].numel() for name in mask} == {name: int(kept.sum()) for name, kept in mask.items()}
    assert sum(int(kept.sum()) for kept in mask.values()) < sum(kept.numel() for kept in mask.values())
    assert small(x[:1].repeat(2, 1, 1, 1)).shape == (2, 10)  # any batch, not only that of the example


@every
def test_the_small_network_is_the_masked_one_in_float32(network):
    model, x, y = build(network)
    mask = snip.prune(model, x, y, sparsity=0.6, structured=True)
    small, masked = shrink(worn(model), mask, x), snip.apply_mask(model, mask)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_small_network_trains_as_the_masked_one():
    model, x, y = build("vgg")
    mask = snip.prune(model, x, y, sparsity=0.6, structured=True)
    small = shrink(model, mask, x).double().train()
    masked = snip.apply_mask(model, mask).double().train()
    for net in (small, masked):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
        net.eval()
    assert not torch.allclose(small(x.double()), shrink(build("vgg")[0], mask, x).double().eval()(x.double()))
    torch.testing.assert_close(small(x.double()), masked(x.double()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_mask_of_all_units_removes_nothing(sparsity):
    model, x, y = build("lenet5")
    mask = snip.prune(model, x, y, sparsity=sparsity, structured=True)
    small = shrink(model, mask, x)
    n = {name: int(k.sum()) for name, k in mask.items()}
    assert {name: p.numel() for name, p in small.named_parameters()} == n  # nothing is left that the mask removes
    assert (sum(n.values()) == 431_080) == (sparsity == 0)


def test_units_that_an_ordinary_mask_leaves_unread_go_too():
    model, x, y = build("lenet300")
    mask = snip.prune(model, x, y, sparsity=0.99)
    live = snip.on_live_path(model, mask, x)
    small, masked = shrink(model, live, x), snip.apply_mask(model, live)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-5, atol=1e-6)
    assert small.fc1.out_features == int(live["fc2.weight"].any(0).sum()) < 300
    assert (small.fc1.weight == 0).float().mean() > 0.9  # the other zeros stay


def test_of_a_layer_that_nobody_reads_one_unit_stays():
    model, x, _ = build("lenet300")
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model).items()}
    mask["fc3.weight"][:] = False
    small = shrink(model, mask, x)
    assert small.fc2.out_features == 1
    torch.testing.assert_close(small(x), snip.apply_mask(model, mask)(x))


def test_the_cost_of_a_network_is_counted_and_falls():
    model, x, y = build("lenet5")
    cost = measure(model, x)
    by_hand = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10
    assert (cost["parameters"], cost["multiply_adds"]) == (431_080, by_hand) and cost["seconds"] > 0
    mask = snip.prune(model, x, y, sparsity=0.8, structured=True)
    small = measure(shrink(model, mask, x), x)
    kept = {n: int(k.sum()) for n, k in mask.items()}
    assert small["parameters"] == sum(kept.values())
    conv = 24 * 24 * kept["conv1.weight"] + 8 * 8 * kept["conv2.weight"]
    assert small["multiply_adds"] == conv + kept["fc1.weight"] + kept["fc2.weight"]
    assert model.training and not model.conv1._forward_hooks


def test_a_transposed_convolution_is_counted_like_the_convolution_that_it_transposes():
    for options in ({"stride": 2}, {"stride": 3, "groups": 2}, {"dilation": 2}):
        up, down = nn.ConvTranspose2d(6, 4, 3, **options), nn.Conv2d(4, 6, 3, **options)
        x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
        cost = measure(up, x)["multiply_adds"]
        assert cost == measure(down, up(x))["multiply_adds"] == 5 * 5 * 6 * down.weight[0].numel()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": lambda x: x[:0]}, r"A batch has 1 example or more, .* not of shape \[0, 1, 28, 28\] and 5."),
        ({"repeats": 0}, "repeats is 1 or more, .* and 0."),
        (
            {"x": lambda x: x.numpy()},
            r"refuses the batch \(ndarray\): make tensors of numpy arrays with torch.as_tensor.",
        ),
        (
            {"x": lambda x: x.expand(-1, 3, -1, -1)},
            r"The network refuses the batch of shape \[\d+, 3, 28, 28\]: Given .*",
        ),
    ],
)
def test_what_cannot_be_measured_gets_a_sentence(change, words):
    model, x, _ = build("lenet5")
    with pytest.raises(ValueError, match=f"{words}$") as error:
        measure(model, **{"x": change.get("x", lambda x: x)(x)} | {k: v for k, v in change.items() if k != "x"})
    assert "\n" not in str(error.value) and not model.conv1._forward_hooks


def test_pruning_and_shrinking_leave_the_network_as_it_was():
    model, x, y = build("wrn")
    model.train()
    model.blocks.eval()
    model.fc.weight.requires_grad_(False)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    small = shrink(model, mask, x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert model.training and not model.blocks.training and not model.fc.weight.requires_grad
    assert small.training and not small.blocks.training
    assert not small.fc.weight.requires_grad and small.fc.bias.requires_grad
    assert not any(module._forward_hooks for module in small.modules())


class Drawing(nn.Module):
    """A network that draws random numbers in evaluation mode, too, for the units of one of its layers."""

    def __init__(self, after):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.after = after

    def forward(self, x):
        h = F.relu(self.a(x.flatten(1)))
        h = h + torch.rand_like(h) if self.after == "a" else h
        h = F.relu(self.b(h))
        return self.d(F.relu(self.c(F.dropout(h, 0.5) if self.after == "b" else h)))


class Auxiliary(nn.Module):
    """A head that only training calls, as in Inception."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.aux = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.head(h) + 0.3 * self.aux(h) if self.training else self.head(h)


def test_a_network_that_could_no_longer_be_trained_is_not_made_small():
    torch.manual_seed(0)
    model, x, y = Auxiliary(), torch.randn(20, 5), torch.arange(20) % 3
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    for example in (x, x[:1]):
        with pytest.raises(ValueError, match="Auxiliary cannot be made small: in training mode it calls layers"):
            snip.shrink(model, mask, example)


def test_a_network_that_draws_random_numbers_leaves_their_state_and_may_be_made_small():
    torch.manual_seed(0)
    model, (x, y) = Drawing("a"), images()
    rng = torch.get_rng_state()
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    assert torch.equal(rng, torch.get_rng_state())
    small = shrink(model, mask, x)
    assert torch.equal(rng, torch.get_rng_state())
    out = small(x)
    torch.set_rng_state(rng)
    torch.testing.assert_close(out, snip.apply_mask(model, mask)(x), rtol=1e-5, atol=1e-6)
    assert small.b.out_features + small.c.out_features == 8


# --- what it refuses


class Fixed(nn.Module):
    """A network whose forward pass has a width written into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
        self.fc = nn.Linear(8 * 16, 3)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 8 * 16))


class Mixing(nn.Module):
    """A network in which a softmax over the units changes when one goes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.c(torch.softmax(self.b(torch.relu(self.a(x.flatten(1)))), 1))


def logits(output, y):
    return F.cross_entropy(output["logits"] if isinstance(output, dict) else output, y)


class Sorting(Mixing):
    """A network that mixes units, though not for an image of ones: for that one they are sorted already."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.a.bias.zero_()
            self.a.weight.copy_(torch.tensor([1.0, -1.0]).repeat(32))
            self.b.weight.mul_(10)
            self.b.bias.copy_(torch.linspace(1, 2, 9))
            self.c.weight.copy_(self.c.weight[:, :1])

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x.flatten(1)))).sort(1).values)


def test_another_example_than_the_given_is_compared():
    torch.manual_seed(0)
    model, (x, y) = Sorting(), images()
    mask = snip.prune(model, torch.ones_like(x), y, sparsity=0.5, structured=True)
    with pytest.raises(ValueError, match="Sorting cannot be made small"):
        shrink(model, mask, torch.ones_like(x))


class Rooted(nn.Sequential):
    """A network of positive numbers alone."""

    def forward(self, x):
        return super().forward(x.log())


def test_no_example_is_made_up_that_the_network_could_not_take():
    torch.manual_seed(0)
    model, (x, y) = Rooted(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)), images(n=12)
    x = x.flatten()[:72].view(12, 6).abs() + 0.01
    little = shrink(model, snip.prune(model, x, y, sparsity=0.5, structured=True), x)
    assert little[2].out_features < 9


@pytest.mark.parametrize("make", [Fixed, Mixing])
def test_a_network_that_cannot_be_made_small_is_refused(make):
    torch.manual_seed(0)
    model, (x, y) = make(), images()
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    with pytest.raises(ValueError, match=f"{make.__name__} cannot be made small"):
        shrink(model, mask, x)


def test_random_numbers_for_units_that_go_are_refused_as_such():
    torch.manual_seed(0)
    model, (x, y) = Drawing("b"), images()
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, only="b")
    with pytest.raises(ValueError, match=r"mixes units or draws random numbers for them, or their number"):
        shrink(model, mask, x)


@pytest.mark.parametrize("more", [lambda o: o.argmax(1), lambda o: o > 0])
def test_integers_and_booleans_in_the_output_are_compared_as_they_are(more):
    torch.manual_seed(0)
    model, (x, y) = Ending(lambda h, o: (o, more(o))), images()
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, only="b", loss=of_first)
    small = shrink(model, mask, x)
    torch.testing.assert_close(small(x), snip.apply_mask(model, mask)(x), rtol=1e-5, atol=1e-6)
    assert small.b.out_features == 3
    model = Ending(lambda h, o: (o, more(h.detach())))
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, only="b", loss=of_first)
    with pytest.raises(ValueError, match="Ending cannot be made small"):
        shrink(model, mask, x)


def test_what_is_no_tensor_in_the_output_is_passed_over():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LeNet5()

        def forward(self, x):
            return {"logits": self.net(x), "loss": None, "name": "lenet5"}

    torch.manual_seed(0)
    model, (x, y) = Named(), images(28, classes=10)
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, loss=logits)
    expected = snip.prune(model.net, x, y, sparsity=0.5, structured=True)
    assert all(torch.equal(mask[f"net.{name}"], kept) for name, kept in expected.items())
    small = shrink(model, mask, x)
    assert torch.equal(small(x)["logits"], shrink(model.net, expected, x)(x)) and len(small.net.fc1.weight) < 500


@pytest.mark.parametrize("masked", [False, True])
def test_the_small_network_is_free_of_the_library(masked):
    model, x, y = build("lenet5")
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    small = shrink(snip.apply_mask(model, mask), None, x) if masked else shrink(model, mask, x)
    assert not any(module._forward_pre_hooks for module in small.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_layer_with_a_computed_weight_that_is_left_out_stays_as_it_is(norm):
    torch.manual_seed(0)
    layers = nn.Linear(64, 9), nn.ReLU(), norm(nn.Linear(9, 9)), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)
    model, (x, y) = nn.Sequential(nn.Flatten(), *layers), images()
    with pytest.raises(ValueError, match="'3' computes its weight .* exclude it"):
        snip.prune(model, x, y, sparsity=0.5, structured=True)
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, exclude="3", rounds=2)
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, exclude="3", within=mask)
    assert int(mask["5.weight"].any(1).sum()) == 4 and mask["1.weight"].all() and "3.weight" not in mask
    small = shrink(model, mask, x)
    assert [len(small[i].weight) for i in (1, 3, 5)] == [9, 9, 4]


@pytest.mark.parametrize("between, width", [(nn.GLU(), 4), (nn.PixelShuffle(2), 2)], ids=str)
def test_units_that_an_operation_makes_fewer_stay(between, width):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.between = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), between
            self.c, self.d = nn.Conv2d(width, 6, 1), nn.Linear(6, 3)

        def forward(self, x):
            x = self.b(torch.relu(self.a(x)))
            x = self.between(x.transpose(1, 3)).transpose(1, 3) if width == 4 else self.between(x)
            return self.d(torch.relu(self.c(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, (x, y) = Net(), images()
    assert list(units_of(model, x)) == ["c"] and list(units_of(model, x, only="*")) == ["a", "c"]
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True, only="*")
    assert mask["b.weight"].any((1, 2, 3)).all() and not mask["b.weight"].all()


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.GroupNorm(2, 8, affine=False),
        nn.Bilinear(8, 8, 8),
    ],
    ids=str,
)
def test_units_that_are_mixed_stay(between):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)
            self.between = between

        def forward(self, x):
            x = self.b(torch.relu(self.a(x.flatten(1))))
            x = self.between(x, x) if isinstance(self.between, nn.Bilinear) else self.between(x)
            return self.d(torch.relu(self.c(x)))

    assert list(units_of(Net(), images()[0])) == ["c"]


def test_a_layer_that_is_called_twice_keeps_its_units():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.b(self.b(torch.relu(self.a(x.flatten(1)))))
            return self.d(torch.relu(self.c(x)))

    assert list(units_of(Twice(), images()[0], only="*")) == ["c"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sparsity": 1.0}, "fraction removed"),
        ({"sparsity": 0.999}, "At sparsity 0.999 1 of 550 units stay, but each layer keeps one: that makes 2"),
        ({"method": "grasp"}, "Unknown method 'grasp': choose one of snip, random"),
        ({"scope": "layer"}, "Unknown scope 'layer': choose one of global"),
        ({"only": "fc2"}, "LeNet5 has no unit to remove"),
        ({"exclude": "fc9"}, "matches 'fc9'"),
        ({"x": torch.zeros(2, 1, 9, 9)}, r"refuses an example of shape \[1, 1, 9, 9\]"),
        ({"x": None, "y": None}, "Give one scoring batch"),
        ({"x": None, "y": None, "method": "random"}, "Give one scoring batch"),
        ({"x": None, "y": None, "batches": []}, "no batch"),
        ({"within": {"fc1.weight": torch.ones(500, 800).bool()}}, "names and shapes differ"),
    ],
)
def test_bad_input_gets_a_sentence(change, words):
    model, x, y = build("lenet5")
    with pytest.raises(ValueError, match=words):
        snip.prune(model, **{"x": x, "y": y, "sparsity": 0.5, "structured": True} | change)


def test_what_torch_pruning_cannot_follow_gets_a_sentence():
    import torchvision

    network = torchvision.models.shufflenet_v2_x0_5(weights=None)
    with pytest.raises(ValueError, match=r"Torch-Pruning cannot follow this network \(.*\): no unit is removed.$"):
        snip.prune(network, torch.randn(2, 3, 64, 64), torch.tensor([0, 1]), sparsity=0.3, structured=True)


def test_without_torch_pruning_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, x, y = build("lenet5")
    with pytest.raises(ImportError, match="pip install"):
        snip.prune(model, x, y, sparsity=0.5, structured=True)
    assert snip.prune(model, x, y, sparsity=0.5)


def test_a_mask_or_example_that_does_not_fit_is_refused():
    model, x, y = build("lenet5")
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    with pytest.raises(ValueError, match="of another network"):
        shrink(LeNet300(), mask, x)
    with pytest.raises(ValueError, match="has no mask"):
        shrink(model, None, x)
    with pytest.raises(ValueError, match="refuses an example"):
        shrink(model, mask, x[..., :9])
    with pytest.raises(ValueError, match=r"refuses an example \(ndarray\): make tensors of numpy arrays"):
        shrink(model, mask, x.numpy())
    for bad in (x[:0], x * float("nan")):
        with pytest.raises(ValueError, match="has no output, or one that is not finite"):
            shrink(model, mask, bad)


def test_units_are_found_and_removed_in_inference_mode():
    model, x, y = build("lenet5")
    mask = snip.prune(model, x, y, sparsity=0.5, structured=True)
    with torch.inference_mode():
        again = snip.prune(model, x.clone(), y, sparsity=0.5, structured=True)
        small = shrink(model, mask, x.clone())
    assert all(torch.equal(again[n], k) for n, k in mask.items())
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
