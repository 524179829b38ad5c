"""Capture: each child that a task model calls (or a whole plain module) becomes FX graphs, by `torch.export`.

The model's own class keeps running around the graphs, so losses, configs and `save_pretrained` stay what they were. A
part that cannot be captured, or whose graph computes something else, keeps running its own Python code; the parts that
it calls are captured instead.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.call_record import CallRecord, Search
from hf_qat.graph.capture.clean import Constants, copy_outputs
from hf_qat.graph.capture.dry_run import dry_runs, whole_call
from hf_qat.graph.capture.exporting import export_call
from hf_qat.graph.capture.inputs import Inputs, TwoSizes, accepts_labels, labels_in
from hf_qat.graph.capture.links import links
from hf_qat.graph.capture.losses import returns_loss
from hf_qat.graph.capture.modes import ready_for_capture
from hf_qat.graph.capture.proof import prove, runs
from hf_qat.graph.capture.ways import Rehearsals, Way, rehearsals, stored_way
from hf_qat.graph.captured import CapturedModule, install
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.progress import progress
from hf_qat.graph.user_hooks import user_hooks, without_user_hooks
from hf_qat.quantization.class_swap import require_free_names


logger = logging.getLogger(__name__)

#: Graphs that one part may have: each is exported and proven, which takes time.
MAX_GRAPHS = 8


@dataclass(frozen=True)
class FurtherCall:
    """A call of one part, beyond those that the model itself shows.

    Attributes:
        path: of the part.
        training: its mode.
        calls: `(args, kwargs)` of two sizes, of tensors without values.
    """

    path: str
    training: bool
    calls: Sequence[tuple[list[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Parts:
    """Which parts of a model are captured.

    Attributes:
        excluded: says of a module path whether it stays float, and is not looked into.
        paths: exactly these are captured, unproven, as a checkpoint says; `None`: what proves to be possible.
        training: capture training, too.
        labelled_calls: of parts, what a checkpoint has kept of how labels made training call them: the mode, and the
            calls (see `CapturedGraph`).
        further: a call that must be captured, too; its graph is the last one of its part.
    """

    excluded: Callable[[str], bool] = lambda path: False
    paths: Collection[str] | None = None
    training: bool = True
    labelled_calls: Mapping[str, Sequence[tuple[bool, Any]]] = field(default_factory=dict)
    further: FurtherCall | None = None


@dataclass
class _Candidate:
    """A part on its way: how it is called, its graphs, and the constants that these need."""

    call: CallRecord
    graphs: list[CapturedGraph]
    constants: Constants


def capture(
    model: nn.Module, inputs: Inputs | TwoSizes, parts: Parts | None = None, labels: Mapping[str, Any] | None = None
) -> dict[str, CapturedModule]:
    """Turn the children that `model` calls into captured modules, in place.

    Args:
        model: any module; one whose forward takes `labels` is captured by its children, another as a whole. Where a
            part cannot be captured, its own children are, and the rest of it stays float.
        inputs: example inputs; the first axis of every tensor is the batch.
        parts: which parts to capture; all that prove to be possible if left out.
        labels: what training passes beside, and inference does not; those of the usual names may be among `inputs`.

    Returns:
        The captured modules by path ("" for the model itself), in the order in which they are first called; their
        `producer_of_input` links an input to the output of an earlier one.

    Raises:
        CaptureError: nothing can be captured; with the part and the reason.
    """
    parts = Parts() if parts is None else parts
    with ready_for_capture(model), _garbage_kept():
        candidates = _candidates(model, inputs, {**labels_in(inputs), **(labels or {})}, parts)
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


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Inside, Python looks for no garbage: among the small objects of an export, that takes an eighth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _candidates(
    model: nn.Module, inputs: Inputs | TwoSizes, labels: Mapping[str, Any], parts: Parts
) -> list[_Candidate]:
    """The parts that can be captured: the whole, or the children, or where that fails, the next finer parts."""
    errors: dict[str, CaptureError] = {}
    if _starts_whole(model, inputs, labels, parts):
        call = whole_call(model, inputs)
        try:
            with progress("Capturing", 1, "part") as bar:
                whole = _try(call, [Way(False, call), Way(True, call)], parts)
                bar.update()
            return [whole]
        except CaptureError as error:
            if parts.paths is not None:
                raise
            errors[""] = error
    found: dict[str, _Candidate] = {}
    search = Search(parts.excluded, {""} if parts.paths is None else _ancestors(parts.paths))
    while True:
        calls, search = dry_runs(model, inputs, search)
        calls = [call for call in calls if _is_wanted(call.path, parts)]
        seen = rehearsals(model, inputs, labels, search) if parts.training else Rehearsals(None, {})
        losses = seen.with_loss() | {call.path for call in calls if call.has_loss}
        if losses and parts.paths is None:  # their own code goes on computing these
            search = Search(parts.excluded, {*search.opened, *losses})
            continue
        failed = _try_all([call for call in calls if call.path not in {*found, *errors}], seen, parts, found)
        errors |= failed
        search = Search(parts.excluded, {*search.opened, *failed})
        if not failed:
            break
    captured = [call for call in calls if call.path in found]
    if not captured and parts.paths is None:
        none = f"{type(model).__name__} calls none of its children: there is nothing to quantize."
        raise next(iter(errors.values()), CaptureError(none))
    if errors:
        _report_float(model, errors)
    # With the records of the last dry run, in which outputs of one part are inputs of another.
    return [replace(found[call.path], call=call) for call in captured]


def _try_all(
    calls: list[CallRecord], seen: Rehearsals, parts: Parts, found: dict[str, _Candidate]
) -> dict[str, CaptureError]:
    """Add to `found`, by path, the parts that can be captured; returns why the others cannot.

    Raises:
        CaptureError: one that a checkpoint asks for cannot.
    """
    failed: dict[str, CaptureError] = {}
    with progress("Capturing", len(calls), "part") as bar:
        for call in calls:
            try:
                found[call.path] = _try(call, seen.ways(call), parts)
            except CaptureError as error:
                if parts.paths is not None:
                    raise
                failed[call.path] = error
            bar.update()
    return failed


def _starts_whole(model: nn.Module, inputs: Inputs | TwoSizes, labels: Mapping[str, Any], parts: Parts) -> bool:
    if parts.paths is not None:
        return "" in parts.paths
    return not accepts_labels(model, labels) and not returns_loss(model, inputs, labels)


def _ancestors(paths: Collection[str]) -> set[str]:
    """The modules around those at `paths`, whose own Python code runs."""
    return {""} | {path[:dot] for path in paths for dot, letter in enumerate(path) if letter == "."}


def _is_wanted(path: str, parts: Parts) -> bool:
    return parts.paths is None or path in parts.paths


def _try(call: CallRecord, ways: list[Way], parts: Parts) -> _Candidate:
    """Export a part in every way in which it is called, and prove it.

    Raises:
        CaptureError: it cannot be exported, or computes something else than its graph.
    """
    _require_no_hooks(call)
    require_free_names(call.module, CapturedModule)
    if len(ways) > MAX_GRAPHS:
        raise CaptureError(
            f"{_name(call)} is called in {len(ways)} ways (other arguments, or numbers of axes), and may have "
            f"{MAX_GRAPHS} graphs"
        )
    constants = Constants(call.module)
    graphs: list[CapturedGraph] = []
    proves = parts.paths is None and not _is_on_meta(call.module)
    with without_user_hooks(call.module):
        for way in ways:
            graph = _graph_of(way, graphs, constants) if parts.training or not way.training else None
            if graph is not None:
                graph.labelled_calls = way.labelled_calls()
                graphs.append(graph)
                if proves:
                    prove(_name(call), way.calls, graph, constants.values)
        graphs += _stored_graphs(call, graphs, parts, constants)
        if parts.further is not None and parts.further.path == call.path:
            graphs.append(_further_graph(call, graphs, parts.further, constants))
    return _Candidate(call, graphs, constants)


def _stored_graphs(
    call: CallRecord, graphs: list[CapturedGraph], parts: Parts, constants: Constants
) -> list[CapturedGraph]:
    """The graphs of calls that a checkpoint has kept; a labelled step says what is the matter where there is none."""
    found: list[CapturedGraph] = []
    for training, calls in parts.labelled_calls.get(call.path, ()):
        if training and not parts.training:
            continue
        try:
            way = stored_way(call, training, calls)
            graph = _graph_of(way, [*graphs, *found], constants)
        except (CaptureError, TypeError) as error:
            logger.warning("A call of %s that labels make cannot be captured again: %s", _name(call), error)
            continue
        if graph is not None:
            graph.labelled_calls = way.labelled_calls()
            found.append(graph)
    return found


def _further_graph(
    call: CallRecord, graphs: list[CapturedGraph], further: FurtherCall, constants: Constants
) -> CapturedGraph:
    """The graph of a call beyond those that the model itself shows, proven.

    Raises:
        CaptureError: it cannot become one.
    """
    way = stored_way(call, further.training, further.calls)
    graph = _graph_of(way, graphs, constants)
    if graph is None:
        raise CaptureError(f"{_name(call)} is called as it was before, or does not run.")
    prove(_name(call), way.calls, graph, constants.values)
    return graph


def _graph_of(way: Way, graphs: list[CapturedGraph], constants: Constants) -> CapturedGraph | None:
    """The graph of one way; `None` where an earlier one takes its tensors, or the part computes nothing in training.

    Batch norm without an epsilon, for instance, does not train.

    Raises:
        CaptureError: it does, and cannot be exported.
    """
    record = way.calls
    of_mode = [graph for graph in graphs if graph.training == way.training]
    if all(any(graph.takes(record.module, record.signatures[0], x) for graph in of_mode) for x in record.inputs):
        return None
    constants.begin_graph()
    try:
        return export_call(record, way.training, constants)
    except CaptureError:
        if not way.training or runs(record.module, record.signatures[0], record.inputs[0], training=True):
            raise
        return None


def _require_no_hooks(call: CallRecord) -> None:
    """A hook on a module inside is called by Python alone; on the part itself it goes on being called."""
    for path, module in call.module.named_modules():
        if path and user_hooks(module):
            raise CaptureError(f"{_name(call)} contains {path}, which has hooks: they are called by Python code only")


def _is_on_meta(module: nn.Module) -> bool:
    return any(tensor.device.type == "meta" for tensor in (*module.parameters(), *module.buffers()))


def _name(call: CallRecord) -> str:
    return call.path or type(call.module).__name__


def _report_float(model: nn.Module, errors: dict[str, CaptureError]) -> None:
    """Say once what the model computes around its captured parts, and why."""
    reasons = "; ".join(str(error).partition(". Leave it")[0].partition("; leave it")[0] for error in errors.values())
    logger.warning(
        "%s: the code of %s itself stays float, the parts that it calls are quantized. %s.",
        type(model).__name__,
        ", ".join(path or "the model" for path in errors),
        reasons,
    )
