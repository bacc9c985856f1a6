"""The command line.  A command is a dataclass whose fields are its options, and one row of `COMMANDS`."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from rich.console import Console

from qpde.suggestions import did_you_mean
from train.commands.budget import Budget, prepare_budget
from train.commands.certify import Certify, prepare_certify
from train.commands.data import Prepare, parse_data
from train.commands.elastic import ElasticRun, prepare_elastic
from train.commands.export import Export, prepare_export
from train.commands.frontier import Frontier, prepare_frontier
from train.commands.options import filled, parse
from train.commands.paper import Paper, prepare_paper
from train.commands.predict import parse_predict
from train.commands.quantize import Quantize, prepare_quantize
from train.commands.report import Report, prepare_report
from train.commands.reproduce import Reproduce, prepare_reproduce
from train.commands.sweep import Sweep, prepare_sweep
from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.recipe_files import load_recipes
from train.data.records import DataError
from train.host.console import quiet_libraries
from train.host.distributed import is_first, join
from train.host.interrupt import Interrupted
from train.runs.checkpoints import CheckpointError
from train.tasks.job import prepare_job

_PROGRAM = "python -m train"

E = TypeVar("E", Experiment, GraphExperiment)


@dataclass(frozen=True)
class Run(Generic[E]):
    """Train the variants of an experiment and compare each with its high-precision twin.

    Writes RUNS_DIR/NAME: config.json, metrics.jsonl, checkpoints, summary.json and pictures. The same command
    continues an interrupted run. A finished run is never overwritten silently.
    """

    experiment: Annotated[E, tyro.conf.arg(name="")]
    recipe: str
    """Recipe of the file. The first is the default."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    runs_dir: Path = Path("runs")
    """Folder that the run's folder is written to."""
    overwrite: bool = False
    """Delete the contents of the run's folder and start again."""
    resume_changed: bool = False
    """Continue an unfinished run although some options have changed. The changes are listed, and recorded in
    config_history.jsonl."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, below the run's folder."""
    distributed: str | None = None
    """Train on several hosts: start the same command on each, with a runs folder that all of them share. "auto" lets
    the processes find each other (SLURM, Open MPI, Kubernetes, Cloud TPU). Elsewhere give HOST:PORT of the first
    process, --processes and --process. Use --devices all to train on the devices of all hosts."""
    processes: int | None = None
    """Number of processes, with --distributed HOST:PORT."""
    process: int | None = None
    """Index of this process, from 0. Process 0 writes the files and prints."""


def parse_run(arguments: Sequence[str]) -> Run[Experiment] | Run[GraphExperiment]:
    """The options of `run`; the defaults are those of the file and recipe that the arguments name.

    Raises:
      ValueError: no file is named, or it has no such recipe.
      FileNotFoundError: it does not exist.
      SystemExit: an option is unknown or wrong, or help was asked for; tyro has printed why.
    """
    return _parse_with_recipe(Run, "run", arguments)


def _parse_with_recipe(command: type, name: str, arguments: Sequence[str]):
    paths = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if not paths:
        raise ValueError(f"name an experiment first: {_PROGRAM} {name} configs/digits.py [--option value ...]")
    recipes = load_recipes(Path(paths[0]))
    recipe = _value_of("--recipe", arguments) or next(iter(recipes))
    if recipe not in recipes:
        meant = did_you_mean(recipe, recipes)
        raise ValueError(f"{paths[0]} has no recipe {recipe!r}: {meant}choose from {list(recipes)}")
    experiment = recipes[recipe]
    if command is Sweep and not isinstance(experiment, Experiment):
        raise ValueError(f"{paths[0]} trains on a graph, at all its seeds and bits in one run: use {_PROGRAM} run")
    kind: Any = command
    if command is Run:
        kind = Run[type(experiment)]  # type: ignore[misc]  # a class that only the file of the experiment names
    return parse(
        kind,
        arguments[1:],
        prog=f"{_PROGRAM} {name} {paths[0]}",
        default=command(experiment=experiment, recipe=recipe),
        config=(tyro.conf.SuppressFixed,),
    )


