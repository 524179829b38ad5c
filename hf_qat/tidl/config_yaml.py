"""`config.yaml` and `dataset.yaml`, in edgeai-benchmark's schema.

Sources: edgeai-benchmark, examples/configs/yaml/param_template_config.yaml and
edgeai_benchmark/interfaces/get_configs_from_file.py; edgeai-modelzoo, models/vision/classification/…_config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto

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


def config(
    name: str,
    file: ModelProto,
    digest: str,
    task: tuple[str, dict[str, Any], str],
    preprocess: Mapping[str, Any],
    session: Mapping[str, Any],
    options: Mapping[str, Any],
    target: str,
    ranges: Ranges,
    classes: int,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `config.yaml`.

    Args:
        name: of the model; its file is `model/<name>.onnx`.
        file: the model itself, for names and shapes of inputs and outputs.
        digest: SHA-256 of the file, from which its id is made.
        task: a row of `TASKS`.
        preprocess, session: from `preprocess.recipe_of`.
        options: from `runtime_options`.
        target: the device.
        ranges: how the model carries its ranges.
        classes: number of labels; 0 if there are none.
        metrics: accuracy of the trained model, by TI's names, such as `accuracy_top1%`.
    """
    task_type, postprocess, prefix = task
    dataset = {"num_classes": classes, "dataset_info": "dataset.yaml"} if classes else {}
    return {
        "task_type": task_type,
        "calibration_dataset": dataset,
        "input_dataset": dict(dataset),
        "preprocess": dict(preprocess),
        "session": {
            "session_name": "onnxrt",
            "target_device": target,
            **session,
            "runtime_options": {**options, "info": {"prequantized_model_type": PREQUANTIZED[ranges]}},
            "model_path": f"model/{name}.onnx",
            "model_id": f"{prefix}-{digest[:8]}",
            "input_details": [_details(value) for value in file.graph.input],
            "output_details": [_details(value) for value in file.graph.output],
            "num_inputs": len(file.graph.input),
        },
        "postprocess": dict(postprocess),
        "metric": {"label_offset_pred": 0} if task_type != "depth_estimation" else {},
        "model_info": {
            "metric_reference": dict(metrics),
            "model_shortlist": None,
            "compact_name": name,
            "shortlisted": False,
        },
    }


def _details(value: ValueInfoProto) -> dict[str, Any]:
    """Name, shape and type as ONNX Runtime names them."""
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return {"name": value.name, "shape": shape, "type": f"tensor({kind})"}


def dataset(name: str, labels: Mapping[int, str], colours: bool) -> dict[str, Any]:
    """The content of `dataset.yaml`.

    Args:
        name: of the model.
        labels: number → name of each class.
        colours: add a colour per class, for segmentation.
    """
    content: dict[str, Any] = {
        "info": {"description": f"classes of {name}"},
        "categories": [{"id": number, "supercategory": label, "name": label} for number, label in labels.items()],
    }
    if colours:
        content["color_map"] = [_colour(number) for number in labels]
    return content


def _colour(number: int) -> list[int]:
    """The colour of a class in the PASCAL VOC map: the bits of its number, spread over red, green and blue."""
    return [sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
