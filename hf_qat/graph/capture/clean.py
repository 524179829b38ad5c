"""Make an exported graph one that trains: no in-place writes, live dropout, constants folded, any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_qat.graph.capture.dropout import TrainingProbabilities, revive_dropout
from hf_qat.graph.capture.identities import drop_identities
from hf_qat.graph.capture.padding import merge_padding
from hf_qat.graph.capture.views import replace_writes
from hf_qat.graph.nodes import CONSTANT_PREFIX, MODULE_PATH, eliminate_dead_code, fetch


aten = torch.ops.aten

#: The name under which the wrapper of `capture.py` holds the child; it is stripped from every path.
WRAPPER_PREFIX = "child"

#: Checks that the exporter writes down; the shim does its own.
ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def clean(exported: fx.GraphModule, child: nn.Module, probabilities: TrainingProbabilities) -> fx.Graph:
    """The graph of `exported`, rewritten to run on `child` itself.

    Args:
        exported: from `ExportedProgram.module()`, made of a wrapper that holds the child as `child`.
        child: gets constants (non-persistent buffers `_constant_<k>`) and dropout modules that the graph needs.
        probabilities: of functional dropouts, in training.

    Returns:
        A graph of flat tensors; nodes carry `meta["module_path"]` and `meta["val"]` (a fake tensor).
    """
    graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    graph.owning_module = None  # it runs on the child from now on
    _strip_wrapper(graph)
    _drop_assertions(graph)
    _adopt_constants(exported, child)
    _make_functional(graph)
    _reshape_views(graph)
    _fold_constants(graph, child)
    replace_writes(graph, MODULE_PATH)
    drop_identities(graph, lambda node: _constant(child, node))
    merge_padding(graph)
    revive_dropout(graph, child, probabilities)
    _follow_device(graph)
    eliminate_dead_code(graph)
    return graph


def copy_outputs(graph: fx.Graph, positions: set[int]) -> None:
    """Return copies at `positions`, which the caller writes to in place: a quantizer may have saved the original."""
    output = next(node for node in graph.nodes if node.op == "output")
    returned: Any = output.args[0]
    values = list(returned)
    for position in positions:
        with graph.inserting_before(output):
            copy = graph.call_function(aten.clone.default, (values[position],))
        copy.meta = dict(values[position].meta)
        values[position] = copy
    output.args = (tuple(values),)


def _strip_wrapper(graph: fx.Graph) -> None:
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = next((entry[0] for entry in reversed(list(stack.values()))), "")
        node.meta = {MODULE_PATH: _relative(path), "val": node.meta.get("val")}
        if node.op == "get_attr":
            node.target = _relative(str(node.target))


def _relative(path: str) -> str:
    """`child.a.b` → `a.b`; a module called twice has an `@1` behind its path, which goes too."""
    path = path.split("@")[0]
    return "" if path in ("", WRAPPER_PREFIX) else path.removeprefix(f"{WRAPPER_PREFIX}.")


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and any(name in str(node.target) for name in ASSERTIONS):
            graph.erase_node(node)
        elif node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)


def _adopt_constants(exported: fx.GraphModule, child: nn.Module) -> None:
    """Tensors that the exporter lifted out of the code become non-persistent buffers of the child."""
    for node in exported.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            fetch(child, node.target)
        except AttributeError:
            value = fetch(exported, node.target) if hasattr(exported, node.target.split(".")[0]) else None
            if value is None:
                value = fetch(exported, f"{WRAPPER_PREFIX}.{node.target}")
            node.target = add_constant(child, value)


def add_constant(child: nn.Module, value: Tensor) -> str:
    """Register `value` as the next non-persistent buffer `_constant_<k>` of `child`; its name."""
    taken = sum(name.startswith(CONSTANT_PREFIX) for name in child._buffers)
    name = f"{CONSTANT_PREFIX}{taken}"
    child.register_buffer(name, value.detach(), persistent=False)
    return name


def _constant(child: nn.Module, node: fx.Node) -> Tensor | None:
    """The tensor at a `get_attr` node, if `add_constant` has put it there."""
    value: Tensor | None = fetch(child, str(node.target)) if _is_constant(node) else None
    return value


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(CONSTANT_PREFIX)


def _make_functional(graph: fx.Graph) -> None:
    """Replace in-place operations on plain values by their functional twins.

    A quantizer saves tensors for its backward pass; Hugging Face models add residuals in place and would overwrite
    them. A write through a view (`mask[:, 1:] = …`) stays: it goes to a tensor that the graph itself has just made.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        if not (schema.is_mutable and schema.name.endswith("_") and node.args and isinstance(node.args[0], fx.Node)):
            continue
        written = node.args[0]
        twin = _functional_twin(node.target)
        if twin is None or _is_view(written):
            continue
        node.target = twin
        later = False
        for user in [n for n in graph.nodes if n is node or n in written.users]:
            if user is node:
                later = True
            elif later:
                user.replace_input_with(written, node)


def _reshape_views(graph: fx.Graph) -> None:
    """`view` becomes `reshape`: whether memory allows a view depends on kernels that the export never saw."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _functional_twin(target: Any) -> Any:
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(a.alias_info is not None and not a.alias_info.is_write for a in target._schema.arguments[:1])


def _fold_constants(graph: fx.Graph, child: nn.Module) -> None:
    """Run once, now, whatever depends on neither inputs nor parameters (masks, position grids)."""
    foldable = _foldable_nodes(graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in foldable:
            if node.op == "get_attr":
                values[node] = fetch(child, node.target).clone()  # later nodes may write to it
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = node.target(*args, **_on_real_device(kwargs))
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if outside and isinstance(value, Tensor) and node.op != "get_attr":
            with graph.inserting_before(node):
                constant = graph.get_attr(add_constant(child, value.clone()))
            constant.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, constant)
    for node in reversed(values):
        if not node.users:
            graph.erase_node(node)


def _foldable_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value is known now; none of them shares memory with a tensor that other nodes write to."""
    foldable: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and all(n in foldable for n in node.all_input_nodes) and _is_pure(node)
        if _is_constant(node) or computed:
            foldable.add(node)
    written = [_memory_of(n.args[0]) for n in graph.nodes if _writes(n) and n not in foldable]
    while written:
        node = written.pop()
        if node in foldable:
            foldable.discard(node)
            written += node.users
    return foldable


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _memory_of(node: Any) -> Any:
    """The node that made the memory that `node` is a view of."""
    while isinstance(node.args[0] if node.args else None, fx.Node) and (_is_view(node) or _writes(node)):
        node = node.args[0]
    return node


def _is_pure(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _on_real_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A constant of a graph captured on the meta device still needs its value."""
    if str(kwargs.get("device", "")) == "meta":
        return {**kwargs, "device": torch.device("cpu")}
    return kwargs


def _follow_device(graph: fx.Graph) -> None:
    """Tensors that the graph makes at run time are made where its first input lives, not where it was captured."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    made = [node for node in graph.nodes if node.op == "call_function" and _fixes_device(node)]
    if not inputs or not made:
        return
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (inputs[0], "device"))
    device.meta = {MODULE_PATH: "", "val": None}
    for node in made:
        node.args = tuple(device if isinstance(argument, torch.device) else argument for argument in node.args)
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", device)


def _fixes_device(node: fx.Node) -> bool:
    return node.kwargs.get("device") is not None or any(isinstance(a, torch.device) for a in node.args)


def tensor_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes whose value is a floating-point tensor."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            yield node
