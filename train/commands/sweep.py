"""Many runs of one experiment, over seeds, bits and forms, and one table of them: mean, confidence interval, test.

A cell of the sweep, one pair of bits and one seed, is a run like any other, in RUNS_DIR/NAME_sweep/W4A4_seed0: it is
taken up after an interruption, it can be reproduced, and a finished one is not run again when the sweep grows.
"""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from qpde.bits import Bits, distinct_bits
from qpde.plots import against_bits_figure
from train.config.images import Experiment, Variant, check_at_least
from train.config.segmentation import SegmentationExperiment
from train.host.console import print_table
from train.runs.directory import read_results, unfinished
from train.tasks.images_summary import check_drawable
from train.tasks.job import prepare_job
from train.tasks.lockstep import prepare_lockstep

_FORMS = {
    "both": (Variant("symmetric", {"symmetric": True}), Variant("plain", {"symmetric": False})),
    "yes": (Variant("symmetric", {"symmetric": True}),),
    "no": (Variant("plain", {"symmetric": False}),),
}

# Columns of the table: heading, key in a run's results, factor, digits.
_COLUMNS = (
    ("accuracy, %", "accuracy", 100, 2),
    ("agreement, %", "agreement", 100, 2),
    ("relative error", "mean_relative_layer_error", 1, 4),
)
_CSV = ("accuracy", "accuracy_twin", "agreement", "mean_layer_error", "mean_relative_layer_error", "parameters")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Run an experiment at several bits and with several seeds, and compare its variants.

    Writes RUNS_DIR/NAME_sweep: a run for each combination of bits and seed, sweep.csv and sweep.png. The same command
    continues after an interruption. With more seeds or bits it keeps the finished runs and adds the new ones.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    recipe: str
    """Recipe of the file. The first is the default."""
    seeds: int = 5
    """Number of seeds, counted up from the experiment's own."""
    bits: tuple[str, ...] | None = None
    """Bits: W4A8 is 4-bit weights and 8-bit activations, 4 is both. Default: the model's."""
    symmetric: Literal["both", "yes", "no"] | None = None
    """Compare symmetric and plain networks ("both"), or run one kind, instead of the experiment's variants."""
    at_once: int | None = None
    """Number of runs that train together in one compiled step (vmap). Default: 1 on a CPU, where more are slower, and
    the number of seeds elsewhere. Several at once sum in another order than one alone, so last digits differ."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    runs_dir: Path = Path("runs")
    """Folder that the sweep's folder is written to."""


