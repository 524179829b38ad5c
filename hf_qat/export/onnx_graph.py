"""Reading an ONNX graph or function, and replacing what it holds: constants, shapes, attributes, names still free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)


#: The two spellings of the default operator domain.
DEFAULT_DOMAINS = ("", "ai.onnx")

#: Bytes of a constant up to which it may hold a shape, which others are computed from.
LARGEST_SHAPE = 2**16

#: Of one dimension: its size, or `None` where it is dynamic or unknown.
Shape = tuple[int | None, ...]


class OnnxGraph:
    """What can be seen from a node: the values of its own graph and of the graphs around it.

    Args:
        body: the graph or function that holds the node. Shapes come from its `value_info`, so infer them first.
        outer: the graph around a subgraph, as one of these.
    """

    def __init__(self, body: GraphProto | FunctionProto, outer: OnnxGraph | None = None) -> None:
        self.outer = outer
        self._tensors = dict(_constants(body))
        self._infos = {info.name: info for info in _value_infos(body)}
        self._taken = {name for node in body.node for name in (*node.input, *node.output)} | set(self._tensors)

    def tensor(self, name: str) -> TensorProto | None:
        """The initializer or the value of the `Constant` node of that name."""
        if name in self._tensors or self.outer is None:
            return self._tensors.get(name)
        return self.outer.tensor(name)

    def constant(self, name: str) -> np.ndarray | None:
        """Its value, if `name` is a constant."""
        tensor = self.tensor(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def element_type(self, name: str) -> int | None:
        """The `TensorProto.DataType` of a value, if known."""
        tensor = self.tensor(name)
        if tensor is not None:
            return int(tensor.data_type)
        info = self._info(name)
        return None if info is None else int(info.type.tensor_type.elem_type)

    def shape(self, name: str) -> Shape | None:
        """The shape of a value, or `None` if not even its rank is known."""
        tensor = self.tensor(name)
        if tensor is not None:
            return tuple(tensor.dims)
        info = self._info(name)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        dims = info.type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)

    def fresh(self, hint: str) -> str:
        """A name that no value has yet: `hint`, or `hint_1`, …"""
        name, ordinal = hint, 0
        while self._is_taken(name):
            ordinal += 1
            name = f"{hint}_{ordinal}"
        self._taken.add(name)
        return name

    def _is_taken(self, name: str) -> bool:
        return name in self._taken or (self.outer is not None and self.outer._is_taken(name))

    def _info(self, name: str) -> ValueInfoProto | None:
        if name in self._infos or self.outer is None:
            return self._infos.get(name)
        return self.outer._info(name)


def _constants(body: GraphProto | FunctionProto) -> Iterator[tuple[str, TensorProto]]:
    if isinstance(body, GraphProto):
        for tensor in body.initializer:
            yield tensor.name, tensor
    for node in body.node:
        value = constant_value(node)
        if value is not None:
            yield node.output[0], value


def constant_value(node: NodeProto) -> TensorProto | None:
    """The tensor of a `Constant` node, from whichever attribute holds it; `None` for every other node."""
    if node.op_type != "Constant" or node.domain not in DEFAULT_DOMAINS or not node.attribute:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    if attribute.name in ("value_int", "value_ints"):
        return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), dtype=np.int64))
    if attribute.name in ("value_float", "value_floats"):
        return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), dtype=np.float32))
    return None


def _value_infos(body: GraphProto | FunctionProto) -> Iterable[ValueInfoProto]:
    declared = () if isinstance(body, FunctionProto) else (*body.input, *body.output)
    return (*declared, *body.value_info)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an `If`, `Loop` or `Scan`."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def names_read(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Every value that the nodes, or graphs inside them, take as an input or hand out as a result."""
    for node in nodes:
        yield from (name for name in node.input if name)
        for graph in subgraphs(node):
            yield from names_read(graph.node)
            yield from (output.name for output in graph.output)


def readers_of(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    """The nodes that read each value, by its name."""
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def replace_items(field: Any, items: list[Any]) -> None:
    """Make `items`, which may be part of the repeated `field`, its whole content."""
    del field[:]
    field.extend(items)


def replace_values(graph: GraphProto, by: Mapping[str, str]) -> None:
    """Let every node, also in graphs inside this one, and the graphs' results read other values, in place."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = by.get(name, name)
        for inner in subgraphs(node):
            replace_values(inner, by)
            for output in inner.output:
                output.name = by.get(output.name, output.name)


def take_attribute(node: NodeProto, name: str) -> object | None:
    """Remove an attribute from the node and return its value; `None` if the node has none of that name."""
    for position, attribute in enumerate(node.attribute):
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            del node.attribute[position]
            return value
    return None


def get_attribute(node: NodeProto, name: str) -> object | None:
    """The value of an attribute; `None` if the node has none of that name."""
    for attribute in node.attribute:
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            return value
    return None


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set that the model itself states; 0 if it states none."""
    return max((entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS), default=0)


def with_shapes(model: ModelProto) -> ModelProto:
    """A copy of the model with the shapes that `onnx.shape_inference` finds, which is not handed the weights."""
    light = ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > LARGEST_SHAPE:
            tensor.raw_data = b""
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    for tensor, whole in zip(inferred.graph.initializer, model.graph.initializer, strict=True):
        if len(whole.raw_data) > LARGEST_SHAPE:
            tensor.raw_data = whole.raw_data
    return inferred


def nodes_behind(nodes: Sequence[NodeProto], names: Iterable[str]) -> list[NodeProto]:
    """Those of the nodes, in their order, that values of these names are computed by."""
    wanted, needed = set(names), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(names_read([node]))
    return needed[::-1]
