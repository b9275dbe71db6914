"""Runs and rows: what decides a trained network, its name, and the record of its outcome.

A `Run` is one network trained once; its row is one line of ``results/<chapter>.jsonl``.
`sweep` declares an experiment of Section 5, `collect` returns the rows there are and trains what is missing.
Read `tables` next.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from .data import AUGMENTATIONS, DATASETS, PIXELS
from .inits import BIAS_INITS, INITS
from .models import BATCH_NORMS, MODELS
from .prune import SCHEDULES
from .replicas import how_many, together, train_replicas
from .saliency import CRITERIA
from .structured import UNIT_CRITERIA
from .train import PRECISIONS, SCORE_LOSSES, curve_points, read_progress, train

LOCK_WAIT_S = 30.0  # a writer holds the lock for milliseconds
OUTCOMES = (  # the columns of a table without rows
    *("test_error", "test_error_best_val", "test_error_best5", "val_error", "train_loss", "diverged"),
    *("kept", "effective_sparsity", "dead_outputs", "seconds", "device"),
)


# What decides only the mask, so that it does not tell dense networks apart.
MASK_FIELDS = (
    *("method", "rounds", "schedule", "prune_biases", "scope", "control"),
    *("score_bn", "score_examples", "score_batches", "score_split", "score_class", "score_loss", "accumulate"),
    *("delay", "every", "retrain", "rewind", "structured"),
)
KINDS = {  # of a run's fields: what is taken for one, and its words
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a word"),
}


@dataclass(frozen=True)
class Run:
    """Everything that decides the trained weights, and whether they are attacked in the end; nothing else.

    The defaults are the paper's protocol for MNIST (Section 5). They never change, for neither a run's
    key nor its row names them; a new field's default means what was done before there was the field.
    """

    model: str
    dataset: str
    method: str = "snip"
    sparsity: float = 0.0  # fraction removed, in [0, 1)
    rounds: int = 1  # how often to score; of "synflow", 1 stands for its hundred
    seed: int = 0  # split, initial weights, scoring batch and order of the batches
    init: str = "vs_x"  # of the weights that are scored
    train_init: str = "same"  # "same": train the scored weights; "fresh": draw anew; or an initialiser
    prune_biases: bool = True
    score_bn: str = "batch"  # or "fresh": inference mode, mean 0, variance 1
    score_examples: int = 0  # 0: one training batch
    optimizer: str = "sgd"  # or "adam"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # choice: book/choices.md#learning-rate
    decay: float = 0.1  # the rate is multiplied by this every `decay_every` steps
    decay_every: int = 25_000
    steps: int = 125_000  # choice: book/choices.md#length-of-training
    batch_size: int = 100
    augment: str = "none"
    random_labels: bool = False
    recipe: int = 1  # raised by hand when the meaning of the code changes
    # choice: book/choices.md#standard-deviation-of-the-fixed-variance-initialisers
    init_sd: float = 1.0  # of "rn" and "tn"
    score_batches: int = 1  # so many batches of `score_examples` are accumulated
    score_split: str = "train"  # or "val"
    accumulate: str = "sum_then_abs"  # how batches add up; the choices are `prune`'s
    scope: str = "global"  # or "layer"
    schedule: str = "snip_it"  # of `rounds`
    control: str = "none"  # "shuffle": the mask shuffled within layers
    score_class: int = -1  # score examples of this class alone; -1: of all
    score_loss: str = "cross_entropy"  # or "nll": the logits taken for log-probabilities, as SNIP-it's code does
    delay: int = 0  # steps before the first mask
    every: int = 0  # steps from one of `rounds` to the next; 0: all at once
    retrain: float = 0.0  # after each mask the rate's schedule begins anew at this share of `lr`; 0: it goes on
    rewind: bool = False  # after each mask the network goes back to where it began
    bias_init: str = "constant"  # where biases start: as the network says, mostly 0; or "random": like the weights
    rescale: float = 1.0  # the first layer times this; the second, or batch norm, divides by it: the same function
    pixels: str = "normalised"  # or "raw": in [0, 1]; or "inverted": normalised and negated
    batch_norm: str = "tensorflow"  # eps 1e-3, momentum 0.01; or "torch": eps 1e-5, momentum 0.1
    decayed: str = "all"  # weight decay on weights and biases, or on "weights" only
    # choice: book/choices.md#precision
    precision: str = "float32"  # of forward and backward pass; or "bf16": autocast, with float32 weights and updates
    structured: bool = False  # remove units and filters; `sparsity` is of these (`structured.units_of`)
    attacked: bool = False  # after training, attack the network (`robustness.attacked`)

    def __post_init__(self):
        for field in fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            if type(value) is kind:
                continue  # nearly always, and pages make thousands of runs
            number, words = KINDS[kind]
            if not isinstance(value, number) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{name} is {words}, not {value!r}.")
            object.__setattr__(self, name, kind(value))  # lr=1 and lr=1.0, or numpy's number, are one run
        for name, known in (
            ("model", MODELS),
            ("dataset", DATASETS),
            ("method", CRITERIA),
            ("init", INITS),
            ("train_init", ["same", "fresh", *INITS]),
            ("score_bn", ["batch", "fresh"]),
            ("score_split", ["train", "val"]),
            ("accumulate", ["sum_then_abs", "abs_then_sum", "moving_average"]),
            ("scope", ["global", "layer"]),
            ("schedule", SCHEDULES),
            ("control", ["none", "shuffle"]),
            ("optimizer", ["sgd", "adam"]),
            ("augment", AUGMENTATIONS),
            ("score_loss", SCORE_LOSSES),
            ("bias_init", BIAS_INITS),
            ("pixels", PIXELS),
            ("batch_norm", BATCH_NORMS),
            ("decayed", ["all", "weights"]),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the fraction removed, in [0, 1), not {self.sparsity}.")
        for name in ("rounds", "decay_every", "batch_size", "lr", "score_batches", "rescale", "decay", "init_sd"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is positive, not {getattr(self, name)}.")
        for name in ("steps", "score_examples", "delay", "every", "retrain", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is 0 or more, not {getattr(self, name)}.")
        if not self.steps and not self.sparsity:
            raise ValueError("A run of no step is scored and not trained: give it a sparsity.")
        if self.sparsity and self.steps and self.delay + self.every * (self.rounds - 1) >= self.steps:
            raise ValueError(f"The last of {self.rounds} masks comes before the end: {self.steps} steps are too few.")
        if self.sparsity == 0:  # a dense network has no mask: what decides the mask does not name it
            for name in MASK_FIELDS:
                object.__setattr__(self, name, DEFAULTS[name])
        if self.attacked and not self.steps:
            raise ValueError("A run of no step has no trained network to attack: give it steps, or leave attacked out.")
        if self.schedule == "force" and self.every:
            raise ValueError('Removed in the course of training stays removed: with every, schedule is not "force".')
        if self.structured:
            self._check_structured()

    def _check_structured(self) -> None:
        """Refuse what is made for single connections."""
        if self.model.startswith(("lstm", "gru")):
            raise ValueError(f"structured removes units of feed-forward networks, and {self.model} is recurrent.")
        for name, known in (("method", tuple(UNIT_CRITERIA)), ("scope", ("global",)), ("control", ("none",))):
            if getattr(self, name) not in known:
                raise ValueError(f"With structured, {name} is {' or '.join(known)}, not {getattr(self, name)!r}.")

    @property
    def key(self) -> str:
        """The run's name: 12 hex digits of sha256 over its non-default fields as sorted compact JSON."""
        chosen = {n: v for n, v in vars(self).items() if DEFAULTS[n] != v}
        text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


