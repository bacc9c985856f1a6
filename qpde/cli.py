"""The script `qpde`: what a person does with a trained network.

Each command imports what it needs when it runs, so that help and completion answer at once.
"""

# PYTHON_ARGCOMPLETE_OK

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qpde.suggestions import did_you_mean

WIDTH = 80
"""Columns of a plain terminal."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with status 2, and whose help fits a plain terminal."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        """Read the arguments; an unknown option is an error that names the nearest one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), unknown[0])
            meant = did_you_mean(option, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}: {meant}".rstrip(": "))
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = did_you_mean(value, action.choices)
            raise argparse.ArgumentError(action, f"invalid choice {value!r}: {meant}choose from {list(action.choices)}")

    def error(self, message: str) -> NoReturn:
        """Print the message and end."""
        self.exit(2, f"error: {message}: `{self.prog} --help` lists the options\n")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=WIDTH)


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
      summary: Its line in the help.
      add_arguments: Gives a parser the command's arguments.
      run: Parsed arguments -> exit status. ValueError, OSError and ImportError say what was wrong with them.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="NETWORK", help="folder of a trained network, such as runs/digits/plain")
    add_prediction_arguments(parser)


def add_prediction_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser what `predict` asks for but the network.

    Args:
      parser: Parser of a command.
    """
    parser.add_argument("files", metavar="FILE", nargs="+", help="picture, or folder of pictures")
    parser.add_argument("--bits", metavar="W4A4", help="bits of weights and activations; default: the network's own")
    parser.add_argument(
        "--certify",
        action="store_true",
        help="prove which predictions rounding cannot have changed; takes longer",
    )
    parser.add_argument(
        "--newton-steps",
        type=int,
        metavar="N",
        help="steps of Newton's method in that proof, for one that says why; default: the cheapest proof, without",
    )
    parser.add_argument(
        "--output",
        default="predictions",
        metavar="FOLDER",
        help="folder for label maps and overlays, which segmentation networks write; default: predictions",
    )
    parser.add_argument(
        "--format", choices=("table", "csv", "jsonl"), default="table", help="form of the output; default: table"
    )


def _predict(options: argparse.Namespace) -> int:
    from qpde.predictions import predict_files
    from qpde.trained import load

    network = load(options.network)
    if network.is_segmenting:
        return maps_of({"": network}, options)
    predictors = predictors_of({"": network}, options)
    return predict_files(predictors, options.files, form=options.format)


def maps_of(networks: dict[str, Any], options: argparse.Namespace) -> int:
    """Write the label maps and overlays of pictures, those of each network into a folder of its name.

    Args:
      networks: Segmentation networks by their names.
      options: What a parser with `add_prediction_arguments` has parsed.
    Returns:
      The exit status.
    Raises:
      ValueError: A certificate was asked for.
    """
    from pathlib import Path

    from qpde.bits import parse_bits
    from qpde.overlays import write_maps

    if options.certify:
        raise ValueError("there are no certificates for every pixel: leave --certify out")
    bits = None if options.bits is None else parse_bits(options.bits)
    return max(
        write_maps(network, options.files, Path(options.output) / name, bits=bits) for name, network in networks.items()
    )


def predictors_of(networks: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The `qpde.predictions.Predictor` of each network.

    Args:
      networks: Results of `qpde.load` by their names.
      options: What a parser with `add_prediction_arguments` has parsed.
    Raises:
      ValueError: A network cannot do what the options ask for.
    """
    from qpde.bits import parse_bits
    from qpde.predictions import Predictor

    bits = None if options.bits is None else parse_bits(options.bits)
    more = {"certified": options.certify, "newton_steps": options.newton_steps}
    return {name: Predictor(network, bits, **more) for name, network in networks.items()}


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="NETWORK", help="folder of a trained network, such as runs/digits/plain")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _show(options: argparse.Namespace) -> int:
    import json

    from qpde.description import describe
    from qpde.trained import load

    found = describe(load(options.network))
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        for i, line in enumerate(_lines(value)):
            print(f"{'' if i else name:16}{line}")
    return 0


def _lines(value: Any) -> list[str]:
    """A value in lines that fit beside its name."""
    if isinstance(value, dict):
        return [f"{name}: {', '.join(_lines(inner))}" for name, inner in value.items()] or ["-"]
    if not isinstance(value, list | tuple):
        is_count = isinstance(value, int) and not isinstance(value, bool)
        return ["-" if value is None else f"{value:,}" if is_count else str(value)]
    lines = [""]
    for word in map(str, value):
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        if len(longer) <= WIDTH - 17 or not lines[-1]:
            lines[-1] = longer
        else:
            lines[-1] += ","
            lines.append(word)
    return lines


def _lazily(module: str, summary: str) -> Command:
    """A command that a module of its own holds, as functions `add_arguments` and `run`."""

    def function(name: str) -> Callable[..., Any]:
        return lambda argument: getattr(importlib.import_module(module), name)(argument)

    return Command(summary, function("add_arguments"), function("run"))


COMMANDS = {
    "predict": Command("predict the classes of pictures", _add_predict, _predict),
    "export": _lazily("qpde.deploy.command", "write files for other runtimes: packed, ONNX, StableHLO, C"),
    "show": Command("show what a network is and where it came from", _add_show, _show),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: Words of the command line. Default: those of the process.
    Returns:
      The exit status: 0 done, 1 a file could not be read, 2 bad input.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}: {did_you_mean(name, COMMANDS)}choose from {list(COMMANDS)}")
    parser = Parser(prog=f"qpde {name}", description=COMMANDS[name].summary)
    try:
        COMMANDS[name].add_arguments(parser)
        return COMMANDS[name].run(parser.parse_args(rest))
    except SystemExit as end:  # argparse has printed what there is to say
        return int(end.code or 0)
    except BrokenPipeError:  # whoever read the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))


def _help() -> str:
    commands = "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: qpde COMMAND ...\n\n"
        "Use a trained network: a folder that holds network.json and weights.safetensors.\n\n"
        f"commands:\n{commands}\n\n`qpde COMMAND --help` lists the options of a command."
    )


def _complete() -> None:
    """Answer the shell that asks by way of argcomplete."""
    import argcomplete

    parser = Parser(prog="qpde")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = commands.add_parser(name)
        if name in os.environ["COMP_LINE"].split():  # `export` imports JAX for its arguments
            command.add_arguments(own)
    argcomplete.autocomplete(parser)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
