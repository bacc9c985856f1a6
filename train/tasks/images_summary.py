"""The end of a run: the faithfulness table, summary.json and the picture of the layer-wise error."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qpde.plots import COLOURS, layer_error_figure
from train.config.images import Experiment
from train.host.console import print_table
from train.runs.directory import RunDirectory

# Rows of the table: what, key in the results, format.
_ROWS = (
    ("parameters, without clips", "parameters", "{:,}"),
    ("mean intersection over union", "mean_iou", "{:.2%}"),
    ("the same, high-precision twin", "mean_iou_twin", "{:.2%}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("accuracy, high-precision twin", "accuracy_twin", "{:.2%}"),
    ("agreement with the twin", "agreement", "{:.2%}"),
    ("accuracy, full-precision start", "accuracy_start", "{:.2%}"),
    ("agreement with it", "agreement_start", "{:.2%}"),
    ("layer-wise error, mean", "mean_layer_error", "{:.4f}"),
    ("layer-wise error, relative, mean", "mean_relative_layer_error", "{:.4f}"),
    ("gamma2 of the blocks that smooth, mean", "mean_gamma2", "{:.4f}"),
    ("best validation mean intersection over union", "validation_mean_iou", "{:.2%}"),
    ("best validation accuracy", "validation_accuracy", "{:.2%}"),
    ("at epoch", "best_epoch", "{}"),
    ("training time", "training_seconds", "{:.0f} s"),
)


def write_report(
    experiment: Experiment,
    stages: Sequence[int],
    run: RunDirectory,
    results: dict[str, dict[str, Any]],
    console: Console,
) -> None:
    """Print the table, draw layer_error.png, and close the run with summary.json.

    Args:
      experiment: for the heading.
      stages: number of blocks in each stage, for the picture.
      run: the folder.
      results: by variant: "parameters", the fields of `qpde.measure.Faithfulness` (of a quantized
        network), and the history of its training.
      console: where the table goes.
    """
    print_table(console, _table(experiment, results))
    quantized = {name: result for name, result in results.items() if "layer_error" in result}
    if quantized:
        layer_error_figure(
            {name: np.asarray(result["layer_error"]) for name, result in quantized.items()},
            run.path / "layer_error.png",
            relative={name: np.asarray(result["relative_layer_error"]) for name, result in quantized.items()},
            stages=stages,
        )
    run.finish({"name": experiment.name, "variants": results})
    console.print(f"written to {run.path}", markup=False, highlight=False, soft_wrap=True)


def check_drawable(variants: Collection) -> None:
    """ValueError, before anything is trained, for more variants than one picture can tell apart."""
    if len(variants) > len(COLOURS):
        raise ValueError(
            f"{len(variants)} variants are more than the {len(COLOURS)} that one picture tells apart: choose some "
            "with --only"
        )


def cells(experiment: Experiment, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table of a run: a column for each variant, its head first.

    Args:
      experiment: The run's configuration.
      results: See `write_report`.
    """
    rows = [["", *results], ["bits, weights and activations", *(_bits_of(experiment, name) for name in results)]]
    for label, key, form in _ROWS:
        if any(key in result for result in results.values()):
            rows.append([label, *(form.format(r[key]) if key in r else "-" for r in results.values())])
    for name in next((r["iou"] for r in results.values() if "iou" in r), {}):
        own = [r.get("iou", {}).get(name) for r in results.values()]
        rows.append([f"intersection over union, {name}", *("-" if v is None else f"{v:.2%}" for v in own)])
    return rows


def _table(experiment: Experiment, results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"{experiment.name}: {experiment.model.name} on {experiment.data.name}, test images")
    (first, *names), *rows = cells(experiment, results)
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _bits_of(experiment: Experiment, name: str) -> str:
    (variant,) = [variant for variant in experiment.variants if variant.name == name]
    model = experiment.model_of(variant)
    return " and ".join("32" if bits is None else str(bits) for bits in (model.weight_bits, model.act_bits))
