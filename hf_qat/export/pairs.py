"""A Q/DQ pair after operators that only move numbers: it changes none, and some compilers ask for it."""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto, NodeProto, helper

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS


def repeat_pairs(model: ModelProto, operators: Collection[str]) -> None:
    """Quantize the results of some operators again, with the parameters of the pair that their input comes from.

    The results are numbers of the input, on its grid already: quantizing them once more gives the same codes.

    Args:
        model: is changed.
        operators: such as `MaxPool` and `Reshape`: their first output holds numbers of their first input, no others.
            Those whose input comes from no pair, or whose output is quantized already, stay as they are.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in operators or node.domain not in DEFAULT_DOMAINS:
            continue
        result, source = node.output[0], makers.get(node.input[0])
        quantized = any(reader.op_type == "QuantizeLinear" for reader in readers.get(result, ()))
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in makers or quantized:
            continue
        pair = _pair(node, source, keeps_name=result in outputs)
        for reader in readers.get(result, ()) if result not in outputs else ():
            _read(reader, result, pair[1].output[0])
        makers.update({added.output[0]: added for added in pair})
        readers[pair[1].output[0]] = list(readers.get(result, ()))
        nodes += pair
    del graph.node[:]
    graph.node.extend(nodes)


def _pair(node: NodeProto, source: NodeProto, keeps_name: bool) -> list[NodeProto]:
    """`QuantizeLinear` and `DequantizeLinear` of a node's result, with the parameters of `source`."""
    result, name = node.output[0], node.name or node.output[0]
    if keeps_name:  # an output of the model: the pair takes its name over
        node.output[0] = f"{result}_moved"
    codes = f"{result}_repeated"
    after = result if keeps_name else f"{result}_dequantized"
    parameters = list(source.input[1:])
    return [
        helper.make_node("QuantizeLinear", [node.output[0], *parameters], [codes], name=f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [codes, *parameters], [after], name=f"{name}/DequantizeLinear"),
    ]


def _read(reader: NodeProto, old: str, new: str) -> None:
    for position, name in enumerate(reader.input):
        if name == old:
            reader.input[position] = new
