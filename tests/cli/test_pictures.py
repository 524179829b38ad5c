"""Pictures of all kinds, as models take them, against numbers that were written into the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_qat.cli import pictures
from hf_qat.cli.pictures import in_colour
from hf_qat.errors import ConfigError


#: From black to white, 8 bits.
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read(array: np.ndarray, path: Path) -> Image.Image:
    Image.fromarray(array).save(path)
    with Image.open(path) as image:
        image.load()
        return image


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize(
    "values",
    [RAMP, RAMP.astype(np.uint16) * 257, np.stack([RAMP] * 3, -1), np.stack([RAMP, RAMP, RAMP, RAMP], -1)],
    ids=["8 bits", "16 bits", "RGB", "RGBA"],
)
def test_a_ramp_from_black_to_white_is_one_in_every_kind_of_file(values, kind, tmp_path):
    image = in_colour(read(values, tmp_path / f"ramp.{kind}"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.stack([RAMP] * 3, -1))


def test_integers_of_32_bits_mean_what_they_reach_to(tmp_path):
    for depth in (1, 257):
        image = read(RAMP.astype(np.int32) * depth, tmp_path / "ramp.tif")
        assert image.mode == "I"
        np.testing.assert_array_equal(np.asarray(in_colour(image))[..., 0], RAMP)


def test_a_palette_is_looked_up():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    assert np.asarray(in_colour(image)).tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_floating_point_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="8 or 16 bits"):
        in_colour(read(RAMP / np.float32(255), tmp_path / "ramp.tif"))


@pytest.mark.parametrize("in_file", [True, False])
def test_a_picture_is_turned_as_the_camera_says(in_file, tmp_path):
    """Orientation 6 in Exif: to be turned clockwise by a quarter."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(RAMP[:4]).save(tmp_path / "photo.png", exif=turned)
    path = tmp_path / "photo.png"
    value = {"path": str(path), "bytes": None} if in_file else {"path": None, "bytes": path.read_bytes()}
    np.testing.assert_array_equal(np.asarray(pictures.read(value)), np.rot90(RAMP[:4], -1))
