"""How fast training is beside the loop that everybody writes: `make bench`, or `make bench ARGS=--json`.

Rounds are interleaved, so that a machine that slows down slows down every column; the table gives medians over the
rounds, and medians of each round's ratio. No test asserts a time. Rates are model-steps a second, at batch 100:

ordinary   DataLoader over PIL images, torchvision's ToTensor and Normalize, torch.optim.SGD, every core
resident   `snip_lib.train`, one run on one core: whole data set in memory, masked gradients, fused update
engine     what `collect(..., cluster="local")` does: one process a core, with R replicas each where they pay;
           on a GPU one process with as many replicas as are asked for

`ceiling` is the share of what a matrix product of 1,024 x 1,024 float32 (8,192 x 8,192 on a GPU) reaches on the same
cores. A step of VGG-D, or of any other network for CIFAR-10, is at batch 128; on a GPU `trained step` is what a run
takes: one graph, for CIFAR-10 in bf16. Images are the digits' and, for CIFAR-10, noise: no data set is needed.

On one NVIDIA H200 with torch 2.11, 2026-11-26, by a script of the library's own calls, while a second program was
measured on the same GPU; a float32 matrix product of 8,192 x 8,192 ran at 51 TFLOP/s:

                                           ms a step   target
LeNet-300-100, R = 230, compiled                1.37      1.5
LeNet-5-Caffe, R = 35, convolutions            15.3
LeNet-5-Caffe, R = 200, patches, compiled      52.3       12   (other patches than now, which are not measured)
AlexNet-s, six side by side                     3.3
VGG-D, two side by side                         3.5
VGG-D, six side by side                         8.7
VGG-D, alone, compiled                          1.8      1.6
WRN-16-8, alone, as it is                       6.1
WRN-16-8, alone, compiled                       3.9      6.5
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from snip_lib import keep_top, replicas, train
from snip_lib.data import DATASETS, Data, load
from snip_lib.devices import arithmetic, fastest
from snip_lib.runs import Run, device_name
from snip_lib.saliency import exact_arithmetic, snip

SMALL = ("lenet300", "lenet5", "gru_s")
CIFAR = ("alexnet", "vgg", "wrn")  # how the names of the others begin
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_PROCESSES = 1 if DEVICE.type == "cuda" else os.cpu_count()
LOOK_EVERY = train.LOOK_EVERY if DEVICE.type == "cuda" else 5  # steps: a look makes a GPU wait


def run_of(model: str) -> Run:
    """Return a run of the paper's length, so that R is chosen as for one."""
    return Run(model, "digits", sparsity=0.9, lr=0.01)


# -------------------------------------------------------------------------- the loops


class Images(Dataset):
    """Real digits as PIL images through torchvision's transforms, one at a time, as a folder of files would be."""

    def __init__(self):
        from torchvision import transforms

        raw = DATASETS["digits"](Path())
        self.x, self.y = raw.x_train.numpy()[:, 0], raw.y_train
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def __len__(self):
        return 60_000

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i % len(self.x)])), self.y[i % len(self.y)]


def ordinary(model: str, seconds: float) -> float:
    """Return the steps a second of the ordinary loop, one network on every core."""
    torch.set_num_threads(os.cpu_count())
    network = train.initial_model(run_of(model), load("digits")).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    steps, began = 0, time.perf_counter()
    for i, (x, y) in enumerate(DataLoader(Images(), batch_size=100, shuffle=True)):
        if i == 3:  # the first ones do not count
            steps, began = 0, time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x.to(DEVICE)), y.to(DEVICE))
        loss.backward()
        optimizer.step()
        loss.item()  # everybody prints it
        steps += 1
        if i > 3 and time.perf_counter() - began > seconds:
            break
    return steps / (time.perf_counter() - began)


@functools.cache
def begun(model: str, n_replicas: int) -> tuple:
    """Return a run, or a group, that is ready to train, and the function that advances it."""
    run = run_of(model)
    if n_replicas == 1:
        return train.begin(run, load("digits", device=DEVICE)), train.advance
    runs = [Run(**vars(run) | {"seed": seed}) for seed in range(n_replicas)]
    compiled = replicas.pays_to_compile(run, n_replicas, DEVICE)
    return replicas.begin(runs, DEVICE, None, torch.float32, compiled), replicas.advance


