"""`hf-qat evaluate`: how good a checkpoint or an ONNX file is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qat.cli.arguments import DataArguments, ModelArguments
from hf_qat.cli.parsing import count, parse, parser_of
from hf_qat.errors import ConfigError


if TYPE_CHECKING:
    from hf_qat.cli.session import Session


DESCRIPTION = (
    "Measure a model on images with labels: a float or int8 checkpoint in torch, or an ONNX file of ours on ONNX "
    "Runtime. For example: hf-qat evaluate --model_name_or_path out/export/onnx/model.onnx --dataset_name photos/"
)


def main(argv: Sequence[str]) -> None:
    """Evaluate, and print the metrics as JSON.

    Args:
        argv: what follows `hf-qat evaluate`.

    Raises:
        HfQatError: options that cannot be honoured, or a file that does not belong to a checkpoint.
        SystemExit: wrong options, or `--help`.
    """
    parser = parser_of("evaluate", DESCRIPTION, ModelArguments, DataArguments)
    parser.add_argument("--batch_size", type=count, default=16, help="Images at a time.")
    model, data, other = parse(parser, argv)
    from hf_qat.cli.session import open_session  # so that --help need not wait for PyTorch
    from hf_qat.publish.accuracy import quality

    file = Path(model.model_name_or_path) if model.model_name_or_path.endswith(".onnx") else None
    if file is not None:
        model = replace(model, model_name_or_path=str(checkpoint_of(file)))
    session = open_session(model, data, learns=False)
    metrics = measure(session, file, other.batch_size)
    print(f"On {len(session.evaluation)} images:", file=sys.stderr)  # the JSON goes to programs
    print(json.dumps(quality(metrics), indent=2))


def measure(session: Session, file: Path | None, batch_size: int) -> dict[str, float]:
    """What Trainer's evaluation says of the model of a session, or of the file that it was exported to."""
    from transformers import Trainer

    from hf_qat.cli.session import training_arguments
    from hf_qat.export.runtime_model import RuntimeModel

    evaluated: Any = session.model if file is None else RuntimeModel(session.model, file)
    args = training_arguments("unused", label_names=["labels"], per_device_eval_batch_size=batch_size)
    metrics: dict[str, float] = Trainer(evaluated.eval(), **session.trainer_arguments(args)).evaluate()
    return metrics


def checkpoint_of(file: Path) -> Path:
    """The folder of the checkpoint that an exported file belongs to: where it lies, or above.

    Raises:
        ConfigError: there is no such file, or no `config.json` in its folder or the one above.
    """
    if not file.is_file():
        raise ConfigError(f"there is no file {file}.")
    for folder in file.absolute().parents[:2]:
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"{file} has no config.json beside it or above: give a file in a directory that `hf-qat train`, "
        "`hf-qat calibrate` or QATTrainer.export has written."
    )
