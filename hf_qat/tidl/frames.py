"""Calibration frames: real inputs, preprocessed, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CalibrationError
from hf_qat.export.io_names import bind, input_names, input_tensors
from hf_qat.graph.capture.inputs import Inputs, as_call


#: A frame: each of the model's inputs by its name in the ONNX file, (1, …); a single number has no axes.
Frame = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Named:
    """The place of the input of that name in a call."""

    name: str


@dataclass(frozen=True)
class Frames:
    """Calibration frames, and how forward takes them.

    Attributes:
        frames: in order, one at the least.
        call: `(args, kwargs)` of forward, with a `_Named` in the place of each tensor.
    """

    frames: list[Frame]
    call: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def several_inputs(self) -> bool:
        """Whether the model takes more than an image."""
        return len(self.frames[0]) > 1

    def as_batch(self) -> Inputs:
        """All frames as one batch, as forward takes it."""
        args, kwargs = pytree.tree_map_only(_Named, lambda place: self._all(place.name), self.call)
        batch: Inputs = kwargs or args
        return batch

    def _all(self, name: str) -> Tensor:
        values = [frame[name] for frame in self.frames]
        return torch.from_numpy(np.concatenate(values) if values[0].ndim else values[0])


def frames_of(model: nn.Module, batches: Iterable[Inputs], count: int) -> Frames:
    """The first `count` inputs of some batches.

    Args:
        model: whose forward takes the batches.
        batches: tensors, tuples or dicts, as forward takes them, batch first; labels are left out. A data loader.
        count: at most so many, one at the least.

    Raises:
        CalibrationError: there is none, they are not of one shape, or one holds NaN, infinities or integers.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise CalibrationError(
            "calibration_data is one batch: give an iterable of batches, such as a data loader or [batch]."
        )
    if count < 1:
        raise CalibrationError(f"frames={count}: give the number of calibration frames, 1 or more.")
    found = list(islice(_frames(model, batches), count))
    if not found:
        raise CalibrationError("calibration_data is empty: give real inputs, as the model was trained on.")
    frames = [frame for frame, _ in found]
    for position, frame in enumerate(frames):
        _check(position, frame, frames[0])
    if not any(np.issubdtype(value.dtype, np.floating) for value in frames[0].values()):
        raise CalibrationError("calibration frames hold integers only: give the output of the image processor.")
    return Frames(frames, found[0][1])


def _frames(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[tuple[Frame, Any]]:
    """Each frame with the call that its batch is."""
    for batch in batches:
        args, kwargs = as_call(batch)
        bound = bind(model, args, kwargs)
        named = dict(zip(input_names(bound), input_tensors(bound), strict=True))
        rows = {len(tensor) for tensor in named.values() if tensor.dim()}
        if len(rows) != 1:
            raise CalibrationError(
                f"a batch of calibration_data holds tensors of {', '.join(map(str, sorted(rows))) or 'no'} rows: give "
                "torch tensors whose first axis is the batch."
            )
        call = _places((args, kwargs), {id(tensor): _Named(name) for name, tensor in named.items()})
        for row in range(rows.pop()):
            one = {name: tensor[row : row + 1] if tensor.dim() else tensor for name, tensor in named.items()}
            yield {name: tensor.detach().cpu().numpy() for name, tensor in one.items()}, call


def _places(call: Any, of_tensors: Mapping[int, _Named]) -> Any:
    """A call with the place of each tensor, by its `id`, instead of it."""
    return pytree.tree_map_only(Tensor, lambda tensor: of_tensors[id(tensor)], call)


def _check(position: int, frame: Frame, first: Frame) -> None:
    shapes = [{name: value.shape for name, value in each.items()} for each in (frame, first)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"calibration frame {position} holds {shapes[0]}, and the first one {shapes[1]}: a bundle is for one size."
        )
    for name, value in frame.items():
        if not np.isfinite(value).all():
            raise CalibrationError(f"calibration frame {position} holds NaN or infinity in {name}.")


def write_frames(frames: list[Frame], directory: Path) -> None:
    """One `.npz` each, in order."""
    directory.mkdir()
    for position, frame in enumerate(frames):
        np.savez(directory / f"frame_{position:03d}.npz", **frame)  # type: ignore[arg-type]
