"""An ONNX graph as the rules see it: layers with their attributes, constants, shapes and quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from hf_qat.errors import ExportError
from hf_qat.export.onnx_graph import (
    DEFAULT_DOMAINS,
    OnnxGraph,
    Shape,
    constant_value,
    get_attribute,
    opset_of,
    readers_of,
)


QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def load(path: str | Path) -> ModelProto:
    """Read an ONNX file.

    Raises:
        ExportError: there is no such file, it is not ONNX, or a part of it contradicts another.
    """
    try:
        model = onnx.load(path)
        _require_sound(model)
    except Exception as error:
        raise ExportError(f"{path} cannot be read as an ONNX file: {error}") from error
    if not model.graph.node:
        raise ExportError(f"{path} holds no layers: is it an ONNX file, and was it written to the end?")
    _free_negative_sizes(model)
    return model


def _require_sound(model: ModelProto) -> None:
    """Raise unless tensors have the values that their sizes promise, and nodes the inputs that their operators need.

    Operators that ONNX does not know are left alone: what TIDL makes of them is for the rules to say.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.opset_import}
    for tensor in model.graph.initializer:
        numpy_helper.to_array(tensor)
    for node in model.graph.node:
        for name in (node.name, *node.input, *node.output):
            if not isinstance(name, str):  # bytes: so protobuf hands out what it cannot decode
                raise ValueError(f"{name!r} is no name in UTF-8")
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        if onnx.defs.has(node.op_type, domain):
            onnx.checker.check_node(node, context)
        value = constant_value(node)
        if value is not None:
            numpy_helper.to_array(value)


def _free_negative_sizes(model: ModelProto) -> None:
    """A size of −1, which some exporters write for one that is not fixed, becomes a size without a number."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.dim_param = str(dim.dim_value)


@dataclass(frozen=True)
class Quantizer:
    """The parameters of one `QuantizeLinear` or `DequantizeLinear`.

    Attributes:
        scale: () or (C,), as float64; `None` if it is computed at run time.
        zero_point: the shape of `scale`; zeros where the node has none.
        axis: the axis that `scale` runs along.
        dtype: of the codes, or `None` if unknown.
    """

    scale: np.ndarray | None
    zero_point: np.ndarray | None
    axis: int
    dtype: np.dtype | None

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one scale."""
        return self.scale is not None and self.scale.size > 1

    @property
    def non_negative(self) -> bool:
        """Whether all numbers that it can write are 0 or above: what TIDL calls an unsigned tensor."""
        if self.zero_point is None or self.dtype is None or not np.issubdtype(self.dtype, np.integer):
            return False
        return bool((self.zero_point <= np.iinfo(self.dtype).min).all())


class Graph:
    """All layers of a model, with what can be known about the values between them.

    Args:
        model: as it was read; shapes are inferred on a copy.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.inferred = _infer(model)
        self.proto = self.inferred.graph
        self.scope = OnnxGraph(self.proto)
        self.makers = {name: node for node in self.proto.node for name in node.output if name}
        self.readers = readers_of(self.proto.node)
        self.inputs = [value for value in self.proto.input if self.scope.tensor(value.name) is None]
        self.outputs = [value.name for value in self.proto.output]
        self.fixed = self._fixed()

    def _fixed(self) -> set[str]:
        """Values that do not depend on any input."""
        fixed = {tensor.name for tensor in self.proto.initializer}
        for node in self.proto.node:
            read = [name for name in node.input if name]
            if node.op_type == "Constant" or (read and fixed.issuperset(read)):
                fixed.update(node.output)
        return fixed

    @cached_property
    def layers(self) -> list[Layer]:
        """What is computed from the inputs, but for quantizers; in the order of the graph."""
        nodes = [node for node in self.proto.node if not self.is_quantizer(node)]
        return [Layer(self, node) for node in nodes if not self.fixed.issuperset(node.output)]

    @cached_property
    def quantizers(self) -> list[Layer]:
        """The nodes that quantize and dequantize."""
        return [Layer(self, node) for node in self.proto.node if self.is_quantizer(node)]

    @staticmethod
    def is_quantizer(node: NodeProto) -> bool:
        """Whether a node is one half of a Q/DQ pair."""
        return node.op_type in (QUANTIZE, DEQUANTIZE) and node.domain in DEFAULT_DOMAINS

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant; of a dequantized one, the numbers that it stands for."""
        found = self.scope.constant(name)
        maker = self.makers.get(name)
        if found is not None or maker is None or maker.op_type not in (DEQUANTIZE, "Identity"):
            return found
        codes = self.constant(maker.input[0])
        return codes if codes is None or maker.op_type == "Identity" else dequantized(codes, self.quantizer(maker))

    def quantizer(self, node: NodeProto) -> Quantizer:
        """The parameters of a quantizing or dequantizing node."""
        scale = self.scope.constant(node.input[1])
        zero = self.scope.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return Quantizer(
            scale=None if scale is None else scale.astype(np.float64),
            zero_point=zero.astype(np.int64) if zero is not None else np.zeros_like(scale, dtype=np.int64),
            axis=_integer(get_attribute(node, "axis"), 1),
            dtype=zero.dtype if zero is not None else self._code_type(node),
        )

    def _code_type(self, node: NodeProto) -> np.dtype | None:
        """The type of the codes of a quantizer without a zero point."""
        if node.op_type == QUANTIZE:
            return np.dtype(np.uint8)
        codes = self.scope.tensor(node.input[0])
        return None if codes is None else numpy_helper.to_array(codes).dtype

    def before(self, name: str) -> Quantizer | None:
        """The quantizer that a value comes from, through layers that only move numbers."""
        node = self.makers.get(name)
        while node is not None and node.op_type in MOVING:
            node = self.makers.get(node.input[0])
        return self.quantizer(node) if node is not None and node.op_type == DEQUANTIZE else None

    def after(self, name: str) -> Quantizer | None:
        """The quantizer that a value goes to, through layers that only move it or multiply it by a constant."""
        for node in self.readers.get(name, ()):
            if node.op_type == QUANTIZE:
                return self.quantizer(node)
            scaled = node.op_type in ("Mul", "Div") and len(self.fixed.intersection(node.input)) == 1
            if node.op_type in MOVING or scaled:
                return self.after(node.output[0])
        return None


