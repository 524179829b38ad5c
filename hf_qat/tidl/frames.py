"""Calibration frames: real inputs, preprocessed, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_qat.errors import CalibrationError
from hf_qat.export.io_names import bind, input_names, input_tensors
from hf_qat.graph.capture.inputs import Inputs, as_call


#: A frame: each of the model's inputs by its name in the ONNX file, (1, …).
Frame = dict[str, np.ndarray]


def frames_of(model: nn.Module, batches: Iterable[Inputs], count: int) -> list[Frame]:
    """The first `count` inputs of some batches.

    Args:
        model: whose forward takes the batches.
        batches: tensors, tuples or dicts, as forward takes them, batch first; labels are left out. A data loader.
        count: at most so many.

    Raises:
        CalibrationError: there is none, or it holds NaN, infinities or integers.
    """
    if isinstance(batches, (Tensor, dict)):
        raise CalibrationError(
            "calibration_data is one batch: give an iterable of batches, such as a data loader or [batch]."
        )
    frames = list(islice(_frames(model, batches), count))
    if not frames:
        raise CalibrationError("calibration_data is empty: give real inputs, as the model was trained on.")
    for position, frame in enumerate(frames):
        for name, value in frame.items():
            if not np.isfinite(value).all():
                raise CalibrationError(f"calibration frame {position} holds NaN or infinity in {name}.")
    if not any(np.issubdtype(value.dtype, np.floating) for value in frames[0].values()):
        raise CalibrationError("calibration frames hold integers only: give the output of the image processor.")
    return frames


def _frames(model: nn.Module, batches: Iterable[Inputs]) -> Iterable[Frame]:
    for batch in batches:
        bound = bind(model, *as_call(batch))
        names, tensors = input_names(bound), input_tensors(bound)
        for row in range(len(tensors[0])):
            yield {
                name: tensor[row : row + 1].detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)
            }


def write_frames(frames: list[Frame], directory: Path) -> None:
    """One `.npz` each, in order."""
    directory.mkdir()
    for position, frame in enumerate(frames):
        np.savez(directory / f"frame_{position:03d}.npz", **frame)  # type: ignore[arg-type]


def as_batch(frames: list[Frame]) -> tuple[Tensor, ...]:
    """All frames as one batch, in the order of forward's arguments."""
    return tuple(torch.from_numpy(np.concatenate([frame[name] for frame in frames])) for name in frames[0])
