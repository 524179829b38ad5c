"""The images of the demo: scikit-learn's handwritten digits, which lie in its package, as a Hugging Face data set.

Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor
from transformers import MobileNetV2ImageProcessorPil


LABELS = [str(digit) for digit in range(10)]
IMAGE_SIZE = 32
TEST_SHARE = 0.3


@dataclass(frozen=True)
class Task:
    """What all models of the demo are trained and tested on.

    Attributes:
        train, test: rows of `pixel_values`, (3, 32, 32) float32, and `labels`, an integer.
        pixels: `pixel_values` of the whole test set, (N, 3, 32, 32) float32.
        labels: its labels, (N,) int64.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    pixels: Tensor
    labels: np.ndarray


def digits_dataset(seed: int) -> datasets.DatasetDict:
    """1797 handwritten digits, 8×8 grey PIL images under `image` and classes under `label`.

    Returns:
        `train` and `test`, 70 and 30 % of each class, drawn by `seed`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's go from 0 to 16
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    columns = {"image": [Image.fromarray(image) for image in grey], "label": digits.target.tolist()}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return dataset.train_test_split(test_size=TEST_SHARE, stratify_by_column="label", seed=seed)


def make_processor() -> MobileNetV2ImageProcessorPil:
    """From images of any size and mode to `pixel_values`, (3, 32, 32) float32, -1 to 1."""
    return MobileNetV2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def make_task(processor: MobileNetV2ImageProcessorPil, seed: int) -> Task:
    """The digits as the processor sees them, split by `seed`."""

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**processor(rows["image"], return_tensors="pt"), "labels": rows["label"]}

    train, test = (part.with_transform(transform) for part in digits_dataset(seed).values())
    everything = test[:]
    return Task(train, test, everything["pixel_values"], np.array(everything["labels"]))
