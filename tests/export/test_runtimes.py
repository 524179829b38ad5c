"""What others make of our files: ONNX's checker, every level of ONNX Runtime, and OpenVINO where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hf_qat import export_onnx
from tests.models import HUGGING_FACE


#: Nine nets; what is not the smallest takes long to export.
NETS = [pytest.param(name, marks=[] if name == "resnet" else pytest.mark.slow) for name in HUGGING_FACE]

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")

#: Largest distance, relative to the outputs, that rounding elsewhere may come to in a net whose weights are random.
ROUNDING = 0.1

#: OpenVINO 2026.4 rounds a sum in SegFormer's decoder that the file does not round.
OPENVINO_ROUNDING = {"segformer": 0.3}


def distance(results: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Root of the summed squares of the differences, relative to what is wanted; of the outputs, the largest."""
    pairs = zip(results, wanted, strict=True)
    return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)


def images(name: str) -> list[np.ndarray]:
    """Four images, (1, 3, H, W) each."""
    return [image[None] for image in HUGGING_FACE[name].pixels(4, seed=3).numpy()]


def on_onnx_runtime(path: Path, pixels: list[np.ndarray], level: str) -> list[np.ndarray]:
    """All outputs for all images."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runs = [session.run(None, {session.get_inputs()[0].name: image}) for image in pixels]
    return [np.concatenate(outputs) for outputs in zip(*runs, strict=True)]


@pytest.mark.parametrize("name", NETS)
def test_every_level_of_onnx_runtime_computes_what_torch_does(name, exported):
    model, report = exported(name)
    onnx.checker.check_model(onnx.load(report.path), full_check=True)
    pixels = images(name)
    with torch.no_grad():
        wanted = model(pixel_values=torch.from_numpy(np.concatenate(pixels))).logits.numpy()
    for level in LEVELS:
        assert distance(on_onnx_runtime(report.path, pixels, level)[:1], [wanted]) < ROUNDING, level


def on_openvino(path: Path, pixels: list[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """All outputs for all images, and the precisions in which convolutions are computed."""
    openvino = pytest.importorskip("openvino", reason='OpenVINO is not installed: pip install "hf_qat[runtimes]"')
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    runs = [[result[k] for k in range(len(compiled.outputs))] for result in map(compiled, pixels)]
    facts = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    kinds = [(fact["layerType"].astype(str), fact["runtimePrecision"].astype(str)) for fact in facts]
    outputs = [np.concatenate(values) for values in zip(*runs, strict=True)]
    return outputs, [precision for kind, precision in kinds if kind == "Convolution"]


@pytest.mark.parametrize("name", NETS)
def test_openvino_computes_the_same_with_every_convolution_in_integers(name, exported):
    _, report = exported(name)
    outputs, precisions = on_openvino(report.path, images(name))
    wanted = on_onnx_runtime(report.path, images(name), "ORT_DISABLE_ALL")
    assert precisions and set(precisions) <= {"u8", "i8"}
    assert distance(outputs[:1], wanted[:1]) < OPENVINO_ROUNDING.get(name, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["AM68A", "int8-symmetric"])
def test_openvino_compiles_a_detector_of_a_symmetric_target(target, converted, tmp_path):
    pytest.importorskip("openvino", reason='OpenVINO is not installed: pip install "hf_qat[runtimes]"')
    batch = {"pixel_values": HUGGING_FACE["detr"].pixels(8, seed=1)}
    report = export_onnx(converted("detr", target), tmp_path / "model.onnx", batch, verify=False)
    outputs, _ = on_openvino(report.path, images("detr"))
    assert distance(outputs[:1], on_onnx_runtime(report.path, images("detr"), "ORT_DISABLE_ALL")[:1]) < ROUNDING


@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_can_make_our_signed_weights_unsigned(name, exported):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    _, report = exported(name)
    session = onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
    pixels = images(name)[:1]
    wanted = on_onnx_runtime(report.path, pixels, "ORT_DISABLE_ALL")
    assert distance(session.run(None, {session.get_inputs()[0].name: pixels[0]})[:1], wanted[:1]) < ROUNDING
