"""What a training step costs, in time and memory, relative to the float model's: ours and the peers', side by side.

    python -m tests.benchmarks.peers.steps --model resnet18 --threads 1 --threads 2 --rounds 9 --json steps.json
    python -m tests.benchmarks.peers.steps --model resnet18 --device cuda --size 224 --batch 128 --bf16

The nets, the steps, the order of measuring and the columns are those of `step_ratio`; each peer has the target int8 by
its own recipe. `rounded` counts the tensors that are rounded, of weights and of activations: peers that round fewer do
less work. On a GPU both times are on the clock, after it has ended.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hf_qat.cli.demo.run import quiet
from hf_qat.quantization.quantizer import FakeQuantize
from tests.benchmarks.peers.peer import TARGETS, Logits
from tests.benchmarks.peers.registry import PEERS
from tests.benchmarks.peers.rows import Scored, version_of
from tests.benchmarks.step_ratio import (
    HEAD,
    MODELS,
    MODES,
    WARM_UP,
    Seconds,
    Variant,
    line,
    quantized,
    random_labels,
    row,
)


#: Of `step_ratio`: the default; scales frozen, too, as ModelOpt's are; batch norm live, as most peers have it.
OURS = ("learned, BN frozen", "both frozen", "learned, BN live")


@dataclass
class Contestant(Variant):
    """A variant on any device.

    Attributes:
        rounded: tensors of weights and of activations.
        bf16: steps are under autocast.
    """

    rounded: tuple[int, int] = (0, 0)
    bf16: bool = False

    def step(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            super().step()

    def seconds(self) -> Seconds:
        """What one step takes."""
        if self.pixels.device.type != "cuda":
            return super().seconds()
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        passed = time.perf_counter() - began
        return Seconds(passed, passed)

    def peak_memory(self) -> int:
        """Bytes at the highest point of a step, without what other models hold."""
        if self.pixels.device.type != "cuda":
            return super().peak_memory()
        self.optimizer.zero_grad()
        others = torch.cuda.memory_allocated() - sum(
            t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())
        )
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - others


def rounded_by_us(model: nn.Module) -> tuple[int, int]:
    """Tensors of weights and of activations."""
    names = [name for name, each in model.named_modules() if isinstance(each, FakeQuantize)]
    weights = sum(name.endswith("weight_quantizer") for name in names)
    return weights, len(names) - weights


def contestants(options: argparse.Namespace, name: str) -> Iterator[Contestant | dict[str, object]]:
    """The float model first; a row of what is known in place of a peer that fails."""
    make, size, batch = MODELS[name]
    size, batch = options.size or size, options.batch or batch
    torch.manual_seed(0)
    model = make().to(options.device)
    pixels = torch.randn(batch, 3, size, size, device=options.device)
    labels = random_labels(model, pixels)
    yield Contestant("float", model, pixels, labels, bf16=options.bf16)
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for mode in OURS if has_norm else OURS[:2]:
        made = quantized(model, pixels, MODES[mode])
        yield Contestant(f"hf_qat, {mode}", made, pixels, labels, rounded_by_us(made), options.bf16)
    for peer in (PEERS[name] for name in options.peers if importlib.util.find_spec(PEERS[name].module)):
        try:
            with quiet():
                made = peer.quantize(Logits(copy.deepcopy(model)).eval(), [pixels], TARGETS["int8"])
                made = Contestant(peer.name, Scored(made), pixels, labels, peer.quantizers(made), options.bf16)
                made.step()
            yield made
        except Exception as error:
            yield failure(name, peer.name, error)


def measure(options: argparse.Namespace, name: str) -> Iterator[dict[str, object]]:
    """Rows of one net: a round is a step of each, as in `step_ratio`; who fails is left out from then on."""
    made = list(contestants(options, name))
    failed = [each for each in made if isinstance(each, dict)]
    running = [each for each in made if isinstance(each, Contestant)]
    for threads in options.threads or [1]:
        torch.set_num_threads(threads)
        times: dict[str, list[Seconds]] = {each.name: [] for each in running}
        for number in range(-WARM_UP, options.rounds):
            shift = number % len(running)  # nobody always runs after the same neighbour
            for each in running[shift:] + running[:shift]:
                try:
                    passed = each.seconds()
                except Exception as error:
                    failed.append(failure(name, each.name, error))
                    running.remove(each)
                else:
                    times[each.name] += [passed] * (number >= 0)
        memory = {each.name: each.peak_memory() for each in running}
        for each in running:
            yield {"model": name, "threads": threads, **row(each.name, times, memory), "rounded": list(each.rounded)}
    yield from failed


def failure(model: str, name: str, error: Exception) -> dict[str, object]:
    """The row of a peer that fails."""
    return {"model": model, "mode": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def shown(result: dict[str, object]) -> str:
    """A row of the table."""
    if "error" in result:
        return f"{result['model']:<14} {'':>7}  {result['mode']:<27} fails: {result['error']}"
    weights, activations = result["rounded"]  # type: ignore[misc]
    return f"{line(result)} {f'{weights}+{activations}':>9}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen models, print a table, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times; default: all")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9, help="steps of each, at least 2; default: 9")
    parser.add_argument("--threads", type=int, action="append", help="may be given several times; default: 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, help="of images; default: that of step_ratio")
    parser.add_argument("--batch", type=int, help="default: that of step_ratio")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    options = parser.parse_args(argv)
    present = [peer for peer in PEERS.values() if importlib.util.find_spec(peer.module)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, **{key: each for p in present for key, each in version_of(p).items()}}
    print(f"{HEAD} {'rounded':>9}")
    results: list[dict[str, object]] = []
    for name in options.model or MODELS:
        for result in measure(options, name):
            results.append(result)
            print(shown(result), flush=True)
            if options.json:
                about = {"device": device, "bf16": options.bf16, "versions": versions, "results": results}
                options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
