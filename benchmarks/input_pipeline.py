"""How many images a second does the input pipeline deliver, kept on the device or streamed by threads and workers?

    python benchmarks/input_pipeline.py                              # everything, about two minutes
    python benchmarks/input_pipeline.py --rounds 1 --workers 0 2     # a part

"small" are made-up images of 32x32 as PNG, as tensorflow-datasets stores CIFAR-10; "photographs" are made-up JPEGs of
500x375, of about the size of ImageNet's, of which a random part is decoded, cropped and resized to 224x224. Both lie in
an array_record file in a temporary folder. A batch has 128 images and ends up on the device as bytes; "device" are the
small images kept there as bytes, from which each step gathers its batch. The variation on the device, which all have in
common, is measured apart. "first" is the time to the first batch: the start of threads or processes, once an epoch.
Medians over rounds in which the candidates take turns.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout

from train.data.reader import Batches, Varied, read_ahead, read_all
from train.data.records import Records

BATCH = 128
SIZE = 224
IMAGES = {"small": (50, (32, 32), "PNG"), "photographs": (8, (375, 500), "JPEG")}
"""Batches an epoch, height and width, format."""


def main() -> None:
    """Prints a table for each kind of image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: threads of this process")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind, (batches, shape, form) in IMAGES.items():
            records = write_records(Path(folder) / kind, batches * BATCH, shape, form)
            source = Batches(records, Varied((0,), (SIZE, SIZE, 3), 0.08), BATCH)
            candidates = {
                f"grain, {workers} workers" if workers else "grain, threads": partial(streamed, source, workers)
                for workers in options.workers
            }
            if kind == "small":
                images, labels = read_all(records, Varied((0,), (SIZE, SIZE, 3), 0.08))
                candidates = {"device": resident(images, labels), "variation": variation(images)} | candidates
            found = {name: [] for name in candidates}
            for _ in range(options.rounds):
                for name, candidate in candidates.items():
                    found[name].append(candidate())
            print(f"\n{kind + ', ' + 'x'.join(map(str, shape)):<24}{'images/s':>12}{'first, s':>12}")
            for name, results in found.items():
                rate, first = (statistics.median(values) for values in zip(*results, strict=True))
                print(f"{name:<24}{rate:12,.0f}{first:12.2f}", flush=True)


def streamed(source: Batches, workers: int) -> tuple[float, float]:
    """(images a second after the first batch, seconds to the first batch), as training reads an epoch."""
    import jax

    begin = time.perf_counter()
    times = []
    for batch in read_ahead(source, workers=workers):
        jax.block_until_ready(jax.device_put(batch))
        times.append(time.perf_counter())
    # What was read ahead while the first batch was on its way would count for nothing: leave out as many at the start.
    skipped = len(times) // 3
    return BATCH * (len(times) - 1 - skipped) / (times[-1] - times[skipped]), times[0] - begin


def resident(images: np.ndarray, labels: np.ndarray):
    """A callable with the results of `streamed` for images on the device."""
    import jax
    import jax.numpy as jnp

    gather = jax.jit(lambda images, labels, order: (images[order], labels[order]))
    data = jax.device_put((images, labels))
    order = jnp.asarray(np.random.default_rng(0).permutation(len(labels))[:BATCH])
    return lambda: _timed(lambda: gather(*data, order))


def variation(images: np.ndarray):
    """The same for padding, cropping, mirroring and normalising a batch that is there."""
    import jax

    from qpde.datasets import Images, Split
    from train.config.images import Data
    from train.data.resident import Resident, make_vary

    split = Split(images[:BATCH], np.zeros(BATCH, np.int32))
    shared = Images(split, split, split, ("a",), np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32))
    vary = jax.jit(make_vary(Data("cifar10"), Resident(shared, BATCH)))
    batch, key = jax.device_put(split), jax.random.key(0, impl="rbg")
    return lambda: _timed(lambda: vary(key, *batch))


def write_records(path: Path, count: int, shape: tuple[int, int], form: str) -> Records:
    """A set of made-up images in one array_record file, read as a prepared set is."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    rng = np.random.default_rng(0)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    encode = features(shape, form)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(rough.resize(shape[::-1], Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-8, 9, smooth.shape, np.int16), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form, quality=90)
        file.seek(0)
        writer.write(encode.serialize_example(encode.encode_example({"image": file, "label": i % 10})))
    writer.close()
    known = (*shape, 3) if form == "PNG" else (None, None, 3)
    return Records(path.name, Source(path, shape, form), np.arange(count), known, tuple("0123456789"))


def features(shape: tuple[int, int], form: str):
    """tensorflow-datasets' description of these images."""
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(*shape, 3), encoding_format=form.lower())
    return tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)})


class Source:
    """What `as_data_source` makes of such a file: records parsed, small images decoded, photographs as they are."""

    def __init__(self, path: Path, shape: tuple[int, int], form: str):
        import tensorflow_datasets as tfds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.arguments, self.records = (path, shape, form), ArrayRecordDataSource(str(path))
        self.decoders = None if form == "PNG" else {"image": tfds.decode.SkipDecoding()}
        self.features = features(shape, form)

    def __getitem__(self, number: int) -> dict:
        return self.features.deserialize_example_np(self.records[number], decoders=self.decoders)

    def __reduce__(self):
        return Source, self.arguments


def _timed(function, calls: int = 50) -> tuple[float, float]:
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return BATCH * calls / (time.perf_counter() - first), first - begin


if __name__ == "__main__":
    main()
