"""A Q/DQ pair after operators that only move numbers: it changes none, and keeps what follows in integers."""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto, NodeProto, helper

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS, get_attribute, readers_of, replace_items


#: Where a pair helps. Without it, ONNX Runtime 1.32 computes a convolution after any of these in float, but for
#: `MaxPool`, after which TI's tools write one. After `Reshape`, `Transpose`, `Slice` and `Pad` it needs none.
WITH_PAIR = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Gather",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Resize",
        "SpaceToDepth",
        "Split",
        "Tile",
    }
)

#: What may stand between a result and the pair that it has already.
BETWEEN = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def repeat_pairs(model: ModelProto, operators: Collection[str] = WITH_PAIR) -> None:
    """Quantize the results of some operators again, with the parameters of the pair that their input comes from.

    The results are numbers of the input, on its grid already: quantizing them once more gives the same codes.

    Args:
        model: is changed.
        operators: such as `MaxPool`: their outputs hold numbers of their first input, no others. Those whose input
            comes from no pair, or whose output is quantized already, stay as they are; so does interpolation.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph.node)
    outputs = {output.name for output in graph.output}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        source = makers.get(node.input[0]) if node.input and node.op_type in operators and _moves(node) else None
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in makers:
            continue
        for position, result in enumerate(node.output[:1] if node.op_type == "MaxPool" else node.output):
            if _is_quantized(result, readers):
                continue
            pair = _pair(node, position, source, keeps_name=result in outputs)
            for reader in readers.get(result, ()) if result not in outputs else ():
                _read(reader, result, pair[1].output[0])
            makers.update({added.output[0]: added for added in pair})
            readers[pair[1].output[0]] = list(readers.get(result, ()))
            nodes += pair
    replace_items(graph.node, nodes)


def _moves(node: NodeProto) -> bool:
    """Whether the operator, as this node uses it, computes nothing."""
    interpolates = node.op_type == "Resize" and get_attribute(node, "mode") not in (None, b"nearest")
    return node.domain in DEFAULT_DOMAINS and not interpolates


def _is_quantized(name: str, readers: dict[str, list[NodeProto]]) -> bool:
    """Whether a pair follows, at once or after a change of shape."""
    following = readers.get(name, [])
    if len(following) == 1 and following[0].op_type in BETWEEN:
        return _is_quantized(following[0].output[0], readers)
    return any(node.op_type == "QuantizeLinear" for node in following)


def _pair(node: NodeProto, position: int, source: NodeProto, keeps_name: bool) -> list[NodeProto]:
    """`QuantizeLinear` and `DequantizeLinear` of a node's result, with the parameters of `source`."""
    result, name = node.output[position], (node.name or node.output[0]) + (f".{position}" if position else "")
    moved = f"{result}_moved" if keeps_name else result
    node.output[position] = moved  # of an output of the model, the pair takes the name over
    codes, after = f"{result}_repeated", result if keeps_name else f"{result}_dequantized"
    parameters = list(source.input[1:])
    return [
        helper.make_node("QuantizeLinear", [moved, *parameters], [codes], name=f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [codes, *parameters], [after], name=f"{name}/DequantizeLinear"),
    ]


def _read(reader: NodeProto, old: str, new: str) -> None:
    for position, name in enumerate(reader.input):
        if name == old:
            reader.input[position] = new
