"""Dry runs: how each part of a model is called in evaluation without labels, which is what a device will compute."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.graph.call_signature import flatten_call
from hf_qat.graph.capture.call_record import CallRecord, Records, Search, add_run, record_run
from hf_qat.graph.capture.called_modules import called_modules, opened_by_callers
from hf_qat.graph.capture.inputs import BATCH_SIZES, Inputs, TwoSizes, as_call, changed_images, device_of, with_batch
from hf_qat.graph.capture.meta_device import MetaCapture, without_weights
from hf_qat.graph.capture.modes import buffers_kept


logger = logging.getLogger(__name__)


def dry_runs(model: nn.Module, inputs: Inputs | TwoSizes, search: Search) -> tuple[list[CallRecord], Search]:
    """Run the model at two batch sizes and record the calls of its parts, in the order of the first call.

    Args:
        model: in evaluation mode.
        inputs: example inputs.
        search: which modules are its parts.

    Returns:
        The records; and `search`, with those modules opened that the model does not call itself, but of which it
        calls what is inside.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    first, second = BATCH_SIZES
    try:
        with called_modules(model) as called:
            recorded = _dry_run(model, inputs, first, search)
        wider = opened_by_callers(model, search, called | recorded.keys())
        if wider != search:
            return dry_runs(model, inputs, wider)
        on_meta = _dry_run_on_meta(model, inputs, second, search)
        if on_meta is not None and _same_calls(recorded, on_meta):
            repeated = [on_meta]
        else:
            # Values are asked for. What depends on them may have the same size by chance, but hardly three times.
            with MetaCapture(part=1):  # where a model is there without values, this makes sizes differ
                repeated = [_dry_run(model, changed_images(inputs, change), second, search) for change in (0, 1)]
    except CaptureError:
        raise
    except Exception as error:
        leaves = pytree.tree_leaves(as_call(inputs))
        shapes = [f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in leaves if isinstance(leaf, Tensor)]
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs ({', '.join(shapes)}): {error}. Give it "
            "what its forward accepts: example_inputs=, or in QATTrainer the batches of the data."
        ) from error
    for run, more in enumerate(repeated, 1):
        add_run(recorded, more, run)
    return list(recorded.values()), search


@torch.no_grad()
def _dry_run(model: nn.Module, inputs: Inputs | TwoSizes, size: int, search: Search) -> Records:
    with buffers_kept(model):
        return record_run(model, search, lambda: forward(model, inputs, size))


def _dry_run_on_meta(model: nn.Module, inputs: Inputs | TwoSizes, size: int, search: Search) -> Records | None:
    """The same on a copy without weights, which costs next to nothing; `None` where values are asked for."""
    try:
        with MetaCapture(part=1):
            return _dry_run(without_weights(model), inputs, size, search)
    except Exception as error:
        logger.debug("The model does not run on the meta device (%s).", error)
        return None


def _same_calls(recorded: Records, repeated: Records) -> bool:
    """Whether every part was called as often, and with the same arguments but for sizes."""
    if recorded.keys() != repeated.keys():
        return False
    pairs = [(calls.signatures, repeated[path].signatures) for path, calls in recorded.items()]
    return all(
        len(ours) == len(theirs) and all(a.same_constants(b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in pairs
    )


def forward(model: nn.Module, inputs: Inputs | TwoSizes, size: int) -> Any:
    """Call the model on `inputs`, repeated or cut to a batch of `size`."""
    args, kwargs = with_batch(inputs, size, device_of(model))
    return model(*args, **kwargs)


def whole_call(model: nn.Module, inputs: Inputs | TwoSizes) -> CallRecord:
    """The model itself as the only part; it need not be run before it is exported."""
    calls = CallRecord("", model)
    for run, size in enumerate(BATCH_SIZES):
        args, kwargs = with_batch(inputs, size, device_of(model))
        try:
            signature, tensors = flatten_call(inspect.signature(model.forward), args, kwargs)
        except TypeError as error:
            raise CaptureError(
                f"example_inputs do not fit {type(model).__name__}.forward: {error}. "
                "Pass what you would pass to the model, without labels."
            ) from error
        calls.add_call(signature, tensors, (), run)
    return calls
