"""Depth estimation: a distance for each pixel; learned and measured where it is known.

Source of loss and measures: Eigen, Puhrsch and Fergus, "Depth Map Prediction from a Single Image using a Multi-Scale
Deep Network", 2014, equation 4 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_qat.cli.pictures import require_same_shape
from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError


#: Integers of a depth map that make one metre, as depth cameras and most data sets have it.
MILLIMETRES = 1000.0

#: How far an estimate may be off, as a ratio, to count as near.
NEAR = 1.25

#: Share of the squared mean that the loss takes off: with 0 a wrong scale costs all, with 1 nothing.
SCALE_INVARIANCE = 0.5

#: Metres: what is estimated as less has no useful logarithm.
NEAREST = 1e-3


def classes(processor: Any, dataset: Any, column: str) -> Classes:
    """None: distances have no classes."""
    return Classes()


def encode(processor: Any, images: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """Pixels, and depth maps of the same height and width: (N, H, W) float32 in metres, 0 where nothing is known.

    Args:
        processor: of a depth model.
        images: all of a size.
        labels: for each image a picture of one channel: 16-bit integers are millimetres, floating point is in the
            unit of the model's estimates, which is metres but for models of relative depth.

    Raises:
        ConfigError: a depth map has several channels, or 8 bits.
    """
    pixels = dict(processor(images, return_tensors="pt"))
    if not labels:
        return pixels
    size = pixels["pixel_values"].shape[-2:]
    maps = [torch.from_numpy(_distances(label))[None, None] for label in labels]
    # What lies between two objects is neither's distance, so none is made up: each pixel takes its nearest.
    resized = [torch.nn.functional.interpolate(each, size, mode="nearest-exact")[0, 0] for each in maps]
    return {**pixels, "labels": torch.stack(resized)}


def check(image: Image.Image, label: Image.Image) -> None:
    """Raise `ConfigError` for a depth map that holds no distances, or not those of the image's pixels."""
    _require_distances(np.asarray(label))
    require_same_shape(image, label)


def _distances(label: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.asarray(label)
    _require_distances(values)
    metres = values / MILLIMETRES if np.issubdtype(values.dtype, np.integer) else values
    return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)


def _require_distances(values: np.ndarray[Any, Any]) -> None:
    if values.ndim != 2 or values.dtype == np.uint8:
        form = f"{values.dtype.itemsize * 8} bits" if values.ndim == 2 else f"{values.shape[-1]} channels"
        raise ConfigError(
            f"a depth map has {form}, which is a picture of distances: give PNGs of 16 bits in millimetres, or TIFFs "
            "of floating-point numbers in metres."
        )


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(N, 3, H, W) pixels and (N, H, W) depth."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The scale-invariant error of logarithms, where the depth is known; for Trainer's `compute_loss_func`.

    Most depth models of transformers have no loss of their own.

    Args:
        outputs: of a depth model: `predicted_depth`, (N, h, w).
        labels: (N, H, W), 0 where nothing is known.
        num_items_in_batch: values of `labels` in all batches of a step, of whose loss this is then a share.
    """
    estimated = _resized(outputs.predicted_depth, labels)
    known = labels > 0
    distances = (estimated.clamp(min=NEAREST) / labels.where(known, 1.0)).log() * known
    pixels = known.sum().clamp(min=1)
    error = distances.square().sum() / pixels - SCALE_INVARIANCE * (distances.sum() / pixels).square()
    return error if num_items_in_batch is None else error * labels.numel() / num_items_in_batch


def metrics(processor: Any, prediction: Any) -> dict[str, float]:
    """`delta_1`, the share of pixels within a ratio of 1.25; `abs_rel`, the mean relative error; `rmse` in metres.

    Each is the mean over images of what it is over the known pixels of one. The processor is not needed.
    """
    found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    truth = torch.as_tensor(prediction.label_ids)
    measured = [
        _measure(estimated[known], wanted[known])
        for estimated, wanted in zip(_resized(torch.as_tensor(found), truth), truth, strict=True)
        if (known := wanted > 0).any()
    ]
    if not measured:
        raise ConfigError("no depth map has a distance above 0: there is nothing to measure by.")
    return dict(zip(("delta_1", "abs_rel", "rmse"), torch.stack(measured).mean(0).tolist(), strict=True))


def _measure(estimated: Tensor, wanted: Tensor) -> Tensor:
    """The three of one image, from as many pixels each."""
    estimated, wanted = estimated.double(), wanted.double()
    ratio = torch.maximum(estimated.clamp(min=0) / wanted, wanted / estimated.clamp(min=0))
    error = estimated - wanted
    return torch.stack([(ratio < NEAR).double().mean(), (error.abs() / wanted).mean(), error.square().mean().sqrt()])


def _resized(estimated: Tensor, labels: Tensor) -> Tensor:
    """Estimates, (N, h, w), at the height and width of the labels."""
    size = labels.shape[-2:]
    if estimated.shape[-2:] == size:
        return estimated
    return torch.nn.functional.interpolate(estimated[:, None], size, mode="bilinear", align_corners=False)[:, 0]
