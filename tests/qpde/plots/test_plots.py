"""The figures: what they show, where they go, and what they refuse."""

import itertools
import sys

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure

from qpde.plots import (
    COLOURS,
    NetworkPoint,
    against_bits_figure,
    along_depth_figure,
    bound_figure,
    confusion_figure,
    frontier,
    frontier_figure,
    histogram_figure,
    layer_error_figure,
    maps_figure,
    over_smoothing_figure,
    over_time_figure,
    spectrum_figure,
)

ABSOLUTE = {"plain": np.array([0.1, 0.2, 0.4]), "symmetric": [0.1, 0.05, 0.06]}
RELATIVE = {"plain": np.array([0.1, 0.1, 0.1]), "symmetric": [0.1, 0.12, 0.2]}


def data_lines(axes):
    """The curves: lines in data coordinates with a point for each block."""
    return [line for line in axes.lines if len(line.get_xdata()) == 3]


def test_both_panels_hold_the_curves_against_block_numbers():
    figure = layer_error_figure(ABSOLUTE, relative=RELATIVE)
    assert isinstance(figure, Figure)
    for axes, curves in zip(figure.axes, (ABSOLUTE, RELATIVE), strict=True):
        for line, values in zip(data_lines(axes), curves.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_array_equal(line.get_ydata(), values)
        assert axes.get_xlabel() == "block"
        assert axes.get_ylabel()
        assert axes.get_ylim()[0] == 0, "an error axis that does not start at zero exaggerates"


def test_curves_are_named_with_their_means_and_look_alike_in_both_panels():
    figure = layer_error_figure(ABSOLUTE, relative=dict(reversed(RELATIVE.items())))
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert labels == [["plain\nmean 0.233", "symmetric\nmean 0.07"], ["symmetric\nmean 0.14", "plain\nmean 0.1"]]
    styles = [[(line.get_color(), line.get_marker()) for line in data_lines(axes)] for axes in figure.axes]
    assert styles[0] == styles[1][::-1]
    assert len(set(styles[0])) == 2


@pytest.mark.parametrize("ends", [[0.5] * 7, [0.0] * 7, [1.0] * 7, [0.1, 0.11, 0.9, 0.91, 0.92, 0.93, 0.94]])
def test_names_neither_overlap_nor_leave_the_page(ends):
    figure = layer_error_figure({str(i): [1.0, end] for i, end in enumerate(ends)})
    FigureCanvasAgg(figure).draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert all(figure.bbox.containsx(box.x1) for box in boxes)
    assert figure.bbox.containsy(boxes[0].y0)
    assert figure.bbox.containsy(boxes[-1].y1)


def test_stage_boundaries_lie_between_blocks():
    (axes,) = layer_error_figure(ABSOLUTE, stages=(1, 2)).axes
    walls = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() not in ("-", "None")]
    assert walls == [1.5]
    assert [text.get_text() for text in axes.texts][:2] == ["stage 1", "stage 2"]


@pytest.mark.parametrize(("name", "start"), [("error.png", b"\x89PNG"), ("error.svg", b"<?xml")])
def test_file_is_written_in_the_format_of_its_ending(tmp_path, name, start):
    layer_error_figure(ABSOLUTE, tmp_path / name, relative=RELATIVE, stages=(2, 1), title="a title")
    assert (tmp_path / name).read_bytes().startswith(start)


