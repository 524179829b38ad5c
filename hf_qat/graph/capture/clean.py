"""Make an exported graph one that runs on the child itself: no wrapper, no writes over saved values, any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.identities import drop_identities
from hf_qat.graph.capture.padding import merge_padding
from hf_qat.graph.capture.regions import inline_regions
from hf_qat.graph.capture.views import replace_writes
from hf_qat.graph.nodes import (
    CONSTANT_PREFIX,
    MODULE_PATH,
    SETTINGS,
    draws_random_numbers,
    eliminate_dead_code,
    emitter,
    fetch,
    functional_twin,
    is_floating,
    is_view,
    replace_node,
    writes,
    writes_first_argument,
    written_values,
)


aten = torch.ops.aten

#: The name under which the wrapper of `exporting.py` holds the child; it is stripped from every path.
WRAPPER_PREFIX = "child"

#: Checks that the exporter writes down; the shim does its own.
ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


class Constants:
    """Tensors that graphs of one module need beside its parameters and buffers; they are added to it at the end.

    Args:
        module: whose names are taken.
    """

    def __init__(self, module: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        self._earlier: list[str] = []
        self._first = sum(name.startswith(CONSTANT_PREFIX) for name in module._buffers)

    def begin_graph(self) -> None:
        """From now on, what the graphs so far have is found again by its value: so a constant has one name in all."""
        self._earlier = list(self.values)

    def add(self, value: Tensor) -> str:
        """Keep `value` under the next free name `_constant_<k>`, unless an earlier graph has it; that name."""
        for name in reversed(self._earlier):  # a constant that was computed of another comes after it
            if _is_same(self.values[name], value):
                return name
        name = f"{CONSTANT_PREFIX}{self._first + len(self.values)}"
        self.values[name] = value.detach()
        return name


def _is_same(known: Tensor, value: Tensor) -> bool:
    """Whether both hold the same; nobody knows of tensors without values."""
    alike = known.shape == value.shape and known.dtype == value.dtype and known.device == value.device
    return alike and known.device.type != "meta" and torch.equal(known, value)


class Extended:
    """A module together with constants that it does not have yet, for graphs that read both."""

    def __init__(self, module: nn.Module, constants: dict[str, Tensor]) -> None:
        self._module, self._constants = module, constants

    def __getattr__(self, name: str) -> Any:
        constants = self.__dict__["_constants"]
        return constants[name] if name in constants else getattr(self.__dict__["_module"], name)


class UnclearWriteError(CaptureError):
    """A write to memory that other values of the graph share; torch's own functionalization is needed."""


def clean(exported: fx.GraphModule, child: nn.Module, constants: Constants) -> fx.Graph:
    """The graph of `exported`, rewritten to run on `child` itself.

    Args:
        exported: from `ExportedProgram.module()`, made of a wrapper that holds the child as `child`.
        child: is only read.
        constants: what the graph needs beside is added here.

    Returns:
        A graph of flat tensors; nodes carry `meta["module_path"]` and `meta["val"]` (a fake tensor).

    Raises:
        UnclearWriteError: the graph writes to memory in a way that cannot be undone here.
    """
    graph = exported.graph
    inline_regions(exported)
    graph.set_codegen(fx.graph.CodeGen())
    graph.owning_module = None  # it runs on the child from now on
    _strip_wrapper(graph)
    _drop_assertions(graph)
    _adopt_constants(exported, child, constants)
    _make_functional(graph)
    _replace_copies(graph)
    _reshape_views(graph)
    _fold_constants(graph, Extended(child, constants.values), constants)
    replace_writes(graph)
    _require_clear_writes(graph)
    drop_identities(graph, lambda node: constants.values.get(str(node.target)))
    merge_padding(graph)
    _follow_device(graph)
    eliminate_dead_code(graph)
    return graph


def copy_outputs(graph: fx.Graph, positions: Iterable[int]) -> None:
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
    """`child.a.b` → `a.b`; a module called twice has an `@1` at the end of its path, which goes too."""
    path = path.split("@")[0]
    return "" if path in ("", WRAPPER_PREFIX) else path.removeprefix(f"{WRAPPER_PREFIX}.")


def _drop_assertions(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and any(name in str(node.target) for name in ASSERTIONS):
            graph.erase_node(node)
        elif node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)


def _adopt_constants(exported: fx.GraphModule, child: nn.Module, constants: Constants) -> None:
    """Tensors that the exporter lifted out of the code become constants."""
    known: dict[str, str] = {}
    for node in exported.graph.nodes:
        if node.op != "get_attr":
            continue
        try:
            fetch(child, node.target)
        except AttributeError:
            value = fetch(exported, node.target) if hasattr(exported, node.target.split(".")[0]) else None
            if value is None:
                value = fetch(exported, f"{WRAPPER_PREFIX}.{node.target}")
            if node.target not in known:
                known[node.target] = constants.add(value)
            node.target = known[node.target]


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(CONSTANT_PREFIX)


