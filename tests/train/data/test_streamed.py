"""Images read during training: the same as on the device, in the order that the state determines, or a clear error."""

import importlib.util
import io
import re

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from prepared_sets import fake_builder, photographs, prepare, small

from qpde.pictures import centre_crop
from train.commands.cli import main
from train.config.images import Data
from train.data.load import load_images
from train.data.photographs import random_resized_crop
from train.data.records import DataError
from train.data.resident import Resident
from train.data.streamed import Streamed
from train.data.tfds_records import open_records
from train.host.mesh import make_mesh
from train.steps.losses import IGNORED
from train.steps.state import RANDOM, TrainState

BATCH = 8

_NEEDED = ("tensorflow", "importlib_resources")
_CIFAR100 = {"coarse_label": 0, "id": "a"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of data with a small cifar10, one of its corruptions and a small imagenet2012."""
    folder = tmp_path_factory.mktemp("data")
    prepare("cifar10", folder, train=small(50, seed=0, id="a"), test=small(20, seed=1, id="b"))
    prepare("cifar10_corrupted/fog_3", folder, test=small(12, seed=2))
    prepare("imagenet2012", folder, train=photographs(40, seed=3), validation=photographs(10, seed=4))
    return folder


def _state(step):
    return TrainState(jax.numpy.int32(step), {}, {}, (), None, jax.random.key(5, impl=RANDOM))


def _steps(images, step):
    """(images, labels, key) of the rest of an epoch, as the training step gets them."""
    state, batches = _state(step), []
    for arguments in images.feed(make_mesh(1))(state):
        (pixels, labels), key = images.select(state, *arguments)
        batches.append(tuple(np.asarray(part) for part in (pixels, labels, jax.random.key_data(key))))
        state = state.replace(step=state.step + 1)
    return batches


def _same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for part, its in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, its)


def _counted(stacks):
    """Images and labels that count, of all batches."""
    images, labels = (np.concatenate([np.concatenate(part) for part in parts]) for parts in zip(*stacks, strict=True))
    return images[labels != IGNORED], labels[labels != IGNORED]


def _load(root, name, **options):
    workers = options.pop("workers", 0)
    return load_images(Data(name, **options), root, batch_size=BATCH, workers=workers)


# Sets of one size


def test_a_streamed_set_gives_what_the_same_set_on_the_device_gives(root):
    resident, streamed = (_load(root, "tfds/cifar10", streamed=s) for s in (None, True))
    assert (type(resident), type(streamed)) == (Resident, Streamed)
    assert resident.shape == streamed.shape == (32, 32, 3)
    assert resident.count == streamed.count == 45
    assert resident.num_classes == streamed.num_classes == 10
    for step in (0, 7):  # five steps an epoch: the start of one and the middle of the next
        _same(_steps(resident, step), _steps(streamed, step))
    _same(list(resident.first_batches(limit=3)), list(streamed.first_batches(limit=3)))
    for part in ("validation", "test"):
        _same(list(resident.in_order(part)), list(streamed.in_order(part)))
        for _ in range(2):  # read again for every evaluation
            _same([_counted(resident.stacks(part))], [_counted(streamed.stacks(part))])
    pixels = np.asarray(resident.images.train.images[:2])
    np.testing.assert_array_equal(resident.normalize(pixels), streamed.normalize(pixels))


def test_every_training_image_is_seen_once_an_epoch_and_none_is_held_out(root):
    streamed = _load(root, "tfds/cifar10", streamed=True, validation=0.2)
    epochs = [np.concatenate([pixels for pixels, _, _ in _steps(streamed, step)]) for step in (0, 5)]
    held = np.concatenate([pixels for pixels, _ in streamed.in_order("validation")])
    assert [len(epoch) for epoch in (*epochs, held)] == [40, 40, 10]
    seen = [{image.tobytes() for image in images} for images in (*epochs, held)]
    assert seen[0] == seen[1]
    assert [len(images) for images in seen] == [40, 40, 10]
    assert not seen[0] & seen[2]
    assert not np.array_equal(*epochs)


def test_the_last_batch_of_an_evaluation_is_filled_up_with_ignored_labels(root):
    stacks = list(_load(root, "tfds/cifar10", streamed=True).stacks("test"))
    assert [stack.images.shape for stack in stacks] == [(1, BATCH, 32, 32, 3)] * 3
    labels = np.concatenate([np.asarray(stack.labels[0]) for stack in stacks])
    assert list(labels == IGNORED) == [False] * 20 + [True] * 4


def test_a_set_can_be_tested_on_the_images_of_another(root):
    images = _load(root, "tfds/cifar10", test="tfds/cifar10_corrupted/fog_3")
    assert len(images.images.test.labels) == 12
    with pytest.raises(ValueError, match=r"data.test .*has images of \(32, 32, 3\) and 10 classes, 'digits' images"):
        _load(root, "digits", test="tfds/cifar10_corrupted/fog_3")


def test_the_sets_of_the_catalogue_are_read_as_tensorflow_datasets_mocks_them(tmp_path):
    with tfds.testing.mock_data(num_examples=30):
        for name, classes in (("cifar10", 10), ("cifar100", 100)):
            images = _load(tmp_path, f"tfds/{name}")
            assert (images.shape, images.num_classes, images.count) == ((32, 32, 3), classes, 27)
        assert len(open_records("tfds/cifar10_corrupted/fog_3", "test", tmp_path)) == 30


# Photographs


def test_crops_of_photographs_follow_from_the_state_and_from_nothing_else(root):
    first, second = (_load(root, "tfds/imagenet2012", size=16, validation=0.1, workers=workers) for workers in (0, 2))
    assert first.shape == (16, 16, 3)
    assert (first.num_classes, len(first.test)) == (1000, 10)
    whole = _steps(first, 0)
    _same(whole[2:], _steps(first, 2))
    _same(whole, _steps(second, 0))
    others = _steps(first, 4)  # the next epoch
    by_label = [{int(y): x for xs, ys, _ in steps for x, y in zip(xs, ys, strict=True)} for steps in (whole, others)]
    shared = by_label[0].keys() & by_label[1].keys()
    assert len(shared) > 20
    assert not any(np.array_equal(by_label[0][label], by_label[1][label]) for label in shared)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_crop_is_the_part_of_the_photograph_that_it_says(mode):
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (100, 200, 3)).copy()).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    centre = centre_crop(file.getvalue(), (14, 14, 3), centre=14 / 16)
    assert (centre.shape, centre.dtype) == ((14, 14, 3), np.uint8)
    # 14 columns of 100 / 16 pixels each around column 100, whatever scale the file was decoded at
    expected = 255 / 199 * (99.5 + (np.arange(14) - 6.5) * 100 / 16)
    np.testing.assert_allclose(centre.mean((0, 2)), expected, atol=4)

    rng = np.random.default_rng(0)
    widths = []
    for _ in range(200):
        crop = random_resized_crop(file.getvalue(), rng, shape=(10, 10, 3), smallest_area=0.25).astype(float)
        assert crop.shape == (10, 10, 3)
        widths.append((crop[:, -1].mean() - crop[:, 0].mean()) / 255 * 200 / 0.9)
    assert min(widths) > np.sqrt(0.25 * 20000 * 3 / 4) - 8
    assert max(widths) < np.sqrt(20000 * 4 / 3) + 8
    assert max(widths) - min(widths) > 60


def test_what_is_no_whole_photograph_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(file, "JPEG")
    for damaged in (file.getvalue()[:900], b"no image"):
        with pytest.raises(OSError):
            centre_crop(damaged, (8, 8, 3))


# Bad sets


def test_a_set_that_is_not_there_is_refused_with_the_way_to_get_it(root, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"'tfds/cifar100' is not prepared in .*: python -m train data prepare"):
        _load(root, "tfds/cifar100")
    with pytest.raises(ValueError, match="'tfds/cifar11' is not known to tensorflow-datasets"):
        _load(root, "tfds/cifar11")
    with pytest.raises(ValueError, match="has no split 'train': it has"):
        _load(root, "tfds/cifar10_corrupted/fog_3")
    with pytest.raises(ValueError, match=r"data.streamed \(=True\) is for prepared sets"):
        _load(root, "digits", streamed=True)
    monkeypatch.delenv("QPDE_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="tfds/cifar10 is read from files: give --data-dir"):
        _load(None, "tfds/cifar10")


def test_missing_cut_and_damaged_files_are_named(tmp_path):
    folder = prepare("imagenet2012", tmp_path, train=photographs(40, seed=3), validation=photographs(10, seed=4))
    (file,) = folder.glob("*train*")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(ValueError, match=rf"{file} has 0 records in [\d,]+ bytes, expected 40 records.*damaged"):
        _load(tmp_path, "tfds/imagenet2012", size=16)
    file.write_bytes(whole[:600] + bytes([whole[600] ^ 255]) + whole[601:])  # inside a record
    with pytest.raises(DataError, match=r"imagenet2012 train: record \d+ cannot be read \(.*mismatch"):
        _load(tmp_path, "tfds/imagenet2012", size=16)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing, one of 1 files .*with 40 records"):
        _load(tmp_path, "tfds/imagenet2012", size=16)


# Preparing


def test_preparing_writes_what_training_reads(tmp_path, monkeypatch, capsys):
    """Without TensorFlow, which the images of this builder do not need, and without the network."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in _NEEDED or real(name))
    fake = fake_builder("cifar100", train=small(30, seed=0, **_CIFAR100), test=small(10, seed=1, **_CIFAR100))
    monkeypatch.setattr(tfds, "builder", lambda name, **options: fake(**options) if name == "cifar100" else None)
    assert main(["data", "prepare", "cifar100", "--data-dir", str(tmp_path)]) == 0
    assert "tfds/cifar100/3.0.2: 30 train, 10 test" in capsys.readouterr().out
    assert _load(tmp_path, "tfds/cifar100").count == 27

    def refuse(*_):
        raise ConnectionError("no way to example.org")

    fake._split_generators = refuse
    assert main(["data", "prepare", "cifar100", "--data-dir", str(tmp_path / "other")]) == 1
    assert "cifar100 could not be prepared: ConnectionError: no way" in capsys.readouterr().err


def test_preparing_says_what_it_needs(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else real(name))
    for words, expected in (
        (["prepare", "cifar100"], r"preparing cifar100 needs tensorflow.*: pip install -e '\.\[prepare\]'"),
        (["convert"], "'convert' is no command for data: use python -m train data prepare NAME"),
        ([], "a command for data is missing"),
    ):
        assert main(["data", *words, *(["--data-dir", str(tmp_path)] if words else [])]) == 2
        assert re.search(expected, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
