"""The figure forms of the book: PNG, colour-blind safe, and never by colour alone.

Each takes the same rows as the table beside it; those of the paper are its Figures 1 to 4. The last module to read.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patheffects import withStroke
from torch import Tensor

from .tables import cell, cut_off, digits, interval, settled

MARKERS = "osD^v"


def line_colour(i: int) -> tuple[float, float, float]:
    """Return the RGB colour of line i: no pink or yellow, which are faint on white, nor grey, which is for chance."""
    palette = sns.color_palette("colorblind")
    colours = [*(palette[place] for place in (0, 1, 2, 3, 4, 5, 9)), (0.0, 0.0, 0.0), (0.4, 0.1, 0.6)]
    return colours[i % len(colours)]


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


def footed(figure: plt.Figure, groups: Iterable[pd.DataFrame]) -> plt.Figure:
    """Write below a figure how long the runs of the rows that it shows trained, and how many there are at a point.

    A point is a group at one sparsity. So a figure that travels alone still says what it rests on.
    """
    points = [point for rows in groups for _, point in rows.groupby("sparsity")]
    steps = sorted({int(n) for point in points for n in point["steps"]})
    n = sorted({len(point) for point in points})
    text = "no run yet" if not points else f"{_range(steps)} steps, n = {_range(n)} {'seed' if n == [1] else 'seeds'}"
    figure.draw_without_rendering()  # lays it out, once and for all: the line comes below all that is drawn
    figure.set_layout_engine("none")
    below = figure.get_tightbbox().y0 / figure.get_figheight() - 0.015
    figure.text(0.01, below, f"Ours: {text}.", va="top", fontsize=9, color="0.35")
    for legend in figure.legends:  # saved with a tight box it would move down onto the words
        legend.set_bbox_to_anchor((0, 0, 1, 1), transform=figure.transFigure)
    return figure


def _range(numbers: list[int]) -> str:
    return " to ".join(f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1])))


def error_against_sparsity(panels: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> plt.Figure:
    """Draw test error against sparsity, one panel a network: title -> (its rows, the paper's lines).

    Filled: mean over seeds with its sample sd; a band continues the dense network's mean ± sd.
    Hollow: the paper's numbers. Runs that diverged are left out here and counted in the table.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for i, (axis, (title, (rows, paper))) in enumerate(zip(axes[0], panels.items(), strict=True)):
        colour = sns.color_palette("colorblind")[i]
        stats = settled(rows).groupby("sparsity")["test_error"].agg(["mean", "std"]).fillna(0.0)
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
    return footed(figure, (settled(rows) for rows, _ in panels.values()))


def first_layer(masks: dict[str, Tensor], *, side: int) -> plt.Figure:
    """Draw, for each named first-layer mask [units, side * side], how many units keep each pixel."""
    figure, axes = plt.subplots(1, len(masks), figsize=(1.9 * len(masks), 2.2), squeeze=False)
    for axis, (title, mask) in zip(axes[0], masks.items(), strict=True):
        axis.imshow(mask.float().mean(0).view(side, side).cpu(), cmap="cividis", vmin=0)
        axis.set(title=title, xticks=[], yticks=[])
    figure.tight_layout()
    return figure


def pictures(rows: pd.DataFrame, part: str, *, by: str, values: Sequence, n: int = 784) -> np.ndarray:
    """Return what the rows of runs without a step show, one line for each of `values` of column `by`: [values, n].

    `part` is a weight whose kept connections are counted, as in a row's `picture`, or "mean_image". A line is
    NaN where there is no row with a picture; `n` is its length where there is no row at all.
    """
    found = {row[by]: row for row in rows.to_dict("records") if isinstance(row.get("picture"), dict)}
    there = {value: {**row["picture"], "mean_image": row["mean_image"]}[part] for value, row in found.items()}
    missing = np.full(max(map(len, there.values()), default=n), np.nan)
    return np.array([there.get(value, missing) for value in values], dtype=float)


def diagonal(matrix: np.ndarray, what: str, rows: pd.DataFrame) -> dict[str, str]:
    """Say how the diagonal of a square matrix stands out from the rest of its lines, as cells of a table.

    *own*: the mean of the diagonal; *others*: of all else; their difference with its 95 % interval over the lines;
    *own is best*: in how many lines the diagonal is the largest. `what` was compared, of the pictures of `rows`.
    """
    own, n = matrix.diagonal(), len(matrix)
    others = (matrix.sum(1) - own) / (n - 1)
    if np.isnan(matrix).any():
        return {"own": "not run yet", "others": "", "own − others": "", "own is best": ""}
    said = {
        "own": digits(own.mean()),
        "others": digits(others.mean()),
        "own − others": "{} [{}, {}]".format(*(digits(number, sign="+") for number in interval(own - others))),
        "own is best": f"{(matrix.argmax(1) == range(n)).sum()} of {n}",
    }
    return {title: cell(text, f"{title} by {what}", rows) for title, text in said.items()}


def picture_grid(rows: dict[str, Sequence[Sequence[float]]], *, columns: Sequence[str]) -> plt.Figure:
    """Draw square pictures, each given flat, in named rows; one with NaN is a blank tile: not run yet.

    Black is 0 and white the largest value of a row, so that the tiles of a row compare. All tiles are one image, three
    dots a pixel: an axis for each would take most of a page's time.
    """
    side = math.isqrt(len(next(iter(rows.values()))[0]))
    step, zoom = side + 2, 3 / plt.rcParams["figure.dpi"]
    canvas = np.full((step * len(rows) - 2, step * len(columns) - 2), np.nan)
    for i, pictures in enumerate(rows.values()):
        tiles = np.reshape(pictures, (len(columns), side, side)) / (np.nan_to_num(pictures).max(initial=0) or 1)
        for j, tile in enumerate(tiles):
            if np.isnan(tile).any():
                tile = np.pad(np.full((side - 2, side - 2), np.nan), 1)  # a black frame
            canvas[i * step : i * step + side, j * step : j * step + side] = tile
    figure, axis = plt.subplots(figsize=(zoom * canvas.shape[1], zoom * canvas.shape[0]))
    figure.subplots_adjust(0, 0, 1, 1)  # labels stand outside, where a tight box finds them
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for set_ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        set_ticks([i * step + (side - 1) / 2 for i in range(len(names))], list(names))  # at the middle of its tiles
    axis.tick_params(length=0, labelsize=12, labeltop=True, labelbottom=False)
    axis.set_frame_on(False)
    return figure


def _picture(axis: plt.Axes, picture: Sequence[float], brightest: float) -> None:
    """Show a flat square picture, black at 0; NaN leaves a blank tile with a frame."""
    pixels = np.reshape(picture, (math.isqrt(len(picture)), -1))
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=brightest or 1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(bool(np.isnan(pixels).any()))


def heatmaps(tables: dict[str, pd.DataFrame], *, write: Callable[[float], str]) -> plt.Figure:
    """Draw tables of numbers below each other (title -> table), each number written in its cell by `write`.

    The figure is no wider than a page shows it in full, so that the numbers can be read there.
    """
    lines = [len(table) for table in tables.values()]
    size = (6.4, sum(0.28 * n + 0.85 for n in lines))
    figure, axes = plt.subplots(len(lines), 1, figsize=size, height_ratios=lines, squeeze=False)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        text = table.map(lambda v: "" if v != v else write(v))  # a cell without a number stays blank
        if table.isna().all(axis=None):
            table, title = table.fillna(0.0), f"{title}: not run yet"
        options = {"annot": text, "fmt": "", "annot_kws": {"size": 9}, "cmap": "cividis", "cbar": False}
        sns.heatmap(table.astype(float), ax=axis, **options)
        cells = axis.collections[0].get_facecolors()
        for written in axis.texts:  # black or white, whichever differs more from its cell (WCAG 2's contrast)
            column, line = (int(of) for of in written.get_position())
            light = (np.array(cells[line * table.shape[1] + column][:3]) ** 2.2) @ (0.2126, 0.7152, 0.0722)
            written.set_color("black" if light > 0.179 else "white")
        axis.set_title(title, fontsize=11)
        axis.set(xlabel=table.columns.name or "", ylabel=table.index.name or "")
        axis.tick_params(labelsize=9, rotation=0)
    figure.tight_layout()
    return figure


def pixel_clouds(panels: dict[str, tuple[Sequence[float], Sequence[float]]], *, columns: int) -> plt.Figure:
    """Draw pixels, one panel a pair: grey in the mean image [0 ... 255], first-layer units that keep it (percent).

    A line marks the mean grey of all pixels. A panel of NaN is named as not run yet.
    """
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.7 * lines), squeeze=False)
    for axis, (title, (grey, share)) in zip(axes.flat, panels.items(), strict=True):
        grey, share = np.asarray(grey, dtype=float), np.asarray(share, dtype=float)
        there = ~np.isnan(grey + share)
        axis.plot(grey[there], share[there], ".", ms=2, alpha=0.35)
        if there.any():
            axis.axvline(grey[there].mean(), color="k", ls="--", lw=1)
        axis.set_title(title if there.any() else f"{title}: not run yet", fontsize=10)
        axis.set(xlim=(-5, 260), ylim=(0, None))
    figure.supxlabel("pixel in the mean image of the batch (0 black, 255 white)", fontsize=11)
    figure.supylabel("first-layer units that keep it (%)", fontsize=11)
    figure.tight_layout()
    return figure


