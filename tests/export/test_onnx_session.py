"""What a session was opened with, as ONNX Runtime says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from onnxruntime import GraphOptimizationLevel

from hf_qat.export.onnx_session import open_session


@pytest.mark.parametrize(
    ("optimized", "level"),
    [(True, GraphOptimizationLevel.ORT_ENABLE_ALL), (False, GraphOptimizationLevel.ORT_DISABLE_ALL)],
)
def test_a_session_of_a_file_or_of_its_bytes_has_what_was_asked_for(optimized: bool, level: object, tmp_path: Path):
    graph = parser.parse_graph("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "neg.onnx")
    for source in (str(tmp_path / "neg.onnx"), model.SerializeToString()):
        session = open_session(source, optimized, threads=1, entries={"session.qdqisint8allowed": "1"})
        (y,) = session.run(None, {"x": np.array([1, -2], np.float32)})
        options = session.get_session_options()
        assert y.tolist() == [-1, 2] and session.get_providers() == ["CPUExecutionProvider"]
        assert (options.graph_optimization_level, options.intra_op_num_threads) == (level, 1)
        assert options.log_severity_level == 3
        assert options.get_session_config_entry("session.qdqisint8allowed") == "1"
