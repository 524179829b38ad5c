"""Measuring a row of the table: a net at a target, by a method, from a seed."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, QATTrainer, __version__, export_onnx
from hf_qat.cli.demo.run import quiet
from hf_qat.config.recipes import Recipe, read_recipe, recipe_names
from hf_qat.export.verify import Session
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.textures import Images, images_of, normalized
from tests.benchmarks.accuracy.training import Rows, answers, arguments, as_read, points, train_float


TRAIN_IMAGES, TEST_IMAGES = 8000, 3000

#: Of the test images; those of training have the seed of their run, which is never so large.
TEST_SEED = 1_000_000

#: Target → the bits in the name of the recipe that it is trained by; what is hardest, or says most, comes first.
TARGETS = {"w4a4": "w4a4", "int8": "int8", "TDA4VM": "int8", "w4a8": "w4a8", "AM68A": "int8"}

#: Points of 100 that a float net must have for its rows to say anything.
LEAST_POINTS = 80.0


@dataclass(frozen=True)
class Method:
    """How a float net becomes a quantized one.

    Attributes:
        epochs: of training; 0 is calibration alone.
        config: of `QATConfig`, besides the target.
        share: times the recipe's own.
        distil: whether the float net teaches.
        effort: of the calibration; `None`: the recipe's.
    """

    epochs: float
    config: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    distil: bool = False
    effort: str | None = None


METHODS: dict[str, Method] = {
    "calibrated": Method(0, effort="fast"),
    "calibrated, best": Method(0, effort="best"),
    "QAT, 1 epoch": Method(1),
    "QAT, 3 epochs": Method(3),
    "QAT, 3 epochs, distilled": Method(3, distil=True),
    "QAT, 3 epochs, distilled, four times the rate": Method(3, distil=True, share=4.0),
    "QAT, 3 epochs, half the rate": Method(3, share=0.5),
    "QAT, 3 epochs, twice the rate": Method(3, share=2.0),
    "QAT, 3 epochs, batch norm live for two": Method(3, {"freeze_bn_at": 2 / 3}),
    "QAT, 3 epochs, scales at the weights' rate": Method(3, {"scale_lr_multiplier": 1.0}),
    "calibrated fast, QAT, 1 epoch, four times the rate": Method(1, share=4.0, effort="fast"),
    "calibrated fast, QAT, 3 epochs, four times the rate": Method(3, share=4.0, effort="fast"),
    "calibrated fast, QAT, 3 epochs, eight times the rate": Method(3, share=8.0, effort="fast"),
    "calibrated fast, QAT, 3 epochs, four times the rate, distilled": Method(3, distil=True, share=4.0, effort="fast"),
}


@dataclass(frozen=True)
class Row:
    """Points of 100 on the test images, and what they were measured with.

    Attributes:
        trainer: by `evaluate()`, while quantization is simulated.
        converted: of the converted model in torch.
        plain, optimized: on ONNX Runtime with its optimizations off and on.
        in_float: of the float net in torch.
        steps: of QAT.
        seconds: that quantizing and measuring took; nobody has noted it of rows that are older than this field.
        device: that computed, but for ONNX Runtime.
        versions: of packages.
    """

    net: str
    target: str
    method: str
    seed: int
    trainer: float
    converted: float
    plain: float
    optimized: float
    in_float: float
    steps: int
    seconds: float | None
    device: str
    versions: dict[str, str]


class WeakFloatError(Exception):
    """A float net has too few points for its rows to say anything."""


@dataclass(frozen=True)
class Bench:
    """Where trained nets and files lie, and what computes.

    Attributes:
        directory: kept between runs, so that a net is trained once.
        device: "cuda" or "cpu".
    """

    directory: Path
    device: str

    @property
    def test(self) -> Images:
        """What all are measured on."""
        return images_of(self.directory, TEST_SEED, TEST_IMAGES)

    def train(self, seed: int) -> Images:
        """What the runs of a seed learn from."""
        return images_of(self.directory, seed, TRAIN_IMAGES)

    def float_model(self, name: str, seed: int) -> nn.Module:
        """Trained from scratch, or read where an earlier run has left it."""
        net, made = NETS[name], self.directory / "float" / f"{name}-{seed}"
        if made.is_dir():
            return type(net.make()).from_pretrained(made).eval()
        teacher = None if net.teacher is None else self.float_model(net.teacher, seed)
        unfinished = self.directory / "unfinished" / made.name
        model = train_float(net, self.train(seed), str(unfinished), seed, teacher, self.device)
        model.save_pretrained(unfinished)
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(made)  # a run that is killed leaves no half of a net
        return model


@quiet()
def float_points(bench: Bench, name: str, seed: int) -> float:
    """Of the float net on the test images.

    Raises:
        WeakFloatError: they are too few.
    """
    model = bench.float_model(name, seed)
    reached = points(list(answers(model, bench.test, bench.device)), bench.test, NETS[name].dense)
    if reached < LEAST_POINTS:
        raise WeakFloatError(f"{reached:.2f} points")
    return reached


def versions() -> dict[str, str]:
    """Of what has a part in the figures."""
    found = {"hf_qat": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        **found,
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
    }


def recipe_for(kind: str, target: str) -> Recipe:
    """That for nets of this kind; that for CNNs where there is none at these bits."""
    names = (f"{each}_{TARGETS[target]}" for each in (kind, "cnn"))
    return read_recipe(next(name for name in names if name in recipe_names()))


@quiet()
def measure(bench: Bench, name: str, target: str, method: str, seed: int) -> Row:
    """Quantize one net in one way, and measure it."""
    net, how, test, began = NETS[name], METHODS[method], bench.test, time.monotonic()
    model = bench.float_model(name, seed)
    before = points(list(answers(model, test, bench.device)), test, net.dense)
    directory = bench.directory / "quantized" / f"{name}-{target}-{method}-{seed}"
    recipe = recipe_for(net.kind, target)
    rate = recipe.training_arguments(net.learning_rate)["learning_rate"] * how.share
    trainer = QATTrainer(
        copy.deepcopy(model).to(memory_format=torch.channels_last),
        arguments(str(directory), net, seed, rate, max(how.epochs, 1), bench.device),
        qat_config=QATConfig(**{**recipe.config, "target": target, **how.config}),
        data_collator=as_read,
        train_dataset=Rows(bench.train(seed), net.dense, turns=True),
        eval_dataset=Rows(test, net.dense),
        teacher="float" if how.distil else None,
    )
    trainer.calibrate(effort=how.effort)
    if how.epochs:
        trainer.train()
    simulated = points(torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions), test, net.dense)
    converted = trainer.convert()
    file = directory / "quantized.onnx"
    export_onnx(converted, file, {"pixel_values": normalized(test.pixels[:8])}, dynamic_batch=True)
    plain, optimized = (points(list(on_runtime(file, test, on)), test, net.dense) for on in (False, True))
    in_torch = points(list(answers(converted, test, bench.device)), test, net.dense)
    figures = [round(figure, 3) for figure in (simulated, in_torch, plain, optimized, before)]
    seconds = round(time.monotonic() - began, 1)
    return Row(
        name, target, method, seed, *figures, trainer.state.global_step, seconds, name_of(bench.device), versions()
    )


def name_of(device: str) -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def on_runtime(file: Path, images: Images, optimized: bool) -> Iterator[Tensor]:
    """Logits of a file, in batches of the size that files without an open first dimension have."""
    session = Session(file, optimized)
    for pixels in images.pixels.split(100):
        yield torch.from_numpy(session.run([normalized(pixels).numpy()])[0])
