"""Capture: each child that a task model calls (or a whole plain module) becomes FX graphs, by `torch.export`.

The model's own class keeps running around the graphs, so losses, configs and `save_pretrained` stay what they were. A
part that cannot be captured, or whose graph computes something else, keeps running its own Python code; the parts that
it calls are captured instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.clean import Constants, copy_outputs
from hf_qat.graph.capture.dry_run import CallRecord, dry_runs, links, training_records, whole_call
from hf_qat.graph.capture.exporting import export_call
from hf_qat.graph.capture.guards import shape_at
from hf_qat.graph.capture.inputs import Inputs, accepts_labels
from hf_qat.graph.capture.modes import ready_for_capture
from hf_qat.graph.capture.proof import first_difference, runs
from hf_qat.graph.capture.value_numbers import Numbering, is_costly, known_equal
from hf_qat.graph.captured import CapturedGraph, CapturedModule, install, user_hooks, without_user_hooks
from hf_qat.quantization.class_swap import require_free_names


logger = logging.getLogger(__name__)

#: Batch sizes, beside that of the examples, at which a graph is compared with its module: one, and an odd one.
PROVEN_SIZES = (1, 5)

#: Size of the change of the example inputs in that comparison, relative to their spread.
PERTURBATION = 0.1


@dataclass(frozen=True)
class Parts:
    """Which parts of a model are captured.

    Attributes:
        excluded: says of a module path whether it stays float, and is not looked into.
        paths: exactly these are captured, unproven, as a checkpoint says; `None`: what proves to be possible.
        training: capture training, too.
    """

    excluded: Callable[[str], bool] = lambda path: False
    paths: Collection[str] | None = None
    training: bool = True


@dataclass
class _Candidate:
    """A part on its way: how it is called, its graphs, and the constants that these need."""

    call: CallRecord
    graphs: list[CapturedGraph]
    constants: Constants


def capture(model: nn.Module, inputs: Inputs, parts: Parts | None = None) -> dict[str, CapturedModule]:
    """Turn the children that `model` calls into captured modules, in place.

    Args:
        model: any module; one whose forward takes `labels` is captured by its children, another as a whole. Where a
            part cannot be captured, its own children are, and the rest of it stays float.
        inputs: example inputs; the first axis of every tensor is the batch.
        parts: which parts to capture; all that prove to be possible if left out.

    Returns:
        The captured modules by path ("" for the model itself), in the order in which they are first called. A link
        from an input to the output of an earlier child is in
        `captured.producer_of_input`.

    Raises:
        CaptureError: nothing can be captured; with the part and the reason.
    """
    parts = Parts() if parts is None else parts
    with ready_for_capture(model):
        candidates = _candidates(model, inputs, parts)
    # Only now, when nothing can fail any more, is the model changed.
    calls = [candidate.call for candidate in candidates]
    captured = {}
    for candidate in candidates:
        for graph in candidate.graphs:
            copy_outputs(graph.graph, candidate.call.written)
            graph.recompile()
        captured[candidate.call.path] = install(candidate.call.module, candidate.graphs, candidate.constants.values)
    for call in calls:
        captured[call.path].producer_of_input = links(call, calls)
    return captured


def _candidates(model: nn.Module, inputs: Inputs, parts: Parts) -> list[_Candidate]:
    """The parts that can be captured: the whole, or the children, or where that fails, the next finer parts."""
    errors: dict[str, CaptureError] = {}
    if _starts_whole(model, parts):
        call = whole_call(model, inputs)
        try:
            return [_try(call, call, parts)]
        except CaptureError as error:
            if parts.paths is not None:
                raise
            errors[""] = error
    found: dict[str, _Candidate] = {}
    opened = {""} if parts.paths is None else _ancestors(parts.paths)
    while True:
        calls = [call for call in dry_runs(model, inputs, parts.excluded, opened) if _is_wanted(call.path, parts)]
        in_training = training_records(model, inputs, calls, parts.excluded, opened) if parts.training else {}
        failed: dict[str, CaptureError] = {}
        for call in calls:
            if call.path in found or call.path in errors:
                continue
            try:
                found[call.path] = _try(call, in_training.get(call.path, call), parts)
            except CaptureError as error:
                if parts.paths is not None:
                    raise
                failed[call.path] = error
        errors |= failed
        opened |= failed.keys()
        if not failed:
            break
    captured = [call for call in calls if call.path in found]
    if not captured and parts.paths is None:
        raise next(iter(errors.values()), CaptureError(_nothing(model)))
    if errors:
        _report_float(model, errors)
    return [_with_call(found[call.path], call) for call in captured]


def _starts_whole(model: nn.Module, parts: Parts) -> bool:
    return not accepts_labels(model) if parts.paths is None else "" in parts.paths


def _ancestors(paths: Collection[str]) -> set[str]:
    """The modules around those at `paths`, whose own Python code runs."""
    return {""} | {path[:dot] for path in paths for dot, letter in enumerate(path) if letter == "."}


def _is_wanted(path: str, parts: Parts) -> bool:
    return parts.paths is None or path in parts.paths


def _with_call(candidate: _Candidate, call: CallRecord) -> _Candidate:
    """The same with the record of the last dry run, in which outputs of one part are inputs of another."""
    return _Candidate(call, candidate.graphs, candidate.constants)


def _try(call: CallRecord, in_training: CallRecord, parts: Parts) -> _Candidate:
    """Export a part in both modes, and prove it.

    Raises:
        CaptureError: it cannot be exported, or computes something else than its graph.
    """
    _require_no_hooks(call)
    require_free_names(call.module, CapturedModule)
    constants = Constants(call.module)
    with without_user_hooks(call.module):
        graphs = [export_call(call, False, constants)]
        if parts.training:
            graphs += _training_graph(in_training, constants)
        if parts.paths is None and not _is_on_meta(call.module):
            for graph, record in zip(graphs, (call, in_training), strict=False):
                _prove(record, graph, constants)
    return _Candidate(call, graphs, constants)


def _training_graph(record: CallRecord, constants: Constants) -> list[CapturedGraph]:
    """The graph of training, if the part computes anything in training: batch norm without an epsilon does not.

    Raises:
        CaptureError: it does, and cannot be exported.
    """
    try:
        return [export_call(record, True, constants)]
    except CaptureError:
        if runs(record.module, record.signatures[0], record.inputs[0], training=True):
            raise
        return []


def _require_no_hooks(call: CallRecord) -> None:
    """A hook on a module inside is called by Python alone; on the part itself it goes on being called."""
    for path, module in call.module.named_modules():
        if path and user_hooks(module):
            raise CaptureError(f"{_name(call)} contains {path}, which has hooks: they are called by Python code only")


def _is_on_meta(module: nn.Module) -> bool:
    return any(tensor.device.type == "meta" for tensor in (*module.parameters(), *module.buffers()))


def _prove(record: CallRecord, graph: CapturedGraph, constants: Constants) -> None:
    """Compare a graph with its module.

    Raises:
        CaptureError: they differ.
    """
    numbering, costly = Numbering(), is_costly(graph.graph)
    samples = [record.inputs[0]]
    sizes = graph.doubtful_sizes if graph.training else (*PROVEN_SIZES, *graph.doubtful_sizes)
    others = [sample for size in sizes if (sample := _sample(record, size)) is not None]
    # Batch norm in training takes no batch of one.
    samples = others if others and costly and not graph.training else samples + others
    for sample in samples:
        gradients = sample is samples[0] or not costly
        if costly and known_equal(record.module, graph, constants.values, sample, gradients, numbering):
            continue
        difference = first_difference(record.module, graph, constants.values, sample, gradients)
        if difference is not None:
            mode = "training" if graph.training else "evaluation"
            shapes = [tuple(x.shape) for x in sample]
            raise CaptureError(
                f"{_name(record)} computes something else than what torch.export sees of it: in {mode}, on inputs of "
                f"shapes {shapes}, {difference}"
            )


def _sample(record: CallRecord, size: int) -> list[Tensor] | None:
    """The example inputs, a little changed, at another batch size; `None` if no input depends on it."""
    first, last = record.inputs[0], record.inputs[-1]
    if all(x.shape == y.shape for x, y in zip(first, last, strict=True)):
        return None
    generator = torch.Generator().manual_seed(size)
    resized = []
    for x, y in zip(first, last, strict=True):
        for dim, (n, wanted) in enumerate(zip(x.shape, shape_at(size, x, y), strict=True)):
            if n != wanted:
                x = x.index_select(dim, torch.arange(wanted, device=x.device) % n)
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator).to(x)
            x = x + PERTURBATION * noise * (x.std() if x.numel() > 1 else 1.0)
        resized.append(x)
    return resized


def _name(call: CallRecord) -> str:
    return call.path or type(call.module).__name__


def _nothing(model: nn.Module) -> str:
    return f"{type(model).__name__} calls none of its children: there is nothing to quantize."


def _report_float(model: nn.Module, errors: dict[str, CaptureError]) -> None:
    """Say once what the model computes around its captured parts, and why."""
    reasons = "; ".join(str(error).partition(". Leave it")[0].partition("; leave it")[0] for error in errors.values())
    logger.warning(
        "%s: the code of %s itself stays float, the parts that it calls are quantized. %s.",
        type(model).__name__,
        ", ".join(path or "the model" for path in errors),
        reasons,
    )
