"""`torch.export` of one module in one mode, called as a recorded call did: the raw material of a captured graph."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from enum import Enum
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.graph.call_signature import CallSignature, Constant, Leaf, leaf_of
from hf_qat.graph.capture.batch_norm_names import restore_batch_norms
from hf_qat.graph.capture.call_record import CallRecord
from hf_qat.graph.capture.clean import Constants, UnclearWriteError, clean
from hf_qat.graph.capture.foreign_random import refusing_foreign_random_numbers
from hf_qat.graph.capture.guards import doubtful_sizes
from hf_qat.graph.capture.modes import modes_kept, put_into_mode
from hf_qat.graph.capture.regions import has_regions
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.generated_code import require_plain_names


EXPORTER_LOG = logging.getLogger("torch.fx.experimental.symbolic_shapes")

#: Types of the constants that a call may hold; `True` is an `int`.
PLAIN = (Tensor, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.memory_format)


class _Result:
    """The structure of what a child returned."""

    spec: Any
    leaves: list[Leaf]


class _FlatCall(nn.Module):
    """Takes flat tensors, rebuilds the child's call around them, and returns the flat tensors of its result."""

    def __init__(self, child: nn.Module, signature: CallSignature) -> None:
        super().__init__()
        self.child = child
        self.signature = signature
        # An object of its own, because the exporter undoes assignments to attributes.
        self.result = _Result()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.signature.rebuild(tensors)
        leaves, spec = pytree.tree_flatten(self.child(*args, **kwargs))
        _require_plain(leaves, "returns")
        self.result.spec = spec
        self.result.leaves = [leaf_of(leaf) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


class _Finite(TorchFunctionMode):
    """Inside, values count as finite: models that clamp what overflowed half precision ask `isfinite(x).all()`."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.all, torch.all) and id(args[0]) in self._asked and len(args) == 1 and not kwargs:
            return True
        result = func(*args, **(kwargs or {}))
        if func in (torch.isfinite, Tensor.isfinite):
            self._asked.add(id(result))
            self._kept.append(result)  # so that no other tensor gets its id
        return result


def _require_plain(leaves: list[Any], verb: str) -> None:
    """Refuse values that a graph cannot stand for.

    Raises:
        CaptureError: an object that may hold tensors, or a number that depends on the sizes of the inputs.
    """
    for leaf in leaves:
        if not isinstance(leaf, PLAIN) and leaf is not None:
            raise CaptureError(
                f"{verb} a {type(leaf).__module__}.{type(leaf).__name__}, which a graph cannot hold: it takes and "
                "returns tensors and constants, in tuples, lists, dicts and outputs of transformers"
            )


def export_call(calls: CallRecord, training: bool, constants: Constants) -> CapturedGraph:
    """The graph of a module for one mode, with every dimension dynamic in which its records differ.

    Args:
        calls: the module, and calls of it that differ in sizes only; the first is the example.
        training: the mode to capture; modes of the module are afterwards as before.
        constants: tensors that the graph needs beside are added here.

    Raises:
        CaptureError: it cannot become a graph; with the line of the model's code that is in the way.
    """
    name = calls.path or type(calls.module).__name__
    require_plain_names(calls.module)
    _require_one_signature(name, calls)
    leaves = [leaf for argument in calls.signatures[0].leaves.values() for leaf in argument]
    _require_plain([leaf.value for leaf in leaves if isinstance(leaf, Constant)], f"{name} is called with")
    wrapper = _FlatCall(calls.module, calls.signatures[0])
    examples = _examples(name, calls.inputs[0])
    dynamic = _dynamic_dimensions(calls.inputs)
    with modes_kept(calls.module):
        put_into_mode(calls.module, training)
        with refusing_foreign_random_numbers(name):
            program = _export(name, wrapper, examples, dynamic)
        frozen = frozenset(path for path, m in calls.module.named_modules() if m.training is not training)
        put_into_mode(calls.module, training)  # caches hold the exporter's own tensors now
    _require_dynamic(name, program, dynamic)
    try:
        graph = _cleaned(name, program, calls.module, constants)
    except CaptureError:
        raise
    except Exception as error:
        raise _opaque(name) from error
    shapes = [
        tuple(None if d in dims else n for d, n in enumerate(x.shape))
        for x, dims in zip(examples, dynamic, strict=True)
    ]
    doubtful = doubtful_sizes(getattr(program, "_guards_code", []), calls.inputs[0], calls.inputs[-1])
    result = wrapper.result
    return CapturedGraph(graph, calls.signatures[0], shapes, result.spec, result.leaves, training, frozen, doubtful)


def _examples(name: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the inputs: where one was a view, a stride guard would reject real inputs; these have none."""
    try:
        return tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in inputs)
    except RuntimeError as error:  # they lived inside torch.vmap only
        raise _opaque(name) from error


