"""Detection from float to ONNX Runtime: the benchmark's way, in small; the benchmark itself measures trained nets."""

from __future__ import annotations

import json

import pytest
import yaml
from PIL import Image

from tests.benchmarks.detection import Row, failures, main, table


def said_by(options: list[str]) -> str:
    """What a run ends with; nothing where int8 has reached what it should."""
    try:
        main(options)
    except SystemExit as ended:
        return str(ended)
    return ""


def rows(in_float: float, calibrated: float, trained: float, optimized: float | None = None) -> list[Row]:
    found = {("float", "float"): in_float, ("int8", "calibrated"): calibrated, ("int8", "QAT"): trained}
    return [
        Row("net", *name, torch=value, plain=value, optimized=value, torch_50=0.0, optimized_50=0.0)
        if name[1] != "QAT" or optimized is None
        else Row("net", *name, torch=value, plain=value, optimized=optimized, torch_50=0.0, optimized_50=0.0)
        for name, value in found.items()
    ]


@pytest.mark.parametrize("figures", [(60.0, 58.0, 59.6), (60.0, 55.0, 61.0)])
def test_half_a_point_below_float_and_above_calibration_is_enough(figures):
    assert failures(rows(*figures)) == []


@pytest.mark.parametrize(
    ("figures", "settings"),
    [
        ((60.0, 58.0, 59.4), ["plain", "optimized"]),
        ((60.0, 59.8, 59.8), ["plain", "optimized"]),
        ((60.0, 58.0, 59.9, 59.3), ["optimized"]),
    ],
)
def test_less_on_onnx_runtime_fails_with_the_figures(figures, settings):
    found = failures(rows(*figures))
    assert [line.partition(":")[0] for line in found] == [f"net, {setting}" for setting in settings]
    assert all("float 60.0" in line for line in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("detector", ["RT-DETR", "YOLOS"])
def test_the_whole_way_leaves_files_figures_and_boxes(detector, tmp_path, capsys):
    """A few steps teach nothing, so that chance decides whether int8 is as good; the run says how it came out."""
    options = ["--directory", str(tmp_path), "--detectors", detector, "--train_images", "32", "--test_images", "8"]
    options += ["--steps", "3", "--qat_steps", "2"]
    said = said_by(options)
    measured = [Row(**row) for row in json.loads((tmp_path / "results.json").read_text())]
    quantized = [(target, stage) for target in ("int8", "AM68A") for stage in ("calibrated", "QAT")]
    assert [(row.target, row.stage) for row in measured] == [("float", "float"), *quantized]
    assert table(measured) in capsys.readouterr().out
    assert all(line in said for line in failures(measured)) and bool(said) == bool(failures(measured))

    made = tmp_path / detector
    assert Image.open(made / "boxes.png").size == (8 * 192, 3 * 192)
    assert (made / "int8" / "QAT.onnx").is_file()
    bundle = made / "AM68A" / "bundle"
    assert list((bundle / "model").glob("*.onnx"))
    if detector == "YOLOS":  # edgeai-benchmark reads no scores that are a sigmoid
        config = yaml.safe_load((bundle / "config.yaml").read_text())
        assert config["task_type"] == "detection" and config["session"]["target_device"] == "AM68A"

    times = {path: path.stat().st_mtime_ns for path in made.rglob("*.onnx")}
    assert said_by(options) == said
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.onnx")} == times
