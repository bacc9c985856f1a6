"""The folder of a run: created once, gone on with after an interruption, never overwritten silently.

config.json           the experiment, as given
start.json            of a run that starts from another one: the states it starts from
config_history.jsonl  what --resume-changed changed in it, and after how many lines of metrics
metrics.jsonl         one line an epoch and variant
checkpoints/          the last two and the best state of each variant
summary.json          the results; its presence says that the run is finished
*.png                 pictures
tensorboard/          the metrics once more, with --tensorboard
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from filelock import FileLock, Timeout

from qpde.suggestions import did_you_mean
from qpde.trained import weights_digest
from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.serialize import from_json, to_json
from train.host.distributed import from_first, is_first
from train.runs.tensorboard import FOLDER, Board

CONFIG, METRICS, SUMMARY, CHECKPOINTS = "config.json", "metrics.jsonl", "summary.json", "checkpoints"

_START, _LOCK, _PART = "start.json", ".lock", ".part"
_TEACHER = "loss.teacher"  # the field, and its name in start.json beside those of the variants

_BEGUN = {_LOCK, CONFIG + _PART, _START, _START + _PART}
"""What there is of a run before it has a config.json."""

AnyExperiment = TypeVar("AnyExperiment", bound=Experiment | GraphExperiment)


class RunDirectory:
    """The folder `runs_dir / experiment.name`, held by this run alone during the `with` statement.

    Of several processes that train together the first one writes, and the others read what it reads.

    Attributes:
      path: Path of the folder.
      changes: what differs from the configuration that it was held under before.
    """

    def __init__(self, path: Path, locks: list, changes: list[str], board: Board | None = None):
        self.path, self._locks, self.changes, self._board = path, locks, changes, board

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._board:
            self._board.close()
        for lock in self._locks:
            lock.release()

    def checkpoints(self, variant: str) -> Path:
        """Where the states of a variant are kept."""
        return self.path / CHECKPOINTS / variant

    def log(self, **line: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if is_first():
            with open(self.path / METRICS, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self._board:
            self._board.add(line)

    def lines(self, variant: str) -> list[dict[str, Any]]:
        """The lines of a variant."""
        return from_first(lambda: [line for line in read_lines(self.path) if line["variant"] == variant])

    def forget_after(self, variant: str, epoch: int) -> None:
        """Drop the lines of epochs that were logged but whose state was not saved before an interruption."""
        kept = [line for line in read_lines(self.path) if line["variant"] != variant or line["epoch"] <= epoch]
        if is_first():
            _write(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        if self._board:
            self._board.restart(variant, [line for line in kept if line["variant"] == variant])

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json: from now on the run is finished."""
        _write(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")


def open_run(
    runs_dir: Path,
    experiment: Experiment | GraphExperiment,
    *,
    overwrite: bool = False,
    resume_changed: bool = False,
    tensorboard: bool = False,
    elsewhere: str = "--name",
) -> RunDirectory:
    """Creates the run's folder, or takes up an interrupted run of the same experiment.

    Args:
      runs_dir, experiment: the folder is `runs_dir / experiment.name`.
      overwrite: delete what a run's folder holds; of a link, the link alone.
      resume_changed: take up an unfinished run though its configuration differs, as far as its steps stay the same
        steps; config_history.jsonl records the change.
      tensorboard: also write the metrics as TensorBoard's events (`train.tensorboard`).
      elsewhere: the command's option that chooses another folder, for messages.
    Raises:
      ImportError: they need a package that is missing; nothing is changed.
      FileExistsError: the folder holds a finished run, a run of another experiment or anything else, or
        another process is at work in it; nothing is changed.
    """
    board = Board(runs_dir / experiment.name / FOLDER) if tensorboard else None  # missing in one process, none goes on
    locks = []  # held where they were taken, in the first process

    def claim():
        path, lock, changes = _claim(runs_dir, experiment, overwrite, resume_changed, elsewhere)
        locks.append(lock)
        return str(path), changes

    folder, changes = from_first(claim)
    return RunDirectory(Path(folder), locks, changes, board if is_first() else None)


def unfinished(runs_dir: Path, experiments: Sequence[AnyExperiment], *, advice: str) -> list[AnyExperiment]:
    """Those of the experiments that have no finished run in their folders yet.

    Args:
      runs_dir, experiments: as for `open_run`.
      advice: what to do about a folder of another experiment.
    Raises:
      FileExistsError: there is one.
    """
    for experiment in experiments:
        path = runs_dir / experiment.name
        if (path / CONFIG).is_file() and (changed := _differences(path, experiment, advice)):
            raise FileExistsError(
                f"{path} holds a run of another experiment ({'; '.join(_describe(changed))}): {advice}"
            )
    return [experiment for experiment in experiments if not (runs_dir / experiment.name / SUMMARY).exists()]


def _claim(
    runs_dir: Path, experiment: Experiment | GraphExperiment, overwrite: bool, resume_changed: bool, elsewhere: str
):
    """The folder, the lock on it and what changed."""
    path, advice = runs_dir / experiment.name, f"choose another {elsewhere}, or --overwrite to delete it"
    _check_place(path if overwrite else path / CHECKPOINTS, elsewhere)
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if CONFIG not in held and not held <= _BEGUN:
        if not held & _BEGUN:
            raise FileExistsError(f"{path} holds something that is not a run: choose another {elsewhere}")
        if not overwrite:
            raise FileExistsError(f"{path} holds what is left of a run, without its {CONFIG}: {advice}")
    changed: dict[str, tuple[Any, Any]] = {}
    if CONFIG in held and not overwrite:
        if SUMMARY in held:
            raise FileExistsError(f"{path} holds a finished run: {advice}")
        changed = _differences(path, experiment, advice)
        shown = "; ".join(_describe(changed))
        if changed and not resume_changed:
            raise FileExistsError(
                f"{path} holds an unfinished run of another experiment ({shown}): {advice}, or `run` with "
                "--resume-changed to go on"
            )
        if any(field.startswith(_MEANING_OF_A_STEP) for field in changed):
            raise FileExistsError(f"{path} cannot be resumed with other steps ({shown}): {advice}")
        read_lines(path)  # a damaged one is found now

    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path, elsewhere)
    if overwrite:
        _clear(path)
    if changed:
        lines = len(read_lines(path))
        change = {field: {"before": before, "now": now} for field, (before, now) in changed.items()}
        with open(path / "config_history.jsonl", "a") as file:
            file.write(json.dumps({"metrics_lines": lines, "changes": change}) + "\n")
    if changed or not (path / CONFIG).exists():
        if start := _starts(experiment):
            _write(path / _START, json.dumps(start, indent=2) + "\n")
        _write(path / CONFIG, to_json(experiment))
    return path, lock, _describe(changed)