def pictures_over_errors(
    pictures: dict[str, Sequence[float]], errors: dict[str, pd.DataFrame], others: dict[str, dict[str, float]]
) -> plt.Figure:
    """Draw a row of flat square pictures and below each the test error of its group of rows, as Figure 3 does.

    Large: the median over the seeds that did not diverge; small: each of them, beyond 1.6 times the highest of the
    larger marks as an arrow with its number. Hollow: the numbers of others (label -> group -> percent). Groups come in
    the order of `pictures`; one without rows stays empty, and a picture that is of no group has no mark below it.
    """
    n = len(pictures)
    figure = plt.figure(figsize=(1.35 * n, 4.4))
    grid = figure.add_gridspec(2, n, height_ratios=[1, 2], wspace=0.06, hspace=0.12)
    for i, (title, picture) in enumerate(pictures.items()):
        axis = figure.add_subplot(grid[0, i])
        _picture(axis, picture, np.nan_to_num(picture).max(initial=0))
        axis.set_title(title, fontsize=10)
    axis, names = figure.add_subplot(grid[1, :]), list(pictures)
    found = {names.index(name): settled(rows)["test_error"].astype(float) for name, rows in errors.items()}
    look = {"marker": MARKERS[0], "color": line_colour(0), "ls": "none"}
    medians = {i: errors.median() for i, errors in found.items() if len(errors)}
    large = [*medians.values(), *(value for numbers in others.values() for value in numbers.values())]
    top = 1.6 * max(large, default=1.0)
    if medians:
        axis.plot(*zip(*medians.items(), strict=True), ms=8, label="ours, median", **look)
        single = [(i + 0.18, error) for i, errors in found.items() for error in errors]
        inside = [(x, error) for x, error in single if error <= top]
        axis.plot(*zip(*inside, strict=True), ms=3, alpha=0.6, label="ours, single seeds", **look)
        for x, error in single:
            if error > top:
                axis.plot(x, 0.96 * top, **look | {"marker": "^", "ms": 6})
                words = {"textcoords": "offset points", "va": "center", "fontsize": 9}
                axis.annotate(digits(error), (x, 0.96 * top), (7, 0), **words)
    for marker, (label, numbers) in zip(MARKERS[1:], others.items(), strict=False):
        points = [(names.index(name), value) for name, value in numbers.items()]
        axis.plot(*zip(*points, strict=True), "k", marker=marker, mfc="none", ms=9, ls="none", label=label)
    groups = [i for i, name in enumerate(names) if any(name in those for those in (errors, *others.values()))]
    axis.set_xticks(groups, [names[i] for i in groups])
    axis.spines.bottom.set_bounds(-0.5, max(groups, default=n - 1) + 0.5)
    axis.set(xlim=(-0.5, n - 0.5), ylim=(0, top), ylabel="test error (%)")
    axis.set_xlabel("examples in the batch that scores")
    axis.legend(frameon=False, loc="lower right", ncols=3)
    return footed(figure, map(settled, errors.values()))


LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))


def loss_against_steps(groups: dict[str, pd.DataFrame], *, guessing: float) -> plt.Figure:
    """Draw training loss against steps, one line a group: label -> its rows, whose `curve` holds the points.

    Each point is the mean loss since the one before. Line: mean over seeds; band: from the lowest to the highest.
    Grey: the loss of `guessing`. Runs that diverged are left out.
    """
    figure, axis = plt.subplots(figsize=(7.2, 5.2), layout="constrained")
    for i, (label, rows) in enumerate(groups.items()):
        curves = [pd.DataFrame(c) for c in settled(rows)["curve"]] if len(rows) else []
        if not curves:
            axis.plot([], [], " ", label=f"{label}: {'diverged' if len(rows) else 'not run yet'}")
            continue
        stats = pd.concat(curves).groupby("step")["train_loss"].agg(["mean", "min", "max"])
        look = {"color": line_colour(i), "ls": LINES[i % 5], "marker": MARKERS[i % 5], "ms": 5}
        axis.plot(stats.index, stats["mean"], label=label, **look)
        axis.fill_between(stats.index, stats["min"], stats["max"], color=line_colour(i), alpha=0.15, lw=0)
    axis.axhline(guessing, color="grey", lw=1, zorder=0, label="guessing")
    axis.set(xlabel="steps", ylabel="training loss", ylim=(-0.05, None))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return footed(figure, map(settled, groups.values()))


