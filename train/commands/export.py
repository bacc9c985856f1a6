"""Deploy the networks of a finished run: `qpde export` of each, and a table of what became of it on test images."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import qpde
from qpde import deploy
from qpde.bits import Bits, parse_bits
from qpde.deploy.command import make_files, shown_margins, write_files
from qpde.files import write_whole
from train.config.images import Experiment, check_at_least
from train.data.fingerprint import fingerprint_of
from train.host.console import print_table
from train.runs.directory import read_experiment, read_results
from train.tasks.nodes_data import load_graph, make_task
from train.tasks.nodes_summary import name_of
from train.trained.deployed import BATCHES, Deployed, RuntimeRow, measure, measure_graph
from train.trained.finished import check_data, read_finished

FOLDER, TABLE = "export", "deployment"

_FORMATS, _GRAPH_FORMATS = tuple(deploy.FORMATS), ("packed", "stablehlo")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the networks of a finished run as files for other runtimes, and compare the runtimes on test images.

    RUN/export/VARIANT holds the files that `qpde export` writes. RUN/export/VARIANT/deployment.json, .csv and .md hold
    the table. For each runtime it lists: codes that differ from those of the integer program in NumPy; accuracy;
    agreement with the high-precision twin; the share of answers proven to be the twin's; milliseconds for a batch on
    one core, beside float32. For a run on a graph the networks of its first seed are written, one for each variant and
    number of bits, in the formats packed and stablehlo.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    format: tuple[str, ...] = ()
    """Formats to write, some of packed, onnx, stablehlo and c. Default: all that the network can have. The table always
    lists every runtime."""
    bits: str | None = None
    """Bits, such as W4A4. Default: the network's own."""
    settle: bool = False
    """Shift norms slightly, so that every runtime rounds every code alike."""
    outer_bits: int | None = None
    """Bits of the kernels of stem, neck and head: 8, or None to keep them in float32."""
    images: int = 1000
    """Number of test images, the first ones."""
    newton_steps: int | None = None
    """Steps of Newton's method before the proof, see `qpde.certify`. Default: none, and every answer that is the twin's
    is proven by the twin itself, for the least."""
    rounds: int = 10
    """Timed calls of each runtime. 0 measures no latencies."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    output: Path | None = None
    """Folder to write to, instead of RUN/export."""


def prepare_export(options: Export) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run, a network cannot have what is asked for, or an option is
        out of range.
      ImportError: ONNX files without the extra [deploy].
    """
    for name, least in (("images", 1), ("newton_steps", 0), ("rounds", 0)):
        if (value := getattr(options, name)) is not None:
            check_at_least(name, value, least)
    bits = None if options.bits is None else parse_bits(options.bits)
    experiment = read_experiment(options.run)
    results = read_results(options.run)
    if isinstance(experiment, Experiment):
        found = read_finished(options.run, options.data_dir)
        networks = {name: finished.network for name, finished in found.items()}
        inputs: dict[str, tuple] = {name: (finished.test_images(options.images),) for name, finished in found.items()}
        size: tuple[int, int] | None = None
        work_on: Callable[..., Deployed] = partial(measure, newton_steps=options.newton_steps, rounds=options.rounds)
    else:
        parts = [name_of(pair) for pair in experiment.bits]
        networks = {f"{k}/{part}": qpde.load(options.run / k / part) for k in results for part in parts}
        task = make_task(load_graph(experiment.data, options.data_dir))
        check_data(options.run, fingerprint_of(jax.tree.leaves(task)), networks.values())
        inputs = dict.fromkeys(networks, (task.graph, task.test))
        size, work_on = (task.graph.nodes.shape[0], len(task.graph.senders)), measure_graph
    formats = options.format or (_FORMATS if size is None else _GRAPH_FORMATS)
    if not options.format and any(getattr(network, "is_segmenting", False) for network in networks.values()):
        formats = tuple(name for name in formats if name != "c")
    made = {
        name: make_files(
            network, formats, bits=bits, settle=options.settle, outer_bits=options.outer_bits, graph_size=size
        )
        for name, network in networks.items()
    }
    output = options.output or options.run / FOLDER

    def work(console: Console) -> None:
        for name, network in networks.items():
            folder, (folded, contents) = output / name, made[name]
            write_files(folder, contents)
            own = network.model.bits if bits is None else bits
            title, lines = f"{experiment.name} {name}, {_shown(own)}", []
            if isinstance(folded, deploy.Folded):
                title += ", settled" if folded.settled else ""
                lines = [folded.summary(), shown_margins(folded)]
            found = work_on(network.model, network.variables, folded, own, *inputs[name])
            sizes = {name: len(content) for name, content in contents.items()}
            theory = deploy.theoretical_bytes(folded)
            _write(folder, title, found, sizes, theory)
            for line in lines:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            print_table(console, _table(title, found))
            absent = [f"{runtime} is not measured: {reason}" for runtime, reason in found.missing.items()]
            for line in (*absent, *_size_lines(sizes, theory), f"written to {folder}"):
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    return work


