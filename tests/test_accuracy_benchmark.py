"""What the accuracy benchmark is made of: its images, its score and its table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.rows import Row, learning_rate
from tests.benchmarks.accuracy.table import add, read, table
from tests.benchmarks.accuracy.textures import BACKGROUND, CLASSES, Images, draw
from tests.benchmarks.accuracy.training import points


def row(seed: int, optimized: float, **changes: object) -> Row:
    figures = {"trainer": optimized, "converted": optimized, "plain": optimized, "optimized": optimized}
    measured = {"in_float": 90.0, "steps": 0, "seconds": 1.0, "device": "cpu", "versions": {}}
    return Row("ResNet", "int8", "calibrated", seed, **{**figures, **measured, **changes})


def test_images_of_a_seed_are_the_same_ones_and_those_of_another_are_others():
    one, again, other = draw(24, 5), draw(24, 5), draw(24, 6)
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.masks, again.masks)
    assert (one.pixels != other.pixels).flatten(1).any(1).all()


def test_every_class_comes_as_often_and_its_shape_lies_wholly_in_the_image():
    images = draw(5 * len(CLASSES), 0)
    assert np.bincount(images.labels.numpy()).tolist() == [5] * len(CLASSES)
    for label, mask in zip(images.labels, images.masks, strict=True):
        assert set(mask.unique().tolist()) == {int(label), BACKGROUND}
        edges = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert (edges == BACKGROUND).float().mean() > 0.95


def test_a_disc_is_as_large_as_its_radius_says():
    """Between (0.85 · 15)² and (0.85 · 25)² times pi, and a pixel along the edge."""
    images = draw(10 * len(CLASSES), 3)
    for label, mask in zip(images.labels, images.masks, strict=True):
        if CLASSES[int(label)].endswith("disc"):
            area = int((mask != BACKGROUND).sum())
            assert np.pi * 11.75**2 < area < np.pi * 22.25**2


def test_points_of_a_map_are_the_mean_intersection_over_union_by_hand():
    """Half of the image is class 0 and rightly so; the rest is background, of which a half is called class 0."""
    masks = torch.full((1, 64, 64), BACKGROUND)
    masks[:, :, :32] = 0
    logits = torch.zeros(1, len(CLASSES) + 1, 64, 64)
    logits[:, 0, :, :48] = 1
    logits[:, BACKGROUND, :, 48:] = 1
    images = Images(torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.long), masks)
    others = np.full(len(CLASSES) - 1, np.nan)  # classes that are neither there nor found
    expected = 100 * np.nanmean([32 / 48, 16 / 32, *others])
    assert points(logits, images, dense=True) == pytest.approx(expected)


def test_the_table_has_means_and_spreads_over_seeds(tmp_path):
    """88 and 90 against 90: 89 on the average, -1, and a spread of sqrt(2)."""
    for each in (row(0, 88.0), row(1, 70.0), row(1, 90.0, plain=90.5)):
        add(each, tmp_path)
    line = table(read(tmp_path)).splitlines()[1].split()
    assert line == ["ResNet", "int8", "calibrated", "2", "90.00", "89.00", "1.41", "-1.00", "1.41", "0.50"]


@pytest.mark.parametrize(
    ("net", "target", "share"),
    [("ResNet", "AM68A", 0.05), ("MobileNetV2", "w4a4", 0.4), ("ViT", "int8", 0.2), ("ViT", "w4a8", 0.1)],
)
def test_the_learning_rate_is_the_share_that_the_recipe_for_the_net_says(net: str, target: str, share: float):
    """That of CNNs where transformers have none."""
    assert learning_rate(NETS[net], target) == pytest.approx(share * NETS[net].learning_rate)
