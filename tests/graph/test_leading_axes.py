import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.errors import CaptureError


def test_a_head_of_linear_layers_takes_any_leading_axes_at_every_stage():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x, more = torch.randn(3, 5, 4), torch.randn(2, 3, 5, 4)
    model = prepare_qat(head, QATConfig(), x)
    for stage in (lambda m: calibrate(m, [x]).eval(), convert):
        model = stage(model)
        expected = torch.stack([model(more[0]), model(more[1])])
        torch.testing.assert_close(model(more), expected)


class AlongAnAxis(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


@pytest.mark.parametrize("module", [AlongAnAxis(), nn.Softmax(1), nn.Flatten()])
def test_what_works_along_an_axis_does_not(module):
    model = prepare_qat(nn.Sequential(nn.Linear(4, 4), module), QATConfig(), torch.randn(3, 5, 4))
    with pytest.raises(CaptureError, match="captured for input of shape"):
        model(torch.randn(2, 3, 5, 4))


def test_the_last_axis_is_what_was_captured():
    model = prepare_qat(nn.Sequential(nn.Linear(4, 4)), QATConfig(), torch.randn(3, 5, 4))
    with pytest.raises(CaptureError, match="captured for input of shape"):
        model(torch.randn(2, 3, 5, 6))


def test_an_image_without_its_batch_is_told_so():
    model = prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1)), QATConfig(), torch.randn(2, 3, 8, 8))
    with pytest.raises(CaptureError, match=r"got \(3, 8, 8\): the batch comes first: image\[None\]"):
        calibrate(model, torch.randn(4, 3, 8, 8))
    with pytest.raises(CaptureError, match=r"got \(3, 6, 8\): resize the input"):
        calibrate(model, torch.randn(4, 3, 6, 8))