def engine(model: str, n_replicas: int, seconds: float) -> float:
    """Return the model-steps a second of this process, without set-up and evaluation."""
    with arithmetic(DEVICE):
        t, advance = begun(model, n_replicas)
        advance(t, train.examples("none", t.orders, range(2), DEVICE))  # compiled by now
        t.loss_sum.tolist()
        steps, began = 0, time.perf_counter()
        ahead = train.examples("none", t.orders, range(LOOK_EVERY), DEVICE)
        while time.perf_counter() - began < seconds:
            advance(t, ahead)
            steps += LOOK_EVERY
            ahead = train.examples("none", t.orders, range(steps, steps + LOOK_EVERY), DEVICE)  # a GPU is still at work
            t.loss_sum.tolist()
        return n_replicas * steps / (time.perf_counter() - began)


def _share(barrier) -> None:
    """Give a process of the pool the barrier of them all."""
    global BARRIER
    BARRIER = barrier


def _met(call, args) -> float:
    """Call when every process of the pool has come here, so that each takes one task."""
    BARRIER.wait()
    return call(*args)


def on_every_core(pool, call, *args) -> float:
    """Return the sum of what a call gives in all processes at once."""
    return sum(pool.starmap(_met, [(call, args)] * N_PROCESSES, chunksize=1))


def product(seconds: float) -> float:
    """Return the floating-point operations a second of a float32 matrix product on one core, or on the GPU."""
    with arithmetic(DEVICE):
        side = 8192 if DEVICE.type == "cuda" else 1024
        a, b = torch.rand(2, side, side, device=DEVICE)
        (a @ b)[0, 0].item()  # what is loaded at first use does not count
        n, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                c = a @ b
            c[0, 0].item()
            n += 4
        return n * 2 * side**3 / (time.perf_counter() - began)


# -------------------------------------------------------------------- single numbers


def noise(shape: tuple[int, ...], n: int) -> Data:
    """Return a data set of noise."""
    x, y = torch.randn(n, *shape, device=DEVICE), torch.zeros(n, dtype=torch.int64, device=DEVICE)
    return Data(x, y, x[:1], y[:1], x[:1], y[:1], 10)


def medians_ms(calls: dict, n: int) -> dict:
    """Return the median milliseconds of each call over `n` interleaved rounds, after one that does not count."""
    times = {name: [] for name in calls}
    for _ in range(n + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(took[1:]) for name, took in times.items()}


def scoring(model: str, n: int) -> dict:
    """Return the milliseconds of a training step, of one in the arithmetic of scoring, and of a scoring in float32."""
    cifar = model.startswith(CIFAR)
    run = Run(model, "digits", sparsity=0.9, method="magnitude", batch_size=128 if cifar else 100)
    with arithmetic(DEVICE):
        data = noise((3, 32, 32), 256) if cifar else load("digits", device=DEVICE)
        t = train.begin(run, data)
        seen = train.examples("none", t.orders, range(1), DEVICE)[0, 0]
        x, y = train.batch(t, seen)

        def step():
            train.learn(t, t.model, seen)

        def plain_step():  # without the faster matrix product, which scoring never uses
            with exact_arithmetic(t.model):
                step()

        calls = {"step ms": step, "plain step ms": plain_step, "scoring ms": lambda: snip(t.model, x, y)}
        if DEVICE.type == "cuda":
            more = {"precision": "bf16", "augment": "standard"} if cifar else {}
            alone = train.begin(dataclasses.replace(run, **more), data)
            line = train.examples(alone.run.augment, alone.orders, range(1), DEVICE)[0, 0]
            graph = fastest(train.forms(alone), [line], functools.partial(train.state, alone))
            calls["trained step ms"] = lambda: graph(line)
        found = medians_ms(calls, n)
        with FlopCounterMode(display=False) as counted:
            F.cross_entropy(t.model(x), y).backward()
    found["scoring / step"] = found["scoring ms"] / found["step ms"]
    found["scoring / plain step"] = found["scoring ms"] / found["plain step ms"]
    return found | {"flop": counted.get_total_flops()}


