"""Fusion: a convolution or linear layer and the batch norm after it become one `QATLayer` call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.layer_calls import layer_calls
from hf_qat.graph.nodes import call_before, eliminate_dead_code, replace_node
from hf_qat.graph.plan import ModulePlan, Plan
from hf_qat.quantization.layers import QATLayer, install_freezable_norm, install_layer
from hf_qat.quantization.standalone_norm import QATStandaloneBatchNorm, install_standalone_norm


aten = torch.ops.aten

TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}

#: Plans of the modules of one captured child, by their paths below it.
ChildPlan = Mapping[str, ModulePlan]


@dataclass(frozen=True)
class Fusion:
    """One layer of a captured child.

    Attributes:
        path: of the layer, below the child.
        call: its first call.
        norm: the batch norm that is folded into it; `None` where none is.
    """

    path: str
    call: fx.Node
    norm: nn.Module | None


def fuse(captured: Mapping[str, CapturedModule], plan: Plan) -> None:
    """Replace layer calls, and the batch norms that follow them, in the graphs of `captured`, in place."""
    shared = _called_by_several(captured)
    for child, module in captured.items():
        child_plan = plan.below(child)
        fusions = find_fusions(module, child_plan, shared)
        for fusion in fusions:
            _install(module, fusion, child_plan)
        call_layers(module, module.graph, fusions)
        call_batch_norms(module, module.graph, child_plan)
        eliminate_dead_code(module.graph)


def _called_by_several(captured: Mapping[str, CapturedModule]) -> set[nn.Module]:
    """Layers that the graphs of several children call: a batch norm that follows in one does not follow in another."""
    callers: dict[nn.Module, set[str]] = {}
    for child, module in captured.items():
        for path in layer_calls(module, module.graph).values():
            callers.setdefault(module.get_submodule(path), set()).add(child)
    return {layer for layer, children in callers.items() if len(children) > 1}


def find_fusions(captured: CapturedModule, plan: ChildPlan, shared: Collection[nn.Module]) -> list[Fusion]:
    """Decide which layers there are and what is folded into each, in the order of their first call; changes nothing.

    Args:
        captured: one child.
        plan: of its modules.
        shared: layers that other graphs call, too, and that nothing is folded into.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node, path in layer_calls(captured, captured.graph).items():
        if not plan[path].excluded:
            calls.setdefault(path, []).append(node)
    followed_by = {node: _foldable_norm(node) for nodes in calls.values() for node in nodes}
    apart = _called_apart(captured, followed_by.values())
    fusions = []
    for path, nodes in calls.items():
        norms = {_norm_module(captured, followed_by[node]) for node in nodes}
        norm = norms.pop() if len(norms) == 1 else None  # its calls may end in different batch norms
        foldable = norm not in apart and captured.get_submodule(path) not in shared
        fusions.append(Fusion(path, nodes[0], norm if foldable else None))
    return fusions


def _called_apart(captured: CapturedModule, foldable: Collection[fx.Node | None]) -> set[nn.Module]:
    """Batch norms with a call that is not among the foldable ones."""
    others = [n for n in captured.graph.nodes if n.target is aten.batch_norm.default and n not in foldable]
    modules = (_norm_module(captured, norm) for norm in others)
    return {module for module in modules if module is not None}


def _foldable_norm(node: fx.Node) -> fx.Node | None:
    """The batch norm node that alone consumes `node`, if its statistics can be folded into the weight."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.batch_norm.default or _grouped_transposed(node):
        return None
    if node.target is aten.linear.default and node.meta["val"].dim() != 2:
        return None  # its channels are the last axis, those of the batch norm the second
    return None if _norm_path(users[0]) is None else users[0]


def _norm_module(captured: CapturedModule, norm: fx.Node | None) -> nn.Module | None:
    """The module whose running statistics a batch norm node uses."""
    path = None if norm is None else _norm_path(norm)
    return None if path is None else captured.get_submodule(path)


def _norm_path(norm: fx.Node) -> str | None:
    """Path of that module; `None` where the statistics are no module's own."""
    statistics = norm.args[3]
    if not isinstance(statistics, fx.Node) or statistics.op != "get_attr":
        return None
    return str(statistics.target).rpartition(".")[0]


def _install(captured: CapturedModule, fusion: Fusion, plan: ChildPlan) -> None:
    """Make a layer fake-quantize its weight, in place, unless another child has done so."""
    layer, node = captured.get_submodule(fusion.path), fusion.call
    if isinstance(layer, QATLayer):
        return
    axis = 1 if node.target in TRANSPOSED else 0  # a transposed convolution's weight is (C_in, C_out / groups, …)
    spec = plan[fusion.path].weight_spec(axis)
    if _grouped_transposed(node):
        spec = replace(spec, axis=None)  # its output channels are no slices of the weight
    operation: Any = node.target
    options = {name: value for name, value in node.kwargs.items() if name != "bias"}
    install_layer(
        layer,
        partial(operation, **options) if options else operation,
        node.args[3:],
        spec,
        axis,
        fusion.norm,
        keep_forward=not fusion.path,
    )


def _grouped_transposed(node: fx.Node) -> bool:
    """A grouped transposed convolution has several output channels per slice of axis 1."""
    if node.target not in TRANSPOSED:
        return False
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return bool(groups != 1)


def call_layers(captured: CapturedModule, graph: fx.Graph, fusions: Collection[Fusion]) -> None:
    """Replace each layer, with the batch norm that is folded into it, by one call of its module, in place.

    Args:
        captured: the child whose modules `graph` calls.
        graph: is changed.
        fusions: what was decided.
    """
    norms = {fusion.path: fusion.norm for fusion in fusions}
    for node, path in layer_calls(captured, graph).items():
        if path not in norms:
            continue
        norm = None if norms[path] is None else _foldable_norm(node)
        last = node if norm is None else norm
        last.replace_all_uses_with(call_before(node, path, node.args[0], last.meta))
        if norm is not None:
            graph.erase_node(norm)
        graph.erase_node(node)


def call_batch_norms(captured: CapturedModule, graph: fx.Graph, plan: ChildPlan) -> None:
    """Let batch norms that are folded into no layer be layers of their own; an excluded one stays what it is.

    Args:
        captured: the child whose modules `graph` calls; a batch norm of it gets the part that it lacks.
        graph: is changed, in place.
        plan: of the modules of the child.
    """
    for node in list(graph.nodes):
        path = _norm_path(node) if node.target is aten.batch_norm.default else None
        if path is None:
            continue
        module = captured.get_submodule(path)
        if plan[path].excluded:
            install_freezable_norm(module)
        elif not isinstance(module, QATStandaloneBatchNorm):
            dims = node.meta["val"].dim()
            install_standalone_norm(module, plan[path].weight_spec(0), dims, keep_forward=not path)
        replace_node(node, call_before(node, path, node.args[0], node.meta))
