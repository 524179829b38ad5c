"""Fusion: a convolution or linear layer and the batch norm behind it become one `QATLayer` call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from hf_qat.graph.capture.clean import MODULE_PATH, eliminate_dead_code
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.rules import Kind, rule_of
from hf_qat.quantization.layers import QATLayer, install_freezable_norm, install_layer
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.standalone_norm import QATStandaloneBatchNorm, install_standalone_norm


aten = torch.ops.aten

#: Gives the spec of a weight: (path of its layer below the captured child, channel axis) → spec.
WeightSpec = Callable[[str, int], QuantizerSpec]

TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


def layer_calls(captured: CapturedModule) -> list[tuple[fx.Node, str]]:
    """The nodes that compute with a layer's own weight and bias, in order, and the layer's path.

    A weight that the graph computes (a standardised or sliced one), or that something else computes with, too (a tied
    one), is no layer's own; `place.py` sees to it.
    """
    calls = []
    for node in captured.graph.nodes:
        if rule_of(node).kind is Kind.LAYER:
            path = _layer_path(captured, node)
            if path is not None:
                calls.append((node, path))
    own = {node for node, _ in calls}
    read = [node for node in captured.graph.nodes if node.op == "get_attr"]
    tied = {node.target for node in read if not node.users.keys() <= own}
    return [(node, path) for node, path in calls if _weight(node).target not in tied]


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def fuse(
    captured: CapturedModule,
    excluded: Callable[[str], bool],
    weight_spec: WeightSpec,
    shared: Collection[nn.Module],
) -> list[str]:
    """Replace layer calls, and batch norms that follow them, in the graph of `captured`, in place.

    Args:
        captured: its graph and submodules are changed.
        excluded: says of a path below the child whether it stays float.
        weight_spec: gives the spec of each weight.
        shared: layers that other graphs call, too; a batch norm that follows here does not follow there.

    Returns:
        Paths of the layers below the captured child, in order of first call.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node, path in layer_calls(captured):
        if not excluded(path):
            calls.setdefault(path, []).append(node)
    foldable = {node: _foldable_norm(captured, node) for nodes in calls.values() for node in nodes}
    standing_alone = _standing_alone(captured, foldable)
    for path, nodes in calls.items():
        norms = [None if norm in standing_alone else norm for norm in map(foldable.get, nodes)]
        layer = captured.get_submodule(path)
        if layer in shared or len({_norm_module(captured, norm) for norm in norms}) > 1:
            norms = [None] * len(nodes)  # its calls end in different batch norms
        if not isinstance(layer, QATLayer):
            _install(captured, path, nodes[0], norms[0], weight_spec)
        for node, norm in zip(nodes, norms, strict=True):
            _replace(captured.graph, node, norm, path)
    _install_batch_norms(captured, excluded, weight_spec)
    eliminate_dead_code(captured.graph)
    return list(calls)


def _standing_alone(captured: CapturedModule, foldable: dict[fx.Node, fx.Node | None]) -> set[fx.Node]:
    """Batch norms that could be folded here, but whose module is called somewhere else, where it cannot."""
    folded = {norm for norm in foldable.values() if norm is not None}
    others = [n for n in captured.graph.nodes if n.target is aten.batch_norm.default and n not in folded]
    modules = {_norm_module(captured, norm) for norm in others}
    return {norm for norm in folded if _norm_module(captured, norm) in modules}


def _install_batch_norms(captured: CapturedModule, excluded: Callable[[str], bool], weight_spec: WeightSpec) -> None:
    """Batch norms that no layer precedes are layers of their own; an excluded one stays what it is."""
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        module = _norm_module(captured, node)
        if module is None:
            continue
        path = str(node.args[3].target).rpartition(".")[0]
        if excluded(path):
            install_freezable_norm(module)
        elif not isinstance(module, QATStandaloneBatchNorm):
            dims = node.meta["val"].dim()
            install_standalone_norm(module, weight_spec(path, 0), dims, keep_forward=not path)
        with graph.inserting_before(node):
            # A captured child that is itself the batch norm calls its own method.
            call = graph.create_node("call_module", path or "compute", (node.args[0],), {})
        call.meta = {**node.meta, MODULE_PATH: path}
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _install(
    captured: CapturedModule, path: str, node: fx.Node, norm: fx.Node | None, weight_spec: WeightSpec
) -> None:
    axis = _channel_axis(node)
    spec = weight_spec(path, axis)
    if _grouped_transposed(node):
        spec = replace(spec, axis=None)  # its output channels are no slices of the weight
    operation: Any = node.target
    options = {name: value for name, value in node.kwargs.items() if name != "bias"}
    install_layer(
        captured.get_submodule(path),
        partial(operation, **options) if options else operation,
        node.args[3:],
        spec,
        axis,
        _norm_module(captured, norm),
        keep_forward=not path,
    )


def _layer_path(captured: CapturedModule, node: fx.Node) -> str | None:
    """Path of the module whose `weight` and `bias` the node uses; `None` if they are not one module's own."""
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or set(node.all_input_nodes[3:]):
        return None
    path, _, name = str(weight.target).rpartition(".")
    module = captured.get_submodule(path)
    if name != "weight" or isinstance(module, CapturedModule) and path:
        return None
    expected = f"{path}.bias" if path else "bias"
    own_bias = getattr(module, "bias", None)
    if bias is None:
        return path if own_bias is None else None
    return path if isinstance(bias, fx.Node) and bias.target == expected else None


def _channel_axis(node: fx.Node) -> int:
    """Output channels: axis 0 of a weight; axis 1 of a transposed convolution's (C_in, C_out / groups, …)."""
    return 1 if node.target in TRANSPOSED else 0


def _foldable_norm(captured: CapturedModule, node: fx.Node) -> fx.Node | None:
    """The batch norm node that alone consumes `node`, if its statistics can be folded into the weight."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.batch_norm.default or _grouped_transposed(node):
        return None
    if node.target is aten.linear.default and node.meta["val"].dim() != 2:
        return None  # its channels are the last axis, those of the batch norm the second
    statistics = users[0].args[3]
    if not isinstance(statistics, fx.Node) or statistics.op != "get_attr":
        return None
    return users[0]


def _grouped_transposed(node: fx.Node) -> bool:
    """A grouped transposed convolution has several output channels per slice of axis 1."""
    if node.target not in TRANSPOSED:
        return False
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return bool(groups != 1)


def _norm_module(captured: CapturedModule, norm: fx.Node | None) -> nn.Module | None:
    if norm is None or not isinstance(norm.args[3], fx.Node) or norm.args[3].op != "get_attr":
        return None
    path = str(norm.args[3].target).rpartition(".")[0]
    return captured.get_submodule(path)


def _replace(graph: fx.Graph, node: fx.Node, norm: fx.Node | None, path: str) -> None:
    last = node if norm is None else norm
    with graph.inserting_before(node):
        # A captured child that is itself the layer calls its own method.
        call: Any = graph.create_node("call_module", path or "compute", (node.args[0],), {})
    call.meta = {**last.meta, MODULE_PATH: path}
    last.replace_all_uses_with(call)
    if norm is not None:
        graph.erase_node(norm)
    graph.erase_node(node)
