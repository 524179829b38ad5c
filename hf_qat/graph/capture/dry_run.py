"""Dry runs: what each child of a model receives and returns, at two batch sizes, and which child feeds which."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.inputs import Inputs, as_call, device_of, with_batch
from hf_qat.graph.capture.meta_device import MetaCapture, without_weights
from hf_qat.graph.capture.training_run import in_training
from hf_qat.graph.captured import CallSignature, flatten_call


logger = logging.getLogger(__name__)

#: Batch sizes of the two dry runs; a dimension that differs between them is dynamic. Not 0 or 1, which
#: `torch.export` specialises on.
BATCH_SIZES = (2, 3)

#: Modules that do no tensor work of their own outside training.
IDLE = (nn.Dropout, nn.Dropout2d, nn.Identity)


@dataclass
class CallRecord:
    """What one child received and returned in the dry runs, in order; `inputs` hold the tensors of each call.

    `written` has the positions of outputs that the caller has written to in place.
    """

    path: str
    module: nn.Module
    signatures: list[CallSignature] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    _versions: list[list[int]] = field(default_factory=list)

    def add_output(self, output: Any) -> None:
        """Note the tensors in `output`, and what was written to them so far."""
        self.outputs.append([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)])
        self._versions.append([leaf._version for leaf in self.outputs[-1]])

    def extend(self, other: CallRecord) -> None:
        """Append the records of another run of the same child."""
        self.signatures += other.signatures
        self.inputs += other.inputs
        self.outputs += other.outputs
        self.written |= other.written

    def compare_versions(self) -> None:
        """Fill `written`, after the run."""
        for outputs, versions in zip(self.outputs, self._versions, strict=True):
            pairs = enumerate(zip(outputs, versions, strict=True))
            self.written |= {k for k, (output, version) in pairs if output._version != version}


def dry_runs(
    model: nn.Module, inputs: Inputs, excluded: Callable[[str], bool], opened: Collection[str] = ("",)
) -> list[CallRecord]:
    """Run the model at two batch sizes and record the calls of its parts, in the order of the first call.

    Args:
        model: in evaluation mode.
        inputs: example inputs.
        excluded: says of a path whether it is left alone.
        opened: paths of the modules whose children are recorded one by one; `""` is the model.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    first, second = BATCH_SIZES
    try:
        recorded = _dry_run(model, inputs, first, excluded, opened)
        repeated = _dry_run_on_meta(model, inputs, second, excluded, opened)
        if repeated is None or not _same_calls(recorded, repeated):
            repeated = _dry_run(model, inputs, second, excluded, opened)
    except Exception as error:
        leaves = pytree.tree_leaves(as_call(inputs))
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs of shapes {shapes}: {error}. Pass "
            "example_inputs= that its forward accepts."
        ) from error
    for path, calls in repeated.items():
        if path in recorded:
            recorded[path].extend(calls)
        else:
            recorded[path] = calls
    return list(recorded.values())


def _dry_run(
    model: nn.Module, inputs: Inputs, size: int, excluded: Callable[[str], bool], opened: Collection[str]
) -> dict[str, CallRecord]:
    recorded: dict[str, CallRecord] = {}
    with torch.no_grad(), _recording(list(_candidates(model, excluded, opened)), recorded):
        forward(model, inputs, size)
    for calls in recorded.values():
        calls.compare_versions()
    return recorded


def _dry_run_on_meta(
    model: nn.Module, inputs: Inputs, size: int, excluded: Callable[[str], bool], opened: Collection[str]
) -> dict[str, CallRecord] | None:
    """The same on a copy without weights, which costs next to nothing; `None` where values are asked for."""
    try:
        with MetaCapture():
            return _dry_run(without_weights(model), inputs, size, excluded, opened)
    except Exception as error:
        logger.debug("The model does not run on the meta device (%s).", error)
        return None


