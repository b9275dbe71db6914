"""Laws of the networks: their parameter counts, their padding, and cells against a second definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snip_lib.data import generator
from snip_lib.inits import initialise
from snip_lib.models import MODELS, SameConv2d
from snip_lib.saliency import CONNECTIONS, prunable

GREY, COLOUR, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64)
COUNTS = {  # FACTS: weights, biases; what the paper prints, and the released code's own counts
    "lenet300": (266_200, 410),
    "lenet5": (430_500, 580),
    "alexnet_s": (5_066_784, 3_434),
    "alexnet_b": (8_484_896, 5_482),
    "vgg_c": (10_521_280, 5_258),
    "vgg_d": (15_239_872, 5_258),
    "vgg_like": (14_977_728, 4_746),
    "wrn_16_8": (10_958_666 - 4_506, 4_506),
    "wrn_16_10": (17_113_258 - 5_626, 5_626),
    "wrn_22_8": (17_153_610 - 6_298, 6_298),
    "lstm_s": (136_586 - 650, 650),
    "lstm_b": (535_306 - 1_290, 1_290),
    "gru_s": (103_690 - 522, 522),
    "gru_b": (403_978 - 1_034, 1_034),
}
TINY_COUNTS = {
    "alexnet_s": 5_264_968,
    "alexnet_b": 8_879_688,
    "vgg_c": 10_624_008,
    "vgg_d": 15_342_600,
    "vgg_like": 15_079_944,
}
RECURRENT = "lstm_s", "lstm_b", "gru_s", "gru_b"
CONVOLUTIONAL = [name for name in MODELS if name not in ("lenet300", "lenet5", *RECURRENT)]


def native(name):
    return COLOUR if name in CONVOLUTIONAL else GREY


def on_meta(name, shape, n_classes):
    """Build a network without its memory: shapes and counts only."""
    with torch.device("meta"):
        return MODELS[name](shape, n_classes)


def small(name, shape=GREY, n_classes=10, dtype=torch.float64):
    """Build and initialise a network, all biases random so that none hides."""
    model = MODELS[name](shape, n_classes)
    initialise(model, "vs_x", generator(0, "init"))
    with torch.no_grad():
        for parameter in prunable(model).values():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator(0, "biases"))
    return model.to(dtype)


def test_every_model_has_a_golden_count():
    assert list(MODELS) == list(COUNTS)


@pytest.mark.parametrize("name", MODELS)
def test_prunable_parameters_are_as_many_as_the_paper_prints(name):
    parameters = prunable(on_meta(name, native(name), 10)).values()
    assert sum(p.numel() for p in parameters if p.dim() > 1) == COUNTS[name][0]
    assert sum(p.numel() for p in parameters if p.dim() == 1) == COUNTS[name][1]


@pytest.mark.parametrize("name", TINY_COUNTS)
def test_prunable_parameters_at_64_pixels_and_200_classes(name):
    assert sum(p.numel() for p in prunable(on_meta(name, TINY, 200)).values()) == TINY_COUNTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_prunable_is_batch_norm(name):
    model = on_meta(name, native(name), 10)
    prunables = {id(p) for p in prunable(model).values()}
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        if isinstance(module, CONNECTIONS):
            assert own <= prunables
            assert module.bias is not None
        elif own:
            assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
            assert not own & prunables
            assert (module.eps, module.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shape", "n_classes"), [(GREY, 10), (COLOUR, 10), (TINY, 200)])
def test_every_model_takes_every_data_set(name, shape, n_classes):
    model = on_meta(name, shape, n_classes)
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, n_classes)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_after_the_first_convolution_64_pixels_are_as_32(name):
    def shapes(shape):
        found, model = [], on_meta(name, shape, 10)
        for module in model.modules():
            if isinstance(module, CONNECTIONS):
                module.register_forward_hook(lambda m, i, output: found.append(output.shape))
        model(torch.empty(2, *shape, device="meta"))
        return found

    assert shapes(TINY) == shapes(COLOUR)


def same_padded_by_loops(x, weight, bias, stride):
    """TensorFlow's "same" convolution by its definition, one output pixel at a time."""
    (b, _, height, width), (c_out, _, k, _) = x.shape, weight.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    top = max((out_h - 1) * stride + k - height, 0) // 2
    left = max((out_w - 1) * stride + k - width, 0) // 2
    out = bias.expand(b, out_h, out_w, c_out).clone()
    for i in range(out_h):
        for j in range(out_w):
            for di in range(k):
                for dj in range(k):
                    r, s = i * stride - top + di, j * stride - left + dj
                    if 0 <= r < height and 0 <= s < width:
                        out[:, i, j] += x[:, :, r, s] @ weight[:, :, di, dj].T
    return out.permute(0, 3, 1, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5, 11]), st.integers(1, 4), st.integers(0, 99))
