"""Laws of masks: exactly kappa whatever the scores, and what applying, changing and keeping one does."""

import copy

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

import snip_lib as snip
from snip_lib.masks import collapsed, densities, keep_top, keep_top_per_layer, n_kept

LAW = settings(max_examples=60, deadline=None)

# Scores as they come: many ties and zeros, denormals, both signs.
AWKWARD = st.sampled_from([0.0, -0.0, 1.0, 0.5, 5e-324, 1e-310, 2.2e-308, 1e300, -1.0]) | st.floats(
    allow_nan=False, allow_infinity=False
)


@st.composite
def score_dicts(draw):
    shapes = draw(st.lists(hnp.array_shapes(max_dims=3, max_side=6), min_size=1, max_size=4))
    return {f"p{i}": torch.from_numpy(draw(hnp.arrays("float64", s, elements=AWKWARD))) for i, s in enumerate(shapes)}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def some_mask(model, *, keep=0.5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=g) < keep for name, p in snip.prunable(model).items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- choosing


@LAW
@given(score_dicts(), st.floats(0, 1, exclude_max=True))
def test_mask_size_is_exact_under_ties(scores, sparsity):
    m = sum(s.numel() for s in scores.values())
    mask = keep_top(scores, n_kept(m, sparsity))
    assert int(flat(mask).sum()) == round((1 - sparsity) * m)
    assert [kept.shape for kept in mask.values()] == [s.shape for s in scores.values()]


@LAW
@given(score_dicts(), st.data())
def test_the_highest_stay_and_equal_scores_stay_in_order(scores, data):
    values = flat(scores).tolist()
    n_keep = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])  # sorted is stable: lower index first
    expected = set(order[:n_keep])
    assert set(flat(keep_top(scores, n_keep)).nonzero().squeeze(1).tolist()) == expected


@LAW
@given(score_dicts(), st.data())
def test_masks_of_the_same_scores_are_nested(scores, data):
    m = sum(s.numel() for s in scores.values())
    few, many = sorted(data.draw(st.tuples(st.integers(0, m), st.integers(0, m))))
    small, large = flat(keep_top(scores, few)), flat(keep_top(scores, many))
    assert not (small & ~large).any()


@LAW
@given(score_dicts(), st.data())
def test_what_was_removed_is_not_kept_again(scores, data):
    m = sum(s.numel() for s in scores.values())
    among = keep_top({name: -s for name, s in scores.items()}, data.draw(st.integers(0, m)))
    n_keep = data.draw(st.integers(0, int(flat(among).sum())))
    kept = flat(keep_top(scores, n_keep, among=among))
    assert int(kept.sum()) == n_keep and not (kept & ~flat(among)).any()


