"""What `train` and `calibrate` print at their end."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hf_qat.cli.arguments import DataArguments
from hf_qat.cli.results import in_words, summary


def test_metrics_come_first_and_losses_last_with_four_digits():
    assert in_words({"loss": 0.051234, "accuracy": 0.98333, "map": 0.5}) == "accuracy 0.9833, map 0.5, loss 0.05123"


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "no labels"])
def test_the_summary_has_a_line_for_each_stage_each_path_and_each_next_command(measured):
    stages = {"float, before quantization": {"accuracy": 1.0}, "`onnx/model.onnx` on ONNX Runtime": {"accuracy": 0.5}}
    data = DataArguments("photos", task="semantic-segmentation")
    written = [Path("out/export"), Path("out/report.html")]
    text = summary(stages if measured else {}, written, Path("out/export"), data)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert (["onnx/model.onnx", "on", "ONNX", "Runtime", "accuracy", "0.5"] in lines) == measured
    assert [line[1] for line in lines if line[0] == "Written:"] == ["out/export", "out/report.html"]
    commands = [shlex.split(line.removeprefix("Next:")) for line in text.splitlines() if "hf-qat" in line]
    evaluate = "hf-qat evaluate --model_name_or_path out/export/onnx/model.onnx --dataset_name photos"
    push = ["hf-qat", "push", "out/export", "USER/MODEL"]
    assert commands == ([[*evaluate.split(), "--task", "semantic-segmentation"], push] if measured else [push])


def test_a_bundle_is_to_be_checked_next_and_names_are_quoted(tmp_path):
    model = tmp_path / "my out" / "tidl" / "AM68A" / "model" / "resnet.onnx"
    model.parent.mkdir(parents=True)
    model.touch()
    text = summary({}, [], tmp_path / "my out", DataArguments("photos"))
    commands = [shlex.split(line.removeprefix("Next:")) for line in text.splitlines() if "hf-qat" in line]
    assert commands == [
        ["hf-qat", "check", str(model), "--target", "AM68A"],
        ["hf-qat", "push", str(tmp_path / "my out"), "USER/MODEL"],
    ]
