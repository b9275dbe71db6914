"""Laws for networks that are not ours: torchvision's, attention, a tied language model, convolutions of all kinds.

Random weights, small inputs, nothing is downloaded.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import snip_lib as snip
from snip_lib.masks import n_kept

pytestmark = pytest.mark.filterwarnings("ignore:At sparsity")  # some layers of a random net go at 98 %


class LanguageModel(nn.Module):
    """Predict the next token: embedding, LSTM, and a decoder that shares the embedding's weight."""

    def __init__(self, kind=nn.LSTM, n_tokens=30, width=16):
        super().__init__()
        self.encoder = nn.Embedding(n_tokens, width)
        self.rnn = kind(width, width, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(width, n_tokens)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens):
        return self.decoder(self.rnn(self.encoder(tokens))[0]).transpose(1, 2)  # [B, n_tokens, T]


class Convolutions(nn.Module):
    """Grouped, strided, dilated, transposed and depthwise convolutions in one and two dimensions."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.d = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.e = nn.Conv1d(6, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        x = F.relu(x + self.c(F.relu(self.b(x))))
        return self.head(F.relu(self.e(F.relu(self.d(x)).mean(3))).mean(2))


class Custom(nn.Module):
    """A layer that the library has never heard of."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 20) / 4)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        return self.head(torch.tanh(torch.einsum("bi,ij->bj", x, self.kernel)))


def vision(name, **options):
    import torchvision

    return drawn(getattr(torchvision.models, name)(weights=None, num_classes=10, **options))


def drawn(model):
    """Draw the head of a vision transformer: torchvision's starts at 0, where no weight has a gradient to score."""
    if hasattr(model, "heads"):
        nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def small_vision_transformer():
    import torchvision

    return drawn(torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=10))


def images(side, n=8):
    return torch.randn(n, 3, side, side), torch.randint(10, (n,))


def tokens():
    t = torch.randint(30, (4, 9))
    return t[:, :-1], t[:, 1:]


SMALL = {
    "convolutions": (Convolutions, lambda: images(8), {}),
    "language model": (LanguageModel, tokens, {}),
    "GRU language model": (lambda: LanguageModel(nn.GRU), tokens, {}),
    "custom": (Custom, lambda: (torch.randn(8, 12), torch.randint(10, (8,))), {"only": ["kernel", "head"]}),
    "vision transformer": (small_vision_transformer, lambda: images(32), {}),
    "transformer layer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 10)
        ),
        lambda: (torch.randn(6, 5, 8), torch.randint(10, (6,))),
        {},
    ),
}
LARGE = {
    "resnet18": (lambda: vision("resnet18"), lambda: images(32), {}),
    "mobilenet_v3_small": (lambda: vision("mobilenet_v3_small"), lambda: images(64), {}),
    "vit_b_16": (lambda: vision("vit_b_16", image_size=32), lambda: images(32, 4), {}),
}
NETWORKS = SMALL | LARGE
every = pytest.mark.parametrize("network", [*SMALL, *(pytest.param(name, marks=pytest.mark.long) for name in LARGE)])
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
}


def build(network):
    make, data, choice = NETWORKS[network]
    torch.manual_seed(0)
    return make(), *data(), choice


def weight_of(model, name):
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def all_zero(model, mask):
    return all((weight_of(model, name)[~kept] == 0).all() for name, kept in mask.items())


@every
@pytest.mark.parametrize("sparsity, optimizer", [(0.9, "sgd"), (0.98, "adamw")])
def test_pruned_networks_train_save_and_load_with_their_zeros(network, sparsity, optimizer, tmp_path):
    model, x, y, choice = build(network)
    model.train()
    before = copy.deepcopy(model.state_dict())
    mask = snip.prune(model, x, y, sparsity=sparsity, **choice)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    m = sum(k.numel() for k in mask.values())
    assert sum(int(k.sum()) for k in mask.values()) == n_kept(m, sparsity)

    pristine = copy.deepcopy(model)
    snip.apply_mask(model, mask)
    assert all_zero(model, mask)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            model(x)
        assert all_zero(model, mask)
    assert any(not torch.equal(weight_of(model, n)[k], weight_of(pristine, n)[k]) for n, k in mask.items())

    torch.save(model.state_dict(), tmp_path / "model.pt")
    snip.save_mask(mask, tmp_path / "mask.safetensors", sparsity=sparsity)
    loaded, _ = snip.load_mask(tmp_path / "mask.safetensors")
    snip.apply_mask(pristine, loaded)
    pristine.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    model.eval(), pristine.eval()
    with torch.no_grad():
        assert torch.equal(model(x), pristine(x)) and all_zero(pristine, mask)
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        for module in twin.modules():
            for hook in [*module._forward_pre_hooks.values()]:
                if isinstance(hook, torch_prune.BasePruningMethod):
                    torch_prune.remove(module, hook._tensor_name)
        assert not torch_prune.is_pruned(twin) and torch.equal(twin(x), expected) and all_zero(twin, mask)
        assert set(twin.state_dict()) == set(before)


