from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.model.in_float import FloatOperation, by_reason, float_operations
from tests.models import HandWritten


class TwoFloatParts(nn.Module):
    """A running sum, for which there is no rule, and a layer to be excluded; the last one is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cumsum(self.kept(x), 1))


def test_operations_are_named_with_their_module_and_the_reason_before_and_after_conversion():
    expected = [FloatOperation("kept", "linear", "excluded by the recipe"), FloatOperation("", "cumsum", "no rule")]
    x = torch.randn(8, 4)
    model = prepare_qat(TwoFloatParts(), QATConfig(exclude="kept"), x)
    assert float_operations(model) == expected
    assert float_operations(convert(calibrate(model, [x]))) == expected


def test_the_text_of_a_model_says_what_stays_in_float_in_its_graphs():
    text = repr(prepare_qat(TwoFloatParts(), QATConfig(exclude="kept"), torch.randn(8, 4)))
    assert text.splitlines()[1].strip() == "in float: 1 linear, 1 cumsum"
    assert "in float" not in repr(prepare_qat(HandWritten(), QATConfig(), torch.randn(2, 3, 8, 8)))


def test_a_float_model_and_one_that_is_quantized_throughout_have_none():
    assert float_operations(HandWritten()) == []
    assert float_operations(prepare_qat(HandWritten(), QATConfig(), torch.randn(2, 3, 8, 8))) == []


def test_they_are_grouped_by_reason_and_operation_in_their_order():
    found = [
        FloatOperation("b", "add", "excluded"),
        FloatOperation("a", "exp", "no rule"),
        FloatOperation("a", "add", "excluded"),
    ]
    assert by_reason(found) == {"excluded": {"add": ["b", "a"]}, "no rule": {"exp": ["a"]}}
