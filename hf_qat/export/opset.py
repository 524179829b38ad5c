"""Lowering an ONNX model from opset 18 to 17, by a table with one rule per operator that changed in between.

`torch.onnx.export` writes opset 18 at the least, and stays there without an error when asked for 17, the newest that
TI's tools are sure to take. What changed: https://github.com/onnx/onnx/blob/main/docs/Changelog.md, "Version 18".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hf_qat.errors import ExportError
from hf_qat.export.onnx_graph import (
    DEFAULT_DOMAINS,
    OnnxGraph,
    get_attribute,
    opset_of,
    replace_items,
    subgraphs,
    take_attribute,
    with_shapes,
)


#: Opsets that a file can be asked to have.
SUPPORTED_OPSETS = (17, 18, 21)

#: The opset in which `QuantizeLinear` and `DequantizeLinear` learned int16 and uint16.
OPSET_OF_16_BITS = 21

#: Gives the nodes of opset 17 that take the place of one of opset 18; may change and return the node itself.
Rule = Callable[[NodeProto, OnnxGraph], Sequence[NodeProto]]

RULES: dict[str, Rule] = {}


def lowering(*operators: str) -> Callable[[Rule], Rule]:
    """Register the rule that takes these operators from opset 18 to 17."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def lower_opset(model: ModelProto, version: int) -> ModelProto:
    """The same model at opset `version`, with the oldest IR version that this opset allows.

    Args:
        model: at opset `version`, or at 18 for `version` 17; is left as it is.
        version: 17, 18 or 21.

    Raises:
        ExportError: an operator (named, with the lowest opset that has it) or the model's opset cannot be lowered.
    """
    if version not in SUPPORTED_OPSETS:
        raise ExportError(f"opset {version} is not supported: choose one of {', '.join(map(str, SUPPORTED_OPSETS))}.")
    current = opset_of(model)
    if current != version and (current, version) != (18, 17):
        raise ExportError(
            f"the model is at opset {current} and cannot be brought to {version}: export it at {version}, or at 18 to "
            "have it lowered to 17."
        )
    lowered = with_shapes(model)
    if version < OPSET_OF_16_BITS:
        _refuse_16_bits(lowered.graph, OnnxGraph(lowered.graph))
    if current != version:
        _lower(lowered.graph, None)
        for function in lowered.functions:
            _lower(function, None)
            _set_opset(function.opset_import, version)
        _set_opset(lowered.opset_import, version)
    lowered.ir_version = helper.find_min_ir_version_for(lowered.opset_import, ignore_unknown=True)
    return lowered


def _set_opset(imports: Iterable[onnx.OperatorSetIdProto], version: int) -> None:
    for entry in imports:
        if entry.domain in DEFAULT_DOMAINS:
            entry.version = version


def _lower(body: GraphProto | FunctionProto, outer: OnnxGraph | None) -> None:
    """Rewrite the nodes of a graph or function, and of the graphs inside them, in place."""
    onnx_graph = OnnxGraph(body, outer)
    nodes: list[NodeProto] = []
    for node in body.node:
        for graph in subgraphs(node):
            _lower(graph, onnx_graph)
        nodes += _lower_node(node, onnx_graph)
    replace_items(body.node, nodes)


def _lower_node(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    if node.domain not in DEFAULT_DOMAINS:
        return (node,)
    try:
        since = onnx.defs.get_schema(node.op_type, 18, "").since_version
    except onnx.defs.SchemaError as error:
        raise ExportError(f"{_describe(node)} is no operator of ONNX opset 18.") from error
    if since <= 17:
        return (node,)
    if node.op_type not in RULES:
        raise _cannot(node, "opset 17 has nothing that computes the same")
    copy = NodeProto()
    copy.CopyFrom(node)
    return RULES[node.op_type](copy, onnx_graph)


def _describe(node: NodeProto) -> str:
    return f"{node.op_type} (node {node.name!r}, which computes {', '.join(map(repr, node.output))})"


def _cannot(node: NodeProto, reason: str, lowest: int = 18) -> ExportError:
    return ExportError(
        f"{_describe(node)} cannot be written below opset {lowest}: {reason}. Export with opset_version={lowest}, or "
        "change the model."
    )


def _refuse_16_bits(graph: GraphProto, onnx_graph: OnnxGraph) -> None:
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            if onnx_graph.element_type(node.input[2]) in (TensorProto.INT16, TensorProto.UINT16):
                raise _cannot(node, "its codes have 16 bits", lowest=OPSET_OF_16_BITS)


def _optional_constant(node: NodeProto, position: int, name: str, onnx_graph: OnnxGraph) -> list[int] | None:
    """A constant integer input as a list; `None` where the node has no such input."""
    if len(node.input) <= position or not node.input[position]:
        return None
    value = onnx_graph.constant(node.input[position])
    if value is None:
        raise _cannot(node, f"its {name} are computed at run time")
    return [int(item) for item in np.atleast_1d(value)]


def _drop_default(node: NodeProto, attribute: str, *defaults: object) -> None:
    """Remove an attribute that opset 17 does not know; it must say what opset 17 does anyway."""
    value = take_attribute(node, attribute)
    if value is not None and value not in defaults:
        shown = value.decode() if isinstance(value, bytes) else value
        raise _cannot(node, f"opset 17 has no {attribute}={shown}")


def _constant_node(values: Sequence[int], name: str) -> NodeProto:
    tensor = numpy_helper.from_array(np.asarray(values, dtype=np.int64), name)
    return helper.make_node("Constant", [], [name], name=name, value=tensor)


def _rank(node: NodeProto, onnx_graph: OnnxGraph) -> int:
    shape = onnx_graph.shape(node.input[0])
    if shape is None:
        raise _cannot(node, "the rank of its input is unknown")
    return len(shape)


@lowering(
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)
def _reduce(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """`axes` goes from an input to an attribute; no axes mean all of them, or none if `noop_with_empty_axes`."""
    axes = _optional_constant(node, 1, "axes", onnx_graph)
    noop = take_attribute(node, "noop_with_empty_axes")
    del node.input[1:]
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))
    elif noop:
        return (helper.make_node("Identity", node.input, node.output, name=node.name),)
    return (node,)


