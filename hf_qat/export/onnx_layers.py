"""The quantized layers of a Q/DQ file, and the values in its float twin that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from hf_qat.errors import AnalysisError
from hf_qat.export.float_operators import MOVING, MULTIPLYING
from hf_qat.export.onnx_graph import OnnxGraph, readers_of, replace_values


#: Operators of one input that a layer and the quantizer of its result have between them.
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Gelu", "Elu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"})

#: How the names of our nodes that quantize a result end, and what stands before that.
PAIR, QUANTIZER = "/QuantizeLinear", "_quantizer"


@dataclass(frozen=True)
class OnnxLayer:
    """A value that a Q/DQ file rounds, and the layer that computes it.

    Attributes:
        path: of the layer in the model, or that of the quantizer without its last word.
        operation: ONNX' name of what computes the value.
        before, after: names of the value before and after rounding.
        scale, zero_point: of its codes: () float32, and () of the codes' type.
        weighted: the node with a constant weight that the value comes from, through `activations`; `None` without one.
        activations: operators in between, in the order in which they are computed.
    """

    path: str
    operation: str
    before: str
    after: str
    scale: np.ndarray
    zero_point: np.ndarray
    weighted: NodeProto | None
    activations: tuple[str, ...]


class Wiring:
    """Who makes and who reads each value of a graph, and its constants, also behind `DequantizeLinear`."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = list(graph.node)
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = readers_of(graph.node)
        self.constants = OnnxGraph(graph)

    def weight(self, node: NodeProto) -> np.ndarray | None:
        """The constant that a layer multiplies with, as it is stored: codes, or float numbers."""
        if node.op_type not in MULTIPLYING or len(node.input) < 2:
            return None
        source = self._stored(node.input[1])
        return self.constants.constant(source)

    def weight_sizes(self, node: NodeProto) -> list[int]:
        """The sizes of a weight, sorted: it may be transposed."""
        weight = self.weight(node)
        return [] if weight is None else sorted(weight.shape)

    def quantized_weight(self, node: NodeProto) -> NodeProto | None:
        """The `DequantizeLinear` that a layer's weight comes out of, if there is one."""
        maker = self.makers.get(node.input[1])
        while maker is not None and maker.op_type in ("Transpose", "Reshape"):
            maker = self.makers.get(maker.input[0])
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def _stored(self, name: str) -> str:
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
            name = maker.input[0]
            maker = self.makers.get(name)
        return name

    def computed_by(self, name: str) -> NodeProto | None:
        """The node that computes a value, before those that only hand it on; `None` for an input of the file."""
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in MOVING:
            maker = self.makers.get(maker.input[0])
        return maker

    def weighted(self) -> list[NodeProto]:
        """All layers with a constant weight, in the order of the file."""
        return [node for node in self.nodes if self.weight(node) is not None]

    def is_bias(self, node: NodeProto) -> bool:
        """Whether a node adds a constant."""
        return node.op_type == "Add" and any(self.constants.tensor(self._stored(name)) for name in node.input)

    def reader(self, name: str) -> NodeProto | None:
        """The one node that reads a value; `None` where there are several or none."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 else None


def quantized_layers(model: ModelProto) -> list[OnnxLayer]:
    """The values that a Q/DQ file rounds, in order; pairs that only repeat an earlier one are left out."""
    wiring = Wiring(model.graph)
    layers = []
    for node in wiring.nodes:
        if node.op_type != "QuantizeLinear" or wiring.constants.tensor(node.input[0]) is not None:
            continue
        maker, reader = wiring.computed_by(node.input[0]), wiring.reader(node.output[0])
        scale = wiring.constants.constant(node.input[1])
        zero_point = wiring.constants.constant(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        repeats = maker is not None and maker.op_type == "DequantizeLinear"
        if reader is None or repeats or scale is None or zero_point is None:
            continue
        weighted, activations = _source(wiring, maker)
        layers.append(
            OnnxLayer(
                path=_path(node.name),
                operation=weighted.op_type if weighted is not None else _operation(wiring, maker),
                before=node.input[0],
                after=reader.output[0],
                scale=scale,
                zero_point=zero_point,
                weighted=weighted,
                activations=activations,
            )
        )
    return layers


def _source(wiring: Wiring, maker: NodeProto | None) -> tuple[NodeProto | None, tuple[str, ...]]:
    activations: list[str] = []
    while maker is not None and wiring.weight(maker) is None:
        if maker.op_type in ACTIVATIONS:
            activations.insert(0, maker.op_type)
        elif not wiring.is_bias(maker):
            return None, ()
        sources = [name for name in maker.input if name in wiring.makers and wiring.constants.tensor(name) is None]
        maker = wiring.makers[sources[0]] if sources else None
    return maker, tuple(activations)


def _operation(wiring: Wiring, maker: NodeProto | None) -> str:
    """What computes a value, before the activation that is rounded together with it."""
    if maker is None:
        return "input"
    before = wiring.computed_by(maker.input[0]) if maker.op_type in ACTIVATIONS else None
    return str(maker.op_type if before is None or before.op_type == "DequantizeLinear" else before.op_type)


def _path(node: str) -> str:
    path = node.removesuffix(PAIR).removesuffix(QUANTIZER)
    return path.removesuffix("activation").removesuffix(".")


def without_rounding(model: ModelProto) -> ModelProto:
    """A copy of a Q/DQ file that rounds no value: weights are what their codes stand for, activations are float."""
    twin = ModelProto()
    twin.CopyFrom(model)
    wiring = Wiring(twin.graph)
    unrounded: dict[str, str] = {}
    for node in wiring.nodes:
        maker = wiring.makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and maker.op_type == "QuantizeLinear":
            unrounded[node.output[0]] = unrounded.get(maker.input[0], maker.input[0])
    for output in twin.graph.output:
        source = unrounded.pop(output.name, None)
        if source is not None:  # the name has to stay
            (node,) = [node for node in twin.graph.node if output.name in node.output]
            node.CopyFrom(helper.make_node("Identity", [source], [output.name], name=node.name))
    replace_values(twin.graph, unrounded)
    return twin


def values_in_twin(layers: Sequence[OnnxLayer], model: ModelProto, twin: ModelProto) -> dict[str, str]:
    """For each layer with a weight, the value of a float file that it stands for, by path.

    Layers are told by their order and by the shapes of their weights; batch norm that the twin still has belongs to
    the layer before it.

    Raises:
        AnalysisError: the files have not the same layers.
    """
    ours, theirs = Wiring(model.graph), Wiring(twin.graph)
    pairs = list(_matched(ours, theirs))
    counterparts = {mine.output[0]: other for mine, other in pairs}
    return {
        layer.path: _followed(theirs, counterparts[layer.weighted.output[0]], layer.activations)
        for layer in layers
        if layer.weighted is not None
    }


def _matched(ours: Wiring, theirs: Wiring) -> Iterator[tuple[NodeProto, NodeProto]]:
    mine, others = ours.weighted(), theirs.weighted()
    if len(mine) != len(others):
        raise AnalysisError(
            f"the reference is no float twin of the file: it has {len(others)} layers with weights, and the file "
            f"{len(mine)}. Export the very model that was quantized."
        )
    for one, other in zip(mine, others, strict=True):
        shapes = [ours.weight_sizes(one), theirs.weight_sizes(other)]
        if shapes[0] != shapes[1]:
            raise AnalysisError(
                f"the reference is no float twin of the file: where that has {one.name or one.output[0]} with "
                f"a weight of {shapes[0]}, it has {other.name or other.output[0]} with {shapes[1]} (sizes, sorted)."
            )
        yield one, other


def _followed(wiring: Wiring, node: NodeProto, activations: Sequence[str]) -> str:
    """The value after a layer's bias, its batch norm and its activations."""
    value, left = node.output[0], list(activations)
    while True:
        reader = wiring.reader(value)
        if reader is None:
            return str(value)
        if left and reader.op_type == left[0]:
            left.pop(0)
        elif reader.op_type != "BatchNormalization" and not wiring.is_bias(reader):
            return str(value)
        value = reader.output[0]
