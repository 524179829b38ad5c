"""What an exported file costs beside the same file in float: bytes, and time on ONNX Runtime on this CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from hf_qat.export.cleanup import drop_dead_nodes, drop_unused_values
from hf_qat.export.onnx_graph import OnnxGraph, get_attribute
from hf_qat.export.onnx_layers import without_rounding
from hf_qat.export.onnx_session import open_session


#: Both files take an image in turn: so often before time is taken, at most so often after, or so many seconds long.
WARM_UP, ROUNDS, SECONDS = 3, 50, 5.0


@dataclass(frozen=True)
class RuntimeCost:
    """A file, and the same file in float: without rounding, and with weights of four bytes.

    Attributes:
        float_bytes, bytes: sizes of the two.
        float_ms, ms: milliseconds for an image: medians, on one thread of the CPU that this runs on.
    """

    float_bytes: int
    bytes: int
    float_ms: float
    ms: float


def runtime_cost(
    path: Path, inputs: Mapping[str, np.ndarray[Any, Any]], session_options: Mapping[str, str]
) -> RuntimeCost | None:
    """Measure an exported file; `None` if `inputs` are not what it takes, or it takes several images at once only.

    Args:
        path: of the file.
        inputs: of one image, by the names of the file: (1, …) each.
        session_options: without which ONNX Runtime does not load it, as `ExportReport` has them.
    """
    floating = in_float(onnx.load(path)).SerializeToString()
    opened = partial(open_session, optimized=True, threads=1, entries=session_options)
    sessions = [opened(floating), opened(str(path))]
    wanted = sessions[1].get_inputs()
    if any(value.name not in inputs or not _takes_one(value.shape) for value in wanted):
        return None
    given = {value.name: inputs[value.name] for value in wanted}
    before, after = _medians([partial(session.run, None, given) for session in sessions])
    return RuntimeCost(len(floating), path.stat().st_size, before, after)


def _takes_one(shape: list[int | str]) -> bool:
    """Whether an input of this shape is that of one image: of a batch of 1 or of any size, or a single number."""
    return not shape or shape[0] == 1 or isinstance(shape[0], str)


def in_float(model: ModelProto) -> ModelProto:
    """A copy of a Q/DQ file that computes in float: nothing is rounded, and weights are numbers instead of codes."""
    twin = without_rounding(model)
    graph = OnnxGraph(twin.graph)
    numbers = []
    for node in [node for node in twin.graph.node if node.op_type == "DequantizeLinear"]:
        codes, scale = graph.constant(node.input[0]), graph.constant(node.input[1])
        if codes is None or scale is None:
            continue
        zero_point = graph.constant(node.input[2]) if len(node.input) > 2 else None
        axis = get_attribute(node, "axis")
        shape = [1] * codes.ndim
        if scale.ndim:
            shape[1 if axis is None else int(str(axis))] = -1  # the standard's default is 1
        moved = codes.astype(np.float32) - (0 if zero_point is None else zero_point.astype(np.float32).reshape(shape))
        numbers.append(numpy_helper.from_array(moved * scale.reshape(shape), node.output[0]))
        twin.graph.node.remove(node)
    twin.graph.initializer.extend(numbers)
    drop_dead_nodes(twin)
    drop_unused_values(twin)
    return twin


def _medians(runs: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each, taken in turn, so that what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(WARM_UP):
        for run in runs:
            run()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for run, own in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            own.append(1000 * (time.perf_counter() - begun))
        if time.perf_counter() - start > SECONDS:
            break
    return [statistics.median(own) for own in times]
