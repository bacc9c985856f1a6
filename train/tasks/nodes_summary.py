"""The end of a run on a graph: a table over seeds, summary.json, and pictures of error and energy along depth."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from qpde.plots import layer_error_figure, over_smoothing_figure
from train.config.graphs import GraphExperiment
from train.host.console import print_table
from train.runs.directory import RunDirectory
from train.tasks.images_summary import check_drawable

FULL = "full"
"""Name of the part of a run that is in full precision; the others are named like "W4A8"."""

# Columns of the table: heading, key in the results, factor, format of the mean, and of the deviation if it is shown.
_COLUMNS: tuple[tuple[str, str, *tuple[Any, ...]], ...] = (
    ("accuracy", "accuracy", 100, "{:.1f}", "±{:.1f}"),
    ("its twin's", "accuracy_twin", 100, "{:.1f}", "±{:.1f}"),
    ("agreement", "agreement", 100, "{:.1f}", "±{:.1f}"),
    ("error", "mean_layer_error", 1, "{:.3f}", ""),
    ("relative", "mean_relative_layer_error", 1, "{:.3f}", ""),
)


def name_of(bits: tuple[int, int]) -> str:
    """The part at these bits of weights and activations: "W4A8" for (4, 8)."""
    return f"W{bits[0]}A{bits[1]}"


def write_report(
    experiment: GraphExperiment, run: RunDirectory, results: dict[str, dict[str, Any]], console: Console
) -> None:
    """Print the table, draw the pictures, and close the run with summary.json.

    layer_error_N.png shows the variants of N layers at the run's last pair of bits, over_smoothing.png the energy of
    the full-precision states and the accuracy against depth.

    Args:
      experiment: for the heading.
      run: the folder.
      console: where the table goes.
      results: by variant, its "parameters" and its parts: "full" with "accuracy", "energy" and "best_epoch", "W4A8"
        and so on with the fields of `qpde.measure.Faithfulness`; all lists over seeds.
    """
    print_table(console, _table(experiment, results))
    if experiment.bits:
        part = name_of(experiment.bits[-1])
        for depth, names in _by_depth(experiment).items():
            chosen = {name: results[name][part] for name in names}
            layer_error_figure(
                {name: np.mean(result["layer_error"], axis=0) for name, result in chosen.items()},
                run.path / f"layer_error_{depth}.png",
                relative={name: np.mean(result["relative_layer_error"], axis=0) for name, result in chosen.items()},
                title=f"{experiment.data.name}, {part}, mean over {experiment.seeds} seeds",
            )
    families = {
        family: {
            depth: (np.mean(results[name][FULL]["energy"], axis=0), results[name][FULL]["accuracy"])
            for depth, name in depths.items()
        }
        for family, depths in _families(experiment).items()
    }
    title = f"{experiment.data.name}, full precision, {experiment.seeds} seeds"
    over_smoothing_figure(families, run.path / "over_smoothing.png", title=title)
    run.finish({"name": experiment.name, "variants": results})
    console.print(f"written to {run.path}", markup=False, highlight=False, soft_wrap=True)


def check_pictures(experiment: GraphExperiment) -> None:
    """ValueError, before anything is trained, for more variants than the pictures of `write_report` can show."""
    for names in (*_by_depth(experiment).values(), _families(experiment)):
        check_drawable(names)


def _by_depth(experiment: GraphExperiment) -> dict[int, list[str]]:
    """Names of the variants by number of layers, ascending."""
    depths = {variant.name: experiment.model_of(variant).layers for variant in experiment.chosen}
    return {depth: [name for name in depths if depths[name] == depth] for depth in sorted(set(depths.values()))}


def _families(experiment: GraphExperiment) -> dict[str, dict[int, str]]:
    """Variants that differ in depth only, as "plain-8" and "plain-32" do: by what they share, by depth, the name."""
    families: dict[str, dict[int, str]] = {}
    for variant in experiment.chosen:
        family = re.sub(r"-\d+$", "", variant.name)
        families.setdefault(family, {})[experiment.model_of(variant).layers] = variant.name
    return families


def cells(experiment: GraphExperiment, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table of a run: a row for each variant and part, the head first.

    Args:
      experiment: The run's configuration.
      results: See `write_report`.
    """
    rows = [["network", "parameters", "bits", *(heading for heading, *_ in _COLUMNS)]]
    for name, result in results.items():
        for i, part in enumerate((FULL, *map(name_of, experiment.bits))):
            numbers = [_cell(result[part].get(key), *form) for _, key, *form in _COLUMNS]
            rows.append([*((name, f"{result['parameters']:,}") if i == 0 else ("", "")), part, *numbers])
    return rows


def _table(experiment: GraphExperiment, results: dict[str, dict[str, Any]]) -> Table:
    seeds = f"mean ± standard deviation over {experiment.seeds} seeds" if experiment.seeds > 1 else "one seed"
    table = Table(title=f"{experiment.name}: {experiment.data.name}, test nodes, {seeds}", box=box.SIMPLE_HEAD)
    (_, *head), *rows = cells(experiment, results)
    for heading in head:
        table.add_column(heading, justify="left" if heading in ("parameters", "bits") else "right", no_wrap=True)
    for name, *row in rows:
        if name:
            table.add_row(f"[bold]{name}")
        table.add_row(*row)
    return table


def _cell(values: Sequence[float] | None, factor: float, mean: str, deviation: str) -> str:
    if values is None:
        return "-"
    scaled = factor * np.asarray(values)
    return mean.format(scaled.mean()) + (deviation.format(scaled.std(ddof=1)) if len(scaled) > 1 else "")
