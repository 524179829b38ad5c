"""The ways in which a part is called: evaluation, training, and what labels make of both. Each gets a graph.

Labels add queries and attention masks (denoising), or an axis (losses on every layer of a decoder). All graphs of a
part are over the same modules and quantizers, and there before an optimizer is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.errors import CaptureError
from hf_qat.graph.call_signature import CallSignature, flatten_call
from hf_qat.graph.capture.call_record import CallRecord, Records, Search
from hf_qat.graph.capture.dry_run import forward
from hf_qat.graph.capture.inputs import BATCH_SIZES, Inputs, TwoSizes, changed_images, device_of, with_batch
from hf_qat.graph.capture.labelled import FIXED, VARIED, LabelSize, resize_labels
from hf_qat.graph.capture.meta_device import META
from hf_qat.graph.capture.rehearsal import Run, rehearse


@dataclass
class Way:
    """One way in which a part is called.

    Attributes:
        training: the mode.
        calls: of one signature, with tensors of as many axes; they differ in sizes only.
        labelled: some of them come of labels alone.
    """

    training: bool
    calls: CallRecord
    labelled: bool = False

    def labelled_calls(self) -> list[tuple[list[Any], dict[str, Any]]]:
        """The first call and the last, of tensors without values; nothing where labels change nothing."""
        ends = (self.calls.inputs[0], self.calls.inputs[-1]) if self.labelled else ()
        return [self.calls.signatures[0].rebuild([x.to(META) for x in tensors]) for tensors in ends]


@dataclass(frozen=True)
class Rehearsals:
    """How the parts of a model are called otherwise than in the dry runs; `None` where it does not run.

    Attributes:
        training: in training without labels.
        labelled: by mode, with labels.
    """

    training: Records | None
    labelled: Mapping[bool, Records | None]

    def with_loss(self) -> set[str]:
        """Paths of the parts that have returned a loss."""
        runs = [self.training, *self.labelled.values()]
        return {path for records in runs for path, calls in (records or {}).items() if calls.has_loss}

    def ways(self, call: CallRecord) -> list[Way]:
        """All ways in which a part is called; evaluation without labels comes first.

        Raises:
            CaptureError: the ways depend on the size of the batch.
        """
        return [
            *_by_signature(False, [call], self._labelled(call, False)),
            *_by_signature(True, self._in_training(call), self._labelled(call, True)),
        ]

    def _labelled(self, call: CallRecord, training: bool) -> list[CallRecord]:
        seen = (self.labelled.get(training) or {}).get(call.path)
        return [] if seen is None else [_on_device(call, seen)]

    def _in_training(self, call: CallRecord) -> list[CallRecord]:
        """As in evaluation, unless training itself shows otherwise."""
        seen = (self.training or {}).get(call.path)
        if seen is None:
            return [] if self.training is None and self._labelled(call, True) else [call]
        return [call if _called_alike(call, seen) else _on_device(call, seen)]


def stored_way(call: CallRecord, training: bool, calls: Sequence[tuple[list[Any], dict[str, Any]]]) -> Way:
    """The way of calls of which only shapes are known: a checkpoint has kept them, as loading has no labels."""
    seen = CallRecord(call.path, call.module)
    for run, (args, kwargs) in enumerate(calls):
        signature, tensors = flatten_call(inspect.signature(call.module.forward), args, kwargs)
        seen.add_call(signature, tensors, (), run)
    return Way(training, _on_device(call, seen), labelled=True)


def rehearsals(model: nn.Module, inputs: Inputs | TwoSizes, labels: Mapping[str, Any], search: Search) -> Rehearsals:
    """Run the model in training, and with labels in both modes."""
    first, second = BATCH_SIZES
    plain: list[Run] = [
        partial(forward, inputs=inputs, size=first),
        partial(forward, inputs=changed_images(inputs), size=second),
    ]
    return Rehearsals(
        training=rehearse(model, True, plain, search),
        labelled={mode: _with_labels(model, mode, inputs, labels, search) for mode in (False, True) if labels},
    )


def _with_labels(
    model: nn.Module, training: bool, inputs: Inputs | TwoSizes, labels: Mapping[str, Any], search: Search
) -> Records | None:
    for sizes in (VARIED, FIXED):
        given = zip((inputs, changed_images(inputs)), sizes, strict=True)
        runs: list[Run] = [partial(labelled_forward, inputs=x, labels=labels, size=size) for x, size in given]
        seen = rehearse(model, training, runs, search)
        if seen is not None:
            return seen
    return None


def labelled_forward(model: nn.Module, inputs: Inputs | TwoSizes, labels: Mapping[str, Any], size: LabelSize) -> Any:
    """Call the model on inputs and labels, both at a size."""
    device = device_of(model)
    args, kwargs = with_batch(inputs, size.images, device)
    return model(*args, **kwargs, **resize_labels(labels, size, device))


def _on_device(call: CallRecord, seen: CallRecord) -> CallRecord:
    """The record of a rehearsal for the part itself: where it ran without weights, with random inputs."""
    device = device_of(call.module)
    inputs = [[random_like(x).to(device) for x in tensors] for tensors in seen.inputs]
    return CallRecord(call.path, call.module, seen.signatures, inputs, written=seen.written, runs=seen.runs)


def _called_alike(call: CallRecord, seen: CallRecord) -> bool:
    """Whether training calls a part as evaluation does, in the runs in which it does: layers are dropped at random."""
    same_runs = [n for n, run in enumerate(call.runs) if run in seen.runs]
    pairs = list(zip(same_runs, range(len(seen.runs)), strict=False))
    shapes = [(_shapes(call.inputs[n]), _shapes(seen.inputs[k])) for n, k in pairs[:1]]
    alike = all(call.signatures[n].same_constants(seen.signatures[k]) for n, k in pairs)
    return alike and all(ours == theirs for ours, theirs in shapes)


def random_like(tensor: Tensor) -> Tensor:
    """`tensor`, or if it has no values, random numbers of its shape and type; zeros for integers."""
    if tensor.device.type != "meta":
        return tensor
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _by_signature(training: bool, plain: Sequence[CallRecord], labelled: Sequence[CallRecord]) -> list[Way]:
    """The calls of all records, those of one signature and as many axes together, each size once."""
    ways: list[Way] = []
    for position, record in enumerate((*plain, *labelled)):
        seen_in: dict[int, set[int]] = {}  # run → the ways seen in it
        for signature, tensors, run in zip(record.signatures, record.inputs, record.runs, strict=True):
            way = next((way for way in ways if _belongs(signature, tensors, way.calls)), None)
            if way is None:
                way = Way(training, CallRecord(record.path, record.module))
                ways.append(way)
            seen_in.setdefault(run, set()).add(ways.index(way))
            way.calls.written |= record.written
            if not any(_shapes(tensors) == _shapes(known) for known in way.calls.inputs):
                way.calls.add_call(signature, tensors, (), run)
                way.labelled |= position >= len(plain)
        _require_any_size(record, list(seen_in.values()))
    return ways


def _require_any_size(record: CallRecord, seen: list[set[int]]) -> None:
    """Refuse a part that is given the size of the batch as a number: another batch would be another way to call it."""
    if any(ways != seen[0] for ways in seen[1:]):
        names = sorted({n for other in record.signatures for n in record.signatures[0].differences(other)})
        raise CaptureError(
            f"{record.path or type(record.module).__name__} is called otherwise at another size of the batch, or with "
            f"other labels ({', '.join(names) or 'the number of axes'} differ)"
        )


def _belongs(signature: CallSignature, tensors: Sequence[Tensor], calls: CallRecord) -> bool:
    alike = calls.signatures[0].same_constants(signature) and len(tensors) == len(calls.inputs[0])
    return alike and all(x.dim() == y.dim() for x, y in zip(tensors, calls.inputs[0], strict=True))


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [x.shape for x in tensors]