def against_sparsity(
    groups: dict[str, pd.DataFrame], column: str, ylabel: str, *, sparsities: Sequence[float]
) -> plt.Figure:
    """Draw a column of rows against sparsity, one marker shape a group, evenly spaced: label -> its rows.

    Large: mean over seeds with its sample sd; small: single seeds. Runs that diverged are left out. Each of the
    `sparsities` has its place, run or not, and a line is drawn only between neighbours that both have run.
    """
    drawn = {label: settled(rows) for label, rows in groups.items()}
    places = {s: i for i, s in enumerate(sorted(sparsities))}
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    for i, (label, rows) in enumerate(drawn.items()):
        aside = 0.12 * (i - (len(drawn) - 1) / 2)
        look = {"color": line_colour(i), "marker": MARKERS[i % 5]}
        label = label if len(rows) else f"{label}: not run yet"
        stats = rows.astype({column: float}).groupby("sparsity")[column].agg(["mean", "std"])
        stats["std"] = stats["std"].fillna(0.0)  # of one seed
        stats = stats.reindex(list(places))  # NaN breaks the line
        x = [places[s] + aside for s in stats.index]
        axis.errorbar(x, stats["mean"], stats["std"], ls=LINES[i % 5], ms=8, capsize=3, label=label, **look)
        axis.plot([places[s] + aside for s in rows["sparsity"]], rows[column], ls="none", ms=3, alpha=0.6, **look)
    axis.set_xticks(list(places.values()), [f"{100 * s:g}" for s in places])
    low, high = axis.get_ylim()
    axis.set(xlim=(-0.5, len(places) - 0.5), ylim=(min(low, -0.05 * high), 1.05 * high))
    axis.set(xlabel="sparsity (% removed)", ylabel=ylabel)
    axis.legend(frameon=False)
    figure.tight_layout()
    return footed(figure, drawn.values())


