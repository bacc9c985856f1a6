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
    takes up an interrupted run; a finished one is never overwritten silently.
    """

    experiment: Annotated[E, tyro.conf.arg(name="")]
    recipe: str
    """Which of the file's recipes."""
    data_dir: Path | None = None
    """Root of the data. Without it the environment variable QPDE_DATA_DIR counts."""
    runs_dir: Path = Path("runs")
    """Where the run's folder goes."""
    overwrite: bool = False
    """Delete what the run's folder holds and start anew."""
    resume_changed: bool = False
    """Go on with an unfinished run though some options differ from those it was started with. They are listed, and
    recorded in config_history.jsonl."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, below the run's folder."""
    distributed: str | None = None
    """Train together with the other processes started with the same command, one a host, over a folder that all see:
    "auto" where they find each other (SLURM, Open MPI, Kubernetes, Cloud TPU), or HOST:PORT of the first one, with
    --processes and --process. --devices all then takes the devices of all."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is: 0, the one that writes and speaks, or 1, 2, ..."""


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
class Command:
    """A row of the table.

    Attributes:
      prepare: arguments -> what `main` then calls with a console, which returns None or an exit status; raises
        ValueError or OSError for bad input.
      usage, summary: its line in the help.
      help: (dataclass, words of a command): what `--help` says where the options depend on what comes before them, the
        dataclass's docstring and that those words with --help list them. None: `prepare` answers it.
    """

    prepare: Callable[[Sequence[str]], Callable[[Console], int | None]]
    usage: str
    summary: str
    help: tuple[type, str] | None = None


COMMANDS = {
    "run": Command(
        prepare_run,
        "run CONFIG.py [--option value ...]",
        "train and evaluate an experiment",
        (Run, "run configs/digits.py"),
    ),
    "sweep": Command(
        parse_sweep,
        "sweep CONFIG.py --seeds 5 --bits 2 4 8",
        "many runs, one table with intervals",
        (Sweep, "sweep configs/digits.py"),
    ),
    "quantize": Command(
        command_of("quantize", Quantize, prepare_quantize),
        "quantize RUN --bits W8A8 W4A4",
        "quantize a full-precision run, untrained",
    ),
    "certify": Command(
        command_of("certify", Certify, prepare_certify),
        "certify RUN --bits 8 6 4",
        "predictions that rounding provably keeps",
    ),
    "elastic": Command(
        command_of("elastic", ElasticRun, prepare_elastic),
        "elastic RUN --bits 2 3 4 6 8 32",
        "the same weights at several bits",
    ),
    "budget": Command(
        command_of("budget", Budget, prepare_budget),
        "budget RUN --bits 2 3 4 6 8 --at 3 4",
        "bits for each block, within a cost",
    ),
    "report": Command(
        command_of("report", Report, prepare_report), "report RUN [RUN ...]", "one page of figures on finished runs"
    ),
    "export": Command(
        command_of("export", Export, prepare_export),
        "export RUN [--settle]",
        "files for other runtimes, with a table",
    ),
    "predict": Command(
        parse_predict,
        "predict RUN FILE [FILE ...]",
        "the classes of pictures",
    ),
    "paper": Command(
        command_of("paper", Paper, prepare_paper),
        "paper --minutes 60 --data-dir FOLDER",
        "the paper's experiments, as far as time reaches",
    ),
    "data": Command(
        parse_data,
        "data prepare NAME [--data-dir FOLDER]",
        "download a set of images, once",
        (Prepare, "data prepare"),
    ),
    "reproduce": Command(
        command_of("reproduce", Reproduce, prepare_reproduce),
        "reproduce RUN [--option value ...]",
        "repeat a run: is the result identical?",
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
    if rest[:1] in (["-h"], ["--help"]) and command.help:
        print(_help_of(command.usage, *command.help))
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
        return _fail("interrupted: the same command goes on after the last saved step", status=130)


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
        f"`{_PROGRAM} run configs/digits.py` is the place to start: it needs no data and takes minutes. "
        f"`{_PROGRAM} run CONFIG.py --help` lists the options with the experiment's own defaults.",
        "Compiled programs are kept in the user's cache: JAX_COMPILATION_CACHE_DIR moves them, "
        "JAX_ENABLE_COMPILATION_CACHE=false turns that off.",
    )
    return (
        f"usage: {_PROGRAM} COMMAND ...\n\n"
        f"{filled('Trains the quantized networks of qpde and reports how faithful they stay in few bits.')}\n\n"
        f"commands:\n{commands}\n\n" + "\n".join(map(filled, closing))
    )


def _help_of(usage: str, options: type, words: str) -> str:
    paragraphs = (inspect.getdoc(options) or "").split("\n\n")
    paragraphs.append(f"`{_PROGRAM} {words} --help` lists the options with their defaults.")
    return "\n\n".join((f"usage: {_PROGRAM} {usage}", *map(filled, paragraphs)))


def _fail(message: str, *, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