def selection(n: int) -> float:
    """Return the milliseconds that the selection of 5 % among `n` scores takes on one core."""
    with arithmetic(DEVICE):
        scores = {"w": torch.rand(n, generator=torch.Generator().manual_seed(0)).to(DEVICE)}
        return medians_ms({"": lambda: keep_top(scores, n // 20)}, n=3)[""]


MEASURE = """
import sys
from pathlib import Path
from snip_lib import replicas
from snip_lib.runs import Run, sweep
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
run = Run(sys.argv[1], "digits", sparsity=0.9, steps=2, decay_every=2, lr=0.001)
replicas.train_replicas(sweep(run, seed=range(2)), compiled=False)
before = peak()
replicas.train_replicas(sweep(run, seed=range(10)), compiled=False)
print((peak() - before) / 1024 / 8)
"""


def replica_mb(model: str) -> dict:
    """Return the megabytes of a replica: what R is chosen by, and on Linux what eight more add to the peak on a CPU."""
    found = {"MB a replica, at most": replicas.memory(run_of(model))[1] / 2**20}
    if sys.platform.startswith("linux"):
        done = subprocess.run([sys.executable, "-c", MEASURE, model], capture_output=True, text=True, check=True)
        found["MB a replica, seen"] = float(done.stdout)
    return found


# ------------------------------------------------------------------------------ main


def rates(pool, model: str, n_replicas: int, rounds: int, seconds: float) -> list[dict]:
    """Return the rates of every loop in each round, after one that does not count."""
    found = []
    for i in range(rounds + 1):
        duration = seconds if i else 0.1
        row = {"ordinary": ordinary(model, duration), "resident": pool.apply(engine, (model, 1, duration))}
        row["engine"] = on_every_core(pool, engine, model, n_replicas, duration)
        row["product"] = on_every_core(pool, product, duration / 4)
        found.append(row)
    return found[1:]


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop in a round")
    parser.add_argument("--models", nargs="*", default=[*SMALL, "vgg_d"])
    parser.add_argument("--replicas", type=int, default=0, help="R of the engine (0: as chosen; 220 on a GPU)")
    parser.add_argument("--scores", type=int, default=15_000_000, help="of the selection")
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 32)
    table = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(N_PROCESSES, _share, (context.Barrier(N_PROCESSES),)) as pool:
        for model in options.models:
            single = scoring(model, n=3 if model.startswith(CIFAR) and DEVICE.type == "cpu" else 100)
            flop = single.pop("flop")
            row = {}
            if not model.startswith(CIFAR):
                chosen = 220 if DEVICE.type == "cuda" else replicas.how_many(run_of(model), DEVICE)
                n_replicas = options.replicas or chosen
                found = rates(pool, model, n_replicas, options.rounds, options.seconds)
                row = {f"{name} steps/s": statistics.median(r[name] for r in found) for name in found[0]}
                row.pop("product steps/s")
                for name in ("resident", "engine"):
                    row[f"{name} / ordinary"] = statistics.median(r[name] / r["ordinary"] for r in found)
                row |= {"replicas a process": n_replicas, "processes": N_PROCESSES} | replica_mb(model)
                row["engine / ceiling"] = statistics.median(flop * r["engine"] / r["product"] for r in found)
            else:
                row["step / ceiling"] = flop / (single["step ms"] / 1e3) / product(1.0)
            table[model] = row | single | {"GFLOP a step": flop / 1e9}
        pool.close()
        pool.join()
    table["masks"] = {f"selection of 5 % of {options.scores:,}, ms": selection(options.scores)}
    if options.json:
        print(json.dumps({"torch": torch.__version__, "device": device_name(DEVICE), **table}, indent=1))
        return
    print(
        f"torch {torch.__version__}, {device_name(DEVICE)}, {os.cpu_count()} cores; medians of {options.rounds} rounds"
    )
    for title, numbers in table.items():
        for name, value in numbers.items():
            print(f"{title:9} {name:38} {value:12,.2f}")


if __name__ == "__main__":
    main()
