"""`python -m train data prepare NAME`: download a set of tensorflow-datasets and write it as training reads it."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from qpde.suggestions import did_you_mean
from train.commands.options import parse
from train.data.resident import data_root
from train.data.tfds_records import PREFIX, find_builder

_NEEDED = ("tensorflow", "importlib_resources")
"""What tensorflow-datasets imports to prepare a set and not to read it."""


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download a set of images and write it into array_record files, from which training reads without TensorFlow.

    Do this once for each set. Some sets, such as imagenet2012, must be downloaded by hand first: a message then says
    which files are needed, and where.
    """

    name: Annotated[str, tyro.conf.Positional]
    """Name in the catalogue of tensorflow-datasets, such as cifar100, imagenet2012 or cifar10_corrupted/fog_3."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""


def parse_data(arguments: Sequence[str]) -> Callable[[Console], int | None]:
    """The work that the arguments of `data` describe: so far, all there is to do with data is to prepare them.

    Raises:
      ValueError: another word than "prepare", no folder, or no such set.
      ImportError: what preparation needs is not installed.
    """
    if list(arguments[:1]) != ["prepare"]:
        word = arguments[0] if arguments else ""
        found = f"{word!r} is no command for data" if arguments else "a command for data is missing"
        meant = did_you_mean(word, ["prepare"])
        raise ValueError(f"{found}: {meant}use python -m train data prepare NAME [--data-dir FOLDER]")
    options = parse(Prepare, arguments[1:], prog="python -m train data prepare")
    root = data_root(options.name, options.data_dir)
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"preparing {options.name} needs {' and '.join(missing)}: pip install -e '.[prepare]'")
    builder = find_builder(PREFIX + options.name.removeprefix(PREFIX), root, file_format="array_record")

    def work(console: Console) -> int:
        try:
            builder.download_and_prepare(file_format="array_record")
        except (
            AssertionError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # of network, disk, checksums, files by hand
            print(f"error: {options.name} could not be prepared: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        splits = ", ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
        console.print(f"{PREFIX}{builder.info.full_name}: {splits}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"written to {builder.data_path}", markup=False, highlight=False, soft_wrap=True)
        return 0

    return work
