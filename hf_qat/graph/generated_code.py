"""The Python function of a graph: the one place where the package runs code that it has made.

fx writes names into that code as they are: the path of a module as `getattr(self, "…")`. Names may come from a file (a
config names the parts of a model, a checkpoint the arguments of a call), so one that could end its quotes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from hf_qat.errors import CaptureError


#: What ends or changes a string between double quotes; line breaks are not printable.
ENDS_A_STRING = frozenset('"\\')


def function_of(graph: fx.Graph, exchanged: Mapping[Any, Callable[..., Any]] | None = None) -> Callable[..., Any]:
    """The function that computes `graph`, called with the module that owns it and the inputs.

    Args:
        graph: stays as it is.
        exchanged: operation → what is called in its place.

    Raises:
        CaptureError: a name in it could be read as code.
    """
    graph.lint()
    for node in graph.nodes:
        _require_plain_node(node)
    code = _exchange(graph, exchanged or {}).python_code("self")
    namespace, compiled = dict(code.globals), compile(code.src, f"<graph {id(graph):x}>", "exec")
    exec(compiled, namespace)  # nosec B102
    function: Callable[..., Any] = namespace["forward"]
    return function


def _exchange(graph: fx.Graph, exchanged: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """A copy that calls other functions, or `graph` itself where there are none to exchange."""
    if not any(node.op == "call_function" and node.target in exchanged for node in graph.nodes):
        return graph
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if node.op == "call_function":
            node.target = exchanged.get(node.target, node.target)
    return copied


def require_plain_names(module: nn.Module) -> None:
    """Raise `CaptureError` unless code can be written that names what is in `module`."""
    for path in _paths(module):
        if not is_plain(path):
            raise CaptureError(
                f"{path!r} of {type(module).__name__} cannot be named in a graph: names of modules, parameters and "
                "buffers must be printable, without double quotes and backslashes"
            )


def is_plain(name: str) -> bool:
    """Whether `name` stays one string between double quotes."""
    return name.isprintable() and not ENDS_A_STRING & set(name)


def _paths(module: nn.Module) -> Iterator[str]:
    for named in (module.named_modules(), module.named_parameters(), module.named_buffers()):
        yield from (path for path, _ in named)


def _require_plain_node(node: fx.Node) -> None:
    """What fx writes of a node by name; functions come with their objects, and constants by their `repr`."""
    names = [node.name, *node.kwargs]
    if node.op in ("placeholder", "call_method"):
        names.append(str(node.target))
    unwritable = [name for name in names if not name.isidentifier()]
    if node.op in ("call_module", "get_attr") and not is_plain(str(node.target)):
        unwritable.append(str(node.target))
    if unwritable:
        raise CaptureError(f"{unwritable[0]!r} cannot be a name in a graph: it could be read as code.")
