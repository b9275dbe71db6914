"""Laws of the data: splits, batches, normalisation, augmentation, and a sentence for whatever is wrong."""

import hashlib
import os
import pickle
import shutil
import socket
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from snip_lib import data
from snip_lib.data import AUGMENTATIONS, BatchOrder, Raw, generator, load, move, same_class_batch, score_batch

# Digests of what the committed rows were made from: no change of the code may move them.
GOLDEN = {  # x_train, y_train, x_val, y_val, x_test, y_test, and the scoring batch of 100
    ("digits", 0): "752cf0d64715cebb 0f4c11bcb9e1de19 c1878584b299e3f4 18836b740d3875b5 8629c6f057004db4 "
    "883075a37454d60a af225bee8abe70eb fc2ccb4165668fc9",
    ("digits", 7): "dd9cfe1039f1ae7d e1fd8b61b20cdf8a bd8d6274a2de2f48 82a8da7db6686014 8629c6f057004db4 "
    "883075a37454d60a dd1854a9d4f8a363 ac56270e8e2046e4",
    ("mnist", 0): "5006515cd69f783b 1bc360b2e21a4f98 b923ea6af0481b1f ab66fddf49aaab50 6eb874c8aa6f8dd4 "
    "2fd8de6bdb8d1178 f8bd1b4b1833fdb6 1fd0d7d41d73feb2",
    ("mnist", 7): "3f0a3bb381ecb501 98bca54460417a1c 40243a8440e4c007 6e101bfeb0ef73a7 6eb874c8aa6f8dd4 "
    "2fd8de6bdb8d1178 49c2028a773889c3 1cbafce309d8b0ae",
    ("fashion_mnist", 7): "e6b5d945537b5cbb 16ae0094ce31951f 51b6e3517c0ddb7c f23458b32b60c422 eb3f18b80b399893 "
    "d51d859896c55775 90cdaa312e43909b 25a6dce02fbad9f5",
}
FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py"}
PARTS = "x_train", "y_train", "x_val", "y_val", "x_test", "y_test"
hypothesis = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing kept from an earlier test, and no connection to anywhere."""

    def connect(*_, **__):
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket, "create_connection", connect)
    data.read_raw.cache_clear()
    yield
    data.read_raw.cache_clear()


def real(name):
    """Skip the test unless the real data set is there."""
    if name in FOLDERS and not (os.environ.get("SNIP_DATA") and (data.data_folder() / FOLDERS[name]).is_dir()):
        pytest.skip(f"needs the real {name}: set SNIP_DATA to the folder that holds {FOLDERS[name]}")


def sha(*tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


def made(n_train=100, n_test=30, shape=(1, 4, 4), seed=0):
    """A small data set whose first pixels spell the number of the example, so that any can be recognised."""
    chance = generator(seed, "made")
    x = torch.randint(256, (n_train + n_test, *shape), generator=chance, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(len(x)) % 256
    x[:, 0, 0, 1] = torch.arange(len(x)) // 256
    y = torch.randint(10, (len(x),), generator=chance)
    return Raw(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


@pytest.fixture
def offer(monkeypatch):
    """Return a function that makes a `Raw` loadable as "made"."""

    def offer(raw):
        data.read_raw.cache_clear()
        monkeypatch.setitem(data.DATASETS, "made", lambda folder: raw)
        return raw

    return offer


def grey_values(x, like):
    """Recover the bytes of normalised images from the statistics of the train set `like`."""
    pixels = like.double()
    mean, sd = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True, correction=0)
    return (x.double() * sd + mean).round().byte()


# --- what no change of the code may move


@pytest.mark.parametrize(("name", "seed"), GOLDEN)
def test_splits_images_and_scoring_batches_of_the_committed_rows_never_change(name, seed):
    real(name)
    loaded = load(name, seed=seed)
    tensors = [getattr(loaded, part) for part in PARTS] + list(score_batch(loaded, 100, seed))
    assert " ".join(map(sha, tensors)) == GOLDEN[name, seed]


def test_batches_of_the_committed_rows_never_change():
    order = BatchOrder(54_000, 100, 0)
    batches = [order.indices(range(step, step + 1))[0] for step in (0, 1, 539, 540, 541, 12_499)]
    assert sha(*batches) == "3807dc6097820c2e"
    order = BatchOrder(1_350, 50, 3)
    assert sha(*order.indices(range(60))) == "f07a364af0c70f16"


def test_batches_of_one_class_of_the_committed_rows_never_change():
    loaded = load("digits")
    assert [sha(*same_class_batch(loaded, label, 50, 0)) for label in (0, 7)] == [
        "b1b99da7aec1d4e6",
        "8109ff0018c1766b",
    ]


def augmented(name, x, chance):
    """Return images [B, C, H, W] augmented by what the generator `chance` draws."""
    draw = AUGMENTATIONS[name]
    return move(x, draw(len(x), chance).to(x.device)) if draw else x


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_moves_of_the_committed_rows_never_change(name):
    """Which image is mirrored and moved, and how far, goes by the order of the draws."""
    moved = augmented(name, torch.arange(5 * 81.0).view(5, 1, 9, 9), generator(0, "augment", 1))
    expected = {
        "none": "f855b4c36b74dcc9",
        "standard": "aee3778b5f86dbcb",
        "code": "ff12b04e88716924",
        "shift": "e6295b5d8edbc82e",
    }
    assert sha(moved) == expected[name]


@pytest.mark.parametrize(
    ("name", "n", "counts", "mean", "sd"),
    [
        ("mnist", 60_000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], [0.1307], [0.3081]),
        ("fashion_mnist", 60_000, [6000] * 10, [0.2860], [0.3530]),
        ("cifar10", 50_000, [5000] * 10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_data_have_their_known_sizes_labels_and_statistics(name, n, counts, mean, sd):
    real(name)
    raw, table = data.read_raw(name, data.data_folder())
    side = 32 if name == "cifar10" else 28
    assert raw.x_train.shape == (n, len(mean), side, side)
    assert raw.x_test.shape == (10_000, len(mean), side, side)
    assert raw.y_train.bincount().tolist() == counts
    scale = 1 / (table[:, 1] - table[:, 0]) / 255
    torch.testing.assert_close(scale, torch.tensor(sd), atol=1e-4, rtol=0)
    torch.testing.assert_close(-table[:, 0] * scale, torch.tensor(mean), atol=1e-4, rtol=0)


def test_real_cifar_is_torchvisions():
    real("cifar10")
    raw, _ = data.read_raw("cifar10", data.data_folder())
    image, label = torchvision.datasets.CIFAR10(data.data_folder(), train=False)[123]
    assert torch.equal(raw.x_test[123], torchvision.transforms.functional.pil_to_tensor(image))
    assert raw.y_test[123] == label


def test_the_pinned_sd_is_the_exact_one_up_to_one_grey_value():
    real("mnist")
    raw, pinned = data.read_raw("mnist", data.data_folder())
    counts = raw.x_train.flatten().bincount(minlength=256).double()
    grey = torch.arange(256, dtype=torch.float64)
    mean = (counts * grey).sum() / counts.sum()
    exact = ((grey - mean) / ((counts * (grey - mean) ** 2).sum() / counts.sum()).sqrt()).float()
    assert (exact != pinned[0]).nonzero().flatten().tolist() == [170]
    torch.testing.assert_close(pinned[0], exact, rtol=1.2e-7, atol=0)


# --- loading


def test_digits_are_blocks_of_3_in_a_border_of_2():
    from sklearn.datasets import load_digits

    raw = data._digits(data.data_folder())
    pixels, labels = load_digits(return_X_y=True)
    assert (len(raw.x_train), len(raw.x_test)) == (1500, 297)
    assert raw.x_train.shape[1:] == (1, 28, 28)
    for i, j in [(0, 0), (3, 5), (7, 7)]:
        block = torch.cat([raw.x_train, raw.x_test])[:, 0, 2 + 3 * i : 5 + 3 * i, 2 + 3 * j : 5 + 3 * j]
        assert torch.equal(block, torch.from_numpy(pixels[:, 8 * i + j]).byte().view(-1, 1, 1).expand(-1, 3, 3))
    assert raw.x_train[:, :, :2].sum() == raw.x_train[:, :, -2:].sum() == 0
    assert raw.x_train[..., :2].sum() == raw.x_train[..., -2:].sum() == 0
    assert torch.equal(torch.cat([raw.y_train, raw.y_test]), torch.from_numpy(labels))


@hypothesis
@given(st.integers(10, 400), st.integers(1, 40), st.integers(0, 2**31))
def test_a_tenth_of_the_train_set_is_for_validation_and_the_test_set_is_untouched(offer, n_train, n_test, seed):
    raw = offer(made(n_train, n_test))
    loaded = load("made", seed=seed)
    assert len(loaded.x_val) == n_train // 10
    x = grey_values(torch.cat([loaded.x_train, loaded.x_val]), raw.x_train)
    number = x[:, 0, 0, 0].long() + 256 * x[:, 0, 0, 1].long()
    assert sorted(number.tolist()) == list(range(n_train))
    assert torch.equal(x, raw.x_train[number])
    assert torch.equal(torch.cat([loaded.y_train, loaded.y_val]), raw.y_train[number])
    assert torch.equal(grey_values(loaded.x_test, raw.x_train), raw.x_test)
    assert torch.equal(loaded.y_test, raw.y_test)


def test_without_a_seed_nothing_is_held_out(offer):
    raw = offer(made())
    loaded = load("made", seed=None)
    assert torch.equal(grey_values(loaded.x_train, raw.x_train), raw.x_train) and len(loaded.y_val) == 0
    assert torch.equal(loaded.y_train, raw.y_train) and loaded.x_val.shape == (0, 1, 4, 4)


def test_the_seed_decides_the_split(offer):
    offer(made())
    assert torch.equal(load("made", seed=1).x_val, load("made", seed=1).x_val)
    assert not torch.equal(load("made", seed=1).x_val, load("made", seed=2).x_val)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalised_per_channel_by_the_whole_train_set(offer, channels):
    raw = made(2500, 30, (channels, 4, 4))
    raw.x_train[:, -1] //= 3  # channels of different mean and sd, and another test set
    raw.x_test[:] //= 2
    offer(raw)
    loaded, x = load("made"), raw.x_train.double()
    mean, sd = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    assert loaded.x_test.dtype == torch.float32
    torch.testing.assert_close(loaded.x_test, ((raw.x_test.double() - mean) / sd).float(), rtol=1.2e-7, atol=0)
    train = torch.randperm(2500, generator=generator(0, "split"))[250:]
    torch.testing.assert_close(loaded.x_train, ((x[train] - mean) / sd).float(), rtol=1.2e-7, atol=0)


def test_files_are_read_once_a_folder_and_a_changed_folder_is_honoured(monkeypatch, tmp_path):
    read = []

    def reader(folder):
        read.append(folder)
        return made(seed=len(read))

    monkeypatch.setitem(data.DATASETS, "made", reader)
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "one"))
    first = load("made")
    load("made", seed=1)
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "two"))
    second = load("made")
    assert read == [tmp_path / "one", tmp_path / "two"]
    assert not torch.equal(first.x_test, second.x_test)


def test_changing_what_was_loaded_changes_no_later_run(offer):
    offer(made())
    loaded = load("made")
    for part in PARTS:
        getattr(loaded, part).fill_(-1)
    again, untouched = load("made"), made()
    assert torch.equal(again.y_test, untouched.y_test)
    assert torch.equal(grey_values(again.x_test, untouched.x_train), untouched.x_test)


def test_the_data_folder_is_absolute_and_has_a_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNIP_DATA", "here")
    assert data.data_folder() == tmp_path / "here"
    monkeypatch.delenv("SNIP_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_folder() == tmp_path / ".cache/snip_lib/data"


def test_an_unknown_data_set_gets_a_sentence():
    with pytest.raises(ValueError, match=r"Unknown data set 'mnits': choose one of digits, mnist, .*tiny_imagenet\."):
        load("mnits")


# --- files, as torchvision reads them


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_mnist(folder, n=(20, 10)):
    """Write a small MNIST in its published format; return the images and the labels."""
    (folder / "MNIST/raw").mkdir(parents=True)
    found = []
    for part, count in zip(("train", "t10k"), n, strict=True):
        x = torch.randint(256, (count, 28, 28), generator=generator(count, "mnist"), dtype=torch.uint8)
        y = (torch.arange(count) % 10).byte()
        for kind, magic, t in (("images-idx3", 0x803, x), ("labels-idx1", 0x801, y)):
            head = b"".join(int(v).to_bytes(4, "big") for v in (magic, *t.shape))
            (folder / f"MNIST/raw/{part}-{kind}-ubyte").write_bytes(head + t.numpy().tobytes())
        found += [x, y]
    return found


def write_cifar(folder, n=8):
    """Write a small CIFAR-10 in its published format; return the test images [n, 3, 32, 32] and labels."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = torch.randint(256, (n, 3072), generator=generator(i, "cifar"), dtype=torch.uint8).numpy()
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(n))}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return torch.from_numpy(rows).view(n, 3, 32, 32), torch.arange(n)


