"""`config.yaml` and `param.yaml`, read as TI's code reads them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

from hf_qat import QATConfig, calibrate, convert, export_tidl, prepare_qat
from hf_qat.tidl import pack_artifacts
from hf_qat.tidl.config_yaml import task_of
from tests.models import HUGGING_FACE, LABELS
from tests.tidl import edgeai_benchmark
from tests.tidl.cases import FRAMES, NAMES, ON_DEVICES, TRANSFORMERS


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a YOLOS, which is to be changed by nobody."""
    pixels = HUGGING_FACE["yolos"].pixels(2)
    model = calibrate(prepare_qat(HUGGING_FACE["yolos"].make(), QATConfig("AM68A"), pixels), [pixels])
    processor = transformers.YolosImageProcessorPil(size={"height": 32, "width": 32}, do_pad=False)
    directory = tmp_path_factory.mktemp("yolos") / "bundle"
    return export_tidl(convert(model), directory, "AM68A", [pixels], processor)


@pytest.mark.parametrize(("name", "device"), ON_DEVICES)
def test_edgeai_benchmark_reads_it_from_inside_the_bundle(name, device, bundled, monkeypatch):
    monkeypatch.chdir(bundled(name, device))
    read = edgeai_benchmark.configs(models_path=".", configs_path="config.yaml")["model-1"]
    assert read["session"]["model_path"] == str(bundled(name, device) / "model" / f"{name}.onnx")
    assert read["calibration_dataset"] is None and read["input_dataset"] is None
    options = read["session"]["runtime_options"]
    assert options["advanced_options:prequantized_model"] == read["prequantized_model_type"] == 1
    assert options["advanced_options:quantization_scale_type"] == (1 if device == "TDA4VM" else 4)
    assert options["advanced_options:calibration_frames"] == FRAMES
    assert options["advanced_options:calibration_iterations"] == -1
    assert options["advanced_options:quant_params_proto_path"] == ""
    assert options["advanced_options:max_num_subgraph_nodes"] == 2000
    (given,) = read["session"]["interpreter"].get_inputs()
    assert [(given.name, given.shape)] == [(d["name"], d["shape"]) for d in read["session"]["input_details"]]


def test_a_list_of_configs_is_read_too(bundled, tmp_path, monkeypatch):
    listed = {"net": str(bundled("resnet", "AM68A") / "config.yaml")}
    (tmp_path / "configs.yaml").write_text(yaml.safe_dump({"configs": listed}))
    monkeypatch.chdir(bundled("resnet", "AM68A"))
    assert set(edgeai_benchmark.configs(str(tmp_path), "configs.yaml")) == {"net"}