def differences(panels: dict[str, tuple[pd.DataFrame, float, float]]) -> plt.Figure:
    """Draw differences to a default in points, one line a choice: title -> (table, goal, noise).

    The table's columns: `val_error` (hollow squares) and `test_error` (filled circles), its index the choices, the same
    in each panel. Dashed: the `goal`; grey: `noise` to both sides of 0. What is NaN is left out; what lies beyond
    2.5 goals is an arrow there, with its number beside it.
    """
    orange, blue = sns.color_palette("colorblind")[1], sns.color_palette("colorblind")[0]
    looks = {
        "val_error": {"label": "validation", "color": orange, "marker": "s", "mfc": "none", "ms": 7},
        "test_error": {"label": "test", "color": blue, "marker": "o", "ms": 5},
    }
    height = 1.3 + 0.27 * max(len(table) for table, _, _ in panels.values())
    options = {"figsize": (3.4 * len(panels) + 1.6, height), "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), **options)
    for axis, (title, (table, goal, noise)) in zip(axes[0], panels.items(), strict=True):
        if math.isfinite(noise):
            axis.axvspan(-noise, noise, color="grey", alpha=0.2, lw=0, label="chance")
        axis.axvline(0, color="grey", lw=1)
        if math.isfinite(goal):
            axis.axvline(goal, color="black", ls="--", lw=1.2, label="the paper's number")
        edge = 2.5 * abs(goal) if math.isfinite(goal) else math.inf
        numbers = table[[*looks]].astype(float)
        for name, look in looks.items():
            axis.plot(numbers[name].where(numbers[name].abs() <= edge), range(len(table)), ls="none", **look)
        for y, line in enumerate(numbers.to_dict("records")):
            for side, arrow in ((-1, "<"), (1, ">")):
                for name in (far := [name for name, number in line.items() if side * number > edge]):
                    look = looks[name] | {"marker": arrow, "ms": looks[name]["ms"] + 2, "label": "_"}
                    axis.plot(side * edge, y, **look)
                if far:  # beside the inner marker of the line, which may be an ordinary one
                    inner = side * min(edge, *(side * number for number in line.values() if number == number))
                    said = ", ".join(f"{looks[name]['label']} {digits(line[name])}" for name in far)
                    words = {"textcoords": "offset points", "va": "center", "fontsize": 9}
                    words["bbox"] = {"color": "white", "pad": 1}  # else the grid would strike it through
                    axis.annotate(said, (inner, y), (-9 * side, 0), ha="right" if side > 0 else "left", **words)
        axis.set(title=title, xlabel="error minus the default's (points)")
        axis.set_yticks(range(len(table)), table.index, fontsize=9.5)
        axis.grid(axis="y", lw=0.4)
    axes[0][0].set_ylim(len(table) - 0.5, -0.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def errors_by_method(panels: dict[str, tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]]) -> plt.Figure:
    """Draw errors and disconnection against sparsity (evenly spaced): title -> (method -> rows, method -> masks).

    Above: test error (log scale). Large: mean over seeds, with a run that failed at the error that it ended with;
    small: single seeds; dotted: the error of guessing one of ten classes. Below: how many percent of the masks are
    `tables.cut_off`, with the interval. A method without rows in any panel is "not run yet" in the legend.
    """
    names = list(dict.fromkeys(name for both in panels.values() for groups in both for name in groups))
    ran = {name for both in panels.values() for groups in both for name, rows in groups.items() if len(rows)}
    looks = {}
    for i, (name, shape) in enumerate(zip(names, "osD^vPX*", strict=False)):
        label = name if name in ran else f"{name}: not run yet"
        looks[name] = {"color": line_colour(i), "marker": shape, "ms": 7, "ls": LINES[i % 5], "lw": 1.2, "label": label}
    options = {"squeeze": False, "sharey": "row", "height_ratios": (3, 2), "layout": "constrained"}
    figure, axes = plt.subplots(2, len(panels), figsize=(5.4 * len(panels), 7.6), **options)
    for above, below, (title, (errors, masks)) in zip(*axes, panels.items(), strict=True):
        above.set(title=title if any(map(len, errors.values())) else f"{title}: not run yet", yscale="log")
        above.axhline(90, color="grey", ls=":", lw=1)
        above.yaxis.set_major_formatter("{x:g}")
        for axis, groups in ((above, errors), (below, masks)):
            places = {s: i for i, s in enumerate(sorted({s for rows in groups.values() for s in rows["sparsity"]}))}
            for i, (name, rows) in enumerate(groups.items()):
                aside, look, by_sparsity = 0.09 * (i - (len(groups) - 1) / 2), looks[name], rows.groupby("sparsity")
                x = [places[s] + aside for s in by_sparsity.groups]
                if axis is above:
                    axis.plot(x, by_sparsity["test_error"].mean().astype(float), **look)
                    x = [places[s] + aside for s in rows["sparsity"]]
                    axis.plot(x, rows["test_error"], **look | {"ls": "none", "ms": 2.5})
                elif x:
                    found = [(len(group), *cut_off(group)) for _, group in by_sparsity]
                    share, low, high = np.array([(100 * n / of, *ends) for of, n, *ends in found]).T
                    axis.errorbar(x, share, (share - low, high - share), capsize=2, **look)
            axis.set_xticks(list(places.values()), [f"{100 * s:g}" for s in places])
            axis.set(xlabel="sparsity (% removed)", xlim=(-0.5, max(len(places), 1) - 0.5))
    axes[0][0].set_ylabel("test error (%)")
    axes[1][0].set_ylabel("masks disconnected (%)")
    handles = [plt.Line2D([], [], **look) for look in looks.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return footed(figure, (rows for errors, _ in panels.values() for rows in errors.values()))


def _name_points(axis: plt.Axes, names: Sequence[str], points: np.ndarray) -> None:
    """Write a name beside each point [n, 2] of an axis whose limits are set, where it hides the least of what is drawn.

    Tried are the places around the point, near ones first. Hidden are lines, bars, markers and names written before;
    a name that lies nearer to another point than to its own counts as well.
    """
    axis.figure.draw_without_rendering()  # lays it out: only now is it known where things are
    pixel, spots = axis.figure.dpi / 72, axis.transData.transform(points)
    paths = [axis.transData.transform(line.get_xydata()) for line in axis.lines if line.get_linestyle() != "None"]
    paths += [axis.transData.transform(bar) for bars in axis.collections for bar in bars.get_segments()]
    ends = np.concatenate([axis.transData.transform(line.get_xydata()) for line in axis.lines])
    square = [(x, y) for x in (-4, 0, 4) for y in (-4, 0, 4)]  # a marker, in printer's points
    drawn = [ends + np.multiply(corner, pixel) for corner in square]
    drawn += [np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 3)) for path in paths for a, b in pairwise(path)]
    drawn = np.concatenate(drawn)
    drawn = drawn[((axis.bbox.min < drawn) & (drawn < axis.bbox.max)).all(1)]  # a bar to 0 is endless on a log axis
    around = [np.array([x, y]) for y in (0, 0.5, -0.5, 1, -1) for x in (1, -1, 0, 0.5, -0.5) if 1 in (abs(x), abs(y))]
    leader = {"arrowstyle": "-", "lw": 0.6, "color": "0.4", "shrinkA": 0, "shrinkB": 4}
    for i, (name, point, spot) in enumerate(zip(names, points, spots, strict=True)):
        words = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9, "arrowprops": leader}
        text = axis.annotate(name, point, (0, 0), **words)
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])  # readable across a line
        half = np.array(text.get_window_extent().size) / 2
        best = math.inf
        for away, place in product((6, 8, 11, 15, 20, 26), around):
            offset = place * (half + pixel * away)
            apart = np.hypot(*np.maximum(np.abs(spots - spot - offset) - half, 0).T) / pixel
            inside = (np.abs(drawn - spot - offset) < half + pixel).all(1).sum()
            nearer = (apart < 1.4 * apart[i]).sum()  # with the point itself, at every place alike
            out = not all(axis.bbox.contains(*(spot + offset + corner)) for corner in (-half, half))
            cost = inside + 2 * nearer + apart[i] / 6 + 99 * out
            if cost < best:
                best, at = cost, offset
        text.set_position(at / pixel)
        written = half * [(x, y) for x in np.linspace(-1, 1, 9) for y in (-1, 0, 1)]
        drawn = np.concatenate([drawn, spot + at + written])