@pytest.fixture
def small_files(monkeypatch, tmp_path):
    """A folder with a small MNIST and CIFAR-10 that pass for whole; SNIP_DATA names it."""
    folder = tmp_path / "data"
    parts = {"mnist": write_mnist(folder), "cifar10": write_cifar(folder)}
    for name in ("MNIST", "CIFAR10"):
        monkeypatch.setitem(data.MD5, name, {file: md5(folder / file) for file in data.MD5[name]})
    cifar, sums = torchvision.datasets.CIFAR10, {f.split("/")[1]: m for f, m in data.MD5["CIFAR10"].items()}
    monkeypatch.setattr(cifar, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setenv("SNIP_DATA", str(folder))
    return folder, parts


@pytest.fixture
def download(monkeypatch):
    """Return the list of downloads tried; each fails as without a network, unless `.way` is replaced."""

    class Downloads(list):
        def way(self, url, *_, **__):
            raise URLError("Temporary failure in name resolution")

    downloads = Downloads()

    def fetch(url, *args, **kwargs):
        downloads.append(url)
        downloads.way(url, *args, **kwargs)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fetch)
    return downloads


def test_mnist_is_read_as_published(small_files, download):
    x_train, y_train, x_test, y_test = small_files[1]["mnist"]
    raw = data.DATASETS["mnist"](small_files[0])
    assert torch.equal(raw.x_train, x_train.unsqueeze(1))
    assert torch.equal(raw.x_test, x_test.unsqueeze(1))
    assert torch.equal(raw.y_train, y_train.long())
    assert raw.y_test.tolist() == y_test.tolist()
    assert load("mnist").shape == (1, 28, 28)
    assert not download


