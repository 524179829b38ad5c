"""A stand-in for TI's onnxruntime. Its results are ONNX Runtime's on the CPU, not TIDL's."""

from __future__ import annotations

import copy
import runpy
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import pytest


@dataclass
class StandIn:
    """In place of TI's onnxruntime: its provider names run on the CPU, and what they are given is kept.

    What it writes as artifacts are files of the documented names that hold nothing but its own name.
    """

    sessions: list[dict] = field(default_factory=list)
    writes: tuple[str, ...] = (
        "subgraph_0_tidl_net.bin",
        "subgraph_0_tidl_io_1.bin",
        "allowedNode.txt",
        "onnxrtMetaData.txt",
    )

    def module(self) -> types.ModuleType:
        """What `import onnxruntime` gives."""
        made = types.ModuleType("onnxruntime")
        made.SessionOptions = onnxruntime.SessionOptions
        made.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel
        made.__version__ = "1.15.0"
        made.get_available_providers = lambda: [
            "TIDLCompilationProvider",
            "TIDLExecutionProvider",
            "CPUExecutionProvider",
        ]
        made.InferenceSession = self.open
        return made

    def open(self, path: str, providers: list, provider_options: list | None = None, sess_options: object = None):
        """As `onnxruntime.InferenceSession`, for sessions with TI's providers."""
        options = copy.deepcopy(provider_options)
        record = {"path": path, "providers": providers, "options": options, "frames": []}
        record["level"] = copy.copy(sess_options.graph_optimization_level)
        self.sessions.append(record)
        return _Session(self, record, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))

    def run(self, script: Path, *arguments: str) -> None:
        """Run a script of a bundle as a program."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", self.module())
            patch.setattr(sys, "argv", [script.name, *arguments])
            runpy.run_path(str(script), run_name="__main__")


class _Session:
    def __init__(self, owner: StandIn, record: dict, session: onnxruntime.InferenceSession) -> None:
        self.owner, self.record, self.session = owner, record, session
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def run(self, names: list | None, inputs: dict) -> list:
        self.record["frames"].append(inputs)
        options = (self.record["options"] or [{}])[0]
        wanted = options.get("advanced_options:calibration_frames")
        if self.record["providers"][0] == "TIDLCompilationProvider" and len(self.record["frames"]) == wanted:
            for name in self.owner.writes:
                (Path(options["artifacts_folder"]) / name).write_text("stand-in")
        return self.session.run(names, inputs)
