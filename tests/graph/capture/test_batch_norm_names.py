import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.graph.captured import captured_modules


class WritesThroughAView(nn.Module):
    """A write through a view makes torch split every batch norm into its operation and its writes."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            y = self.norm(self.conv(x)) + 0.5
            y.narrow(1, 2, 2).mul_(3)
            x = y
        return x


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_split_batch_norm_counts_every_call_and_moves_its_statistics_as_often(calls):
    torch.manual_seed(0)
    float_model = WritesThroughAView(calls).train()
    model, x = prepare_qat(copy.deepcopy(float_model), example_inputs=torch.randn(3, 4, 2, 2)), torch.randn(5, 4, 2, 2)
    assert [*captured_modules(model)] == [""]
    freeze_batch_norm(model, False)
    for _ in range(2):
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), float_model(x))
    assert int(model.norm.num_batches_tracked) == 2 * calls
    torch.testing.assert_close(model.norm.running_mean, float_model.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, float_model.norm.running_var)