def methods_beside_paper(panels: dict[str, tuple[dict[str, pd.DataFrame], pd.DataFrame]]) -> plt.Figure:
    """Draw test error against sparsity for several methods, one panel a network: title -> (method -> rows, paper).

    Both axes are logarithmic, that of sparsity in what is left. Filled: the mean, with bars to the lowest and the
    highest seed; a band for "dense", mean ± sample sd. Hollow, with their names: the paper's lines of `published()`.
    Runs that diverged are left out and counted in the table.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(8.6, 5.0), squeeze=False, sharey=True, layout="constrained")
    names, circles = dict.fromkeys(name for groups, _ in panels.values() for name in groups if name != "dense"), {}
    looks = {
        name: (marker, line_colour(i)) for i, (name, marker) in enumerate(zip(names, MARKERS + "PX*<", strict=False))
    }
    for axis, (title, (groups, paper)) in zip(axes[0], panels.items(), strict=True):
        for i, (name, rows) in enumerate(groups.items()):
            errors = settled(rows).astype({"test_error": float}).groupby("sparsity")["test_error"]
            stats = errors.agg(["mean", "min", "max", "std"]).fillna(0.0)
            if name == "dense" and len(stats):
                mean, sd = stats.iloc[0][["mean", "std"]]
                axis.axhspan(mean - sd, mean + sd, color="0.8", lw=0, label="dense, mean ± sd")
            elif name in looks:
                left = 100 * (1 - stats.index.to_numpy(dtype=float)) * 1.02 ** (len(groups) / 2 - i)  # side by side
                marker, colour = looks[name]
                ends = [stats["mean"] - stats["min"], stats["max"] - stats["mean"]]  # a sd may reach below 0
                front = 2 + (name == "SNIP")  # the method that the others are compared with lies on top
                axis.errorbar(
                    left, stats["mean"], ends, marker=marker, color=colour, capsize=2, label=name, zorder=front
                )
        printed = paper[(paper["quantity"] == "test_error") & (paper["sparsity"] > 0)]
        left = 100 * (1 - printed["sparsity"])
        axis.plot(left, printed["value"], "ko", ms=8, mfc="none", label="the paper's Table 1")
        circles[axis] = printed["method"].str.upper(), np.column_stack([left, printed["value"]])
        axis.set(title=title, xlabel="sparsity (% removed)", xscale="log", yscale="log")
    low, high = axes[0, 0].get_ylim()
    for axis in axes[0]:
        axis.set_xticks([10, 5, 2, 1, 0.5], ["90", "95", "98", "99", "99.5"])
        axis.set_yticks(ticks := [0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50], [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set(xlim=(13, 0.3), ylim=(min(low, 0.55), high))
    axes[0, 0].set_ylabel("test error (%)")
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    for axis, named in circles.items():
        _name_points(axis, *named)
    return footed(figure, (settled(rows) for groups, _ in panels.values() for rows in groups.values()))


def before_and_after(lines: pd.DataFrame, *, margin: float) -> plt.Figure:
    """Draw, one line a network, test error before and after pruning, and beside it the difference in points.

    `lines` has the index of names and the columns dense, dense_sd, pruned, pruned_sd, change, low, high (the
    interval of the change), paper_dense, paper_pruned; NaN where there is none. Filled: ours; hollow: the paper's.
    A band marks differences within ± `margin`. The axis of errors is logarithmic.
    """
    size = (8.6, 1.2 + 0.42 * len(lines))
    figure, (errors, changes) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    blue, orange = sns.color_palette("colorblind")[:2]
    for y, line in enumerate(lines.itertuples()):
        errors.plot([line.paper_dense, line.paper_pruned], [y - 0.17] * 2, color="0.5", lw=1, zorder=0)
        errors.plot([line.dense, line.pruned], [y + 0.17] * 2, color="0.5", lw=1, zorder=0)
        for when, marker, colour in (("dense", "o", blue), ("pruned", "D", orange)):
            ours = {"xerr": getattr(line, f"{when}_sd"), "marker": marker, "color": colour, "ls": "none", "capsize": 2}
            errors.errorbar([getattr(line, when)], [y + 0.17], **ours)
            errors.plot(getattr(line, f"paper_{when}"), y - 0.17, marker, color=colour, mfc="none", ms=8)
        changes.plot(line.paper_pruned - line.paper_dense, y - 0.17, "kD", mfc="none", ms=8)
        ends = [[line.change - line.low], [line.high - line.change]]
        changes.errorbar([line.change], [y + 0.17], xerr=ends, marker="D", color=orange, ls="none", capsize=3)
    changes.axvspan(-margin, margin, color="0.92", lw=0, zorder=-2)
    changes.axvline(0, color="0.5", lw=1, zorder=-1)
    errors.set(xlabel="test error (%)", xscale="log", yticks=range(len(lines)), yticklabels=lines.index)
    errors.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    errors.minorticks_off()
    changes.set(xlabel="pruned − dense (points)")
    errors.invert_yaxis()
    marks = {"dense": {"marker": "o", "color": blue}, "pruned": {"marker": "D", "color": orange}}
    handles = [
        plt.Line2D([], [], ls="none", label=f"{when}, {whose}", mfc=face or mark["color"], **mark)
        for whose, face in (("ours", None), ("the paper's", "none"))
        for when, mark in marks.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def kept_shares(panels: dict[str, dict[str, float]], *, columns: int = 3) -> plt.Figure:
    """Draw, one panel a network, which share (percent) of each layer's weights is kept: title -> layer -> percent.

    The axis is logarithmic, so a layer of which nothing is kept has no marker and says so.
    """
    lines = -(-len(panels) // columns)
    size = (8.6, lines * (1.0 + 0.28 * max(map(len, panels.values()))))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches: a title apart from the ticks of the panel above
    for axis, (title, shares) in zip(axes.flat, panels.items(), strict=False):
        for y, share in enumerate(shares.values()):
            axis.plot([0.005, share or 0.005], [y, y], color="0.8", lw=1.5, zorder=0)
            axis.plot(share or float("nan"), y, "o", color=sns.color_palette("colorblind")[0])
            text = f"{share:.2g}" if share else "nothing"
            axis.annotate(text, (share or 0.005, y), (7, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set(title=title, xscale="log", xlim=(0.005, 600))
        axis.set_xticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
        axis.set_xticks([], minor=True)
        axis.set_yticks(range(len(shares)), shares)
        axis.set_ylim(len(shares) - 0.5, -0.5)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("weights kept (%)", fontsize="medium")
    return figure
