"""The sections for a run on a graph, from its summary.json: means over its seeds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qpde import plots
from train.config.graphs import GraphExperiment
from train.page import provenance, training
from train.page.html import Picture, figure, fill, table
from train.page.mathml import formula, over, root, row, sub, sup, words
from train.page.statistics import decibels
from train.tasks.nodes_summary import FULL, name_of


def sections(
    experiment: GraphExperiment,
    results: Mapping[str, dict[str, Any]],
    lines: Mapping[str, list[dict[str, Any]]],
    about: Mapping[str, dict[str, Any]],
) -> list[tuple[str, str]]:
    """Heading and HTML of every section, with one figure for networks of each depth.

    Args:
      experiment: The run's.
      results: By variant, of its summary.json.
      lines: By variant and part, as "plain/W4A4", its lines of metrics.jsonl.
      about: By variant, where its network came from.
    """
    parts = [name_of(bits) for bits in experiment.bits]
    by_depth: dict[int, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        by_depth.setdefault(len(result[FULL]["energy"][0]), {})[name] = result
    found = [("Results", _results(experiment, results, parts))]
    if parts:
        found += [
            ("Layer-wise error", _layer_error(by_depth, parts[-1])),
            ("Accuracy and agreement against bits", _bits(by_depth, parts)),
        ]
    found.append(("Over-smoothing", _energy(by_depth)))
    full = {name: lines.get(f"{name}/{FULL}", []) for name in results}
    best = {name: float(np.mean(result[FULL].get("best_epoch", [np.nan]))) for name, result in results.items()}
    if len(results) <= len(plots.COLOURS) and (curves := training.section(full, best, list(results))):
        found.append(("Training in full precision", curves))
    seconds = {name: _seconds(lines, name) for name in results}
    return [
        *found,
        ("Sizes", table(("", "parameters"), [(name, f"{r['parameters']:,}") for name, r in results.items()])),
        ("Where it comes from", provenance.section(about, seconds)),
    ]


def _results(experiment, results, parts) -> str:
    rows = []
    for name, result in results.items():
        for part in (FULL, *parts):
            keys = ("accuracy", "accuracy_twin", "agreement")
            errors = result[part].get("relative_layer_error")
            sqnr = "–" if errors is None else f"{np.mean([decibels(e) for e in np.ravel(errors)]):.1f}"
            rows.append((f"{name}, {part}", *(_percent(result[part].get(key)) for key in keys), sqnr))
    seeds = f"mean ± standard deviation over {experiment.seeds} seeds" if experiment.seeds > 1 else "one seed"
    header = ("", "accuracy, %", "its twin's, %", "agreement, %", "SQNR, dB")
    return table(header, rows, f"Test nodes, {seeds}. SQNR is the mean over layers.")


def _layer_error(by_depth, part) -> str:
    pictures = []
    for depth, results in by_depth.items():
        for file, heading, unit, key in (
            ("layer-error", "Absolute error", "difference from the twin", "layer_error"),
            ("layer-error-relative", "Relative error", "divided by the twin's norm", "relative_layer_error"),
        ):
            curves = {name: np.mean(result[part][key], axis=0) for name, result in results.items()}
            drawing = plots.along_depth_figure(curves, heading=heading, unit=unit, x="layer")
            means = ", ".join(f"{name} {curve.mean():.3g} in the mean" for name, curve in curves.items())
            pictures.append(Picture(f"{file}-{depth}", drawing, f"{heading} of each layer at {part}: {means}."))
    caption = fill(
        "Lower is more faithful; at {part}, mean over seeds. The absolute error rewards a network whose states are "
        "small, the relative one does not.",
        part=part,
    )
    difference = row("‖a−", sub("a", "q"), "‖")
    return formula(over(difference, root("n")), words("and"), over(difference, "‖a‖")) + figure(pictures, caption)


def _bits(by_depth, parts) -> str:
    pictures = []
    for depth, results in by_depth.items():
        for key in ("accuracy", "agreement"):
            curves = {
                name: {part: (100 * np.mean(r[part][key]), 100 * _deviation(r[part][key])) for part in parts}
                for name, r in results.items()
            }
            drawing = plots.against_bits_figure(
                {f"{key}, %": curves}, x="bits of weights and activations", legend_below=True
            )
            label = f"{key}, %, at {', '.join(parts)}, with {depth} layers."
            pictures.append(Picture(f"bits-{key}-{depth}", drawing, label))
    has_bars = any(len(r[parts[0]]["accuracy"]) > 1 for results in by_depth.values() for r in results.values())
    bars = " The bars are the standard deviation over seeds." if has_bars else ""
    return figure(pictures, f"Each precision is quantized and tuned by itself.{bars}")


def _energy(by_depth) -> str:
    pictures = []
    for depth, results in by_depth.items():
        curves = {name: np.mean(r[FULL]["energy"], axis=0) for name, r in results.items()}
        heading = f"Energy along {depth} layers"
        drawing = plots.along_depth_figure(curves, heading=heading, unit="Dirichlet energy / squared norm", x="layer")
        ends = ", ".join(f"{name} {curve[0]:.3g} to {curve[-1]:.3g}" for name, curve in curves.items())
        pictures.append(Picture(f"energy-{depth}", drawing, f"Energy from the first to the last layer: {ends}."))
    caption = (
        "How much neighbours differ in the full-precision network's states. Where it falls to zero all nodes look "
        "alike, and depth costs accuracy."
    )
    return formula(over(sup("‖Gx‖", "2"), sup("‖x‖", "2"))) + figure(pictures, caption)


def _seconds(lines, name) -> float | None:
    found = [line.get("seconds") for key, own in lines.items() if key.split("/")[0] == name for line in own]
    numbers = [value for value in found if isinstance(value, int | float)]
    return sum(numbers) if numbers else None


def _percent(values) -> str:
    if values is None:
        return "–"
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (f" ± {_deviation(values):.1f}" if len(values) > 1 else "")


def _deviation(values) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