def prepare_run(arguments: Sequence[str]) -> Callable[[Console], None]:
    """The job that the arguments of `run` describe, everything about it checked."""
    options = parse_run(arguments)
    if options.distributed is not None:
        join(options.distributed, options.processes, options.process)
    return prepare_job(
        options.experiment,
        data_dir=options.data_dir,
        runs_dir=options.runs_dir,
        overwrite=options.overwrite,
        resume_changed=options.resume_changed,
        tensorboard=options.tensorboard,
    )


def parse_sweep(arguments: Sequence[str]) -> Callable[[Console], None]:
    """The runs that the arguments of `sweep` describe, everything about them checked."""
    options = _parse_with_recipe(Sweep, "sweep", arguments)
    spelled = [argument.replace("_", "-") for argument in arguments]
    for option in ("--model.weight-bits", "--model.act-bits"):
        if options.bits is not None and _value_of(option, spelled) is not None:
            raise ValueError(f"{option} and --bits both give bits: leave one of them out")
    return prepare_sweep(options)


def command_of(name: str, options: type, prepare: Callable) -> Callable[[Sequence[str]], Callable]:
    """arguments -> the job that they describe, for a command whose options are the fields of a dataclass.

    Args:
      name: Name of the command.
      options: the dataclass.
      prepare: options -> the job, everything about it checked.
    """
    return lambda arguments: prepare(parse(options, arguments, prog=f"{_PROGRAM} {name}"))


@dataclass(frozen=True)
class Brief:
    """What `--help` says of a command whose options depend on the file that comes first.

    Attributes:
      options: The command's dataclass, whose docstring is shown.
      example: Words of a command that lists all options when it is followed by --help.
      important: Some options, each with what it is for.
    """

    options: type
    example: str
    important: tuple[tuple[str, str], ...] = ()


_OF_RUN = (
    ("--recipe NAME", "another recipe of the file"),
    ("--name NAME", "name of the run, and of its folder"),
    ("--epochs N", "passes over the training data"),
    ("--seed N", "seed of the weights and of the data's order"),
    ("--model.weight-bits N", "bits of the kernels; None: full precision"),
    ("--model.act-bits N", "bits of the activations; None: full precision"),
    ("--optimizer.learning-rate X", "peak of the learning rate"),
    ("--data.name NAME", "cifar10, folder/PATH, npz/PATH, tfds/NAME"),
    ("--data-dir FOLDER", "root folder of the data"),
    ("--overwrite", "delete an earlier run of this name"),
)

