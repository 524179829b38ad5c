"""Capture: each child that a task model calls (or a whole plain module) becomes an FX graph, by `torch.export`.

The model's own class keeps running around the graphs, so losses, configs and `save_pretrained` stay what they were.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.clean import clean, copy_outputs
from hf_qat.graph.capture.dropout import TrainingProbabilities
from hf_qat.graph.capture.dry_run import (
    BATCH_SIZES,
    CallRecord,
    differs_in_training,
    dry_runs,
    forward,
    links,
    whole_call,
)
from hf_qat.graph.capture.inputs import Inputs, accepts_labels
from hf_qat.graph.capture.modes import evaluating
from hf_qat.graph.captured import CallSignature, CapturedModule, install


logger = logging.getLogger(__name__)


def capture(
    model: nn.Module, inputs: Inputs, excluded: Callable[[str], bool] = lambda path: False
) -> dict[str, CapturedModule]:
    """Turn the children that `model` calls into captured modules, in place.

    Args:
        model: any module; one whose forward takes `labels` is captured by its children, another as a whole. Where a
            part of a Hugging Face model cannot be captured, its own children are, and the rest of it stays float.
        inputs: example inputs; the first axis of every tensor is the batch.
        excluded: says of a module path whether it stays float.

    Returns:
        The captured modules by path ("" for the model itself), in the order in which they are first called. A link
        from an input to the output of an earlier child is in
        `captured.producer_of_input`.

    Raises:
        CaptureError: with the child and the reason.
    """
    with evaluating(model):
        calls, exported = _export_all(model, inputs, excluded)
    # Only now, when nothing can fail any more, is the model changed.
    probabilities = TrainingProbabilities(model, lambda module: forward(module, inputs, BATCH_SIZES[0]))
    graphs = [clean(item.graph_module, call.module, probabilities) for item, call in zip(exported, calls, strict=True)]
    for call, graph in zip(calls, graphs, strict=True):
        copy_outputs(graph, call.written)
    captured = {
        call.path: _install(call, item, graph) for call, item, graph in zip(calls, exported, graphs, strict=True)
    }
    for call in calls:
        captured[call.path].producer_of_input = links(call, calls)
    return captured


def _export_all(
    model: nn.Module, inputs: Inputs, excluded: Callable[[str], bool]
) -> tuple[list[CallRecord], list[_Exported]]:
    """Export the children of a task model, or a whole plain module; where that fails, the next finer parts."""
    finer = hasattr(model, "main_input_name")
    if not accepts_labels(model):
        whole = whole_call(model, inputs)
        try:
            return [whole], [_export(whole)]
        except CaptureError as error:
            if not finer:
                raise
            logger.info("%s", error)
    opened = {""}
    exported: dict[str, _Exported] = {}
    errors: dict[str, CaptureError] = {}
    while True:
        calls = [call for call in dry_runs(model, inputs, excluded, opened) if call.path not in errors]
        failed = {
            path: CaptureError(_otherwise(path)) for path in _training_only(model, inputs, calls, excluded, opened)
        }
        for call in calls:
            if call.path in failed:
                continue
            try:
                exported[call.path] = exported.get(call.path) or _export(call)
            except CaptureError as error:
                if not finer:
                    raise
                failed[call.path] = error
        errors |= failed
        opened |= failed.keys()
        if not failed:
            break
    if not calls:
        raise next(iter(errors.values()), CaptureError(_nothing(model)))
    if errors:
        _report_float(model, errors)
    return calls, [exported[call.path] for call in calls]


def _training_only(
    model: nn.Module, inputs: Inputs, calls: list[CallRecord], excluded: Callable[[str], bool], opened: set[str]
) -> set[str]:
    """Parts that compute more in training, and have children of their own to capture instead."""
    if not hasattr(model, "main_input_name"):
        return set()
    return differs_in_training(model, inputs, calls, excluded, opened)


def _otherwise(path: str) -> str:
    return f"{path} returns other tensors in training than in evaluation"


def _nothing(model: nn.Module) -> str:
    return f"{type(model).__name__} calls none of its children: there is nothing to quantize."


def _report_float(model: nn.Module, errors: dict[str, CaptureError]) -> None:
    """Say once what the model computes around its captured parts, and why."""
    reasons = "; ".join(str(error).partition(". Leave it")[0].partition("; leave it")[0] for error in errors.values())
    logger.warning(
        "%s: the code of %s itself stays float, the parts that it calls are quantized. %s.",
        type(model).__name__,
        ", ".join(errors),
        reasons,
    )


class _Result:
    """The structure of what a child returned: its tree, and per leaf `None` (a tensor) or a 1-tuple."""

    spec: Any
    constants: list[Any]


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
        self.result.spec = spec
        self.result.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


@dataclass
class _Exported:
    """One child's export; `shapes` has `None` for the dimensions that take any size."""

    graph_module: fx.GraphModule
    result: _Result
    shapes: list[tuple[int | None, ...]]


def _export(calls: CallRecord) -> _Exported:
    """`torch.export` of one child, with every dimension dynamic in which its records differ."""
    name = calls.path or type(calls.module).__name__
    first = calls.signatures[0]
    _forget_caches(calls.module)
    if any(not first.same_constants(other) for other in calls.signatures[1:]):
        raise CaptureError(
            f"{name} is called in two ways (different arguments) within one forward; leave it in float with "
            f"QATConfig(exclude={name!r})."
        )
    if any({x.dim() for x in records} != {records[0].dim()} for records in zip(*calls.inputs, strict=True)):
        raise CaptureError(f"{name} is called with tensors of different ranks; leave it in float.")
    wrapper = _FlatCall(calls.module, first)
    # A stride guard rejects real inputs where the example was a view; contiguous copies have none.
    examples = tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in calls.inputs[0])
    dynamic = _dynamic_dimensions(calls.inputs)
    shapes = tuple({d: torch.export.Dim.AUTO for d in dims} for dims in dynamic)
    try:
        with torch.no_grad(), _swiftly(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute")  # a cache, which is dropped below
            program = torch.export.export(wrapper, examples, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"{name} cannot be captured: {reason.strip()}{_user_line(error)}. Leave it in float with "
            f"QATConfig(exclude={name!r}), or remove the data-dependent control flow."
        ) from error
    finally:
        _forget_caches(calls.module)  # of the exporter's own tensors
    _require_dynamic(name, program, dynamic)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    free = [
        tuple(None if d in dims else n for d, n in enumerate(x.shape))
        for x, dims in zip(examples, dynamic, strict=True)
    ]
    return _Exported(module, wrapper.result, free)


@contextmanager
def _swiftly() -> Iterator[None]:
    """Inside, no call stack is kept of every node, and Python looks for no garbage: a quarter of an export's time."""
    collecting, without_stacks = gc.isenabled(), getattr(fx.config, "do_not_emit_stack_traces", False)
    gc.disable()
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = without_stacks
        if collecting:
            gc.enable()


def _forget_caches(module: nn.Module) -> None:
    """LeViT keeps, for evaluation, biases that depend on parameters; it drops them when it is put into training."""
    module.train()
    module.eval()


def _install(calls: CallRecord, exported: _Exported, graph: fx.Graph) -> CapturedModule:
    return install(
        calls.module,
        graph=graph,
        signature=calls.signatures[0],
        shapes=exported.shapes,
        output_spec=exported.result.spec,
        output_constants=exported.result.constants,
    )


def _user_line(error: BaseException) -> str:
    """File and line, in the model's own code, where the export stopped."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("graph/capture.py")]
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
