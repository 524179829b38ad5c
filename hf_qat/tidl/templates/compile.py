"""Compile this model with TI's tools: on x86-64 Linux, with onnxruntime-tidl and TIDL_TOOLS_PATH set; see README.md.

    python compile.py

Everything comes from runtime_options.json, model/ and calibration/; the result goes to artifacts/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


PROVIDER = "TIDLCompilationProvider"

#: What TI's compiler leaves behind for the board, besides logs and drawings.
PARTS = ("*_tidl_net.bin", "*_tidl_io_*.bin", "allowedNode.txt", "onnxrtMetaData.txt")

#: Written beside them when all is there, so that the artifacts can be told to belong to this very model.
RECORD = "compiled_from.json"


def main() -> None:
    """Compile, and leave a record of what was compiled."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debug-level", type=int, help="TIDL's debug_level, 0 to 6")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    settings = json.loads((here / "runtime_options.json").read_text(encoding="utf-8"))
    tools_path = tools(settings, onnxruntime)
    artifacts = empty_folder(here / "artifacts")
    options = {"tidl_tools_path": tools_path, "artifacts_folder": str(artifacts)}
    options.update(settings["compile"])
    if arguments.debug_level is not None:
        options["debug_level"] = arguments.debug_level
    model = here / settings["model"]
    session_options = onnxruntime.SessionOptions()
    if settings["disable_optimizations"]:
        session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(model),
        providers=[PROVIDER, "CPUExecutionProvider"],
        provider_options=[options, {}],
        sess_options=session_options,
    )
    frames = sorted((here / "calibration").glob("*.npz"))
    for position, frame in enumerate(frames, start=1):
        with np.load(frame) as inputs:
            session.run(None, dict(inputs))
        print("frame", position, "of", len(frames))
    del session  # TIDL writes the last files when the session ends

    missing = [part for part in PARTS if not list(artifacts.glob(part))]
    if missing:
        sys.exit("TIDL did not write " + ", ".join(missing) + ": see the messages above; --debug-level 1 prints more")
    record = {"model": settings["model"], "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    record["target"] = settings["target"]
    record["onnxruntime"] = onnxruntime.__version__
    (artifacts / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("compiled to", artifacts)


def tools(settings: dict[str, Any], onnxruntime: ModuleType) -> str:
    """Where TI's tools are."""
    path = os.environ.get("TIDL_TOOLS_PATH")
    if not path:
        sys.exit("TIDL_TOOLS_PATH is not set: set up edgeai-tidl-tools for " + settings["soc"] + "; see README.md")
    if PROVIDER not in onnxruntime.get_available_providers():
        sys.exit("this is not TI's onnxruntime: it has no " + PROVIDER + "; see README.md")
    return path


def empty_folder(path: Path) -> Path:
    """Made, unless it is there and empty."""
    if path.exists() and any(path.iterdir()):
        sys.exit(str(path) + " is not empty, and TIDL wants it so: move it away first")
    path.mkdir(exist_ok=True)
    return path


if __name__ == "__main__":
    main()
