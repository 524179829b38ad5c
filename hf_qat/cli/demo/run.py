"""The demo's way from a float model to the table: for each case calibrate, train, convert, export and compare."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
import transformers
from transformers import PreTrainedModel

from hf_qat.cli.demo.digits import Task, make_processor, make_task
from hf_qat.cli.demo.report import Row, save, summary, table
from hf_qat.cli.demo.training import accuracy, arguments, compute_metrics, train_float, use_bar
from hf_qat.config.qat_config import QATConfig
from hf_qat.export import export_onnx, verify_onnx
from hf_qat.export.cleanup import drop_exporter_notes
from hf_qat.export.verify import Session
from hf_qat.trainer.trainer import QATTrainer


@dataclass(frozen=True)
class Case:
    """A target, and how to train for it."""

    name: str
    description: str
    config: QATConfig
    epochs: int
    learning_rate: float


CASES = (
    Case(
        "int8",
        "the easy one: 8 bits, a scale for each channel of a weight",
        QATConfig("int8"),
        epochs=3,
        learning_rate=5e-4,
    ),
    Case(
        "TDA4VM",
        "a device: 8 bits, one power of two as the scale of a whole tensor",
        QATConfig("TDA4VM"),
        epochs=3,
        learning_rate=5e-4,
    ),
    Case(
        "TDA4VM-w4",
        "the hard one: as TDA4VM, with weights of 4 bits",
        QATConfig("TDA4VM", weights={"bits": 4}),
        epochs=8,
        learning_rate=1e-3,
    ),
)


def run(output: Path, seed: int, epochs: int) -> None:
    """Do everything, and print what comes of it.

    Args:
        output: folder to write to.
        seed: of the weights, the split and the order of the images.
        epochs: of the float training.
    """
    start = time.monotonic()
    processor = make_processor()
    # First of all, so that a folder that cannot be written to costs no time.
    (output / "float").mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(output / "float")
    with quiet():
        task = make_task(processor, seed)
        print(f"Handwritten digits: {len(task.train)} images to train on, {len(task.test)} to test; seed {seed}")
        print(f"float: {epochs} epochs with transformers.Trainer", flush=True)
        model, evaluated = train_float(task, output / "float", seed, epochs)
        rows = [float_row(model, task, evaluated, output / "float")]
        for case in CASES:
            print(f"{case.name}, {case.description}: {case.epochs} epochs with QATTrainer", flush=True)
            rows += run_case(case, model, task, output / case.name, seed)
    save(rows, seed, output / "results.json")
    print(f"\n{table(rows)}\n\n{summary(rows)}\n")
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} seconds on {torch.get_num_threads()} threads. All files are in {output.resolve()}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries remark on their own deprecations and dependencies, and without their bars."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.enable_progress_bar()
        logger.setLevel(level)


def run_case(case: Case, float_model: PreTrainedModel, task: Task, output: Path, seed: int) -> list[Row]:
    """Measure a copy of the float model after calibration, and again after training."""
    trainer = QATTrainer(
        model=copy.deepcopy(float_model),
        args=arguments(output, seed, case.epochs, case.learning_rate),
        qat_config=case.config,
        train_dataset=task.train,
        eval_dataset=task.test,
        compute_metrics=compute_metrics,
    )
    use_bar(trainer, case.name)
    trainer.calibrate()
    calibrated = quantized_row(trainer, task, case.name, "calibrated", output)
    trainer.train()
    return [calibrated, quantized_row(trainer, task, case.name, "QAT", output)]


def quantized_row(trainer: QATTrainer, task: Task, target: str, stage: str, output: Path) -> Row:
    """Evaluate, convert, export and verify the model as it is now."""
    evaluated = trainer.evaluate()["eval_accuracy"]
    converted = trainer.convert()
    path = output / f"{stage.lower()}.onnx"
    export_onnx(converted, path, {"pixel_values": task.pixels[:8]})
    report = verify_onnx(converted, path, [{"pixel_values": pixels} for pixels in task.pixels.split(128)])
    plain, optimized = runtime_accuracies(path, task)
    assert report.top1_agreement is not None  # the model has logits
    return Row(
        target,
        stage,
        trainer=evaluated,
        converted=torch_accuracy(converted, task),
        plain=plain,
        optimized=optimized,
        agreement=100 * report.top1_agreement,
        size=report.size,
        file=str(path),
    )


def float_row(model: PreTrainedModel, task: Task, evaluated: float, output: Path) -> Row:
    """Save the float model, and export it for comparison."""
    model.save_pretrained(output)
    path = output / "float.onnx"
    program = torch.onnx.export(model, (), kwargs={"pixel_values": task.pixels[:1]}, verbose=False)
    assert program is not None  # it is when a path is given
    drop_exporter_notes(program.model_proto)
    onnx.save(program.model_proto, path)
    plain, optimized = runtime_accuracies(path, task)
    return Row(
        "float",
        "float",
        trainer=evaluated,
        converted=None,
        plain=plain,
        optimized=optimized,
        agreement=None,
        size=path.stat().st_size,
        file=str(path),
    )


@torch.no_grad()
def torch_accuracy(model: torch.nn.Module, task: Task) -> float:
    """Accuracy of a model as it is, in percent."""
    return accuracy(model(pixel_values=task.pixels).logits.numpy(), task.labels)


def runtime_accuracies(path: Path, task: Task) -> tuple[float, float]:
    """Accuracy of a file on ONNX Runtime, in percent, with optimizations off and on."""
    logits = [Session(path, optimized).run([task.pixels.numpy()])[0] for optimized in (False, True)]
    return accuracy(logits[0], task.labels), accuracy(logits[1], task.labels)
