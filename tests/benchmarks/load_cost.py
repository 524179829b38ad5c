"""What `from_pretrained` costs of a quantized checkpoint, against the float checkpoint of the same model.

    python tests/benchmarks/load_cost.py --rounds 3

Each figure is of a process of its own, the medians of several: CPU seconds of the call, CPU seconds of the whole
process with its imports, and the resident size of the process at its highest point, right after the call and after one
image. `from_pretrained` maps a float file and reads none of it, so only the second figure has float weights in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn


MIB = 2**20


def resnet50() -> nn.Module:
    """25.6 M parameters; the defaults of its config."""
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def vit_base() -> nn.Module:
    """86.6 M parameters, patches of 16 pixels; the defaults of its config."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


#: Name → how to make the model. Images are of 224 pixels.
MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "ViT-B/16": vit_base}

KINDS = ("float", "prepared", "converted")


def save(name: str, directory: Path) -> None:
    """Write the model as a float, a training and a quantized checkpoint; the ranges are of one batch of noise."""
    from hf_qat import QATConfig, calibrate, convert, prepare_qat

    model, pixels = MODELS[name]().eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}
    model.save_pretrained(directory / "float")
    prepare_qat(model, QATConfig(weights={"observer": "minmax"}), pixels)
    calibrate(model, [pixels], bias_correction=False)
    model.save_pretrained(directory / "prepared")
    convert(model).save_pretrained(directory / "converted")


def load(directory: Path) -> dict[str, float]:
    """Load one of the three, once, and put one image through it."""
    if directory.name != "float":
        import hf_qat  # noqa: F401
    auto = transformers.AutoModelForImageClassification
    start = time.process_time()
    model = auto.from_pretrained(directory).eval()
    end = time.process_time()
    peak = peak_size()
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    return {"call": end - start, "process": end, "peak": peak, "peak_used": peak_size()}


def peak_size() -> float:
    """MiB that this process had in memory at its highest point so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def child(action: str, name: str, directory: Path) -> str:
    """What a process of its own prints last."""
    command = [sys.executable, __file__, "--child", action, name, str(directory)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed.splitlines()[-1]


def main() -> None:
    """Save each model, load it several times in each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per figure; default: 3")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        action, name, directory = arguments.child
        result = save(name, Path(directory)) if action == "save" else load(Path(directory))
        print(json.dumps(result))
        return
    print(f"{'model':<10} {'checkpoint':<10} {'call s':>7} {'process s':>9} {'peak MiB':>9} {'with an image':>13}")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            child("save", name, Path(directory))
            for kind in KINDS:
                runs = [json.loads(child("load", name, Path(directory, kind))) for _ in range(arguments.rounds)]
                call, process, peak, used = (statistics.median(run[key] for run in runs) for key in runs[0])
                print(f"{name:<10} {kind:<10} {call:>7.1f} {process:>9.1f} {peak:>9.0f} {used:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