@LAW
@given(score_dicts(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
def test_scores_that_are_not_finite_are_refused_by_name(scores, bad, data):
    name = data.draw(st.sampled_from(list(scores)))
    scores[name].view(-1)[data.draw(st.integers(0, scores[name].numel() - 1))] = bad
    with pytest.raises(ValueError, match=f"scores of .*{name}.* not finite"):
        keep_top(scores, 1)


@LAW
@given(score_dicts(), st.data())
def test_inverted_scores_keep_the_lowest(scores, data):
    values = flat(scores)
    n_keep = data.draw(st.integers(0, len(values)))
    kept = flat(keep_top(snip.invert(scores), n_keep))
    assert int(kept.sum()) == n_keep
    if 0 < n_keep < len(values):
        assert values[kept].max() <= values[~kept].min()


def test_float32_denormals_are_told_from_zero():
    scores = {"w": torch.tensor([0.0, 1e-45, 0.0, 2e-45])}
    assert keep_top(scores, 2)["w"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 95, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"fraction removed, a plain number in \[0, 1\)"):
        n_kept(100, sparsity)


@pytest.mark.parametrize("n_keep", [-1, 5])
def test_keeping_more_than_there_is_is_refused(n_keep):
    with pytest.raises(ValueError, match="between 0 and 4"):
        keep_top({"w": torch.ones(4)}, n_keep)


def test_choosing_among_no_scores_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        snip.keep_top({}, 0)


def test_keeping_more_than_a_mask_left_is_refused():
    among = {"w": torch.tensor([True, False, True, False])}
    assert keep_top({"w": torch.zeros(4)}, 2, among=among)["w"].equal(among["w"])
    with pytest.raises(ValueError, match="between 0 and 2, not 3"):
        keep_top({"w": torch.ones(4)}, 3, among=among)


def test_kappa_is_rounded_not_cut():
    assert n_kept(266_610, 0.95) == 13_331  # FACTS 2: 13,330.5 in exact arithmetic, just above it in float64
    assert n_kept(10, 0.99) == 0 and n_kept(10, 0.94) == 1 and n_kept(7, 0.0) == 7


def test_global_is_not_per_layer():
    # By hand: globally the four highest of {9, 8, 7, 6 | 5, 1, 1, 1} are the first layer, per layer two of each.
    scores = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([1.0, 5, 1, 1])}
    whole, each = keep_top(scores, 4), keep_top_per_layer(scores, 0.5)
    assert whole["a"].all() and not whole["b"].any()
    assert each["a"].tolist() == [True, True, False, False] and each["b"].tolist() == [True, True, False, False]


# --- changing


@LAW
@given(st.lists(st.tuples(hnp.array_shapes(max_dims=3, max_side=8), st.floats(0, 1)), min_size=1, max_size=4))
def test_random_masks_have_the_densities_asked_for(layers):
    wanted = {f"p{i}": d for i, (_, d) in enumerate(layers)}
    shapes = {f"p{i}": s for i, (s, _) in enumerate(layers)}
    mask = snip.random_at_densities(wanted, shapes, torch.Generator().manual_seed(3))
    assert list(mask) == list(shapes)
    for name, kept in mask.items():
        assert tuple(kept.shape) == tuple(shapes[name])
        assert int(kept.sum()) == round(wanted[name] * kept.numel())


@LAW
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_shuffling_moves_connections_within_their_layer_and_only_there(seed, keep):
    mask = some_mask(small_net(), keep=keep, seed=seed)
    before = copy.deepcopy(mask)
    shuffled = snip.shuffle_within_layers(mask, torch.Generator().manual_seed(seed))
    assert same(mask, before)
    assert list(shuffled) == list(mask)
    assert {n: int(k.sum()) for n, k in shuffled.items()} == {n: int(k.sum()) for n, k in mask.items()}


def test_a_shuffled_mask_is_another_mask_and_its_seed_decides_it():
    mask = some_mask(small_net())
    one, again, other = (snip.shuffle_within_layers(mask, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert same(one, again) and not same(one, other) and not same(one, mask)
    assert all(not torch.equal(one[n], mask[n]) for n in ("0.weight", "2.weight", "4.weight"))


def test_shuffled_places_are_uniform():
    mask = {"w": torch.arange(10) < 3}
    g = torch.Generator().manual_seed(0)
    share = sum(snip.shuffle_within_layers(mask, g)["w"].double() for _ in range(4000)) / 4000
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_redrawing_changes_the_kept_weights_and_nothing_else():
    model = small_net()
    mask = {n: k for n, k in some_mask(model).items() if n != "4.weight"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    snip.redraw(model, mask, lambda w, g: w.normal_(10, 0.1, generator=g), torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name == "4.weight":
            assert torch.equal(p, before[name])
        elif name.endswith("bias"):
            assert torch.equal(p, before[name] * mask[name])
        else:
            assert (p[mask[name]] > 5).all() and (p[~mask[name]] == 0).all()


def test_redrawing_a_masked_model_keeps_its_mask():
    model = small_net()
    mask = some_mask(model)
    snip.apply_mask(model, mask)
    snip.redraw(model, mask, lambda w, g: w.normal_(10, 0.1, generator=g), torch.Generator().manual_seed(0))
    assert same(snip.mask_of(model), mask)
    assert (model[0].weight[mask["0.weight"]] > 5).all() and (model[0].weight[~mask["0.weight"]] == 0).all()


# --- applying


def test_a_masked_model_computes_with_the_products_and_says_its_mask():
    model = small_net()
    mask, x = some_mask(model), torch.randn(7, 6)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            p.mul_(mask[name])
    assert snip.apply_mask(model, mask) is model
    assert torch.equal(model(x), by_hand(x))
    assert torch_prune.is_pruned(model)
    assert same(snip.mask_of(model), mask)


class OwnMask(nn.Linear):
    """A layer with a buffer of the name that torch gives its masks."""

    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("weight_mask", torch.ones(4, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


def test_a_mask_of_a_modules_own_is_not_taken_for_torchs():
    model, x, y = nn.Sequential(OwnMask()), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    plain = nn.Sequential(nn.Linear(6, 4))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "mask" not in n})
    mask, expected = (snip.prune(m, x, y, sparsity=0.5) for m in (model, plain))  # and warns of no mask
    assert all(torch.equal(mask[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="has no mask"):
        snip.mask_of(model)
    with pytest.raises(ValueError, match="0.weight has a weight_mask of its own"):
        snip.apply_mask(model, mask)
    assert model[0].weight_mask.all() and not any(model[0]._forward_pre_hooks)


def test_what_is_removed_is_zero_whatever_it_was():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[:] = torch.tensor([[torch.inf, 2.0]])
    snip.apply_mask(model, {"weight": torch.tensor([[False, True]]), "bias": torch.tensor([True])})
    assert model.weight_orig.tolist() == [[0.0, 2.0]] and torch.isfinite(model(torch.ones(1, 2))).all()


def test_what_torch_masks_is_read_and_what_is_removed_is_plain():
    model = small_net()
    torch_prune.random_unstructured(model[0], "weight", amount=0.4)
    torch_prune.random_unstructured(model[0], "weight", amount=3)  # a container of two
    theirs = snip.mask_of(model)
    assert list(theirs) == ["0.weight"] and torch.equal(theirs["0.weight"], model[0].weight_mask.bool())
    torch_prune.remove(model[0], "weight")

    mask = some_mask(model)
    snip.apply_mask(model, mask)
    for name in mask:
        torch_prune.remove(model.get_submodule(name[0]), name[2:])
    assert not torch_prune.is_pruned(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in small_net().named_parameters()}
    assert not list(model.buffers())
    model(torch.randn(2, 6)).sum().backward()  # the hooks that are left find nothing to do
    assert all((p[~mask[n]] == 0).all() and p.grad is not None for n, p in model.named_parameters())


def test_a_model_whose_mask_is_removed_is_plain_and_free_of_the_library():
    model = nn.Sequential(nn.Sequential(small_net(), nn.ReLU()), nn.Linear(3, 2))
    before, parameters = set(model.state_dict()), {id(p) for p in model.parameters()}
    mask, x = some_mask(model), torch.randn(4, 6)
    expected = snip.apply_mask(model, mask)(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert snip.remove_mask(model) is model and torch.equal(model(x), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert set(model.state_dict()) == before and {id(p) for p in model.parameters()} == parameters
    assert all(type(p) is nn.Parameter and (p[~mask[n]] == 0).all() for n, p in model.named_parameters())
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("biases", [True, False])
def test_parameters_keep_their_order_under_a_mask_and_after_it(biases):
    """Optimisers know parameters by their place, in a checkpoint too."""
    model = nn.Sequential(small_net(), nn.GRU(3, 4))
    mask = {name: kept for name, kept in some_mask(model).items() if biases or "bias" not in name}
    before = list(model.parameters())
    for change in (lambda: snip.apply_mask(model, mask), lambda: snip.remove_mask(model)):
        change()
        assert [id(p) for p in model.parameters()] == [id(p) for p in before]


def test_a_masked_model_can_be_copied_at_any_time():
    model = small_net()
    snip.apply_mask(model, some_mask(model))
    x = torch.randn(4, 6)
    fresh = copy.deepcopy(model)
    model(x).sum().backward()
    after = copy.deepcopy(model)
    for twin in (fresh, after):
        assert torch.equal(twin(x), model(x))
        before = model(x)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1.0)
        assert torch.equal(model(x), before) and not torch.equal(twin(x), before)
        assert same(snip.mask_of(twin), snip.mask_of(model))
        assert (twin[0].weight[~snip.mask_of(twin)["0.weight"]] == 0).all()
    twin(x).sum().backward()
    assert twin[0].weight_orig.grad is not None


def test_an_optimizer_made_before_the_mask_trains_the_masked_weights():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = some_mask(model)
    snip.apply_mask(model, mask)
    before = model[0].weight.detach().clone()
    model(torch.randn(9, 6)).square().sum().backward()
    optimizer.step()
    model(torch.randn(1, 6))
    assert not torch.equal(model[0].weight, before) and (model[0].weight[~mask["0.weight"]] == 0).all()


def test_a_hook_that_was_there_before_the_mask_sees_the_weights_of_this_pass():
    model, seen = small_net(), []
    model.register_forward_pre_hook(lambda net, _: seen.append(net[0].weight.detach().clone()))
    mask = some_mask(model)
    snip.apply_mask(model, mask)
    with torch.no_grad():
        model[0].weight_orig.fill_(2.0)
    model(torch.randn(1, 6))
    assert torch.equal(seen[0], 2.0 * mask["0.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam_l2"])
def test_pruned_weights_stay_zero_with_momentum_and_decay(optimizer):
    model = small_net()
    mask = some_mask(model)
    snip.apply_mask(model, mask)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        "adam_l2": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    }[optimizer](model.parameters())
    start = flat(dict(model.named_parameters())).detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        model.eval()(torch.randn(1, 6))
        for name, kept in mask.items():
            module, attribute = model.get_submodule(name[0]), name[2:]
            assert (getattr(module, attribute)[~kept] == 0).all()
            assert (getattr(module, f"{attribute}_orig")[~kept] == 0).all()
    assert not torch.equal(flat(dict(model.named_parameters())), start)


def test_a_second_mask_may_only_take_away():
    model = small_net()
    first = some_mask(model, keep=0.6)
    smaller = {n: k & (torch.rand(k.shape) < 0.5) for n, k in first.items()}
    snip.apply_mask(model, first)
    snip.apply_mask(model, smaller)
    assert same(snip.mask_of(model), smaller)
    with pytest.raises(ValueError, match="back that an earlier mask removed"):
        snip.apply_mask(model, first)
    assert same(snip.mask_of(model), smaller)


def test_a_mask_of_another_network_is_refused_with_a_sentence():
    model = small_net()
    mask = some_mask(model)
    before = copy.deepcopy(model.state_dict())
    for bad, words in (
        ({}, "empty"),
        ({"fc.weight": mask["0.weight"]}, "another network: Sequential has no fc.weight"),
        ({"0.weight": mask["0.weight"].T}, r"mask of 0.weight is \[6, 5\], the parameter \[5, 6\]"),
        ({"0.weight": mask["0.weight"].float()}, "0.weight is torch.float32, not torch.bool"),
        ({"0.weight": mask["0.weight"].numpy()}, "0.weight is ndarray, not torch.bool"),
        (mask | {"2.bias": None}, "2.bias is NoneType, not torch.bool"),
        (None, "mask is NoneType"),
        (list(mask), "mask is list"),
    ):
        with pytest.raises(ValueError, match=words):
            snip.apply_mask(model, bad)
    assert same(model.state_dict(), before)
    with pytest.raises(ValueError, match="has no mask"):
        snip.mask_of(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11's own, when it compiles first
def test_a_mask_whose_names_carry_a_wrappers_prefix_comes_with_the_remedy():
    model = small_net()
    mask = some_mask(model)
    for wrapped, inside in ((torch.nn.DataParallel(model), "module"), (torch.compile(model), "_orig_mod")):
        with pytest.raises(ValueError, match=rf"{inside}.0.weight.* is wrapped: mask the one inside, .{inside},"):
            snip.apply_mask(wrapped, mask)
        theirs = {f"{inside}.{name}": kept for name, kept in mask.items()}
        with pytest.raises(ValueError, match=f"of a wrapped network: without the '{inside}.' before its names it fits"):
            snip.apply_mask(model, theirs)
    with pytest.raises(ValueError, match=r"\.\.\.$"):  # of another network altogether
        snip.apply_mask(model, {"module.fc.weight": mask["0.weight"]})
    assert same(snip.mask_of(snip.apply_mask(torch.nn.DataParallel(model).module, mask)), mask)


def test_a_mask_that_cannot_be_saved_says_so_and_leaves_the_file_as_it_was(tmp_path):
    mask, path = some_mask(small_net()), tmp_path / "mask.safetensors"
    snip.save_mask(mask, path, seed=1)
    with pytest.raises(ValueError, match="what JSON can say .*: nothing was written"):
        snip.save_mask(mask, path, seed=torch.tensor(2))
    assert snip.load_mask(path)[1]["seed"] == 1
    with pytest.raises(OSError, match="nowhere/mask.* cannot be written .*: nothing was saved"):
        snip.save_mask(mask, tmp_path / "nowhere" / "mask.safetensors")


def test_what_is_no_mask_is_neither_saved_nor_shuffled_nor_read(tmp_path):
    path, mask = tmp_path / "mask.safetensors", some_mask(small_net())
    for bad, words in (
        ({}, "empty"),
        ({n: k.float() for n, k in mask.items()}, "not torch.bool"),
        ([1], "mask is list"),
    ):
        for use in (snip.sparsity_of, densities, lambda m: snip.save_mask(m, path)):
            with pytest.raises(ValueError, match=words):
                use(bad)
        with pytest.raises(ValueError, match=words):
            snip.shuffle_within_layers(bad, torch.Generator())
    assert not path.exists()
    with pytest.raises(ValueError, match="load_mask returns"):
        snip.sparsity_of((mask, {}))
    for damaged in (b"", b"no mask at all", safetensors.torch.save(mask)[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged or no safetensors file .*: save it again with save_"):
            snip.load_mask(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        snip.load_mask(tmp_path)
    safetensors.torch.save_file(mask, path)  # without what save_mask says of it
    with pytest.raises(ValueError, match="no mask that save_mask wrote"):
        snip.load_mask(path)
    with pytest.raises(ValueError, match="density of b is a fraction in .* not None"):
        snip.random_at_densities({"a": 0.5}, {"a": (2,), "b": (3,)}, torch.Generator())


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # as with every weight that torch prunes
def test_a_masked_model_can_be_exported():
    model, x = small_net().eval(), torch.randn(3, 6)
    snip.apply_mask(model, some_mask(model))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    copy.deepcopy(model)


def test_a_mask_that_is_applied_in_inference_mode_can_be_trained_with():
    model = small_net()
    mask = some_mask(model)
    with torch.inference_mode():
        snip.apply_mask(model, {name: kept.clone() for name, kept in mask.items()})
    model(torch.randn(3, 6)).sum().backward()
    assert (model[0].weight_orig.grad[~mask["0.weight"]] == 0).all() and model[0].weight_orig.grad.any()


def test_masks_go_by_name_not_by_position():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mask = some_mask(model)
    snip.apply_mask(model, dict(reversed(mask.items())))
    assert same(snip.mask_of(model), mask)


class Tied(nn.Module):
    """A language model's shape: the decoder is the embedding, and `forward` reads it without calling it."""

    def __init__(self, read):
        super().__init__()
        self.encoder, self.decoder, self.read = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), read
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens):
        h = self.encoder(tokens)
        return nn.functional.linear(h, self.decoder.weight) if self.read else self.decoder(h)


@pytest.mark.parametrize("read", [False, True])
def test_every_module_that_holds_a_tied_parameter_is_masked(read):
    torch.manual_seed(0)
    model, tokens = Tied(read), torch.arange(7)
    assert list(snip.prunable(model)) == ["decoder.weight"]
    mask = some_mask(model)
    by_hand = model.encoder.weight.detach().clone().requires_grad_()
    snip.apply_mask(model, mask)
    assert model.encoder.weight_orig is model.decoder.weight_orig
    assert same(snip.mask_of(model), mask)
    for _ in range(3):
        w = by_hand * mask["decoder.weight"]
        (expected,) = torch.autograd.grad((w[tokens] @ w.T).square().sum(), by_hand)
        model.zero_grad()
        model(tokens).square().sum().backward()
        assert torch.allclose(model.encoder.weight_orig.grad, expected, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            by_hand -= 0.01 * expected
            model.encoder.weight_orig -= 0.01 * model.encoder.weight_orig.grad


def test_a_tied_parameter_named_twice_is_refused():
    model = Tied(False)
    kept = some_mask(model)["decoder.weight"]
    with pytest.raises(ValueError, match="encoder.weight and decoder.weight are one tied parameter"):
        snip.apply_mask(model, {"encoder.weight": kept, "decoder.weight": ~kept})


def test_attention_reads_weights_that_are_masked():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    mask, x = some_mask(model), torch.randn(3, 5, 8)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in snip.prunable(by_hand).items():
            p.mul_(mask[name])
    snip.apply_mask(model, mask)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, by_hand)]
    for _ in range(3):
        outputs = [m(x, x, x)[0] for m in (model, by_hand)]
        assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
        with torch.no_grad():
            for name, p in snip.prunable(by_hand).items():
                p.grad.mul_(mask[name])
        for optimizer in optimizers:
            optimizer.step()
    for mode in (True, False):  # in evaluation a fused kernel reads the weights
        model.train(mode), by_hand.train(mode)
        with torch.no_grad():
            assert torch.allclose(model(x, x, x)[0], by_hand(x, x, x)[0], rtol=1e-5, atol=1e-6)


# --- looking


def test_a_report_counts_by_hand():
    # 3 -> 3 -> 2. Unit 0 has an input and an output; unit 1 has an input and no output; unit 2 the reverse.
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    mask = {
        "0.weight": torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool(),
        "2.weight": torch.tensor([[1, 0, 1], [0, 0, 0]]).bool(),
        "0.bias": torch.tensor([True, True, False]),
        "2.bias": torch.tensor([True, True]),
    }
    live = snip.on_live_path(model, mask, torch.ones(1, 3))
    assert live["0.weight"].tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert live["2.weight"].tolist() == [[True, False, False], [False] * 3]
    assert live["0.bias"].tolist() == [True, False, False] and live["2.bias"].all()

    table = snip.report(model, mask, torch.ones(1, 3))
    assert list(table.index) == [*mask, "total"]
    assert table["kept"].to_list() == [3, 2, 2, 2, 9] and table["live"].to_list() == [2, 1, 1, 2, 6]
    assert table["prunable"].to_list() == [9, 6, 3, 2, 20]
    assert table["dead_units"].to_list()[:2] == [2, 1]
    assert table.attrs["sparsity"] == pytest.approx(11 / 20)
    assert table.attrs["effective_sparsity"] == pytest.approx(14 / 20)
    with pytest.raises(ValueError, match=r"refuses an input \(ndarray\): make tensors of numpy arrays"):
        snip.report(model, mask, torch.ones(1, 3).numpy())
    with pytest.raises(ValueError, match=r"The example of shape \[0, 3\] is empty.$"):
        snip.report(model, mask, torch.ones(0, 3))
    without = snip.report(model, mask)
    assert without["dead_units"].to_list()[:2] == [1, 1] and without.attrs["effective_sparsity"] is None
    snip.apply_mask(model, mask)
    assert snip.report(model, x=torch.ones(1, 3)).equals(table)


class Tokens(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.e, self.a, self.b = embedding, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.e(tokens)
        return self.b(torch.relu(self.a(x.mean(1) if x.dim() == 3 else x)))


@pytest.mark.parametrize("embedding", [nn.Embedding(9, 4, padding_idx=0), nn.EmbeddingBag(9, 4)], ids=str)
def test_every_row_of_an_embedding_is_live_where_its_columns_are_read(embedding):
    model = Tokens(embedding)
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model, only="*").items()}
    mask["e.weight"][3] = mask["e.weight"][:, 2] = mask["a.weight"][:, 1] = False
    table = snip.report(model, mask, torch.tensor([[1, 2, 2]]))
    expected = mask["e.weight"].clone()
    expected[:, 1] = False
    live = snip.on_live_path(model, mask, torch.tensor([[1, 2, 2]]))
    assert torch.equal(live["e.weight"], expected) and live["a.weight"].any(0).tolist() == [True, False, False, True]
    assert table.loc["e.weight", ["units", "dead_units"]].to_list() == [4, 2]  # what comes out


def test_paths_are_the_same_where_gradient_checkpointing_saves_memory():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.saves = small_net(), nn.Linear(3, 2), False

        def forward(self, x):
            return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.saves else self.inner(x))

    model = Net()
    mask, x = some_mask(model, keep=0.3), torch.randn(2, 6)
    plain = snip.on_live_path(model, mask, x)
    model.saves = True
    assert same(snip.on_live_path(model, mask, x), plain) and not same(plain, mask)


def test_a_layer_that_is_gone_is_named_and_cuts_all_paths():
    model = small_net()
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model).items()}
    mask["2.weight"][:] = False
    table = snip.report(model, mask, torch.ones(1, 6))
    assert collapsed(mask) == ["2.weight"] and snip.report(model, mask).attrs["collapsed"] == ["2.weight"]
    assert table.attrs["collapsed"] == ["0.weight", "2.weight", "4.weight"]
    assert table["live"].to_list()[:3] == [0, 0, 0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.a = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.b(torch.relu(self.a(x)))
        return self.head(nn.functional.max_pool2d(x, 4).flatten(1))


def test_a_cut_branch_of_a_residual_net_leaves_the_other_alive():
    model = Residual()
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model).items()}
    live = snip.on_live_path(model, mask, torch.randn(1, 2, 4, 4))
    assert all(kept.all() for kept in live.values())
    mask["b.weight"][:] = False
    live = snip.on_live_path(model, mask, torch.randn(1, 2, 4, 4))
    assert live["stem.weight"].all() and live["head.weight"].all() and not live["a.weight"].any()


def brute_force_live(model, mask, x):
    """A connection is live if removing it alone changes the network of products in general position."""
    torch.manual_seed(5)
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, p in snip.prunable(model).items():
            p.copy_(torch.rand_like(p) * mask[name] if p.dim() > 1 else torch.zeros_like(p))
        x, live = torch.rand(x.shape, dtype=torch.float64), {}
        whole = model(x)
        for name, p in snip.prunable(model).items():
            if p.dim() > 1:
                live[name] = torch.zeros_like(mask[name])
                for i in mask[name].nonzero().tolist():
                    value = p[tuple(i)].item()
                    p[tuple(i)] = 0
                    live[name][tuple(i)] = not torch.equal(model(x), whole)
                    p[tuple(i)] = value
    return live


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), (1, 6)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
                nn.ReLU(),
                nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(24, 2),
            ),
            (1, 2, 4, 4),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv1d(2, 6, 2), nn.ReLU(), nn.Conv1d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)
            ),
            (1, 2, 4),
        ),
    ],
    ids=["mlp", "conv", "conv1d"],
)
def test_live_paths_are_what_removal_finds(make, shape, seed):
    torch.manual_seed(seed)
    model = make()
    mask = {n: torch.rand(p.shape) < 0.25 for n, p in snip.prunable(model).items()}
    live, expected = snip.on_live_path(model, mask, torch.ones(shape)), brute_force_live(model, mask, torch.ones(shape))
    assert all(torch.equal(live[name], expected[name]) for name in expected)
    assert 0 < sum(int(k.sum()) for k in expected.values()) < sum(int(mask[n].sum()) for n in expected)


