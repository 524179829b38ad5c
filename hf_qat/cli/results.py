"""What `train` and `calibrate` come to: figures of each stage, `report.html`, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_qat.cli.arguments import DataArguments
from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import AnalysisError
from hf_qat.graph.progress import bars_hidden
from hf_qat.model.analysis.analyze import analyze
from hf_qat.model.state import require_stage
from hf_qat.publish.accuracy import MEASURED_AS, Accuracy, quality
from hf_qat.publish.directory import ONNX, TIDL, Contents
from hf_qat.publish.figures import figures
from hf_qat.publish.html_report import Results, figures_directory, save_report
from hf_qat.publish.runtime_cost import RuntimeCost, runtime_cost
from hf_qat.trainer.batches import first_inputs
from hf_qat.trainer.callbacks import freezing_of_batch_norm
from hf_qat.trainer.histories import RangeHistory
from hf_qat.trainer.trainer import QATTrainer


#: So many images are analyzed.
ANALYZED = 32

REPORT = "report.html"


def stages_of(evaluated: Mapping[str, Mapping[str, object]], trainer: QATTrainer) -> Accuracy:
    """What a card calls a stage → loss and metrics; with those of the exported file, which has no loss.

    Args:
        evaluated: a key of `MEASURED_AS` → what `evaluate` returned.
        trainer: after `export`.
    """
    found = {stage: quality(metrics) for stage, metrics in evaluated.items()}
    if trainer.exported is not None:
        found["onnxruntime"] = trainer.exported.accuracy.get("onnxruntime", {})
    return {label: found[stage] for stage, label in MEASURED_AS.items() if found.get(stage)}


def write_report(
    trainer: QATTrainer, name: str, stages: Accuracy, exported: Path, path: Path, history: RangeHistory | None = None
) -> list[Path]:
    """Analyze the trainer's model, and write the page and its figures; what was written.

    Nothing is, and a line says why, where matplotlib is missing.

    Args:
        trainer: after `export` to `exported`.
        name: of the float model.
        stages: as `stages_of` gives them.
        exported: the directory.
        path: of the page.
        history: of the ranges in training.
    """
    config = require_stage(trainer.model, Stage.PREPARED, "report on").config
    inputs = first_inputs(trainer, trainer.model, ANALYZED)
    with bars_hidden(bool(trainer.args.disable_tqdm)):
        found = analyze(trainer.model, inputs, num_batches=2)
    try:
        save_report(
            Results(
                name=name,
                config=config,
                accuracy=stages,
                analysis=found,
                directory=exported,
                contents=None if trainer.exported is None else trainer.exported.contents,
                log_history=trainer.state.log_history,
                cost=None if trainer.exported is None else _cost(exported, trainer.exported.contents, inputs),
                batch_norm_frozen_at=freezing_of_batch_norm(trainer.callback_handler.callbacks, config),
                range_steps=[] if history is None else history.steps,
                ranges={} if history is None else history.ranges,
            ),
            path,
        )
    except AnalysisError as error:
        print(f"There is no {path.name}: {error}")
        return []
    return [path, figures_directory(path)]


def _cost(exported: Path, contents: Contents | None, inputs: Sequence[Mapping[str, Any]]) -> RuntimeCost | None:
    """Of the exported file, on the first image; `None` where there is none."""
    if contents is None or not inputs:
        return None
    image = {name: value[:1].numpy() for name, value in inputs[0].items() if isinstance(value, Tensor)}
    return runtime_cost(exported / ONNX, image, contents.onnx.session_options)


def summary(stages: Accuracy, written: Sequence[Path], exported: Path, data: DataArguments) -> str:
    """What was measured, where it lies, and the next commands."""
    rows = [f"  {label.replace('`', ''):<42} {in_words(metrics)}" for label, metrics in stages.items()]
    measured = ["", "Measured on the evaluation set:", *rows] if rows else []
    return "\n".join(
        [
            *measured,
            "",
            *(f"Written: {path}" for path in written),
            *(f"{'Next:' if k == 0 else '':<8} {step}" for k, step in enumerate(_next(bool(rows), exported, data))),
        ]
    )


def _next(measured: bool, exported: Path, data: DataArguments) -> Iterator[str]:
    """Commands to type for what was exported."""
    if measured:
        options = ["--model_name_or_path", str(exported / ONNX), "--dataset_name", data.dataset_name]
        yield shlex.join(["hf-qat", "evaluate", *options, "--task", data.task])
    for file in sorted(exported.glob(f"{TIDL}/*/model/*.onnx")):
        yield shlex.join(["hf-qat", "check", str(file), "--target", file.parents[1].name])
    yield shlex.join(["hf-qat", "push", str(exported), "USER/MODEL"])


def in_words(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.9833, loss 0.05`, the losses last."""
    names = sorted(metrics, key=lambda name: name.endswith("loss"))
    return ", ".join(f"{name} {figures(metrics[name])}" for name in names)
