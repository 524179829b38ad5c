"""How long `prepare_qat` takes on models of real size, and how much memory at its highest point.

    python tests/benchmarks/capture_cost.py --rounds 3

Each figure is of a process of its own, the least of several. Capture is the part of `prepare_qat` that turns modules
into graphs; seconds are of one CPU thread, so that what else runs does not count. Memory is the resident size of the
process at its highest point, above what it was with the float model built, next to the size of that model's weights.

Against the commit before capture had two graphs and a proof of each (dc9652b), alternating, `prepare_qat` takes
ResNet-50 3.8 s for 2.0 (1.9 times), ViT-B/16 4.9 for 3.4 (1.4), Swin-T 8.4 for 4.5 (1.9), SegFormer-B0 8.0
for 4.6 (1.8).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import transformers
from torch import nn

from hf_qat import prepare_qat
from hf_qat.model import prepare


MIB = 2**20


def resnet50() -> nn.Module:
    """25.6 M parameters; the defaults of its config."""
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def vit_base() -> nn.Module:
    """86.6 M parameters, patches of 16 pixels; the defaults of its config."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


def swin_tiny() -> nn.Module:
    """28.3 M parameters; the defaults of its config."""
    return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000))


def segformer_b0() -> nn.Module:
    """3.8 M parameters; the defaults of its config, at 512 pixels."""
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=150))


#: Name → how to make the model, size of its square images.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-50": (resnet50, 224),
    "ViT-B/16": (vit_base, 224),
    "Swin-T": (swin_tiny, 224),
    "SegFormer-B0": (segformer_b0, 512),
}


def measure(name: str) -> dict[str, float]:
    """Prepare one model, once."""
    make, size = MODELS[name]
    torch.set_num_threads(1)
    model, pixels = make().eval(), torch.randn(1, 3, size, size)
    seconds: list[float] = []
    original = prepare.capture

    def timed(*args: object, **kwargs: object) -> object:
        start = time.process_time()
        captured = original(*args, **kwargs)
        seconds.append(time.process_time() - start)
        return captured

    before = resident_peak()
    with mock.patch.object(prepare, "capture", timed):
        start = time.process_time()
        prepare_qat(model, example_inputs={"pixel_values": pixels})
        total = time.process_time() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    return {"capture": seconds[0], "prepare": total, "peak_mib": (resident_peak() - before) / MIB, "weights": weights}


def resident_peak() -> int:
    """Bytes; of this process, so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure all models in processes of their own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per model; default: 3")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    print(f"{'model':<14} {'capture s':>9} {'prepare s':>9} {'peak MiB':>9} {'weights MiB':>11}")
    for name in MODELS:
        command = [sys.executable, __file__, "--child", name]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(arguments.rounds)]
        found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
        capture, prepared, peak, weights = (min(run[key] for run in found) for key in found[0])
        print(f"{name:<14} {capture:>9.1f} {prepared:>9.1f} {peak:>9.0f} {weights:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
