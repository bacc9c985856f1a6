"""Spreads: histograms, feature maps, spectra, and bounds over what they bound. One panel each, readable on a phone."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from qpde.plots.frame import COLOURS, GREY, INK, PALE, label, legend, logarithmic, new_figure, plain, styles

if TYPE_CHECKING:
    import matplotlib.figure

Numbers = Sequence | ArrayLike

_BINS = 80  # of a drawn histogram

NAMED_CLASSES = 20
"""Up to so many classes have their names and numbers in a table."""


def histogram_figure(
    rows: Mapping[str, Mapping[str, tuple[Numbers, Numbers]]],
    path: str | os.PathLike | None = None,
    *,
    x: str = "value / clip",
    clip: float | None = 1.0,
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """Histograms, one row below the other, the share of values on a logarithmic axis: outliers are rare.

    Args:
      rows: by heading, by network: edges (bins + 1,) and counts (bins,) of a fine histogram.
      path: file to write, its format by its ending (.png, .svg, .pdf); None writes none.
      x: name of the values.
      clip: where to mark the end of the quantizer's range; None marks none.
      among: all networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no rows, no values in one, or more networks than there are colours.
      ImportError: no matplotlib.
    """
    places = styles([name for row in rows.values() for name in row], "networks", among)
    spans = [_span(*map(np.asarray, pair)) for row in rows.values() for pair in row.values()]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    figure = new_figure(height=1.2 + 1.75 * len(rows))
    subplots = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    drawn = {}
    for axes, (heading, row) in zip(subplots, rows.items(), strict=True):
        for name, (edges, counts) in row.items():
            centres = (np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2
            shares, bins = np.histogram(centres, bins=_BINS, range=(low, high), weights=np.asarray(counts))
            colour = COLOURS[places[name]]
            drawn[name] = axes.stairs(shares / shares.sum(), bins, color=colour, linewidth=1.6, baseline=None)
        logarithmic(axes, "y")
        label(axes, heading, x if axes is subplots[-1] else "", "share")
        if clip is not None:
            axes.axvline(clip, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.text(clip, 1.01, "clip", transform=axes.get_xaxis_transform(), ha="center", color=GREY, fontsize=9)
    legend(figure, drawn, loc="outside lower left", ncols=3)
    return _written(figure, path)


def maps_figure(
    rows: Mapping[str, Sequence[ArrayLike]],
    columns: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    heading: str | None = None,
) -> matplotlib.figure.Figure:
    """Feature maps in a grid, each column with grey values of its own range, which its first row sets.

    Args:
      rows: by heading, a map (H, W) for each column.
      columns: headings.
      path: file to write, its format by its ending; None writes none.
      heading: above the grid.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no rows, or one with another number of maps than columns.
      ImportError: no matplotlib.
    """
    if not rows or not columns:
        raise ValueError("there are no maps to draw")
    for name, maps in rows.items():
        if len(maps) != len(columns):
            raise ValueError(f"row {name!r} has {len(maps)} maps for {len(columns)} columns")
    first = next(iter(rows.values()))
    ranges = [(float(np.min(m)), float(np.max(m))) for m in first]
    figure = new_figure(title=heading, height=(0.7 if heading else 0.3) + 5.0 * len(rows) / len(columns))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    subplots = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, maps) in zip(subplots, rows.items(), strict=True):
        for axes, picture, (low, high) in zip(line, maps, ranges, strict=True):
            axes.imshow(np.asarray(picture), cmap="cividis", vmin=low, vmax=high, interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(PALE)
        line[0].set_ylabel(plain(name), fontsize=10, color=INK)
    for axes, heading in zip(subplots[0], columns, strict=True):
        axes.set_title(plain(heading), fontsize=10, color=INK)
    return _written(figure, path)


def spectrum_figure(
    spectra: Mapping[str, Mapping[int, Numbers]],
    path: str | os.PathLike | None = None,
    *,
    heading: str = "Spectra",
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """Eigenvalues of the blocks' Jacobians against block number; between the lines at -1 and 1 nothing is amplified.

    Args:
      spectra: by network, by block (counted from 1), eigenvalues in any order.
      path: file to write, its format by its ending; None writes none.
      heading: Heading of the panel.
      among: all networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no networks, or more than there are colours.
      ImportError: no matplotlib.
    """
    colours = styles(spectra, "networks", among)
    figure = new_figure(height=4.6)
    axes = figure.subplots()
    axes.axhspan(-1, 1, color=PALE, alpha=0.5, zorder=0)
    width = 0.7 / len(spectra)
    drawn = {}
    for i, (name, blocks) in enumerate(spectra.items()):
        shift = width * (i - (len(spectra) - 1) / 2)
        dashes = [
            (x, value)
            for block, values in blocks.items()
            for value in np.ravel(values)
            for x in (block + shift - 0.4 * width, block + shift + 0.4 * width, np.nan)
        ]
        (drawn[name],) = axes.plot(*np.transpose(dashes), color=COLOURS[colours[name]], linewidth=1.0)
    axes.set_xticks(sorted({block for blocks in spectra.values() for block in blocks}))
    for line in (-1, 1):
        axes.axhline(line, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    label(axes, heading, "block", "eigenvalues of (J + Jᵀ) / 2")
    legend(figure, drawn, loc="outside lower left", ncols=3)
    return _written(figure, path)


def bound_figure(
    points: Mapping[str, tuple[Numbers, Numbers]],
    path: str | os.PathLike | None = None,
    *,
    heading: str,
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """A proven bound over the error it bounds, on logarithmic axes: every point lies above the diagonal.

    Args:
      points: by network, errors and their bounds, equally many; what is 0 is left out.
      path: file to write, its format by its ending; None writes none.
      heading: Heading of the panel.
      among: all networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no networks, more than there are colours, or nothing above 0.
      ImportError: no matplotlib.
    """
    places = styles(points, "networks", among)
    positive = {}
    for name, pair in points.items():
        error, bound = (np.ravel(np.asarray(v, np.float64)) for v in pair)
        positive[name] = np.stack([error, bound])[:, (error > 0) & (bound > 0)]
    everything = np.concatenate(list(positive.values()), axis=1)
    if everything.size == 0:
        raise ValueError("all errors or bounds are 0: there is nothing to draw on logarithmic axes")
    low, high = np.quantile(everything[0], 0.002) / 1.5, everything[0].max() * 1.5
    figure = new_figure(height=4.6)
    axes = figure.subplots()
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    drawn = {
        name: axes.scatter(error, bound, s=7, color=COLOURS[places[name]], alpha=0.6, linewidths=0, rasterized=True)
        for name, (error, bound) in positive.items()
    }
    axes.set(xlim=(low, high), ylim=(low, everything[1].max() * 3))
    logarithmic(axes, "x", "y")
    label(axes, heading, "measured error of a logit difference", "proven bound")
    legend(figure, drawn, loc="outside lower left", ncols=3, markerscale=2.5)
    return _written(figure, path)


def confusion_figure(
    counts: Numbers,
    classes: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    heading: str,
) -> matplotlib.figure.Figure:
    """How many inputs of each class were taken for which: a row for each true class, a column for each prediction.

    Shares of a row are shades: blue where prediction and class agree, orange where they differ.

    Args:
      counts: (classes, classes) whole numbers, a row for each true class.
      classes: Their names. With more than `NAMED_CLASSES` of them neither names nor numbers are written.
      path: File to write, its format by its ending. None writes none.
      heading: Heading of the panel.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: The counts are no square of as many rows as there are classes.
      ImportError: Matplotlib is missing.
    """
    from matplotlib.colors import to_rgb

    counts = np.asarray(counts)
    number = len(classes)
    if counts.shape != (number, number) or number == 0:
        raise ValueError(f"counts of shape {counts.shape} are no table of {number} classes by {number}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(number, dtype=bool)
    shades = np.zeros((number, number, 4))
    shades[..., :3] = np.where(right[..., None], to_rgb(COLOURS[0]), to_rgb(COLOURS[1]))
    shades[..., 3] = np.where(right, 0.5 * shares, np.where(shares > 0, 0.25 + 0.6 * np.sqrt(shares), 0))
    figure = new_figure(height=4.8)
    axes = figure.subplots()
    axes.imshow(shades, interpolation="none")
    label(axes, heading, "predicted", "true class")
    axes.grid(visible=False)
    if number <= NAMED_CLASSES:
        names = [plain(name if len(name) <= 10 else f"{name[:9]}…") for name in classes]
        slanted = max(map(len, names)) > 2
        axes.set_xticks(range(number), labels=names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(number), labels=names)
        for row, column in np.argwhere(counts):
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=9, color=INK)
    return _written(figure, path)


def _span(edges, counts):
    """Where the counts are."""
    (filled,) = np.nonzero(counts)
    if not len(filled):
        raise ValueError("a histogram holds no values")
    return edges[filled[0]], edges[filled[-1] + 1]


def _written(figure, path):
    if path is not None:
        figure.savefig(path)
    return figure
