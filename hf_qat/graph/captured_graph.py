"""A graph of a module for one way to call it, which computes what the module does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hf_qat.graph.call_signature import CallSignature, Leaf, fill
from hf_qat.graph.generated_code import function_of
from hf_qat.graph.leading_axes import takes_leading_axes
from hf_qat.graph.nodes import is_floating
from hf_qat.graph.segments import Segment, cut
from hf_qat.graph.stored_graph import restore_graph, store_graph
from hf_qat.quantization.followed import FOLLOWED
from hf_qat.quantization.running_graph import running_graph


#: Key in the `meta` of an input: the name of the argument that it comes from.
ARGUMENT = "argument"


@dataclass
class CapturedGraph:
    """A graph for one way to call a module.

    Attributes:
        graph: flat tensors in, a tuple of flat tensors out; its names are relative to the module.
        signature: the call that was captured.
        shapes: per input the captured sizes, `None` where any size goes.
        real: per input whether it is of real numbers.
        result_spec, result_leaves: structure of what the module returns.
        training: the mode of the module.
        frozen: paths of the modules inside that were in the other mode.
        doubtful_sizes: batch sizes at which the exporter itself does not vouch for it.
        labelled_calls: `(args, kwargs)` that only a labelled step calls it with, of tensors without values: the first,
            and one of other sizes; empty where calls without labels are like it.
        run: the Python function of `graph`, called with the module and the inputs.
        called: paths of the modules that it calls.
        cuts: blocks → `graph` cut into segments by them.
    """

    graph: fx.Graph
    signature: CallSignature
    shapes: list[tuple[int | None, ...]]
    result_spec: Any
    result_leaves: list[Leaf]
    training: bool
    frozen: frozenset[str] = frozenset()
    doubtful_sizes: tuple[int, ...] = ()
    labelled_calls: list[tuple[list[Any], dict[str, Any]]] = field(default_factory=list)
    real: list[bool] = field(init=False)
    run: Callable[..., Any] = field(init=False, repr=False)
    called: frozenset[str] = field(init=False, repr=False)
    cuts: dict[tuple[str, ...], list[Segment]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for node, name in zip(self.inputs(), self.signature.tensor_names(), strict=True):
            node.meta[ARGUMENT] = name
        self.real = list(map(is_floating, self.inputs()))
        self.recompile()

    def recompile(self) -> None:
        """Generate `run` anew, after a pass has changed the graph."""
        self.run = function_of(self.graph, FOLLOWED)
        self.called = frozenset(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        self.cuts = {}

    def segments(self, blocks: tuple[str, ...]) -> list[Segment]:
        """As `segments.cut`, once for the same blocks."""
        if blocks not in self.cuts:
            self.cuts[blocks] = cut(self.graph, blocks, FOLLOWED)
        return self.cuts[blocks]

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy` keep: plain data, without the function that `recompile` makes."""
        return {**vars(self), "graph": store_graph(self.graph), "run": None, "cuts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the graph and its function again."""
        vars(self).update(state, graph=restore_graph(state["graph"]))
        self.__post_init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedGraph:
        """A copy that shares what is never changed: PyTorch warns of its own class where a spec is copied."""
        memo[id(self.signature)], memo[id(self.result_spec)] = self.signature, self.result_spec
        made = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def inputs(self) -> list[fx.Node]:
        """The nodes of the inputs, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the shapes are among those that were captured."""
        return len(tensors) == len(self.shapes) and all(map(fits_shape, tensors, self.shapes))

    def takes(self, module: nn.Module, call: CallSignature, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph computes what `module` does in this call."""
        if not self.signature.same_constants(call) or len(tensors) != len(self.shapes):
            return False
        if any(real and not tensor.is_floating_point() for tensor, real in zip(tensors, self.real, strict=True)):
            return False
        if self.fits(tensors):
            return True
        return all(map(_ends_alike, tensors, self.shapes)) and takes_leading_axes(module, self.graph)

    def compute(self, module: object, tensors: Sequence[Tensor]) -> Any:
        """Run on flat tensors; the result has the structure of the original forward's."""
        with nullcontext() if torch.compiler.is_compiling() else running_graph():
            return self.rebuild(self.run(module, *tensors))

    def rebuild(self, outputs: Iterable[Any]) -> Any:
        """The result of the original forward, of what the graph returns."""
        return pytree.tree_unflatten(fill(self.result_leaves, iter(outputs)), self.result_spec)


def fits_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor has the captured sizes; `None` is any."""
    sizes = zip(shape, tensor.shape, strict=True) if tensor.dim() == len(shape) else [(-1, -2)]
    return all(n is None or isinstance(m, torch.SymInt) or n == m for n, m in sizes)  # a symbol: PyTorch is exporting


def _ends_alike(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether the last axis is as captured; there is one beside it."""
    return tensor.dim() > 1 and len(shape) > 1 and tensor.shape[-1] == shape[-1]
