"""What `torch.onnx.export` leaves behind, put in order: small passes over the model, in one visible list.

Every pass works in place and changes no number that the model computes. Layer norm needs none: the exporter writes
one `LayerNormalization`. GELU stays the sequence around `Erf` that opset 17 has for it, which TI's compiler knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from hf_qat.export.folding import fold_constants
from hf_qat.export.naming import name_after_modules
from hf_qat.export.onnx_graph import (
    DEFAULT_DOMAINS,
    OnnxGraph,
    Shape,
    constant_value,
    get_attribute,
    names_read,
    nodes_behind,
    replace_items,
    replace_values,
    take_attribute,
    with_shapes,
)
from hf_qat.export.pairs import repeat_pairs
from hf_qat.export.pooling import spell_out_windows
from hf_qat.export.selection import select_directly
from hf_qat.export.weight_codes import split_quantized_weights, transpose_quantized_weights
from hf_qat.export.zero_points import separate_elementwise_constants, separate_zero_points


def clean_up(model: ModelProto) -> ModelProto:
    """Apply all of `PASSES` in order, in place; returns the same object."""
    for improve in PASSES:
        improve(model)
    return model


def set_metadata(model: ModelProto, entries: Mapping[str, str]) -> None:
    """Write `entries` into the model's `metadata_props`; those of other keys stay."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**kept, **entries})


def drop_exporter_notes(model: ModelProto) -> None:
    """Remove what the exporter notes on every node and value: stack traces with local paths, more bytes than codes."""
    bodies = (model.graph, *model.functions)
    for body in bodies:
        items = [*body.node, *body.value_info, body]
        if isinstance(body, GraphProto):
            items += [*body.initializer, *body.input, *body.output]
        for item in items:
            item.ClearField("doc_string")
            item.ClearField("metadata_props")


def move_constants_to_initializers(model: ModelProto) -> None:
    """`Constant` nodes become initializers, which is where runtimes look for weights."""
    graph = model.graph
    others = []
    for node in graph.node:
        value = constant_value(node)
        if value is None:
            others.append(node)
        else:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
    replace_items(graph.node, others)


def drop_axes_of_single_scales(model: ModelProto) -> None:
    """Remove the axis of pairs with one scale, which runs along none: onnxscript notes its default value."""
    onnx_graph = OnnxGraph(model.graph)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and onnx_graph.shape(node.input[1]) == ():
            take_attribute(node, "axis")


def quantize_constants(model: ModelProto) -> None:
    """`QuantizeLinear` of a constant, such as position embeddings, becomes the codes themselves."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    nodes = []
    for node in graph.node:
        x, scale, zero_point = (onnx_graph.constant(name) for name in [*node.input, "", "", ""][:3])
        if node.op_type == "QuantizeLinear" and x is not None and scale is not None and zero_point is not None:
            limits = np.iinfo(zero_point.dtype)
            codes = np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max).astype(zero_point.dtype)
            graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
        else:
            nodes.append(node)
    replace_items(graph.node, nodes)


def drop_additions_of_zero(model: ModelProto) -> None:
    """Remove `Add` of a constant of zeros: the attention mask of a vision model, which masks nothing."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    outputs = {output.name for output in graph.output}
    same: dict[str, str] = {}
    for node in graph.node:
        x = _other_than_zeros(node, onnx_graph)
        if x is not None and node.output[0] not in outputs:
            same[node.output[0]] = same.get(x, x)
    replace_items(graph.node, [node for node in graph.node if node.output[0] not in same])
    replace_values(graph, same)


def _other_than_zeros(node: NodeProto, onnx_graph: OnnxGraph) -> str | None:
    """The summand that the sum is equal to, in value and shape."""
    if node.op_type != "Add":
        return None
    for x, zeros in (tuple(node.input), tuple(reversed(node.input))):
        values, shape = onnx_graph.constant(zeros), onnx_graph.shape(x)
        if values is not None and shape is not None and not values.any() and _fits(values.shape, shape):
            return str(x)
    return None


def _fits(shape: tuple[int, ...], into: Shape) -> bool:
    """Whether broadcasting a tensor of `shape` to one of shape `into` leaves the latter as it is."""
    return len(shape) <= len(into) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(into), strict=False)
    )


def pool_globally(model: ModelProto) -> None:
    """`ReduceMean` over height and width becomes `GlobalAveragePool`, and a `Flatten` where the axes are dropped."""
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _global_pool(node, onnx_graph) if _is_global_mean(node, onnx_graph) else [node]
    replace_items(graph.node, nodes)


def _global_pool(mean: NodeProto, onnx_graph: OnnxGraph) -> list[NodeProto]:
    if get_attribute(mean, "keepdims") == 0:
        pooled = onnx_graph.fresh(f"{mean.output[0]}_pooled")
        nodes = [
            helper.make_node("GlobalAveragePool", mean.input[:1], [pooled]),
            helper.make_node("Flatten", [pooled], mean.output, axis=1),
        ]
    else:
        nodes = [helper.make_node("GlobalAveragePool", mean.input[:1], mean.output)]
    for node in nodes:
        node.metadata_props.extend(mean.metadata_props)
    return nodes


def _is_global_mean(node: NodeProto, onnx_graph: OnnxGraph) -> bool:
    """Whether the node averages (N, C, H, W) over the last two axes; they are an attribute up to opset 17."""
    if node.op_type != "ReduceMean" or node.domain not in DEFAULT_DOMAINS:
        return False
    shape = onnx_graph.shape(node.input[0])
    axes: Any = onnx_graph.constant(node.input[1]) if len(node.input) > 1 else get_attribute(node, "axes")
    return shape is not None and len(shape) == 4 and axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}


def drop_dead_nodes(model: ModelProto) -> None:
    """Remove nodes whose results nobody reads."""
    graph = model.graph
    replace_items(graph.node, nodes_behind(graph.node, [output.name for output in graph.output]))


def drop_unused_values(model: ModelProto) -> None:
    """Remove initializers that nobody reads, and the shapes noted for values that are gone."""
    graph = model.graph
    read = {*names_read(graph.node), *(output.name for output in graph.output)}
    made = {name for node in graph.node for name in node.output}
    replace_items(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
    replace_items(graph.value_info, [info for info in graph.value_info if info.name in made])


def drop_unused_opsets(model: ModelProto) -> None:
    """Remove operator sets that no node belongs to, but for the default one."""
    nodes = [node for body in (model.graph, *model.functions) for node in body.node]
    used = {node.domain for node in nodes} | {function.domain for function in model.functions}
    replace_items(
        model.opset_import, [e for e in model.opset_import if e.domain in DEFAULT_DOMAINS or e.domain in used]
    )


def infer_shapes(model: ModelProto) -> None:
    """Note the shape of every value, which TI's compiler asks for."""
    model.CopyFrom(with_shapes(model))


#: In the order in which they run: sums and pooling need shapes; names count what is left, and need the notes; pairs
#: that are repeated are named after what they follow.
PASSES: tuple[Callable[[ModelProto], None], ...] = (
    move_constants_to_initializers,
    drop_axes_of_single_scales,
    split_quantized_weights,
    transpose_quantized_weights,
    quantize_constants,
    fold_constants,
    spell_out_windows,
    select_directly,
    infer_shapes,
    drop_additions_of_zero,
    pool_globally,
    drop_dead_nodes,
    drop_unused_values,
    drop_unused_opsets,
    name_after_modules,
    drop_exporter_notes,
    repeat_pairs,
    separate_elementwise_constants,
    separate_zero_points,
    infer_shapes,
)
