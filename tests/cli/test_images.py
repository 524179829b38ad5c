"""Folders and lists of pictures as data sets, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_qat.cli.arguments import DataArguments
from hf_qat.cli.images import Images, encoder, load_images
from hf_qat.cli.labels import Labels
from hf_qat.cli.tasks import TASKS
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in


#: From black to white, 8 bits.
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)

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


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """`photos/` with two folders of three pictures."""
    for kind in ("cats", "dogs"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(RAMP).save(tmp_path / "photos" / kind / f"{number}.png")
    with data_sets_cached_in(tmp_path):
        yield tmp_path / "photos"


def load(photos: Path, task: str = "image-classification", **options: Any) -> Images:
    return load_images(DataArguments(str(photos)), TASKS[task], None, **options)


def test_a_file_that_is_no_picture_is_named_before_any_time_is_spent(photos):
    (photos / "cats" / "1.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match=r"cats/1\.png cannot be read as a picture \(no kind of picture"):
        load(photos)


def test_a_picture_that_a_line_names_and_is_not_there_is_named(photos):
    lines = [{"image": f"cats/{number}.png", "label": number % 2} for number in range(5)]
    (photos / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=r"there is no file .*cats/[34]\.png"):
        load(photos / "photos.jsonl")


def test_a_picture_that_is_cut_off_is_named_when_it_is_read(photos):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "dogs" / "0.png")
    content = (photos / "dogs" / "0.png").read_bytes()
    (photos / "dogs" / "0.png").write_bytes(content[: len(content) // 2])
    images = load(photos)
    encode = encoder(DataArguments(""), TASKS["image-classification"], lambda *_, **__: {}, images, Labels(range(2)))
    with pytest.raises(ConfigError, match=r"dogs/0\.png cannot be read as a picture"):
        for part in (images.train, images.evaluation):
            encode({"image": list(part["image"]), "label": list(part["label"])})


@pytest.mark.parametrize(
    ("folders", "task", "words"),
    [
        (["cats"], "image-classification", "two of them at least"),
        ([], "image-classification", "cannot be read as a folder of images"),
        (["cats", "dogs"], "semantic-segmentation", "'label' of .* holds no pictures"),
    ],
)
def test_a_folder_of_another_kind_says_what_is_missing(folders, task, words, photos):
    for kind in ("cats", "dogs"):
        if kind not in folders:
            shutil.rmtree(photos / kind)
    (photos / "notes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=words):
        load(photos, task)


def test_masks_are_not_needed_to_calibrate(photos):
    images = load(photos, "semantic-segmentation", labelled=False)
    assert len(images.train) == 6 and images.evaluation is None


def test_where_nothing_is_learned_the_only_split_is_evaluated_whole_if_it_is_named_so(photos):
    for name, whole in (("test", 6), ("train", 1)):
        shutil.move(photos, photos.parent / "aside")
        shutil.move(photos.parent / "aside", photos / name)
        assert len(load(photos, learns=False).evaluation) == whole
        assert len(load(photos).evaluation) == 1
        shutil.move(photos / name, photos.parent / "aside")
        photos.rmdir()
        shutil.move(photos.parent / "aside", photos)
