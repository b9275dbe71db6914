"""What the book's figures and their tables take from rows, and that a figure can be drawn without any."""

import math
from itertools import combinations, pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from snip_lib import plots, runs, tables

SCORED = {"picture": {"fc1.weight": [3, 1, 2, 0]}, "mean_image": [9, 0, 9, 0]}


@pytest.fixture(autouse=True)
def closed():
    """Leave no figure open."""
    yield
    plt.close("all")


def test_pictures_come_in_the_order_asked_for_and_are_nan_where_there_is_no_row():
    other = {"picture": {"fc1.weight": [0, 0, 1, 1]}, "mean_image": [1, 1, 1, 1]}
    rows = pd.DataFrame([{"score_class": 4} | other, {"score_class": 2} | SCORED, {"score_class": 3, "picture": None}])
    found = plots.pictures(rows, "fc1.weight", by="score_class", values=[2, 3, 4], n=4)
    np.testing.assert_equal(found, [[3, 1, 2, 0], [np.nan] * 4, [0, 0, 1, 1]])
    images = plots.pictures(rows, "mean_image", by="score_class", values=[4, 2], n=4)
    np.testing.assert_equal(images, [[1, 1, 1, 1], [9, 0, 9, 0]])


def test_pictures_of_no_rows_are_all_nan():
    found = plots.pictures(runs.rows_of([]), "fc1.weight", by="score_class", values=range(3), n=4)
    assert found.shape == (3, 4) and np.isnan(found).all()


def test_the_diagonal_is_compared_with_the_rest_of_its_rows():
    matrix = np.array([[5.0, 1.0, 3.0], [2.0, 4.0, 0.0], [6.0, 2.0, 3.0]])  # own - others: 3, 3, -1
    said = plots.diagonal(matrix, "mean image", pd.DataFrame({"key": ["a", "b", "c"]}))
    assert (said["own"].how, said["own"].keys) == ("own by mean image", (("a", "b", "c"),))
    assert (said["own"], said["others"], said["own is best"]) == ("4.00", "2.33", "2 of 3")
    assert said["own − others"] == "+1.67 [-4.07, +7.40]"  # 5/3 ± 4.3027 * 2.3094 / sqrt(3)


def test_a_matrix_with_a_hole_is_not_run_yet():
    matrix = np.eye(3)
    matrix[1, 2] = np.nan
    assert plots.diagonal(matrix, "mean image", runs.rows_of([]))["own"] == "not run yet"


def test_tiles_of_a_row_share_their_scale_and_a_missing_one_is_blank():
    lines = {"first": np.eye(2, 9) * [[1.0], [8.0]], "second": [[np.nan] * 9, [2.0, *[0] * 8]]}
    frame = np.where(np.arange(9) == 4, np.nan, 0.0)
    (axis,) = plots.picture_grid(lines, columns=["a", "b"]).axes
    shown, nothing = axis.images[0].get_array().filled(np.nan), np.full((3, 2), np.nan)
    first, second = shown[:3], shown[5:]
    assert np.array_equal(shown[3:5], np.full((2, 8), np.nan), equal_nan=True)  # between the lines
    for line, left, right in ((first, np.eye(1, 9) / 8, np.eye(1, 9, 1)), (second, frame, np.eye(1, 9))):
        tiles = [left.reshape(3, 3), nothing, right.reshape(3, 3)]
        assert np.array_equal(line, np.hstack(tiles), equal_nan=True)
    assert axis.images[0].get_clim() == (0, 1)
    for side, names in ((axis.xaxis, ["a", "b"]), (axis.yaxis, list(lines))):
        assert [label.get_text() for label in side.get_ticklabels()] == names and side.get_ticklocs().tolist() == [1, 6]


def test_heatmaps_write_every_number_and_no_hole():
    table = pd.DataFrame([[0.25, np.nan], [0.0, 1.0]])
    figure = plots.heatmaps({"some": table, "none": table * np.nan}, write="{:.2f}".format)
    some, none = figure.axes
    assert [text.get_text() for text in some.texts] == ["0.25", "0.00", "1.00"]
    assert not "".join(text.get_text() for text in none.texts) and "not run yet" in none.get_title()


