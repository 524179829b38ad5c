"""What ONNX Runtime computes as torch does, or an `ExportError` before a file is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import ExportError, NonFiniteError


@dataclass
class Found:
    """An output of a class of the user's own."""

    boxes: Tensor


class Whole(nn.Module):
    """A linear layer of what comes in, and perhaps a number beside its result."""

    def __init__(self, beside: object = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.beside = beside

    def forward(self, x: Tensor) -> object:
        y = self.linear(x)
        return y if self.beside is None else (y, self.beside)


class FromDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.linear(batch["x"]) + self.linear(batch["y"])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.linear = nn.EmbeddingBag(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.linear(self.bag(ids) + x)


class Refined(nn.Module):
    """Boxes before their sigmoid, twice, as detectors that refine them compute them: the exporter lost the bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes = torch.sigmoid(self.linear(x))
        return self.before_sigmoid(boxes), 2 * self.before_sigmoid(boxes), boxes

    def before_sigmoid(self, boxes: Tensor) -> Tensor:
        boxes = boxes.clamp(0, 1)
        return torch.log(boxes.clamp(min=1e-5) / (1 - boxes).clamp(min=1e-5))


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def converted(model: nn.Module, inputs: object) -> nn.Module:
    torch.manual_seed(0)
    return convert(calibrate(prepare_qat(model, QATConfig(), inputs), [inputs]))


ROWS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        pytest.param(FromDict, ({"x": ROWS, "y": 2 * ROWS},), id="a dict as the only argument"),
        pytest.param(Bag, (torch.tensor([[1, 2, 3], [4, 5, 5]]), ROWS), id="an embedding bag"),
        pytest.param(Refined, ROWS, id="the same two clamps twice"),
    ],
)
def test_onnx_runtime_computes_what_torch_does(model, inputs, tmp_path: Path):
    report = export_onnx(converted(model(), inputs), tmp_path / "model.onnx", inputs)
    assert report.max_output_lsb == 0
    assert report.plain.max_abs_diff < 1e-5


@pytest.mark.parametrize("beside", [3, "text", 0.5], ids=str)
def test_what_is_no_tensor_among_the_outputs_is_refused_and_leaves_no_file(beside, tmp_path: Path):
    model = converted(Whole(beside), ROWS)
    with pytest.raises(ExportError, match=f"Whole returns {beside!r} of type {type(beside).__name__}"):
        export_onnx(model, tmp_path / "model.onnx", ROWS)
    assert not list(tmp_path.iterdir())


def test_an_output_of_an_unknown_class_is_named_without_all_of_its_numbers(tmp_path: Path):
    model = converted(Whole(Found(torch.rand(100, 100))), ROWS)
    with pytest.raises(ExportError, match="of type Found, and an ONNX file returns tensors only") as error:
        export_onnx(model, tmp_path / "model.onnx", ROWS)
    assert len(str(error.value)) < 300


def test_a_batch_norm_without_running_statistics_is_refused_by_name(tmp_path: Path):
    model = converted(BatchStatistics(), ROWS)
    with pytest.raises(ExportError, match="norm normalises by the statistics of each batch"):
        export_onnx(model, tmp_path / "model.onnx", ROWS)
    assert not list(tmp_path.iterdir())


def test_a_model_that_has_diverged_is_refused_with_the_name_of_its_tensor(tmp_path: Path):
    model = converted(Whole(), ROWS)
    model.linear.weight_scale.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="linear.weight_scale of Whole holds NaN.* diverged"):
        export_onnx(model, tmp_path / "model.onnx", ROWS)
    assert not list(tmp_path.iterdir())
