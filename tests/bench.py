"""How fast training is beside the loop that everybody writes: `make bench`, or `make bench ARGS=--json`.

Rounds are interleaved in one process, so that a machine that slows down slows down every column; the table
gives medians over the rounds. No test asserts a time. The loops:

ordinary   DataLoader over PIL images, torchvision's ToTensor and Normalize, torch.optim.SGD, every core
resident   `snip_lib.train`, one run on one core: whole data set in memory, masked gradients, fused update
two        the same in two processes at once, one core each: what ``cluster="local"`` does on two cores

Also: one scoring beside one training step, and the selection of kappa among 15 million scores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from snip_lib import keep_top, train
from snip_lib.data import DATASETS, load
from snip_lib.runs import Run
from snip_lib.saliency import snip

STEPS = {"lenet300": 400, "lenet5": 60}


class Images(Dataset):
    """Real digits as PIL images through torchvision's transforms, one at a time, as a folder of files would be."""

    def __init__(self):
        from torchvision import transforms

        raw = DATASETS["digits"]()
        self.x, self.y = raw.x_train.numpy()[:, 0], raw.y_train
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def __len__(self):
        return 60_000

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i % len(self.x)])), self.y[i % len(self.y)]


def ordinary(model_name: str) -> float:
    """Return the steps per second of the ordinary loop, one network on every core."""
    torch.set_num_threads(os.cpu_count())
    model = train.initial_model(Run(model_name, "digits"), load("digits"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = iter(DataLoader(Images(), batch_size=100, shuffle=True))
    for step in range(steps := STEPS[model_name] // 2):
        if step == steps // 4:
            began = time.perf_counter()
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (steps - steps // 4) / (time.perf_counter() - began)


def resident(model_name: str) -> float:
    """Return the steps per second of `snip_lib.train`, one run on one core, without start and evaluation."""
    steps, times = STEPS[model_name], []
    run = Run(model_name, "digits", sparsity=0.9, lr=0.01, steps=40 * steps, decay_every=40 * steps)

    def tick(step):
        times.append((step, time.perf_counter()))

    train.train(run, tick=tick, deadline=_Until(lambda: bool(times) and times[-1][0] >= steps + 100))
    (first, began), (last, ended) = times[0], times[-1]
    return (last - first) / (ended - began)


class _Until(float):
    """A deadline that comes when a condition holds."""

    def __new__(cls, condition):
        self = super().__new__(cls, "inf")
        self.condition = condition
        return self

    def __lt__(self, _):
        return self.condition()


def two(model_name: str, pool) -> float:
    """Return the steps per second of two runs at once, one process each."""
    return sum(pool.map(resident, [model_name] * 2, chunksize=1))


def median_ms(call, n: int = 20) -> float:
    """Return the median time of a call in milliseconds, after two that do not count."""
    times = []
    for i in range(n + 2):
        began = time.perf_counter()
        call()
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def scoring(model_name: str) -> dict:
    """Return the milliseconds of one scoring in float32 and of one plain forward and backward pass."""
    torch.set_num_threads(1)
    data = load("digits")
    model = train.initial_model(Run(model_name, "digits"), data)
    x, y = data.x_train[:100], data.y_train[:100]

    def step():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    score, plain = median_ms(lambda: snip(model, x, y)), median_ms(step)
    return {"scoring ms": score, "forward + backward ms": plain, "ratio": score / plain}


def selection(n: int = 15_000_000) -> dict:
    """Return the milliseconds that the selection of 5 % among `n` scores takes on one core."""
    torch.set_num_threads(1)
    scores = {"w": torch.rand(n, generator=torch.Generator().manual_seed(0))}
    return {"selection of 5 % of 15 M ms": median_ms(lambda: keep_top(scores, n // 20), n=3)}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 32)
    table = {}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for model_name in STEPS:
            rounds = []
            for i in range(options.rounds + 1):
                measured = {"ordinary": ordinary(model_name)}
                measured["resident"] = pool.apply(resident, [model_name])
                measured["two"] = two(model_name, pool)
                if i:  # the first round warms up
                    rounds.append(measured)
            rates = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            ratios = {
                f"{name} / ordinary": statistics.median(r[name] / r["ordinary"] for r in rounds)
                for name in ("resident", "two")
            }
            table[model_name] = {f"{name} steps/s": rate for name, rate in rates.items()} | ratios | scoring(model_name)
    table["masks"] = selection()
    if options.json:
        print(json.dumps(table, indent=1))
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, medians of {options.rounds} interleaved rounds")
    for title, numbers in table.items():
        for name, value in numbers.items():
            print(f"{title:10} {name:30} {value:12.2f}")


if __name__ == "__main__":
    main()
