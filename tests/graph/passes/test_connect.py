"""The quantizer whose codes come in, layer by layer, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, prepare_qat
from hf_qat.quantization.quantizer import fake_quantizers


class Network(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.one, self.two)


CASES = {
    "chain": (lambda x, one, two: two(one(x)), "x_quantizer", "one.activation_quantizer"),
    "moved and pooled": (
        lambda x, one, two: two(functional.max_pool2d(one(x).flip(3), 2).transpose(2, 3)),
        "x_quantizer",
        "one.activation_quantizer",
    ),
    "padded by a number": (
        lambda x, one, two: two(functional.pad(one(x), [1, 1], value=2.0)),
        "x_quantizer",
        "pad_0_quantizer",
    ),
    "concatenated": (
        lambda x, one, two: two(torch.cat([one(x), x], 1)[:, :4]),
        "cat_0_quantizer",
        "cat_0_quantizer",
    ),
    "two calls with one quantizer": (
        lambda x, one, two: two(x) + one(x) + one(x.flip(2)),
        "x_quantizer",
        "x_quantizer",
    ),
    "two calls with two quantizers": (lambda x, one, two: two(one(one(x))), None, "one.activation_quantizer_1"),
}


@pytest.mark.parametrize(("function", "one", "two"), CASES.values(), ids=CASES)
def test_a_layer_knows_the_quantizer_whose_codes_come_in(function, one, two):
    model = prepare_qat(Network(function), QATConfig(), torch.randn(2, 4, 6, 6))
    paths = {quantizer: path for path, quantizer in fake_quantizers(model).items()}
    found = [layer.quantizer_of_input for layer in (model.one, model.two)]
    assert [None if quantizer is None else paths[quantizer] for quantizer in found] == [one, two]