class Difference(nn.Module):
    """A rectifier of a difference, which is below 0 where all weights are alike."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.a(x) - 2 * self.b(x)))


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, units=6):
        super().__init__()
        self.a, self.between, self.head = nn.Linear(4, 6), between, nn.Linear(units, 2)

    def forward(self, x):
        return self.head(self.between(self.a(x)))


@pytest.mark.parametrize(
    "make",
    [
        Difference,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 2)),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2)),
        lambda: Between(lambda h: h.view(-1, 3, 2).amax(2), 3),
        lambda: Between(lambda h: h.view(-1, 3, 2).max(dim=2).values, 3),
        lambda: Between(lambda h: torch.max(h[:, :3], h[:, 3:]), 3),
        lambda: Between(lambda h: torch.minimum(h[:, :3], h[:, 3:]), 3),
        lambda: Between(lambda h: h.clamp(0, 0.01)),
        lambda: Between(lambda h: h.clamp(max=0)),
        lambda: Between(lambda h: nn.functional.threshold(h, 0.9, 0.0)),
        lambda: Between(lambda h: nn.functional.softshrink(nn.functional.hardshrink(h, 9.0), 9.0)),
        lambda: Between(torch.sign),
        lambda: Between(lambda h: torch.tanh(1000 * h)),
        lambda: Between(lambda h: nn.functional.hardsigmoid(1000 * h)),
        lambda: Between(lambda h: torch.sigmoid((h[..., None] * torch.arange(500.0).to(h)).sum(-1))),
        lambda: Between(lambda h: nn.functional.glu(torch.cat([h, 900 * h], 1))),
        lambda: Between(lambda h: torch.sigmoid(input=900 * h) * h.argsort(1).topk(2, 1).values.sum()),
        lambda: Between(lambda h: torch.topk(input=h + (h > 9).long().median(), k=2)[0] + h[:, :0].tanh().sum(), 2),
        lambda: Between(lambda h: h.view(-1, 2, 3).median(2).values, 2),
        lambda: Between(lambda h: h.median().expand(1, 1), 1),
    ],
    ids=["rectifier", "maximum", "batch norm of one example", "amax", "max of a dimension", "max of two", "minimum"]
    + [
        "clamp",
        "clamp from above",
        "threshold",
        "shrinkage",
        "sign",
        "tanh of much",
        "hard sigmoid",
        "sigmoid of a sum",
        "glu",
    ]
    + ["sigmoid by name", "the largest", "median of a dimension", "median"],
)
def test_nothing_between_two_layers_hides_a_path(make):
    model = make()
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in snip.prunable(model).items()}
    live = snip.on_live_path(model, mask, torch.ones(1, 4))
    assert all(live[name].all() for name in mask)


class Attending(nn.Module):
    """Attention and what reads it."""

    def __init__(self, bias):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_attention_is_no_path(bias):
    model = Attending(bias)
    mask = {
        n: torch.full_like(p, n != "attention.in_proj_weight", dtype=torch.bool)
        for n, p in snip.prunable(model).items()
    }
    live = snip.on_live_path(model, mask, torch.ones(1, 5, 8))
    assert not any(kept.any() for name, kept in live.items() if "weight" in name)


def test_a_scale_that_is_removed_cuts_its_paths():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale, self.head = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.scale * self.a(x))

    model = Scaled()
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in snip.prunable(model, only="*").items()}
    mask["scale"][:2] = False
    live = snip.on_live_path(model, mask, torch.ones(1, 4))
    assert not live["a.weight"][:2].any() and not live["head.weight"][:, :2].any()
    assert live["a.weight"][2:].all() and live["head.weight"][:, 2:].all() and torch.equal(live["scale"], mask["scale"])


def test_paths_do_not_fade_or_overflow_in_a_deep_net():
    model = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(300)])
    mask = {name: torch.eye(50).bool() for name in snip.prunable(model)}
    live = snip.on_live_path(model, mask, torch.ones(1, 50))
    assert all(torch.equal(live[name], mask[name]) for name in mask)


def test_dead_units_of_a_transposed_convolution_are_its_outputs():
    model = nn.ConvTranspose1d(4, 6, 1, groups=2, bias=False)  # [4, 3, 1]: inputs 0, 1 make outputs 0-2
    mask = {"weight": torch.ones(4, 3, 1, dtype=torch.bool)}
    mask["weight"][:2, 1] = False
    assert snip.report(model, mask)["dead_units"].to_list() == [1, 1]
    assert snip.report(model, mask)["units"].to_list() == [6, 6]


def test_looking_changes_nothing():
    model = Residual().train()
    x, before, rng = torch.randn(1, 2, 4, 4), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    snip.report(model, some_mask(model), x)
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), rng) and model.bn.training


# --- keeping


def test_a_mask_survives_its_file_in_order_and_with_its_metadata(tmp_path):
    mask = {f"{name}.weight": torch.rand(301, 95) < 0.5 for name in ("z", "a", "m")} | {"z.bias": torch.rand(3) < 0.5}
    mask["nothing.weight"] = torch.zeros(0, 4, dtype=torch.bool)
    snip.save_mask(mask, tmp_path / "mask.safetensors", method="snip", seeds=[1, 2])
    n = sum(kept.numel() for kept in mask.values())
    assert (tmp_path / "mask.safetensors").stat().st_size < n / 8 + 1000  # a bit a connection
    loaded, metadata = snip.load_mask(tmp_path / "mask.safetensors")
    assert same(loaded, mask) and all(kept.dtype == torch.bool for kept in loaded.values())
    assert metadata == {"sparsity": pytest.approx(snip.sparsity_of(mask)), "method": "snip", "seeds": [1, 2]}


def test_a_mask_from_before_its_bits_were_packed_is_read(tmp_path):
    mask = {"b": torch.rand(4, 3) < 0.5, "a": torch.rand(4) < 0.5}
    safetensors.torch.save_file(mask, tmp_path / "m.safetensors", {"order": '["b", "a"]', "sparsity": "0.5"})
    loaded, metadata = snip.load_mask(tmp_path / "m.safetensors")
    assert same(loaded, mask) and metadata == {"sparsity": 0.5}


def test_slices_of_one_memory_can_be_saved(tmp_path):
    mask = keep_top({"a": torch.rand(4, 4), "b": torch.rand(4)}, 7)
    snip.save_mask(mask, tmp_path / "m.safetensors", sparsity=0.66)  # what was asked for, of which 0.65 is left
    loaded, metadata = snip.load_mask(tmp_path / "m.safetensors")
    assert same(loaded, mask) and metadata["sparsity"] == 0.66


def test_a_masked_model_survives_its_checkpoint(tmp_path):
    model, other, x = small_net(0), small_net(1), torch.randn(3, 6)
    mask = some_mask(model)
    snip.apply_mask(model, mask)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    snip.apply_mask(other, some_mask(other, keep=1.1))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x)) and same(snip.mask_of(other), mask)


def test_densities_are_fractions_kept():
    assert densities({"a": torch.tensor([True, False, False, True])}) == {"a": 0.5}


def test_paths_of_branches_that_are_subtracted_do_not_cancel():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.relu(self.a(x) - self.b(x)))

    model = Difference()
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in snip.prunable(model, biases=False).items()}
    assert all(kept.all() for kept in snip.on_live_path(model, mask, torch.ones(1, 4)).values())
