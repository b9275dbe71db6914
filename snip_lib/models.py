"""The paper's networks as plain modules, each with its parameter count.

Section 5 of the paper; layouts where the text is silent follow the counts it prints (FACTS 2).
``MODELS[name](shape, n_classes)`` builds one; `shape` is that of one example, (C, H, W).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU; m = 266,200 weights + 410 biases = 266,610."""

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), n_classes: int = 10):
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

    def __init__(self, shape: tuple[int, int, int] = (1, 28, 28), n_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        side = ((shape[1] - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)  # [B, 20, 12, 12]
        x = F.max_pool2d(self.conv2(x), 2)  # [B, 50, 4, 4]
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


MODELS = {"lenet300": LeNet300, "lenet5": LeNet5}
