"""Batches of images on the host: read, decoded, cropped and stacked, ahead of who asks for them.

Nothing here needs JAX, because whatever it imports each worker process imports too.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np

from qpde.pictures import centre_crop
from train.data.photographs import random_resized_crop
from train.data.records import DataError, Records

_AHEAD = 2
"""Batches that each thread or worker reads ahead."""

_MOST_THREADS = 8

Pixels = Callable[[np.ndarray | bytes, int], np.ndarray]
"""(image as it is stored, place in the order) -> uint8 (height, width, channels)."""

Batch = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (N, height, width, channels), and labels, int32 (N,)."""


@dataclasses.dataclass(frozen=True)
class Central:
    """The image as it is, or the middle of a photograph, resized.

    Attributes:
      shape: (height, width, channels) of the result.
      centre: Share of a photograph's short side, see `qpde.pictures.centre_crop`.
    """

    shape: tuple[int, int, int]
    centre: float

    def __call__(self, image: np.ndarray | bytes, place: int) -> np.ndarray:
        return image if isinstance(image, np.ndarray) else centre_crop(image, self.shape, centre=self.centre)


@dataclasses.dataclass(frozen=True)
class Varied:
    """The image as it is, because what varies it does so on the device; or a random part of a photograph.

    Attributes:
      seed: With the image's place, what the part follows from.
      shape: (height, width, channels) of the result.
      smallest_area: Smallest area of the part, as a share of the photograph.
    """

    seed: tuple[int, ...]
    shape: tuple[int, int, int]
    smallest_area: float

    def __call__(self, image: np.ndarray | bytes, place: int) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image
        rng = np.random.default_rng((*self.seed, place))
        return random_resized_crop(image, rng, shape=self.shape, smallest_area=self.smallest_area)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batch number -> (images, labels); the last one may be smaller.  Every worker gets a copy of it.

    Attributes:
      records: in the order in which they are read.
      pixels: what becomes of an image.
      size: images a batch.
      part, parts: which of so many equal parts of each batch, for a run of several processes.
    """

    records: Records
    pixels: Pixels
    size: int
    part: int = 0
    parts: int = 1

    def __len__(self) -> int:
        return math.ceil(len(self.records) / self.size)

    def __getitem__(self, number: int) -> Batch:
        mine = self.size // self.parts
        start = number * self.size + self.part * mine
        pairs = [self._read(place) for place in range(start, min(start + mine, len(self.records)))]
        images, labels = zip(*pairs, strict=True)
        return np.stack(images), np.asarray(labels, np.int32)

    def _read(self, place: int) -> tuple[np.ndarray, int]:
        image, label = self.records[place]
        try:
            return self.pixels(image, place), label
        except OSError as error:
            called = self.records.called(place)
            raise DataError(f"{self.records.name}: {called} is no readable image ({error})") from error


def read_all(records: Records, pixels: Pixels) -> Batch:
    """Every image, in memory."""
    return Batches(records, pixels, len(records))[0]


def read_ahead(source: Batches, *, first: int = 0, workers: int = 0) -> Iterator[Batch]:
    """The batches of a source from number `first` on, in order, read ahead by threads or by worker processes."""
    import grain

    threads = 1 if workers else min(_MOST_THREADS, _processors())
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * threads)
    dataset = grain.MapDataset.source(source)[first:].to_iter_dataset(read)
    if workers:
        _allow_workers()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
    with contextlib.closing(iter(dataset)) as batches:
        for batch in batches:
            # A worker's arrays lie in shared memory, which JAX would go on using without a copy where it can.
            images, labels = batch
            yield (np.array(images), np.array(labels)) if workers else (images, labels)


def _processors() -> int:
    """Those that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin_worker(index: int, count: int) -> None:
    """A worker leaves Ctrl-C to the process that started it, and ends when that one ends, however it does."""

    def end_with_parent():
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _allow_workers() -> None:
    """grain looks at a command line flag when it starts workers, and up to 0.2.18 refuses to where absl has read none
    (google/grain issue 1355)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