@lowering("Resize")
def _resize(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """The three new attributes go, where they say what opset 17 does anyway."""
    _drop_default(node, "antialias", 0)
    _drop_default(node, "keep_aspect_ratio_policy", b"stretch")
    axes: Any = take_attribute(node, "axes")
    if axes is not None:
        rank = _rank(node, onnx_graph)
        if [axis % rank for axis in axes] != list(range(rank)):
            raise _cannot(node, f"it resizes axes {list(axes)} only")
    return (node,)


@lowering("Split")
def _split(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """`num_outputs` goes: equal parts are opset 17's default, others are written as sizes, the last one smaller."""
    parts: Any = take_attribute(node, "num_outputs")
    if parts is None or (len(node.input) > 1 and node.input[1]):
        return (node,)
    shape = onnx_graph.shape(node.input[0])
    axis: Any = get_attribute(node, "axis") or 0
    size = None if shape is None else shape[axis]
    if size is None:
        raise _cannot(node, f"the size of its input along axis {axis} is unknown")
    if size % parts == 0:
        return (node,)
    part = -(-size // parts)
    sizes = onnx_graph.fresh(f"{node.output[0]}_sizes")
    del node.input[1:]
    node.input.append(sizes)
    return _constant_node([part] * (parts - 1) + [size - part * (parts - 1)], sizes), node


@lowering("Pad")
def _pad(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """The input `axes` goes; `pads` then lists all axes: first the sizes before, then the sizes after."""
    axes = _optional_constant(node, 3, "axes", onnx_graph)
    del node.input[3:]
    if axes is None:
        return (node,)
    rank = _rank(node, onnx_graph)
    pads = _optional_constant(node, 1, "pads", onnx_graph) or []
    everywhere = np.zeros((2, rank), dtype=np.int64)
    everywhere[:, [axis % rank for axis in axes]] = np.reshape(pads, (2, len(axes)))
    node.input[1] = onnx_graph.fresh(f"{node.output[0]}_pads")
    return _constant_node([int(pad) for pad in everywhere.ravel()], node.input[1]), node


@lowering("LpPool")
def _lp_pool(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """The two new attributes go, where they say what opset 17 does anyway."""
    _drop_default(node, "ceil_mode", 0)
    kernel: Any = get_attribute(node, "kernel_shape")
    _drop_default(node, "dilations", [1] * len(kernel))
    return (node,)


@lowering("ScatterElements", "ScatterND")
def _scatter(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """Opset 18 only added two reductions."""
    reduction: Any = get_attribute(node, "reduction") or b"none"
    if reduction in (b"max", b"min"):
        raise _cannot(node, f"opset 17 has no reduction={reduction.decode()}")
    return (node,)


@lowering("Mish")
def _mish(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """x * tanh(softplus(x)): Misra 2019."""
    softplus = onnx_graph.fresh(f"{node.output[0]}_softplus")
    tanh = onnx_graph.fresh(f"{node.output[0]}_tanh")
    return (
        helper.make_node("Softplus", [node.input[0]], [softplus], name=f"{node.name}_softplus"),
        helper.make_node("Tanh", [softplus], [tanh], name=f"{node.name}_tanh"),
        helper.make_node("Mul", [node.input[0], tanh], node.output, name=node.name),
    )


@lowering("GroupNormalization")
def _group_normalization(node: NodeProto, onnx_graph: OnnxGraph) -> Sequence[NodeProto]:
    """An instance normalization with each group as one channel; scale and bias are per group at opset 18."""
    groups: Any = get_attribute(node, "num_groups")
    epsilon: Any = get_attribute(node, "epsilon")
    x, scale, bias = node.input
    folded, normalized, by_group, shape = (
        onnx_graph.fresh(f"{node.output[0]}_{part}") for part in ("folded", "normalized", "by_group", "shape")
    )
    return (
        _constant_node([0, groups, -1], by_group),
        helper.make_node("Shape", [x], [shape], name=f"{node.name}_shape"),
        helper.make_node("Reshape", [x, by_group], [folded], name=f"{node.name}_fold"),
        helper.make_node(
            "InstanceNormalization",
            [folded, scale, bias],
            [normalized],
            name=node.name,
            epsilon=1e-5 if epsilon is None else epsilon,
        ),
        helper.make_node("Reshape", [normalized, shape], node.output, name=f"{node.name}_unfold"),
    )
