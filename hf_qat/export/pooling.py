"""Pooling whose last window reaches over the edge (`ceil_mode`), as windows that every runtime lays alike.

ONNX counts such windows otherwise than PyTorch, which never lets one start in the padding at the end, and ONNX
Runtime's integer `AveragePool` divides by what lies outside, too.
https://pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS, OnnxGraph, get_attribute, replace_items, take_attribute


@dataclass(frozen=True)
class Windows:
    """Padding along each axis: what the model pads, and what the last window needs beyond it.

    Attributes:
        before, after: the model's own padding.
        beyond: how far the last window reaches over that padding; 0 where it does not.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    beyond: tuple[int, ...]

    @property
    def pads(self) -> list[int]:
        """All of it, as ONNX's `pads`."""
        return [*self.before, *(own + more for own, more in zip(self.after, self.beyond, strict=True))]


def spell_out_windows(model: ModelProto) -> None:
    """`ceil_mode` becomes padding at the end, in place, for `MaxPool` and `AveragePool` of known size.

    What an average counts stays: the padding that the model counts is padded before the pool, and the padding of the
    pool is not counted.
    """
    graph = model.graph
    onnx_graph = OnnxGraph(graph)
    nodes: list[NodeProto] = []
    for node in graph.node:
        windows = _windows(node, onnx_graph)
        if windows is not None:
            nodes += _without_ceil_mode(node, windows, graph, onnx_graph)
        nodes.append(node)
    replace_items(graph.node, nodes)


def _windows(node: NodeProto, onnx_graph: OnnxGraph) -> Windows | None:
    """Those of a pool with `ceil_mode`; `None` for every other node."""
    if node.op_type not in ("MaxPool", "AveragePool") or node.domain not in DEFAULT_DOMAINS:
        return None
    size, out = onnx_graph.shape(node.input[0]), onnx_graph.shape(node.output[0])
    if get_attribute(node, "ceil_mode") != 1 or size is None or out is None or None in (*size[2:], *out[2:]):
        return None
    axes = len(size) - 2
    kernel = _integers(node, "kernel_shape", [1] * axes)
    strides, dilations = _integers(node, "strides", [1] * axes), _integers(node, "dilations", [1] * axes)
    pads = _integers(node, "pads", [0] * 2 * axes)
    beyond = [
        max(0, ((n or 0) - 1) * stride + (k - 1) * dilation + 1 - (length or 0) - before - after)
        for length, n, k, stride, dilation, before, after in zip(
            size[2:], out[2:], kernel, strides, dilations, pads[:axes], pads[axes:], strict=True
        )
    ]
    return Windows(tuple(pads[:axes]), tuple(pads[axes:]), tuple(beyond))


def _integers(node: NodeProto, name: str, default: list[int]) -> list[int]:
    value = get_attribute(node, name)
    return [int(item) for item in value] if isinstance(value, Sequence) else default


def _without_ceil_mode(
    node: NodeProto, windows: Windows, graph: GraphProto, onnx_graph: OnnxGraph
) -> Sequence[NodeProto]:
    """Change the pool; returns what must come before it."""
    take_attribute(node, "ceil_mode")
    take_attribute(node, "pads")
    counted = node.op_type == "AveragePool" and take_attribute(node, "count_include_pad") == 1
    pads, before = windows.pads, []
    if counted and any(windows.beyond):
        if any((*windows.before, *windows.after)):
            before.append(_padded(node, windows, graph, onnx_graph))
        pads = [0] * len(windows.beyond) + list(windows.beyond)
    elif counted:
        node.attribute.append(helper.make_attribute("count_include_pad", 1))
    node.attribute.append(helper.make_attribute("pads", pads))
    return before


def _padded(node: NodeProto, windows: Windows, graph: GraphProto, onnx_graph: OnnxGraph) -> NodeProto:
    """A `Pad` with zeros before the pool, which then reads it."""
    pads = np.array([0, 0, *windows.before, 0, 0, *windows.after], np.int64)
    name, result = onnx_graph.fresh(f"{node.output[0]}_pads"), onnx_graph.fresh(f"{node.output[0]}_padded")
    graph.initializer.append(numpy_helper.from_array(pads, name))
    pad = helper.make_node("Pad", [node.input[0], name], [result], mode="constant")
    pad.metadata_props.extend(node.metadata_props)
    node.input[0] = result
    return pad
