from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_qat.cli.demo.shapes import IMAGE_SIZE, KINDS, SHAPES, draw_shape, shapes_dataset


@pytest.mark.parametrize("width", [18, 25, 41])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_touches_all_sides_of_its_box(kind, width):
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    draw_shape(ImageDraw.Draw(image), kind, (7, 11, width, width), 255)
    assert image.getbbox() == (7, 11, 7 + width, 11 + width)


def test_kinds_differ_in_form_alone():
    """Each covers another share of its box: a circle pi / 4, a triangle a half, a cross 1 - 0.66²."""
    covered = {}
    for kind in KINDS:
        image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
        draw_shape(ImageDraw.Draw(image), kind, (0, 0, 90, 90), 255)
        covered[kind] = (np.asarray(image) > 0).sum() / 90**2
    wanted = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 1 - 0.66**2}
    assert covered == pytest.approx(wanted, abs=0.03)


def test_a_seed_gives_the_same_images_whatever_their_number_and_another_seed_others():
    def digests(images: int, seed: int) -> list[str]:
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in shapes_dataset(images, seed)["image"]]

    assert digests(3, 0) == digests(5, 0)[:3]
    assert not set(digests(5, 0)) & set(digests(5, 1))


def test_every_image_has_objects_of_known_kinds_inside_it():
    dataset = shapes_dataset(40, 0)
    counts = [len(objects["bbox"]) for objects in dataset["objects"]]
    assert min(counts) >= SHAPES[0] and max(counts) <= SHAPES[1] and len(set(counts)) > 1
    assert {kind for objects in dataset["objects"] for kind in objects["category"]} == set(range(len(KINDS)))
    assert dataset.features["objects"]["category"].feature.names == KINDS
    for objects in dataset["objects"]:
        for x, y, width, height in objects["bbox"]:
            assert 0 <= min(x, y) and max(x + width, y + height) <= IMAGE_SIZE


def test_only_the_kinds_asked_for_are_drawn_by_their_own_numbers():
    dataset = shapes_dataset(10, 0, ["cross", "circle"])
    assert dataset.features["objects"]["category"].feature.names == ["cross", "circle"]
    assert {number for objects in dataset["objects"] for number in objects["category"]} == {0, 1}
    assert shapes_dataset(10, 0, KINDS)["image"] == shapes_dataset(10, 0)["image"]
