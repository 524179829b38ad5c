"""A zero point for each quantized constant, as ONNX Runtime's rewrite of signed weights needs it."""

from __future__ import annotations

from collections import Counter

from onnx import ModelProto

from hf_qat.export.onnx_graph import OnnxGraph, names_read


def separate_zero_points(model: ModelProto) -> None:
    """Give every `DequantizeLinear` of a constant a zero point that nothing else reads.

    ONNX Runtime's option `session.x64quantprecision` turns int8 weights into uint8 and replaces their zero points,
    which fails at the second weight that shares one ("Attempt to replace the existing tensor").
    """
    graph = model.graph
    scope = OnnxGraph(graph)
    readers = Counter(names_read(graph.node))
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or scope.tensor(node.input[0]) is None:
            continue
        shared = scope.tensor(node.input[2])
        if shared is None or readers[node.input[2]] == 1:
            continue
        readers[node.input[2]] -= 1
        own = graph.initializer.add()
        own.CopyFrom(shared)
        own.name = scope.fresh(f"{node.input[0]}_zero_point")
        node.input[2] = own.name
