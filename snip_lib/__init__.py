"""SNIP: single-shot network pruning based on connection sensitivity (Lee, Ajanthan & Torr, 2019).

    mask = snip_lib.prune(model, x, y, sparsity=0.95)  # one forward and one backward pass
    snip_lib.apply_mask(model, mask)                   # then train with your own loop
    snip_lib.report(model, mask, x)                    # what is left, layer by layer

Read in this order: `saliency`, `masks`, `prune` (the algorithm; where whole units go it asks `structured`);
`structured`, `paths`, `robustness` (beyond it); `models`, `inits`, `data`, `devices`, `train`, `replicas`, `runs`
(the reproduction); `tables`, `claims`, `plots` (the report).
"""

from .masks import (
    apply_mask,
    invert,
    keep_top,
    load_mask,
    mask_of,
    random_at_densities,
    redraw,
    save_mask,
    shuffle_within_layers,
    sparsity_of,
)
from .paths import on_live_path, report
from .prune import PROTOCOLS, prune
from .saliency import CRITERIA, prunable, remove_mask
from .structured import shrink

__all__ = [
    "CRITERIA",
    "PROTOCOLS",
    "apply_mask",
    "invert",
    "keep_top",
    "load_mask",
    "mask_of",
    "on_live_path",
    "prunable",
    "prune",
    "random_at_densities",
    "redraw",
    "remove_mask",
    "report",
    "save_mask",
    "shrink",
    "shuffle_within_layers",
    "sparsity_of",
]


def __getattr__(name: str) -> str:
    """Give ``__version__`` when it is asked for: a copy that is not installed has none, and works."""
    if name == "__version__":
        from importlib.metadata import version

        return version("snip-lib")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