def test_the_numbers_of_a_heatmap_can_be_read_on_every_colour():
    table = pd.DataFrame(np.linspace(0, 1, 101).reshape(-1, 1)).T
    (axis,) = plots.heatmaps({"ramp": table}, write="{:.2f}".format).axes

    def luminance(colour):  # WCAG 2, from sRGB
        rgb = np.array(colour[:3])
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for text, cell in zip(axis.texts, axis.collections[0].get_facecolors(), strict=True):
        dark, light = sorted([luminance(matplotlib.colors.to_rgb(text.get_color())), luminance(cell)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_heatmaps_stand_below_each_other_on_a_figure_that_a_page_need_not_shrink():
    table = pd.DataFrame(np.zeros((2, 10)))
    figure = plots.heatmaps({"one": table, "two": table, "three": table}, write="{:.2f}".format)
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert figure.get_tightbbox().width * 110 < 720  # pixels, at the book's resolution


def test_clouds_leave_out_pixels_without_a_row():
    figure = plots.pixel_clouds({"some": ([0, 4, np.nan], [1, 2, 3]), "none": ([np.nan], [np.nan])}, columns=2)
    points, mean = figure.axes[0].lines
    assert points.get_xydata().tolist() == [[0, 1], [4, 2]] and mean.get_xdata() == [2, 2]
    assert "not run yet" in figure.axes[1].get_title()


def test_errors_stand_below_their_picture_without_the_runs_that_diverged():
    errors = pd.DataFrame(
        {"diverged": [False, False, True], "test_error": [2.0, 4.0, 90.0], "sparsity": 0.9, "steps": 9}
    )
    pictures = {"1": [np.nan] * 4, "10": SCORED["mean_image"], "all": SCORED["mean_image"]}
    figure = plots.pictures_over_errors(pictures, {"1": runs.rows_of([]), "10": errors}, {"theirs": {"all": 2.5}})
    axis = figure.axes[-1]
    median, seeds, theirs = axis.lines
    assert median.get_xydata().tolist() == [[1, 3]] and seeds.get_ydata().tolist() == [2, 4] and not axis.texts
    assert theirs.get_xydata().tolist() == [[2, 2.5]]
    labels = [label.get_text() for label in axis.get_legend().get_texts()]
    assert labels == ["ours, median", "ours, single seeds", "theirs"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "10", "all"]
    errors["test_error"] = [2.0, 30.84, 90.0]
    figure = plots.pictures_over_errors(
        pictures, {"1": pd.concat([errors[:1]] * 2 + [errors])}, {"theirs": {"10": 2.5}}
    )
    assert [text.get_text() for text in figure.axes[-1].texts] == ["30.84"]
    assert figure.axes[-1].get_ylim() == (0, 4)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["1", "10"]  # "all" is of no group


def test_a_single_point_is_seen_whole_and_a_group_without_rows_says_so():
    rows = pd.DataFrame([{"sparsity": 0.0, "train_loss": 0.012, "diverged": False, "steps": 9}])
    groups = {"some": rows, "none": runs.rows_of([])}
    figure = plots.against_sparsity(groups, "train_loss", "training loss", sparsities=[0.0])
    axis = figure.axes[0]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    points = [(x, y) for line in axis.lines for x, y in line.get_xydata() if not np.isnan(y)]
    assert points and all(left < x < right and low < y < high for x, y in points)
    assert left < axis.get_xticks()[0] < right
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["some", "none: not run yet"]


def test_a_sparsity_that_is_not_run_has_a_place_and_no_line_across_it():
    rows = pd.DataFrame([{"sparsity": s, "train_loss": 1 + s, "diverged": False, "steps": 9} for s in (0.99, 0, 0.9)])
    figure = plots.against_sparsity({"some": rows}, "train_loss", "loss", sparsities=[0.95, 0.99, 0, 0.9])
    axis = figure.axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "90", "95", "99"]
    means = axis.containers[0].lines[0].get_xydata()
    assert means[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_equal(means[:, 1], [1, 1.9, np.nan, 1.99])


def test_a_method_without_rows_in_any_panel_is_named_in_the_legend():
    rows = pd.DataFrame([{"sparsity": 0.9, "test_error": 2.0, "steps": 9}])
    none = runs.rows_of([])
    panels = {"one": ({"a": rows, "b": none}, {"c": none}), "two": ({"a": none, "b": rows}, {"c": none})}
    figure = plots.errors_by_method(panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c: not run yet"]


def test_a_figure_says_how_long_its_runs_trained_and_how_many_there_are_at_a_point():
    rows = pd.DataFrame({"sparsity": [0.0, 0.9, 0.9], "steps": [12_500, 12_500, 60_000]})
    for groups, said in {
        (): "no run yet",
        (0, 0): "no run yet",
        (1,): "12,500 steps, n = 1 seed",
        (3,): "12,500 to 60,000 steps, n = 1 to 2 seeds",
        (3, 3): "12,500 to 60,000 steps, n = 1 to 2 seeds",
    }.items():
        figure = plots.footed(plots.plt.figure(), [rows[:n] for n in groups])
        assert figure.texts[0].get_text() == f"Ours: {said}."


def searched():
    """Return a figure of differences."""
    lines = pd.DataFrame({"val_error": [0.1], "test_error": [0.2]}, index=["a choice"])
    figure = plots.differences({"a": (lines, -1.0, 0.5)})
    return plots.footed(figure, [pd.DataFrame({"sparsity": [0.9], "steps": [12_500]})] * 9)


def losses():
    """Return a figure of training losses."""
    curve = [{"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": 1.0}]
    rows = pd.DataFrame([{"sparsity": 0.9, "steps": 20, "diverged": False, "curve": curve}])
    groups = {f"dense, random labels, constant {i}": rows for i in range(7)}
    return plots.loss_against_steps(groups, guessing=math.log(10))


@pytest.mark.parametrize("figure", [searched, losses])
def test_what_a_figure_says_of_its_runs_its_legend_and_its_axes_do_not_lie_on_each_other(figure, tmp_path):
    figure, overlaps = figure(), []

    def look(event):
        said, legend = (thing.get_window_extent(event.renderer) for thing in (figure.texts[0], figure.legends[0]))
        overlaps.append(said.y1 > legend.y0)
        overlaps.append(legend.y1 > min(axis.get_tightbbox(event.renderer).y0 for axis in figure.axes))

    figure.canvas.mpl_connect("draw_event", look)
    figure.savefig(tmp_path / "figure.png", bbox_inches="tight")  # as notebooks do
    assert overlaps and not any(overlaps)


def test_a_difference_beyond_the_axis_is_an_arrow_at_its_edge_beside_its_number():
    columns = ["val_error", "test_error"]
    lines = pd.DataFrame([[1.0, 2.0], [3.0, 7.54], [2.4, 2.6], [np.nan, -4.0]], columns=columns)
    axis = plots.differences({"a": (lines, -1.0, 0.5)}).axes[0]
    points = [(line.get_marker(), x, y) for line in axis.lines for x, y in line.get_xydata() if x == x]
    marked = [[(marker, x) for marker, x, at in points if marker in "so<>" and at == y] for y in range(4)]
    assert marked == [
        [("s", 1.0), ("o", 2.0)],
        [(">", 2.5), (">", 2.5)],
        [("s", 2.4), (">", 2.5)],
        [("<", -2.5)],
    ]
    said = {text.xy: text.get_text() for text in axis.texts}
    assert said == {(2.5, 1): "validation 3.00, test 7.54", (2.4, 2): "test 2.60", (-2.5, 3): "test -4.00"}


def test_names_of_the_papers_points_lie_on_no_line_and_on_no_other_name():
    columns = {"diverged": False, "steps": 9}
    rows = pd.DataFrame([{"sparsity": s, "test_error": e} | columns for s, e in ((0.95, 2.0), (0.99, 1.0))])
    points = [("snip", 0.95, 2.0), ("dns", 0.98, 1.4), ("l-obs", 0.98, 1.42), ("lc", 0.98, 1.4), ("svd", 0.99, 1.0)]
    paper = pd.DataFrame(points, columns=["method", "sparsity", "value"]).assign(quantity="test_error")
    axis = plots.methods_beside_paper({"a": ({"SNIP": rows}, paper)}).axes[0]
    axis.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(name) for name in axis.texts]  # without the line that leads to it
    assert [name.get_text() for name in axis.texts] == ["SNIP", "DNS", "L-OBS", "LC", "SVD"]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    line = axis.transData.transform(axis.containers[0].lines[0].get_xydata())
    assert not any(box.count_contains(np.linspace(*line, 999)) for box in boxes)
    assert all(axis.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_lines_have_colours_of_their_own_that_stand_out_on_white():
    """Contrast as WCAG 2 defines it: 1 is none; the palette's pink and yellow stay below 2."""
    colours = np.array([plots.line_colour(i) for i in range(8)])
    assert len(np.unique(colours, axis=0)) == 8
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)).min() > 2


def test_an_error_is_lower_where_the_whole_interval_of_the_difference_is():
    theirs = pd.DataFrame([{"sparsity": s, "seed": i, "test_error": 5.0} for s in (0.9, 0.95, 0.99) for i in range(3)])
    ours = theirs.assign(test_error=[4.0, 4.1, 3.9, 4.0, 6.0, 3.0, 4.0, 4.1, 3.9])
    apart = "not told apart at 95 %"
    assert tables.where_lower(ours, theirs) == f"lower at 90 % (by 1.00 points), 99 % (by 1.00 points); {apart}"
    assert tables.where_lower(ours, theirs[:7]) == f"lower at 90 % (by 1.00 points); {apart}"  # one pair tells nothing
    assert tables.where_lower(theirs, ours) == f"higher at 90 % (by 1.00 points), 99 % (by 1.00 points); {apart}"
    assert tables.where_lower(ours[:0], theirs) == "not compared yet"


def test_what_is_said_of_rows_carries_their_keys_and_how_it_was_computed():
    rows = pd.DataFrame({"key": ["a", "b"], "test_error": [1.005, 4.0], "effective_sparsity": [0.9, 0.95]})
    said = tables.statistic(rows, "smallest test_error, largest test_error")
    assert (said, said.how, said.keys) == ("1.01 to 4.00", "smallest test_error, largest test_error", (("a", "b"),))
    assert tables.statistic(rows, "mean percent effective_sparsity") == "92.50"
    assert tables.statistic(rows[:0], "mean test_error") == ""


def test_masks_agree_by_seed_and_layers_come_in_order():
    ours = pd.DataFrame({"key": ["a", "b", "c"], "seed": [0, 1, 2], "mask_sha": ["x", "y", "z"]})
    theirs = pd.DataFrame({"key": ["d", "e"], "seed": [1, 0], "mask_sha": ["y", "w"]})
    assert tables.agreement(ours, theirs, "mask_sha") == "1 of 2"
    assert tables.agreement(ours[2:], theirs, "mask_sha") == "not run yet"
    assert tables.agreement(ours[:0].drop(columns="mask_sha"), theirs, "mask_sha") == "not run yet"
    kept = [{"fc2.weight": 3, "fc1.weight": 1, "fc1.bias": 9}, {"fc2.weight": 4, "fc1.weight": 1, "fc1.bias": 9}]
    said = tables.kept_by_layer(pd.DataFrame({"key": ["a", "b"], "kept": kept}))
    assert (said, said.how) == ("4, 1", "mean kept fc2.weight, mean kept fc1.weight")


def test_seconds_are_those_of_scoring_and_from_the_shortest_run_to_the_longest():
    rows = pd.DataFrame({"key": ["a", "b"], "steps": 9, "seconds": [5.0, 20.0], "scoring_seconds": [0.01, 0.02]})
    found = tables.time_table({"some": rows, "none": rows[:0]})
    assert found.loc["some"].tolist() == ["2", "9", "0.015", "5.000 to 20", "0.200"]
    assert found.loc["none"].tolist() == ["0", *["not run yet"] * 4]


def test_cost_tells_runs_that_train_from_masks_that_were_only_scored():
    rows = {"key": list("abc"), "model": "m", "steps": [9, 0, 30], "seconds": [20.0, 0.1, 3600.0], "device": "CPU"}
    found = tables.cost_table(pd.DataFrame(rows)).drop(columns="fingerprint")
    assert found.loc["m"].tolist() == ["2", "9 to 30", "1810", "1.01", "CPU"]
    assert found.loc["m, only scored"].tolist() == ["1", "0", "0.100", "0.00", "CPU"]
    assert tables.cost_table(pd.DataFrame(rows)[:0]).loc["all"].tolist() == ["not run yet"]
