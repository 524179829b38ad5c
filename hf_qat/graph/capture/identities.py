"""Drop operations that provably give back their input: attention masks that mask nothing, and padding by nothing.

transformers builds a mask out of a constant that is `True` everywhere wherever a caller gives none; adding the zeros
that come of it costs a pass over all attention scores. MobileNetV2 pads every 1x1 convolution by nothing, as a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hf_qat.graph.nodes import writes


aten = torch.ops.aten

#: Operations whose result holds nothing but values of their first argument.
VIEWS = {aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.transpose}

#: They change nothing in evaluation, nor at probability 0. Arguments: the input, the probability, the mode.
DROPOUTS = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout}

#: Reads the tensor at a `get_attr` node if it is a constant: neither a parameter nor a buffer that may change.
Constant = Callable[[fx.Node], torch.Tensor | None]


def drop_identities(graph: fx.Graph, constant: Constant) -> None:
    """Let the users of each operation that changes nothing read its input, in place; the dead code is left behind.

    Args:
        graph: nodes carry `meta["val"]`, a (fake) tensor.
        constant: the value at a `get_attr` node, `None` if it is not a constant.
    """
    uniform: dict[Any, bool | int | float] = {}
    for node in list(graph.nodes):
        value = _uniform_value(node, uniform, constant)
        if value is not None:
            uniform[node] = value
        kept = _unchanged(node, uniform)
        if kept is not None and _same_type(kept, node) and not any(map(writes, node.users)):
            node.replace_all_uses_with(kept)
            if _packet(node) in DROPOUTS:  # no dead code otherwise, as a dropout may draw random numbers
                graph.erase_node(node)


def _uniform_value(node: fx.Node, uniform: dict[Any, bool | int | float], constant: Constant) -> Any:
    """The number that every element of the node's value is known to equal, if there is one."""
    if node.op == "get_attr":
        tensor = constant(node)
        known = tensor is not None and not tensor.is_meta and tensor.numel() > 0
        if tensor is not None and known and bool((tensor == tensor.flatten()[0]).all()):
            return tensor.flatten()[0].item()
        return None
    packet = _packet(node)
    if packet in VIEWS:
        return uniform.get(node.args[0])
    if packet is aten.where and len(node.args) == 3 and node.args[0] in uniform:
        chosen = node.args[1] if uniform[node.args[0]] else node.args[2]
        return uniform.get(chosen) if isinstance(chosen, fx.Node) else chosen
    return None


def _unchanged(node: fx.Node, uniform: dict[Any, bool | int | float]) -> Any:
    """The argument that the value of `node` equals, element by element, if there is one."""
    packet, args = _packet(node), node.args
    if packet in DROPOUTS:
        return args[0] if len(args) > 2 and (not args[2] or args[1] == 0) else None
    if packet is aten.pad or packet is aten.constant_pad_nd:
        return args[0] if not any(args[1]) else None  # type: ignore[arg-type]
    if packet is aten.add and len(args) == 2:
        left, right = args
        return left if uniform.get(right) == 0 else right if uniform.get(left) == 0 else None
    if packet is aten.masked_fill:
        return args[0] if uniform.get(args[1]) == 0 else None
    if packet is aten.where and len(args) == 3 and args[0] in uniform:
        return args[1] if uniform[args[0]] else args[2]
    return None


def _same_type(kept: Any, node: fx.Node) -> bool:
    """Whether neither broadcasting nor promotion happens on the way."""
    if not isinstance(kept, fx.Node):
        return False
    before, after = kept.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.shape == after.shape


def _packet(node: fx.Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None
