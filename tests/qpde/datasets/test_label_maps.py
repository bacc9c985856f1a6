"""Images with label maps from folders: Cityscapes' own layout, and one's own pairs."""

import numpy as np
import pytest
from PIL import Image

from qpde.datasets import IGNORED, load_cityscapes, load_label_maps
from qpde.datasets.cityscapes import classes_of_ids

RNG = np.random.default_rng(0)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pixels(size=(4, 6)):
    return RNG.integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def cityscapes(tmp_path):
    """Four training images of two cities and one to test on; image i shows label id 7 + i and, in a corner, 0."""
    names = [("train", "aachen", "a"), ("train", "aachen", "b"), ("train", "ulm", "a"), ("train", "ulm", "b")]
    for i, (part, city, name) in enumerate([*names, ("val", "lindau", "a")]):
        write(tmp_path / "leftImg8bit" / part / city / f"{city}_{name}_leftImg8bit.png", pixels())
        ids = np.full((4, 6), 7 + i, np.uint8)
        ids[0, 0] = 0
        folder = tmp_path / "gtFine" / part / city
        write(folder / f"{city}_{name}_gtFine_labelIds.png", ids)
        write(folder / f"{city}_{name}_gtFine_color.png", pixels())
        write(folder / f"{city}_{name}_gtFine_instanceIds.png", ids)
    return tmp_path


def test_cityscapes_pairs_images_with_their_classes_to_train_on(cityscapes):
    data = load_cityscapes(cityscapes, validation=0.25)
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [3, 1, 1]
    # Label ids 7, 8 and 11 are road, sidewalk and building; 9 and 10, parking and rail track, are not trained on.
    np.testing.assert_array_equal(data.train.labels[:, 1, 1], [0, 1, IGNORED])
    np.testing.assert_array_equal(data.validation.labels[:, 1, 1], [IGNORED])
    np.testing.assert_array_equal(data.test.labels[:, 1, 1], [2])
    np.testing.assert_array_equal(data.train.labels[:, 0, 0], IGNORED)
    assert (data.num_classes, data.ignored_label) == (19, IGNORED)
    expected = np.asarray(Image.open(cityscapes / "leftImg8bit/train/ulm/ulm_a_leftImg8bit.png"))
    np.testing.assert_array_equal(data.train.images[2], expected)


def test_every_label_id_of_cityscapes_has_its_published_class():
    """Table of cityscapesscripts/helpers/labels.py, trainId by id."""
    published = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    published += [255, 255, 16, 17, 18]
    expected = [IGNORED if k == 255 else k for k in published]
    np.testing.assert_array_equal(classes_of_ids(np.arange(34, dtype=np.uint8), where="all"), expected)
    with pytest.raises(ValueError, match=r"here has label 34, outside 0\.\.33"):
        classes_of_ids(np.array([34], np.uint8), where="here")


def test_cityscapes_is_resized_as_it_is_read_and_labels_stay_labels(cityscapes):
    data = load_cityscapes(cityscapes, size=(2, 3))
    assert data.train.images.shape[1:] == (2, 3, 3)
    assert set(np.unique(data.train.labels)) <= {IGNORED, 0, 1}


def test_cityscapes_refuses_what_is_missing_or_wrong_by_name(cityscapes):
    path = cityscapes / "gtFine/train/ulm/ulm_a_gtFine_labelIds.png"
    write(path, np.full((4, 6), 40, np.uint8))
    with pytest.raises(ValueError, match=rf"{path} has label 40, outside 0\.\.33"):
        load_cityscapes(cityscapes)
    write(path, np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match=rf"{path} has size \(4, 5\), its image \(4, 6\)"):
        load_cityscapes(cityscapes)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="first ulm/ulm_a"):
        load_cityscapes(cityscapes)
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit.*cityscapes-dataset\.com"):
        load_cityscapes(cityscapes / "gtFine")


def own_folder(root, parts=("train", "validation", "test"), count=2):
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("ground\nplant\n\n")
    for part in parts:
        for i in range(count):
            write(root / part / "images" / f"{i}.jpg", pixels())
            labels = np.full((4, 6), i % 2, np.uint8)
            labels[0, 0] = 255
            write(root / part / "labels" / f"{i}.png", labels)
    return root


@pytest.mark.parametrize("validation", ["validation", "val", "valid"])
def test_a_folder_of_ones_own_has_classes_by_name_and_255_for_no_class(tmp_path, validation):
    data = load_label_maps(own_folder(tmp_path, parts=("train", validation, "test")))
    assert data.classes == ("ground", "plant")
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [2, 2, 2]
    np.testing.assert_array_equal(data.test.labels[:, 1, 1], [0, 1])
    np.testing.assert_array_equal(data.test.labels[:, 0, 0], [IGNORED, IGNORED])


def test_a_folder_without_parts_is_divided_and_one_size_asked_for(tmp_path):
    root = own_folder(tmp_path, parts=(".",), count=20)
    write(root / "images" / "7.jpg", pixels((8, 12)))
    write(root / "labels" / "7.png", np.ones((8, 12), np.uint8))
    with pytest.raises(ValueError, match=r"7\.jpg has size \(8, 12\), others.*give a size"):
        load_label_maps(root)
    data = load_label_maps(root, size=(4, 6))
    assert [len(part.images) for part in (data.train, data.validation, data.test)] == [16, 2, 2]


def test_a_folder_of_ones_own_is_refused_by_the_name_of_the_file(tmp_path):
    root = own_folder(tmp_path)
    path = root / "test" / "labels" / "1.png"
    write(path, np.full((4, 6), 2, np.uint8))
    with pytest.raises(ValueError, match=rf"{path} has label 2, outside 0\.\.1 and 255"):
        load_label_maps(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"test/labels, first 1"):
        load_label_maps(root)
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt is missing"):
        load_label_maps(root)
