"""A task that small nets get nine times in ten: which texture, on which shape, in an image of 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qat.files.atomic import whole_file


SIDE = 64
TEXTURES = ("stripes", "checks", "dots", "clouds")
SHAPES = ("disc", "square", "triangle")
CLASSES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)

#: In the maps of `masks`, what is no shape.
BACKGROUND = len(CLASSES)

#: Standard deviation of the noise on every pixel, of 255: with 8, nets that see images turned get 98 of 100.
NOISE = 20.0

#: How much a texture brightens and darkens its shape, at least and at most, of 255.
CONTRASTS = (40.0, 70.0)

#: The length of a texture's period, at least and at most, in pixels.
PERIODS = (5.0, 10.0)

#: Images of a file.
PART = 1000

#: From a shape's centre to its edge or corner, at least and at most, in pixels.
RADII = (15.0, 25.0)


@dataclass(frozen=True)
class Images:
    """Images of one task.

    Attributes:
        pixels: (N, 3, 64, 64) uint8.
        labels: (N,) int64, of `CLASSES`.
        masks: (N, 64, 64) uint8, of `CLASSES` where the shape is, and `BACKGROUND`.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def draw(images: int, seed: int, first: int = 0) -> Images:
    """Images of all classes in turn, from number `first` on; a seed has the same ones on every machine, and no two
    seeds share any.
    """
    pixels = np.empty((images, SIDE, SIDE, 3), np.uint8)
    masks = np.full((images, SIDE, SIDE), BACKGROUND, np.uint8)
    labels = (first + np.arange(images)) % len(CLASSES)
    for place, label in enumerate(labels):
        pixels[place], inside = _image(np.random.default_rng([seed, first + place]), int(label))
        masks[place][inside] = label
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(channels_first, torch.from_numpy(labels), torch.from_numpy(masks))


def draw_part(directory: Path, seed: int, first: int, images: int = PART) -> None:
    """Draw images as `draw` does into a file of `directory`, unless an earlier run has."""
    file = directory / "images" / f"{seed}-{first}-{images}.safetensors"
    if not file.is_file():
        with whole_file(file) as temporary:
            save_file(vars(draw(images, seed, first)), temporary)


@lru_cache(maxsize=4)
def images_of(directory: Path, seed: int, images: int) -> Images:
    """The first images of a seed, from the files of their parts; a part that is not there is drawn."""
    parts = []
    for first in range(0, images, PART):
        count = min(PART, images - first)
        draw_part(directory, seed, first, count)
        parts.append(load_file(directory / "images" / f"{seed}-{first}-{count}.safetensors"))
    return Images(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def normalized(pixels: Tensor) -> Tensor:
    """As nets take them: (N, 3, 64, 64) float32, -1 to 1."""
    return pixels.float().div_(127.5).sub_(1.0)


def turned(maps: Tensor, turns: Tensor) -> Tensor:
    """Each map laid down in one of the eight ways a square can be: no shape and no texture becomes another one.

    Args:
        maps: (N, ..., H, H).
        turns: (N,) int64, 0 to 7: bit 0 transposes, bit 1 changes left and right, bit 2 top and bottom.
    """
    bits = (turns.view(-1, *[1] * (maps.ndim - 1)) >> bit & 1 for bit in range(3))
    transposes, left_right, top_bottom = (bit.bool() for bit in bits)
    maps = torch.where(transposes, maps.transpose(-1, -2), maps)
    maps = torch.where(left_right, maps.flip(-1), maps)
    return torch.where(top_bottom, maps.flip(-2), maps)


def _image(generator: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, (64, 64, 3) uint8, and where its shape is, (64, 64) bool."""
    texture, shape = divmod(label, len(SHAPES))
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    inside = _shape(generator, SHAPES[shape], rows, columns)
    ground = generator.uniform(60, 195, 3) + generator.uniform(-1, 1, 3) * (rows + columns - SIDE)[..., None]
    colour = generator.uniform(70, 185, 3)
    waves = _texture(generator, TEXTURES[texture], rows, columns)[..., None] * generator.uniform(*CONTRASTS)
    other = int(generator.integers(len(TEXTURES)))
    behind = _texture(generator, TEXTURES[other], rows, columns)[..., None] * 0.5 * CONTRASTS[0]
    clean = np.where(inside[..., None], colour + waves, ground + behind)
    noisy = clean + generator.normal(0.0, NOISE, clean.shape)
    return noisy.round().clip(0, 255).astype(np.uint8), inside


def _shape(generator: np.random.Generator, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Where a shape is, that is turned by any angle and lies wholly in the image."""
    radius = generator.uniform(*RADII)
    y, x = generator.uniform(radius, SIDE - radius, 2)
    if name == "disc":
        return (rows - y) ** 2 + (columns - x) ** 2 < (0.85 * radius) ** 2
    sides = 4 if name == "square" else 3
    inside = np.ones_like(rows, bool)
    first = generator.uniform(0, 2 * np.pi)
    for side in range(sides):
        angle = first + 2 * np.pi * side / sides
        inside &= (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle) < radius * np.cos(np.pi / sides)
    return inside


def _texture(generator: np.random.Generator, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(64, 64), -1 to 1."""
    angle, period = generator.uniform(0, np.pi), generator.uniform(*PERIODS)
    shift, turn = generator.uniform(0, 2 * np.pi, 2), 2 * np.pi / period
    along = turn * (rows * np.sin(angle) + columns * np.cos(angle)) + shift[0]
    across = turn * (rows * np.cos(angle) - columns * np.sin(angle)) + shift[1]
    if name == "stripes":
        return np.sin(along)
    if name == "checks":
        return np.sign(np.sin(along)) * np.sign(np.sin(across))
    if name == "dots":
        return np.where(np.sin(along) + np.sin(across) > 0.8, 1.0, -0.6)
    return _clouds(generator, period)


def _clouds(generator: np.random.Generator, period: float) -> np.ndarray:
    """Noise without a direction, whose waves are about as long as `period`."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij"))
    band = np.exp(-0.5 * ((frequency - 1 / period) / (0.25 / period)) ** 2)
    waves = np.fft.irfft2(np.fft.rfft2(generator.normal(size=(SIDE, SIDE))) * band, (SIDE, SIDE))
    return np.clip(waves / (1.4 * waves.std()), -1, 1)
