"""`hf-qat train`: from a float model and images to everything that a board needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from hf_qat.cli.arguments import DataArguments, ModelArguments, QATArguments
from hf_qat.cli.evaluate import measure
from hf_qat.cli.parsing import parse, parser_of
from hf_qat.cli.session import Session, open_session
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError
from hf_qat.model.analysis.analyze import analyze
from hf_qat.model.in_float import by_reason, float_operations
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.publish.accuracy import MEASURED_AS, user_metrics
from hf_qat.publish.directory import ONNX
from hf_qat.publish.html_report import Results, save_report
from hf_qat.quantization.layers import qat_layers
from hf_qat.trainer.batches import first_inputs
from hf_qat.trainer.trainer import QATTrainer


DESCRIPTION = (
    "Quantization-aware training of a float model on your images: measures it in float, calibrates, trains, exports "
    "(int8 safetensors, QDQ ONNX, TIDL bundle for TI's devices, model card) and writes report.html. All flags of "
    "transformers' TrainingArguments hold. For example: hf-qat train --model_name_or_path my/float-model "
    "--dataset_name photos/ --target AM68A --output_dir out --learning_rate 1e-4 --num_train_epochs 3"
)

#: Where the results lie in the output directory.
EXPORT, REPORT = "export", "report.html"

#: So many images are analyzed.
ANALYZED = 32


def main(argv: Sequence[str]) -> None:
    """Train, and print what was measured and what to do next.

    Args:
        argv: what follows `hf-qat train`.

    Raises:
        HfQatError: options that cannot be honoured, before any time is spent; or what training and export raise.
        SystemExit: wrong options, or `--help`.
    """
    parser = parser_of("train", DESCRIPTION, ModelArguments, DataArguments, QATArguments, TrainingArguments)
    parser.add_argument("--dry_run", action="store_true", help="Say what would be done, and stop.")
    model, data, qat, args, other = parse(parser, argv)
    config = qat.to_config()
    args.remove_unused_columns = False  # images become pixels only when a batch is read
    session = open_session(model, data)
    if other.dry_run:
        print(_outlook(session, config, args))
        return
    output = Path(str(args.output_dir))
    trainer = session.trainer(args, config)
    accuracy = _measure_and_train(trainer)
    trainer.export(output / EXPORT)
    exported = replace(session, model=trainer.convert())
    accuracy["onnxruntime"] = user_metrics(measure(exported, output / EXPORT / ONNX, args.eval_batch_size))
    accuracy = {MEASURED_AS[stage]: metrics for stage, metrics in accuracy.items() if metrics}
    found = analyze(trainer.model, first_inputs(trainer, trainer.model, ANALYZED), num_batches=2)
    results = Results(model.model_name_or_path, config, accuracy, trainer.state.log_history, found, output / EXPORT)
    save_report(results, output / REPORT)
    print(_summary(accuracy, output, data))


def _measure_and_train(trainer: QATTrainer) -> dict[str, dict[str, float]]:
    """The metrics in float, after calibration and after training."""
    with fake_quant_disabled(trainer.model):
        in_float = trainer.evaluate()
    trainer.calibrate()
    calibrated = trainer.evaluate()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    found = {"float": in_float, "calibrated": calibrated, "qat": trainer.evaluate()}
    return {stage: user_metrics(metrics) for stage, metrics in found.items()}


def _outlook(session: Session, config: QATConfig, args: TrainingArguments) -> str:
    """What would be done: layers, what stays in float, the size of the file, the number of steps."""
    model = copy.deepcopy(session.model)
    if len(session.train) < 2:
        raise ConfigError("there is one image only: nothing can be learned from that.")
    prepare_qat(model, config, session.inputs(range(2)))
    layers = qat_layers(model)
    weights = sum(layer.weight.numel() * layer.weight_quantizer.spec.bits / 8 for layer in layers.values())
    everything = sum(parameter.numel() for parameter in session.model.parameters())
    steps = -(-len(session.train) // args.train_batch_size) * args.num_train_epochs
    lines = [
        f"{type(session.model).__name__}, {everything / 1e6:.2f} million parameters, for {config.target}",
        f"  {len(layers)} layers with quantized weights, {weights / 1e6:.2f} MB of codes",
        *(f"  in float, {reason}: {_named(found)}" for reason, found in by_reason(float_operations(model)).items()),
        f"  {len(session.train)} images to train on, {len(session.evaluation)} to evaluate on, "
        f"{len(session.classes)} classes",
        f"  about {steps:.0f} steps of {args.train_batch_size} images"
        if args.max_steps < 0
        else f"  {args.max_steps} steps",
    ]
    return "\n".join(lines)


def _named(operations: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(paths)} {name}" for name, paths in operations.items())


def _summary(accuracy: Mapping[str, Mapping[str, float]], output: Path, data: DataArguments) -> str:
    """What was measured, where it lies, and the next command."""
    rows = [
        f"  {stage:<42} {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}"
        for stage, metrics in accuracy.items()
    ]
    return "\n".join(
        [
            *(["", "Measured on the evaluation set:", *rows] if rows else []),
            "",
            f"Written: {output / EXPORT} (from_pretrained, ONNX, card) and {output / REPORT}",
            f"Next:    hf-qat evaluate --model_name_or_path {output / EXPORT / ONNX} "
            f"--dataset_name {data.dataset_name} --task {data.task}",
            f"         hf-qat push {output / EXPORT} USER/MODEL",
        ]
    )