@every
def test_a_masked_network_is_the_hand_written_product_for_three_steps(network):
    model, x, y, choice = build(network)
    model.double().train()
    x = x.double() if x.is_floating_point() else x
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mask = snip.prune(model, x, y, sparsity=0.7, dtype=torch.float64, **choice)
    by_hand, w = copy.deepcopy(model), {}
    for name, p in by_hand.named_parameters(remove_duplicate=False):
        w[name] = p
    leaf = {id(p): p.detach().clone().requires_grad_() for p in w.values()}
    kept = {id(w[name]): k for name, k in mask.items()}
    snip.apply_mask(model, mask)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    theirs = torch.optim.SGD(leaf.values(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        # A tied parameter is one product W * m, read in each of its places.
        product = {i: p * kept[i] if i in kept else p for i, p in leaf.items()}
        output = torch.func.functional_call(by_hand, {name: product[id(p)] for name, p in w.items()}, (x,))
        assert torch.allclose(model(x), output, rtol=1e-9, atol=1e-11)
        for parameters, out in ((optimizer, model(x)), (theirs, output)):
            parameters.zero_grad()
            F.cross_entropy(out, y).backward()
            parameters.step()
    for name, k in mask.items():
        expected = (leaf[id(w[name])] * k).detach()
        with torch.no_grad():
            model(x)
        assert torch.allclose(weight_of(model, name), expected, rtol=1e-9, atol=1e-11)


@every
def test_every_connection_of_a_dense_network_is_on_a_live_path(network):
    model, x, _, choice = build(network)
    if network in ("resnet18", "mobilenet_v3_small"):
        x = torch.zeros(1, 3, 128, 128)  # on small images the last kernels' rims see only padding, and are not live
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model, **choice).items()}
    table = snip.report(model, mask, x[:1])
    # Biases whose gradient cancels (attention's key bias moves no softmax) are the exception.
    weights = table[[not n.rpartition(".")[2].startswith(("bias", "in_proj_bias", "total")) for n in table.index]]
    assert (weights["live"] == weights["prunable"]).all(), weights[weights["live"] < weights["prunable"]]
    assert (weights["dead_units"] == 0).all() and table.attrs["collapsed"] == []


@every
def test_a_report_of_a_pruned_network_adds_up(network):
    model, x, y, choice = build(network)
    mask = snip.prune(model, x, y, sparsity=0.95, **choice)
    table = snip.report(model, mask, x[:1])
    rest, total = table.iloc[:-1], table.loc["total"]
    assert total["kept"] == n_kept(int(total["prunable"]), 0.95) == rest["kept"].sum()
    assert (rest["live"] <= rest["kept"]).all() and 0 < total["live"] <= total["kept"]
    assert table.attrs["effective_sparsity"] >= table.attrs["sparsity"]


def test_kernel_rims_that_see_only_padding_are_not_live():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3, 2))
    live = snip.on_live_path(model, {"0.weight": torch.ones(3, 2, 3, 3, dtype=torch.bool)}, torch.ones(1, 2, 1, 1))
    centre = torch.zeros(3, 3, dtype=torch.bool)
    centre[1, 1] = True
    assert torch.equal(live["0.weight"], centre.expand(3, 2, 3, 3))


def test_cutting_dead_connections_changes_no_output():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10, bias=False), nn.ReLU(), nn.Linear(10, 10, bias=False),
    )  # fmt: skip
    x, y = images(15)
    mask = snip.prune(model, x, y, sparsity=0.95)
    live = snip.on_live_path(model, mask, x)
    assert sum(int(k.sum()) for k in live.values()) < sum(int(k.sum()) for k in mask.values())
    all_kept, only_live = (snip.apply_mask(copy.deepcopy(model), k) for k in (mask, live))
    assert torch.equal(all_kept(x), only_live(x)) and all_kept(x).any()


def test_a_second_forward_pass_before_the_backward_pass_is_right():
    model, x, y, _ = build("convolutions")
    model.eval()
    snip.apply_mask(model, snip.prune(model, x, y, sparsity=0.5))
    (model(x).square().mean() + model(x).square().mean()).backward()
    twice = model.a.weight_orig.grad.clone()
    model.zero_grad()
    (2 * model(x).square().mean()).backward()
    assert torch.allclose(twice, model.a.weight_orig.grad, rtol=1e-5, atol=1e-8)


def test_masked_recurrent_weights_follow_their_dtype():
    model, x, y, _ = build("language model")
    snip.apply_mask(model, snip.prune(model, x, y, sparsity=0.5))
    single = model(x)
    assert model.double()(x).dtype == torch.float64
    assert torch.allclose(model(x).float(), single, rtol=1e-4, atol=1e-5)
