"""How edgeai-benchmark (edgeai-tensorlab, r10.1 to r11.2) reads its settings and a `config.yaml`, step by step.

Written after its interfaces/get_configs_from_file.py, core/onnxrt_runtime.py, sessions/basert_session.py and
postprocess/: the same look-ups fail here that fail there.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import yaml


#: Of its settings, what a model's own options are merged into.
SETTINGS = {"advanced_options:calibration_frames": 12, "advanced_options:calibration_iterations": 12}

#: Classes of its package `datasets` that a dictionary may name.
DATASETS = {"ImageNetCls", "ImageClassification", "COCODetection", "ADE20KSegmentation", "NYUDepthV2"}

FORMATTERS = {"DetectionXYWH2XYXYCenterXY", "DetectionBoxSL2BoxLS", "DetectionXYXY2YXYX", "DetectionXYWH2XYXY"}


def configs(models_path: str, configs_path: str) -> dict[str, dict[str, Any]]:
    """`get_configs_from_file`: every model of a file, which may list several."""
    if configs_path == os.path.basename(configs_path):
        configs_path = os.path.abspath(os.path.join(models_path, configs_path))
    content = yaml.safe_load(Path(configs_path).read_text())
    if "configs" not in content:
        return {"model-1": pipeline(content, None)}
    made = {}
    for name, entry in content["configs"].items():
        path = os.path.normpath(entry)
        path = path if path.startswith(os.sep) else os.path.abspath(os.path.join(models_path, path))
        made[name] = pipeline(yaml.safe_load(Path(path).read_text()), os.path.dirname(path))
    return made


def pipeline(param: dict[str, Any], directory: str | None) -> dict[str, Any]:
    """`pipeline_param_to_config`."""
    made = copy.deepcopy(param)
    for name in ("calibration_dataset", "input_dataset"):
        if isinstance(made[name], dict):
            assert made[name].pop("type") in DATASETS
    made["preprocess"] = _transform_base(**param["preprocess"])
    options = dict(SETTINGS)
    made["prequantized_model_type"] = param["session"]["runtime_options"]["info"]["prequantized_model_type"]
    for key, value in param["session"]["runtime_options"].items():
        options[key] = min(SETTINGS[key], value) if key in SETTINGS else value
    session = dict(param["session"])
    if directory is not None and session["model_path"] == os.path.basename(session["model_path"]):
        session["model_path"] = os.path.join(directory, session["model_path"])
    session["model_path"] = os.path.abspath(session["model_path"])
    session["runtime_options"] = options
    session["interpreter"] = _interpreter(session["model_path"], options)
    made["session"] = session
    made["postprocess"] = POSTPROCESS[param["task_type"]](**param["postprocess"])
    return made


def _interpreter(model_path: str, options: dict[str, Any]) -> onnxruntime.InferenceSession:
    """`_create_interpreter`, but that the model runs on the CPU."""
    session_options = onnxruntime.SessionOptions()
    level = options.get("onnxruntime:graph_optimization_level")
    if level is not None:
        session_options.graph_optimization_level = level
    return onnxruntime.InferenceSession(model_path, session_options, providers=["CPUExecutionProvider"])


def _transform_base(
    resize: Any,
    crop: Any,
    data_layout: str,
    reverse_channels: bool,
    backend: str,
    interpolation: int | None,
    resize_with_pad: bool,
    add_flip_image: bool = False,
    pad_color: int = 0,
) -> dict[str, Any]:
    assert backend in ("pil", "cv2") and data_layout in ("NCHW", "NHWC")
    return dict(locals())


def _classification() -> dict[str, Any]:
    return {}


def _segmentation(data_layout: str, with_argmax: bool = True) -> dict[str, Any]:
    return dict(locals())


def _depth_estimation(data_layout: str) -> dict[str, Any]:
    return dict(locals())


class Detection:
    """`get_transform_detection_base`: what its steps, called one after the other, make of a model's outputs."""

    def __init__(
        self,
        formatter: dict | str | None = None,
        resize_with_pad: bool = False,
        keypoint: bool = False,
        object6dpose: bool = False,
        normalized_detections: bool = True,
        shuffle_indices: list | None = None,
        squeeze_axis: int | None = 0,
        reshape_list: list | None = None,
        ignore_index: int | None = None,
        logits_bbox_to_bbox_ls: bool = False,
    ) -> None:
        name = formatter.pop("type") if isinstance(formatter, dict) else formatter
        assert name in FORMATTERS
        assert not (resize_with_pad or keypoint or object6dpose or shuffle_indices or ignore_index)
        self.corners = name == "DetectionXYWH2XYXYCenterXY"
        self.normalized, self.squeeze, self.shapes = normalized_detections, squeeze_axis, reshape_list
        self.from_logits = logits_bbox_to_bbox_ls

    def __call__(self, outputs: list[np.ndarray], height: int, width: int, backend: str) -> np.ndarray:
        """(detections, 6): left, top, right, bottom in pixels, label, score; of an image of that size."""
        assert backend == "cv2"  # the last step takes arrays only
        if self.from_logits:
            logits, boxes = outputs[0], outputs[1].reshape(-1, 4)
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores = (scores / scores.sum(-1, keepdims=True))[..., :-1]
            outputs = [boxes, scores.argmax(-1).reshape(-1, 1), scores.max(-1).reshape(-1, 1)]
        if self.shapes is not None:
            outputs = [output.reshape(shape) for output, shape in zip(outputs, self.shapes, strict=False)]
        rows = np.concatenate(outputs[:3], axis=-1)
        rows = rows if self.squeeze is None else rows[0]
        if self.corners:
            centre, size = rows[:, :2].copy(), rows[:, 2:4].copy()
            rows[:, :2], rows[:, 2:4] = centre - 0.5 * size, centre + 0.5 * size
        assert self.normalized
        limits = np.array([width, height, width, height])
        rows[:, :4] = (rows[:, :4] * limits).clip(0, limits)
        return rows


POSTPROCESS = {
    "classification": _classification,
    "segmentation": _segmentation,
    "depth_estimation": _depth_estimation,
    "detection": Detection,
}


def class_names(directory: Path) -> dict[int, str]:
    """What a board's demo (edgeai-dl-inferer) calls the classes: by `dataset.yaml`, where `param.yaml` names data."""
    param = yaml.safe_load((directory / "param.yaml").read_text())
    if "name" not in param["input_dataset"]:
        return {}
    categories = yaml.safe_load((directory / "dataset.yaml").read_text())["categories"]
    return {category["id"]: category["name"] for category in categories}
