"""Own pictures in folders and own arrays in files: read whole, split in proportion, and refused by name."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from qpde.datasets import load_folder, load_npz
from qpde.datasets.folders import find_pictures


def write(path, value, size=(10, 8)):
    """A picture of one grey, (width, height) as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def plain(tmp_path):
    """Thirty pictures of each of two classes, class 1 bright, each of another shade."""
    for name, first in (("dark", 0), ("light", 120)):
        for i in range(30):
            write(tmp_path / "plain" / name / f"{i:02}.png", first + i, size=(10 + i, 8))
    return tmp_path / "plain"


def test_a_folder_for_each_class_is_split_in_proportion(plain):
    found = load_folder(plain, size=4)
    assert found.classes == ("dark", "light")
    counts = [np.bincount(split.labels).tolist() for split in (found.train, found.validation, found.test)]
    assert counts == [[22, 21], [2, 3], [6, 6]]
    shades = [set(split.images[:, 0, 0, 0].tolist()) for split in (found.train, found.validation, found.test)]
    assert sorted(shade for own in shades for shade in own) == [*range(30), *range(120, 150)]
    for split in (found.train, found.validation, found.test):
        assert (split.images.shape[1:], split.images.dtype) == ((4, 4, 3), np.uint8)
        np.testing.assert_array_equal(split.labels, split.images[:, 0, 0, 0] >= 120)
    mean = found.train.images.mean() / 255
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5)
    assert found.centre == 224 / 256
    again = load_folder(plain, size=4, channels=1)
    np.testing.assert_array_equal(again.test.images, found.test.images[..., :1])


def test_parts_that_are_there_are_used_and_the_others_held_out(plain, tmp_path):
    root = tmp_path / "parts"
    shutil.copytree(plain, root / "train")
    write(root / "val/light/a.jpg", 255)
    (root / "val/dark").mkdir()
    (root / ".cache").mkdir()
    found = load_folder(root, size=4)
    assert [len(split.labels) for split in (found.train, found.validation, found.test)] == [48, 1, 12]
    write(root / "test/dark/deep/er/a.webp", 3)
    found = load_folder(root, size=4)
    assert [len(split.labels) for split in (found.train, found.validation, found.test)] == [60, 1, 1]
    assert (found.test.images.max(), found.test.labels[0]) == (3, 0)
    (root / "valid").mkdir()
    with pytest.raises(ValueError, match="two folders for validation, val and valid"):
        load_folder(root, size=4)
    (root / "valid").rmdir()
    write(root / "test/grey/a.png", 3)
    with pytest.raises(
        ValueError, match=r"has the class 'grey', which the training pictures lack: \['dark', 'light'\]"
    ):
        load_folder(root, size=4)


def test_pictures_that_all_have_the_size_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    found = load_folder(tmp_path, size=6)
    seen = {image.tobytes() for split in (found.train, found.validation, found.test) for image in split.images}
    assert seen == {image.tobytes() for image in images}
    assert found.centre == 1
    assert load_folder(tmp_path, size=5).centre == 224 / 256


def test_unreadable_pictures_are_named_and_refused_or_skipped_and_counted(plain, monkeypatch):
    # One thread: the checker of annotations catches warnings as it explains an error, which two threads cannot do at
    # once without losing those of others.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (plain / "light/broken.jpg").write_bytes(b"\xff\xd8\xff none")
    file = plain / "dark/03.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"2 of 61 pictures in .*plain cannot be read: dark/03.png \(.*light/broken.jpg"
    ):
        load_folder(plain, size=4)
    with pytest.warns(UserWarning, match="skipped 2 unreadable pictures: dark/03.png, light/broken.jpg"):
        found = load_folder(plain, size=4, skip_unreadable=True)
    assert sum(len(split.labels) for split in (found.train, found.validation, found.test)) == 59
    for i in range(20):
        (plain / f"light/x{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"22 of 81.* and 12 more\. Mend or remove them, or skip"):
        find_pictures(plain)


def test_contents_tell_a_folder_from_one_that_changed(plain, tmp_path):
    first = find_pictures(plain).contents
    shutil.copytree(plain, tmp_path / "moved")
    assert find_pictures(tmp_path / "moved").contents == first
    file = tmp_path / "moved/dark/00.png"
    write(file, 77)
    changed = find_pictures(tmp_path / "moved").contents
    file.unlink()
    assert len({first, changed, find_pictures(tmp_path / "moved").contents}) == 3


def test_what_is_no_folder_of_classes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder: give one with a folder of pictures for each class"):
        load_folder(tmp_path / "absent", size=4)
    write(tmp_path / "one/a.png", 1)
    with pytest.raises(ValueError, match="has 1 folders: a folder of pictures for each of two classes is needed"):
        load_folder(tmp_path, size=4)
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="two has no pictures that can be read"):
        load_folder(tmp_path, size=4)
    write(tmp_path / "two/a.png", 1)
    with pytest.raises(ValueError, match="has 2 images and none for train"):
        load_folder(tmp_path, size=4)
    with pytest.raises(ValueError, match=r"`channels` \(=2\) must be 1 or 3"):
        load_folder(tmp_path, size=4, channels=2)