_OF_SWEEP = (
    ("--seeds N", "number of seeds"),
    ("--bits 2 W4A8 ...", "bits to compare"),
    ("--symmetric both", "compare symmetric and plain networks"),
)


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
      prepare: arguments -> what `main` then calls with a console, which returns None or an exit status; raises
        ValueError or OSError for bad input.
      usage, summary: its line in the help.
      brief: What `--help` says, where `prepare` cannot.
    """

    prepare: Callable[[Sequence[str]], Callable[[Console], int | None]]
    usage: str
    summary: str
    brief: Brief | None = None


COMMANDS = {
    "run": Command(
        prepare_run,
        "run CONFIG.py [--option value ...]",
        "train and evaluate an experiment",
        Brief(Run, "run configs/digits.py", _OF_RUN),
    ),
    "sweep": Command(
        parse_sweep,
        "sweep CONFIG.py --seeds 5 --bits 2 4 8",
        "run many seeds and bits, for one table",
        Brief(Sweep, "sweep configs/digits.py", _OF_SWEEP),
    ),
    "quantize": Command(
        command_of("quantize", Quantize, prepare_quantize),
        "quantize RUN --bits W8A8 W4A4",
        "quantize a full-precision run without training",
    ),
    "certify": Command(
        command_of("certify", Certify, prepare_certify),
        "certify RUN --bits 8 6 4",
        "count predictions that rounding provably keeps",
    ),
    "elastic": Command(
        command_of("elastic", ElasticRun, prepare_elastic),
        "elastic RUN --bits 2 3 4 6 8 32",
        "evaluate the same weights at several bits",
    ),
    "budget": Command(
        command_of("budget", Budget, prepare_budget),
        "budget RUN --bits 2 3 4 6 8 --at 3 4",
        "choose bits for each block within a budget",
    ),
    "report": Command(
        command_of("report", Report, prepare_report),
        "report RUN [RUN ...]",
        "show finished runs on one page of figures",
    ),
    "frontier": Command(
        command_of("frontier", Frontier, prepare_frontier),
        "frontier RUN RUN [RUN ...]",
        "compare runs by accuracy and layer-wise error",
    ),
    "export": Command(
        command_of("export", Export, prepare_export),
        "export RUN [--settle]",
        "write files for other runtimes, and compare them",
    ),
    "predict": Command(
        parse_predict,
        "predict RUN FILE [FILE ...]",
        "predict the classes of pictures",
    ),
    "paper": Command(
        command_of("paper", Paper, prepare_paper),
        "paper --minutes 60 --data-dir FOLDER",
        "run the paper's experiments within a time",
    ),
    "data": Command(
        parse_data,
        "data prepare NAME [--data-dir FOLDER]",
        "download a set of images, once",
        Brief(Prepare, "data prepare"),
    ),
    "reproduce": Command(
        command_of("reproduce", Reproduce, prepare_reproduce),
        "reproduce RUN [--option value ...]",
        "repeat a run and compare the results",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      The exit status: 0 done, 1 training broke down, a file could not be read or written, or a reproduction differs,
      2 bad input, 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    quiet_libraries()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}: {did_you_mean(name, COMMANDS)}choose from {list(COMMANDS)}")
    command = COMMANDS[name]
    if rest[:1] in (["-h"], ["--help"]) and command.brief:
        print(_help_of(command.usage, command.brief))
        return 0
    try:
        try:
            work = command.prepare(rest)
        except (ValueError, OSError, ImportError) as error:
            return _fail(str(error))
        return work(Console(quiet=not is_first())) or 0
    except (FloatingPointError, CheckpointError, DataError, OSError) as error:
        return _fail(str(error), status=1)
    except Interrupted as interrupted:
        return _fail(str(interrupted), status=interrupted.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted: the same command continues after the last saved step", status=130)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option before all options are known."""
    for position, argument in enumerate(arguments):
        if argument == option:
            return next(iter(arguments[position + 1 :]), None)
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return None


def _help() -> str:
    """In lines of at most 80 characters."""
    commands = "\n".join(f"  {command.usage}\n      {command.summary}" for command in COMMANDS.values())
    closing = (
        f"Start with `{_PROGRAM} run configs/digits.py`: it downloads nothing and takes minutes. "
        f"`{_PROGRAM} COMMAND --help` explains a command.",
        "Compiled programs are kept in the user's cache folder. JAX_COMPILATION_CACHE_DIR names another folder, "
        "JAX_ENABLE_COMPILATION_CACHE=false keeps none.",
    )
    return (
        f"usage: {_PROGRAM} COMMAND ...\n\n"
        f"{filled('Train the quantized networks of qpde, and measure how faithful they stay in few bits.')}\n\n"
        f"commands:\n{commands}\n\n" + "\n".join(map(filled, closing))
    )


def _help_of(usage: str, brief: Brief) -> str:
    paragraphs = [f"usage: {_PROGRAM} {usage}"]
    paragraphs += map(filled, (inspect.getdoc(brief.options) or "").split("\n\n"))
    if brief.important:
        paragraphs.append("\n".join(["options:", *(f"  {option:30}{what}" for option, what in brief.important)]))
    paragraphs.append(filled(f"`{_PROGRAM} {brief.example} --help` lists all options, with the recipe's own defaults."))
    return "\n\n".join(paragraphs)


def _fail(message: str, *, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
