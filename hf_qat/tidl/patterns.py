"""Several ONNX operators that TIDL takes for one layer: GELU, SiLU and layer norm written out.

Source: edgeai-tidl-tools, docs/vision_transformers.md (GELU, Layernorm) and docs/quantization.md ("patterns like
LayerNorm, GELU, SiLU only require QDQ nodes at the end").
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from onnx import NodeProto

from hf_qat.tidl.graph import DEQUANTIZE, QUANTIZE, Graph


@dataclass(frozen=True)
class Place:
    """Where a node stands in a pattern.

    Attributes:
        pattern: `"GELU"`, `"SiLU"` or `"LayerNorm"`.
        last: it makes the pattern's result; all others are inside.
    """

    pattern: str
    last: bool


#: What `places` has found, as long as the graphs are there: all rules of a check ask about the same one.
_FOUND: WeakKeyDictionary[Graph, dict[str, Place]] = WeakKeyDictionary()


def places(graph: Graph) -> dict[str, Place]:
    """The nodes that belong to patterns, by their first outputs; Q/DQ pairs between them belong there too."""
    if graph not in _FOUND:
        _FOUND[graph] = _places(graph)
    return _FOUND[graph]


def _places(graph: Graph) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for node in graph.proto.node:
        name, nodes = _pattern_from(graph, node)
        found.update({part.output[0]: Place(name, last=part is nodes[-1]) for part in nodes})
    return found


def inside(graph: Graph, node: NodeProto) -> str | None:
    """The pattern that a node is inside, if any."""
    place = places(graph).get(node.output[0])
    return None if place is None or place.last else place.pattern


def _pattern_from(graph: Graph, node: NodeProto) -> tuple[str, list[NodeProto]]:
    """The pattern that a node is the mark of, with all its nodes, the last one last; none for most nodes."""
    if node.op_type == "Erf":
        return "GELU", [*_scaled_before(graph, node), *_gelu_after(graph, node)]
    if node.op_type in ("Sigmoid", "HardSigmoid"):
        chain = _chain(graph, node, ["Mul"])
        source = _unquantized(graph, node.input[0])
        if len(_layers(chain)) == 2 and source in {_unquantized(graph, name) for name in chain[-1].input}:
            return "SiLU", chain
    if node.op_type == "ReduceMean":
        chain = _chain(graph, node, ["Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div"])
        if len(_layers(chain)) == 7:
            return "LayerNorm", chain
    return "", []


def _layers(nodes: list[NodeProto]) -> list[NodeProto]:
    return [node for node in nodes if not Graph.is_quantizer(node)]


def _scaled_before(graph: Graph, erf: NodeProto) -> list[NodeProto]:
    """The division by √2 in front of `Erf`, and pairs between."""
    nodes, name = [], erf.input[0]
    while (maker := graph.makers.get(name)) is not None:
        if maker.op_type in (QUANTIZE, DEQUANTIZE):
            nodes.append(maker)
        elif maker.op_type in ("Div", "Mul") and not graph.fixed.isdisjoint(maker.input):
            return [*nodes, maker]
        else:
            return []
        name = maker.input[0]
    return []


def _gelu_after(graph: Graph, erf: NodeProto) -> list[NodeProto]:
    """`Erf`, `+ 1`, and the multiplications by the input and by ½, in either order."""
    long, short = _chain(graph, erf, ["Add", "Mul", "Mul"]), _chain(graph, erf, ["Add", "Mul"])
    halves = [
        node
        for node in _layers(long)[2:]
        if any(value is not None and value.size == 1 for value in map(graph.constant, node.input))
    ]
    return long if halves else short


def _chain(graph: Graph, first: NodeProto, operators: list[str]) -> list[NodeProto]:
    """`first` and what reads it, as far as the operators follow; pairs between them too."""
    nodes, wanted = [first], list(operators)
    while wanted:
        readers = graph.readers.get(nodes[-1].output[0], [])
        step = next((node for node in readers if node.op_type in (wanted[0], QUANTIZE, DEQUANTIZE)), None)
        if step is None or (step.op_type != wanted[0] and not _leads_to(graph, step, wanted[0])):
            break
        if step.op_type == wanted[0]:
            wanted.pop(0)
        nodes.append(step)
    return nodes


def _leads_to(graph: Graph, node: NodeProto, operator: str) -> bool:
    """Whether an operator reads what a quantizer makes."""
    return any(
        reader.op_type == operator or (reader.op_type == DEQUANTIZE and _leads_to(graph, reader, operator))
        for reader in graph.readers.get(node.output[0], [])
    )


def _unquantized(graph: Graph, name: str) -> str:
    """The value that a dequantized one was made from."""
    maker = graph.makers.get(name)
    while maker is not None and maker.op_type in (QUANTIZE, DEQUANTIZE):
        name = maker.input[0]
        maker = graph.makers.get(name)
    return name
