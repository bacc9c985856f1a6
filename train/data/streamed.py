"""Images that do not fit on the device: read, decoded and cropped on the host by grain while the device computes.

The state alone determines every batch, as it does for images on the device: the order follows from its key and epoch,
the crop of an image from its key, epoch and the image's place in that order.  So the position in the data is the step,
a resumed run needs no other, and neither threads nor workers nor processes change what a step sees.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from qpde.datasets import Images, Split
from train.config.images import Data
from train.data.order import epoch_order, select_given
from train.data.reader import Batches, Central, Pixels, Varied, read_ahead
from train.data.records import Records
from train.data.resident import stack_batches
from train.host.mesh import batch_sharding
from train.steps.state import TrainState


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A `train.data.resident.ImageSet` that reads its images when a step needs them.

    Attributes:
      train, validation, test: what it reads.
      config: Settings of the crops.
      batch_size: images a step.
      workers: processes that read; 0 reads in threads of this one.
      stored: no images, but the names of the classes, mean, std, and the share of photographs that is looked at.
    """

    train: Records
    validation: Records
    test: Records
    config: Data
    batch_size: int
    workers: int
    stored: Images

    select = staticmethod(select_given)

    @property
    def shape(self) -> tuple[int, int, int]:
        return shape_of(self.train, self.config.size)

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    @property
    def normalize(self) -> Callable:
        return self.stored.normalize

    @property
    def fingerprint(self) -> str:
        # Of a prepared set not every byte: it may be larger than what can be read here.
        name = self.train.contents or self.config.name
        described = (name, len(self.train), self.stored.classes, self.stored.mean, self.stored.std)
        return hashlib.sha256(repr(described).encode()).hexdigest()

    @property
    def count(self) -> int:
        return len(self.train)

    @property
    def chance(self) -> float:
        return 1 / self.num_classes  # for the true share of each class, every record would have to be read

    def feed(self, mesh: Mesh) -> Callable[[TrainState], Iterator[tuple[jax.Array, jax.Array]]]:
        steps, sharding = self.count // self.batch_size, batch_sharding(mesh)

        def batches(state):
            epoch, first = divmod(int(state.step), steps)
            order = np.asarray(epoch_order(state, count=self.count, steps_per_epoch=steps))
            key = np.asarray(jax.random.key_data(state.key))
            source = Batches(
                self.train.take(order[: steps * self.batch_size]),
                self._varied(*(int(word) for word in key.ravel()), epoch),
                self.batch_size,
                part=jax.process_index(),  # this process reads what its own devices take
                parts=jax.process_count(),
            )
            for batch in read_ahead(source, first=first, workers=self.workers):
                yield tuple(jax.make_array_from_process_local_data(sharding, part) for part in batch)

        return batches

    def first_batches(self, *, limit: int) -> Iterator[Split]:
        steps = min(limit, self.count // self.batch_size)
        return self._read(self.train.take(np.arange(steps * self.batch_size)), self._varied(0))

    def in_order(self, part: str) -> Iterator[Split]:
        return self._read(getattr(self, part), Central(self.shape, self.stored.centre))

    def stacks(self, part: str, mesh: Mesh | None = None) -> Iterable[Split]:
        return _Stacks(self, part, mesh)

    def _varied(self, *seed: int) -> Varied:
        return Varied(seed, self.shape, self.config.smallest_crop)

    def _read(self, records: Records, pixels: Pixels) -> Iterator[Split]:
        batches = Batches(records, pixels, self.batch_size)
        return (Split(*batch) for batch in read_ahead(batches, workers=self.workers))


def shape_of(records: Records, size: int) -> tuple[int, int, int]:
    """(height, width, channels) of what the network sees of images: photographs become squares."""
    height, width, channels = records.shape
    return (size, size, channels or 3) if height is None or width is None else (height, width, channels)


@dataclasses.dataclass(frozen=True)
class _Stacks:
    """A part's batches, each a stack of its own, read again whenever they are gone through."""

    images: Streamed
    part: str
    mesh: Mesh | None

    def __iter__(self) -> Iterator[Split]:
        for batch in self.images.in_order(self.part):
            yield stack_batches(batch, self.images.batch_size, self.mesh)
