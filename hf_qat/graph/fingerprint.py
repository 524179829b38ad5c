"""What a captured graph computes, as text: to tell whether another library version still builds the same graph.

Views and other operations that hand values on unchanged are left out; exporters differ in them without consequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest

from torch import fx

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import is_floating, module_path, operation_name
from hf_qat.graph.rules import Kind, rule_of


#: Per captured child, its operations in order: `"encoder.layer.0.attention: matmul mul softmax matmul"`.
Operations = Mapping[str, Sequence[str]]


def operations(captured: Mapping[str, CapturedModule]) -> dict[str, list[str]]:
    """The operations of each captured child that make new floating-point values; nothing is fused yet.

    Returns:
        Path of the child → lines `"module path: operation operation …"`, one for each run of operations of one module.
    """
    return {path: _lines(module.graph) for path, module in captured.items()}


def _lines(graph: fx.Graph) -> list[str]:
    calls = [(module_path(node), operation_name(node)) for node in graph.nodes if _computes(node)]
    return [
        f"{path}: {' '.join(operation for _, operation in group)}"
        for path, group in groupby(calls, key=lambda call: call[0])
    ]


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and is_floating(node) and rule_of(node).kind is not Kind.PASS


def fingerprint(lines: Operations) -> str:
    """SHA-256 of the operations, in hexadecimal."""
    content = json.dumps({path: list(own) for path, own in lines.items()}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def first_difference(saved: Operations, built: Operations) -> str | None:
    """Where the two first differ, in words; `None` if they do not."""
    for child in sorted(saved.keys() | built.keys()):
        where = f"the child {child!r}" if child else "the model"
        if child not in built or child not in saved:
            return f"{where} is captured now, and was not then" if child in built else f"{where} is captured no more"
        for position, (old, new) in enumerate(zip_longest(saved[child], built[child])):
            if old != new:
                return f"in {where}, entry {position} of the operations was {_quoted(old)} and is now {_quoted(new)}"
    return None


def _quoted(line: str | None) -> str:
    return "missing" if line is None else repr(line)
