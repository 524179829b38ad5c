"""What the passes ask of an fx node, and what they do with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn


#: Key in `node.meta`: path of the innermost module, relative to the captured child, whose forward made the node.
MODULE_PATH = "module_path"

#: How the names of constants begin that the capture registers as buffers of a captured child.
CONSTANT_PREFIX = "_constant_"

#: Calls that change a setting for what comes after them; nothing reads their result.
SETTINGS: frozenset[Any] = frozenset(
    {
        torch.is_grad_enabled,
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    }
)

#: What a captured child that is itself a layer calls in its graph: its own method of that name.
COMPUTE = "compute"


def fetch(module: nn.Module, target: str) -> Any:
    """The attribute of `module` at a dotted path."""
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def called_module(owner: nn.Module, node: fx.Node) -> Any:
    """The module that `node` calls in the graph of `owner`; `None` if it calls none."""
    if node.op != "call_module":
        return None
    return owner if node.target == COMPUTE else fetch(owner, str(node.target))


def module_path(node: fx.Node) -> str:
    """Path, below the captured child, of the module whose forward made the node."""
    return str(node.meta.get(MODULE_PATH, ""))


def operation_name(node: fx.Node) -> str:
    """The name of what the node calls, without its namespace and its overload."""
    return short_name(str(node.target))


def short_name(target: str) -> str:
    """`aten.conv2d.default` → `conv2d`."""
    return target.split(".")[1] if "." in target else target


def is_floating(node: fx.Node) -> bool:
    """Whether the value of the node is a tensor of real numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def writes(node: fx.Node) -> bool:
    """Whether the operation writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: fx.Node) -> bool:
    """Whether the result shares the memory of the first argument, which the operation only reads."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = node.target._schema.arguments[:1]
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in first)


def functional_twin(operation: Any) -> Any:
    """The operation that returns what an in-place one writes: `aten.add_.Tensor` → `aten.add.Tensor`, or `None`."""
    namespace, name = operation._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, operation._overloadname, None)


def output_values(graph: fx.Graph) -> list[Any]:
    """What the graph returns, in order: nodes, or `None`."""
    output = next(node for node in graph.nodes if node.op == "output")
    values: Any = output.args[0]
    return list(values)


def emitter(before: fx.Node) -> Callable[..., fx.Node]:
    """Gives `emit(operation, *args, **kwargs)`, which inserts calls before a node.

    They belong to the same module as that node, and have fake values of their own.
    """
    values = before.meta["val"]
    first: Any = values if isinstance(values, Tensor) else values[0]
    mode = first.fake_mode

    def emit(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with before.graph.inserting_before(before):
            node = before.graph.call_function(operation, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta = {MODULE_PATH: module_path(before), "val": operation(*values[0], **values[1])}
        return node

    return emit


def call_before(
    node: fx.Node, path: str, argument: Any, meta: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> fx.Node:
    """Insert, before `node`, a call of the layer at `path`, which is "" for a captured child that is itself the layer.

    Args:
        node: where.
        path: of the layer, below the captured child.
        argument: what the layer is called with.
        meta: of the value that the call returns.
        options: further arguments, by name.
    """
    with node.graph.inserting_before(node):
        call: fx.Node = node.graph.create_node("call_module", path or COMPUTE, (argument,), dict(options or {}))
    call.meta = {**meta, MODULE_PATH: path}
    return call


def replace_node(node: fx.Node, by: fx.Node) -> None:
    """Let all that reads `node` read `by`, and erase `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def writes_first_argument(node: fx.Node) -> bool:
    """Whether the operation is one whose name ends in `_`: it writes its result into its first argument."""
    named = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_")
    return named and writes(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


def written_values(node: fx.Node) -> list[fx.Node]:
    """The arguments that the operation writes to."""
    if not writes(node):
        return []
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for name in written if isinstance(value := named.get(name), fx.Node)]


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether computing it moves the state of the random numbers on."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase nodes without users, but for inputs, outputs, in-place writes, settings and random numbers."""
    for node in reversed(list(graph.nodes)):
        kept = node.op in ("placeholder", "output") or node.target in SETTINGS
        if not (node.users or kept or writes(node) or draws_random_numbers(node)):
            graph.erase_node(node)
