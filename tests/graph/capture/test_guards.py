import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import fake_quant_disabled, prepare_qat
from hf_qat.graph.capture.guards import doubtful_sizes
from hf_qat.graph.captured import captured_modules


class Branch(nn.Module):
    """Does one thing or another, as its condition says of the input."""

    def __init__(self, condition) -> None:
        super().__init__()
        self.conv, self.condition = nn.Conv2d(4, 4, 3), condition

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * 2 if self.condition(x) else x


#: What forward asks, and the smallest batch size from 2 at which the answer changes.
CONDITIONS = {
    "more than ten": (lambda x: x.shape[0] > 10, 11),
    "a multiple of four": (lambda x: x.shape[0] % 4 == 0, 4),
    "just seven": (lambda x: x.shape[0] == 7, 7),
    "many values": (lambda x: x.numel() > 4000, 28),
    "a hundred": (lambda x: len(x) >= 100, 128),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_branch_on_the_batch_size_is_that_of_the_float_model_at_any_size(name, training):
    condition, size = CONDITIONS[name]
    float_model = Branch(condition).train(training)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=torch.randn(3, 4, 8, 8))
    assert [*captured_modules(model)] == ["conv"]
    for batch in (1, 2, size, size + 1):
        x = torch.randn(batch, 4, 8, 8)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), float_model(x))


class Reshaped(nn.Module):
    """Its reshaping makes the exporter ask whether sizes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.reshape(-1, 2 * x.shape[0], 3).reshape(x.shape)


def test_a_check_that_changes_nothing_does_not_stand_in_the_way():
    model = prepare_qat(Reshaped(), example_inputs=torch.randn(3, 4, 8, 8))
    assert [*captured_modules(model)] == [""]


def test_the_smallest_sizes_are_named_at_which_a_guard_fails_and_a_few_at_most():
    at_two, at_three = [torch.empty(2, 5), torch.empty(2)], [torch.empty(3, 5), torch.empty(2)]
    guards = [
        "L['tensors'][0].size()[0] <= 10",
        "(L['tensors'][0].size()[0] % 6) != 0",
        "L['tensors'][1].size()[0] == 2",
        "L['tensors'][0].stride()[0] == 5",
    ]
    assert doubtful_sizes(guards, at_two, at_three) == (6, 11)
    assert doubtful_sizes([f"L['tensors'][0].size()[0] != {n}" for n in range(20, 2, -1)], at_two, at_three) == (
        3,
        4,
        5,
        6,
    )
    assert doubtful_sizes([], at_two, at_three) == ()
