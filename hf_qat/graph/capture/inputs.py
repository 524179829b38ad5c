"""Example inputs: what the user gave, or what the config of a vision model says, at the batch sizes we need."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError


#: What a caller may give as example inputs or as a calibration batch.
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

#: Batch sizes of the two dry runs; a dimension that differs between them is dynamic. Not 0 or 1, which
#: `torch.export` specialises on.
BATCH_SIZES = (2, 3)


@dataclass(frozen=True)
class TwoSizes:
    """Example inputs at two sizes of images; the second dry run takes the other one."""

    first: Inputs
    other: Inputs


#: Size of the change of images relative to their spread, where sizes that depend on them are looked for.
CHANGE = 0.5

#: Keyword arguments that make a model compute a loss; they are no part of its inference graph.
LABEL_NAMES = frozenset(
    {"labels", "label", "label_ids", "return_loss", "class_labels", "mask_labels", "target", "targets"}
)


def as_call(inputs: Inputs | TwoSizes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of the forward call that `inputs` stands for: a tensor, a sequence or a mapping; labels go."""
    if isinstance(inputs, TwoSizes):
        return as_call(inputs.first)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        kwargs = {name: value for name, value in inputs.items() if name not in LABEL_NAMES}
        _refuse_arrays(kwargs.values())
        return (), kwargs
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        _refuse_arrays(inputs)
        return tuple(inputs), {}
    _refuse_arrays([inputs])
    raise CaptureError(
        f"inputs must be a tensor, a tuple or a dict of tensors, not {type(inputs).__name__}: pass what you would "
        "pass to the model's forward."
    )


def _refuse_arrays(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, np.ndarray):
            raise CaptureError(
                f"inputs hold an array of NumPy, {value.dtype}: give a tensor of torch, as an image processor makes "
                'with return_tensors="pt", or by torch.from_numpy(array).float().'
            )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a module that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def guess_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Random pixels in the shape that a Hugging Face vision model's config asks for: (2, C, H, W) float32.

    Raises:
        CaptureError: the model says neither its main input nor its image size.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "pixel_values":
        raise CaptureError(
            f"cannot guess the input of {type(model).__name__}: pass example_inputs=, for instance "
            "torch.randn(1, 3, 224, 224) or the batch that your data loader yields."
        )
    height, width = _image_size(config)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, _channels(config), height, width, generator=generator, dtype=torch.float32)
    return {"pixel_values": pixels}


def _image_size(config: Any) -> tuple[int, int]:
    for source in (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)):
        size = getattr(source, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return 224, 224


def _channels(config: Any) -> int:
    for source in (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)):
        channels = getattr(source, "num_channels", None)
        if isinstance(channels, int):
            return channels
    return 3


def with_batch(inputs: Inputs | TwoSizes, size: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of `inputs` with its first axis repeated or cut to `size`, on `device`.

    Raises:
        CaptureError: there is nothing along that axis.
    """
    if isinstance(inputs, TwoSizes):
        return with_batch(inputs.other if size == BATCH_SIZES[1] else inputs.first, size, device)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0:
            return leaf.to(device)
        if not len(leaf):
            raise CaptureError(f"inputs hold a batch of nothing, {tuple(leaf.shape)}: give one image or more.")
        if leaf.device.type == "meta":
            return torch.empty((size, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")
        return repeated(leaf.detach(), size).contiguous().to(device)

    args, kwargs = pytree.tree_map(resize, as_call(inputs))
    return args, kwargs


def repeated(x: Tensor, length: int, axis: int = 0) -> Tensor:
    """A copy of `x` that is repeated or cut to a length along an axis."""
    return x.index_select(axis, torch.arange(length, device=x.device) % max(1, x.shape[axis]))


def with_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`x` with noise of a `share` of its own spread, drawn on the CPU: the same on every device."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return x + share * noise * (x.std() if x.numel() > 1 else 1.0)


def changed_images(inputs: Inputs | TwoSizes, change: int = 0) -> Inputs | TwoSizes:
    """The same with noise on images, of which a part is blank: sizes that depend on them (key points) become others.

    Noise alone makes of random examples, which are noise, as many key points as there were.

    Args:
        change: 0 or 1, another noise and another part.
    """
    generator = torch.Generator().manual_seed(change)

    def change_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 4:
            return leaf
        changed = with_noise(leaf.detach(), CHANGE, generator)
        changed[..., : leaf.shape[-1] * (1 + change) // 3] = 0.0
        return changed

    changed: Inputs | TwoSizes = pytree.tree_map(change_leaf, inputs)
    return changed


def labels_in(inputs: Inputs | TwoSizes) -> dict[str, Any]:
    """What of example inputs are labels, by their usual names."""
    if isinstance(inputs, TwoSizes):
        return labels_in(inputs.first)
    if not isinstance(inputs, Mapping):
        return {}
    return {name: value for name, value in inputs.items() if name in LABEL_NAMES and value is not None}


def accepts_labels(model: nn.Module, labels: Collection[str] = ()) -> bool:
    """Whether `forward` takes labels: a task model, whose children are captured and whose loss stays its own.

    Args:
        model: any.
        labels: names of labels beside the usual ones.
    """
    return not {*LABEL_NAMES, *labels}.isdisjoint(inspect.signature(model.forward).parameters)
