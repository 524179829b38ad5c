"""What of a prepared or converted model stays in float, and why: as the placement of quantizers has found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_qat.graph.nodes import short_name
from hf_qat.model.state import captured_children, state_of


@dataclass(frozen=True)
class FloatOperation:
    """An operation in a captured graph that computes in float.

    Attributes:
        path: of the module that it belongs to.
        operation: PyTorch's name of it, as `conv2d`.
        reason: why no quantizer makes it an integer operation.
    """

    path: str
    operation: str
    reason: str


def float_operations(model: nn.Module) -> list[FloatOperation]:
    """The operations of the captured children that stay in float, in the order of their graphs, and then the layers
    and products of Python code that could not be captured.

    Children that are not captured, because the config excludes them, run their own Python and are not looked into.
    """
    state = state_of(model)
    found = [found for child in captured_children(model).values() for found in child.float_operations]
    in_python = [] if state is None else state.in_python
    return [FloatOperation(path, short_name(operation), reason) for path, operation, reason in (*found, *in_python)]


def by_reason(operations: Sequence[FloatOperation]) -> dict[str, dict[str, list[str]]]:
    """Reason → operation → the paths of the modules in which it stays in float."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for found in operations:
        reasons.setdefault(found.reason, {}).setdefault(found.operation, []).append(found.path)
    return reasons