#: Layers whose output holds numbers of their first input, and no others.
MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Identity"})


@dataclass(frozen=True)
class Layer:
    """One node."""

    graph: Graph
    node: NodeProto

    @property
    def operator(self) -> str:
        """The type of the node, with its domain if that is not ONNX's own."""
        own = self.node.domain in DEFAULT_DOMAINS
        return self.node.op_type if own else f"{self.node.domain}.{self.node.op_type}"

    @property
    def name(self) -> str:
        """Of the node; the name of its first output where it has none, as TI's `deny_list` takes it."""
        return self.node.name or self.node.output[0]

    def attribute(self, name: str, default: int) -> int:
        """An integer attribute."""
        return _integer(get_attribute(self.node, name), default)

    def attributes(self, name: str, default: list[int]) -> list[int]:
        """An attribute that is a list of integers."""
        value = get_attribute(self.node, name)
        return list(value) if isinstance(value, (list, tuple)) else default

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        value = get_attribute(self.node, name)
        return float(value) if isinstance(value, (int, float)) else default

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = get_attribute(self.node, name)
        return value.decode(errors="replace") if isinstance(value, bytes) else default

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that are given."""
        return [name for name in self.node.input if name]

    @property
    def variables(self) -> list[str]:
        """Names of the inputs that depend on the model's inputs."""
        return [name for name in self.inputs if name not in self.graph.fixed]

    def has(self, position: int) -> bool:
        """Whether an optional input is given."""
        return position < len(self.node.input) and bool(self.node.input[position])

    def varies(self, position: int) -> bool:
        """Whether an input is given and depends on the model's inputs."""
        return self.has(position) and self.node.input[position] not in self.graph.fixed

    def constant(self, position: int) -> np.ndarray | None:
        """The value of an input, if it is a constant."""
        return self.graph.constant(self.node.input[position]) if self.has(position) else None

    def shape(self, position: int = 0) -> Shape | None:
        """The shape of an input, if its rank is known."""
        return self.graph.scope.shape(self.node.input[position]) if self.has(position) else None

    @property
    def output_shape(self) -> Shape | None:
        """The shape of the first output, if its rank is known."""
        return self.graph.scope.shape(self.node.output[0])


def dequantized(codes: np.ndarray, quantizer: Quantizer) -> np.ndarray | None:
    """`(codes − zero_point) · scale`, as ONNX's `DequantizeLinear`; float32, the shape of `codes`."""
    if quantizer.scale is None or quantizer.zero_point is None:
        return None
    scale, zero = quantizer.scale, quantizer.zero_point
    if scale.size > 1:
        along = [1] * codes.ndim
        along[quantizer.axis] = -1
        scale, zero = scale.reshape(along), zero.reshape(along)
    values: np.ndarray = (codes.astype(np.int64) - zero) * scale
    return values.astype(np.float32)


def from_the_end(axis: int, rank: int) -> int:
    """An axis counted from the last one: −1 is the width, −2 the height, −3 the channels."""
    return axis - rank if axis >= 0 else axis


def _infer(model: ModelProto) -> ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # a graph that does not fit together: the rules then say which shapes are unknown
        return model


def _integer(value: object, default: int) -> int:
    return value if isinstance(value, int) else default
