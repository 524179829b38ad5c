"""Progress bars: on a terminal, and nowhere else; switched off as transformers' own are."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from hf_qat import QATConfig, QATTrainer, calibrate, convert, export_onnx, prepare_qat
from hf_qat.graph.progress import bars_hidden, length_of, progress
from hf_qat.model.analysis.analyze import analyze


class Terminal(io.StringIO):
    """What bars are drawn on."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is left to be read: of each line the last thing that was written over it."""
        return [line.split("\r")[-1].strip() for line in self.getvalue().split("\n") if line.strip()]

    def finished(self) -> dict[str, str]:
        """What was under way → how much of it was done, as `3/3`."""
        return dict(re.findall(r"^(.+?): 100%\|.*\| (\d+/\d+) \[", line)[0] for line in self.lines())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run_all(folder: Path) -> None:
    """Everything that lets one wait."""
    model = prepare_qat(net(), QATConfig("int8"), IMAGES[:2])
    calibrate(model, IMAGES.split(2))
    analyze(model, IMAGES.split(3))
    export_onnx(convert(model), folder / "net.onnx", IMAGES)


def test_whatever_takes_long_has_a_bar_that_stays_when_it_is_full(tmp_path):
    with redirect_stderr(Terminal()) as terminal:
        run_all(tmp_path)
    assert terminal.finished() == {
        "Capturing": "1/1",
        "Calibrating": "3/3",
        "Correcting biases: in float": "3/3",
        "Correcting biases: quantized": "3/3",
        "Sensitivity": "3/3",  # the input, the convolution, the linear layer
        "Exporting net.onnx": "2/2",
    }


def test_transformers_own_switch_holds(tmp_path):
    logging.disable_progress_bar()
    try:
        with redirect_stderr(Terminal()) as terminal:
            run_all(tmp_path)
    finally:
        logging.enable_progress_bar()
    assert terminal.getvalue() == ""


def test_without_a_terminal_nothing_is_drawn(tmp_path):
    with redirect_stderr(io.StringIO()) as file:
        run_all(tmp_path)
    assert file.getvalue() == ""


class Classifier(nn.Module):
    """Takes what a Trainer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return (
            {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


@pytest.mark.parametrize("disabled", [True, False], ids=["disable_tqdm", "shown"])
def test_the_trainer_draws_ours_where_it_draws_its_own(disabled, tmp_path):
    rows = [{"pixel_values": image, "labels": 0} for image in IMAGES]
    args = TrainingArguments(
        str(tmp_path), disable_tqdm=disabled, use_cpu=True, report_to=[], per_device_train_batch_size=2
    )
    with redirect_stderr(Terminal()) as terminal:
        QATTrainer(Classifier(), args, train_dataset=rows).calibrate()
    drawn = [] if disabled else ["Capturing", "Calibrating"]
    assert [name for name in ("Capturing", "Calibrating") if name in terminal.getvalue()] == drawn


def test_the_log_says_what_took_how_long(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("hf_qat.graph.progress.logger.info", seen.append)
    clock = iter([100.0, 103.5])
    monkeypatch.setattr("hf_qat.graph.progress.time.monotonic", lambda: next(clock))
    with progress("Calibrating", 1, "batch") as bar:
        bar.update()
    assert seen == ["Calibrating took 3.5 s."]


def test_hidden_bars_are_back_afterwards_and_hiding_is_not_undone_inside():
    with (
        redirect_stderr(Terminal()) as terminal,
        bars_hidden(True),
        bars_hidden(False),
        progress("hidden", 1, "step") as bar,
    ):
        bar.update()
    assert terminal.getvalue() == ""
    with redirect_stderr(terminal), progress("shown", 1, "step") as bar:
        bar.update()
    assert terminal.finished() == {"shown": "1/1"}


@pytest.mark.parametrize(
    ("things", "limit", "expected"),
    [([1, 2, 3], None, 3), ([1, 2, 3], 2, 2), (iter([1]), None, None), (iter([1]), 5, 5), ([1], 5, 1)],
)
def test_how_many_there_are_as_far_as_one_can_know(things, limit, expected):
    assert length_of(things, limit) == expected
