"""Pictures of all kinds, as models take them, against numbers that were written into the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_qat.cli.arguments import DataArguments
from hf_qat.cli.images import in_colour, load_images
from hf_qat.cli.tasks import TASKS
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in


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


LINE = '{"image": "0.png", "label": 0}'


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ([LINE], {}, "has 1 images, too few"),
        ([], {}, "holds no JSON object in each line: it is empty"),
        ([LINE, "{oops"], {}, "holds no JSON object in each line: .*JSON parse error"),
        ([LINE, '{"image": null, "label": 1}'], {}, "line 2: 'image' is None"),
        ([LINE, '{"image": "1.png", "label": null}'], {}, "a label is None"),
        (['{"image": "1.png", "label": [0]}'] * 2, {}, r"a label is \(0,\)"),
        ([LINE] * 4, {"max_eval_samples": 0}, "max_eval_samples must be 1 or more, not 0"),
        ([LINE] * 4, {"max_train_samples": -1}, "max_train_samples must be 1 or more, not -1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(lines, options, words, tmp_path):
    (tmp_path / "photos.jsonl").write_text("\n".join(lines))
    with data_sets_cached_in(tmp_path), pytest.raises(ConfigError, match=words):
        load_images(DataArguments(str(tmp_path / "photos.jsonl"), **options), TASKS["image-classification"], None)