def test_global_state_of_matplotlib_stays_as_it_is(tmp_path):
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    layer_error_figure(ABSOLUTE, tmp_path / "error.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_curves_of_zeros_and_of_one_block_are_drawn(tmp_path):
    layer_error_figure({"exact": [0.0]}, tmp_path / "error.png")
    assert (tmp_path / "error.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "no curves"),
        ({"a": []}, "curve of 'a'"),
        ({"a": [1.0, np.nan]}, "curve of 'a'.*nan"),
        ({"a": [-1.0]}, "curve of 'a'"),
        ({"a": np.ones((1, 1))}, "curve of 'a'"),
        ({str(i): [1.0] for i in range(8)}, f"8 curves are more than the {len(COLOURS)} colours"),
    ],
)
def test_bad_curves_are_named_and_nothing_is_written(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        layer_error_figure(curves, tmp_path / "error.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        layer_error_figure(ABSOLUTE)


FAMILIES = {
    "symmetric": {2: ([0.5, 0.2], [0.8, 0.82]), 4: ([0.5, 0.2, 0.1, 0.05], [0.81, 0.85])},
    "plain": {2: ([0.4, 0.3], [0.7, 0.7])},
}


def test_over_smoothing_shows_the_deepest_energies_and_the_mean_accuracies(tmp_path):
    figure = over_smoothing_figure(FAMILIES, tmp_path / "a.png", title="cora")
    energies, accuracies = figure.axes
    np.testing.assert_allclose(energies.lines[0].get_ydata(), FAMILIES["symmetric"][4][0])
    assert len(energies.lines[1].get_ydata()) == 2
    means = [bars.lines[0].get_ydata(orig=False) for bars in accuracies.containers]
    np.testing.assert_allclose(means[0], [81, 83])
    assert [text.get_text() for text in accuracies.get_legend().get_texts()] == ["symmetric", "plain"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({}, "no curves"),
        ({"a": {1: ([np.nan], [0.5])}}, "finite"),
        ({str(i): {1: ([1.0], [0.5])} for i in range(8)}, "8"),
    ],
)
def test_over_smoothing_of_nothing_or_too_much_is_refused(families, message):
    with pytest.raises(ValueError, match=message):
        over_smoothing_figure(families)


def test_what_was_measured_at_each_width_stands_with_its_interval(tmp_path):
    points = {"W2A2": (70.0, 2.0), "W4A4": (90.0, float("nan"))}
    panels = {"accuracy": {"symmetric": points, "plain": points}, "error": {"symmetric": points, "plain": points}}
    figure = against_bits_figure(panels, tmp_path / "bits.png", title="t")
    assert (tmp_path / "bits.png").stat().st_size > 1000
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "error"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["W2A2", "W4A4"]
    with pytest.raises(ValueError, match="no curves"):
        against_bits_figure({})
    with pytest.raises(ValueError, match="8 networks are more than the 7 colours"):
        against_bits_figure({"accuracy": dict.fromkeys("abcdefgh", points)})


EDGES = np.linspace(-1, 3, 401)
COUNTS = np.arange(400.0)
SPREAD = {
    "block 1": {"symmetric": (EDGES, COUNTS), "plain": (EDGES, COUNTS[::-1])},
    "block 9": {"plain": (EDGES, COUNTS)},
}


def test_a_histogram_shows_shares_and_the_clip(tmp_path):
    figure = histogram_figure(SPREAD, tmp_path / "a.png", clip=2.5)
    first, second = figure.axes
    shares = [patch.get_data().values for patch in first.patches]
    for values in shares:
        assert values.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares[0][-1], COUNTS[-5:].sum() / COUNTS.sum())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["block 1", "block 9"]
    # One colour for a network in every row.
    assert second.patches[0].get_edgecolor() == first.patches[1].get_edgecolor() != first.patches[0].get_edgecolor()
    assert first.lines[0].get_xdata()[0] == 2.5
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_maps_of_a_column_share_the_range_of_the_first():
    maps = [np.arange(4.0).reshape(2, 2), np.ones((3, 3))]
    figure = maps_figure({"before": maps, "after": [maps[0] / 2, maps[1]]}, ["block 1", "block 2"])
    limits = [axes.images[0].get_clim() for axes in figure.axes]
    assert limits == [(0, 3), (1, 1), (0, 3), (1, 1)]
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), maps[0] / 2)


