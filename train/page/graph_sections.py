"""The sections for a run on a graph, from its summary.json: means over its seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qpde import plots
from train.config.graphs import GraphExperiment
from train.page.html import figure, formula, table
from train.tasks.nodes_summary import FULL, name_of


def sections(experiment: GraphExperiment, results: Mapping[str, dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Heading and HTML of every section; the figures are written to the folder, one for networks of each depth.

    Args:
      experiment: the run's.   results: by variant, of its summary.json.   folder: for the figures.
    """
    parts = [name_of(bits) for bits in experiment.bits]
    by_depth: dict[int, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        by_depth.setdefault(len(result[FULL]["energy"][0]), {})[name] = result
    found = [("Results", _results(experiment, results, parts))]
    if parts:
        found += [
            ("Layer-wise error", _layer_error(by_depth, parts[-1], folder)),
            ("Accuracy and agreement against bits", _bits(by_depth, parts, folder)),
        ]
    return [*found, ("Over-smoothing", _energy(by_depth, folder)), ("Sizes", _sizes(results))]


def _results(experiment, results, parts) -> str:
    rows = []
    for name, result in results.items():
        for part in (FULL, *parts):
            keys = ("accuracy", "accuracy_twin", "agreement")
            rows.append((f"{name}, {part}", *(_percent(result[part].get(key)) for key in keys)))
    caption = f"Test nodes, mean ± standard deviation over {experiment.seeds} seeds."
    return table(("%", "accuracy", "its twin's", "agreement"), rows, caption)


def _layer_error(by_depth, part, folder) -> str:
    pictures = []
    for depth, results in by_depth.items():
        for file, heading, key in (
            ("layer_error", "Absolute error", "layer_error"),
            ("layer_error_relative", "Relative error", "relative_layer_error"),
        ):
            curves = {name: np.mean(result[part][key], axis=0) for name, result in results.items()}
            path = folder / f"{file}_{depth}.png"
            plots.along_depth_figure(curves, path, heading=heading, unit="difference from the twin")
            means = ", ".join(f"{name} {curve.mean():.3g} in the mean" for name, curve in curves.items())
            pictures.append((path, f"{heading} of each layer at {part}: {means}."))
    caption = (
        f"Lower is more faithful; at {part}, mean over seeds. The absolute error rewards a network whose states are "
        "small, the relative one does not."
    )
    measures = formula("‖a − a<sub>q</sub>‖ / √numel &nbsp; and &nbsp; ‖a − a<sub>q</sub>‖ / ‖a‖")
    return measures + figure(pictures, caption)


def _bits(by_depth, parts, folder) -> str:
    pictures = []
    for depth, results in by_depth.items():
        for key in ("accuracy", "agreement"):
            curves = {
                name: {part: (100 * np.mean(r[part][key]), 100 * _deviation(r[part][key])) for part in parts}
                for name, r in results.items()
            }
            path = folder / f"bits_{key}_{depth}.png"
            plots.against_bits_figure({f"{key}, %": curves}, path, legend_below=True)
            pictures.append((path, f"{key}, %, at {', '.join(parts)}, with {depth} layers."))
    return figure(
        pictures, "Each precision quantized and tuned by itself; the bars are the standard deviation over seeds."
    )


def _energy(by_depth, folder) -> str:
    pictures = []
    for depth, results in by_depth.items():
        curves = {name: np.mean(r[FULL]["energy"], axis=0) for name, r in results.items()}
        path, heading = folder / f"energy_{depth}.png", f"Energy along {depth} layers"
        plots.along_depth_figure(curves, path, heading=heading, unit="Dirichlet energy / squared norm")
        ends = ", ".join(f"{name} {curve[0]:.3g} to {curve[-1]:.3g}" for name, curve in curves.items())
        pictures.append((path, f"Energy from the first to the last layer: {ends}."))
    caption = (
        "How much neighbours differ in the full-precision network's states. Where it falls to zero all nodes look "
        "alike, and depth costs accuracy."
    )
    return formula("‖G x‖² / ‖x‖²") + figure(pictures, caption)


def _sizes(results) -> str:
    return table(("", "parameters"), [(name, f"{r['parameters']:,}") for name, r in results.items()])


def _percent(values) -> str:
    if values is None:
        return "–"
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (f" ± {_deviation(values):.1f}" if len(values) > 1 else "")


def _deviation(values) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
