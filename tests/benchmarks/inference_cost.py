"""What one image costs a converted model, in eager PyTorch and as ONNX on ONNX Runtime, against the float model.

    python tests/benchmarks/inference_cost.py --rounds 9

One thread. In each round each of them takes one image, in turn, and its time is divided by that of the float model in
the same round; the table shows the medians. In eager mode the weights are dequantized on the fly.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from load_cost import MODELS

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat


def competitors(name: str, directory: Path) -> dict[str, Callable[[], object]]:
    """The float model first."""
    torch.manual_seed(0)
    model, pixels = MODELS[name]().eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}
    converted = prepare_qat(copy.deepcopy(model), QATConfig(weights={"observer": "minmax"}), pixels)
    converted = convert(calibrate(converted, [pixels], bias_correction=False))
    export_onnx(converted, directory / "model.onnx", pixels)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    arrays = {key: value.numpy() for key, value in pixels.items()}
    return {
        "float, PyTorch": lambda: model(**pixels),
        "converted, PyTorch": lambda: converted(**pixels),
        "converted, ONNX Runtime": lambda: session.run(None, arrays),
    }


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure both models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="images; default: 9")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'model':<10} {'':<24} {'ms':>7} {'/ float':>8}")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            runs = competitors(name, Path(directory))
            times: dict[str, list[float]] = {kind: [] for kind in runs}
            for _ in range(rounds + 1):
                for kind, run in runs.items():
                    times[kind].append(seconds(run))
        base = times["float, PyTorch"][1:]
        for kind, all_of_them in times.items():
            measured = all_of_them[1:]  # the first is a warm-up
            ratio = statistics.median(mine / other for mine, other in zip(measured, base, strict=True))
            print(f"{name:<10} {kind:<24} {1000 * statistics.median(measured):>7.1f} {ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
