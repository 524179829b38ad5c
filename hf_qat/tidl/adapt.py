"""The same computation in the words that TIDL knows: a verified Q/DQ file, in place, before it goes into a bundle."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hf_qat.export.onnx_graph import OnnxGraph, replace_values, take_attribute
from hf_qat.export.pairs import repeat_pairs
from hf_qat.tidl.graph import DEQUANTIZE


def adapt(model: ModelProto) -> ModelProto:
    """Rewrite what TIDL would leave to the Arm core for its form alone, and infer all shapes.

    Args:
        model: with fixed sizes, and shapes inferred; is changed.

    Returns:
        A model with the same inputs, outputs and results.
    """
    scope = OnnxGraph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Reshape":
            _fixed_shape(model, node, scope)
        elif node.op_type == "Gather":
            _gather_a_vector(model, node, scope)
        elif node.op_type == "Expand":
            _repeat_codes(model, node, scope)
    repeat_pairs(model)  # TI's table of layers wants one after those that it shares with ONNX Runtime, too
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _fixed_shape(model: ModelProto, node: NodeProto, scope: OnnxGraph) -> None:
    """`allowzero=1` and sizes of −1 become the numbers that they stand for; TIDL takes only `allowzero=0`."""
    shape = scope.shape(node.output[0])
    if scope.constant(node.input[1]) is None or not shape or any(not size for size in shape):
        return
    take_attribute(node, "allowzero")
    node.input[1] = _new_constant(model, f"{node.name or node.output[0]}/shape", np.array(shape, np.int64), scope)


def _gather_a_vector(model: ModelProto, node: NodeProto, scope: OnnxGraph) -> None:
    """`x[:, 0]` becomes `x[:, [0]]` and a reshape; TIDL takes only vectors of indices."""
    index, shape = scope.constant(node.input[1]), scope.shape(node.output[0])
    if index is None or index.ndim or not shape or any(not size for size in shape):
        return
    result, name = node.output[0], node.name or node.output[0]
    gathered = scope.fresh(f"{result}/rows")
    node.input[1] = _new_constant(model, f"{name}/indices", index.reshape(1), scope)
    node.output[0] = gathered
    target = _new_constant(model, f"{name}/shape", np.array(shape, np.int64), scope)
    reshape = helper.make_node("Reshape", [gathered, target], [result], name=f"{name}/Reshape")
    model.graph.node.insert(list(model.graph.node).index(node) + 1, reshape)


def _repeat_codes(model: ModelProto, node: NodeProto, scope: OnnxGraph) -> None:
    """A constant that is repeated becomes a constant of the full size; tools 11.0 have no `Expand`."""
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    maker, target = makers.get(node.input[0]), scope.constant(node.input[1])
    codes = scope.constant(maker.input[0]) if maker is not None and maker.op_type == DEQUANTIZE else None
    shape = scope.shape(node.output[0])
    if maker is None or target is None or codes is None or not shape or any(not size for size in shape):
        return
    if prod(size or 0 for size in shape) == codes.size:  # repeated once
        replace_values(model.graph, {node.output[0]: maker.output[0]})
    else:
        scale = scope.constant(maker.input[1])
        if scale is None or scale.size > 1:
            return
        repeated = helper.make_node(DEQUANTIZE, list(maker.input), list(node.output), name=f"{node.name}/{DEQUANTIZE}")
        full = np.broadcast_to(codes, [size or 0 for size in shape]).copy()
        repeated.input[0] = _new_constant(model, f"{node.name}/codes", full, scope)
        model.graph.node.insert(list(model.graph.node).index(node), repeated)
    model.graph.node.remove(node)


def _new_constant(model: ModelProto, hint: str, value: np.ndarray, scope: OnnxGraph) -> str:
    name = scope.fresh(hint)
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def attention_like(model: ModelProto) -> bool:
    """Whether this is a transformer, which TI asks to compile with ONNX Runtime's optimizations off."""
    return any(node.op_type in ("LayerNormalization", "Softmax", "Erf") for node in model.graph.node)
