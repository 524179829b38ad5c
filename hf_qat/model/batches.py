"""Forward batches of data through a model, as calibration does: checked, in evaluation mode, without gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CalibrationError, CaptureError, HfQatError
from hf_qat.graph.capture.inputs import Inputs, as_call, device_of
from hf_qat.graph.capture.modes import evaluating
from hf_qat.model.untrained import batch_statistics


def run_batches(model: nn.Module, batches: Iterable[Inputs], live: Sequence[nn.Module] = ()) -> Iterator[Inputs]:
    """Forward each batch, in evaluation mode and without gradients; yields it afterwards.

    Args:
        model: stays as it is.
        batches: as forward takes them.
        live: batch norms that normalise by the statistics of the batch instead of their own.
    """
    device = device_of(model)
    with evaluating(model), batch_statistics(live), torch.no_grad():
        for position, batch in enumerate(batches):
            args, kwargs = call_of(batch, device)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            _check_finite(position, tensors)
            _check_call(model, position, args, kwargs)
            _run(model, position, tensors, args, kwargs)
            yield batch


def call_of(batch: Inputs, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of the forward call that a batch stands for, on `device`."""
    args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, as_call(batch))
    return args, kwargs


def _check_finite(position: int, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"calibration batch {position} holds NaN or infinity: no range can come of it.")


def _check_call(model: nn.Module, position: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationError(
            f"calibration batch {position} does not fit {type(model).__name__}.forward{signature}: {error}. Give what "
            "you would pass to the model, without labels: (images for images, labels in loader)."
        ) from error


def _run(
    model: nn.Module, position: int, tensors: list[Tensor], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Raw pixels, and other real numbers than the weights, are a mistake only where the model does not take them."""
    try:
        with types_told(model, tensors, f"calibration batch {position} holds", CalibrationError):
            model(*args, **kwargs)
    except CaptureError as error:
        if tensors and not any(tensor.is_floating_point() for tensor in tensors):
            raise CalibrationError(
                f"calibration batch {position} holds {tensors[0].dtype} only: give the floats that the model is "
                "trained on, that is the output of the image processor, not raw pixels."
            ) from error
        raise


@contextmanager
def types_told(model: nn.Module, tensors: Iterable[Tensor], what: str, kind: type[HfQatError]) -> Iterator[None]:
    """Inside, PyTorch's refusal of real numbers of another type than the model's becomes an error that names both.

    Only what is refused: many models convert what they are given.

    Args:
        model: that is called inside.
        tensors: what it is called with.
        what: begins the message: who holds them.
        kind: of the error.
    """
    try:
        yield
    except HfQatError:
        raise
    except RuntimeError as error:
        real = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        own = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
        if not (own and real and own.isdisjoint(real)):
            raise
        raise kind(
            f"{what} {real[0]}, and the weights of {type(model).__name__} are {', '.join(map(str, own))}: give it in "
            f"that, as by batch.float(). ({error})"
        ) from error
