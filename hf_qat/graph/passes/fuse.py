"""Fusion: a convolution or linear layer and the batch norm after it become one `QATLayer` call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from hf_qat.config.targets import Restrictions
from hf_qat.errors import CaptureError
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.layer_calls import layer_calls
from hf_qat.graph.nodes import call_before, eliminate_dead_code, replace_node
from hf_qat.graph.norm_calls import drop_counting, norm_path
from hf_qat.graph.plan import ModulePlan, Plan
from hf_qat.graph.rules import TRANSPOSED, weight_axis
from hf_qat.quantization.freezable_norm import install_freezable_norm
from hf_qat.quantization.layers import QATLayer, install_layer, plain
from hf_qat.quantization.standalone_norm import QATStandaloneBatchNorm, install_standalone_norm


aten = torch.ops.aten

#: Plans of the modules of one captured child, by their paths below it.
ChildPlan = Mapping[str, ModulePlan]


@dataclass(frozen=True)
class Fusion:
    """One layer of a captured child.

    Attributes:
        path: of the layer, below the child.
        call: its first call.
        norm: path of the batch norm that is folded into it; `None` where none is.
    """

    path: str
    call: fx.Node
    norm: str | None


def fuse(captured: Mapping[str, CapturedModule], plan: Plan) -> None:
    """Replace layer calls, and the batch norms that follow them, in the graphs of `captured`, in place."""
    shared = _called_by_several(captured)
    for child, module in captured.items():
        child_plan = plan.below(child)
        fusions = find_fusions(module, child_plan, shared)
        for fusion in fusions:
            _install(module, fusion, child_plan, plan.target.restrictions)
        norms = standalone_norms(module, fusions)
        for way in module.graphs:
            call_layers(module, way, fusions)
            call_batch_norms(module, way, norms, child_plan)
            eliminate_dead_code(way.graph)


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
    firsts: dict[str, fx.Node] = {}
    for node, path in layer_calls(captured, captured.graph).items():
        if not plan[path].excluded:
            firsts.setdefault(path, node)
    followers, apart = _followers(captured)
    fusions = []
    for path, first in firsts.items():
        norms = followers[path]  # its calls may end in different batch norms
        norm = next(iter(norms)) if len(norms) == 1 else None
        foldable = norm not in apart and captured.get_submodule(path) not in shared
        fusions.append(Fusion(path, first, norm if foldable else None))
    return fusions


def _followers(captured: CapturedModule) -> tuple[dict[str, set[str | None]], set[str | None]]:
    """Layer → paths of the batch norms that its calls end in, in all graphs; and the norms that end no such call."""
    followers: dict[str, set[str | None]] = {}
    apart: set[str | None] = set()
    for way in captured.graphs:
        followed_by = {}
        for node, path in layer_calls(captured, way.graph).items():
            followed_by[node] = _foldable_norm(captured, way, node)
            norm = followed_by[node]
            followers.setdefault(path, set()).add(None if norm is None else norm_path(captured, way, norm))
        others = [node for node in way.graph.nodes if node not in followed_by.values()]
        apart |= {norm_path(captured, way, node) for node in others}
    return followers, apart - {None}


def standalone_norms(captured: CapturedModule, fusions: Collection[Fusion]) -> set[str]:
    """Paths of the batch norms that are folded into no layer, and are called as themselves in every graph."""
    folded = {fusion.norm for fusion in fusions}
    called = [[(node, norm_path(captured, way, node)) for node in way.graph.nodes] for way in captured.graphs]
    by_other_means = {
        str(node.args[3].target).rpartition(".")[0]
        for pairs in called
        for node, path in pairs
        if node.target is aten.batch_norm.default and path is None and isinstance(node.args[3], fx.Node)
    }
    in_evaluation = {path for _, path in called[0] if path is not None}
    return in_evaluation - folded - by_other_means


def _foldable_norm(captured: CapturedModule, way: CapturedGraph, node: fx.Node) -> fx.Node | None:
    """The batch norm node that alone consumes `node`, if its statistics can be folded into the weight."""
    users = list(node.users)
    if len(users) != 1 or weight_axis(node) is None:
        return None
    if node.target is aten.linear.default and node.meta["val"].dim() != 2:
        return None  # its channels are the last axis, those of the batch norm the second
    return None if norm_path(captured, way, users[0]) is None else users[0]


def _install(captured: CapturedModule, fusion: Fusion, plan: ChildPlan, restrictions: Restrictions) -> None:
    """Make a layer fake-quantize its weight, in place, unless another child has done so."""
    layer, node = captured.get_submodule(fusion.path), fusion.call
    if isinstance(layer, QATLayer):
        return
    weight: Any = layer.weight
    if not weight.numel():
        raise CaptureError(
            f"the weight of {fusion.path}, {type(layer).__name__}, is of shape {tuple(weight.shape)} and has no "
            "values, hence no scale: take the layer out of the model, or exclude it."
        )
    axis = weight_axis(node)
    spec = plan[fusion.path].weight_spec(axis)
    if node.target in TRANSPOSED and restrictions.per_tensor_transposed:
        spec = replace(spec, axis=None)
    operation: Any = node.target
    options = {name: value for name, value in node.kwargs.items() if name != "bias"}
    install_layer(
        layer,
        partial(operation, **options) if options else operation,
        node.args[3:],
        spec,
        1 if node.target in TRANSPOSED else 0,
        None if fusion.norm is None else captured.get_submodule(fusion.norm),
        keep_forward=not fusion.path,
    )


def is_transposed(layer: QATLayer) -> bool:
    """Whether a layer is a transposed convolution."""
    operation: Any = layer.operation
    return (operation.func if isinstance(operation, partial) else operation) in TRANSPOSED


def call_layers(captured: CapturedModule, way: CapturedGraph, fusions: Collection[Fusion]) -> None:
    """Replace each layer, with the batch norm that is folded into it, by one call of its module, in place.

    Args:
        captured: the child whose modules the graph calls.
        way: its graph is changed.
        fusions: what was decided; a layer that is not among them stays what it is.
    """
    decided = {fusion.path: fusion for fusion in fusions}
    for node, path in layer_calls(captured, way.graph).items():
        if path not in decided:
            continue
        norm = None if decided[path].norm is None else _foldable_norm(captured, way, node)
        last = node if norm is None else norm
        layer: Any = captured.get_submodule(path)
        options = {} if plain(node.args[3:]) == layer.operation_args else {"arguments": plain(node.args[3:])}
        last.replace_all_uses_with(call_before(node, path, node.args[0], last.meta, options))
        if norm is not None:
            drop_counting(captured, way.graph, str(decided[path].norm))
            way.graph.erase_node(norm)
        way.graph.erase_node(node)


def call_batch_norms(captured: CapturedModule, way: CapturedGraph, norms: Collection[str], plan: ChildPlan) -> None:
    """Let batch norms that are folded into no layer be layers of their own; an excluded one stays what it is.

    Args:
        captured: the child whose modules the graph calls; a batch norm of it gets the part that it lacks.
        way: its graph is changed, in place.
        norms: their paths.
        plan: of the modules of the child.
    """
    for node in list(way.graph.nodes):
        path = norm_path(captured, way, node)
        if path is None or path not in norms:
            continue
        module = captured.get_submodule(path)
        drop_counting(captured, way.graph, path)
        if plan[path].excluded:
            install_freezable_norm(module)
        elif not isinstance(module, QATStandaloneBatchNorm):
            dims = node.meta["val"].dim()
            install_standalone_norm(module, plan[path].weight_spec(0), dims, keep_forward=not path)
        replace_node(node, call_before(node, path, node.args[0], node.meta))
