"""Labels of another batch, and of another number of objects: detectors make queries and masks of what they are given.

Labels are a tensor for all images (classes, maps of classes) or a list with one entry an image: a tensor (the classes
of its objects, their masks), or a dict of such (`class_labels`, `boxes`, `masks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_qat.graph.capture.inputs import repeated


#: What an object has where no image of the batch shows any: a box in the middle (relative centre and size), class 0.
MIDDLE = 0.5


@dataclass(frozen=True)
class LabelSize:
    """How many labels there are.

    Attributes:
        images: the size of the batch.
        objects: how many each image has, over and over; `None`: as many as it has.
        longer: by how much the second axis of a tensor of two axes grows.
    """

    images: int
    objects: tuple[int, ...] | None = None
    longer: int = 0


#: Sizes of two runs: all that depends on the labels differs. The numbers of objects are primes, because denoising
#: (DN-DETR, Li et al. 2022) repeats them as often as they go into a fixed number.
VARIED = (LabelSize(2, (3, 2)), LabelSize(3, (7, 5, 3), longer=1))

#: The same for labels that must be what they are: one row of a fixed length for each image.
FIXED = (LabelSize(2), LabelSize(3))


def resize_labels(labels: Mapping[str, Any], size: LabelSize, device: torch.device) -> dict[str, Any]:
    """Copies of the labels, repeated or cut to a size, on `device`."""
    return {name: _resized(value, size, device) for name, value in labels.items()}


def _resized(value: Any, size: LabelSize, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        resized = repeated(value.detach(), size.images) if value.dim() else value.clone()
        if size.longer and resized.dim() == 2:
            resized = repeated(resized, resized.shape[1] + size.longer, axis=1).contiguous()
        return resized.to(device)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        entries = [value[k % len(value)] for k in range(size.images)]
        return [_entry(entry, k, size, device) for k, entry in enumerate(entries)]
    return value


def _entry(entry: Any, image: int, size: LabelSize, device: torch.device) -> Any:
    """The labels of one image."""
    if isinstance(entry, Mapping):
        tensors = [value for value in entry.values() if isinstance(value, Tensor) and value.dim()]
        named = entry.get("class_labels", tensors[0] if tensors else None)
        present = len(named) if isinstance(named, Tensor) and named.dim() else None
        return {name: _objects(value, present, image, size, device) for name, value in entry.items()}
    present = len(entry) if isinstance(entry, Tensor) and entry.dim() else None
    return _objects(entry, present, image, size, device)


def _objects(value: Any, present: int | None, image: int, size: LabelSize, device: torch.device) -> Any:
    """One label of the objects of an image; what has another first axis says something of the image."""
    if not isinstance(value, Tensor):
        return value
    if size.objects is None or value.dim() == 0 or len(value) != present:
        return value.detach().clone().to(device)
    wanted = size.objects[image % len(size.objects)]
    if present == 0:
        fill = MIDDLE if value.is_floating_point() else 0
        return torch.full((wanted, *value.shape[1:]), fill, dtype=value.dtype, device=device)
    return repeated(value.detach(), wanted).to(device)
