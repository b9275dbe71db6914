"""Data sets as whole tensors in memory, their splits, augmentation, and the order of the batches.

Section 5 of the paper: a tenth of the training data is held out for validation. Every draw comes
from a CPU generator named by its purpose (`generator`), so that a run sees the same data everywhere.
Read `devices` next.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# md5 of every file as it lies on the disk; torchvision itself only looks whether MNIST's exist.
MD5 = {
    "MNIST": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "CIFAR10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
}
TINY_IMAGENET = {"classes": 200, "train": 500, "val": 50}  # images of a class

# torch's float64 std of MNIST's pixels on one thread is 1.2e-8 above the exact one (78.567489983), which moves
# one grey value (170) by one unit in the last place of float32. Rows were made with it, so it stays.
PINNED_SD = {"mnist": 78.56748999550044}


def generator(seed: int, purpose: str, *more: int) -> torch.Generator:
    """Return a CPU generator of its own for one purpose of one seed, such as ``(3, "batches", epoch)``."""
    name = ":".join(map(str, (purpose, seed, *more)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))


@dataclass(frozen=True)
class Raw:
    """A data set as it was published: uint8 images [N, C, H, W] and int64 labels [N]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int = 10


def data_folder() -> Path:
    """Return the folder of the data sets: `SNIP_DATA`, else ``~/.cache/snip_lib/data``."""
    return Path(os.environ.get("SNIP_DATA") or "~/.cache/snip_lib/data").expanduser().absolute()