def test_same_padding_is_tensorflows(height, width, k, stride, seed):
    chance = generator(seed, "test")
    conv = SameConv2d(2, 3, k, stride).double()
    x = torch.randn(2, 2, height, width, generator=chance, dtype=torch.float64)
    torch.testing.assert_close(conv(x), same_padded_by_loops(x, conv.weight, conv.bias, stride))


def test_the_odd_zero_of_alexnets_first_layer_is_right_and_below():
    conv = on_meta("alexnet_s", COLOUR, 10).conv1.to_empty(device="cpu")
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.zero_()
    seen = conv(torch.ones(1, *COLOUR))[0, 0] / 3
    assert seen[0, 0] == 7 * 7  # 4 of the 11 rows and columns are zeros
    assert seen[-1, -1] == 6 * 6  # 5 are


@pytest.mark.parametrize(("name", "layers"), [("alexnet_s", 7), ("vgg_c", 15), ("vgg_d", 15), ("vgg_like", 14)])
def test_a_layer_is_connections_then_batch_norm_then_relu(name, layers):
    modules = [m for m in on_meta(name, COLOUR, 10) if not isinstance(m, nn.MaxPool2d | nn.Flatten)]
    assert isinstance(modules[-1], nn.Linear)
    for i in range(layers):
        connections, norm, relu = modules[3 * i : 3 * i + 3]
        assert isinstance(connections, CONNECTIONS)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert isinstance(relu, nn.ReLU)
    assert len(modules) == 3 * layers + 1


def test_vgg_c_is_vgg_d_with_1x1_kernels_at_7_10_and_13():
    def kernels(name):
        return [m.kernel_size[0] for m in on_meta(name, COLOUR, 10) if isinstance(m, nn.Conv2d)]

    assert kernels("vgg_d") == kernels("vgg_like") == [3] * 13
    assert [i for i, k in enumerate(kernels("vgg_c"), 1) if k == 1] == [7, 10, 13]


def test_lenet5_has_no_relu_after_its_convolutions():
    model = small("lenet5")
    x = torch.randn(3, *GREY, dtype=torch.float64, generator=generator(0, "x"))
    pooled = F.max_pool2d(F.conv2d(x, model.conv1.weight, model.conv1.bias), 2)
    assert (pooled < 0).any()
    pooled = F.max_pool2d(F.conv2d(pooled, model.conv2.weight, model.conv2.bias), 2)
    torch.testing.assert_close(model(x), model.fc2(F.relu(model.fc1(pooled.flatten(1)))))


def test_a_wide_block_is_preactivated_and_adds_its_input():
    model = MODELS["wrn_16_8"]((3, 8, 8), 10).double().eval()
    x = torch.randn(2, 128, 8, 8, dtype=torch.float64, generator=generator(0, "x"))
    block = model.blocks.group1_block2
    for conv in (block.conv1, block.conv2):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    rectified = F.relu(x / (1 + 1e-3) ** 0.5)
    torch.testing.assert_close(block(x), x + rectified / (1 + 1e-3) ** 0.5)

    block = model.blocks.group2_block1  # its shape changes: the shortcut sees the rectified input
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    shortcut = F.conv2d(rectified, block.shortcut.weight, block.shortcut.bias, stride=2)
    torch.testing.assert_close(block(x), shortcut)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_lstm_is_nn_lstm_with_the_forget_constant_in_its_first_bias(dtype, tolerance):
    ours = small("lstm_s", dtype=dtype)
    x = torch.randn(5, *GREY, dtype=dtype, generator=generator(0, "x"))
    theirs = nn.LSTM(128, 128).to(dtype)
    i, j, f, o = ours.gates.weight.chunk(4)
    bias_i, bias_j, bias_f, bias_o = ours.gates.bias.chunk(4)
    with torch.no_grad():  # PyTorch's order is i, f, g, o
        from_input, from_state = torch.cat([i, f, j, o]).chunk(2, 1)
        theirs.weight_ih_l0.copy_(from_input)
        theirs.weight_hh_l0.copy_(from_state)
        theirs.bias_ih_l0.copy_(torch.cat([bias_i, bias_f + 1, bias_j, bias_o]))
        theirs.bias_hh_l0.zero_()
        output, _ = theirs(ours.project(x[:, 0].transpose(0, 1)))
        torch.testing.assert_close(ours(x), ours.fc(output[-1]), rtol=tolerance, atol=tolerance)