@pytest.mark.parametrize(
    ("section", "entry", "error"),
    [
        ("input_dataset", {"num_classes": 5, "dataset_info": "dataset.yaml"}, KeyError),
        ("runtime_options", {"onnxruntime:graph_optimization_level": 0}, TypeError),
    ],
    ids=["data without a type", "a level that YAML can hold"],
)
def test_what_stumbled_over_older_files_stumbles_here_too(section, entry, error, copied, monkeypatch):
    directory = copied("resnet", "AM68A")
    content = yaml.safe_load((directory / "config.yaml").read_text())
    if section == "runtime_options":
        content["session"]["runtime_options"].update(entry)
    else:
        content[section] = entry
    (directory / "config.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(directory)
    with pytest.raises(error):
        edgeai_benchmark.configs(".", "config.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_the_settings_and_says_what_yaml_cannot(name, bundled):
    readme = (bundled(name, "AM68A") / "README.md").read_text()
    block = next(text for text in readme.split("```") if "configs_path" in text)
    assert yaml.safe_load(block) == {"target_device": "AM68A", "models_path": ".", "configs_path": "config.yaml"}
    assert ("ORT_DISABLE_ALL" in readme) == (name in TRANSFORMERS)


def test_the_readme_sets_up_newer_and_older_tools(bundled):
    readme = (bundled("resnet", "AM67A") / "README.md").read_text()
    newer, older = (
        next(text for text in readme.split("```") if script in text) for script in ("setup_env.sh", "./setup.sh")
    )
    assert re.search(r"source ./scripts/setup/setup_env.sh J722S\n", newer) and "scripts/setup/setup.sh" in newer
    assert "export SOC=am67a" in older and "source ./setup.sh" in older
    assert "docs/sdk_version_compatibility_table.md" in readme


@pytest.mark.slow
def test_a_detectors_boxes_are_those_of_hugging_face(detector, monkeypatch):
    monkeypatch.chdir(detector)
    read = edgeai_benchmark.configs(".", "config.yaml")["model-1"]
    assert read["task_type"] == "detection" and read["session"]["model_id"].startswith("od-")
    pixels = np.load(detector / "calibration" / "frame_000.npz")["pixel_values"]
    outputs = read["session"]["interpreter"].run(None, {"pixel_values": pixels})
    got = read["postprocess"](outputs, height=40, width=60, backend=read["preprocess"]["backend"])
    logits, boxes = (torch.from_numpy(output) for output in outputs[:2])
    (wanted,) = transformers.YolosImageProcessorPil().post_process_object_detection(
        YolosObjectDetectionOutput(logits=logits, pred_boxes=boxes), threshold=0.0, target_sizes=[(40, 60)]
    )
    corners = wanted["boxes"].numpy().clip(0, [60, 40, 60, 40])
    np.testing.assert_allclose(got[:, :4], corners, atol=1e-4)
    np.testing.assert_array_equal(got[:, 4], wanted["labels"].numpy())
    np.testing.assert_allclose(got[:, 5], wanted["scores"].numpy(), atol=1e-6)


def test_a_detectors_readme_says_that_opencv_resizes_otherwise(detector):
    assert "OpenCV" in (detector / "README.md").read_text()


def test_detectors_whose_scores_are_no_softmax_have_no_task():
    softmax, sigmoid = transformers.DetrForObjectDetection, transformers.ConditionalDetrForObjectDetection
    assert task_of(softmax.__new__(softmax)).type == "detection"
    assert task_of(sigmoid.__new__(sigmoid)) is None


@pytest.mark.parametrize("name", ["resnet", pytest.param("segformer", marks=pytest.mark.slow)])
def test_a_boards_demo_finds_the_class_names(name, copied, stand_in):
    directory = copied(name, "AM68A")
    stand_in.run(directory / "compile.py")
    pack_artifacts(directory)
    assert edgeai_benchmark.class_names(directory) == {k: f"LABEL_{k}" for k in range(LABELS)}
    param = yaml.safe_load((directory / "param.yaml").read_text())
    assert param["input_dataset"] == {"name": name, "num_classes": LABELS, "dataset_info": "dataset.yaml"}


def test_a_bundle_without_a_processor_says_loudly_what_it_lacks(converted, exported_once, tmp_path, caplog):
    batches = [HUGGING_FACE["resnet"].pixels(2)]
    with caplog.at_level(logging.WARNING, logger="hf_qat"):
        directory = export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batches)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    readme = (directory / "README.md").read_text()
    for text in (said, readme):
        assert re.search(r"\*\*`config.yaml` is left out\*\*.* no processor", text)
        assert "no images" in text and "no `param.yaml`" in text
    assert "With edgeai-benchmark this bundle does not run" in readme
    assert not (directory / "config.yaml").exists()


def test_a_bundle_with_a_processor_warns_of_nothing(converted, exported_once, tmp_path, caplog):
    batches = [HUGGING_FACE["resnet"].pixels(2)]
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    with caplog.at_level(logging.WARNING, logger="hf_qat"):
        export_tidl(converted("resnet", "AM68A"), tmp_path / "b", "AM68A", batches, processor)
    assert not caplog.records
