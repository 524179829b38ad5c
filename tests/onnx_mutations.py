"""ONNX files that were damaged or made up: other bytes, or other fields in a file that can still be read."""

from __future__ import annotations

import random

import onnx

from tests.mutations import mutated_bytes


def mutated_onnx(content: bytes, draw: random.Random) -> bytes:
    """A copy with other bytes, or with another field in one of its nodes or tensors."""
    if draw.random() < 0.5:
        return mutated_bytes(content, draw)
    model = onnx.load_from_string(content)
    if draw.random() < 0.5:
        _change_node(draw.choice(model.graph.node), model.graph, draw)
    else:
        _change_tensor(draw.choice(model.graph.initializer), draw)
    return model.SerializeToString()


def _change_node(node: onnx.NodeProto, graph: onnx.GraphProto, draw: random.Random) -> None:
    kind = draw.choice(["input", "operator", "domain", "type", "value", "no inputs", "no outputs", "no attributes"])
    if kind == "input" and node.input:
        other = draw.choice(graph.node).output[0]
        node.input[draw.randrange(len(node.input))] = draw.choice(["", "nowhere", other])
    elif kind == "operator":
        node.op_type = draw.choice(["If", "Loop", "Conv", "Foo", "Constant", "Reshape", "Resize", "Gemm", ""])
    elif kind == "domain":
        node.domain = draw.choice(["ai.onnx", "com.microsoft", "foo"])
    elif kind == "type" and node.attribute:
        draw.choice(node.attribute).type = draw.randrange(14)
    elif kind == "value" and node.attribute:
        attribute = draw.choice(node.attribute)
        attribute.ints[:] = draw.choice([[], [0], [-1, -1], [2**62] * 4, [1] * 7])
        attribute.i = draw.choice([0, -1, 2**62])
    elif kind == "no inputs":
        del node.input[:]
    elif kind == "no outputs":
        del node.output[:]
    elif kind == "no attributes":
        del node.attribute[:]


def _change_tensor(tensor: onnx.TensorProto, draw: random.Random) -> None:
    kind = draw.choice(["type", "sizes", "no data", "elsewhere"])
    if kind == "type":
        tensor.data_type = draw.randrange(30)
    elif kind == "sizes":
        tensor.dims[:] = draw.choice([[10**12], [-1], [0], [], [2**62, 2**62], [1, 1, 1, 1, 1]])
    elif kind == "no data":
        tensor.ClearField("raw_data")
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", draw.choice(["../../../etc/passwd", "/etc/passwd", "nothing", ""])
