"""The figures: what they show, where they go, and what they refuse."""

import itertools
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qpde.plots import COLOURS, against_bits_figure, layer_error_figure, over_smoothing_figure

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


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"qpde\[train\]"):
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
