"""Pictures of every kind come out as a person sees them, and what is no picture is refused with OSError."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpde.pictures import centre_crop, find_files, read_picture

ROOT = Path(__file__).parents[2]
TURNS = {  # EXIF's number: how the upright pixels were turned before they were stored
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def pixels(height=20, width=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def whole(file, height=20, width=12, channels=3):
    return centre_crop(file, (height, width, channels), centre=1.0)


@pytest.mark.parametrize("number", TURNS)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_orientation_says(number, form):
    exif = Image.Exif()
    exif[0x0112] = number
    image = Image.fromarray(np.ascontiguousarray(TURNS[number](pixels())))
    file = stored(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(whole(file), pixels())
    # A rectangle of another shape is cut out of the upright picture, too.
    upright = stored(Image.fromarray(pixels()))
    np.testing.assert_array_equal(centre_crop(file, (6, 9, 3)), centre_crop(upright, (6, 9, 3)))


def test_a_large_turned_jpeg_is_decoded_coarsely_and_cut_where_it_should():
    ramp = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8)[:, None, None], (400, 200, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = stored(Image.fromarray(np.ascontiguousarray(np.rot90(ramp))), "JPEG", quality=95, exif=exif)
    rows = centre_crop(file, (16, 16, 3), centre=0.5).mean((1, 2))
    np.testing.assert_allclose(rows, 255 / 399 * (199.5 + (np.arange(16) - 7.5) * 100 / 16), atol=3)


def test_modes_become_colours():
    rgb = pixels()
    grey = rgb[..., 0]
    alpha = np.where(np.arange(20 * 12).reshape(20, 12) % 2, 255, 0).astype(np.uint8)
    on_white = np.where(alpha[..., None] == 255, rgb, 255)
    palette = Image.fromarray(rgb).quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    cases = [
        (Image.fromarray(rgb), rgb),
        (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1)),
        (Image.fromarray(np.dstack([rgb, alpha])), on_white),
        (Image.fromarray(np.dstack([grey, alpha])), np.where(alpha[..., None] == 255, grey[..., None], 255)),
        (palette, np.asarray(palette.convert("RGB"))),
        (see_through, np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(palette.convert("RGB")))),
        (deep, np.repeat(grey[..., None], 3, -1)),
        (Image.fromarray(grey > 100), np.repeat(np.where(grey > 100, 255, 0)[..., None], 3, -1)),
    ]
    for image, expected in cases:
        found = whole(stored(image))
        assert (found.dtype, found.shape) == (np.uint8, (20, 12, 3)), image.mode
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape), err_msg=image.mode)
    np.testing.assert_array_equal(whole(stored(deep, "TIFF"), channels=1), grey[..., None])
    np.testing.assert_array_equal(whole(stored(Image.fromarray(grey)), channels=1), grey[..., None])
    cmyk = whole(stored(Image.fromarray(rgb).convert("CMYK"), "TIFF"))
    assert np.abs(cmyk.astype(int) - rgb).max() < 40


def test_the_middle_of_a_picture_is_what_is_looked_at():
    image = np.zeros((64, 100, 3), np.uint8)
    image[:, 18:82] = 100  # the largest square
    image[16:48, 34:66] = 200  # and half of its sides
    file = stored(Image.fromarray(image))
    np.testing.assert_array_equal(np.unique(centre_crop(file, (8, 8, 3), centre=0.4)), [200])
    full = centre_crop(file, (16, 16, 3), centre=1.0)
    assert set(np.unique(full[:3, 1:-1])) == {100}  # at its edges the resizing takes in a neighbour
    assert full[8, 8, 0] == 200


def test_what_is_no_picture_is_refused(tmp_path):
    good = stored(Image.fromarray(pixels(60, 60)))
    for damaged in (
        b"",
        b"no picture",
        good[:200],
        b"\x89PNG\r\n\x1a\n" + b"x" * 40,
    ):
        with pytest.raises(OSError):
            whole(damaged)
    with pytest.raises(OSError, match="white is unknown"):
        whole(stored(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(OSError, match="white is unknown"):
        whole(stored(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"))
    with pytest.raises(OSError):
        read_picture(tmp_path / "absent.png", (4, 4, 3))


def test_a_bomb_of_pixels_is_refused(monkeypatch):
    file = stored(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(OSError, match="decompression bomb"):
        whole(file, 4, 4)


def test_pictures_are_found_by_their_names_without_what_systems_hide(tmp_path):
    names = ["b/2.JPG", "a.png", "b/1.webp", ".trash/x.png", "b/.x.png", "__MACOSX/b/1.webp", "notes.txt", "c.heic"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["a.png", "b/1.webp", "b/2.JPG", "c.heic"]


def test_the_processes_that_read_pictures_do_not_import_jax():
    code = "import sys, train.data.reader, train.data.records, qpde.cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
