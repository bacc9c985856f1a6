"""Curves: errors along depth, accuracy against depth and against widths."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from qpde.plots.frame import COLOURS, GREY, INK, MARKERS, label, legend, logarithmic, new_figure, plain, styles

if TYPE_CHECKING:
    import matplotlib.figure

_LABEL_GAP = 0.15  # between names at the curves' ends, in heights of a panel: two lines of text


def layer_error_figure(
    curves: Mapping[str, Sequence[float] | ArrayLike],
    path: str | os.PathLike | None = None,
    *,
    relative: Mapping[str, Sequence[float] | ArrayLike] | None = None,
    stages: Sequence[int] = (),
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """The layer-wise error of networks against block number: the paper's figure, the relative error beside it.

    The absolute error rewards networks whose activations shrink, the relative one does not: show both where
    both were measured. A curve is named at its end, with its mean over blocks, the number that tables quote.

    Args:
      curves: by network, the error of each block, for instance `Faithfulness.layer_error`.
      path: file to write, its format by its ending (.png, .svg, .pdf); None writes none.
      relative: by network, the relative error, for instance `Faithfulness.relative_layer_error`.
      stages: number of blocks in each stage, to mark where a stage ends.
      title: above the panels.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no curves, more than there are colours, or a curve that is not a row of finite numbers >= 0.
      ImportError: matplotlib is missing.
    """
    panels = [("Absolute error", "rms difference from the high-precision twin", _checked(curves))]
    if relative is not None:
        panels.append(("Relative error", "divided by the rms of the twin's output", _checked(relative)))
    # One style for a network in both panels.
    places = styles([name for *_, rows in panels for name in rows], "curves")

    figure = new_figure(len(panels), title=title)
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (heading, unit, rows) in zip(subplots, panels, strict=True):
        _draw(axes, rows, places, stages)
        label(axes, heading, "block", unit, pad=18 if stages else 8)
    if path is not None:
        figure.savefig(path)
    return figure


def along_depth_figure(
    curves: Mapping[str, Sequence[float] | ArrayLike],
    path: str | os.PathLike | None = None,
    *,
    heading: str,
    unit: str,
    x: str = "block",
    stages: Sequence[int] = (),
    is_signed: bool = False,
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """Any quantity of networks' blocks against block number, drawn as `layer_error_figure` draws the error.

    Args:
      curves: by network, a number for each block.
      path: File to write, its format by its ending (.png, .svg, .pdf). None writes none.
      heading: Heading of the panel.
      unit: Unit of the numbers.
      x: What is counted along depth.
      stages: Number of blocks in each stage, to mark where a stage ends.
      is_signed: Whether numbers may be negative.
      among: all networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError, ImportError: as there.
    """
    rows = _checked(curves, is_signed)
    places = styles(rows, "curves", among)
    figure = new_figure()
    axes = figure.subplots()
    _draw(axes, rows, places, stages)
    label(axes, heading, x, unit, pad=18 if stages else 8)
    if path is not None:
        figure.savefig(path)
    return figure


def over_smoothing_figure(
    families: Mapping[str, Mapping[int, tuple[Sequence[float] | ArrayLike, Sequence[float] | ArrayLike]]],
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
) -> matplotlib.figure.Figure:
    """Over-smoothing: the energy of the states along the layers of the deepest network, and accuracy against depth.

    Args:
      families: by kind of network, by depth: the Dirichlet energy of each layer's state relative to its square, and
        the accuracies of one or several seeds, in [0, 1].
      path: file to write, its format by its ending (.png, .svg, .pdf); None writes none.
      title: above the panels.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no families, more than there are colours, or numbers that are not finite and >= 0.
      ImportError: matplotlib is missing.
    """
    deepest = _checked({name: depths[max(depths)][0] for name, depths in families.items()})
    places = styles(families, "kinds")
    figure = new_figure(2, title=title)
    energies, accuracies = figure.subplots(1, 2)
    drawn = {}
    for name, row in deepest.items():
        i = places[name]
        style = {"color": COLOURS[i], "linewidth": 1.8, "clip_on": False, "zorder": 3}
        energies.plot(np.arange(1, len(row) + 1), np.maximum(row, np.finfo(np.float32).tiny), **style)
        depths = sorted(families[name])
        scores = [100 * np.asarray(families[name][depth][1], np.float64) for depth in depths]
        mean, spread = [s.mean() for s in scores], [s.std(ddof=1) if s.size > 1 else 0.0 for s in scores]
        mark = {"marker": MARKERS[i], "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
        drawn[name] = accuracies.errorbar(depths, mean, spread, capsize=2.5, elinewidth=1, **style, **mark)
    logarithmic(energies, "y")
    every = sorted({depth for depths in families.values() for depth in depths})
    accuracies.set_xscale("log", base=2)
    accuracies.set_xticks(every, labels=[str(depth) for depth in every])
    accuracies.minorticks_off()
    label(energies, "Energy along the deepest network", "layer", "Dirichlet energy / squared norm")
    label(accuracies, "Accuracy", "hidden layers", "test accuracy, %")
    legend(accuracies, drawn, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if path is not None:
        figure.savefig(path)
    return figure


def against_bits_figure(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float | tuple[float, float]]]]],
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    x: str = "widths of weights and activations",
    legend_below: bool = False,
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """What was measured against the widths of networks: a panel for each quantity.

    Args:
      panels: by quantity, by network, by widths ("W4A4", in the order to draw): mean and half width of its interval,
        or how far it reaches below and above the mean; NaN for none.
      path: file to write, its format by its ending (.png, .svg, .pdf); None writes none.
      title: above the panels.
      x: name of the widths.
      legend_below: below the panels, not beside them.
      among: all networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: no panels, or more networks than there are colours.
      ImportError: matplotlib is missing.
    """
    if not panels:
        raise ValueError("there are no curves to draw")
    places = styles([name for curves in panels.values() for name in curves], "networks", among)
    figure = new_figure(len(panels), title=title)
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    drawn = {}
    for axes, (quantity, curves) in zip(subplots, panels.items(), strict=True):
        for i, (name, points) in enumerate(curves.items()):
            mean = np.array([value for value, _ in points.values()], np.float64)
            reach = np.nan_to_num(np.array([np.broadcast_to(half, 2) for _, half in points.values()], np.float64).T)
            place = places[name]
            mark = {"marker": MARKERS[place], "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
            style = {"color": COLOURS[place], "linewidth": 1.8}
            # A little apart, so that intervals of equal means are both seen.
            x_values = np.arange(len(mean)) + 0.08 * (i - (len(curves) - 1) / 2)
            if reach.any():
                drawn[name] = axes.errorbar(x_values, mean, reach, capsize=2.5, elinewidth=1, **style, **mark)
            else:
                (drawn[name],) = axes.plot(x_values, mean, **style, **mark)
        axes.set_xticks(range(len(points)), labels=[plain(bits) for bits in points])
        label(axes, quantity, x, quantity)
    if legend_below:
        legend(figure, drawn, loc="outside lower left", ncols=3)
    else:
        legend(axes, drawn, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if path is not None:
        figure.savefig(path)
    return figure


def over_time_figure(
    curves: Mapping[str, tuple[Sequence | ArrayLike, Sequence | ArrayLike]],
    path: str | os.PathLike | None = None,
    *,
    heading: str,
    unit: str,
    marked: Mapping[str, int | float] | None = None,
    among: Collection[str] = (),
) -> matplotlib.figure.Figure:
    """A quantity of trainings against the epoch.

    Args:
      curves: By network, epochs and values, equally many. Values that are not finite leave a gap.
      path: File to write, its format by its ending (.png, .svg, .pdf). None writes none.
      heading: Heading of the panel.
      unit: Unit of the values.
      marked: By network, an epoch to mark, such as the one whose weights were kept. Others are marked nowhere.
      among: All networks whose figures stand beside this one, for one colour in all of them.
    Returns:
      The figure, for `savefig` or more changes.
    Raises:
      ValueError: There are no curves or more than there are colours, or epochs and values of other numbers.
      ImportError: Matplotlib is missing.
    """
    from matplotlib.ticker import MaxNLocator

    places = styles(curves, "curves", among)
    figure = new_figure()
    axes, drawn = figure.subplots(), {}
    for name, (epochs, values) in curves.items():
        epochs, values = np.asarray(epochs, np.float64), np.asarray(values, np.float64)
        if epochs.shape != values.shape or epochs.ndim != 1:
            raise ValueError(f"{name!r} has {epochs.shape} epochs and {values.shape} values: give rows equally long")
        place, chosen = places[name], epochs == (marked or {}).get(name)
        (drawn[name],) = axes.plot(
            epochs,
            values,
            color=COLOURS[place],
            linewidth=1.8,
            marker=MARKERS[place],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markevery=list(np.flatnonzero(chosen if chosen.any() else epochs == epochs[-1:])),
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    label(axes, heading, "epoch", unit)
    legend(figure, drawn, loc="outside lower left", ncols=3)
    if path is not None:
        figure.savefig(path)
    return figure


def _checked(curves, is_signed=False):
    if not curves:
        raise ValueError("there are no curves to draw")
    rows = {name: np.asarray(row, np.float64) for name, row in curves.items()}
    for name, row in rows.items():
        if row.ndim != 1 or row.size == 0 or not np.isfinite(row).all() or (row.min() < 0 and not is_signed):
            limit = "" if is_signed else " >= 0"
            raise ValueError(f"the curve of {name!r} must be a row of finite numbers{limit}, one per block; got {row}")
    return rows


def _draw(axes, rows, places, stages):
    from matplotlib.ticker import MaxNLocator

    depth = max(len(row) for row in rows.values())
    top = 1.08 * max(0.0, *(row.max() for row in rows.values())) or 1.0
    bottom = 1.08 * min(0.0, *(row.min() for row in rows.values()))
    axes.set(xlim=(0.5, depth + 0.5), ylim=(bottom, top))
    _mark_stages(axes, stages, depth)
    heights = _spread([(row[-1] - bottom) / (top - bottom) for row in rows.values()])
    for (name, row), height in zip(rows.items(), heights, strict=True):
        style = places[name]
        mark = {
            "color": COLOURS[style],
            "marker": MARKERS[style],
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
            "clip_on": False,
            "zorder": 3,
        }
        blocks = np.arange(1, len(row) + 1)
        axes.plot(blocks, row, linewidth=1.8, markersize=6 if len(row) <= 30 else 4, **mark)
        # The name stays in ink, which is readable where the curve's colour is pale; its mark leads to the curve.
        axes.plot(1.03, height, markersize=7.5, transform=axes.transAxes, **mark)
        text = f"{plain(name)}\nmean {np.mean(row):.3g}"
        axes.text(1.055, height, text, transform=axes.transAxes, color=INK, va="center", linespacing=1.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))


def _mark_stages(axes, stages, depth):
    ends = itertools.accumulate(stages, initial=0)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < depth:
            axes.axvline(end + 0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.text(
            (start + end + 1) / 2,
            1.02,
            f"stage {i + 1}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            color=GREY,
            fontsize=9,
        )


def _spread(heights):
    """The heights moved apart by at least the gap, as little as may be, in their order and inside the panel."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, float)
    for low, high in itertools.pairwise(order):
        placed[high] = max(placed[high], placed[low] + _LABEL_GAP)
    ceiling = 1.0
    for i in order[::-1]:
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= _LABEL_GAP
    return placed
