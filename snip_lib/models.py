"""The paper's networks as plain modules, each with its parameter count.

Section 5 of the paper, Table 2; where the text is silent the layouts follow the counts it prints and, for
the LeNets, AlexNets and VGGs, the released code. m counts weights and biases, never batch norm.
``MODELS[name](shape, n_classes)`` builds one; `shape` is that of one example, (C, H, W). Every network
takes images [B, C, H, W] and returns logits [B, n_classes]. Next: `inits`, for where the weights start.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU; m = 266,200 weights + 410 biases = 266,610."""

    def __init__(self, shape: Shape = (1, 28, 28), n_classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(shape[0] * shape[1] * shape[2], 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))  # [B, 784] -> [B, 300]
        return self.fc3(F.relu(self.fc2(x)))  # [B, n_classes]


class LeNet5(nn.Module):
    """LeNet-5-Caffe: two 5x5 convolutions, two linear layers; m = 430,500 + 580 = 431,080.

    As in Caffe's example there is no ReLU after the convolutions, only max-pooling.
    """

    def __init__(self, shape: Shape = (1, 28, 28), n_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, n_classes)

    # choice: book/choices.md#lenet-5-caffe
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)  # [B, 20, 12, 12]
        x = F.max_pool2d(self.conv2(x), 2)  # [B, 50, 4, 4]
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # [B, n_classes]


# ------------------------------------------------------------------------- convolutional, for CIFAR


class SameConv2d(nn.Conv2d):
    """A convolution with bias and TensorFlow's "same" padding: [B, C, H, W] -> [B, C', ceil(H/s), ceil(W/s)].

    Of the max((ceil(n/s) - 1) s + k - n, 0) zeros along a side of length n, the odd one is right or below.
    `k` is odd, so at stride 1 this is the usual k // 2 on either side.
    """

    def __init__(self, c_in: int, c_out: int, k: int, stride: int = 1):
        super().__init__(c_in, c_out, k, stride, padding=k // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            h, w = (
                max((-(n // -s) - 1) * s + k - n, 0)
                for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
            )
            x = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))  # choice: book/choices.md#same-padding
        return super().forward(x)


# TensorFlow's momentum 0.99 is 0.01 in PyTorch, which weighs the new statistics and not the old ones.
# choice: book/choices.md#batch-norm-constants
conv_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
fc_norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)


def first_stride(shape: Shape) -> int:
    """Return what the first stride is multiplied by: 2 for 64x64 images, so that all later shapes are CIFAR's."""
    return 2 if shape[1] > 32 else 1


def fc_layers(widths: list[int]) -> OrderedDict[str, nn.Module]:
    """Return linear layers fc1, fc2, ... of these widths; all but the last with batch norm and ReLU."""
    layers = OrderedDict(flatten=nn.Flatten())  # [B, C, 1, 1] -> [B, C]
    for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True), 1):
        layers[f"fc{i}"] = nn.Linear(n_in, n_out)
        if i < len(widths) - 1:
            layers |= {f"fc_norm{i}": fc_norm(n_out), f"fc_relu{i}": nn.ReLU()}
    return layers


class AlexNet(nn.Sequential):
    """AlexNet for 32x32 images: five convolutions of stride 2, three linear layers; batch norm after all but the last.

    AlexNet-s (`hidden` 1024): m = 5,066,784 + 3,434 = 5,070,218; AlexNet-b (2048): 8,484,896 + 5,482 = 8,490,378.
    The text says 512 and 1024, but the counts it prints are those of 1024 and 2048, as in the released code.
    At 64x64 the first stride is 4; with 200 classes m = 5,264,968 and 8,879,688.
    """

    def __init__(self, shape: Shape = (3, 32, 32), n_classes: int = 10, *, hidden: int):
        layers, c_in = OrderedDict(), shape[0]
        plan = (96, 11), (256, 5), (384, 3), (384, 3), (256, 3)  # side 32 -> 16, 8, 4, 2, 1
        for i, (c_out, k) in enumerate(plan, 1):
            layers[f"conv{i}"] = SameConv2d(c_in, c_out, k, stride=2 * first_stride(shape) if i == 1 else 2)
            layers |= {f"norm{i}": conv_norm(c_out), f"relu{i}": nn.ReLU()}
            c_in = c_out
        super().__init__(layers | fc_layers([c_in, hidden, hidden, n_classes]))  # choice: book/choices.md#alexnet


