"""How the costs of quantizing grow with depth, width, resolution and batch of a ResNet.

    python -m tests.benchmarks.scaling --json scaling.json

Each row is one net: CPU seconds on one thread of `prepare_qat`, `calibrate` and `export_onnx` (the file is not run),
and a training step relative to the float model's (the default recipe, the least of several steps of each, in turn). A
slope is that of the logarithm of a cost over the logarithm of what grows: 1 is in proportion, 0 not at all.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, freeze_batch_norm, prepare_qat
from tests.benchmarks.step_ratio import Variant


#: Layers of a block of each size, by the number in the name of the net.
DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}

#: From so many layers on, blocks have a bottleneck.
BOTTLENECK = 50


@dataclass(frozen=True)
class Point:
    """A net and its batch; `width` is the number of channels of the first stage."""

    depth: int = 18
    width: int = 32
    resolution: int = 64
    batch: int = 4

    def make(self) -> nn.Module:
        """With random weights."""
        deep = self.depth >= BOTTLENECK
        config = transformers.ResNetConfig(
            embedding_size=self.width,
            hidden_sizes=[self.width * (4 if deep else 1) * 2**stage for stage in range(4)],
            depths=DEPTHS[self.depth],
            layer_type="bottleneck" if deep else "basic",
            num_labels=10,
        )
        return transformers.ResNetForImageClassification(config)


#: What grows → its sizes, the others being as they are in `Point`.
AXES = {"depth": list(DEPTHS), "width": [16, 32, 64, 128], "resolution": [64, 128, 256], "batch": [2, 8, 32]}


@dataclass(frozen=True)
class Costs:
    """Of one point: CPU seconds, and our step by float's."""

    prepare: float
    calibrate: float
    export: float
    float_step: float
    step_ratio: float


def measure(point: Point, steps: int) -> Costs:
    """All costs of a net."""
    torch.manual_seed(0)
    model, pixels = point.make(), torch.randn(point.batch, 3, point.resolution, point.resolution)
    batch, labels = {"pixel_values": pixels}, torch.randint(10, (point.batch,))
    net = copy.deepcopy(model).eval()
    prepare = seconds(lambda: prepare_qat(net, QATConfig("int8"), batch))
    calibration = seconds(lambda: calibrate(net, [batch], bias_correction=False))
    freeze_batch_norm(net)
    pair = [Variant("float", model, pixels, labels), Variant("QAT", net, pixels, labels)]
    times = [[each.seconds().cpu for each in pair] for _ in range(steps + 1)][1:]  # the first makes buffers
    of_float, ours = (min(column) for column in zip(*times, strict=True))
    convert(net)
    with tempfile.TemporaryDirectory() as folder:
        export = seconds(lambda: export_onnx(net, Path(folder) / "net.onnx", batch, verify=False))
    return Costs(prepare, calibration, export, of_float, ours / of_float)


def seconds(work: Callable[[], object]) -> float:
    """CPU time that it takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rows(axes: Sequence[str], steps: int) -> Iterator[tuple[str, int, Costs]]:
    """What grows, its size, and the costs; modules are loaded and loops compiled before."""
    measure(Point(), 1)
    for axis in axes:
        for size in AXES[axis]:
            yield axis, size, measure(Point(**{axis: size}), steps)


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Of the line of least squares through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=5, help="of each model; default: 5")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(Costs.__dataclass_fields__)
    print(f"{'':<12}{'':>6}" + "".join(f"{name:>12}" for name in names))
    found: list[tuple[str, int, Costs]] = []
    for axis, size, costs in rows(arguments.axes, arguments.steps):
        found.append((axis, size, costs))
        print(f"{axis:<12}{size:>6}" + "".join(f"{getattr(costs, name):>12.3f}" for name in names), flush=True)
    for axis in arguments.axes:
        of_axis = [(size, asdict(costs)) for name, size, costs in found if name == axis]
        sizes = [size for size, _ in of_axis]
        slopes = [slope(sizes, [costs[name] for _, costs in of_axis]) for name in names]
        print(f"{axis:<12}{'slope':>6}" + "".join(f"{each:>12.2f}" for each in slopes))
    if arguments.json:
        listed = [{"axis": axis, "size": size, **asdict(costs)} for axis, size, costs in found]
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