def test_a_spectrum_holds_every_eigenvalue_near_its_block(tmp_path):
    spectra = {"symmetric": {2: [-0.5, 1.0], 5: [[0.1], [0.2]]}, "plain": {2: [1.5]}}
    axes = spectrum_figure(spectra, tmp_path / "a.png").axes[0]
    points = np.concatenate([line.get_xydata()[::3] for line in axes.lines if line.get_linestyle() == "-"])
    np.testing.assert_array_equal(np.sort(points[:, 1]), [-0.5, 0.1, 0.2, 1.0, 1.5])
    np.testing.assert_array_equal(np.round(points[:, 0]), [2, 2, 5, 5, 2])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_bound_is_drawn_over_its_error_and_zeros_are_left_out():
    figure = bound_figure({"a": ([1e-3, 1e-2, 0.0], [1e-2, 1.0, 1.0]), "b": ([0.1], [0.5])}, heading="8 bits")
    points = [collection.get_offsets() for collection in figure.axes[0].collections]
    np.testing.assert_array_equal(points[0], [[1e-3, 1e-2], [1e-2, 1.0]])
    np.testing.assert_array_equal(points[1], [[0.1, 0.5]])
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_any_quantity_is_drawn_along_depth():
    axes = along_depth_figure(ABSOLUTE, heading="kurtosis", unit="of block inputs", stages=(1, 2)).axes[0]
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) == (
        "kurtosis",
        "block",
        "of block inputs",
    )
    np.testing.assert_array_equal(data_lines(axes)[0].get_ydata(), ABSOLUTE["plain"])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: histogram_figure({}), "no networks"),
        (lambda: histogram_figure({"a": {"b": (EDGES, 0 * COUNTS)}}), "no values"),
        (lambda: histogram_figure({"a": dict.fromkeys("abcdefgh", (EDGES, COUNTS))}), "8 networks are more than the 7"),
        (lambda: maps_figure({}, ["a"]), "no maps"),
        (lambda: maps_figure({"a": []}, ["a"]), "row 'a' has 0 maps for 1 columns"),
        (lambda: spectrum_figure({}), "no networks"),
        (lambda: bound_figure({"a": ([0.0], [0.0])}, heading=""), "all errors or bounds are 0"),
        (lambda: along_depth_figure({}, heading="", unit=""), "no curves"),
        (lambda: frontier_figure([]), "no kinds of networks"),
    ],
)
def test_nothing_to_draw_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_numbers_of_either_sign_are_drawn_along_depth():
    (axes,) = along_depth_figure({"a": [5.0, -2.0, 1.0]}, heading="", unit="", is_signed=True).axes
    assert axes.get_ylim()[0] < -2
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        along_depth_figure({"a": [5.0, -2.0, 1.0]}, heading="", unit="")


def test_trainings_are_drawn_against_the_epoch_and_the_kept_one_is_marked():
    curves = {"a": ([1, 2, 4], [3.0, np.nan, 1.0]), "b": ([1, 2], [2.0, 1.0])}
    (axes,) = over_time_figure(curves, heading="loss", unit="nats", marked={"a": 4}).axes
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 4])
    assert [line.get_markevery() for line in axes.lines] == [[2], [1]]
    with pytest.raises(ValueError, match="'a' has"):
        over_time_figure({"a": ([1], [1.0, 2.0])}, heading="", unit="")


def test_a_confusion_matrix_writes_what_is_not_zero():
    (axes,) = confusion_figure([[5, 0], [2, 1]], ["cat", "dog"], heading="net").axes
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0, 0), "5"), ((0, 1), "2"), ((1, 1), "1")}
    shades = axes.images[0].get_array()
    assert shades[0, 1, 3] == 0, "nothing was taken there"
    assert tuple(shades[1, 0, :3]) != tuple(shades[1, 1, :3])
    many = confusion_figure(np.eye(30, dtype=int), [str(i) for i in range(30)], heading="net")
    assert not many.axes[0].texts
    with pytest.raises(ValueError, match="no table of 3 classes"):
        confusion_figure([[1]], ["a", "b", "c"], heading="")


