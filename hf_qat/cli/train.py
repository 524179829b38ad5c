"""`hf-qat train`: from a float model and images to everything that a board needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainingArguments

from hf_qat.cli.arguments import DataArguments, ModelArguments, QATArguments
from hf_qat.cli.parsing import parse, parser_of
from hf_qat.cli.results import REPORT, stages_of, summary, write_report
from hf_qat.cli.session import Session, open_session
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError
from hf_qat.model.in_float import by_reason, float_operations
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.layers import qat_layers
from hf_qat.trainer.histories import RangeHistory
from hf_qat.trainer.trainer import QATTrainer


DESCRIPTION = (
    "Quantization-aware training of a float model on your images: measures it in float, calibrates, trains, exports "
    "(int8 safetensors, QDQ ONNX, TIDL bundle for TI's devices, model card) and writes report.html. All flags of "
    "transformers' TrainingArguments hold. For example: hf-qat train --model_name_or_path my/float-model "
    "--dataset_name photos/ --target AM68A --output_dir out --learning_rate 1e-4 --num_train_epochs 3"
)

#: Where the results lie in the output directory.
EXPORT = "export"


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
    trainer, history = session.trainer(args, config), RangeHistory()
    trainer.add_callback(history)
    evaluated = _measure_and_train(trainer)
    exported = trainer.export(output / EXPORT)
    stages = stages_of(evaluated, trainer)
    report = write_report(trainer, model.model_name_or_path, stages, exported, output / REPORT, history)
    print(summary(stages, [exported, *report], exported, data))


def _measure_and_train(trainer: QATTrainer) -> dict[str, dict[str, float]]:
    """What `evaluate` gives in float, after calibration and after training."""
    with fake_quant_disabled(trainer.model):
        in_float = trainer.evaluate()
    trainer.calibrate()
    calibrated = trainer.evaluate()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return {"float": in_float, "calibrated": calibrated, "qat": trainer.evaluate()}


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
        f"  {len(session.train)} images to train on, {len(session.evaluation)} to evaluate on"
        + (f", {len(session.classes)} classes" if session.classes else ""),
        f"  about {steps:.0f} steps of {args.train_batch_size} images"
        if args.max_steps < 0
        else f"  {args.max_steps} steps",
    ]
    return "\n".join(lines)


def _named(operations: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(paths)} {name}" for name, paths in operations.items())