# Arrays


def arrays(count=40, seed=0, shape=(6, 5)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 4


def save(path, **content):
    np.savez(path, **content)
    return path


def test_arrays_are_split_in_proportion_or_as_they_say(tmp_path):
    x, y = arrays()
    found = load_npz(save(tmp_path / "a.npz", images=x, labels=y[:, None]))
    assert found.classes == ("0", "1", "2", "3")
    assert [np.bincount(s.labels).tolist() for s in (found.train, found.test)] == [[7, 7, 8, 7], [2, 2, 2, 2]]
    assert found.train.images.shape[1:] == (6, 5, 1)
    where = {image.tobytes(): label for image, label in zip(x, y, strict=True)}
    for split in (found.train, found.validation, found.test):
        assert all(where[image.tobytes()] == label for image, label in zip(split.images, split.labels, strict=True))

    other, its = arrays(8, seed=1)
    for names in (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_x", "test_y")):
        parts = dict(zip(names, (x, y, other, its), strict=True))
        found = load_npz(save(tmp_path / "b.npz", **parts, classes=["a", "b", "c", "d"]))
        assert [len(s.labels) for s in (found.train, found.validation, found.test)] == [36, 4, 8]
        np.testing.assert_array_equal(found.test.images[..., 0], other)
        assert found.classes == ("a", "b", "c", "d")


def test_labels_can_be_names(tmp_path):
    x, y = arrays(shape=(4, 4, 3))
    found = load_npz(save(tmp_path / "a.npz", x=x, y=np.array(["pear", "apple", "fig", "date"])[y]))
    assert found.classes == ("apple", "date", "fig", "pear")
    where = {image.tobytes(): label for image, label in zip(x, np.array([3, 0, 2, 1])[y], strict=True)}
    assert all(where[image.tobytes()] == label for image, label in zip(*found.train, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "has labels without its images"),
        ({"labels": None}, "has images without its labels"),
        ({"images": None, "labels": None, "z": np.zeros(3)}, r"has no images and labels, .*\['z'\]"),
        ({"images": arrays()[0] / 255}, "dtype float64: give uint8 from 0 to 255"),
        ({"images": arrays(shape=())[0]}, r"has shape \(40,\): give \(N, height, width\)"),
        ({"images": arrays(shape=(3, 8, 8))[0]}, r"channels come last, so transpose it by \(0, 2, 3, 1\)"),
        ({"labels": arrays()[1][:-1]}, "images has 40 images, labels 39 labels"),
        ({"labels": arrays()[1] - 1}, r"has labels from -1 to 2 in train, outside 0..2"),
        ({"labels": arrays()[1] + 1}, "no training image of class 0"),
        ({"labels": arrays()[1] / 2}, "dtype float64: give a number or a name an image"),
        ({"labels": arrays()[1] * 0}, "two different names are needed"),
        ({"classes": ["a", "b"]}, r"outside 0..1"),
        ({"labels": np.array(list("abcd"))[arrays()[1]], "classes": ["a", "b", "c"]}, "has the label 'd', which"),
        ({"x": arrays()[0]}, "has images and x, which mean the same"),
        ({"x_train": arrays()[0], "y_train": arrays()[1]}, "with and without the name of a part"),
        ({"labels": np.array([None] * 40)}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, changes, message):
    x, y = arrays()
    content = {name: value for name, value in ({"images": x, "labels": y} | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_npz(save(tmp_path / "a.npz", **content))
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"is no file: give one that numpy\.savez wrote"):
        load_npz(path)
    x, y = arrays()
    whole = save(path, images=x, labels=y).read_bytes()
    for content in (b"", b"none", whole[:300], whole[:400] + b"???" + whole[403:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} is no file of arrays")):
            load_npz(path)
    np.save(tmp_path / "single.npy", x)
    with pytest.raises(ValueError, match="it is a single array"):
        load_npz(tmp_path / "single.npy")