def test_bars_and_their_legend_are_where_there_are_intervals_alone():
    points = {"2": (0.5, (0.1, 0.2)), "4": (0.7, float("nan"))}
    (axes,) = against_bits_figure({"accuracy": {"a": points}}).axes
    (bars,) = axes.containers
    np.testing.assert_allclose(bars.lines[2][0].get_segments()[0][:, 1], [0.4, 0.7])
    (axes,) = against_bits_figure({"accuracy": {"a": {"2": (0.5, float("nan"))}}}).axes
    assert not axes.containers
    assert len(axes.get_legend().legend_handles) == 1


@pytest.mark.parametrize(("low", "high"), [(2e-7, 3e3), (0.03, 0.2), (0.4, 0.5)])
def test_numbers_of_logarithmic_axes_are_plain_text(low, high):
    figure = bound_figure({"a": ([low, high], [low, 2 * high])}, heading="")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    texts = [t.get_text() for which in (False, True) for t in axes.get_xticklabels(minor=which) if t.get_text()]
    assert texts
    assert not any("$" in text for text in texts)


SHARES = st.integers(0, 5).map(float)  # few values, so that some are equal


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=8))
def test_the_frontier_is_what_no_other_point_beats(points):
    accuracies, errors = zip(*points, strict=True)
    found = frontier(accuracies, errors)

    def beats(a, b):
        return a != b and a[0] >= b[0] and a[1] <= b[1]

    for point in set(points):
        is_best = any(points[i] == point for i in found)
        assert is_best != any(beats(other, point) for other in points)
    assert sorted(errors[i] for i in found) == [errors[i] for i in found]


def test_networks_stand_at_their_error_and_accuracy_and_a_line_joins_the_best():
    points = [
        NetworkPoint("plain", "a", 0.9, 0.3, 0.1),
        NetworkPoint("plain", "b", 0.8, 0.4, 0.05, hollow=True),
        NetworkPoint("symmetric", "c", 0.7, 0.2, 0.2),
    ]
    figure = frontier_figure(points, hollow="rounded")
    for axes, errors, best in zip(figure.axes, ([0.3, 0.4, 0.2], [0.1, 0.05, 0.2]), ([2, 0], [1, 0]), strict=True):
        line, *marks = axes.lines
        np.testing.assert_allclose(line.get_xdata(), [errors[i] for i in best])
        np.testing.assert_allclose(line.get_ydata(), [100 * points[i].accuracy for i in best])
        shown = [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks[: len(points)]]
        np.testing.assert_allclose(shown, [(e, 100 * p.accuracy) for e, p in zip(errors, points, strict=True)])
        faces = [mark.get_markerfacecolor() for mark in marks[: len(points)]]
        assert faces == [COLOURS[1], "white", COLOURS[0]]
        assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"plain", "symmetric", "rounded"}


def test_labels_of_networks_that_stand_close_hide_neither_each_other_nor_a_mark():
    close = [NetworkPoint("plain", f"network {i}", 0.9 + 0.0004 * i, 0.3 + 0.0004 * i, 0.1) for i in range(3)]
    far = NetworkPoint("symmetric", "far", 0.8, 0.4, 0.2)
    figure = frontier_figure([*close, far])
    for axes in figure.axes:
        labels = [text.get_window_extent() for text in axes.texts]
        marks = [line.get_window_extent() for line in axes.lines if line.get_linestyle() == "None"]
        frame = axes.get_window_extent()
        for i, label in enumerate(labels):
            assert frame.x0 <= label.x0 <= label.x1 <= frame.x1
            assert frame.y0 <= label.y0 <= label.y1 <= frame.y1
            assert not any(label.overlaps(other) for other in [*labels[:i], *marks[:i], *marks[i + 1 :]])