def _digits(folder: Path) -> Raw:
    """scikit-learn's 1,797 real 8x8 digits shown as 28x28: each pixel a 3x3 block, a border of 2 zeros."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    x = x.repeat_interleave(3, 2).repeat_interleave(3, 3)  # [N, 1, 24, 24]
    x, y = F.pad(x, (2, 2, 2, 2)), torch.from_numpy(labels).long()
    return Raw(x[:1500], y[:1500], x[1500:], y[1500:])


def _missing(folder: Path, name: str) -> str | None:
    """Return the first file of data set `name` that is not in `folder`, None if all are there.

    Raises:
        ValueError: a file is damaged.
    """
    for file, md5 in MD5[name].items():
        if not (folder / file).is_file():
            return file
        if hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(
                f"{folder / file} is damaged (its md5 is not {md5}): delete it and run again to download it."
            )
    return None


def _torchvision(name: str, folder: Path) -> Raw:
    """MNIST, Fashion-MNIST or CIFAR-10 by torchvision, downloaded into `folder` where that is possible."""
    import torchvision

    dataset = getattr(torchvision.datasets, name)
    if file := _missing(folder, name):
        why = "the download left it out"
        try:
            dataset(folder, download=True)
        except Exception as failed:  # torchvision has no errors of its own; what is on the disk now tells
            why = "the download failed: " + " ".join(str(failed).split())
        if file := _missing(folder, name):
            raise FileNotFoundError(
                f"{name} is not complete: there is no {folder / file} ({why}); set SNIP_DATA to the folder that "
                f"holds {file}, or delete {folder / Path(file).parts[0]} and run again where there is a network."
            )
    train, test = dataset(folder, train=True), dataset(folder, train=False)
    x = [torch.as_tensor(part.data) for part in (train, test)]  # [N, H, W], or [N, H, W, C] for CIFAR
    x = [t.unsqueeze(1) if t.dim() == 3 else t.permute(0, 3, 1, 2).contiguous() for t in x]
    return Raw(x[0], torch.as_tensor(train.targets), x[1], torch.as_tensor(test.targets))


def _tiny_imagenet(folder: Path) -> Raw:
    """Tiny-ImageNet: 200 classes, 100,000 images 64x64 to train; the 10,000 of `val` are the test set.

    The published test set has no labels. Classes are numbered in the order of their names.
    """
    folder = folder / "tiny-imagenet-200"
    remedy = "download http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there, or set SNIP_DATA."
    if not (folder / "val" / "val_annotations.txt").is_file():
        raise FileNotFoundError(f"tiny_imagenet was looked for in {folder} and is not there: {remedy}")
    classes = sorted(path.name for path in (folder / "train").glob("n*"))
    number = {name: i for i, name in enumerate(classes)}
    train = [(path, number[c]) for c in classes for path in sorted((folder / "train" / c / "images").glob("*.JPEG"))]
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    val = [(folder / "val" / "images" / f, number[c]) for f, c, *_ in map(str.split, lines) if c in number]
    for part, found in (("train", train), ("val", val)):
        expected = TINY_IMAGENET[part] * TINY_IMAGENET["classes"]
        if len(found) != expected:
            raise FileNotFoundError(f"{folder / part} holds {len(found)} images and not {expected}: {remedy}")
    return Raw(*_decode(train), *_decode(val), TINY_IMAGENET["classes"])


def _decode(files: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    """Return the images of (path, label) pairs [N, 3, 64, 64] and their labels [N]; grey ones get 3 channels."""
    import numpy as np
    from PIL import Image

    x = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)
    for i, (path, _) in enumerate(files):
        try:
            with Image.open(path) as image:
                x[i] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing: unpack tiny-imagenet-200.zip again.") from error
        except (OSError, RuntimeError) as error:  # not a picture, cut short, or of another size
            raise ValueError(f"{path} is damaged ({error}): unpack tiny-imagenet-200.zip again.") from error
    return x, torch.tensor([label for _, label in files])


DATASETS: dict[str, Callable[[Path], Raw]] = {
    "digits": _digits,
    "mnist": functools.partial(_torchvision, "MNIST"),
    "fashion_mnist": functools.partial(_torchvision, "FashionMNIST"),
    "cifar10": functools.partial(_torchvision, "CIFAR10"),
    "tiny_imagenet": _tiny_imagenet,
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
def read_raw(name: str, folder: Path) -> tuple[Raw, Tensor]:
    """Return a data set and its table float32 [C, 256]: what each grey value of each channel becomes.

    Mean 0 and sd 1 over the full train set, per channel and before the split, as in the released code.
    From counts of the 256 grey values, so that the statistics are the same on every machine.
    """
    raw, grey = DATASETS[name](folder), torch.arange(256, dtype=torch.float64)
    channels = raw.x_train.transpose(0, 1)
    counts = torch.stack([sum(part.flatten().bincount(minlength=256) for part in c.split(5000)) for c in channels])
    n = counts.sum(1, keepdim=True)  # [C, 1]
    mean = (counts * grey).sum(1, keepdim=True) / n  # choice: book/choices.md#normalisation
    sd = PINNED_SD.get(name, ((counts * (grey - mean) ** 2).sum(1, keepdim=True) / n).sqrt())
    return raw, ((grey - mean) / sd).float()


def _normalise(x: Tensor, table: Tensor) -> Tensor:
    """Return uint8 images [N, C, H, W] as float32 by the table [C, 256], on their device."""
    first = 256 * torch.arange(len(table), dtype=torch.int32, device=x.device).view(-1, 1, 1)
    table, out = table.flatten().to(x.device), torch.empty(x.shape, device=x.device)
    for pixels, values in zip(x.split(1000), out.split(1000), strict=True):  # the indices take four bytes a pixel
        torch.index_select(table, 0, (pixels.int() + first).flatten(), out=values.view(-1))
    return out


# What a grey value becomes, from the table [C, 256] of normalised values and the brightest grey value there is:
# black is a negative number, a positive one, or zero, which decides whether it can have a score.
PIXELS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "normalised": lambda table, brightest: table,
    "inverted": lambda table, brightest: -table,
    "raw": lambda table, brightest: (torch.arange(256) / brightest).expand_as(table),
}


def split(n: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return which of `n` examples are for training and which, a tenth drawn at random, are for validation.

    Without a seed nothing is held out.
    """
    if seed is None:
        return torch.arange(n), torch.empty(0, dtype=torch.int64)
    order = torch.randperm(n, generator=generator(seed, "split"))
    val, train = order.split([n // 10, n - n // 10])
    return train, val


def load(name: str, *, seed: int | None = 0, device: torch.device | str = "cpu", pixels: str = "normalised") -> Data:
    """Return a data set split by `seed` (`split`).

    The files are read and checked once a process and folder, and kept as bytes. `pixels`: "normalised",
    "inverted" (normalised and negated) or "raw" (in [0, 1]).

    Raises:
        ValueError: unknown name or `pixels`, or a damaged file. FileNotFoundError: a file is missing.
    """
    for what, value, known in (("data set", name, DATASETS), ("pixels", pixels, PIXELS)):
        if value not in known:
            raise ValueError(f"Unknown {what} {value!r}: choose one of {', '.join(known)}.")
    raw, table = read_raw(name, data_folder())
    table = PIXELS[pixels](table, int(raw.x_train.max()))
    train, val = split(len(raw.x_train), seed)
    sets = (raw.x_train[train], raw.y_train[train]), (raw.x_train[val], raw.y_train[val]), (raw.x_test, raw.y_test)
    # Labels are copied, so that nobody can change the ones that are kept for the next run.
    tensors = (t for x, y in sets for t in (_normalise(x.to(device), table), y.to(device, copy=True)))
    return Data(*tensors, raw.n_classes)


class BatchOrder:
    """Which examples step t sees: epochs of n examples in fresh random order, joined without a gap.

    No example is dropped and every batch is full; `indices` depends on (seed, t) alone, so a
    resumed run goes on exactly where it stopped.

    Raises:
        ValueError: `batch_size` is larger than `n`.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        if batch_size > n:
            raise ValueError(f"batch_size is {batch_size}, but there are only {n} training examples.")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=generator(self.seed, "batches", epoch))

    def indices(self, steps: range) -> Tensor:
        """Return the int64 indices [steps, batch_size] of consecutive steps (from 0)."""
        first, last = steps.start * self.batch_size, steps.stop * self.batch_size
        epoch, start = divmod(first, self.n)
        epochs = torch.cat([self._epoch(e) for e in range(epoch, (last - 1) // self.n + 1)])
        return epochs[start : start + last - first].view(len(steps), self.batch_size)


def score_batch(data: Data, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `n` random training examples for scoring (D^b): x [n, C, H, W], y [n]; nested in n.

    Raises:
        ValueError: `n` is not between 1 and the number of training examples.
    """
    if not 0 < n <= len(data.x_train):
        raise ValueError(f"score_examples is between 1 and the {len(data.x_train)} training examples, not {n}.")
    chosen = torch.randperm(len(data.x_train), generator=generator(seed, "score"))[:n]
    return data.x_train[chosen], data.y_train[chosen]


def same_class_batch(data: Data, label: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `n` random training examples of one class (Figure 2): x [n, C, H, W], y [n]; nested in n.

    Raises:
        ValueError: the class has fewer than `n` training examples, or `n` is not positive.
    """
    members = (data.y_train == label).nonzero().squeeze(1)  # [examples of the class]
    if not 0 < n <= len(members):
        raise ValueError(f"Class {label} has {len(members)} training examples: a batch takes 1 or more, not {n}.")
    chosen = members[torch.randperm(len(members), generator=generator(seed, "same_class", label))[:n]]
    return data.x_train[chosen], data.y_train[chosen]


MAX_SHIFT = 4  # pixels, Section 5


def move(x: Tensor, moves: Tensor) -> Tensor:
    """Mirror images [B, C, H, W] and move them, as `moves` [B, 3] says: mirrored or not (1, 0), pixels down, right.

    What comes in from outside is 0, the mean of the train set.
    """
    (b, _, h, w), edge = x.shape, MAX_SHIFT
    at = torch.arange(edge, edge + max(b, h, w), device=x.device)
    rows, columns = at[:h] - moves[:, 1:2], at[:w] - moves[:, 2:]  # [B, H], [B, W] of the padded image
    columns = torch.where(moves[:, :1] > 0, w + 2 * edge - 1 - columns, columns)
    image = at[:b, None, None] - edge
    padded = F.pad(x, (edge,) * 4)[image, :, rows[:, :, None], columns[:, None]]
    return padded.permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]


def _draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for `n` images whether to mirror them [n, 1] and how far to move them [n, 2]."""
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (n, 2), generator=generator)
    return torch.randint(2, (n,), generator=generator)[:, None], shift


def standard(n: int, generator: torch.Generator) -> Tensor:
    """Draw the `moves` [n, 3] of Section 5: mirrored with probability 1/2 and moved up to 4 pixels each way."""
    return torch.cat(_draw(n, generator), 1)


def code(n: int, generator: torch.Generator) -> Tensor:
    """Draw the `moves` [n, 3] of the released code: none, one or both of `standard`'s two steps, a third each.

    So each step is taken for half of the images: a quarter is mirrored, almost half is moved.
    """
    flip, shift = _draw(n, generator)
    steps = torch.randint(3, (n,), generator=generator)[:, None]
    which = torch.randint(2, (n,), generator=generator)[:, None]
    return torch.cat([flip * (steps > which), shift * (steps > 1 - which)], 1)


def shift(n: int, generator: torch.Generator) -> Tensor:
    """Draw `moves` [n, 3] up to 4 pixels each way, as `standard` but never mirrored, for digits."""
    flip, moved = _draw(n, generator)
    return torch.cat([torch.zeros_like(flip), moved], 1)


# Draws the `moves` of n images; None: they stay as they are.
# choice: book/choices.md#augmentation
AUGMENTATIONS: dict[str, Callable[[int, torch.Generator], Tensor] | None] = {
    "none": None,
    "standard": standard,
    "code": code,
    "shift": shift,
}
