"""A program of few composite operators, made ready for translation without tracing it anew.

PyTorch's exporter decomposes what it has no translation for, and to that end traces the whole program twice more: a third
of the time that an export takes. A graph that was captured holds next to nothing to decompose. So nodes are changed one
by one, and the program is traced only where that cannot do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind


aten = torch.ops.aten

CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}

#: Changes one node of a graph into what tracing makes of it, in place.
Rule = Callable[[fx.Node], None]

_by_tracing = ExportedProgram.run_decompositions


@contextmanager
def decomposing_in_place() -> Iterator[None]:
    """While `torch.onnx.export` runs: it decomposes by `decompose`, not by a trace."""
    setattr(ExportedProgram, "run_decompositions", decompose)  # noqa: B010 - mypy knows it as a method
    try:
        yield
    finally:
        setattr(ExportedProgram, "run_decompositions", _by_tracing)  # noqa: B010


def decompose(program: ExportedProgram, decomp_table: Mapping[Any, Any] | None = None) -> ExportedProgram:
    """The program without operators of `decomp_table`, without views that are composite, with no write in place.

    Args:
        program: of `torch.export.export`; it is changed, unless it has to be traced.
        decomp_table: as `ExportedProgram.run_decompositions` takes it; `None` for PyTorch's own.
    """
    graph = program.graph
    if decomp_table is None or not _is_plain(program):
        return _by_tracing(program, decomp_table)  # type: ignore[arg-type]
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if not all(_has_rule(node) or _stays(node.target, decomp_table) for node in calls):
        return _by_tracing(program, decomp_table)  # type: ignore[arg-type]
    for node in calls:
        if node.target in RULES:
            RULES[node.target](node)
    program.graph_module.recompile()
    return program


def _is_plain(program: ExportedProgram) -> bool:
    """Whether nothing but results comes out, no size is free, and no graph stands inside the graph."""
    signature = program.graph_signature
    return (
        all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
        and all(spec.kind is not InputKind.TOKEN for spec in signature.input_specs)
        and all(node.op in ("placeholder", "call_function", "output") for node in program.graph.nodes)
        and not any(_is_free(node.meta.get("val")) for node in program.graph.nodes)
    )


def _is_free(value: Any) -> bool:
    """Whether a value is, or has, a size that is a symbol."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)


def _has_rule(node: fx.Node) -> bool:
    """Whether a rule of `RULES` makes of the node what tracing does."""
    return node.target in RULES and not (node.target is aten.dropout.default and node.args[2])


def _stays(target: Any, decomp_table: Mapping[Any, Any]) -> bool:
    """Whether tracing leaves the operator as it is: it is in no table, writes nothing, and is no composite view."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    schema = target._schema
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    views = any(argument.alias_info is not None for argument in schema.arguments)
    unsafe = torch.Tag.maybe_aliasing_or_mutating in target.tags
    return target not in decomp_table and not schema.is_mutable and not unsafe and not (composite and views)


def _as_view(node: fx.Node) -> None:
    """`reshape` or `flatten`: a view, of a copy where the numbers do not lie in order, as in tracing."""
    x = _source(node)
    shape = node.args[1] if node.target is aten.reshape.default else list(node.meta["val"].shape)
    if not x.meta["val"].is_contiguous():
        shape = list(node.meta["val"].shape)
        with node.graph.inserting_before(node):
            x = _inserted(node, aten.clone.default, x, **CONTIGUOUS)
    node.target, node.args, node.kwargs = aten.view.default, (x, shape), {}


def _as_copy(node: fx.Node) -> None:
    """`contiguous`: a copy where something has to move."""
    if _source(node).meta["val"].is_contiguous():
        _drop(node)
    else:
        node.target, node.kwargs = aten.clone.default, CONTIGUOUS


def _as_conversion(node: fx.Node) -> None:
    """`to` another type; nothing, where the type is that already."""
    x = _source(node)
    if x.meta["val"].dtype == node.meta["val"].dtype:
        _drop(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": node.meta["val"].dtype}


def _inserted(node: fx.Node, target: Any, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    """A call before `node`, in the same module as it."""
    call = node.graph.call_function(target, (x, *args), kwargs)
    call.meta = {**node.meta, "val": target(x.meta["val"], *args, **kwargs)}
    return call


def _drop(node: fx.Node) -> None:
    """Let all that read the node read its input; a result of the program keeps its name."""
    if any(user.op == "output" for user in node.users):
        node.target, node.args, node.kwargs = aten.clone.default, (_source(node),), {}
    else:
        node.replace_all_uses_with(_source(node))
        node.graph.erase_node(node)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _as_pool_of_planes(node: fx.Node) -> None:
    """Adaptive pooling of one axis: of two, the first of which has one element."""
    x = _source(node)
    size = node.args[1]
    assert isinstance(size, list)
    with node.graph.inserting_before(node):
        image = _inserted(node, aten.unsqueeze.default, x, -2)
        pooled = _inserted(node, aten.adaptive_avg_pool2d.default, image, [1, *size])
    node.target, node.args = aten.squeeze.dim, (pooled, -2)


#: Composite views that captured graphs are full of, and what else stands in image models around them.
RULES: dict[Any, Rule] = {
    aten.reshape.default: _as_view,
    aten.flatten.using_ints: _as_view,
    aten.contiguous.default: _as_copy,
    aten.to.dtype: _as_conversion,
    aten.dropout.default: _drop,
    aten.adaptive_avg_pool1d.default: _as_pool_of_planes,
}
