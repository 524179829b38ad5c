"""What depends on no input is computed once, at export: repeated queries, position encodings, a first self-attention.

Runtimes would compute it for every image, and some have no operator for it. Integers stay integers: a constant that is
quantized is kept as codes before their `DequantizeLinear`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS, OnnxGraph, names_read, nodes_behind, subgraphs
from hf_qat.export.onnx_session import open_session


#: How much a file may grow: so many bytes, or this share of it where that is more.
LARGEST_GROWTH, LARGEST_SHARE = 2**20, 0.01

#: Operators whose result holds numbers of their first input, and no others.
MOVING = frozenset("Expand Flatten Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split())

#: Operators that give something else in each run.
RANDOM = frozenset({"RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"})


@dataclass(frozen=True)
class Folded:
    """A value that becomes a constant.

    Attributes:
        name: of the value.
        pair: the `DequantizeLinear` that its numbers come from; `None` where they are kept as they are.
    """

    name: str
    pair: NodeProto | None


def fold_constants(model: ModelProto) -> None:
    """What constants alone decide becomes a constant, in place: the smallest first, for as long as there is room."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    fixed = _fixed_nodes(graph.node, {tensor.name for tensor in graph.initializer})
    makers = {name: node for node in fixed for name in node.output}
    outputs = {output.name for output in graph.output}
    others = [node for node in graph.node if node.output[0] not in makers]
    wanted = [found for name in _in_order(names_read(others), makers) if (found := _folded(name, makers, onnx_graph))]
    values = _evaluate(model, fixed, [one.name for one in wanted if one.name not in outputs])
    room = LARGEST_GROWTH
    if sum(value.nbytes for value in values.values()) > room:
        room = max(room, int(LARGEST_SHARE * model.ByteSize()))
    by_output = {name: node for node in graph.node for name in node.output}
    for one in sorted((one for one in wanted if one.name in values), key=lambda one: values[one.name].nbytes):
        constant = values[one.name] if one.pair is None else _codes(values[one.name], one.pair, onnx_graph)
        room -= constant.nbytes
        if room < 0:
            break
        name = _in_place_of(by_output[one.name], one, onnx_graph)
        graph.initializer.append(numpy_helper.from_array(constant, name))


def _fixed_nodes(nodes: Iterable[NodeProto], constants: Collection[str]) -> list[NodeProto]:
    """Those that read constants, and what such nodes make of them."""
    known, fixed = set(constants), []
    for node in nodes:
        read = [name for name in node.input if name]
        plain = node.domain in DEFAULT_DOMAINS and node.op_type not in RANDOM and not any(subgraphs(node))
        if plain and read and known.issuperset(read):
            known.update(node.output)
            fixed.append(node)
    return fixed


def _in_order(names: Iterable[str], makers: Mapping[str, NodeProto]) -> list[str]:
    """Each of the names that a fixed node makes, once; of a `DequantizeLinear`, the codes that it reads."""
    found = dict.fromkeys(name for name in names if name in makers)
    codes = (makers[name].input[0] if makers[name].op_type == "DequantizeLinear" else name for name in found)
    return [name for name in dict.fromkeys(codes) if name in makers]


def _folded(name: str, makers: Mapping[str, NodeProto], onnx_graph: OnnxGraph) -> Folded | None:
    """How a value becomes a constant; `None` where a weight with one scale per channel would lose its codes."""
    sources = list(_dequantized(name, makers))
    scales = [onnx_graph.constant(node.input[1]) for node in sources]
    if not all(scale is not None and scale.ndim == 0 for scale in scales):
        return None
    node: NodeProto | None = makers[name]
    while node is not None and node.op_type in MOVING:
        node = makers.get(node.input[0])
    return Folded(name, node if node is not None and node.op_type == "DequantizeLinear" else None)


def _dequantized(name: str, makers: Mapping[str, NodeProto]) -> Iterator[NodeProto]:
    """The `DequantizeLinear` nodes whose numbers go into a value that is not quantized again on the way."""
    node = makers.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        yield node
    elif node is not None and node.op_type != "QuantizeLinear":
        for read in node.input:
            yield from _dequantized(read, makers)


def _evaluate(model: ModelProto, nodes: Sequence[NodeProto], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The values of these names, by ONNX Runtime; none where it is not installed."""
    if not names or find_spec("onnxruntime") is None:
        return {}
    nodes = nodes_behind(nodes, names)
    read = set(names_read(nodes))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    graph = helper.make_graph(nodes, "constants", [], results, tensors)
    part = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    session = open_session(part.SerializeToString(), optimized=False, threads=0, entries={})
    return dict(zip(names, session.run(None, {}), strict=True))


def _codes(values: np.ndarray, pair: NodeProto, onnx_graph: OnnxGraph) -> np.ndarray:
    """The codes of numbers that this `DequantizeLinear` has made."""
    scale = onnx_graph.constant(pair.input[1])
    zero_point = onnx_graph.constant(pair.input[2]) if len(pair.input) > 2 else np.zeros((), np.uint8)
    assert scale is not None and zero_point is not None
    codes: np.ndarray = (np.rint(values / scale) + zero_point).astype(zero_point.dtype)
    return codes


def _in_place_of(maker: NodeProto, folded: Folded, onnx_graph: OnnxGraph) -> str:
    """Let a constant take the place of what `maker` makes, and return the name that it must have."""
    if folded.pair is None:
        position = list(maker.output).index(folded.name)
        maker.output[position] = onnx_graph.fresh(f"{folded.name}_computed")
        return folded.name
    name = onnx_graph.fresh(f"{folded.name}_codes")
    dequantize = helper.make_node("DequantizeLinear", [name, *folded.pair.input[1:]], [folded.name])
    dequantize.metadata_props.extend(maker.metadata_props)
    maker.CopyFrom(dequantize)
    return name
