"""Where training runs, and its fast forms: each beside the sentence that says why it is exact.

Section 5 trains for up to 150,000 steps a network. Nothing here knows about pruning; `train.py` and
`replicas.py` use it.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .data import generator
from .saliency import true_float32

# What PyTorch says while a graph is being prepared and is known here, by how it begins: the optimiser, that it steps
# without a graph; the compiler (torch 2.11), that rounded products would be faster.
KNOWN = ("This instance was constructed with capturable=True", "TensorFloat32 tensor cores")


@contextlib.contextmanager
def fast_cpu() -> Iterator[None]:
    """Train on one thread with the faster float32 matrix product, if it is as exact; restore both.

    "medium" lets oneDNN multiply float32 matrices (on AMD twice as fast as MKL, and still float32);
    on a processor with bfloat16 tiles it would round, so a probe against float64 decides. One thread,
    because two OpenMP threads on a shared machine wait for each other.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        a, b = torch.randn(2, 256, 256, generator=generator(0, "probe"), dtype=torch.float64)
        torch.set_float32_matmul_precision("medium")
        error = (a.float() @ b.float() - a @ b).abs().max().item()
        if error > 1e-3:  # float32 gives about 4e-5, bfloat16 about 0.1
            torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def exact_gpu(device: torch.device) -> Iterator[None]:
    """Train on this GPU in true float32, without TF32 (PyTorch's convolutions have it); restore it afterwards."""
    with true_float32(), torch.cuda.device(device):
        yield


def arithmetic(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the settings to train with on `device`."""
    return exact_gpu(device) if device.type == "cuda" else fast_cpu()


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for reuse is free
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with Dask

    return psutil.virtual_memory().available


def fastest(forms: list[Callable[..., None]], inputs: Sequence[Tensor], state: Callable[[], dict]) -> Callable:
    """Return the first form of a step that works here, on a GPU as one graph. The last form is the plain one.

    `inputs` are tensors like those of every call; `state()` names all tensors that a step changes.
    """
    for form in forms:
        try:
            if inputs[0].is_cuda:
                return captured(form, inputs, state)
            if form is not forms[-1]:
                warm_up(form, inputs, state)  # what is compiled is so now, when a failure does no harm
            return form
        except Exception as error:  # of a compiler, in many forms. Of a capture that fails only the context says why
            # No name for the errors: the next form is captured here, and their frames hold the tensors of this one.
            reason = ": ".join(" ".join(str(e).split())[:200] for e in (error, error.__context__) if e)
            warnings.warn(
                f"A fast form of the training step does not work here ({reason}): it is slower.", stacklevel=2
            )
    return forms[-1]


def in_turn(steps: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    """Return one step that takes `steps` one after the other, each on its line of the input [R, ...]."""

    def step(lines: Tensor) -> None:
        for take, line in zip(steps, lines, strict=True):
            take(line)

    return step


def side_by_side(steps: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    """Return `in_turn` with each of `steps` on a CUDA stream of its own, where small kernels fill a GPU together.

    It is exact: every step has its own kernels in their own order, and no two touch a tensor in common. A graph
    that is captured of it forks from the capturing stream into the streams and joins them again.
    """
    streams = [torch.cuda.Stream() for _ in steps]

    def step(lines: Tensor) -> None:
        trunk = torch.cuda.current_stream()
        for take, stream, line in zip(steps, streams, lines, strict=True):
            stream.wait_stream(trunk)  # fork: the line is there before the step that reads it
            with torch.cuda.stream(stream):
                take(line)
        for stream in streams:
            trunk.wait_stream(stream)  # join: what comes next, on the trunk, comes after every step

    return step


def captured(step: Callable[..., None], inputs: Sequence[Tensor], state: Callable[[], dict]) -> Callable[..., None]:
    """Return `step` as one CUDA graph: the same kernels in the same order, launched all at once, so it is exact."""
    gc.collect()  # what is left of a form that failed would tie the parameters to its stream
    buffers, side = [x.clone() for x in inputs], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings():
        for sentence in KNOWN:
            warnings.filterwarnings("ignore", sentence)
        warm_up(step, buffers, state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*buffers)

    def replay(*batch: Tensor) -> None:
        for buffer, x in zip(buffers, batch, strict=True):
            buffer.copy_(x)
        graph.replay()

    return replay


def warm_up(step: Callable[..., None], inputs: Sequence[Tensor], state: Callable[[], dict]) -> None:
    """Take three steps and take them back: a graph can only be captured of what has run before.

    What they made (an optimiser's momenta and counts) becomes 0, which is where it starts.
    """
    before = {name: x.clone() for name, x in state().items()}
    try:
        for _ in range(3):
            step(*inputs)
    finally:
        with torch.no_grad():
            for name, x in state().items():
                x.copy_(before[name]) if name in before else x.zero_()
