"""`config.yaml` and `dataset.yaml`, in edgeai-benchmark's schema.

Sources: edgeai-benchmark, examples/configs/yaml/param_template_config.yaml and
edgeai_benchmark/interfaces/get_configs_from_file.py; edgeai-modelzoo, models/vision/classification/…_config.yaml;
for detection, configs/detection_experimental.py of edgeai-benchmark (DETR of Hugging Face).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto

from hf_qat.tidl.preprocess import Recipe
from hf_qat.tidl.runtime_options import PREQUANTIZED, Ranges


@dataclass(frozen=True)
class Task:
    """What edgeai-benchmark does with the outputs of a kind of model.

    Attributes:
        type: its `task_type`.
        prefix: what a `model_id` starts with.
        postprocess: the section of that name: arguments of the function that makes the steps after the model.
        backend: what reads and resizes images.
    """

    type: str
    prefix: str
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "pil"


#: Class scores with "no object" as the last class, and boxes as centre, width and height from 0 to 1. The steps of
#: edgeai-benchmark: softmax, one row (box, label, score) for each query, corners of boxes, size of the image. Its last
#: step takes only images that OpenCV has read.
_DETECTION = Task(
    "detection",
    "od",
    {
        "logits_bbox_to_bbox_ls": True,
        "reshape_list": [[-1, 4], [-1, 1], [-1, 1]],
        "squeeze_axis": None,
        "formatter": {"type": "DetectionXYWH2XYXYCenterXY"},
        "normalized_detections": True,
        "resize_with_pad": False,
    },
    backend="cv2",
)

#: What the name of a Hugging Face class ends in → its task. Of the detectors, only those whose scores are a softmax
#: with "no object", the one kind that edgeai-benchmark reads from logits; of them, the name is the whole one.
TASKS: dict[str, Task] = {
    "ForImageClassification": Task("classification", "cl"),
    "ForSemanticSegmentation": Task("segmentation", "ss", {"data_layout": "NCHW", "with_argmax": True}),
    "ForDepthEstimation": Task("depth_estimation", "de", {"data_layout": "NCHW"}),
}
DETECTORS = frozenset({"DetrForObjectDetection", "YolosForObjectDetection", "TableTransformerForObjectDetection"})


def task_of(model: object) -> Task | None:
    """The task of a model, or `None` if edgeai-benchmark cannot read its outputs."""
    for base in type(model).__mro__:
        if base.__name__ in DETECTORS:
            return _DETECTION
        for ending, task in TASKS.items():
            if base.__name__.endswith(ending):
                return task
    return None


@dataclass(frozen=True)
class Described:
    """What `config.yaml` is made from.

    Attributes:
        name: of the model; its file is `model/<name>.onnx`.
        file: the model itself, for names and shapes of inputs and outputs.
        digest: SHA-256 of the file, from which its id is made.
        task: from `task_of`.
        recipe: from `preprocess.recipe_of`.
        options: from `runtime_options`.
        target: the device.
        ranges: how the model carries its ranges.
        metrics: accuracy of the trained model, by TI's names, such as `accuracy_top1%`.
    """

    name: str
    file: ModelProto
    digest: str
    task: Task
    recipe: Recipe
    options: Mapping[str, Any]
    target: str
    ranges: Ranges
    metrics: Mapping[str, float]


def config(model: Described) -> dict[str, Any]:
    """The content of `config.yaml`.

    The data sets are left open: edgeai-benchmark knows its own by name, and all others only as a Python class with the
    folders that it reads when the file is loaded.
    """
    return {
        "task_type": model.task.type,
        "calibration_dataset": None,
        "input_dataset": None,
        "preprocess": {**model.recipe.preprocess, "backend": model.task.backend},
        "session": _session(model),
        "postprocess": dict(model.task.postprocess),
        "metric": {} if model.task.type == "depth_estimation" else {"label_offset_pred": model.recipe.label_offset},
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
        "model_id": f"{model.task.prefix}-{model.digest[:8]}",
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
