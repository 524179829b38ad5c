"""`hf-qat calibrate`: an int8 model without training, from images that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_qat.cli.arguments import DataArguments, ModelArguments, QATArguments
from hf_qat.cli.parsing import count, parse, parser_of
from hf_qat.files.manifest import write_manifest


DESCRIPTION = (
    "Quantize a float model by calibration alone, often all that 8 bits need, and export it: int8 safetensors, QDQ "
    "ONNX, TIDL bundle, model card. The images need no labels; with labels, it is measured too. For example: "
    "hf-qat calibrate --model_name_or_path my/float-model --dataset_name photos/ --output_dir out"
)


def main(argv: Sequence[str]) -> None:
    """Calibrate, export, and print what was measured.

    Args:
        argv: what follows `hf-qat calibrate`.

    Raises:
        HfQatError: options that cannot be honoured; or what calibration and export raise.
        SystemExit: wrong options, or `--help`.
    """
    parser = parser_of("calibrate", DESCRIPTION, ModelArguments, DataArguments, QATArguments)
    parser.add_argument("--output_dir", type=Path, required=True, help="The directory to write.")
    parser.add_argument("--batch_size", type=count, default=16, help="Images at a time.")
    model, data, qat, other = parse(parser, argv)
    from hf_qat.cli.results import REPORT, stages_of, summary, write_report
    from hf_qat.cli.session import open_session, require_exportable, training_arguments  # PyTorch, not for --help
    from hf_qat.model.switches import fake_quant_disabled

    config = qat.to_config()
    require_exportable(other.output_dir, config)
    session = open_session(model, data, labelled=False)
    session.require_trainable(config)
    args = training_arguments(
        str(other.output_dir),
        per_device_train_batch_size=other.batch_size,
        per_device_eval_batch_size=other.batch_size,
        save_strategy="no",
    )
    trainer = session.trainer(args, config)
    evaluated: dict[str, dict[str, float]] = {}
    if session.evaluation is not None:
        with fake_quant_disabled(trainer.model):
            evaluated["float"] = trainer.evaluate()
    trainer.calibrate()
    if session.evaluation is not None:
        evaluated["calibrated"] = trainer.evaluate()
    exported = trainer.export(other.output_dir)
    stages = stages_of(evaluated, trainer)
    report = write_report(trainer, model.model_name_or_path, stages, exported, exported / REPORT)
    write_manifest(exported)
    print(summary(stages, [exported, *report], exported, data))
