"""Which part of a model feeds which: an input of one is, or is a view of, what an earlier one has returned."""

from __future__ import annotations

from torch import Tensor

from hf_qat.graph.capture.call_record import CallRecord


def links(call: CallRecord, calls: list[CallRecord]) -> dict[int, tuple[str, int]]:
    """Inputs of a part that are (views of) an output of an earlier one: input position → (path, output position).

    A part that is called several times has a link only where all its calls have the same one; calls of another
    signature than the first have graphs of their own.
    """
    first = call.signatures[0]
    alike = [x for x, other in zip(call.inputs, call.signatures, strict=True) if first.same_constants(other)]
    links: dict[int, tuple[str, int]] = {}
    for position in range(len(call.inputs[0])):
        origins = {_origin(inputs[position], call, calls) for inputs in alike}
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
