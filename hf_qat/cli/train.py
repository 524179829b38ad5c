"""`hf-qat train`: from a float model and images to everything that a board needs."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hf_qat.cli.arguments import DataArguments, ModelArguments, QATArguments
from hf_qat.cli.parsing import parse, parser_of
from hf_qat.cli.results import REPORT, stages_of, summary, write_report
from hf_qat.cli.session import Session, open_session, require_exportable
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError
from hf_qat.model.in_float import by_reason, float_operations
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import state_of
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.publish.accuracy import quality
from hf_qat.quantization.layers import qat_layers
from hf_qat.trainer.histories import RangeHistory
from hf_qat.trainer.trainer import QATTrainer


DESCRIPTION = (
    "Quantization-aware training of a float model on your images: measures it in float, calibrates, trains, exports "
    "(int8 safetensors, QDQ ONNX, TIDL bundle for TI's devices, model card) and writes report.html. All flags of "
    "transformers' TrainingArguments hold. For example: hf-qat train --model_name_or_path my/float-model "
    "--dataset_name photos/ --target AM68A --output_dir out --learning_rate 1e-4 --num_train_epochs 3; or, by a "
    "recipe that was measured, --config cnn_int8 --float_learning_rate 2e-3 in place of the last two"
)

#: Where the results lie in the output directory.
EXPORT = "export"

#: A share of the steps: the report draws what is logged, and 500 steps, as Trainer has it, are more than many have.
LOGGED_AFTER = 0.05


def main(argv: Sequence[str]) -> None:
    """Train, and print what was measured and what to do next.

    Args:
        argv: what follows `hf-qat train`.

    Raises:
        HfQatError: options that cannot be honoured, before any time is spent; or what training and export raise.
        SystemExit: wrong options, or `--help`.
    """
    parser = parser_of("train", DESCRIPTION, ModelArguments, DataArguments, QATArguments, TrainingArguments)
    parser.set_defaults(logging_steps=LOGGED_AFTER, eval_strategy="epoch")
    # As the flags of TrainingArguments, so that a file can say `dry_run: true`.
    truth: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True, "default": False}
    parser.add_argument("--dry_run", "--dry-run", **truth, help="Say what would be done, and stop.")
    model, data, qat, args, other = parse(parser, argv)
    config = qat.to_config()
    _check_sizes(args)
    args.learning_rate = qat.learning_rate(args.learning_rate)
    args.remove_unused_columns = False  # images become pixels only when a batch is read
    output = Path(str(args.output_dir))
    args.resume_from_checkpoint = _resumable(output, args.resume_from_checkpoint)
    require_exportable(output / EXPORT, config)
    session = open_session(model, data, trains=True)
    session.require_trainable(config)
    if other.dry_run:
        print(_outlook(session, config, args))
        return
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
    check_best(trainer.args, in_float)
    trainer.calibrate()
    calibrated = trainer.evaluate()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return {"float": in_float, "calibrated": calibrated, "qat": trainer.evaluate()}


def _check_sizes(args: TrainingArguments) -> None:
    """Raise `ConfigError` for batches of nothing."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, not {getattr(args, name)}.")


def check_best(args: TrainingArguments, measured: dict[str, float]) -> None:
    """Raise `ConfigError` for a `metric_for_best_model` that no evaluation gives, before the training."""
    name = args.metric_for_best_model
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in measured:
        known = ", ".join(quality(measured))
        raise ConfigError(f"metric_for_best_model is {name!r}, and what is measured is {known}.")


def _resumable(output: Path, checkpoint: str | None) -> str | None:
    """The checkpoint to go on from: the one that is named, or where "True" is, as in scripts, the newest.

    Raises:
        ConfigError: it is not there; before any time is spent.
    """
    if checkpoint is None or checkpoint.lower() in ("false", "no"):
        return None
    if checkpoint.lower() == "true":
        newest: str | None = get_last_checkpoint(str(output)) if output.is_dir() else None
        if newest is None:
            raise ConfigError(f"{output} has no checkpoint to resume from: leave --resume_from_checkpoint out.")
        return newest
    if not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        raise ConfigError(
            f"{checkpoint} is no checkpoint to resume from, as it has no {TRAINER_STATE_NAME}: name a folder such as "
            f"{output / 'checkpoint-500'}, or True for the newest."
        )
    return checkpoint


def _outlook(session: Session, config: QATConfig, args: TrainingArguments) -> str:
    """What would be done: layers, what stays in float, the size of the file, the number of steps and their time."""
    model = copy.deepcopy(session.model)
    if len(session.train) < 2:
        raise ConfigError("there is one image only: nothing can be learned from that.")
    if state_of(model) is None:
        prepare_qat(model, config, session.inputs(range(2)))
    layers = qat_layers(model)
    weights = sum(layer.weight.numel() * layer.weight_quantizer.spec.bits / 8 for layer in layers.values())
    everything = sum(parameter.numel() for parameter in session.model.parameters())
    epoch = -(-len(session.train) // (args.train_batch_size * args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else epoch * args.num_train_epochs
    time_in_float = _duration(steps * args.gradient_accumulation_steps * _step_seconds(session, args))
    lines = [
        f"{type(session.model).__name__}, {everything / 1e6:.2f} million parameters, for {config.target}",
        f"  {len(layers)} layers with quantized weights, {weights / 1e6:.2f} MB of codes",
        *(f"  in float, {reason}: {_named(found)}" for reason, found in by_reason(float_operations(model)).items()),
        f"  {len(session.train)} images to train on, {len(session.evaluation)} to evaluate on"
        + (f", {len(session.classes)} classes" if session.classes else ""),
        f"  {steps:.0f} steps of {args.train_batch_size} images, about {time_in_float} of training in float, and one "
        "to two times that with quantizers",
    ]
    return "\n".join(lines)


def _step_seconds(session: Session, args: TrainingArguments) -> float:
    """Of a step of the float model without an optimizer: the second of two, as the first one sets things up."""
    model = copy.deepcopy(session.model).to(args.device).train()
    rows = range(min(args.train_batch_size, len(session.train)))
    batch = send_to_device(session.task.collate([session.train[row] for row in rows]), args.device)
    labels = batch.pop("labels") if session.task.loss is not None else None
    for _ in range(2):
        start = time.perf_counter()
        outputs = model(**batch)
        loss = outputs.loss if session.task.loss is None else session.task.loss(outputs, labels)
        loss.backward()
        seconds = time.perf_counter() - start
    return seconds


def _duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `5.5 hours`."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _named(operations: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(paths)} {name}" for name, paths in operations.items())
