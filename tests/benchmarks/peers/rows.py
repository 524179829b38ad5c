"""Measuring a row: a peer on a net at a target, trained at one learning rate from a seed."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_outputs import ImageClassifierOutput

from hf_qat.cli.demo.run import quiet
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.rows import Bench, name_of, on_runtime, recipe_for, versions
from tests.benchmarks.accuracy.textures import Images, normalized
from tests.benchmarks.accuracy.training import Rows, answers, arguments, as_read, points
from tests.benchmarks.peers.peer import TARGETS, Logits, Peer
from tests.benchmarks.peers.registry import PEERS


#: Of the training set; ModelOpt's example of QAT takes as many, AIMET's guide 500 to 1000.
CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Question:
    """What is measured.

    Attributes:
        rate: the learning rate at the first step.
    """

    peer: str
    net: str
    target: str
    epochs: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Row(Question):
    """Points of 100 on the test images; those that could not be measured are not there, and `error` says why.

    Attributes:
        in_float: of the float net.
        calibrated, simulated: of the peer's module in torch, before and after training.
        plain, optimized: of its file on ONNX Runtime with optimizations off and on.
        weights, activations: how many tensors of each are rounded in training.
        batch_norms: in the file, beside what is rounded.
        steps: of training.
        seconds: that all took.
        error: the peer's own words.
    """

    in_float: float
    device: str
    versions: dict[str, str]
    calibrated: float | None = None
    simulated: float | None = None
    plain: float | None = None
    optimized: float | None = None
    weights: int = 0
    activations: int = 0
    batch_norms: int = 0
    steps: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def on_runtime(self) -> float | None:
        """Points on ONNX Runtime, in the better of the two ways."""
        return max((each for each in (self.plain, self.optimized) if each is not None), default=None)

    @property
    def reached(self) -> float | None:
        """Points on ONNX Runtime where the file runs, else simulated ones."""
        return self.simulated if self.on_runtime is None else self.on_runtime

    @property
    def measured(self) -> str:
        """How."""
        if self.reached is None:
            return "fails"
        return "simulated" if self.on_runtime is None else "ONNX Runtime"


class Scored(nn.Module):
    """A peer's module as transformers' Trainer takes it.

    Args:
        answering: pixels to logits.
    """

    def __init__(self, answering: nn.Module) -> None:
        super().__init__()
        self.answering = answering

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the loss that the nets themselves have: cross entropy, of maps at the size of the image."""
        logits = self.answering(pixel_values)
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        sized = logits
        if labels.ndim == 3:
            sized = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        return ImageClassifierOutput(loss=nn.functional.cross_entropy(sized, labels), logits=logits)


@dataclass
class Found:
    """What is known so far, by the names of `Row`."""

    figures: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def attempt(self, what: str, work: Callable[[], None]) -> bool:
        """Whether it went well; if not, why."""
        try:
            work()
        except Exception as error:
            self.errors.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return False
        return True


@quiet()
def measure(bench: Bench, question: Question) -> Row:
    """Quantize, train, export, and measure what each gives; a peer that fails is a row, too."""
    logging.raiseExceptions = False  # peers' handlers go on writing to streams that are closed
    began, peer, net = time.monotonic(), PEERS[question.peer], NETS[question.net]
    model = bench.float_model(question.net, question.seed)
    before = points(list(answers(model, bench.test, bench.device)), bench.test, net.dense)
    found = Found()
    trained: list[Scored] = []
    if found.attempt("training", lambda: trained.append(train(bench, question, copy.deepcopy(model), found))):
        file = bench.directory / "peers" / f"{'-'.join(map(str, vars(question).values()))}.onnx"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = normalized(bench.test.pixels[:100]).to(bench.device)
        if found.attempt("export", lambda: peer.export(trained[0].eval().answering, pixels, file)):
            evaluate_file(file, bench.test, net.dense, found)
    return Row(
        **vars(question),
        in_float=round(before, 3),
        device=name_of(bench.device),
        versions={**versions(), **version_of(peer)},
        seconds=round(time.monotonic() - began, 1),
        error="; ".join(found.errors),
        **found.figures,  # type: ignore[arg-type]
    )


def train(bench: Bench, question: Question, model: nn.Module, found: Found) -> Scored:
    """Calibrated and trained as our rows of the same net are."""
    peer, net, test = PEERS[question.peer], NETS[question.net], bench.test
    images = normalized(bench.train(question.seed).pixels[:CALIBRATION_IMAGES]).to(bench.device)
    torch.manual_seed(question.seed)
    float_net = Logits(model).eval().to(bench.device)
    scored = Scored(peer.quantize(float_net, images.split(net.batch), TARGETS[question.target]))
    found.figures["weights"], found.figures["activations"] = peer.quantizers(scored.answering)
    found.figures["calibrated"] = _points(scored, test, net.dense, bench.device)
    options = arguments(
        str(bench.directory / "peers"), net, question.seed, question.rate, question.epochs, bench.device
    )
    rows = Rows(bench.train(question.seed), net.dense, turns=True)
    trainer = Trainer(scored, options, data_collator=as_read, train_dataset=rows)
    trainer.train()
    found.figures["steps"] = trainer.state.global_step
    found.figures["simulated"] = _points(scored, test, net.dense, bench.device)
    return scored


def _points(scored: Scored, images: Images, dense: bool, device: str) -> float:
    return round(points(list(answers(scored.eval(), images, device)), images, dense), 3)


def evaluate_file(file: Path, images: Images, dense: bool, found: Found) -> None:
    """On ONNX Runtime, with its optimizations off and on: files are known that only one of them runs rightly."""
    found.figures["batch_norms"] = sum(node.op_type == "BatchNormalization" for node in onnx.load(file).graph.node)
    for name, optimized in (("plain", False), ("optimized", True)):

        def run(name: str = name, optimized: bool = optimized) -> None:
            found.figures[name] = round(points(list(on_runtime(file, images, optimized)), images, dense), 3)

        found.attempt(f"ONNX Runtime, {name}", run)


def version_of(peer: Peer) -> dict[str, str]:
    """Of the peer's package."""
    return {peer.package: version(peer.package)}


def rates(peer: Peer, net: str, target: str, factors: list[float]) -> list[float]:
    """Those of our recipe for such nets, times `factors`, and the one that the peer's documents name, if they do.

    A recipe that begins with our best calibration goes on from there at a small rate; peers get that of other CNNs.
    """
    of = NETS[net]
    recipe = recipe_for(of.kind, target)
    recipe = recipe_for("cnn", target) if "calibration_effort" in recipe.config else recipe
    ours = [recipe.training_arguments(of.learning_rate)["learning_rate"] * factor for factor in factors]
    return [float(f"{rate:.4g}") for rate in (*ours, *peer.advised_rates)]
