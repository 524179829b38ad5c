"""A zero point for each quantized constant, as ONNX Runtime's rewrite of signed weights needs it."""

from __future__ import annotations

from collections import Counter

from onnx import ModelProto, NodeProto

from hf_qat.export.onnx_graph import OnnxGraph, names_read


#: Their quantized constants, such as position embeddings, are small. Weights that layers share are not, and stay one.
ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Sub"})


def separate_elementwise_constants(model: ModelProto) -> None:
    """Give every elementwise operator that reads a quantized constant one that no other operator reads.

    For the option of ONNX Runtime that `separate_zero_points` tells of, which replaces the codes, too.
    """
    graph, scope, nodes = model.graph, OnnxGraph(model.graph), list(model.graph.node)
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in nodes:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    for node in nodes:
        codes = scope.tensor(node.input[0]) if node.op_type == "DequantizeLinear" else None
        for reader, position in readers.get(node.output[0], [])[1:] if codes is not None else []:
            if reader.op_type in ELEMENTWISE:
                own, dequantize = graph.initializer.add(), NodeProto()
                own.CopyFrom(codes)
                own.name = scope.fresh(node.input[0])
                dequantize.CopyFrom(node)
                dequantize.name = dequantize.output[0] = reader.input[position] = scope.fresh(node.output[0])
                dequantize.input[0] = own.name
                graph.node.insert(list(graph.node).index(node), dequantize)


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
