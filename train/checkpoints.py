"""The last and the best state of a run, kept on disk with orbax, each written whole or not at all."""

from pathlib import Path
from typing import Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.state import TrainState


class Checkpoints:
    """States by epoch.  Use it in a `with` statement.

    The best epoch has the highest validation accuracy and, among equals, the lowest validation loss.
    """

    def __init__(self, directory: Path):
        keep_best = preservation_policy.BestN(get_metric_fn=_quality, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(1), keep_best]),
            best_fn=_quality,
            # The next step donates the state's buffers, so they must be written before `save` returns.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def last_epoch(self) -> int:
        """The epoch of the last state, 0 when there is none."""
        return self._manager.latest_step() or 0

    @property
    def best_epoch(self) -> int:
        """The epoch of the best state, 0 when there is none."""
        return self._manager.best_step() or 0

    def save(self, epoch: int, state: TrainState, validation: dict[str, float]) -> None:
        """Keeps the state after `epoch` as the last, and as the best if `validation` says so.

        Args:
          epoch: from 1 on, increasing.
          state: stays usable.
          validation: "accuracy" and "loss" on the validation images.
        """
        self._manager.save(epoch, args=ocp.args.StandardSave(_storable(state)), metrics=validation)

    def load(self, epoch: int, like: TrainState) -> TrainState:
        """The state saved after `epoch`, in the shapes and types of `like`."""
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        stored = self._manager.restore(epoch, args=ocp.args.StandardRestore(template))
        return stored.replace(key=jax.random.wrap_key_data(stored.key, impl=jax.random.key_impl(like.key)))


def _quality(validation: dict[str, float]) -> tuple[float, float]:
    return validation["accuracy"], -validation["loss"]


def _storable(state: TrainState) -> TrainState:
    """Files hold plain numbers, so the typed random key goes in as its data."""
    return state.replace(key=jax.random.key_data(state.key))
