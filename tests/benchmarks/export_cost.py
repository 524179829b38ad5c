"""How long `export_onnx` takes on converted models of real size, next to PyTorch's export of the float model.

    python tests/benchmarks/export_cost.py --rounds 3

Each figure is of a process of its own, in which a single convolution was exported before so that modules are loaded,
the least of several; seconds of one CPU thread, so that what else runs does not count. Float is
`torch.onnx.export(model, dynamo=True)`, which returns a program in memory, and then `save` of it, which writes the
weights to a file beside the ONNX file. Ours writes the file, and by default also compares it with the model on ONNX
Runtime. The first ratio is ours unverified to float in memory, the second ours verified to float saved.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from capture_cost import MODELS
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat


#: What PyTorch 2.13 exports in float: it fails on Swin-T, for which it has no figure to compare with.
EXPORTED = ["ViT-B/16", "ResNet-50"]


class Logits(nn.Module):
    """A model that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) → logits."""
        logits: Tensor = self.model(pixel_values).logits
        return logits


def measure(name: str, kind: str) -> dict[str, float]:
    """Export one model once; `kind` is "float", "unverified" or "verified"."""
    make, size = MODELS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, pixels = make().eval(), torch.randn(1, 3, size, size)
    if kind != "float":
        batch = {"pixel_values": pixels}
        model = convert(calibrate(prepare_qat(model, QATConfig("int8"), batch), [batch]))
    torch.onnx.export(nn.Conv2d(3, 4, 3), (pixels,), dynamo=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.process_time()
        if kind != "float":
            export_onnx(model, path, batch, verify=kind == "verified")
            return {kind: time.process_time() - start}
        program = torch.onnx.export(Logits(model), (pixels,), dynamo=True, verbose=False)
        assert program is not None
        exported = time.process_time() - start
        program.save(path, external_data=True)
        return {"float": exported, "saved": time.process_time() - start}


def main() -> None:
    """Measure models in processes of their own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per model and kind; default: 3")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=EXPORTED, help=f"default: {' '.join(EXPORTED)}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    columns = ("float", "saved", "unverified", "verified")
    print(f"{'model':<14}" + "".join(f"{f'{column} s':>14}" for column in columns) + f"{'ratios':>14}")
    for name in arguments.models:
        least: dict[str, float] = {}
        for _ in range(arguments.rounds):
            for kind in ("float", "unverified", "verified"):
                command = [sys.executable, __file__, "--child", name, kind]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                for column, seconds in json.loads(run.stdout.splitlines()[-1]).items():
                    least[column] = min(seconds, least.get(column, seconds))
        ratios = f"{least['unverified'] / least['float']:.2f}, {least['verified'] / least['saved']:.2f}"
        print(f"{name:<14}" + "".join(f"{least[c]:>14.1f}" for c in columns) + f"{ratios:>14}", flush=True)


if __name__ == "__main__":
    main()
