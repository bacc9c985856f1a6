"""Turn a finished full-precision run into quantized ones, without training: `qpde.ptq` on its best states."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import qpde
import qpde.models
from qpde.bits import Bits, distinct_bits
from train.config.images import Annealing, Calibration, Experiment, Model, Variant
from train.runs.directory import read_experiment, read_results, unfinished
from train.tasks.images import Training
from train.tasks.job import prepare_job
from train.trained.finished import check_data


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize the networks of a full-precision run after their training, and print the faithfulness table.

    Each pair of bits becomes a run of its own, such as RUNS_DIR/RUN_W4A4. It is like a trained run: `reproduce` repeats
    it, and `run --start-from` trains it further. Clips are chosen from training images, without their labels. The same
    command continues after an interruption. With more bits it keeps the finished runs and adds the new ones.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished full-precision run on images."""
    bits: tuple[str, ...]
    """Bits: W4A8 is 4-bit weights and 8-bit activations, 4 is both."""
    calibration: Annotated[Calibration, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Calibration)
    per_channel: bool = False
    """Give each output channel of a kernel a clip of its own."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    runs_dir: Path = Path("runs")
    """Folder that the new runs are written to."""
    overwrite: bool = False
    """Delete earlier runs of the same names."""


def prepare_quantize(options: Quantize) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished full-precision run of images, an option is unusable, or a
        folder to write holds a run of another experiment, or one made from another state.
    """
    source = read_experiment(options.run)
    if not isinstance(source, Experiment):
        raise ValueError(f"{options.run} is a run on graphs, which quantizes by itself: give `run` the option --bits")
    if not options.bits:
        raise ValueError("--bits is empty: give some, such as --bits W8A8 W4A4")
    read_results(options.run)  # a state in the middle of its training is not to be measured
    experiments = [_quantized(source, bits, options) for bits in distinct_bits(options.bits)]
    missing = experiments
    if not options.overwrite:
        advice = "choose another --runs-dir, or --overwrite to delete it"
        missing = unfinished(options.runs_dir, experiments, advice=advice)
    jobs = [
        prepare_job(
            experiment,
            data_dir=options.data_dir,
            runs_dir=options.runs_dir,
            overwrite=options.overwrite,
            elsewhere="--runs-dir",
            check=partial(_check_data, options.run),
        )
        for experiment in missing
    ]

    def work(console: Console) -> None:
        for experiment in experiments:
            if experiment not in missing:
                path = options.runs_dir / experiment.name
                console.print(f"{path} is finished", markup=False, highlight=False, soft_wrap=True)
        for job in jobs:
            job(console)

    return work


def _check_data(run: Path, training: Training) -> None:
    """ValueError where the images that are here are not those that the run was trained on."""
    check_data(run, training.fingerprint, [qpde.load(run / training.variant.name)])


def _quantized(source: Experiment, bits: Bits, options: Quantize) -> Experiment:
    """The experiment that quantizes every variant of `source` and trains nothing."""
    variants = tuple(
        Variant(variant.name, variant.changes | _changes(source.model_of(variant), bits, options.per_channel))
        for variant in source.chosen
    )
    return dataclasses.replace(
        source,
        name=f"{source.name}_W{bits.weights}A{bits.activations}",
        variants=variants,
        start_from=str(options.run),
        calibration=options.calibration,
        annealing=Annealing(),
        epochs=0,
    )


def _changes(model: Model, bits: Bits, per_channel: bool) -> dict[str, object]:
    """What `with_quantizers` changes in a network, in the words of its configuration."""
    network = qpde.models.create(model.name, num_classes=2)
    return {
        "weight_bits": bits.weights,
        "act_bits": bits.activations,
        "standardize": False,
        "per_channel": per_channel,
        "signed_inputs": network.architecture.block.has_signed_inputs,
    }