def _same_calls(recorded: dict[str, CallRecord], repeated: dict[str, CallRecord]) -> bool:
    """Whether every part was called as often, and with the same arguments but for sizes."""
    if recorded.keys() != repeated.keys():
        return False
    pairs = [(calls.signatures, repeated[path].signatures) for path, calls in recorded.items()]
    return all(
        len(ours) == len(theirs) and all(a.same_constants(b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in pairs
    )


def training_records(
    model: nn.Module, inputs: Inputs, calls: list[CallRecord], excluded: Callable[[str], bool], opened: Collection[str]
) -> dict[str, CallRecord]:
    """How each of the recorded parts is called in training: as in evaluation, unless training itself shows otherwise.

    The model runs without labels, on a copy without weights. Where a part is called in another way, its record holds
    random inputs of the shapes that were seen.
    """

    def observe(candidate: nn.Module) -> dict[str, CallRecord]:
        recorded: dict[str, CallRecord] = {}
        for size in BATCH_SIZES:
            with _recording(list(_candidates(candidate, excluded, opened)), recorded):
                forward(candidate, inputs, size)
        return recorded

    seen = in_training(model, observe) or {}
    return {call.path: _training_record(call, seen.get(call.path)) for call in calls}


def _training_record(call: CallRecord, seen: CallRecord | None) -> CallRecord:
    if seen is None or _called_alike(call, seen):
        return call
    device = device_of(call.module)
    inputs = [[_random_like(x).to(device) for x in tensors] for tensors in seen.inputs]
    return CallRecord(call.path, call.module, seen.signatures, inputs)


def _called_alike(call: CallRecord, seen: CallRecord) -> bool:
    pairs = zip(call.signatures, seen.signatures, strict=False)
    shapes = ([[x.shape for x in tensors] for tensors in record.inputs] for record in (call, seen))
    return all(a.same_constants(b) for a, b in pairs) and next(shapes) == next(shapes)


def _random_like(tensor: Tensor) -> Tensor:
    if tensor.device.type != "meta":
        return tensor
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def forward(model: nn.Module, inputs: Inputs, size: int) -> Any:
    """Call the model on `inputs`, repeated or cut to a batch of `size`."""
    args, kwargs = with_batch(inputs, size, device_of(model))
    return model(*args, **kwargs)


def whole_call(model: nn.Module, inputs: Inputs) -> CallRecord:
    """The model itself as the only child; it need not be run before it is exported."""
    calls = CallRecord("", model)
    for size in BATCH_SIZES:
        args, kwargs = with_batch(inputs, size, device_of(model))
        try:
            signature, tensors = flatten_call(inspect.signature(model.forward), args, kwargs)
        except TypeError as error:
            raise CaptureError(
                f"example_inputs do not fit {type(model).__name__}.forward: {error}. "
                "Pass what you would pass to the model, without labels."
            ) from error
        calls.signatures.append(signature)
        calls.inputs.append(tensors)
    return calls


@contextmanager
def _recording(candidates: list[tuple[str, nn.Module]], recorded: dict[str, CallRecord]) -> Iterator[None]:
    """Shadow `forward` of every candidate, which catches `child(...)` and `child.forward(...)` alike."""
    depth = [0]
    shadowed: list[nn.Module] = []

    def shadow(path: str, child: nn.Module) -> None:
        original = child.forward
        signature = inspect.signature(original)

        def record(*args: Any, **kwargs: Any) -> Any:
            if depth[0]:
                return original(*args, **kwargs)
            depth[0] += 1
            try:
                output = original(*args, **kwargs)
            finally:
                depth[0] -= 1
            calls = recorded.setdefault(path, CallRecord(path, child))
            call_signature, tensors = flatten_call(signature, args, kwargs)
            calls.signatures.append(call_signature)
            calls.inputs.append(tensors)
            calls.add_output(output)
            return output

        record.__signature__ = signature  # type: ignore[attr-defined]
        child.forward = record
        shadowed.append(child)

    for path, child in candidates:
        shadow(path, child)
    try:
        yield
    finally:
        for child in shadowed:
            del child.forward


def _candidates(
    model: nn.Module, excluded: Callable[[str], bool], opened: Collection[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Children of the opened modules in order, each once; what a bare container holds counts as its owner's child."""
    seen: set[int] = set()
    for path in opened:
        for name, child in _children(model.get_submodule(path), f"{path}." if path else ""):
            if name not in opened and not excluded(name) and id(child) not in seen:
                seen.add(id(child))
                yield name, child


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, f"{path}.")
        elif not isinstance(child, IDLE):
            yield path, child


def links(call: CallRecord, calls: list[CallRecord]) -> dict[int, tuple[str, int]]:
    """Inputs of a child that are (views of) an output of an earlier one: input position → (path, output position).

    A child that is called several times has a link only where all its calls have the same one.
    """
    links: dict[int, tuple[str, int]] = {}
    for position in range(len(call.inputs[0])):
        origins = {_origin(inputs[position], call, calls) for inputs in call.inputs}
        origin = origins.pop()
        if origin is not None and not origins:
            links[position] = origin
    return links


def _origin(received: Tensor, call: CallRecord, calls: list[CallRecord]) -> tuple[str, int] | None:
    for other in calls:
        for outputs in other.outputs if other is not call else []:
            for index, produced in enumerate(outputs):
                if received is produced or _base(received) is _base(produced):
                    return other.path, index
    return None


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base
