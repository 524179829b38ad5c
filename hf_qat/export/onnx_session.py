"""Sessions of ONNX Runtime: on the CPU, and silent but for errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


#: ONNX Runtime's number for errors, of which it logs no less.
ERRORS = 3


def open_session(source: str | bytes, optimized: bool, threads: int, entries: Mapping[str, str]) -> Any:
    """An `onnxruntime.InferenceSession`.

    Args:
        source: path of a file, or what it holds.
        optimized: whether ONNX Runtime's optimizations are on.
        threads: for one operator; 0 for as many as there are cores.
        entries: session options by name, such as `session.qdqisint8allowed`.
    """
    import onnxruntime

    levels, options = onnxruntime.GraphOptimizationLevel, onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = ERRORS
    options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
