from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_qat.errors import CalibrationError
from hf_qat.model.batches import run_batches


class Recorder(nn.Module):
    """Keeps what it is called with, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[Tensor, object, bool, bool]] = []

    def forward(self, pixel_values: Tensor, mask: object = None) -> Tensor:
        out = self.scale * pixel_values
        self.calls.append((pixel_values, mask, self.training, out.requires_grad))
        return out


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X], {"pixel_values": X}, {"pixel_values": X, "labels": torch.tensor([1, 2])}],
    ids=["tensor", "tuple", "list", "dict", "dict with labels"],
)
def test_a_batch_is_passed_as_forward_takes_it_without_labels(batch):
    model = Recorder()
    assert [got is batch for got in run_batches(model, [batch])] == [True]
    ((pixels, mask, _, _),) = model.calls
    assert torch.equal(pixels, X) and mask is None


def test_batches_run_in_evaluation_without_gradients_and_the_mode_comes_back():
    model = Recorder().train()
    for _ in run_batches(model, [X, X]):
        assert len(model.calls) <= 2
    assert [call[2:] for call in model.calls] == [(False, False)] * 2
    assert model.training


def test_batches_are_run_one_by_one_as_they_are_asked_for():
    model = Recorder()
    steps = run_batches(model, iter([X, X, X]))
    next(steps)
    assert len(model.calls) == 1
    next(steps)
    assert len(model.calls) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "batch 1 holds NaN or infinity"),
        ({"pixel_values": torch.tensor([float("inf")])}, "batch 1 holds NaN or infinity"),
        ((X, None, X), r"batch 1 does not fit Recorder.forward\(pixel_values.*too many positional arguments"),
        ({"images": X}, "batch 1 does not fit Recorder.forward"),
    ],
    ids=["nan", "inf", "too many", "unknown name"],
)
def test_a_batch_that_cannot_be_calibrated_on_is_refused_with_its_number(batch, message):
    model = Recorder()
    with pytest.raises(CalibrationError, match=message):
        list(run_batches(model, [X, batch]))
    assert len(model.calls) == 1
