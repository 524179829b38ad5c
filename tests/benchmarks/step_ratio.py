"""How much a quantization-aware training step costs, in time and memory, relative to a step of the float model.

    python -m tests.benchmarks.step_ratio --model resnet18 --threads 1 --threads 2 --rounds 20 --json ratios.json

In each round every variant makes one step, in turn, and its time is divided by that of the float step of the same
round; the table shows the medians, and the quartiles around them. Seconds are of CPU time, of all threads together,
so that what else runs on the machine counts little; the last column is by the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, freeze_batch_norm, freeze_ranges, prepare_qat
from tests.benchmarks.memory import peak_bytes
from tests.models import checkpoint_layers


LABELS = 1000
LEARNING_RATE = 1e-3
WARM_UP = 3
MIB = 2**20


def resnet18() -> nn.Module:
    """11.7 M parameters."""
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=LABELS,
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet_v2() -> nn.Module:
    """3.5 M parameters, the full width."""
    return transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(image_size=64, num_labels=LABELS)
    )


def vit_small(layers: int) -> nn.Module:
    """22 M parameters with 12 layers."""
    config = transformers.ViTConfig(
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        num_labels=LABELS,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


def segformer_b0() -> transformers.PreTrainedModel:
    """3.8 M parameters; it says of each pixel what it is."""
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=150, attn_implementation="eager")
    )


#: Name → how to make the float model, size of its square images, batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (resnet18, 64, 32),
    "mobilenet_v2": (mobilenet_v2, 64, 32),
    "vit_small_6": (lambda: vit_small(6), 224, 4),
    "vit_small_12": (lambda: vit_small(12), 224, 4),
    "segformer_b0": (segformer_b0, 256, 2),
}

OBSERVED = {"learned": False, "observer": "moving_average"}


class Mode(NamedTuple):
    """Whether scales are learned, batch norm and ranges are frozen, codes are kept in place of values, and blocks are
    computed again in backward (gradient checkpointing).
    """

    learned: bool
    bn_frozen: bool
    ranges_frozen: bool = False
    save_memory: bool = False
    checkpointing: bool = False


MODES = {
    "BN live, ranges observed": Mode(False, False),
    "both frozen": Mode(False, True, ranges_frozen=True),
    "learned, BN frozen": Mode(True, True),
    "learned, BN live": Mode(True, False),
    "learned, frozen, codes kept": Mode(True, True, save_memory=True),
    "learned, frozen, blocks computed again": Mode(True, True, checkpointing=True),
}


class Seconds(NamedTuple):
    """Of CPU time, all threads together, and on the wall."""

    cpu: float
    wall: float


@dataclass
class Variant:
    """A model that makes training steps on one batch."""

    name: str
    model: nn.Module
    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        self.model(pixel_values=self.pixels, labels=self.labels).loss.backward()
        self.optimizer.step()

    def seconds(self) -> Seconds:
        """What one step takes."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.step()
        return Seconds(time.process_time() - cpu, time.perf_counter() - wall)

    def peak_memory(self) -> int:
        """Bytes at the highest point of a step: parameters, buffers and all that the step allocates."""
        self.optimizer.zero_grad()
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors) + peak_bytes(self.step)


def random_labels(model: transformers.PreTrainedModel, pixels: Tensor) -> Tensor:
    """A class for each image, or for each of its pixels: (N,), or (N, H, W)."""
    dense = isinstance(model, transformers.SegformerForSemanticSegmentation)
    shape = (len(pixels), *pixels.shape[2:]) if dense else (len(pixels),)
    return torch.randint(model.config.num_labels, shape, device=pixels.device)


