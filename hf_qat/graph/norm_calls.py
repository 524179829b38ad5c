"""Which nodes of a captured graph are a batch norm module's own call, and not something else done with its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from hf_qat.graph.capture.batch_norm_names import COUNTER
from hf_qat.graph.capture.modes import modes_kept
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.nodes import fetch
from hf_qat.graph.plan import join_path


aten = torch.ops.aten

#: Tensors of a batch norm, at positions 1 to 4 of `batch_norm`.
TENSORS = ("weight", "bias", "running_mean", "running_var")


def norm_path(captured: CapturedModule, way: CapturedGraph, node: fx.Node) -> str | None:
    """Path of the module that a `batch_norm` node computes for; `None` where it is no module's own call.

    `F.batch_norm(x, bn.running_mean, bn.running_var, other_weight, …)` is none: its tensors, epsilon, momentum and
    mode are those of the node, whatever the module says.

    Args:
        captured: the child that has the module.
        way: the graph that `node` is in.
        node: any.
    """
    if node.target is not aten.batch_norm.default:
        return None
    _, *tensors, training, momentum, eps, _ = node.args
    mean: Any = tensors[2]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return None
    path = str(mean.target).rpartition(".")[0]
    module = captured.get_submodule(path)
    own = all(is_own(module, path, name, value) for name, value in zip(TENSORS, tensors, strict=True))
    own_momentum = getattr(module, "momentum", momentum) or 0.0  # none: see `averages_left_alone`
    same = own and getattr(module, "eps", None) == eps and own_momentum == momentum
    return path if same and training == _normalises_by_batch(module, way) else None


def is_own(module: nn.Module, path: str, name: str, value: Any) -> bool:
    """Whether `value`, an argument of a node, is the tensor of that name of the module at `path`, or both are none."""
    own = getattr(module, name, None)
    if value is None or own is None:
        return value is own
    return isinstance(value, fx.Node) and value.target == join_path(path, name)


def _normalises_by_batch(module: nn.Module, way: CapturedGraph) -> bool:
    """Whether the module's own forward would use batch statistics in the mode of the graph."""
    if not way.training or not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    with modes_kept(module):
        return module.train(True).training  # some stay in evaluation whatever one says


def drop_counting(captured: CapturedModule, graph: fx.Graph, path: str) -> None:
    """Let the graph count one batch less for the norm at `path`, in place: the layer called instead counts it."""
    counter = join_path(path, COUNTER)
    if not isinstance(getattr(fetch(captured, path) if path else captured, COUNTER, None), torch.Tensor):
        return
    for node in reversed(list(graph.nodes)):
        if node.target is aten.add_.Tensor and not node.users and _memory(node).target == counter:
            graph.erase_node(node)
            return


def _memory(node: Any) -> fx.Node:
    """What a chain of additions in place adds to."""
    while node.target is aten.add_.Tensor:
        node = node.args[0]
    memory: fx.Node = node
    return memory
