"""Batch norms by their own name again: torch's functionalization splits each into an operation and its writes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx


aten = torch.ops.aten

#: In evaluation: (x, weight, bias, mean, variance, momentum, eps). In training: a flag comes before the momentum.
EVALUATION = aten._native_batch_norm_legit_no_training.default
TRAINING = aten._native_batch_norm_legit_functional.default

#: Name of the buffer that counts batches.
COUNTER = "num_batches_tracked"


def restore_batch_norms(graph: fx.Graph) -> None:
    """Make each split batch norm one `batch_norm` that writes its running statistics itself, in place."""
    for node in list(graph.nodes):
        if node.target in (EVALUATION, TRAINING):
            _restore(graph, node)
        elif node.target is aten.copy_.default:
            _count_in_place(graph, node)


def _restore(graph: fx.Graph, node: fx.Node) -> None:
    arguments: Any = node.args
    training = node.target is TRAINING
    *inputs, momentum, eps = arguments
    tensors = inputs[:-1] if training else inputs
    with graph.inserting_before(node):
        norm = graph.call_function(aten.batch_norm.default, (*tensors, training, momentum, eps, False))
    norm.meta = dict(node.meta)
    positions: dict[fx.Node, Any] = {user: user.args[1] for user in node.users}
    for user in list(node.users):
        if user.args[1] == 0:
            norm.meta["val"] = user.meta.get("val")
            user.replace_all_uses_with(norm)
        else:  # new running statistics, which are copied into the buffers
            for copy in list(user.users):
                if copy.target is aten.copy_.default:
                    graph.erase_node(copy)
            if user.users:  # a norm that is called again goes on from there
                user.replace_all_uses_with(arguments[positions[user]])
        graph.erase_node(user)
    graph.erase_node(node)


def _count_in_place(graph: fx.Graph, copy: fx.Node) -> None:
    """`counter.copy_(counter + 1)` is what became of `counter.add_(1)`; a norm that is called twice adds 1 twice."""
    counter, value = cast("tuple[Any, ...]", copy.args[:2])
    sums: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.target is aten.add.Tensor and value.args[1] == 1:
        sums.append(value)
        value = value.args[0]
    counts = value is counter and str(getattr(counter, "target", "")).endswith(COUNTER)
    if not counts or copy.users or any(len(total.users) != 1 for total in sums):
        return
    for _ in sums:
        with graph.inserting_before(copy):
            value = graph.call_function(aten.add_.Tensor, (value, 1))
        value.meta = dict(copy.meta)
    for node in (copy, *sums):
        graph.erase_node(node)
