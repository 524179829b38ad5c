"""What the accuracy benchmark is made of: its images, its score and its table."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks.accuracy.jobs import Job, run
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.plan import Wanted, plan
from tests.benchmarks.accuracy.rows import Bench, Row, WeakFloatError, float_points, recipe_for
from tests.benchmarks.accuracy.table import add, read, table
from tests.benchmarks.accuracy.textures import BACKGROUND, CLASSES, PART, Images, draw, images_of, normalized, turned
from tests.benchmarks.accuracy.training import Rows, points


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
    [("ResNet", "AM68A", 0.05), ("MobileNetV2", "w4a4", 0.1), ("ViT", "w4a8", 0.4), ("ViT", "w4a4", 0.4)],
)
def test_the_learning_rate_is_the_share_that_the_recipe_for_the_net_says(net: str, target: str, share: float):
    """That of CNNs where transformers have none."""
    assert recipe_for(NETS[net].kind, target).learning_rate_share == share


def test_parts_of_a_seed_are_the_images_that_are_drawn_at_once(tmp_path):
    whole, kept = draw(PART + 30, 4), images_of(tmp_path, 4, PART + 30)
    assert all(torch.equal(vars(whole)[name], vars(kept)[name]) for name in vars(whole))


def test_turning_lays_a_square_in_its_eight_ways_and_the_map_alike():
    """numpy's rotations of the image and of its mirror image."""
    images = draw(1, 0)
    pixels = turned(images.pixels.expand(8, -1, -1, -1), torch.arange(8))
    masks = turned(images.masks.expand(8, -1, -1), torch.arange(8))
    both = (images.pixels[0].numpy(), images.pixels[0].numpy()[..., ::-1])
    expected = {np.rot90(image, turns, (1, 2)).tobytes() for image in both for turns in range(4)}
    assert {each.numpy().tobytes() for each in pixels} == expected and len(expected) == 8
    shape = pixels[:, 0].float().where(masks != BACKGROUND, torch.nan)
    means = [float(each.nanmean()) for each in shape]  # of the pixels of the shape, wherever it lies now
    assert means == pytest.approx([means[0]] * 8)


@pytest.mark.parametrize("dense", [False, True])
def test_rows_turn_maps_with_their_images_and_leave_classes_alone(dense: bool):
    images = draw(24, 0)
    batch = Rows(images, dense, turns=True).__getitems__(range(24))
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    if not dense:
        assert torch.equal(batch["labels"], images.labels)
        return
    assert (batch["labels"] != images.masks).any()
    classes = batch["labels"].flatten(1).min(1).values  # what is not background
    assert torch.equal(classes, images.labels)


def half(number: int) -> float:
    return number / 2


def end_of_process() -> None:
    os._exit(3)


def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@pytest.mark.slow
def test_a_job_that_fails_is_told_and_only_what_needs_it_does_not_begin():
    jobs = [
        Job("wrong", "a", half, ("one",)),
        Job("dead", "b", end_of_process),
        Job("after the wrong one", "a", half, (4,), ("wrong",)),
        Job("right", "a", half, (6,)),
        Job("after the right one", "a", half, (8,), ("right",)),
    ]
    outcomes = {outcome.job.name: outcome for outcome in run(jobs, 2, 100)}
    assert "TypeError" in outcomes["wrong"].error and "code 3" in outcomes["dead"].error
    assert outcomes["after the wrong one"].error == "it needs wrong"
    assert (outcomes["right"].result, outcomes["after the right one"].result) == (3.0, 4.0)
    assert outcomes["right"].error == outcomes["after the right one"].error == ""


@pytest.mark.slow
def test_no_job_begins_that_would_not_end_in_time_and_one_that_runs_then_is_ended():
    jobs = [
        Job("short", "short", nap, (3.0,)),
        Job("too long", "long", nap, (200.0,)),
        Job("another", "short", nap, (3.0,)),
        Job("one of a kind", "unknown", nap, (3.0,)),
    ]
    began = time.monotonic()
    outcomes = {outcome.job.name: outcome for outcome in run(jobs, 1, 40)}
    assert outcomes["short"].result == "slept" and outcomes["too long"].error == "the time is over"
    assert outcomes["another"].error.startswith("it takes 3 s, and 0")
    assert not outcomes["another"].begun and not outcomes["one of a kind"].begun
    assert time.monotonic() - began < 60


def test_teachers_and_hard_targets_come_first_and_of_the_rest_what_takes_longest():
    wanted = [
        Wanted("ViT", "int8", "QAT, 1 epoch", 0),
        Wanted("ViT", "w4a4", "calibrated", 0),
        Wanted("ViT", "w4a4", "QAT, 3 epochs", 0),
        Wanted("ViT", "w4a4", "QAT, 1 epoch", 0),
    ]
    jobs = [job for job in plan(Bench(Path("nowhere"), "cpu"), wanted) if job.kind != "images"]
    names = ["float ResNet 0", "float ViT 0"]
    rows = ["w4a4 QAT, 3 epochs", "w4a4 QAT, 1 epoch", "w4a4 calibrated", "int8 QAT, 1 epoch"]
    assert [job.name for job in jobs] == [*names, *(f"ViT {row} 0" for row in rows)]
    assert "float ResNet 0" in jobs[1].needs and jobs[2].needs == ("float ViT 0",)


def test_a_float_net_of_few_points_has_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "float_model", lambda self, name, seed: NETS[name].make().eval())  # untrained
    monkeypatch.setattr(Bench, "test", draw(24, 0))
    with pytest.raises(WeakFloatError, match="points"):
        float_points(Bench(tmp_path, "cpu"), "ResNet", 0)


@pytest.mark.parametrize("name", NETS)
def test_an_untrained_net_answers_images_differently_so_that_it_can_begin_to_learn(name: str):
    """With first weights as small as transformers makes them, EfficientNet's answers differ by 1e-34."""
    torch.manual_seed(0)
    model = NETS[name].make().train()
    with torch.no_grad():
        logits = model(pixel_values=normalized(draw(16, 0).pixels)).logits
    assert float(logits.std(0).mean()) > 0.01
