"""`TopK` of as many scores as are taken, where the graph sorts all of them and takes the first."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from hf_qat.export.onnx_graph import OnnxGraph, get_attribute, replace_items


def select_directly(model: ModelProto) -> None:
    """`TopK` of all, of whose results `Slice` takes the first k, becomes a `TopK` of k, in place."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    outputs = {output.name for output in graph.output}
    gone: set[str] = set()
    for node in graph.node:
        if node.op_type != "TopK" or outputs.intersection(node.output):
            continue
        read = [[reader for reader in graph.node if name in reader.input] for name in node.output]
        slices = [reader for readers in read for reader in readers]
        counts = {_count(reader, get_attribute(node, "axis"), onnx_graph) for reader in slices}
        if max(map(len, read)) > 1 or len(counts) != 1 or None in counts:
            continue
        name = onnx_graph.fresh(f"{node.output[0]}_count")
        graph.initializer.append(numpy_helper.from_array(np.array([*counts], np.int64), name))
        node.input[1] = name
        for position, readers in enumerate(read):
            gone.update(reader.output[0] for reader in readers)
            node.output[position] = readers[0].output[0] if readers else node.output[position]
    kept = [node for node in graph.node if not (node.op_type == "Slice" and node.output[0] in gone)]
    replace_items(graph.node, kept)
    # A result that nobody reads is smaller now too; shapes are inferred anew later.
    changed = {name for node in kept if node.op_type == "TopK" for name in node.output}
    replace_items(graph.value_info, [info for info in graph.value_info if info.name not in changed])


def _count(node: NodeProto, axis: object, onnx_graph: OnnxGraph) -> int | None:
    """How many of the first values along an axis a `Slice` takes; `None` for every other node."""
    if node.op_type != "Slice":
        return None
    starts, ends, axes, steps = ([*map(onnx_graph.constant, node.input[1:]), None][k] for k in range(4))
    taken = [None if value is None else value.tolist() for value in (starts, axes, steps)]
    return int(ends[0]) if ends is not None and taken in ([[0], [axis], [1]], [[0], [axis], None]) else None