VGG_D = ((64, 3),) * 2, ((128, 3),) * 2, ((256, 3),) * 3, ((512, 3),) * 3, ((512, 3),) * 3  # (channels, kernel)
VGG_C = (*VGG_D[:2], *((*stage[:2], (stage[2][0], 1)) for stage in VGG_D[2:]))


class VGG(nn.Sequential):
    """VGG-16 for 32x32 images: thirteen convolutions in five stages, each closed by max-pooling; then linear layers.

    VGG-D: all kernels 3x3, fc 512-512-512-10, m = 15,239,872 + 5,258 = 15,245,130. VGG-C: convolutions 7, 10
    and 13 are 1x1, m = 10,521,280 + 5,258 = 10,526,538. VGG-like: VGG-D with one hidden linear layer less,
    m = 14,977,728 + 4,746 = 14,982,474. Batch norm after every layer but the last, no dropout.
    At 64x64 the first stride is 2; with 200 classes m = 10,624,008 (C), 15,342,600 (D), 15,079,944 (like).
    """

    def __init__(self, shape: Shape = (3, 32, 32), n_classes: int = 10, *, stages=VGG_D, hidden: int = 2):
        layers, c_in, i = OrderedDict(), shape[0], 0
        for stage, convolutions in enumerate(stages, 1):
            for c_out, k in convolutions:
                i += 1
                layers[f"conv{i}"] = SameConv2d(c_in, c_out, k, stride=first_stride(shape) if i == 1 else 1)
                layers |= {f"norm{i}": conv_norm(c_out), f"relu{i}": nn.ReLU()}
                c_in = c_out
            layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)  # side 32 -> 16, 8, 4, 2, 1
        super().__init__(layers | fc_layers([c_in] + [512] * hidden + [n_classes]))