def test_cifar_is_read_as_published(small_files, download):
    x_test, y_test = small_files[1]["cifar10"]
    raw = data.DATASETS["cifar10"](small_files[0])
    assert torch.equal(raw.x_test, x_test)
    assert torch.equal(raw.y_test, y_test)
    assert raw.x_train.shape == (40, 3, 32, 32)
    assert raw.x_train.is_contiguous()
    assert raw.y_train.dtype == raw.y_test.dtype == torch.int64
    assert load("cifar10").shape == (3, 32, 32)
    assert not download


def test_md5_of_cifar_are_torchvisions():
    cifar = torchvision.datasets.CIFAR10
    theirs = dict([*cifar.train_list, *cifar.test_list])
    theirs[cifar.meta["filename"]] = cifar.meta["md5"]
    assert data.MD5["CIFAR10"] == {f"{cifar.base_folder}/{name}": sum_ for name, sum_ in theirs.items()}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_4"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
    ],
)
class TestFiles:
    def test_a_missing_file_is_named_with_place_and_remedy(self, small_files, download, name, file):
        folder, _ = small_files
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError) as raised:
            load(name)
        sentence = str(raised.value)
        assert f"there is no {folder / file} (the download failed: " in sentence
        assert f"set SNIP_DATA to the folder that holds {file}, or delete {folder / file.split('/')[0]} and" in sentence
        assert "\n" not in sentence
        if not file.endswith("meta"):  # torchvision would not download the archive for that one
            assert "Temporary failure in name resolution" in sentence
            assert download

    def test_a_damaged_file_is_named_and_not_read(self, small_files, download, name, file):
        folder, _ = small_files
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged \(its md5 is not [0-9a-f]{32}\): delete it") as raised:
            load(name)
        assert str(raised.value).startswith(str(folder / file))
        assert not download

    def test_what_was_wrong_can_be_mended_without_a_new_process(self, small_files, download, name, file):
        folder, _ = small_files
        (folder / file).rename(folder / "aside")
        with pytest.raises(FileNotFoundError):
            load(name)
        (folder / "aside").rename(folder / file)
        load(name)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_what_is_missing_is_downloaded(small_files, download, monkeypatch, tmp_path, name):
    folder, _ = small_files
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "empty"))
    download.way = lambda *_, **__: shutil.copytree(folder, tmp_path / "empty", dirs_exist_ok=True)
    load(name)
    assert download


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_download_that_comes_damaged_is_refused(small_files, download, monkeypatch, tmp_path, name):
    folder, _ = small_files
    file = next(iter(data.MD5[{"mnist": "MNIST", "cifar10": "CIFAR10"}[name]]))
    (folder / file).write_bytes(b"<html>not found</html>")
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "empty"))
    download.way = lambda *_, **__: shutil.copytree(folder, tmp_path / "empty", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is damaged"):
        load(name)


def test_a_folder_that_cannot_be_written_is_said_to_be_one(download, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SNIP_DATA", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=r"MNIST is not complete: .*the download failed: .*Not a directory"):
        load("mnist")


# --- Tiny-ImageNet


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A Tiny-ImageNet of two classes with three images to train and two to test each; some are grey."""
    monkeypatch.setattr(data, "TINY_IMAGENET", {"classes": 2, "train": 3, "val": 2})
    monkeypatch.setenv("SNIP_DATA", str(tmp_path))
    folder = tmp_path / "tiny-imagenet-200"

    def write(path, level, grey):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((64, 64) if grey else (64, 64, 3), level, dtype=np.uint8)
        pixels[:8] = 255
        if not grey:
            pixels[..., 2] = 0  # no blue: the order of the channels shows
        Image.fromarray(pixels).save(path, "JPEG", quality=100, subsampling=0)

    for c, name in enumerate(("n02", "n01")):
        for i in range(3):
            write(folder / "train" / name / "images" / f"{name}_{i}.JPEG", 100 + 50 * c + 5 * i, grey=i == 1)
    lines = []
    for i, name in enumerate(("n02", "n01", "n01", "n02")):
        write(folder / "val" / "images" / f"val_{i}.JPEG", 20 * (i + 1), grey=False)
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_tiny_imagenet_is_read_from_its_usual_folder(tiny):
    raw = data._tiny_imagenet(tiny.parent)
    assert raw.x_train.shape == (6, 3, 64, 64)
    assert raw.x_train.dtype == torch.uint8
    assert raw.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert raw.y_test.tolist() == [1, 0, 0, 1]
    assert raw.n_classes == 2
    levels = raw.x_train[:, 0, 40, 40].int() - torch.tensor([150, 155, 160, 100, 105, 110])
    assert levels.abs().max() <= 2  # JPEG
    assert (raw.x_train[:, 0, :4] > 240).all()  # the bright rows are at the top
    assert (raw.x_train[[0, 2, 3, 5], 2] < 8).all()
    for grey in (1, 4):  # one channel becomes three equal ones
        assert torch.equal(raw.x_train[grey, 0], raw.x_train[grey, 2])
    assert (raw.x_test[:, 1, 40, 40].int() - torch.tensor([20, 40, 60, 80])).abs().max() <= 2


def test_tiny_imagenets_val_folder_is_the_test_set(tiny, monkeypatch):
    loaded = load("tiny_imagenet")
    assert loaded.shape == (3, 64, 64)
    assert (len(loaded.x_train) + len(loaded.x_val), len(loaded.x_test)) == (6, 4)


def test_tiny_imagenet_missing_or_not_whole_gets_a_sentence(tiny):
    (tiny / "val/images/val_2.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_2\.JPEG is missing: unpack"):
        load("tiny_imagenet")
    (tiny / "train/n01/images/n01_0.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"train holds 5 images and not 6: download"):
        load("tiny_imagenet")
    shutil.rmtree(tiny)
    with pytest.raises(FileNotFoundError, match=r"was looked for in .*tiny-imagenet-200 and is not there: download"):
        load("tiny_imagenet")


@pytest.mark.parametrize("damage", ["cut short", "no picture", "another size"])
def test_a_damaged_picture_is_named(tiny, damage):
    path = tiny / "train/n02/images/n02_2.JPEG"
    if damage == "another size":
        Image.new("RGB", (32, 48)).save(path, "JPEG")
    else:
        path.write_bytes(path.read_bytes()[:400] if damage == "cut short" else b"<html>")
    with pytest.raises(ValueError, match=r"n02_2\.JPEG is damaged \("):
        load("tiny_imagenet")


# --- batches


@hypothesis
@given(st.data())
def test_every_epoch_shows_every_example_once(draw):
    n = draw.draw(st.integers(1, 60))
    size, seed = draw.draw(st.integers(1, n)), draw.draw(st.integers(0, 9))
    order = BatchOrder(n, size, seed)
    seen = order.indices(range(3 * n)).flatten()
    assert len(seen) == 3 * n * size
    for epoch in range(3 * size):
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@hypothesis
@given(st.integers(0, 300), st.integers(1, 30), st.integers(0, 5))
def test_a_batch_depends_on_seed_and_step_alone(step, more, seed):
    walked = BatchOrder(37, 10, seed)
    single = torch.cat([walked.indices(range(i, i + 1)) for i in range(step + more)])
    assert torch.equal(BatchOrder(37, 10, seed).indices(range(step, step + more)), single[step:])


def test_epochs_and_seeds_differ():
    order = BatchOrder(100, 100, 0)
    first, second = order.indices(range(2))
    assert not torch.equal(first, second) and not torch.equal(first, BatchOrder(100, 100, 1).indices(range(1))[0])


def test_a_batch_larger_than_the_train_set_gets_a_sentence():
    with pytest.raises(ValueError, match=r"batch_size is 101, but there are only 100 training examples\."):
        BatchOrder(100, 101, 0)


def test_generators_differ_by_seed_purpose_and_more():
    names = [(0, "init"), (1, "init"), (0, "split"), (0, "batches", 0), (0, "batches", 1), (0, "batches", 1, 0)]
    draws = {int(torch.randint(2**62, (1,), generator=generator(*name))) for name in names}
    assert len(draws) == len(names)
    assert generator(0, "init").device.type == "cpu"


def examples(x, raw):
    """Return the numbers of these training examples."""
    x = grey_values(x, raw.x_train)
    return (x[:, 0, 0, 0].long() + 256 * x[:, 0, 0, 1].long()).tolist()


@hypothesis
@given(st.integers(1, 90), st.integers(0, 99))
def test_scoring_batches_are_distinct_training_examples_nested_in_their_size(offer, n, seed):
    raw = offer(made())
    loaded = load("made", seed=seed)
    x, y = score_batch(loaded, n, seed)
    chosen = examples(x, raw)
    assert len(set(chosen)) == len(chosen) == n
    assert set(chosen) <= set(examples(loaded.x_train, raw))
    assert torch.equal(y, raw.y_train[chosen])
    assert torch.equal(x, score_batch(loaded, 90, seed)[0][:n])


@pytest.mark.parametrize("n", [0, -1, 91])
def test_a_wrong_number_of_scoring_examples_gets_a_sentence(offer, n):
    offer(made())
    with pytest.raises(ValueError, match=rf"score_examples is between 1 and the 90 training examples, not {n}\."):
        score_batch(load("made"), n, 0)


@pytest.mark.parametrize("label", range(10))
def test_same_class_batches_are_distinct_training_examples_of_one_class(offer, label):
    raw = offer(made(400))
    loaded = load("made")
    there = int((loaded.y_train == label).sum())
    x, y = same_class_batch(loaded, label, there, 0)
    assert (y == label).all()
    chosen = examples(x, raw)
    assert len(set(chosen)) == len(chosen) == there
    assert set(chosen) <= set(examples(loaded.x_train, raw))
    assert (raw.y_train[chosen] == label).all()
    assert torch.equal(same_class_batch(loaded, label, 5, 0)[0], x[:5])
    assert not torch.equal(same_class_batch(loaded, label, 5, 1)[0], x[:5])


def test_a_class_with_too_few_examples_gets_a_sentence(offer):
    offer(made())
    loaded = load("made")
    there = int((loaded.y_train == 3).sum())
    for label, n, found in ((3, there + 1, there), (3, 0, there), (11, 1, 0)):
        with pytest.raises(ValueError, match=rf"Class {label} has {found} training examples: .* not {n}\."):
            same_class_batch(loaded, label, n, 0)


# --- augmentation


def moved_by_loops(image, flip, down, right):
    """Mirror one image [C, H, W], then move it, pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            r, c = i - down, j - right
            if 0 <= r < height and 0 <= c < width:
                out[:, i, j] = image[:, r, width - 1 - c if flip else c]
    return out


@hypothesis
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.integers(0, 99))
def test_moving_a_batch_is_moving_each_image(channels, height, width, seed):
    chance = generator(seed, "test")
    x = torch.randn(6, channels, height, width, generator=chance)
    moves = torch.cat([torch.randint(2, (6, 1), generator=chance), torch.randint(-4, 5, (6, 2), generator=chance)], 1)
    expected = torch.stack([moved_by_loops(a, *one) for a, one in zip(x, moves.tolist(), strict=True)])
    before = x.clone()
    assert torch.equal(move(x, moves), expected)
    assert torch.equal(x, before)


MOVES = [(flip, down, right) for flip in (False, True) for down in range(-4, 5) for right in range(-4, 5)]


def share(name, move):
    """The probability of a move, from the definition of the augmentation."""
    flip, *shift = move
    if name == "standard":
        return 1 / 162
    third, still = 1 / 3, shift == [0, 0]
    both = third / 162
    only_flip, only_shift, neither = third / 4 * still, third / 2 / 81 * (not flip), third * still * (not flip)
    return both + only_flip + only_shift + neither


@pytest.mark.parametrize("name", ["standard", "code"])
def test_every_augmented_image_is_a_move_and_moves_are_as_frequent_as_they_should_be(name):
    n, chance = 8_000, generator(0, "test")
    image = torch.randn(2, 5, 6, generator=chance)
    found = augmented(name, image.expand(n, -1, -1, -1), chance)
    counts = Counter()
    for one in MOVES:
        counts[one] = int((found == moved_by_loops(image, *one)).flatten(1).all(1).sum())
    assert counts.total() == n
    expected = {one: n * share(name, one) for one in MOVES}
    assert sum(expected.values()) == pytest.approx(n)
    chi2 = sum((counts[one] - e) ** 2 / e for one, e in expected.items())
    assert chi2 < 161 + 5 * (2 * 161) ** 0.5


def test_code_mirrors_a_quarter_and_moves_almost_half():
    flipped = sum(share("code", one) for one in MOVES if one[0])
    shifted = sum(share("code", one) for one in MOVES if one[1:] != (0, 0))
    assert (flipped, shifted) == (pytest.approx(1 / 4), pytest.approx(40 / 81))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_augmentation_draws_from_the_generator_alone_and_keeps_shape_and_type(name, dtype):
    x = torch.randn(7, 3, 8, 10, generator=generator(0, "x")).to(dtype)
    state = torch.get_rng_state()
    once, again, other = (augmented(name, x, generator(seed, "augment")) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once, again)
    assert torch.equal(once, other) == (name == "none")
    assert (once.shape, once.dtype) == (x.shape, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_gpu_sees_the_same_images(offer, name):
    offer(made(shape=(3, 9, 9)))
    here, there = load("made"), load("made", device="cuda")
    for part in PARTS:
        assert torch.equal(getattr(here, part), getattr(there, part).cpu())
    assert torch.equal(*(augmented(name, d.x_train, generator(0, "augment")).cpu() for d in (here, there)))
    for tensor in (*score_batch(there, 10, 0), *same_class_batch(there, 0, 1, 0)):
        assert tensor.device.type == "cuda"
