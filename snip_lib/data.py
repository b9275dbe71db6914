"""Data sets as whole tensors in memory, their splits, and the order of the batches.

Section 5 of the paper: a tenth of the training data is held out for validation. Every draw comes
from a CPU generator named by its purpose (`generator`), so that a run sees the same data everywhere.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# md5 of every file as it lies on the disk; torchvision itself only looks whether MNIST's exist.
MD5 = {
    "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


def generator(seed: int, purpose: str, *more: int) -> torch.Generator:
    """Return a CPU generator of its own for one purpose of one seed, such as ``(3, "batches", epoch)``."""
    name = ":".join(map(str, (purpose, seed, *more)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))


@dataclass(frozen=True)
class Raw:
    """A data set as it was published: uint8 images [N, C, H, W] and labels [N]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int = 10


def data_folder() -> Path:
    """Return the folder of the data sets: `SNIP_DATA`, else ``~/.cache/snip_lib/data``."""
    return Path(os.environ.get("SNIP_DATA") or "~/.cache/snip_lib/data").expanduser()


def _digits() -> Raw:
    """scikit-learn's 1,797 real 8x8 digits shown as 28x28: each pixel a 3x3 block, a border of 2 zeros."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    x = x.repeat_interleave(3, 2).repeat_interleave(3, 3)  # [N, 1, 24, 24]
    x, y = torch.nn.functional.pad(x, (2, 2, 2, 2)), torch.from_numpy(labels).long()
    return Raw(x[:1500], y[:1500], x[1500:], y[1500:])


def _check_files(folder: Path, name: str) -> None:
    """Refuse a missing or damaged file of data set `name` in one sentence."""
    for file, md5 in MD5.items():
        path = folder / file
        if not file.startswith(f"{name}/"):
            continue
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} is not complete: {path} is missing; set SNIP_DATA to the folder that holds "
                f"{file}, or run again where there is a network, and it will be downloaded."
            )
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{path} is damaged (its md5 is not {md5}): delete it and run again to download it.")


def _torchvision(name: str) -> Raw:
    """MNIST or Fashion-MNIST by torchvision, from `data_folder`, downloaded where that is possible."""
    import torchvision

    folder, dataset = data_folder(), getattr(torchvision.datasets, name)
    try:
        _check_files(folder, name)
    except FileNotFoundError as missing:
        try:
            dataset(folder, download=True)
        except (OSError, RuntimeError) as failed:
            raise FileNotFoundError(f"{missing} The download failed: {failed}") from failed
        _check_files(folder, name)
    train, test = dataset(folder, train=True), dataset(folder, train=False)
    return Raw(train.data.unsqueeze(1), train.targets, test.data.unsqueeze(1), test.targets)


DATASETS: dict[str, Callable[[], Raw]] = {
    "digits": _digits,
    "mnist": functools.partial(_torchvision, "MNIST"),
    "fashion_mnist": functools.partial(_torchvision, "FashionMNIST"),
}


@dataclass(frozen=True)
class Data:
    """One seed's splits on one device: images float32 [N, C, H, W], labels int64 [N]."""

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one example."""
        return tuple(self.x_train.shape[1:])


@functools.lru_cache(maxsize=2)
def _normalised(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a data set, train and test, at mean 0 and sd 1 of its full train set, per channel."""
    raw = DATASETS[name]()
    x = raw.x_train.double()
    # In float64 and before the split, as in the released code. choice: normalisation
    mean, sd = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    del x
    return tuple(((part.double() - mean) / sd).float() for part in (raw.x_train, raw.x_test))


def load(name: str, *, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """Return a data set split by `seed`: a tenth of the train set, drawn at random, is for validation.

    Raises:
        ValueError: unknown name, or a damaged file. FileNotFoundError: a file is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(DATASETS)}.")
    raw = DATASETS[name]()
    x_train, x_test = _normalised(name, data_folder())
    order = torch.randperm(len(x_train), generator=generator(seed, "split"))
    val, train = order.split([len(order) // 10, len(order) - len(order) // 10])
    parts = x_train[train], raw.y_train[train], x_train[val], raw.y_train[val], x_test, raw.y_test
    return Data(*(part.to(device) for part in parts), raw.n_classes)


class BatchOrder:
    """Which examples step t sees: epochs of n examples in fresh random order, joined without a gap.

    No example is dropped and every batch is full; `indices` depends on (seed, t) alone, so a
    resumed run goes on exactly where it stopped.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        if batch_size > n:
            raise ValueError(f"batch_size is {batch_size}, but there are only {n} training examples.")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=generator(self.seed, "batches", epoch))

    def indices(self, step: int) -> Tensor:
        """Return the int64 indices [batch_size] of step `step` (from 0)."""
        epoch, start = divmod(step * self.batch_size, self.n)
        batch = self._epoch(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(batch)
        return torch.cat([batch, self._epoch(epoch + 1)[:missing]]) if missing else batch


def score_batch(data: Data, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `n` random training examples for scoring (D^b): x [n, C, H, W], y [n]; nested in n."""
    if not 0 < n <= len(data.x_train):
        raise ValueError(f"score_examples is at most the {len(data.x_train)} training examples, not {n}.")
    chosen = torch.randperm(len(data.x_train), generator=generator(seed, "score"))[:n]
    return data.x_train[chosen], data.y_train[chosen]
