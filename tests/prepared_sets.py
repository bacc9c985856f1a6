"""Small sets as tensorflow-datasets prepares them: its own builders, file formats and names, with made-up images."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

Examples = Callable[[], Iterator[dict]]


def prepare(name: str, root: Path, **splits: Examples) -> Path:
    """Prepares a set of the catalogue below `root`, without network and without TensorFlow; the folder of its files."""
    name, _, config = name.partition("/")
    options = {"config": config} if config else {}
    builder = fake_builder(name, **splits)(
        data_dir=str(root / "tensorflow_datasets"), file_format="array_record", **options
    )
    builder.download_and_prepare()
    return Path(builder.data_path)


def fake_builder(name: str, **splits: Examples) -> type:
    """The builder of a set of the catalogue with these examples, as files, instead of downloaded ones."""
    cls = tfds.builder_cls(name)

    def generators(*_):
        return {split: enumerate(examples()) for split, examples in splits.items()}

    fakes = {"name": cls.name, "_split_generators": generators, "code_path": None, "url_infos": {}}
    with registered.skip_registration():
        return type("Fake", (cls,), fakes)


def small(count: int, *, seed: int, classes: int = 10, **more) -> Examples:
    """Examples of 32 by 32 pixels: a bright patch, whose place is the class, in noise."""

    def examples():
        rng = np.random.default_rng(seed)
        for i in range(count):
            pixels = rng.integers(0, 100, (32, 32, 3), np.uint8)
            pixels[3 * (i % 10) : 3 * (i % 10) + 3] += 120
            yield {"image": _file(pixels, "PNG"), "label": i % classes, **more}

    return examples


def photographs(count: int, *, seed: int, classes: int = 1000) -> Examples:
    """Examples of different sizes, whose brightness grows from left to right."""

    def examples():
        rng = np.random.default_rng(seed)
        for i in range(count):
            height, width = rng.integers(24, 60, 2)
            pixels = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3))
            yield {"image": _file(pixels.astype(np.uint8), "JPEG"), "label": i % classes, "file_name": f"{i}.JPEG"}

    return examples


def _file(pixels: np.ndarray, form: str) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    file.seek(0)
    return file