def _check_place(path: Path, elsewhere: str) -> None:
    """FileExistsError where a file, or a link to nothing, is in the way of a folder."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise FileExistsError(
                f"{place} is a link to {os.readlink(place)}, which is not there: make that folder, remove the link, or "
                f"choose another {elsewhere}"
            )
        if place.exists():
            if not place.is_dir():
                raise FileExistsError(f"{place} is not a folder: choose another {elsewhere}")
            return


def _clear(path: Path) -> None:
    """Empties a run's folder but for its lock; at every moment it can be told from a folder that is no run's."""
    if (path / CONFIG).exists():
        (path / CONFIG).replace(path / (CONFIG + _PART))
    for entry in list(path.iterdir()):
        if entry.name not in (_LOCK, CONFIG + _PART):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def read_experiment(path: Path) -> Experiment | GraphExperiment:
    """The experiment of the run in a folder.

    Raises:
      FileNotFoundError: it is no folder of a run.
      ValueError: its config.json is not one of this version, or damaged.
    """
    if not (path / CONFIG).is_file():
        meant = did_you_mean(path.name, [file.parent.name for file in path.parent.glob(f"*/{CONFIG}")])
        raise FileNotFoundError(f"{path} is no folder of a run: it has no {CONFIG}{meant and ': '}{meant.rstrip()}")
    try:
        return from_json((path / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is unreadable: {error}") from error


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The results by variant of the finished run in a folder.

    Raises:
      FileNotFoundError: no finished run is there.
      ValueError: its summary.json is damaged.
    """
    if not (path / SUMMARY).is_file():
        raise FileNotFoundError(f"{path} holds no finished run: it has no {SUMMARY}")
    try:
        found = json.loads((path / SUMMARY).read_text())["variants"]
        if not isinstance(found, dict) or not all(isinstance(result, dict) for result in found.values()):
            raise TypeError("it holds no results by variant")
        return found
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / SUMMARY} is unreadable ({error!r}): delete it, and the command that made the run writes it again"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All metrics of the run in a folder, line by line; a last line cut short by a crash is left out.

    Raises:
      OSError: another line is damaged; names it.
    """
    file = path / METRICS
    found = []
    # What follows the last end of a line is one that was cut short.
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else [], 1):
        try:
            line = json.loads(text.decode())
            if not (isinstance(line, dict) and isinstance(line.get("variant"), str) and _is_count(line.get("epoch"))):
                raise ValueError('it has no "variant" or no "epoch"')
        except (RecursionError, ValueError) as error:
            raise OSError(f"{file}, line {number}, is damaged ({error}): delete that line") from error
        found.append(line)
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_MEANING_OF_A_STEP = ("kind", "data.", "batch_size")
"""Fields without which a number of steps does not say where a run stands."""


def _lock(path: Path, elsewhere: str) -> FileLock:
    """A lock that no other process can have meanwhile; the system lets go of it when this one ends."""
    lock = FileLock(path / _LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(f"another process works in {path}: wait, or choose another {elsewhere}") from error
    return lock


def _differences(path: Path, experiment: Experiment | GraphExperiment, advice: str) -> dict[str, tuple[Any, Any]]:
    """The fields in which the stored experiment and `experiment` differ, or the states they start from; both values."""
    try:
        stored = _flat(json.loads(to_json(from_json((path / CONFIG).read_text()))))
    except ValueError as error:
        raise FileExistsError(f"{path} holds a run whose config.json is unreadable ({error}): {advice}") from error
    given = _flat(json.loads(to_json(experiment)))
    fields = sorted(stored.keys() | given.keys())
    changed = {f: (stored.get(f), given.get(f)) for f in fields if stored.get(f) != given.get(f)}
    return changed | ({} if changed.keys() & {"start_from", _TEACHER} else start_changes(path, experiment))


def start_changes(path: Path, experiment: Experiment | GraphExperiment) -> dict[str, tuple[str, str]]:
    """Networks that a run started from or learned from and that have changed since: the digest then, and now.

    Args:
      path: The run's folder. Where it does not say, as in older versions, nothing has changed.
      experiment: The run's. A network that is no longer there has not changed either.
    """
    recorded = {}
    with contextlib.suppress(OSError, RecursionError, ValueError):
        recorded = json.loads((path / _START).read_text())
    now = _starts(experiment) if isinstance(recorded, dict) and recorded else {}
    changed = [name for name in now if name in recorded and recorded[name] != now[name]]
    return {f"network {_source(experiment, name)}": (recorded[name], now[name]) for name in changed}


def _starts(experiment: Experiment | GraphExperiment) -> dict[str, str]:
    """Digests of the networks that the variants start from, by variant, and of the teacher, as far as they exist."""
    names = [variant.name for variant in experiment.chosen] if getattr(experiment, "start_from", None) else []
    if isinstance(experiment, Experiment) and experiment.loss.teacher is not None:
        names.append(_TEACHER)
    digests = {name: weights_digest(_source(experiment, name)) for name in names}
    return {name: digest for name, digest in digests.items() if digest is not None}


def _source(experiment: Any, name: str) -> Path:
    """Folder of the network that the variant of that name starts from, or of the teacher."""
    return Path(experiment.loss.teacher) if name == _TEACHER else Path(experiment.start_from) / name


def _describe(changed: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{field}: {before!r} there, {now!r} now" for field, (before, now) in changed.items()]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf for field, inner in value.items() for key, leaf in _flat(inner, f"{name}.{field}".lstrip(".")).items()
    }


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    part = path.with_name(path.name + _PART)
    part.write_text(text)
    part.replace(path)