def _export(name: str, wrapper: nn.Module, examples: tuple[Tensor, ...], dynamic: list[set[int]]) -> Any:
    shapes = tuple({d: torch.export.Dim.AUTO for d in dims} for dims in dynamic)
    try:
        with torch.enable_grad(), _swiftly(), _Finite(), warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")  # of tensors in attributes: caches, which are dropped afterwards
            return torch.export.export(wrapper, examples, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"{name} cannot be captured: {reason.strip()}{_user_line(error)}. Leave it in float with "
            f"QATConfig(exclude={name!r}), or remove the data-dependent control flow."
        ) from error


def _opaque(name: str) -> CaptureError:
    """What torch exports, but neither it nor a pass of ours can look into."""
    return CaptureError(
        f"{name} cannot be captured: it holds, or is called in, what no pass can look into, such as torch.vmap or "
        f"torch.cond. Leave it in float with QATConfig(exclude={name!r}), or write it with plain operations."
    )


def _cleaned(name: str, program: Any, child: nn.Module, constants: Constants) -> fx.Graph:
    """The graph of a program on the child itself; torch makes it functional where our own steps do not suffice."""
    kept = dict(constants.values)
    try:
        return clean(_module(program), child, constants)
    except UnclearWriteError as error:
        if has_regions(program.graph):  # torch's functionalization would drop them
            raise CaptureError(f"{name} cannot be captured: {error}. It runs in its own Python code.") from error
    constants.values.clear()
    constants.values.update(kept)
    functional = _module(program.run_decompositions({}))
    restore_batch_norms(functional.graph)
    return clean(functional, child, constants)


def _module(program: Any) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _require_one_signature(name: str, calls: CallRecord) -> None:
    first = calls.signatures[0]
    if any(not first.same_constants(other) for other in calls.signatures[1:]):
        raise CaptureError(
            f"{name} is called in two ways (different arguments) within one forward; leave it in float with "
            f"QATConfig(exclude={name!r})."
        )
    if any({x.dim() for x in records} != {records[0].dim()} for records in zip(*calls.inputs, strict=True)):
        raise CaptureError(f"{name} is called with tensors of different ranks; leave it in float.")


@contextmanager
def _swiftly() -> Iterator[None]:
    """Inside, no call stack is kept of every node, and attention does not fuse.

    What stands in the way of an export is raised; the exporter need not print it, too.
    """
    talking = EXPORTER_LOG.level
    EXPORTER_LOG.setLevel(logging.CRITICAL)
    without_stacks = getattr(fx.config, "do_not_emit_stack_traces", False)
    fused = torch.backends.mha.get_fastpath_enabled()
    fx.config.do_not_emit_stack_traces = True
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        EXPORTER_LOG.setLevel(talking)
        torch.backends.mha.set_fastpath_enabled(fused)
        fx.config.do_not_emit_stack_traces = without_stacks


def _user_line(error: BaseException) -> str:
    """File and line, in the model's own code, where the export stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("capture/exporting.py")]
    return f" (at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""


def _dynamic_dimensions(inputs: list[list[Tensor]]) -> list[set[int]]:
    """For each input, the dimensions in which its records differ."""
    return [
        {d for d in range(records[0].dim()) if len({x.shape[d] for x in records}) > 1}
        for records in zip(*inputs, strict=True)
    ]


def _require_dynamic(name: str, program: Any, shapes: list[set[int]]) -> None:
    """`Dim.AUTO` silently becomes a constant where the code fixes it; that would break every other batch size."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    user_inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in placeholders if node.name in user_inputs]
    for position, (value, dims) in enumerate(zip(values, shapes, strict=True)):
        fixed = [d for d in dims if is_concrete_int(value.shape[d])]
        if fixed:
            raise CaptureError(
                f"{name} fixes dimension {fixed[0]} of its input {position} to {value.shape[fixed[0]]}, so it would "
                f"run at one batch size only; leave it in float with QATConfig(exclude={name!r})."
            )
