"""`export_tidl`: a directory that Texas Instruments' compiler takes as it is."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import yaml
from onnx import ModelProto
from torch import nn
from transformers import BaseImageProcessor

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import ConfigError, ExportError, listed
from hf_qat.export import ExportReport, export_onnx, require_agreement, verify_onnx
from hf_qat.export.cleanup import drop_unused_values
from hf_qat.export.onnx_graph import with_shapes
from hf_qat.files.atomic import whole_directory
from hf_qat.files.manifest import digest, write_manifest
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.model.state import require_stage
from hf_qat.tidl import templates
from hf_qat.tidl.adapt import adapt, attention_like
from hf_qat.tidl.artifacts import ARTIFACTS, SETTINGS, pack_artifacts
from hf_qat.tidl.check import check_tidl
from hf_qat.tidl.clip import clips_for_quantizers
from hf_qat.tidl.config_yaml import Described, Task, config, dataset, task_of
from hf_qat.tidl.devices import Device, find_device
from hf_qat.tidl.frames import Frames, frames_of, write_frames
from hf_qat.tidl.preprocess import Recipe, check_size, recipe_of, require_image_processor
from hf_qat.tidl.readme import Readme, readme
from hf_qat.tidl.report import TidlReport
from hf_qat.tidl.runtime_options import PREQUANTIZED, Ranges, runtime_options


logger = logging.getLogger(__name__)

#: What TI calls the newest opset of its own trained models (edgeai-torchmodelopt, quantization v2).
OPSET = 17

#: TI's default number of calibration frames (edgeai-tidl-tools, examples/osrt_python/README.md).
FRAMES = 20


@dataclass(frozen=True)
class _Content:
    """What the files of a bundle are made from."""

    name: str
    device: Device
    ranges: Ranges
    task: Task | None
    labels: dict[int, str]
    frames: Frames
    metrics: dict[str, float]
    recipe: Recipe | None

    def __post_init__(self) -> None:
        if self.recipe is not None:
            check_size(self.recipe.preprocess, next(iter(self.frames.frames[0].values())).shape)


def export_tidl(
    model: nn.Module,
    directory: str | os.PathLike[str],
    target: str,
    calibration_data: Iterable[Inputs],
    processor: BaseImageProcessor | None = None,
    labels: Mapping[int, str] | Sequence[str] | None = None,
    *,
    name: str | None = None,
    frames: int = FRAMES,
    ranges: Ranges = "qdq",
    metrics: Mapping[str, float] | None = None,
    artifacts: str | os.PathLike[str] | None = None,
) -> Path:
    """Write everything that can be made without TI's compiler, and the scripts that run it: all of it, or nothing.

    There is no `param.yaml`, which would tell TI's tools that the model is compiled, unless `artifacts` are given.

    Args:
        model: converted, trained for `target`.
        directory: where to; absent, empty, or an earlier bundle without compiled artifacts, which is replaced.
        target: the device: `TDA4VM`, `AM62A`, `AM67A`, `AM68A`, `AM69A`, or a part number such as `J721S2`.
        calibration_data: batches as forward takes them, preprocessed: the first `frames` inputs go into the bundle.
        processor: the model's image processor, for `config.yaml`; without one it is left out, and the log warns of it.
        labels: names of the classes, by number or in order; from the model's config, if it has one.
        name: of the model and its file; its `model_type` if left out.
        frames: how many calibration frames.
        ranges: `"qdq"`, or for TDA4VM also `"clip"`: TI's older form, float weights and ranges in `Clip` nodes.
        metrics: measured accuracy, by TI's names (`accuracy_top1%`, `accuracy_mean_iou%`), for `config.yaml`.
        artifacts: what `compile.py` made of the same bundle: is checked, and packed with `param.yaml`.

    Returns:
        The directory.

    Raises:
        StageError: the model is not converted.
        ConfigError: no such device, no such form of ranges on it, `name` is no file name, or `labels` are not those of
            the model's classes.
        CalibrationError, CaptureError: no frames, NaN in one, frames of several sizes, or of no tensors.
        ExportError: TIDL would refuse the model; the processor cannot be expressed; the directory holds something
            else; the artifacts are of another model.
    """
    require_stage(model, Stage.CONVERTED, "export")
    device = _device(target, ranges)
    found, task = frames_of(model, calibration_data, frames), task_of(model)
    content = _Content(
        name=_name(model, name),
        device=device,
        ranges=ranges,
        task=task,
        labels=_labels(model, labels),
        frames=found,
        metrics={key: float(value) for key, value in (metrics or {}).items()},
        recipe=_recipe(processor, task, found),
    )
    with whole_directory(Path(directory), ARTIFACTS) as made:
        _write_model(model, made, content)
        if artifacts is not None:
            pack_artifacts(made, artifacts)
    logger.info("%s: ready for TI's compiler; README.md has the commands", directory)
    return Path(directory)


def _recipe(processor: BaseImageProcessor | None, task: Task | None, found: Frames) -> Recipe | None:
    """How images are made ready; `None` where `config.yaml` is left out, whether it has words for that or not."""
    if processor is None:
        return None
    processor = require_image_processor(processor)
    return None if task is None or found.several_inputs else recipe_of(processor)


def _device(target: str, ranges: Ranges) -> Device:
    """The device, if it takes that form of ranges."""
    device = find_device(target)
    if ranges not in PREQUANTIZED or (ranges == "clip" and not device.power_of_two.value):
        raise ConfigError(f'ranges={ranges!r} for {device.name}: choose "qdq", or "clip" for TDA4VM.')
    return device


def _name(model: nn.Module, given: str | None) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    name = str(kind or type(model).__name__).lower() if given is None else given
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"name={name!r} is to be the name of a file: use letters, digits, '-', '_' and '.' only.")
    return name


def _labels(model: nn.Module, labels: Mapping[int, str] | Sequence[str] | None) -> dict[int, str]:
    own = getattr(getattr(model, "config", None), "id2label", None) or {}
    given = own if labels is None else labels
    named = given if isinstance(given, Mapping) else dict(enumerate(given))
    if not all(str(number).isdecimal() for number in named):
        raise ConfigError(
            f"labels has {listed([repr(number) for number in named])} in the place of numbers: give number → name "
            "(id2label, not label2id), or the names in order."
        )
    if own and {int(number) for number in named} != {int(number) for number in own}:
        raise ConfigError(
            f"labels names {len(named)} classes ({listed([str(number) for number in named])}), and the model tells "
            f"{len(own)} apart: give a name for each, in order or by number, or leave labels out."
        )
    return {int(number): str(label) for number, label in sorted(named.items())}


def _write_model(model: nn.Module, made: Path, content: _Content) -> None:
    """The ONNX file first; all else describes it."""
    path = made / "model" / f"{content.name}.onnx"
    export_onnx(model, path, content.frames.as_batch(), opset_version=OPSET, verify=False)
    file = adapt(onnx.load(path))
    if content.ranges == "clip":
        file = clips_for_quantizers(file)
    drop_unused_values(file)
    file = with_shapes(file)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, path)
    check = check_tidl(path, content.device.name)
    if not check.ok:
        worst = next(issue for issue in check.issues if issue.verdict == "refused")
        raise ExportError(
            f"TIDL refuses this model on {content.device.name}: {' '.join([worst.operator, worst.layer, '']).lstrip()}"
            f"{worst.why}. Do this: {worst.remedy}. check_tidl on the file of export_onnx lists everything."
        )
    verified = verify_onnx(model, path, [content.frames.as_batch()])
    require_agreement(verified)
    _write_files(made, file, content, check, verified)


def _write_files(made: Path, file: ModelProto, content: _Content, check: TidlReport, verified: ExportReport) -> None:
    path = f"model/{content.name}.onnx"
    write_frames(content.frames.frames, made / "calibration")
    options = runtime_options(content.device, len(content.frames.frames), content.ranges)
    _write_json(made / SETTINGS, _settings(file, path, content, options))
    _write_json(made / "check.json", {**check.to_dict(), "onnxruntime": _agreement(verified)})
    why_not = _write_config(made, file, content, options, digest(made / path))
    if why_not is not None:
        logger.warning("%s: %s", content.name, why_not)
    for script in ("compile.py", "infer.py"):
        (made / script).write_text(_template(script), encoding="utf-8")
    described = Readme(
        name=content.name,
        device=content.device,
        ranges=content.ranges,
        task=content.task,
        file=file,
        check=check,
        frames=len(content.frames.frames),
        why_no_config=why_not,
    )
    (made / "README.md").write_text(readme(described, _template("README.md")), encoding="utf-8")
    write_manifest(made)


def _settings(file: ModelProto, path: str, content: _Content, options: dict[str, Any]) -> dict[str, Any]:
    """What `compile.py` and `infer.py` read."""
    return {
        "model": path,
        "target": content.device.name,
        "soc": content.device.soc,
        "task": None if content.task is None else content.task.type,
        "disable_optimizations": attention_like(file),
        "compile": options,
        "labels": {str(number): label for number, label in content.labels.items()},
    }


def _write_config(made: Path, file: ModelProto, content: _Content, options: dict[str, Any], sha256: str) -> str | None:
    """Write `dataset.yaml`, and `config.yaml` if it can be complete; else return why not."""
    if content.labels:
        colours = content.task is not None and content.task.type == "segmentation"
        offset = 0 if content.recipe is None else content.recipe.label_offset
        _write_yaml(made / "dataset.yaml", dataset(content.name, content.labels, colours, offset))
    if content.frames.several_inputs:
        return _left_out(_SEVERAL.format(", ".join(content.frames.frames[0])))
    if content.recipe is None or content.task is None:
        return _left_out(_NO_TASK if content.task is None else _NO_PROCESSOR)
    if content.task.backend == "cv2" and content.recipe.preprocess["interpolation"] is not None:
        return _left_out(_NO_FILTER)
    described = Described(
        name=content.name,
        file=file,
        digest=sha256,
        task=content.task,
        recipe=content.recipe,
        options=options,
        target=content.device.name,
        ranges=content.ranges,
        metrics=content.metrics,
    )
    _write_yaml(made / "config.yaml", config(described))
    return None


_NO_PROCESSOR = (
    "export_tidl got no processor that it can describe, so how images are prepared is not known (give it the model's "
    "image processor)"
)
_SEVERAL = "it describes how one image is prepared, and this model takes more: {}"
_NO_TASK = "edgeai-benchmark cannot read the outputs of this kind of model"
_NO_FILTER = (
    "edgeai-benchmark resizes images for detection with OpenCV, which has only the bilinear filter in common with "
    "this processor"
)


def _left_out(reason: str) -> str:
    """What a bundle without `config.yaml` lacks, in Markdown."""
    return (
        f"**`config.yaml` is left out**: {reason}. `infer.py` takes the frames but no images, and `pack_artifacts` "
        "writes no `param.yaml`"
    )


def _agreement(report: ExportReport) -> dict[str, Any]:
    """How far ONNX Runtime and torch agree on the calibration frames."""
    return {
        "frames": report.samples,
        "top1_agreement": report.top1_agreement,
        "max_abs_diff": report.max_abs_diff,
        "max_output_lsb": report.max_output_lsb,
    }


def _template(name: str) -> str:
    return resources.files(templates).joinpath(name).read_text(encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    # Through JSON, so that equal lists are written out, not as references.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False), encoding="utf-8")