def quantized(model: nn.Module, pixels: Tensor, mode: Mode) -> nn.Module:
    """A calibrated copy of the float `model`, target int8, in one of the modes."""
    scheme = {} if mode.learned else {"weights": OBSERVED, "activations": OBSERVED}
    config = QATConfig("int8", save_memory=mode.save_memory, **scheme)
    prepared = prepare_qat(copy.deepcopy(model), config, {"pixel_values": pixels[:2]})
    calibrate(prepared, [{"pixel_values": pixels}], bias_correction=False)
    freeze_batch_norm(prepared, mode.bn_frozen)
    freeze_ranges(prepared, mode.ranges_frozen)
    return checkpoint_layers(prepared) if mode.checkpointing else prepared


def _has_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def variants(name: str) -> list[Variant]:
    """The float model first, then the quantized ones; without batch norm, live and frozen are the same."""
    make, size, batch = MODELS[name]
    torch.manual_seed(0)
    model, pixels = make(), torch.randn(batch, 3, size, size)
    labels = random_labels(model, pixels)
    has_norm, can_checkpoint = _has_norm(model), model.supports_gradient_checkpointing
    modes = {name: mode for name, mode in MODES.items() if has_norm or name != "learned, BN live"}
    modes = {name: mode for name, mode in modes.items() if can_checkpoint or not mode.checkpointing}
    found = [Variant("float", model, pixels, labels)]
    if can_checkpoint:
        found.append(Variant("float, blocks computed again", checkpoint_layers(copy.deepcopy(model)), pixels, labels))
    return found + [Variant(name, quantized(model, pixels, mode), pixels, labels) for name, mode in modes.items()]


def measure(name: str, rounds: int, threads: Sequence[int]) -> Iterator[dict[str, object]]:
    """One row per mode and number of threads: medians and quartiles of the paired ratios, seconds, memory."""
    competitors = variants(name)
    for count in threads:
        torch.set_num_threads(count)
        for variant in competitors:
            for _ in range(WARM_UP):
                variant.step()
        times: dict[str, list[Seconds]] = {variant.name: [] for variant in competitors}
        for number in range(rounds):
            shift = number % len(competitors)  # nobody always runs after the same neighbour
            for variant in competitors[shift:] + competitors[:shift]:
                times[variant.name].append(variant.seconds())
        memory = {variant.name: variant.peak_memory() for variant in competitors}
        yield from ({"model": name, "threads": count, **row(mode, times, memory)} for mode in times)


def row(mode: str, times: dict[str, list[Seconds]], memory: dict[str, int]) -> dict[str, object]:
    """The results of one variant; the ratios of the float model are 1."""
    pairs = list(zip(times[mode], times["float"], strict=True))
    ratios = [mine.cpu / base.cpu for mine, base in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "mode": mode,
        "seconds": statistics.median(mine.cpu for mine, _ in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "wall_ratio": statistics.median(mine.wall / base.wall for mine, base in pairs),
        "peak_mib": memory[mode] / MIB,
        "peak_ratio": memory[mode] / memory["float"],
        "rounds": len(ratios),
    }


#: What stands above the lines of `line`.
HEAD = (
    f"{'model':<14} {'threads':>7}  {'mode':<27} {'CPU s':>8} {'/ float':>7}  {'quartiles':<11}"
    f" {'peak MiB':>8} {'/ float':>7} {'wall / float':>12}"
)


def line(result: dict[str, object]) -> str:
    """A row of the table."""
    low, high = result["ratio_quartiles"]  # type: ignore[misc]
    return (
        f"{result['model']:<14} {result['threads']:>7}  {result['mode']:<27} {result['seconds']:>8.3f}"
        f" {result['ratio']:>7.3f}  {low:.3f}-{high:.3f} {result['peak_mib']:>8.0f} {result['peak_ratio']:>7.2f}"
        f" {result['wall_ratio']:>12.3f}"
    )


def main() -> None:
    """Measure the chosen models, print a table, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each variant, at least 2; default: 15")
    parser.add_argument("--threads", type=int, action="append", help="may be given several times; default: 1")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    arguments = parser.parse_args()
    print(HEAD)
    results = []
    for name in arguments.model or MODELS:
        for result in measure(name, arguments.rounds, arguments.threads or [1]):
            results.append(result)
            print(line(result), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