def prepare_sweep(options: Sweep) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: an option is unusable, or a cell's folder holds a run of another experiment or a damaged one.
    """
    cells, folder = _cells(options), options.runs_dir / f"{options.experiment.name}_sweep"
    missing = unfinished(folder, cells, advice="choose another --name")
    for cell in cells:
        if cell not in missing:
            read_results(folder / cell.name)
    at_once = options.at_once
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else options.seeds
    check_at_least("at_once", at_once, 1)
    parts = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]

    def prepared(part: Sequence[Experiment]) -> Callable[[Console], None]:
        if at_once == 1:
            return prepare_job(part[0], data_dir=options.data_dir, runs_dir=folder)
        return prepare_lockstep(part, data_dir=options.data_dir, runs_dir=folder)

    first = [prepared(part) for part in parts[:1]]

    def work(console: Console) -> None:
        done = len(cells) - len(missing)
        for part in parts:
            title = f"{', '.join(cell.name for cell in part)}: {done + len(part)} of {len(cells)}"
            console.print(title, markup=False, highlight=False)
            job = first.pop() if first else prepared(part)
            job(console)
            done += len(part)
        _report(options, cells, folder, console)

    return work


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% confidence interval, t(n - 1) s / sqrt(n); NaN for one value."""
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return float(sample.mean()), float("nan")
    quantile = stats.t.ppf(0.975, len(sample) - 1)
    return float(sample.mean()), float(quantile * sample.std(ddof=1) / np.sqrt(len(sample)))


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """p of the paired t-test that a and b, seed by seed, have the same mean.

    1 where all differences are 0, 0 where they are all the same other number, NaN for one pair.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(difference) < 2:
        return float("nan")
    if np.ptp(difference) == 0:
        return float(difference[0] == 0)
    return float(stats.ttest_rel(a, b).pvalue)


def _columns(options: Sweep) -> tuple[tuple[str, str, int, int], ...]:
    """Heading, key, factor and digits of what the table compares."""
    of_pixels = (("mean IoU, %", "mean_iou", 100, 2),) if isinstance(options.experiment, SegmentationExperiment) else ()
    return of_pixels + _COLUMNS


def _fields(options: Sweep) -> tuple[str, ...]:
    """Columns of sweep.csv behind bits, seed and variant."""
    return _CSV + (("mean_iou",) if isinstance(options.experiment, SegmentationExperiment) else ())


def _cells(options: Sweep) -> list[Experiment]:
    check_at_least("seeds", options.seeds, 1)
    source = options.experiment
    variants = source.chosen if options.symmetric is None else _FORMS[options.symmetric]
    check_drawable(variants)
    cells = []
    for bits in _bits_of(options, variants):
        own_bits = {"weight_bits": bits.weights, "act_bits": bits.activations}
        own = tuple(Variant(variant.name, variant.changes | own_bits) for variant in variants)
        for seed in range(source.seed, source.seed + options.seeds):
            name = f"W{bits.weights}A{bits.activations}_seed{seed}"
            cells.append(dataclasses.replace(source, name=name, variants=own, only=(), seed=seed))
    return cells


def _bits_of(options: Sweep, variants: Sequence[Variant]) -> list[Bits]:
    """Those given, or those that all variants have."""
    if options.bits is None:
        own = [options.experiment.model_of(variant) for variant in variants]
        found = {Bits(model.weight_bits, model.act_bits) for model in own}
        if len(found) == 1 and None not in (bits := found.pop()):
            return [bits]
    if not options.bits:
        raise ValueError("--bits is empty, or not all variants are quantized alike: give some, such as --bits 2 4 8")
    return distinct_bits(options.bits)


def _report(options: Sweep, cells: list[Experiment], folder: Path, console: Console) -> None:
    """Prints the table and writes sweep.csv and sweep.png."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by bits, by variant, over seeds
    with open(folder / "sweep.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("bits", "seed", "variant", *_fields(options)))
        for cell in cells:
            bits = cell.name.split("_")[0]
            for variant, result in read_results(folder / cell.name).items():
                writer.writerow((bits, cell.seed, variant, *(result[key] for key in _fields(options))))
                results.setdefault(bits, {}).setdefault(variant, []).append(result)
    print_table(console, _table(options, results))
    variants = list(next(iter(results.values())))
    figure = {
        heading: {v: {w: interval([factor * r[key] for r in results[w][v]]) for w in results} for v in variants}
        for heading, key, factor, _ in _columns(options)
    }
    against_bits_figure(figure, folder / "sweep.png", title=f"{options.experiment.name}, {options.seeds} seeds")
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)


def _table(options: Sweep, results) -> Table:
    seeds = f"mean ± 95% confidence interval over {options.seeds} seeds" if options.seeds > 1 else "one seed"
    table = Table(title=f"{options.experiment.name}: {seeds}", box=box.SIMPLE_HEAD)
    for heading in ("bits", "variant", *(heading for heading, *_ in _columns(options))):
        table.add_column(heading, justify="left" if heading in ("bits", "variant") else "right", no_wrap=True)
    digits = [digits for *_, digits in _columns(options)]
    for bits, by_variant in results.items():
        columns = {
            variant: [[factor * result[key] for result in found] for _, key, factor, _ in _columns(options)]
            for variant, found in by_variant.items()
        }
        for i, (variant, values) in enumerate(columns.items()):
            table.add_row(bits if i == 0 else "", variant, *map(_with_interval, values, digits))
        first, *others = columns
        for other in others:
            difference = map(np.subtract, columns[first], columns[other])
            signed = (_with_interval(values, d, sign="+") for values, d in zip(difference, digits, strict=True))
            table.add_row("", f"{first} - {other}", *signed, style="dim")
            if options.seeds > 1:
                p = map(paired_p, columns[first], columns[other])
                table.add_row("", "p, paired test", *(f"{value:.2g}" for value in p), style="dim")
    return table


def _with_interval(values: Sequence[float] | np.ndarray, digits: int, sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")
