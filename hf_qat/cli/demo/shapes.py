"""A small detection task: shapes of four kinds on clutter, drawn here, so that there is nothing to download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw


KINDS = ["circle", "square", "triangle", "cross"]
IMAGE_SIZE = 96

#: How many shapes an image has, at least and at most.
SHAPES = (1, 4)

#: The width of a shape, which is its height, at least and at most; in pixels.
WIDTHS = (18, 42)

#: Two shapes share no more than this of their union.
OVERLAP = 0.05

#: A cross is made of two bars of this share of its width.
BAR = 0.34


def shapes_dataset(images: int, seed: int, kinds: Sequence[str] = KINDS) -> datasets.Dataset:
    """Images of shapes in random colours before random lines, on a gradient, with noise.

    Args:
        images: how many.
        seed: a seed has the same images on every machine, and those of another seed are others.
        kinds: the shapes that there are, of `KINDS`; a category is the number in this list.

    Returns:
        Rows as detection data sets on the Hub have them: `image`, an RGB PIL image of 96×96 pixels, and `objects`,
        `{"bbox": [[x, y, width, height], …], "category": [number of the kind, …]}` in pixels.
    """
    rows = [draw_image(np.random.default_rng([seed, number]), kinds) for number in range(images)]
    category = datasets.ClassLabel(names=list(kinds))
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": [box], "category": [category]}})
    columns = {"image": [image for image, _ in rows], "objects": [objects for _, objects in rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def draw_image(generator: np.random.Generator, kinds: Sequence[str]) -> tuple[Image.Image, dict[str, Any]]:
    """An image, and its objects, whose categories are numbers in `kinds`."""
    image = _clutter(generator)
    draw = ImageDraw.Draw(image)
    boxes: list[tuple[int, int, int, int]] = []
    categories: list[int] = []
    for _ in range(int(generator.integers(SHAPES[0], SHAPES[1] + 1))):
        width = int(generator.integers(*WIDTHS))
        x, y = (int(corner) for corner in generator.integers(0, IMAGE_SIZE - width, 2))
        box = (x, y, width, width)
        if any(_overlap(box, other) > OVERLAP for other in boxes):
            continue
        category = int(generator.integers(len(kinds)))
        draw_shape(draw, kinds[category], box, _colour(generator))
        boxes.append(box)
        categories.append(category)
    pixels = np.asarray(image, np.float32) + generator.normal(0.0, 8.0, (IMAGE_SIZE, IMAGE_SIZE, 3))
    noisy = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return noisy, {"bbox": [[float(value) for value in box] for box in boxes], "category": categories}


def _clutter(generator: np.random.Generator) -> Image.Image:
    """A gradient from one dark colour to another, and lines."""
    corners = generator.integers(20, 120, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(int(generator.integers(6, 14))):
        ends = [int(value) for value in generator.integers(0, IMAGE_SIZE, 4)]
        draw.line(ends, _colour(generator), int(generator.integers(1, 3)))
    return image


def _colour(generator: np.random.Generator) -> tuple[int, int, int]:
    """A colour that is bright in one channel at least."""
    channels = generator.integers(0, 256, 3)
    channels[generator.integers(3)] = generator.integers(180, 256)
    return (int(channels[0]), int(channels[1]), int(channels[2]))


def draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, box: tuple[int, int, int, int], colour: int | tuple[int, int, int]
) -> None:
    """Fill a shape that touches all four sides of its box: x, y, width and height in pixels."""
    x, y, width, height = box
    right, bottom = x + width - 1, y + height - 1
    if kind == "circle":
        draw.ellipse((x, y, right, bottom), colour)
    elif kind == "square":
        draw.rectangle((x, y, right, bottom), colour)
    elif kind == "triangle":
        draw.polygon([(x, bottom), (right, bottom), ((x + right) / 2, y)], colour)
    else:
        margin = math.floor(width * (1.0 - BAR) / 2)
        draw.rectangle((x + margin, y, right - margin, bottom), colour)
        draw.rectangle((x, y + margin, right, bottom - margin), colour)


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)
