"""Regions of a forward that run under another setting (`no_grad`, `autocast`): the exporter keeps each as a sub-graph.

Here they become a part of the graph again, between a call that enters the region and one that leaves it. What runs
inside has no gradient, or another precision, exactly as in the model's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hf_qat.graph.nodes import fetch


GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(exported: fx.GraphModule) -> None:
    """Replace the calls of sub-graphs by what these hold, in place, at any depth."""
    while calls := [node for node in exported.graph.nodes if node.target in (GRAD, AUTOCAST)]:
        for call in calls:
            _inline(exported, call)
    for node in reversed(list(exported.graph.nodes)):
        if node.op == "get_attr" and not node.users and isinstance(fetch(exported, str(node.target)), fx.GraphModule):
            exported.graph.erase_node(node)


def has_regions(graph: fx.Graph) -> bool:
    """Whether a part of the graph runs under another setting."""
    return any(node.target in (GRAD, AUTOCAST) for node in graph.nodes)


def _inline(exported: fx.GraphModule, call: fx.Node) -> None:
    position = 1 if call.target is GRAD else 4
    body = fetch(exported, str(call.args[position].target))  # type: ignore[union-attr]
    values: dict[fx.Node, Any] = {}
    operands = iter(call.args[position + 1 :])
    with exported.graph.inserting_before(call):
        entered = _enter(exported.graph, call)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(operands)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "get_attr":
                # Constants and bodies of inner regions belong to the sub-graph: they move up under a free name.
                name = f"{call.args[position].target}_{node.target}"  # type: ignore[union-attr]
                setattr(exported, name, fetch(body, str(node.target)))
                values[node] = exported.graph.get_attr(name)
                values[node].meta = dict(node.meta)
            else:
                values[node] = exported.graph.node_copy(node, values.__getitem__)
        _leave(exported.graph, call, entered)
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        exported.graph.erase_node(user)
    exported.graph.erase_node(call)


def _enter(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """The call that enters the region; its result is needed to leave it."""
    if call.target is GRAD:
        before = graph.call_function(torch.is_grad_enabled)
        graph.call_function(torch._C._set_grad_enabled, (call.args[0],))
        return before
    device, dtype, enabled, cache = call.args[:4]
    return graph.call_function(torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache))


def _leave(graph: fx.Graph, call: fx.Node, entered: fx.Node) -> None:
    if call.target is GRAD:
        graph.call_function(torch._C._set_grad_enabled, (entered,))
    else:
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
