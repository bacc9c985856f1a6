"""Points: the accuracy of networks against what rounding does to them."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qpde.plots.frame import COLOURS, GREY, INK, MARKERS, label, legend, new_figure, plain, styles

if TYPE_CHECKING:
    import matplotlib.figure


class NetworkPoint(NamedTuple):
    """A network in `frontier_figure`.

    Attributes:
      kind: Networks of one kind share a colour.
      name: What stands beside the point.
      accuracy: In [0, 1].
      error: Layer-wise error, the mean over blocks.
      relative_error: The same, relative.
      hollow: Whether the point is drawn hollow, to tell a kind in two halves.
    """

    kind: str
    name: str
    accuracy: float
    error: float
    relative_error: float
    hollow: bool = False


def frontier(accuracies: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Places of the networks that no other one beats in both, by rising error.

    Args:
      accuracies: Of the networks.
      errors: Of the same.
    """
    found, best = [], -np.inf
    for i in sorted(range(len(errors)), key=lambda i: (errors[i], -accuracies[i])):
        if accuracies[i] > best:
            found.append(i)
            best = accuracies[i]
    return found


def frontier_figure(
    points: Collection[NetworkPoint],
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    quantity: str = "accuracy",
    hollow: str | None = None,
) -> matplotlib.figure.Figure:
    """Accuracy against the layer-wise error, absolute and relative; a line joins the networks that none beats in both.

    Args:
      points: The networks.
      path: File to write, its format by its ending (.png, .svg, .pdf). None writes none.
      title: Title above the panels.
      quantity: Name of the accuracy, where another share takes its place.
      hollow: What hollow points are, for the legend.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: There are no points, or more kinds than there are colours.
      ImportError: Matplotlib is missing.
    """
    points = list(points)
    places = styles([point.kind for point in points], "kinds of networks")
    figure, drawn, labels = new_figure(2, title=title), {}, []
    accuracies = [100 * point.accuracy for point in points]
    panels = (("Absolute error", "error"), ("Relative error", "relative_error"))
    for axes, (heading, field) in zip(figure.subplots(1, 2), panels, strict=True):
        errors = [getattr(point, field) for point in points]
        best = frontier(accuracies, errors)
        axes.plot([errors[i] for i in best], [accuracies[i] for i in best], color=GREY, linewidth=1, zorder=1)
        for point, error, accuracy in zip(points, errors, accuracies, strict=True):
            colour, marker = COLOURS[places[point.kind]], MARKERS[places[point.kind]]
            face = "white" if point.hollow else colour
            style = {"color": colour, "markerfacecolor": face, "markersize": 7, "linestyle": "none", "zorder": 3}
            (mark,) = axes.plot([error], [accuracy], marker=marker, **style)
            if point.kind not in drawn or not point.hollow:
                drawn[point.kind] = mark
            style = {"xytext": (0, 0), "textcoords": "offset points", "fontsize": 8, "color": INK}
            labels.append((axes.annotate(plain(point.name), (error, accuracy), **style), mark))
        axes.margins(x=0.18, y=0.12)
        label(axes, heading, f"layer-wise error, {heading.split()[0].lower()}, mean over blocks", f"test {quantity}, %")
    if hollow and any(point.hollow for point in points):
        (drawn[hollow],) = figure.axes[0].plot([], [], "o", color=GREY, markerfacecolor="white", markersize=7)
    legend(figure, drawn, loc="outside lower left", ncols=4)
    _place(figure, labels)
    if path is not None:
        figure.savefig(path)
    return figure


_PLACES = (  # of a label beside its mark: (points to the right, points up, what of it lies there)
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (7, 6, "left", "bottom"),
    (7, -6, "left", "top"),
    (-7, 6, "right", "bottom"),
    (-7, -6, "right", "top"),
)


def _place(figure: matplotlib.figure.Figure, labels: Sequence[tuple[Any, Any]]) -> None:
    """Put every label beside its mark, on the first side where it stays inside and hides no mark and no other label."""
    figure.draw_without_rendering()  # places depend on the layout
    marks = [mark.get_window_extent() for _, mark in labels]
    taken = list(marks)
    for (text, mark), own in zip(labels, marks, strict=True):
        frame = mark.axes.get_window_extent()
        for right, up, horizontal, vertical in _PLACES:
            text.set(position=(right, up), ha=horizontal, va=vertical)
            place = text.get_window_extent()
            is_inside = frame.x0 <= place.x0 and place.x1 <= frame.x1 and frame.y0 <= place.y0 and place.y1 <= frame.y1
            if is_inside and not any(place.overlaps(other) for other in taken if other is not own):
                break
        else:
            text.set(position=_PLACES[0][:2], ha="left", va="center")
        taken.append(text.get_window_extent())
