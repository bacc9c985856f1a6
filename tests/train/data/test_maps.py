"""Sets of label maps as a configuration names them."""

import io

import numpy as np
import prepared_sets
import pytest
from PIL import Image

from qpde.datasets import IGNORED
from train.config.segmentation import SegmentationData
from train.data.load import load_images


def scenes(count):
    """Examples of Cityscapes as tensorflow-datasets has them: grey images whose label ids are 7 + i."""

    def examples():
        for i in range(count):
            pixels = np.full((1024, 2048, 3), i, np.uint8)
            ids = np.full((1024, 2048), 7 + i, np.uint8)
            yield {"image_id": str(i), "image_left": as_file(pixels), "segmentation_label": as_file(ids)}

    return examples


def as_file(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    file.seek(0)
    return file


def test_cityscapes_of_tensorflow_datasets_has_the_classes_to_train_on(tmp_path):
    name = "cityscapes/semantic_segmentation"
    prepared_sets.prepare(name, tmp_path, train=scenes(4), validation=scenes(1), test=scenes(1))
    config = SegmentationData(f"tfds/{name}", size=(32, 64), validation=0.25)
    found = load_images(config, tmp_path, batch_size=2)
    assert found.shape == (32, 64, 3)
    assert found.num_classes == 19
    # Prepared sets are shuffled. Label ids 7 and 8 are road and sidewalk, 9 and 10 are not trained on.
    parts = (found.images.train, found.images.validation)
    assert [len(part.images) for part in parts] == [3, 1]
    pairs = {(int(x[5, 5, 0]), int(y[5, 5])) for part in parts for x, y in zip(*part, strict=True)}
    assert pairs == {(0, 0), (1, 1), (2, IGNORED), (3, IGNORED)}
    np.testing.assert_array_equal(found.images.test.labels, np.zeros((1, 32, 64)))


def test_a_set_that_is_not_prepared_says_how_to(tmp_path):
    config = SegmentationData("tfds/cityscapes/semantic_segmentation")
    with pytest.raises(FileNotFoundError, match="train data prepare cityscapes/semantic_segmentation"):
        load_images(config, tmp_path, batch_size=2)


def test_a_folder_of_ones_own_is_named_by_its_path(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(10):
        Image.fromarray(np.full((40, 48, 3), 9 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.full((40, 48), i % 2, np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    found = load_images(SegmentationData(f"folder/{tmp_path}"), None, batch_size=4)
    assert (found.count, found.num_classes, found.chance) == (8, 2, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "camvit"}, "did you mean 'camvid'"),
        ({"name": "folder/"}, "is no set of label maps"),
        ({"crop": (16, 64)}, r"data.crop \(=16\) must be at least 32"),
        ({"size": (64, 64, 3)}, "must be a height and a width"),
        ({"smallest_scale": 2.0}, "at most data.largest_scale"),
        ({"colour": 1.0}, r"data.colour \(=1.0\)"),
        ({"validation": 0.0}, "data.validation"),
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(**options)