DEFAULTS = {f.name: f.default for f in fields(Run)}
LEFT_OUT = {  # of a file of rows, where it is so: a field of a run at its default, and what only training changes
    **DEFAULTS,
    **dict.fromkeys(("test_error", "test_error_best_val", "test_error_best5", "val_error", "train_loss"), None),
    **dict.fromkeys(("dead_units", "dead_outputs"), None),  # of a dense network, and of rows older than these fields
    **{"diverged": False, "diverged_step": None, "steps_before_mask": 0, "replicas": 1, "dirty": False},
    "curve": {"step": [], "train_loss": [], "val_error": [], "test_error": []},
}


def time_limit(budget_s: float) -> float:
    """Return the `time.time()` at which a budget of seconds from now ends; 0 is no limit."""
    return time.time() + budget_s if budget_s else math.inf


def sweep(run: Run, **axes: Iterable) -> list[Run]:
    """Return `run` with every combination of the given values: ``sweep(run, sparsity=[0, .9], seed=range(5))``.

    A dense run has no fields of a mask: where `run` is to have some (`method`, `rounds`, ...), it has a sparsity too.
    """
    return [replace(run, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def at_profile(profile: str, runs: Iterable[Run]) -> list[Run]:
    """Return the runs, declared at the paper's length, at another amount of work.

    ``paper``: as declared. ``short``: a tenth of the steps, the same shape of schedule.
    ``smoke``: seconds, on the embedded digits, for one seed: it shows that everything runs.
    A run of no step, which is scored and not trained, stays one; `short` leaves it as it is.
    """
    runs = list(runs)
    if profile == "paper":
        return runs
    if profile == "short":
        timed = ("steps", "decay_every", "delay", "every")  # what is not 0 stays so, or it were another experiment
        tenth = [{name: max(min(1, getattr(r, name)), getattr(r, name) // 10) for name in timed} for r in runs]
        return [replace(r, **shorter) if r.steps else r for r, shorter in zip(runs, tenth, strict=True)]
    if profile == "smoke":
        return [_smoke(r) for r in runs if r.seed < 1]
    raise ValueError(f"Unknown profile {profile!r}: choose one of smoke, short, paper.")


def _smoke(run: Run) -> Run:
    """Return `run` with 60 steps, and masks where they would come in a run of its own length."""
    small = {"dataset": "digits", "decay_every": 20, "batch_size": 50, "steps": min(run.steps, 60)}
    small |= {"score_examples": min(run.score_examples, 500), "score_batches": min(run.score_batches, 3)}
    if run.steps:
        small |= {name: math.ceil(getattr(run, name) * 60 / run.steps) for name in ("delay", "every")}
    return replace(run, **small)


# ------------------------------------------------------------------------------------------ rows


def results_folder() -> Path:
    """Return where rows lie: `SNIP_RESULTS`, else ``results`` beside the chapters."""
    return Path(os.environ.get("SNIP_RESULTS") or "results")


def cache_folder() -> Path:
    """Return where interrupted runs wait: `SNIP_CACHE`, else ``~/.cache/snip_lib/checkpoints``."""
    return Path(os.environ.get("SNIP_CACHE") or "~/.cache/snip_lib/checkpoints").expanduser()


def _rows_in(paths: Iterable[Path]) -> dict[str, dict]:
    """Return the rows of some files by key, with every field; refuse a damaged or repeated line by file and number."""
    rows, where = {}, {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").rstrip().splitlines()  # an editor may end it with blank lines
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): rows are text in UTF-8.") from error
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                if isinstance(of := row.get("mean_image"), str):
                    if of not in rows:
                        raise ValueError(f"its mean image is that of the row {of}, which is not above it")
                    row["mean_image"] = rows[of]["mean_image"]
                key, run = row["key"], Run(**{f.name: row[f.name] for f in fields(Run) if f.name in row})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{place} is damaged ({error}): mend or delete that line.") from error
            if run.key != key:
                raise ValueError(f"{place} is damaged (its fields give the key {run.key}, not {key}).")
            if key in rows:
                raise ValueError(f"{place} repeats the key {key} of {where[key]}: delete one of them.")
            rows[key], where[key] = {"key": key, **LEFT_OUT, **vars(run), **row}, place
            if "step" not in (curve := rows[key]["curve"]):
                rows[key]["curve"] = {"step": curve_points(run.steps), **curve}
    return rows


def read_rows(folder: Path) -> dict[str, dict]:
    """Return every row of a folder by its key; they are read again only where a file has changed (`stamp_of`).

    Raises:
        ValueError: a line is damaged, or a key occurs twice; the sentence names file and line.
    """
    return dict(_read(stamp_of(folder)))


def stamp_of(folder: Path) -> tuple:
    """Return what changes when the rows of a folder do: the files with their inode, time and size."""
    files = [(path, path.stat()) for path in sorted(folder.glob("*.jsonl"))]
    return tuple((path, stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in files)


@functools.lru_cache(maxsize=1)
def _read(stamp: tuple) -> dict[str, dict]:
    return _rows_in(path for path, *_ in stamp)


def write_rows(new: Iterable[dict], path: Path) -> None:
    """Add rows to a file that is sorted by key, all of them or none; a second writer in the folder waits.

    A row stays as it is once it is there, in this file or in another of the folder.

    Raises:
        RuntimeError: another process holds the lock for 30 s. OSError: the folder cannot be written.
        ValueError: a file has a damaged line; all stay as they are.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = path.with_name("rows.lock.holder")
        with FileLock(path.with_name("rows.lock"), timeout=LOCK_WAIT_S):
            holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
            there = read_rows(path.parent)
            rows = _rows_in([path] if path.exists() else [])
            rows |= {row["key"]: row for row in new if row["key"] not in there}
            temporary = path.with_suffix(".tmp")
            first = {}  # of the rows with one mean image, which stands in that row; the others name it
            with temporary.open("w") as file:
                for key in sorted(rows):  # without `LEFT_OUT`, which is half of a row
                    chosen = {n: v for n, v in rows[key].items() if n not in LEFT_OUT or LEFT_OUT[n] != v}
                    if "curve" in chosen and chosen["curve"]["step"] == curve_points(rows[key]["steps"]):
                        chosen["curve"] = {name: of for name, of in chosen["curve"].items() if name != "step"}
                    if "mean_image" in chosen and (of := first.setdefault(tuple(chosen["mean_image"]), key)) != key:
                        chosen["mean_image"] = of
                    file.write(json.dumps(chosen, separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except Timeout as error:
        who = holder.read_text() if holder.exists() else "another process"
        raise RuntimeError(f"{who} has kept {path} locked for {LOCK_WAIT_S:.0f} s: stop it and run again.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): the rows it held are untouched.") from error


@functools.cache
def provenance() -> dict:
    """Return what a row says about the code that made it: commit, uncommitted changes, sha of the library."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".")
    except FileNotFoundError:  # no git on this machine
        commit, changes = None, None
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py"))))
    return {
        "commit": (os.environ.get("SNIP_COMMIT") or commit or "")[:12] or None,
        "dirty": None if commit is None else bool(changes),
        "library": sources.hexdigest()[:12],
        "torch": torch.__version__,
    }


def device_here() -> torch.device:
    """Return the device to train on: a GPU, of several each Dask worker its own, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    name = "0"
    if "distributed" in sys.modules:
        with contextlib.suppress(ValueError):  # this process is no worker
            name = str(sys.modules["distributed"].get_worker().name)
    return torch.device("cuda", int(name) % torch.cuda.device_count() if name.isdigit() else 0)


def device_name(device: torch.device) -> str:
    """Return the device in words: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def make_rows(
    group: list[Run], *, deadline: float = math.inf, tick: Callable[[int], None] = lambda step: None
) -> list[dict]:
    """Train a run, or several as one group, on the best device here; return their rows.

    There are none if the `deadline` came first; the group waits in its checkpoint.
    """
    device = device_here()
    code = provenance()  # before the work: files may change meanwhile, and what runs is what was read
    options = {"device": device, "checkpoint": checkpoint_of(group), "deadline": deadline, "tick": tick}
    if len(group) == 1:  # the definition
        outcome = train(group[0], **options)
        outcomes = [outcome] if outcome else []
    else:
        outcomes = train_replicas(group, **options) or []
    stamp = {"device": device_name(device), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return [
        {"key": run.key, **dataclasses.asdict(run), **outcome, **code, **stamp}
        for run, outcome in zip(group, outcomes, strict=False)
    ]


def checkpoint_of(group: list[Run]) -> Path:
    """Return where an interrupted group waits; code that trains otherwise (`recipe`) has other keys."""
    if len(group) == 1:
        return cache_folder() / f"{group[0].key}.safetensors"
    return (
        cache_folder() / f"group-{hashlib.sha256(''.join(r.key for r in group).encode()).hexdigest()[:12]}.safetensors"
    )


def waiting_groups() -> Iterator[list[Run]]:
    """Yield the groups of several runs that wait in a checkpoint, with their members in order."""
    for path in sorted(cache_folder().glob("group-*.safetensors")):
        try:
            group = [Run(**member) for member in read_progress(path)["runs"]]
        except (KeyError, TypeError, ValueError, OSError):
            continue  # another version wrote it
        if checkpoint_of(group) == path:
            yield group


def groups_of(runs: Iterable[Run], size: Callable[[Run], int]) -> list[list[Run]]:
    """Divide `runs` into groups that are trained as one, of at most ``size(run)``, in the order of `runs`.

    Who was interrupted goes on as it was, with the same members: a group of another size would round otherwise.
    Runs that go on after their training (attacks, a smaller network) hold up no others.
    """
    order = {run: i for i, run in enumerate(runs)}
    left, groups = dict(order), []
    for group in [*waiting_groups(), *([run] for run in order if checkpoint_of([run]).exists())]:
        if any(run in left for run in group):
            groups.append(group)
            left = {run: i for run, i in left.items() if run not in group}
    kinds: dict = {}
    for run in left:
        kinds.setdefault((together(run) or run, run.attacked, run.structured), []).append(run)
    for kind in kinds.values():
        n = size(kind[0])
        groups += [kind[i : i + n] for i in range(0, len(kind), n)]
    return sorted(groups, key=lambda group: min(order.get(run, len(order)) for run in group))


# --------------------------------------------------------------------------------------- collect


def rows_of(runs: Iterable[Run]) -> pd.DataFrame:
    """Return the rows there are of `runs`, in the order of `runs`: one line a run, one column a field."""
    return _table(runs, read_rows(results_folder()))


def _table(runs: Iterable[Run], rows: dict[str, dict]) -> pd.DataFrame:
    """Return the rows of `runs`, each run once."""
    found = [rows[run.key] for run in dict.fromkeys(runs) if run.key in rows]
    return pd.DataFrame(found, columns=None if found else ["key", *DEFAULTS, *OUTCOMES])


def collect(
    runs: Iterable[Run],
    chapter: str,
    *,
    train_missing: bool = False,
    until: float = math.inf,
    cluster: str = "",
    replicas: int = 0,
) -> pd.DataFrame:
    """Return the rows of `runs` that there are, in the order of `runs`; train what is missing if asked.

    Rows are read from all files of `results_folder` and written to ``<chapter>.jsonl`` alone, by this
    process, each as soon as its run is finished. No run starts or goes on after the time `until` (as
    `time.time()`); it waits in a checkpoint. `cluster`: "" trains in this process, "local" on every core
    or GPU, and "tcp://..." on an existing Dask scheduler, whose workers share `SNIP_CACHE` to lose less
    than a minute when one is killed. `replicas`: how many small networks to train as one group;
    0: as many as pay and fit. What is missing afterwards is printed. A run that fails does not stop the
    others; the first error is raised at the end.
    """
    runs = list(dict.fromkeys(runs))
    if replicas < 0:
        raise ValueError(f"replicas is how many networks are trained as one, or 0 to let it be chosen, not {replicas}.")
    if cluster not in ("", "local") and "://" not in cluster:
        raise ValueError(f'cluster is "", "local" or the address of a scheduler, "tcp://...", not {cluster!r}.')
    folder = results_folder()
    rows = read_rows(folder)
    missing = [run for run in runs if run.key not in rows]
    if missing and train_missing:
        path, failures = folder / f"{chapter}.jsonl", []
        _check_writable(folder)
        if "://" not in cluster:  # there each worker has its own
            _check_writable(cache_folder(), "Checkpoints")
        with _bars(len(missing)) as (told, show):
            for group, made in _work(missing, replicas, until, cluster, show):
                if isinstance(made, Exception):
                    failures.append(made)
                elif made:
                    write_rows(made, path)  # a group's rows are written together, or it waits
                    rows |= read_rows(folder)
                    checkpoint_of(group).unlink(missing_ok=True)
                told(group, made)
        if failures:
            raise failures[0]
        missing = [run for run in runs if run.key not in rows]
    if missing:
        have = "run has" if len(runs) == 1 else "runs have"
        print(f"{len(missing)} of {len(runs)} {have} no row yet: {_summary(missing)}.")
    return _table(runs, rows)


def _check_writable(folder: Path, what: str = "Rows") -> None:
    """Refuse before the work, not after it, where rows or checkpoints cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("this folder can be written to")
        probe.unlink()
    except OSError as error:
        raise OSError(f"{what} cannot be written to {folder} ({error}): no run was started.") from error


def _summary(runs: list[Run]) -> str:
    """Name runs by what tells them apart: 'lenet300 mnist snip 0.9, seeds 3-19; ...'."""
    groups: dict[tuple, list[int]] = {}
    for run in runs:
        groups.setdefault((run.model, run.dataset, run.method, run.sparsity), []).append(run.seed)
    parts = [f"{' '.join(map(str, what))}, {_ranges(sorted(set(seeds)))}" for what, seeds in groups.items()]
    return "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more groups" if len(parts) > 4 else "")


def _ranges(seeds: list[int]) -> str:
    """Write sorted numbers as ranges: 'seeds 0-2, 7'."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    words = [f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts]
    return ("seeds " if len(seeds) > 1 else "seed ") + ", ".join(words)


def _halves(group: list[Run]) -> list[list[Run]]:
    """Return what a group that failed is divided into: one run must not fail the others, and less may fit.

    Nothing where it has one run, or a checkpoint, which is worth more than a second try.
    """
    middle = len(group) // 2
    return [group[:middle], group[middle:]] if middle and not checkpoint_of(group).exists() else []


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an error keeps, and those of the errors it came from: they hold the group's tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


Work = Iterator[tuple[list[Run], list[dict] | Exception]]
Show = Callable[[list[Run], int], None]


def _work(runs: list[Run], replicas: int, deadline: float, cluster: str, show: Show) -> Work:
    """Yield each group as it is finished with its rows, or with its error; with none if it is stopped or divided.

    An OSError, such as missing data or a full disk, is raised at once: it would meet all that follow.
    """
    if cluster:
        yield from _work_on(cluster, runs, replicas, deadline, show)
        return
    left = groups_of(runs, functools.partial(_size, replicas=replicas))[::-1]
    while left and time.time() < deadline:
        group = left.pop()
        try:
            made = make_rows(group, deadline=deadline, tick=functools.partial(show, group))
        except OSError:
            raise
        except Exception as error:
            _let_go(error)
            halves = _halves(group)
            left += halves[::-1]
            made = [] if halves else error
        yield group, made


def _size(run: Run, replicas: int) -> int:
    """Return how many runs like `run` are trained as one on this machine."""
    if together(run) is None:
        return 1
    return replicas or how_many(run, device_here())


TOPIC = "snip_lib progress"


def _work_on(cluster: str, runs: list[Run], replicas: int, deadline: float, show: Show) -> Work:
    """Do what `_work` does with Dask: a group is a task, and a worker that dies leaves its checkpoint to the next."""
    import dask
    from dask.distributed import Client, LocalCluster, as_completed

    # Large blocks are kept for reuse: with glibc's defaults each step would return them to the system.
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    config = {"distributed.nanny.pre-spawn-environ": one_thread | malloc}
    # A worker that was killed is started again: that takes a while, and is no reason to give the next one up.
    config |= {"distributed.deploy.lost-worker-timeout": "10 minutes", "distributed.scheduler.allowed-failures": 30}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(config))
        if cluster == "local":
            n_workers = torch.cuda.device_count() or None  # None: one a core
            local = LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None)
            cluster = stack.enter_context(local)
        client = stack.enter_context(Client(cluster))

        def size(run: Run) -> int:  # asked of a worker: it has the device
            return 1 if together(run) is None else client.submit(_size, run, replicas, pure=False).result()

        groups: dict[str, list[Run]] = {}
        client.subscribe_topic(TOPIC, lambda event: show(groups[event[1]["group"]], event[1]["step"]))

        def submitted(group: list[Run]) -> Any:
            groups[name := checkpoint_of(group).stem] = group
            return client.submit(_rows_on_worker, group, name, deadline, key=name, pure=False)

        done = as_completed([submitted(group) for group in groups_of(runs, size)])
        for future in done:
            group, error = groups[future.key], future.exception()
            if isinstance(error, OSError):
                raise error
            halves = _halves(group) if error else []
            done.update([submitted(half) for half in halves])
            yield group, [] if halves else error or future.result()


def _rows_on_worker(group: list[Run], name: str, deadline: float) -> list[dict]:
    """Train a group on a Dask worker, which tells about once a second how far it is."""
    from dask.distributed import get_worker

    worker, told = get_worker(), 0.0

    def tick(step: int) -> None:
        nonlocal told
        if time.time() - told > 1:
            told = time.time()
            worker.log_event(TOPIC, {"group": name, "step": step})

    return make_rows(group, deadline=deadline, tick=tick) if time.time() < deadline else []


@contextlib.contextmanager
def _bars(n_runs: int) -> Iterator[tuple[Callable[[list[Run], list[dict] | Exception], None], Show]]:
    """Show two bars on stderr: the runs of the sweep, and the steps of the group in work with the time it needs yet.

    Yield ``told(group, made)``, for a group that is finished, and ``show(group, step)``, for one in work.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel without ipywidgets gets bars of text
        from tqdm.auto import tqdm

    at: dict[str, tuple[int, int]] = {}  # the step and the steps of each group in work; with Dask there are several
    n_diverged = n_failed = 0
    with (
        tqdm(total=n_runs, unit="run", file=sys.stderr, smoothing=0.05) as bar,
        tqdm(unit="step", file=sys.stderr, smoothing=0.05, leave=False) as steps,
    ):

        def told(group: list[Run], made: list[dict] | Exception) -> None:
            nonlocal n_diverged, n_failed
            at.pop(checkpoint_of(group).stem, None)
            rows, last = ([], "") if isinstance(made, Exception) else (made, "")
            n_failed += len(group) if isinstance(made, Exception) else 0
            n_diverged += sum(row["diverged"] for row in rows)
            if rows and rows[-1]["test_error"] is not None:
                last = f"{rows[-1]['model']} {rows[-1]['sparsity']:g}: {rows[-1]['test_error']:.2f} %, "
            bar.set_postfix_str(f"{last}{n_diverged} diverged, {n_failed} failed")
            bar.update(len(rows))

        def show(group: list[Run], step: int) -> None:
            name = checkpoint_of(group).stem
            begins, at[name] = name not in at, (step, group[0].steps)
            done, steps.total = map(sum, zip(*at.values(), strict=True))
            if begins:  # steps that were made before it was interrupted say nothing about its speed
                steps.initial = 0
                steps.reset(steps.total)
                steps.initial = steps.n = steps.last_print_n = done
                steps.set_description_str(f"{len(group)} x {group[0].model}" if len(at) == 1 else f"{len(at)} groups")
            else:
                steps.update(done - steps.n)

        yield told, show
