"""What an exported file holds: its quantizers, what is left in float, and the quantization step of each output."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto

from hf_qat.export.onnx_graph import OnnxGraph


#: Operators that hand values on as they are; they compute nothing that a chip would need float units for.
MOVING = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)

#: Operators that multiply their first two inputs with each other, so both must be quantized.
MULTIPLYING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

#: Types of values that are computed with, as against shapes, indices and codes.
REAL_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


def count_quantize_nodes(model: ModelProto) -> int:
    """How many `QuantizeLinear` nodes the graph has."""
    return sum(node.op_type == "QuantizeLinear" for node in model.graph.node)


def float_operators(model: ModelProto) -> dict[str, list[str]]:
    """Operators that compute with numbers which no quantizer has rounded.

    That is, one of its inputs comes neither from a `DequantizeLinear` nor from operators that got theirs from one; of
    convolutions and matrix products, a float weight counts too. So the layer norm or the GELU between two quantizers
    is none, an excluded layer is one, with everything after it up to the next quantizer.

    Returns:
        Names of nodes by operator, in the order of the graph; empty for a fully quantized model.
    """
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    rounded: set[str] = set()
    found: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" or all(
            onnx_graph.tensor(name) is not None for name in node.input if name
        ):
            rounded.update(node.output if node.op_type == "DequantizeLinear" else ())
        elif node.op_type != "QuantizeLinear" and onnx_graph.element_type(node.output[0]) in REAL_TYPES:
            if _inputs_rounded(node, onnx_graph, rounded):
                rounded.update(node.output)
            elif node.op_type not in MOVING:
                found.setdefault(node.op_type, []).append(node.name)
    return found


def _inputs_rounded(node: NodeProto, onnx_graph: OnnxGraph, rounded: set[str]) -> bool:
    if node.op_type in MULTIPLYING and not rounded.issuperset(node.input[:2]):
        return False
    real = [name for name in node.input if name and onnx_graph.element_type(name) in REAL_TYPES]
    return all(name in rounded or onnx_graph.tensor(name) is not None for name in real)


def output_steps(model: ModelProto) -> list[float | None]:
    """The scale of the last quantizer before each output; `None` where something is still computed after it."""
    onnx_graph = OnnxGraph(model.graph)
    makers = {name: node for node in model.graph.node for name in node.output}
    return [_step(output.name, makers, onnx_graph) for output in model.graph.output]


def _step(name: str, makers: dict[str, NodeProto], onnx_graph: OnnxGraph) -> float | None:
    for node in _moved_from(name, makers):
        if node.op_type == "DequantizeLinear":
            scale = onnx_graph.constant(node.input[1])
            return float(scale) if scale is not None and scale.ndim == 0 else None
    return None


def _moved_from(name: str, makers: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """The node that makes a value, and those before it for as long as they only hand values on."""
    node = makers.get(name)
    while node is not None:
        yield node
        node = makers.get(node.input[0]) if node.op_type in MOVING else None
