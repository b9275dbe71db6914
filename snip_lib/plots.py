"""The figure forms of the book: PNG, colour-blind safe, and never by colour alone.

Each takes the same rows as the table beside it.
"""

import inspect
from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from torch import Tensor

MARKERS = "osD^v"


def style() -> None:
    """Set the book's figure style; called once at the top of a chapter."""
    sns.set_theme(style="ticks", palette="colorblind", context="notebook")
    plt.rcParams.update(
        {"figure.dpi": 110, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False}
    )


def source(*functions: Callable) -> str:
    """Return the source of library functions without their docstrings, as a Markdown code block."""
    texts = []
    for function in functions:
        text = inspect.getsource(function)
        texts.append(text.replace(f'"""{function.__doc__}"""', "...", 1).replace("    ...\n", "", 1))
    return "```python\n" + "\n\n".join(text.rstrip() for text in texts) + "\n```"


def error_against_sparsity(panels: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> plt.Figure:
    """Draw test error against sparsity, one panel a network: title -> (its rows, the paper's lines).

    Filled: mean over seeds with its sample sd; a band continues the dense network's mean ± sd.
    Hollow: the paper's numbers. Runs that diverged are left out here and counted in the table.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for i, (axis, (title, (rows, paper))) in enumerate(zip(axes[0], panels.items(), strict=True)):
        colour = sns.color_palette("colorblind")[i]
        settled = rows[~rows["diverged"].astype(bool)]
        stats = settled.groupby("sparsity")["test_error"].agg(["mean", "std"]).fillna(0.0)
        x = 100 * stats.index
        axis.errorbar(
            x, stats["mean"], stats["std"], color=colour, marker=MARKERS[i], capsize=3, label="ours, mean ± sd"
        )
        if 0.0 in stats.index:
            mean, sd = stats.loc[0.0]
            axis.axhspan(mean - sd, mean + sd, color=colour, alpha=0.15, lw=0, label="our dense network")
        printed = paper[paper["quantity"] == "test_error"]
        hollow = {"marker": MARKERS[i], "ms": 9, "mfc": "none", "ls": "none", "label": "the paper"}
        axis.plot(100 * printed["sparsity"], printed["value"], "k", **hollow)
        axis.set(title=title, xlabel="sparsity (% removed)", ylabel="test error (%)", ylim=(0, None))
        axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def first_layer(masks: dict[str, Tensor], *, side: int) -> plt.Figure:
    """Draw, for each named first-layer mask [units, side * side], how many units keep each pixel."""
    figure, axes = plt.subplots(1, len(masks), figsize=(1.9 * len(masks), 2.2), squeeze=False)
    for axis, (title, mask) in zip(axes[0], masks.items(), strict=True):
        axis.imshow(mask.float().mean(0).view(side, side).cpu(), cmap="cividis", vmin=0)
        axis.set(title=title, xticks=[], yticks=[])
    figure.tight_layout()
    return figure
