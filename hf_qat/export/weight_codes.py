"""Weights that are moved on the way to their product: the codes are moved, and the pair stands next to the product.

Between a weight's `DequantizeLinear` and its `MatMul`, whatever moves numbers hides the pair from runtimes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from hf_qat.export.onnx_graph import OnnxGraph, get_attribute, replace_items


def split_quantized_weights(model: ModelProto) -> None:
    """`Split(DequantizeLinear(codes))` becomes a `DequantizeLinear` of each part: of query, key and value, mostly."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    dequantized = _dequantized(graph, onnx_graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        source = dequantized.get(node.input[0]) if node.op_type == "Split" else None
        nodes += [node] if source is None else _parts(graph, source, node, onnx_graph)
    replace_items(graph.node, nodes)


def transpose_quantized_weights(model: ModelProto) -> None:
    """`Transpose(DequantizeLinear(codes))` of a linear layer's weight becomes `DequantizeLinear(transposed codes)`."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    dequantized = _dequantized(graph, onnx_graph)
    nodes = []
    for node in graph.node:
        source = dequantized.get(node.input[0]) if node.op_type == "Transpose" else None
        nodes.append(node if source is None else _transposed(graph, source, node, onnx_graph))
    replace_items(graph.node, nodes)


def _dequantized(graph: GraphProto, onnx_graph: OnnxGraph) -> dict[str, NodeProto]:
    """What makes a weight of constant codes, by the name of the weight."""
    return {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and all(onnx_graph.tensor(name) is not None for name in node.input)
    }


def _parts(graph: GraphProto, source: NodeProto, split: NodeProto, onnx_graph: OnnxGraph) -> list[NodeProto]:
    """`source` for each part of its codes, in the place of `split`. Scales of the axis that is split are split too."""
    codes, *parameters = map(onnx_graph.constant, source.input)
    assert codes is not None
    along: Any = get_attribute(split, "axis") or 0
    axis: Any = get_attribute(source, "axis")
    ends = _ends(split, codes.shape[along], onnx_graph)
    pieces = [np.split(codes, ends, along)]
    for parameter in parameters:
        assert parameter is not None
        whole = axis is None or parameter.ndim == 0 or (axis - along) % codes.ndim
        pieces.append([parameter] * len(split.output) if whole else np.split(parameter, ends))
    nodes = []
    for output, values in zip(split.output, zip(*pieces, strict=True), strict=True):
        names = [onnx_graph.fresh(f"{name}_part") for name in source.input]
        graph.initializer.extend(map(numpy_helper.from_array, values, names))
        nodes.append(_with_axis(helper.make_node("DequantizeLinear", names, [output]), source, axis))
    return nodes


def _ends(split: NodeProto, size: int, onnx_graph: OnnxGraph) -> list[int]:
    """Where each part ends but the last. Without sizes all are equal, and the last may be smaller."""
    sizes: Any = onnx_graph.constant(split.input[1]) if len(split.input) > 1 else get_attribute(split, "split")
    if sizes is None:
        sizes = [-(-size // len(split.output))] * len(split.output)
    return [int(end) for end in np.cumsum(sizes)[:-1]]


def _transposed(graph: GraphProto, source: NodeProto, transpose: NodeProto, onnx_graph: OnnxGraph) -> NodeProto:
    """`source`, with codes that are transposed already, in the place of `transpose`."""
    codes = onnx_graph.constant(source.input[0])
    assert codes is not None
    permutation: Any = get_attribute(transpose, "perm") or list(reversed(range(codes.ndim)))
    name = onnx_graph.fresh(f"{source.input[0]}_transposed")
    graph.initializer.append(numpy_helper.from_array(codes.transpose(permutation), name))
    axis: Any = get_attribute(source, "axis")
    node = helper.make_node("DequantizeLinear", [name, *source.input[1:]], transpose.output)
    return _with_axis(node, source, None if axis is None else permutation.index(axis % codes.ndim))


def _with_axis(node: NodeProto, source: NodeProto, axis: int | None) -> NodeProto:
    """The node, with an axis of its scales and the notes of what it takes the place of."""
    node.metadata_props.extend(source.metadata_props)
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node
