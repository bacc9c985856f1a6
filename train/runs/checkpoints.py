"""States of a run on disk: the last, the one before it, and the best; each written whole or not at all, and checked.

A state is any pytree of arrays and random keys.  Orbax copies it and writes in the background, so training goes on
meanwhile; a kill at any moment leaves the states that were complete before.  Before a written folder gets its final
name, SHA256SUMS is added to it (`sha256sum --check SHA256SUMS` reads it): a checkpoint without the file, or whose files
differ from it, is damaged.  Opening the folder sets damaged ones aside, and what is left is used as if they had never
been.  Of several processes each writes a part; when all have, the first one adds the file.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.host.distributed import from_first

Tree = TypeVar("Tree")

_SUMS = "SHA256SUMS"
_DAMAGED = ".damaged"


class Checkpoints:
    """States by the number of steps done.  Use it in a `with` statement, whose end waits for the last save.

    The best state has the highest validation accuracy; of equals the lowest validation loss; of equals it is the last.

    Attributes:
      damaged: folders that were found damaged when this one was opened, as they are named now.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        damaged = from_first(lambda: [str(folder) for folder in _set_aside_damaged(self._directory)])
        self.damaged = [Path(folder) for folder in damaged]
        keep_best = preservation_policy.BestN(get_metric_fn=_quality, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(2), keep_best]),
            best_fn=_quality,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        try:
            with self._writing():
                self._manager.close()
        except CheckpointError:
            if error is None:  # otherwise the first error says it all
                raise

    @property
    def last_step(self) -> int:
        """The step of the last state, 0 when there is none."""
        return self._manager.latest_step() or 0

    @property
    def best_step(self) -> int:
        """The step of the best state that was saved with a validation, 0 when there is none."""
        with self._writing():
            self._manager.wait_until_finished()
        best = self._manager.best_step()
        return best if best and self._manager.metrics(best)["validated"] else 0

    def save(self, step: int, state: Tree, validation: dict[str, float] | None = None) -> None:
        """Keep the state after `step` as the last, and as the best if `validation` says so.

        Returns once the state is copied: the caller may go on and donate it.

        Args:
          step: from 1 on, increasing.
          state: stays usable.
          validation: "accuracy" and "loss" on the validation images; without them the state is no candidate.
        Raises:
          CheckpointError: it could not be written, or the one before it, whose writing this call waits for.
        """
        scores = {"validated": validation is not None} | (validation or {"accuracy": 0.0, "loss": 0.0})
        with self._writing():  # of this state, or of the one before
            self._manager.save(step, args=ocp.args.StandardSave(_storable(state)), metrics=scores)

    def load(self, step: int, like: Tree) -> Tree:
        """The state saved after `step`, in the shapes and types of `like`.

        Raises:
          CheckpointError: it was saved from something of other shapes or other parts.
        """
        with self._writing():
            self._manager.wait_until_finished()
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        try:
            stored = self._manager.restore(step, args=ocp.args.StandardRestore(template))
        except Exception as error:  # orbax has no common class; the files are the ones that were written
            raise CheckpointError(
                f"{self._directory / str(step)} does not fit this network and optimizer: it was saved under another "
                f"configuration or version; choose another --name ({error})"
            ) from error
        return jax.tree.map(_typed_like, like, stored)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what orbax's threads raise, which is of any class, into an error of one line."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"a state could not be written to {self._directory}: {_reason(error)}. Earlier checkpoints are kept. "
                "Once the cause is removed, the same command continues from there"
            ) from error

    def _seal(self) -> None:
        """Called in the first process, in the thread that writes, when all files are complete, of every process, and
        before the folder gets its final name.
        """
        for folder in self._directory.glob("*" + ocp.utils.TMP_DIR_SUFFIX + "*"):
            seal(folder)


class CheckpointError(RuntimeError):
    """A checkpoint that is intact and not the one that is needed, or one that cannot be written."""


def seal(folder: Path) -> None:
    """Write SHA256SUMS: the digest of every file in the folder, but for the two that orbax adds last of all."""
    (folder / _SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in _digests(folder).items()))


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is missing or differs, None if nothing."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return f"{_SUMS} is missing or unreadable"
    found = _digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """By name; files directly in the folder are left out: orbax's marks of completeness, which no state depends on."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _set_aside_damaged(directory: Path) -> list[Path]:
    """Renames damaged checkpoints, so that none is lost and none is used."""
    steps = [path for path in directory.glob("*") if path.name.isdigit()]
    moved = []
    for path in sorted(steps, key=lambda path: int(path.name)):
        if damage(path):
            aside = path.with_name(path.name + _DAMAGED)
            count = 2
            while aside.exists():
                aside, count = path.with_name(f"{path.name}{_DAMAGED}{count}"), count + 1
            moved.append(path.rename(aside))
    return moved


def _reason(error: Exception) -> str:
    """What the system said, where it can be found: tensorstore hides its number in a page of text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return " ".join(str(error).split())[:200]


def _quality(scores: dict[str, float]) -> tuple[float, float, float]:
    return scores["validated"], scores["accuracy"], -scores["loss"]


def _storable(state):
    """Files hold plain numbers, so a typed random key goes in as its data."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _typed_like(leaf, stored):
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else stored


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