_COLUMNS: tuple[tuple[str, Callable[[RuntimeRow], str]], ...] = (
    ("runtime", lambda row: row.runtime),
    ("codes that differ", lambda row: "" if not row.codes else f"{row.differing:,} of {row.codes:,}"),
    ("logits off", lambda row: "" if row.logits_off is None else f"{row.logits_off:.1e}"),
    ("accuracy", lambda row: _percent(row.accuracy)),
    ("agreement", lambda row: _percent(row.agreement)),
    ("certified", lambda row: _percent(row.certified)),
    *(
        (f"ms, batch {n}", lambda row, n=n: f"{row.milliseconds[n]:.3g}" if n in row.milliseconds else "")
        for n in BATCHES
    ),
    *(
        (f"of float32, {n}", lambda row, n=n: f"{row.against_float32[n]:.2f}" if n in row.against_float32 else "")
        for n in BATCHES
    ),
)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _shown(bits: Bits) -> str:
    return "".join(f"{letter}{32 if v is None else v}" for letter, v in zip("WA", bits, strict=True))


def _table(title: str, found: Deployed) -> Table:
    table = Table(title=f"{title}: {found.images} test {found.what}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, _ in _COLUMNS:
        table.add_column(column, justify="left" if column == "runtime" else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(*(shown(row) for _, shown in _COLUMNS))
    return table


def _size_lines(sizes: dict[str, int], theory: int) -> list[str]:
    lines = [f"{name}: {size:,} bytes, {size / theory:.2f} of theory" for name, size in sizes.items()]
    return [f"theory: {theory:,} bytes, codes at their bits and all else in float32", *lines]


def _write(folder: Path, title: str, found: Deployed, sizes: dict[str, int], theory: int) -> None:
    rows = [dataclasses.asdict(row) for row in found.rows]
    described = {
        "title": title,
        "images": found.images,
        "accuracy_twin": found.accuracy_twin,
        "theoretical_bytes": theory,
        "bytes": sizes,
        "runtimes": rows,
        "missing": found.missing,
    }
    text = io.StringIO()
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict)} | _by_batch(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(flat)
    contents = {"json": json.dumps(described, indent=2) + "\n", "csv": text.getvalue()}
    contents["md"] = _markdown(title, found, sizes, theory)
    for ending, content in contents.items():
        write_whole(folder / f"{TABLE}.{ending}", content.encode())


def _by_batch(row: dict[str, Any]) -> dict[str, float]:
    return {f"{key}_{n}": value for key in ("milliseconds", "against_float32") for n, value in row[key].items()}


def _markdown(title: str, found: Deployed, sizes: dict[str, int], theory: int) -> str:
    def line(cells):
        return f"| {' | '.join(cells)} |"

    head = [line(name for name, _ in _COLUMNS), line("---" if not i else "---:" for i in range(len(_COLUMNS)))]
    rows = [line(shown(row) for _, shown in _COLUMNS) for row in found.rows]
    missing = [f"{name} is not measured: {reason}" for name, reason in found.missing.items()]
    twin = f"Accuracy of the high-precision twin: {found.accuracy_twin:.2%}."
    parts = [f"{title}: {found.images} test {found.what}", "\n".join(head + rows), twin, *missing]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in _size_lines(sizes, theory))]) + "\n"