def gru_by_loops(model, image):
    """One image through the GRU of Cho et al. (2014), row by row and unit by unit."""
    units = model.fc.in_features
    h = [torch.zeros((), dtype=image.dtype)] * units
    for pixels in image[0]:
        x = list(model.project.weight @ pixels + model.project.bias)
        gate = [
            torch.sigmoid(sum(w * v for w, v in zip(row, x + h, strict=True)) + b)
            for row, b in zip(model.gates.weight, model.gates.bias, strict=True)
        ]
        r, u = gate[:units], gate[units:]
        reset = [a * b for a, b in zip(r, h, strict=True)]
        new = [
            torch.tanh(sum(w * v for w, v in zip(row, x + reset, strict=True)) + b)
            for row, b in zip(model.candidate.weight, model.candidate.bias, strict=True)
        ]
        h = [u[k] * h[k] + (1 - u[k]) * new[k] for k in range(units)]
    return model.fc.weight @ torch.stack(h) + model.fc.bias


def test_gru_is_chos_by_hand():
    build = MODELS["gru_s"].func
    model = build((1, 5, 4), 3, units=3)
    initialise(model, "vs_x", generator(0, "init"))
    model = model.double()
    x = torch.randn(2, 1, 5, 4, dtype=torch.float64, generator=generator(0, "x"))
    with torch.no_grad():
        expected = torch.stack([gru_by_loops(model, image) for image in x])
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_gru_resets_before_the_matrix_product_unlike_nn_gru():
    """With the reset gate at 1 the two agree, as `nn.GRU`'s update gate has the same sense; otherwise they differ."""
    ours = small("gru_s")
    theirs = nn.GRU(128, 128).double()
    x = torch.randn(4, *GREY, dtype=torch.float64, generator=generator(0, "x"))
    with torch.no_grad():
        from_input, from_state = torch.cat([ours.gates.weight, ours.candidate.weight]).chunk(2, 1)
        theirs.weight_ih_l0.copy_(from_input)
        theirs.weight_hh_l0.copy_(from_state)
        theirs.bias_hh_l0.zero_()

        def gap():
            theirs.bias_ih_l0.copy_(torch.cat([ours.gates.bias, ours.candidate.bias]))
            output, _ = theirs(ours.project(x[:, 0].transpose(0, 1)))
            return (ours(x) - ours.fc(output[-1])).abs().max().item()

        assert gap() > 1e-3
        ours.gates.bias[:128] = 1e3
        assert gap() < 1e-12


@pytest.mark.parametrize(
    ("name", "part", "bias", "silent"),
    [("lstm_s", p, -1e3, p != "forget") for p in ("input", "forget", "output")]
    + [("lstm_s", "candidate", 0.0, True), ("gru_s", "update", 1e3, True), ("gru_s", "reset", 1e3, False)],
)
def test_a_gate_is_where_its_matrix_says(name, part, bias, silent):
    """The state stays 0, and what is read from it the same, only if nothing is let in or nothing out."""
    model = small(name)
    layer, x = model.gates, torch.randn(2, *GREY, dtype=torch.float64, generator=generator(0, "x"))
    k, n = layer.parts.index(part), len(layer.parts)
    with torch.no_grad():
        layer.weight.view(n, -1)[k] = 0
        layer.bias.view(n, -1)[k] = bias
        assert (model(x) - model.fc.bias).abs().max().item() == 0 or not silent
        assert (model(x)[0] - model(x)[1]).abs().max().item() > 0 or silent


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_nets_read_rows_from_top_to_bottom(name):
    """Every row reaches the output, and a fresh network has forgotten more of the first than of the last."""
    model = small(name)
    x = torch.zeros(1, *GREY, dtype=torch.float64, requires_grad=True)
    reach = torch.autograd.grad(model(x)[0, 0], x)[0][0, 0].abs().sum(1)  # [28]
    assert (reach > 0).all()
    assert reach[-1] > reach[0]


@pytest.mark.parametrize("name", RECURRENT)
def test_gates_are_ordinary_prunable_weights(name):
    assert all(isinstance(m, nn.Linear) for m in MODELS[name]().children())
    assert [n.split(".")[1] for n in prunable(MODELS[name]())].count("bias") == len(list(MODELS[name]().children()))


@pytest.mark.parametrize("name", ["alexnet_s", "vgg_like", "wrn_16_8", "lstm_s", "gru_s", "lenet5"])
def test_every_parameter_gets_a_gradient(name):
    model = small(name, dtype=torch.float32)
    x = torch.randn(4, *GREY, generator=generator(0, "x"))
    F.cross_entropy(model(x), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        if parameter.dim() > 1:
            assert parameter.grad.count_nonzero() > 0, parameter_name


@pytest.mark.parametrize("name", ["lenet300", "lstm_s", "gru_s"])
def test_a_copy_computes_the_same(name):
    model = small(name)
    x = torch.randn(2, *GREY, dtype=torch.float64, generator=generator(0, "x"))
    assert torch.equal(model(x), copy.deepcopy(model)(x))
