"""All that is to be known of a GPU, in one run: are the kernels right, how long does a step take, how much memory.

    PYTHONPATH=. python tests/benchmarks/gpu.py --seconds 480 --json gpu.json

Nothing is downloaded. A row is printed when it is there, and the file is written anew with each, so that a run that is
cut off keeps what it has. What no time is left for is skipped. `--device cpu --tiny` tries the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_correctness
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, freeze_batch_norm, freeze_ranges, prepare_qat


LABELS = 1000
MIB = 2**20
WARM_UP = 3
ROUNDS, STEPS = 5, 4  # blocks of steps that are timed, in turn with those of the others; steps in a block

#: What compiling and timing one of the nets may need.
COMPILE_SECONDS = {"resnet50": 110, "mobilenet_v2": 100, "vit_s": 100, "resnet18": 60}

#: Without the second, a model finds it out in the first step, and a compiler compiles again.
TASK: dict[str, Any] = {"num_labels": LABELS, "problem_type": "single_label_classification"}

#: What is compiled, in the order of its weight.
COMPILED = {
    "resnet50": ["learned"],
    "mobilenet_v2": ["learned"],
    "resnet18": ["live", "frozen", "learned"],
    "vit_s": ["learned"],
}

OBSERVED = {"learned": False, "observer": "moving_average"}

#: Mode → whether batch norm and whether ranges are frozen.
MODES = {"learned": (True, False), "live": (False, False), "frozen": (True, True)}


@dataclass
class Run:
    """The options, the clock, and the rows so far."""

    device: torch.device
    tiny: bool
    seconds: float
    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.start)

    def add(self, **row: Any) -> None:
        """Print a row and write all."""
        self.rows.append(row)
        shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        shown.pop("top", None)
        print(f"[{time.monotonic() - self.start:4.0f} s]", *(f"{k}={v}" for k, v in shown.items()), flush=True)
        if self.path is not None:
            about = {"torch": torch.__version__, "device": name_of(self.device), "rows": self.rows}
            self.path.write_text(json.dumps(about, indent=1) + "\n")

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails is a row, and the run goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(part=what, failed=f"{type(error).__name__}: {error}"[:400])


def name_of(device: torch.device) -> str:
    """Of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# --- The nets --------------------------------------------------------------------------------------------------------


def resnet(tiny: bool, layer_type: str, depths: list[int]) -> nn.Module:
    """ResNet-18 or -50."""
    sizes = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    if tiny:
        sizes, depths = [16, 32], [1, 1]
    config = transformers.ResNetConfig(
        embedding_size=16 if tiny else 64, hidden_sizes=sizes, depths=depths, layer_type=layer_type, **TASK
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet(tiny: bool) -> nn.Module:
    """MobileNetV2 of full width."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.35 if tiny else 1.0, image_size=224, **TASK)
    return transformers.MobileNetV2ForImageClassification(config)


def vit(tiny: bool) -> nn.Module:
    """ViT-S/16."""
    config = transformers.ViTConfig(
        hidden_size=48 if tiny else 384,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=2 if tiny else 6,
        intermediate_size=96 if tiny else 1536,
        image_size=32 if tiny else 224,
        attn_implementation="eager",
        **TASK,
    )
    return transformers.ViTForImageClassification(config)


#: Name → how to make it, batch.
NETS: dict[str, tuple[Callable[[bool], nn.Module], int]] = {
    "resnet50": (lambda tiny: resnet(tiny, "bottleneck", [3, 4, 6, 3]), 128),
    "mobilenet_v2": (mobilenet, 128),
    "vit_s": (vit, 128),
    "resnet18": (lambda tiny: resnet(tiny, "basic", [2, 2, 2, 2]), 64),
}


class Variant:
    """A model that makes training steps under autocast."""

    def __init__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
        self.model, self.run, self.pixels, self.labels = model.train(), model, pixels, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        """Forward, backward, update."""
        with torch.autocast(self.pixels.device.type, torch.bfloat16):
            loss = self.run(pixel_values=self.pixels, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Of the batch, without an update: the loss, and the gradients of all parameters as one vector."""
        with torch.autocast(self.pixels.device.type, torch.bfloat16):
            loss = self.run(pixel_values=self.pixels, labels=self.labels).loss
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad()
        return float(loss.detach()), torch.cat(gradients)

    def set_mode(self, mode: str) -> None:
        """Of a prepared model."""
        bn_frozen, ranges_frozen = MODES[mode]
        freeze_batch_norm(self.model, bn_frozen)
        freeze_ranges(self.model, ranges_frozen)

    def bytes(self) -> int:
        """Of parameters, buffers and the optimizer's state."""
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.numel() * t.element_size() for t in tensors)

    def peak_mib(self) -> float:
        """Highest point of a step, without what other models hold."""
        if self.pixels.device.type != "cuda":
            return float("nan")
        others = torch.cuda.memory_allocated() - self.bytes()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - others) / MIB

    def block(self) -> tuple[float, float]:
        """Milliseconds a step takes, and those that the CPU is busy with it."""
        began = time.perf_counter()
        if self.pixels.device.type != "cuda":
            for _ in range(STEPS):
                self.step()
            passed = (time.perf_counter() - began) * 1e3 / STEPS
            return passed, passed
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(STEPS):
            self.step()
        last.record()
        host = (time.perf_counter() - began) * 1e3 / STEPS
        last.synchronize()
        return first.elapsed_time(last) / STEPS, host

    def kernels(self) -> tuple[int, list[tuple[str, int, float]]]:
        """How many a step launches, and those that take longest: name, how often, milliseconds."""
        if self.pixels.device.type != "cuda":
            return 0, []
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.name:
                found.setdefault(event.name[:90], []).append(event.time_range.elapsed_us() / 1e3)
        longest = sorted(((name, len(ms), sum(ms)) for name, ms in found.items()), key=lambda row: -row[2])
        return sum(map(len, found.values())), longest[:20]


