"""Readable names: nodes and values are called after the module that makes them, as `resnet.encoder…/Conv`.

The exporter's own names (`_symbolic_17`, `val_203`) are numbers of its trace; the module path stands in its notes.
"""

from __future__ import annotations

import ast
from collections import Counter

from onnx import ModelProto, NodeProto

from hf_qat.export.onnx_graph import replace_values


#: The note that `torch.onnx.export` puts on every node: a list of module paths, from the root to the operation.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"

#: What stands there for an operation that belongs to no module, such as reading the batch size.
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


def name_after_modules(model: ModelProto) -> None:
    """Rename nodes, and the values they make, in place; inputs, outputs and initializers keep their names."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    used: Counter[str] = Counter(fixed)
    renamed: dict[str, str] = {}
    for node in graph.node:
        node.name = _unique(f"{_module_path(node)}/{node.op_type}".lstrip("/"), used)
        for position, value in enumerate(node.output):
            if value and value not in fixed:
                renamed[value] = node.name if position == 0 else _unique(f"{node.name}.{position}", used)
    for node in graph.node:
        for position, value in enumerate(node.output):
            node.output[position] = renamed.get(value, value)
    for info in graph.value_info:
        info.name = renamed.get(info.name, info.name)
    replace_values(graph, renamed)


def _module_path(node: NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == SCOPES_KEY:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 and scopes[-2] != NO_MODULE else ""
    return ""


def _unique(name: str, used: Counter[str]) -> str:
    """`name`, or `name_1`, `name_2`, … where it is taken."""
    candidate = name
    while used[candidate]:
        candidate = f"{name}_{used[name]}"
        used[name] += 1
    used[candidate] += 1
    return candidate
