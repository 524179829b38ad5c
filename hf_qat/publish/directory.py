"""The directory of one repository: int8 safetensors at its root, `onnx/`, `tidl/<device>/`, and the model card.

It appears as a whole or not at all.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import CalibrationError, ConfigError, ExportError, FixedBatchError, ProcessorError
from hf_qat.export import ExportReport, export_onnx, require_agreement, verify_onnx
from hf_qat.files.atomic import written_whole
from hf_qat.model.state import require_stage
from hf_qat.tidl.bundle import export_tidl
from hf_qat.tidl.check import check_tidl
from hf_qat.tidl.devices import DEVICES
from hf_qat.tidl.report import TidlReport


logger = logging.getLogger(__name__)

#: Where things lie in a repository.
ONNX, TIDL, CARD, PLOT = "onnx/model.onnx", "tidl", "README.md", "accuracy.png"


@dataclass(frozen=True)
class Contents:
    """What a repository holds beside its card.

    Attributes:
        onnx: the file `onnx/model.onnx`, and how far ONNX Runtime agrees with torch on it.
        tidl: TIDL's part, and what it will take of it; `None` if there is none.
        why_no_tidl: the reason then; empty for a target that TIDL does not run on.
        processor: whether an image processor is there.
        real_inputs: whether the comparison was on real inputs; else on random ones.
        plot: whether there is a figure of the accuracy by stage.
        any_batch: whether the ONNX file takes batches of any size; else one image at a time.
        inputs: name, shape and type in numpy of the ONNX file's inputs; a free batch is 1, another free size `FREE`.
        takes_photos: whether the processor makes all of them of a photo, of whatever size that is.
        bundle_takes_photos: whether `infer.py` of TIDL's part does so.
    """

    onnx: ExportReport
    tidl: TidlReport | None
    why_no_tidl: str
    processor: bool
    real_inputs: bool
    plot: bool = False
    any_batch: bool = True
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    takes_photos: bool = False
    bundle_takes_photos: bool = False


def save_model(model: nn.Module, directory: Path, processor: Any | None) -> None:
    """Write a converted model as `from_pretrained` takes it: `config.json`, `model.safetensors`, processor files.

    All of them are there at the end, or what was there before; other files of the directory stay.

    Raises:
        ExportError: no Hugging Face model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ExportError(
            f"{type(model).__name__} is no Hugging Face model, so from_pretrained could not load it again. Export it "
            "alone: export_onnx(trainer.convert(), path)."
        )
    with written_whole(directory) as aside:
        model.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)


def write_contents(
    model: nn.Module, directory: Path, processor: Any | None, batches: Sequence[Mapping[str, Any]]
) -> Contents:
    """Write everything but the card.

    Args:
        model: converted; a Hugging Face one.
        directory: there, and empty.
        processor: whatever prepares the images; with `save_pretrained`.
        batches: real inputs, as forward takes them, without labels: what the file is verified on, and TIDL's frames.
            Without any, the file is verified on random numbers, and there is nothing for TIDL.

    Raises:
        ExportError: the model cannot be expressed as ONNX, or is no Hugging Face one.
    """
    save_model(model, directory, processor)
    path = directory / ONNX
    example = dict(batches[0]) if batches else None
    any_batch = True
    try:
        report = export_onnx(model, path, example, dynamic_batch=True, verify=not batches)
    except FixedBatchError as error:
        logger.warning("%s takes one image at a time: %s", ONNX, error)
        any_batch = False
        report = export_onnx(model, path, example, verify=not batches)
    if batches:
        report = verify_onnx(model, path, [dict(batch) for batch in batches])
        require_agreement(report)
    tidl, why_not = _write_tidl(model, directory / TIDL, processor, batches)
    file = onnx.load(path, load_external_data=False)
    target = require_stage(model, Stage.CONVERTED, "export").config.target
    return Contents(
        report,
        tidl,
        why_not,
        processor is not None,
        bool(batches),
        any_batch=any_batch,
        inputs=tuple(map(_described, file.graph.input)),
        takes_photos=processor is not None and makes_inputs(processor, file),
        bundle_takes_photos=(directory / TIDL / target / "config.yaml").is_file(),
    )


#: Of an example of a file's input, where height and width are free.
FREE = 224


def _described(value: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...], str]:
    """Name, shape and type of an input of a file."""
    tensor = value.type.tensor_type
    sizes = [size.dim_value or (FREE if axis else 1) for axis, size in enumerate(tensor.shape.dim)]
    return value.name, tuple(sizes), onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name


#: Width and height of two photos that are unlike those that a model was made with.
PHOTOS = ((97, 61), (60, 140))


def makes_inputs(processor: Any, file: onnx.ModelProto) -> bool:
    """Whether a processor makes all inputs of an ONNX file of one photo, of whatever size.

    It does not where a model wants two photos, a map beside it, points or words, or one size that it does not make.
    """
    for size in PHOTOS:
        try:
            made = processor(Image.new("RGB", size), return_tensors="np")
        except Exception:  # processors say in many ways that they want something else
            return False
        if not all(_fits(made.get(value.name), value) for value in file.graph.input):
            return False
    return True


def _fits(array: Any, value: onnx.ValueInfoProto) -> bool:
    """Whether an input of a file takes an array: its fixed sizes are those of the array."""
    sizes = value.type.tensor_type.shape.dim
    if not isinstance(array, np.ndarray) or array.ndim != len(sizes):
        return False
    return all(
        not size.HasField("dim_value") or size.dim_value == n for size, n in zip(sizes, array.shape, strict=True)
    )


def _write_tidl(
    model: nn.Module, directory: Path, processor: Any | None, batches: Sequence[Mapping[str, Any]]
) -> tuple[TidlReport | None, str]:
    """The bundle for the device of the recipe, or the reason why there is none."""
    target = require_stage(model, Stage.CONVERTED, "export").config.target
    if target not in {device.name for device in DEVICES}:
        return None, ""
    if not batches:
        return None, "there was no data set to take calibration frames from."
    frames = [dict(batch) for batch in batches]
    images = isinstance(getattr(processor, "image_processor", processor), BaseImageProcessor)
    try:
        try:
            export_tidl(model, directory / target, target, frames, processor if images else None)
        except ProcessorError as error:
            logger.warning("The bundle for TIDL is without config.yaml: %s", error)
            export_tidl(model, directory / target, target, frames)
    except (ExportError, ConfigError, CalibrationError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        # All else is of use without it, perhaps after days of training: so it is said, and not raised.
        logger.warning("No bundle for TIDL on %s: %s", target, error)
        return None, str(error)
    (file,) = (directory / target / "model").glob("*.onnx")
    return check_tidl(file, target), ""