class WideBlock(nn.Module):
    """A residual block: twice batch norm -> ReLU -> 3x3 convolution, plus the input.

    Where the shape changes, a 1x1 convolution of the normalised input takes the input's place.
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.norm1 = conv_norm(c_in)
        self.conv1 = SameConv2d(c_in, c_out, 3, stride)
        self.norm2 = conv_norm(c_out)
        self.conv2 = SameConv2d(c_out, c_out, 3)
        self.shortcut = SameConv2d(c_in, c_out, 1, stride) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)  # [B, c_out, H/stride, W/stride]
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko & Komodakis (2016): three groups of (depth - 4) / 6 blocks, for 32x32 images.

    WRN-16-8: m = 10,958,666; WRN-16-10: 17,113,258; WRN-22-8: 17,153,610. Every convolution has a bias,
    the 1x1 shortcuts too: only so do the counts agree with the paper's. No dropout.
    """

    # choice: book/choices.md#wide-residual-networks
    def __init__(self, shape: Shape = (3, 32, 32), n_classes: int = 10, *, depth: int, width: int):
        super().__init__()
        self.conv1 = SameConv2d(shape[0], 16, 3, first_stride(shape))
        blocks, c_in = OrderedDict(), 16
        for group, (c_out, stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
            for block in range(1, (depth - 4) // 6 + 1):
                blocks[f"group{group}_block{block}"] = WideBlock(c_in, c_out * width, stride if block == 1 else 1)
                c_in = c_out * width
        self.blocks = nn.Sequential(blocks)
        self.norm = conv_norm(c_in)
        self.fc = nn.Linear(c_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv1(x))  # [B, C, 32, 32] -> [B, 16, 32, 32] -> [B, 64 width, 8, 8]
        x = F.relu(self.norm(x)).mean((2, 3))  # [B, 64 width]
        return self.fc(x)  # [B, n_classes]


# ------------------------------------------------------------------- recurrent, images row by row


class LSTM(nn.Module):
    """An LSTM that reads an image row by row: 28 -> h with bias, LSTM cell of h units, h -> 10.

    LSTM-s (h = 128): m = 136,586; LSTM-b (h = 256): m = 535,306. The cell is TensorFlow's, one matrix and
    one bias a gate, without peepholes: (i, j, f, o) = W [x_t, h] + b,
    c <- sigmoid(f + 1) c + sigmoid(i) tanh(j), h <- sigmoid(o) tanh(c).
    """

    # choice: book/choices.md#recurrent-networks
    # TensorFlow adds this to f in the forward pass: it is no weight, and stays when all biases are pruned.
    FORGET_BIAS = 1.0

    def __init__(self, shape: Shape = (1, 28, 28), n_classes: int = 10, *, units: int):
        super().__init__()
        self.project = nn.Linear(shape[0] * shape[2], units)
        self.gates = nn.Linear(2 * units, 4 * units)  # one matrix for the four gates, as in TensorFlow: fans too
        self.gates.parts = ["input", "candidate", "forget", "output"]  # of its rows, in this order
        self.fc = nn.Linear(units, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.project(x.permute(2, 0, 1, 3).flatten(2))  # [B, C, H, W] -> [H, B, C W] -> [H, B, units]
        h = c = torch.zeros_like(rows[0])  # [B, units]
        for row in rows.unbind():
            i, j, f, o = self.gates(torch.cat([row, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f + self.FORGET_BIAS) * c + torch.sigmoid(i) * torch.tanh(j)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.fc(h)  # [B, n_classes]


class GRU(nn.Module):
    """A GRU that reads an image row by row: 28 -> h with bias, GRU cell of h units, h -> 10.

    GRU-s (h = 128): m = 103,690; GRU-b (h = 256): m = 403,978. The cell is Cho et al.'s (2014) and
    TensorFlow's, with the reset gate before the matrix product (`nn.GRU` has it after):
    (r, u) = sigmoid(W [x_t, h] + b), n = tanh(V [x_t, r h] + d), h <- u h + (1 - u) n.
    """

    def __init__(self, shape: Shape = (1, 28, 28), n_classes: int = 10, *, units: int):
        super().__init__()
        self.project = nn.Linear(shape[0] * shape[2], units)
        self.gates = nn.Linear(2 * units, 2 * units)
        self.gates.parts = ["reset", "update"]
        # choice: book/choices.md#recurrent-networks
        # Unlike the LSTM's forget bias these ones are TensorFlow variables: they are scored and may be pruned.
        # `inits.initialise` reads where they start.
        self.gates.bias_start = 1.0
        self.candidate = nn.Linear(2 * units, units)
        self.fc = nn.Linear(units, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.project(x.permute(2, 0, 1, 3).flatten(2))  # [B, C, H, W] -> [H, B, C W] -> [H, B, units]
        h = torch.zeros_like(rows[0])  # [B, units]
        for row in rows.unbind():
            r, u = torch.sigmoid(self.gates(torch.cat([row, h], 1))).chunk(2, 1)
            n = torch.tanh(self.candidate(torch.cat([row, r * h], 1)))
            h = u * h + (1 - u) * n
        return self.fc(h)  # [B, n_classes]


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "alexnet_s": partial(AlexNet, hidden=1024),
    "alexnet_b": partial(AlexNet, hidden=2048),
    "vgg_c": partial(VGG, stages=VGG_C),
    "vgg_d": VGG,
    "vgg_like": partial(VGG, hidden=1),
    "wrn_16_8": partial(WideResNet, depth=16, width=8),
    "wrn_16_10": partial(WideResNet, depth=16, width=10),
    "wrn_22_8": partial(WideResNet, depth=22, width=8),
    "lstm_s": partial(LSTM, units=128),
    "lstm_b": partial(LSTM, units=256),
    "gru_s": partial(GRU, units=128),
    "gru_b": partial(GRU, units=256),
}

# Batch norm's constants, which the paper does not state.
# choice: book/choices.md#batch-norm-constants
BATCH_NORMS = {"tensorflow": {"eps": 1e-3, "momentum": 0.01}, "torch": {"eps": 1e-5, "momentum": 0.1}}