def _make_functional(graph: fx.Graph) -> None:
    """Replace in-place operations on values that nothing else shares by operations that return a new one.

    A quantizer saves tensors for its backward pass; Hugging Face models add residuals in place and would overwrite
    them. Writes to parameters and buffers of the module stay, as do those through a view.
    """
    for node in list(graph.nodes):
        twin = functional_twin(node.target) if writes_first_argument(node) else None
        if twin is None:
            continue
        written: Any = node.args[0]
        if _is_of_module(written) or is_view(written) or _viewed_before(written, node):
            continue
        node.target = twin
        _read_new_value(written, node)


def _read_new_value(written: fx.Node, node: fx.Node) -> None:
    """Let what reads `written` after `node` read the result of `node`."""
    later = False
    for user in [n for n in written.graph.nodes if n is node or n in written.users]:
        if user is node:
            later = True
        elif later:
            user.replace_input_with(written, node)


def _viewed_before(written: fx.Node, write: fx.Node) -> bool:
    """Whether a view of the memory, made before the write, is read after it: it would show the new values."""
    order = {node: position for position, node in enumerate(write.graph.nodes)}

    def read_later(node: fx.Node) -> bool:
        views = [user for user in node.users if order[user] < order[write] and is_view(user)]
        return any(any(order[user] > order[write] for user in view.users) or read_later(view) for view in views)

    return read_later(written)


def _require_clear_writes(graph: fx.Graph) -> None:
    """Left are writes to buffers of the module, and to tensors that the graph itself has just made."""
    for node in graph.nodes:
        for written in written_values(node):
            memory = _memory_of(written)
            fresh = memory.op == "call_function" and not any(map(is_floating, memory.all_input_nodes))
            if not (fresh or _is_of_module(written)):
                raise UnclearWriteError(f"{node.target} writes to memory that {memory} shares with other values")


def _is_of_module(node: Any) -> bool:
    """Whether the value is a whole parameter or buffer of the module, perhaps after it was written to."""
    while writes(node) and (written := written_values(node)):
        node = written[0]
    return bool(node.op == "get_attr")


def _replace_copies(graph: fx.Graph) -> None:
    """`copy(old, new)` is `new` in the shape and type of `old`; PyTorch has no derivative for it."""
    for node in list(graph.nodes):
        if node.target is not aten.copy.default:
            continue
        old, new, emit = node.args[0], node.args[1], emitter(node)
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = emit(aten.to.dtype, new, old.meta["val"].dtype)
        replace_node(
            node, new if new.meta["val"].shape == old.meta["val"].shape else emit(aten.expand_as.default, new, old)
        )


def _reshape_views(graph: fx.Graph) -> None:
    """`view` becomes `reshape`: whether memory allows a view depends on kernels that the export never saw."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _fold_constants(graph: fx.Graph, module: Any, constants: Constants) -> None:
    """Run once, now, whatever depends on neither inputs nor parameters (masks, position grids)."""
    foldable = _foldable_nodes(graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in foldable:
            if node.op == "get_attr":
                values[node] = fetch(module, node.target).clone()  # later nodes may write to it
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = node.target(
                *map(_on_real_device, args), **{k: _on_real_device(v) for k, v in kwargs.items()}
            )
    for node, value in values.items():
        outside = [user for user in node.users if user not in values]
        if outside and isinstance(value, Tensor) and node.op != "get_attr":
            with graph.inserting_before(node):
                constant = graph.get_attr(constants.add(value.clone()))
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
        computed = node.op == "call_function" and node.target not in SETTINGS and not draws_random_numbers(node)
        if _is_constant(node) or (computed and all(n in foldable for n in node.all_input_nodes)):
            foldable.add(node)
    written = [_memory_of(w) for n in graph.nodes if n not in foldable for w in written_values(n)]
    while written:
        node = written.pop()
        if node in foldable:
            foldable.discard(node)
            written += node.users
    return foldable


def _memory_of(node: Any) -> Any:
    """The node that made the memory that `node` is a view of."""
    while True:
        written = written_values(node)
        if written:
            node = written[0]
        elif is_view(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node


def _on_real_device(argument: Any) -> Any:
    """A constant of a graph captured on the meta device still needs its value."""
    return torch.device("cpu") if isinstance(argument, torch.device) and argument.type == "meta" else argument


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
