"""`config.yaml` and `dataset.yaml`, in edgeai-benchmark's schema.

Sources: edgeai-benchmark, examples/configs/yaml/param_template_config.yaml and
edgeai_benchmark/interfaces/get_configs_from_file.py; edgeai-modelzoo, models/vision/classification/…_config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto

from hf_qat.tidl.preprocess import Recipe
from hf_qat.tidl.runtime_options import PREQUANTIZED, Ranges


#: Our tasks, by what the name of a Hugging Face class ends in: task_type, postprocess, the start of a model_id.
TASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ForImageClassification": ("classification", {}, "cl"),
    "ForSemanticSegmentation": ("segmentation", {"data_layout": "NCHW", "with_argmax": True}, "ss"),
    "ForDepthEstimation": ("depth_estimation", {"data_layout": "NCHW"}, "de"),
}


def task_of(model: object) -> tuple[str, dict[str, Any], str] | None:
    """The row of `TASKS` for a model, or `None` if edgeai-benchmark cannot read its outputs."""
    name = type(model).__name__
    for base in [name, *(base.__name__ for base in type(model).__mro__)]:
        for ending, row in TASKS.items():
            if base.endswith(ending):
                return row
    return None


@dataclass(frozen=True)
class Described:
    """What `config.yaml` is made from.

    Attributes:
        name: of the model; its file is `model/<name>.onnx`.
        file: the model itself, for names and shapes of inputs and outputs.
        digest: SHA-256 of the file, from which its id is made.
        task: a row of `TASKS`.
        recipe: from `preprocess.recipe_of`.
        options: from `runtime_options`.
        target: the device.
        ranges: how the model carries its ranges.
        classes: number of labels; 0 if there are none.
        metrics: accuracy of the trained model, by TI's names, such as `accuracy_top1%`.
    """

    name: str
    file: ModelProto
    digest: str
    task: tuple[str, dict[str, Any], str]
    recipe: Recipe
    options: Mapping[str, Any]
    target: str
    ranges: Ranges
    classes: int
    metrics: Mapping[str, float]


def config(model: Described) -> dict[str, Any]:
    """The content of `config.yaml`."""
    task_type, postprocess, _ = model.task
    offset = model.recipe.label_offset
    dataset = {"num_classes": model.classes + offset, "dataset_info": "dataset.yaml"} if model.classes else {}
    return {
        "task_type": task_type,
        "calibration_dataset": dataset,
        "input_dataset": dict(dataset),
        "preprocess": dict(model.recipe.preprocess),
        "session": _session(model),
        "postprocess": dict(postprocess),
        "metric": {"label_offset_pred": offset} if task_type != "depth_estimation" else {},
        "model_info": {
            "metric_reference": dict(model.metrics),
            "model_shortlist": None,
            "compact_name": model.name,
            "shortlisted": False,
        },
    }


def _session(model: Described) -> dict[str, Any]:
    return {
        "session_name": "onnxrt",
        "target_device": model.target,
        **model.recipe.session,
        "runtime_options": {**model.options, "info": {"prequantized_model_type": PREQUANTIZED[model.ranges]}},
        "model_path": f"model/{model.name}.onnx",
        "model_id": f"{model.task[2]}-{model.digest[:8]}",
        "input_details": [_details(value) for value in model.file.graph.input],
        "output_details": [_details(value) for value in model.file.graph.output],
        "num_inputs": len(model.file.graph.input),
    }


def _details(value: ValueInfoProto) -> dict[str, Any]:
    """Name, shape and type as ONNX Runtime names them."""
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return {"name": value.name, "shape": shape, "type": f"tensor({kind})"}


def dataset(name: str, labels: Mapping[int, str], colours: bool, offset: int = 0) -> dict[str, Any]:
    """The content of `dataset.yaml`.

    Args:
        name: of the model.
        labels: number → name of each class.
        colours: add a colour per class, for segmentation.
        offset: what the data call class 0 of the model, see `preprocess.Recipe`.
    """
    named = {number + offset: label for number, label in labels.items()}
    content: dict[str, Any] = {
        "info": {"description": f"classes of {name}"},
        "categories": [{"id": number, "supercategory": label, "name": label} for number, label in named.items()],
    }
    if colours:
        content["color_map"] = [_colour(number) for number in range(max(named) + 1)]
    return content


def _colour(number: int) -> list[int]:
    """The colour of a class in the PASCAL VOC map: the bits of its number, spread over red, green and blue."""
    return [sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
