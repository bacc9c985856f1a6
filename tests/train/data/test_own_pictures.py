"""Own pictures and arrays in training: streamed or on the device, the same from every directory, noticed if changed."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from train.config.images import Data
from train.data.load import load_images
from train.data.records import DataError
from train.data.resident import Resident
from train.data.streamed import Streamed
from train.host.mesh import make_mesh
from train.steps.state import RANDOM, TrainState

BATCH = 8


@pytest.fixture
def root(tmp_path):
    """Twenty pictures of different sizes in each of three classes."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "pets" / ("cat", "dog", "fish")[i % 3] / f"{i:02}.{('png', 'jpg', 'webp')[i // 3 % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pets"


def load(root, data_dir=None, workers=0, **options):
    return load_images(Data(f"folder/{root}", size=12, **options), data_dir, batch_size=BATCH, workers=workers)


def epoch(images):
    """(pixels, labels) of the steps of the first epoch."""
    state, batches = TrainState(jax.numpy.int32(0), {}, {}, (), None, jax.random.key(5, impl=RANDOM)), []
    for arguments in images.feed(make_mesh(1))(state):
        (pixels, labels), _ = images.select(state, *arguments)
        batches.append((np.asarray(pixels), np.asarray(labels)))
        state = state.replace(step=state.step + 1)
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def test_pictures_stream_and_small_sets_can_lie_on_the_device(root):
    streamed, resident = load(root), load(root, streamed=False)
    assert (type(streamed), type(resident)) == (Streamed, Resident)
    for images in (streamed, resident):
        assert (images.shape, images.num_classes, images.count) == ((12, 12, 3), 3, 43)
        assert images.stored.classes == ("cat", "dog", "fish")
        assert images.stored.centre == 224 / 256
    np.testing.assert_array_equal(streamed.stored.mean, resident.stored.mean)
    for part in ("validation", "test"):
        ours, theirs = (list(images.in_order(part)) for images in (streamed, resident))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.labels, b.labels)
    (varied, labels), (still, its) = epoch(streamed), epoch(resident)
    np.testing.assert_array_equal(labels, its)
    assert varied.shape == still.shape == (40, 12, 12, 3)
    assert not np.array_equal(varied, still)  # random parts, where the pictures are read anew
    assert load(root, channels=1).shape == (12, 12, 1)


def test_worker_processes_read_the_same(root):
    for a, b in zip(epoch(load(root)), epoch(load(root, workers=2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pictures_that_all_have_the_size_are_kept_as_they_are(root):
    for path in root.rglob("*.*"):
        Image.open(path).convert("RGB").resize((12, 12)).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
    images = load(root)
    assert type(images) is Resident
    assert images.stored.centre == 1
    streamed = load(root, streamed=True)
    for a, b in zip(epoch(images), epoch(streamed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_path_means_the_same_in_every_directory(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    here = Data("folder/pets")
    monkeypatch.chdir(root)
    assert Data("folder/../pets") == here == Data(f"folder/{root}") == Data(here.name)
    monkeypatch.setenv("HOME", str(root.parent))
    assert Data("folder/~/pets") == here
    assert Data("npz/a.npz").name == f"npz/{root}/a.npz"
    with pytest.raises(ValueError, match="has no path: give folder/PATH"):
        Data("folder/")


def test_a_folder_is_known_by_its_contents_wherever_it_lies(root, tmp_path, monkeypatch):
    first = [load(root, streamed=streamed).fingerprint for streamed in (True, False)]
    root.rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"pets is not there; if it was moved to FOLDER/pets, give --data-dir"):
        load(root)
    (tmp_path / "disk").mkdir()
    (tmp_path / "other").rename(tmp_path / "disk/pets")
    assert [load(root, tmp_path / "disk", streamed=streamed).fingerprint for streamed in (True, False)] == first
    monkeypatch.setenv("QPDE_DATA_DIR", str(tmp_path / "disk"))
    assert load(root).fingerprint == first[0]
    shutil.copy(tmp_path / "disk/pets/cat/00.png", tmp_path / "disk/pets/cat/06.png")
    changed = [load(root, streamed=streamed).fingerprint for streamed in (True, False)]
    assert not set(changed) & set(first)


def test_unreadable_pictures_are_refused_skipped_or_named_when_they_break_later(root, capsys):
    (root / "cat/00.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"1 of 60 pictures in .* cannot be read: cat/00.png \(it is no picture"):
        load(root)
    images = load(root, skip_unreadable=True)
    assert "skipped 1 unreadable pictures: cat/00.png" in capsys.readouterr().err
    assert images.count == 42
    for path in root.rglob("*.webp"):
        path.unlink()
    for path in root.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"{root}: \w+/\d+.jpg is no readable image"):
        epoch(images)
    for path in root.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=rf"{root}: \w+/\d+.jpg cannot be read \(.*No such file"):
        epoch(images)


def test_arrays_train_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    path = Path(tmp_path, "own.npz")
    np.savez(path, x=rng.integers(0, 256, (60, 9, 7), dtype=np.uint8), y=np.arange(60) % 3, classes=list("abc"))
    images = load_images(Data(f"npz/{path}"), None, batch_size=BATCH)
    assert (images.shape, images.count, images.stored.classes) == ((9, 7, 1), 43, ("a", "b", "c"))
    assert len(images.stored.test.labels) == 12
    with pytest.raises(ValueError, match=r"data.streamed \(=True\) is for prepared sets, .* and folder/PATH, not for"):
        load_images(Data(f"npz/{path}", streamed=True), None, batch_size=BATCH)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz is not there"):
        load_images(Data(f"npz/{tmp_path}/absent.npz"), None, batch_size=BATCH)
