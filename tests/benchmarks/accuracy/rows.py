"""Measuring a row of the table: a net at a target, by a method, from a seed."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, QATTrainer, __version__, export_onnx
from hf_qat.config.recipes import read_recipe, recipe_names
from hf_qat.export.verify import Session
from tests.benchmarks.accuracy.nets import NETS, Net, Rows, arguments, points, train_float
from tests.benchmarks.accuracy.textures import Images, draw


TRAIN_IMAGES, TEST_IMAGES = 8000, 3000

#: Of the test images; those of training have the seed of their run, which is never so large.
TEST_SEED = 1_000_000

#: Target → the bits in the name of the recipe that it is trained by.
TARGETS = {"int8": "int8", "TDA4VM": "int8", "AM68A": "int8", "w4a8": "w4a8", "w4a4": "w4a4"}


@dataclass(frozen=True)
class Method:
    """How a float net becomes a quantized one.

    Attributes:
        epochs: of training; 0 is calibration alone.
        config: of `QATConfig`, besides the target.
        share: times the recipe's own.
        distil: whether the float net teaches.
        effort: of the calibration.
    """

    epochs: float
    config: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    distil: bool = False
    effort: str = "fast"


METHODS = {
    "calibrated": Method(0),
    "calibrated, best": Method(0, effort="best"),
    "QAT, 1 epoch": Method(1),
    "calibrated, best, then QAT, 1 epoch": Method(1, effort="best"),
    "QAT, 3 epochs": Method(3),
    "calibrated, best, then QAT, 3 epochs": Method(3, effort="best"),
    "QAT, 3 epochs, distilled": Method(3, distil=True),
    "QAT, 3 epochs, half the rate": Method(3, share=0.5),
    "QAT, 3 epochs, twice the rate": Method(3, share=2.0),
    "QAT, 3 epochs, batch norm live for two": Method(3, {"freeze_bn_at": 2 / 3}),
    "QAT, 3 epochs, scales at the weights' rate": Method(3, {"scale_lr_multiplier": 1.0}),
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
    versions: dict[str, str]


@lru_cache(maxsize=1)
def train_images(seed: int) -> Images:
    """What the runs of a seed learn from; drawn once for all of its rows."""
    return draw(TRAIN_IMAGES, seed)


@dataclass(frozen=True)
class Bench:
    """Where trained nets and files lie, and the images.

    Attributes:
        directory: kept between runs, so that a net is trained once.
        test: what all are measured on.
    """

    directory: Path
    test: Images

    def float_model(self, name: str, seed: int) -> nn.Module:
        """Trained from scratch, or read where an earlier run has left it."""
        net, made = NETS[name], self.directory / "float" / f"{name}-{seed}"
        if (made / "config.json").is_file():
            return type(net.make()).from_pretrained(made).eval()
        teacher = None if net.teacher is None else self.float_model(net.teacher, seed)
        model = train_float(net, train_images(seed), str(made), seed, teacher)
        model.save_pretrained(made)
        return model


def versions() -> dict[str, str]:
    """Of what has a part in the figures."""
    found = {"hf_qat": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        **found,
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
    }


def learning_rate(net: Net, target: str) -> float:
    """Of QAT, by the recipe for nets of this kind; by that for CNNs where there is none at these bits."""
    names = (f"{kind}_{TARGETS[target]}" for kind in (net.kind, "cnn"))
    recipe = read_recipe(next(name for name in names if name in recipe_names()))
    return float(recipe.training_arguments(net.learning_rate)["learning_rate"])


def measure(bench: Bench, name: str, target: str, method: str, seed: int) -> Row:
    """Quantize one net in one way, and measure it."""
    net, how = NETS[name], METHODS[method]
    model = bench.float_model(name, seed)
    before = points(list(_answers(model, bench.test)), bench.test, net.dense)
    directory = bench.directory / "quantized" / f"{name}-{target}-{method}-{seed}"
    options = arguments(str(directory), net, seed, learning_rate(net, target) * how.share, max(how.epochs, 1))
    trainer = QATTrainer(
        copy.deepcopy(model).to(memory_format=torch.channels_last),
        options,
        qat_config=QATConfig(target, **how.config),
        train_dataset=Rows(train_images(seed), net.dense),
        eval_dataset=Rows(bench.test, net.dense),
        teacher="float" if how.distil else None,
    )
    trainer.calibrate(effort=how.effort)
    if how.epochs:
        trainer.train()
    simulated = points(torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions), bench.test, net.dense)
    converted = trainer.convert()
    file = directory / "quantized.onnx"
    export_onnx(converted, file, {"pixel_values": bench.test.pixels[:8]}, dynamic_batch=True)
    plain, optimized = (points(list(_on_runtime(file, bench.test, on)), bench.test, net.dense) for on in (False, True))
    in_torch = points(list(_answers(converted, bench.test)), bench.test, net.dense)
    figures = [round(figure, 3) for figure in (simulated, in_torch, plain, optimized, before)]
    return Row(name, target, method, seed, *figures, trainer.state.global_step, versions())


@torch.no_grad()
def _answers(model: nn.Module, images: Images) -> Iterator[Tensor]:
    """Logits, batch by batch."""
    for pixels in images.pixels.split(100):
        yield model(pixel_values=pixels).logits


def _on_runtime(file: Path, images: Images, optimized: bool) -> Iterator[Tensor]:
    """Logits of a file, batch by batch."""
    session = Session(file, optimized)
    for pixels in images.pixels.split(100):
        yield torch.from_numpy(session.run([pixels.numpy()])[0])