def make_pair(run: Run, net: str, config: QATConfig) -> tuple[Variant, Variant]:
    """The float model and the prepared one."""
    make, batch = NETS[net]
    torch.manual_seed(0)
    model = make(run.tiny).to(run.device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)  # with those of Hugging Face signals die out on the way
    size = 32 if run.tiny else 224
    pixels = torch.randn(4 if run.tiny else batch, 3, size, size, device=run.device)
    labels = torch.randint(LABELS, (len(pixels),), device=run.device)
    if "vit" not in net:
        model, pixels = model.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(20):
            model.train()(pixel_values=pixels[:16])  # batch norm gets statistics
    began = time.monotonic()
    prepared = prepare_qat(copy.deepcopy(model), config, {"pixel_values": pixels[:2]})
    ready = time.monotonic()
    calibrate(prepared, [{"pixel_values": pixels[:16]}], bias_correction=False)
    run.add(part="prepare", net=net, prepare_s=ready - began, calibrate_s=time.monotonic() - ready)
    return Variant(model, pixels, labels), Variant(prepared, pixels, labels)


# --- Time and memory -------------------------------------------------------------------------------------------------


def compare(run: Run, part: str, net: str, base: Variant, ours: Variant, modes: list[str]) -> None:
    """A row for the float model and one for each mode, timed in turn; all are warm."""
    times: dict[str, list[float]] = {"float": []}
    hosts: dict[str, list[float]] = {"float": []}
    for _ in range(2 if run.tiny else ROUNDS):
        for mode in ["float", *modes]:
            variant = base if mode == "float" else ours
            if mode in MODES:
                ours.set_mode(mode)
                variant.step()
            milliseconds, host = variant.block()
            times.setdefault(mode, []).append(milliseconds)
            hosts.setdefault(mode, []).append(host)
    memory, count = {}, {}
    for mode in ["float", *modes]:
        variant = base if mode == "float" else ours
        if mode in MODES:
            ours.set_mode(mode)
            variant.step()
        memory[mode] = variant.peak_mib()
        count[mode], top = variant.kernels()
        run.add(
            part=part,
            net=net,
            mode=mode,
            ms=statistics.median(times[mode]),
            ratio=statistics.median(a / b for a, b in zip(times[mode], times["float"], strict=True)),
            spread=[round(f(times[mode]), 2) for f in (min, max)],
            host_ms=statistics.median(hosts[mode]),
            mib=memory[mode],
            memory_ratio=memory[mode] / memory["float"],
            kernels=count[mode],
            kernel_ratio=count[mode] / max(1, count["float"]),
            top=top,
        )


def warm(variant: Variant) -> float:
    """Seconds that the first steps take."""
    began = time.monotonic()
    for _ in range(WARM_UP):
        variant.step()
    if variant.pixels.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def eager(run: Run, net: str) -> None:
    """Float against learned, live and frozen; then against running ranges."""
    base, ours = make_pair(run, net, QATConfig("int8"))
    modes = [mode for mode in MODES if mode != "live" or "vit" not in net]
    warm(base)
    for mode in modes:
        ours.set_mode(mode)
        run.add(part="warm up", net=net, mode=mode, seconds=warm(ours))
    compare(run, "eager", net, base, ours, list(modes))