DRAWN_ALONE = {
    "depth": lambda name, among: along_depth_figure({name: [1.0, 2.0, 3.0]}, heading="", unit="", among=among),
    "bits": lambda name, among: against_bits_figure({"a": {name: {"W4A4": (1.0, 1.0)}}}, among=among),
    "histogram": lambda name, among: histogram_figure({"a": {name: (EDGES, COUNTS)}}, among=among),
    "spectrum": lambda name, among: spectrum_figure({name: {2: [0.5]}}, among=among),
    "bound": lambda name, among: bound_figure({name: ([0.1], [0.5])}, heading="", among=among),
    "time": lambda name, among: over_time_figure({name: ([1], [0.5])}, heading="", unit="", among=among),
}


@pytest.mark.parametrize("draw", DRAWN_ALONE.values(), ids=DRAWN_ALONE)
@pytest.mark.parametrize(
    ("name", "among", "place"),
    [("plain", (), 1), ("symmetric", (), 0), ("b", (), 0), ("b", ("a", "plain", "b"), 2), ("a", ("a", "plain"), 0)],
)
def test_a_network_has_one_colour_in_all_figures_of_a_page(draw, name, among, place):
    (axes,) = draw(name, among).axes
    drawn = [line.get_color() for line in axes.lines] + [patch.get_edgecolor() for patch in axes.patches]
    drawn += [colour for points in axes.collections for colour in (*points.get_edgecolor(), *points.get_facecolor())]
    found = {matplotlib.colors.to_hex(colour).upper() for colour in drawn} & set(COLOURS)
    assert found == {COLOURS[place]}


HARD_NAMES = ("_hidden", "a$b", r"$\undefined{x$", "cost $5")
POINTS = {"W$4$": (1.0, 1.0)}

NAMED = {
    "curves": lambda a, b: layer_error_figure({a: [1.0, 2.0], b: [2.0, 1.0]}, relative={a: [1.0]}, title=a),
    "depth": lambda a, b: along_depth_figure({a: [1.0, 2.0], b: [2.0]}, heading=a, unit=b),
    "smoothing": lambda a, b: over_smoothing_figure({key: {2: ([0.5, 0.2], [0.8])} for key in (a, b)}, title=a),
    "bits": lambda a, b: against_bits_figure({a: {a: POINTS, b: POINTS}}, x=b),
    "bits below": lambda a, b: against_bits_figure({a: {a: POINTS}, b: {b: POINTS}}, legend_below=True),
    "histogram": lambda a, b: histogram_figure({a: {a: (EDGES, COUNTS)}, b: {b: (EDGES, COUNTS)}}, x=b),
    "maps": lambda a, b: maps_figure({a: [np.eye(2)], b: [np.eye(2)]}, [a], heading=b),
    "spectrum": lambda a, b: spectrum_figure({a: {1: [0.5], 2: [0.1]}, b: {1: [0.5]}}, heading=a),
    "bound": lambda a, b: bound_figure({a: ([0.1], [0.5]), b: ([0.1], [0.5])}, heading=a),
    "time": lambda a, b: over_time_figure({a: ([1], [0.5]), b: ([1], [0.5])}, heading=a, unit=b),
    "points": lambda a, b: frontier_figure([NetworkPoint(a, b, 0.5, 0.1, 0.1), NetworkPoint(b, a, 0.6, 0.1, 0.1)]),
}


@pytest.mark.parametrize("draw", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("name", HARD_NAMES)
def test_every_name_is_shown_letter_by_letter(draw, name, monkeypatch):
    """A "$" begins no mathematics, and a leading underscore hides nothing."""
    shown = set()
    draw_text = RendererAgg.draw_text

    def noted(renderer, gc, x, y, text, prop, angle, ismath=False, mtext=None):
        shown.update([text] if not ismath else [])
        draw_text(renderer, gc, x, y, text, prop, angle, ismath, mtext)

    monkeypatch.setattr(RendererAgg, "draw_text", noted)
    FigureCanvasAgg(draw(name, "other")).draw()
    assert {name, "other"} <= shown