def observed(run: Run, net: str) -> None:
    """Batch norm live and running ranges."""
    base, ours = make_pair(run, net, QATConfig("int8", weights=OBSERVED, activations=OBSERVED))
    warm(base), warm(ours)
    compare(run, "eager", net, base, ours, ["observed"])


def compiled(run: Run, net: str, modes: list[str], how: dict[str, Any]) -> None:
    """Compiled (`how`: of `torch.compile`) against compiled, one mode after the other; and against eager."""
    torch._dynamo.reset()
    part = " ".join(["compiled", *how.values()])
    base, ours = make_pair(run, net, QATConfig("int8"))
    for name in ("float", *modes):
        variant = base if name == "float" else ours
        if name != "float":
            if run.left() < COMPILE_SECONDS[net]:
                run.add(part=part, net=net, mode=name, skipped="no time left")
                continue
            ours.set_mode(name)
        counters = torch._dynamo.utils.counters
        counters.clear()
        before, variant.run = variant.run, variant.model
        loss, gradient = variant.loss_and_gradient()
        variant.run = torch.compile(variant.model, **how) if before is variant.model else before
        began = time.monotonic()
        found, compiled_gradient = variant.loss_and_gradient()
        seconds = time.monotonic() - began + warm(variant)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        error = float((compiled_gradient - gradient).norm() / gradient.norm())
        checks: dict[str, float] = {"loss": loss, "loss_error": abs(found - loss) / abs(loss), "gradient_error": error}
        run.add(
            part=f"{part}, first step", net=net, mode=name, seconds=seconds, graphs=graphs, breaks=breaks, **checks
        )
        if name != "float":
            compare(run, part, net, base, ours, [name])


# --- Evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluation(run: Run, net: str, target: str) -> None:
    """Logits of QAT's evaluation against those of the converted model, with TF32 and without, and on the CPU."""
    _, ours = make_pair(run, net, QATConfig(target))
    model, pixels = ours.model.eval(), ours.pixels[:32]
    converted = convert(copy.deepcopy(model))
    expected = copy.deepcopy(converted).cpu()(pixel_values=pixels.cpu()).logits
    logits = {}
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        logits["qat", tf32] = model(pixel_values=pixels).logits.cpu()
        logits["converted", tf32] = converted(pixel_values=pixels).logits.cpu()
    pairs = {
        "qat, converted": (logits["qat", False], logits["converted", False]),
        "qat, converted, TF32": (logits["qat", True], logits["converted", True]),
        "converted, TF32 or not": (logits["converted", True], logits["converted", False]),
        "converted, GPU and CPU": (logits["converted", False], expected),
        "converted, GPU in TF32 and CPU": (logits["converted", True], expected),
    }
    for what, (a, b) in pairs.items():
        rms = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        top1 = float((a.argmax(1) == b.argmax(1)).float().mean())
        run.add(part="evaluation", net=net, target=target, what=what, rms=rms, top1=top1)


def parts(run: Run, how: dict[str, Any]) -> Iterator[tuple[str, float, Callable[[], None]]]:
    """What is measured, in the order of its weight: what, seconds that it may take, how."""
    yield "correctness", 60, lambda: gpu_correctness.check(run.add, run.device, run.tiny)
    yield "bandwidth", 15, lambda: gpu_correctness.speed(run.add, run.device, run.tiny)
    for net in NETS:
        yield f"eager {net}", 25, lambda net=net: eager(run, net)
    for net in ("mobilenet_v2", "resnet18"):
        yield f"evaluation {net}", 15, lambda net=net: evaluation(run, net, "int8")
    yield "evaluation w4a4", 15, lambda: evaluation(run, "mobilenet_v2", "w4a4")
    for net, modes in COMPILED.items():
        seconds = 1.3 * COMPILE_SECONDS[net]
        yield f"compiled {net}", seconds, lambda net=net, modes=modes: compiled(run, net, modes, how)  # type: ignore[misc]
    yield "observed resnet50", 20, lambda: observed(run, "resnet50")


def main() -> None:
    """Run all parts that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="small nets and batches, to try the script")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin nothing that may end later; default: 480")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; default: inductor")
    parser.add_argument("--mode", help="of torch.compile, for instance reduce-overhead, which records CUDA graphs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    options = parser.parse_args()
    run = Run(options.device, options.tiny, options.seconds, options.json)
    print(torch.__version__, transformers.__version__, name_of(run.device), flush=True)
    how = {"backend": options.backend} if options.mode is None else {"mode": options.mode}
    for what, seconds, measure in parts(run, how):
        if options.only not in what:
            continue
        if run.left() < seconds:
            run.add(part=what, skipped="no time left")
            continue
        with run.guarded(what):
            measure()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
