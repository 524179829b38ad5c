"""Gradients of learned scales and offsets, against autograd through the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_qat.quantization.learned import learned_fake_quantize, levels


#: Log2 of the scale, offset in units of the range (`None`: symmetric), lowest and highest code, limit of the scale.
CASES = {
    "int8": (-3.3, None, -128, 127, None),
    "int4": (-1.2, None, -8, 7, None),
    "uint8 from 0": (-4.1, None, 0, 255, None),
    "uint8 with a zero point": (-4.6, 0.37, 0, 255, None),
    "uint4 with a zero point": (-1.1, 0.52, 0, 15, None),
    "a zero point beyond the codes": (-4.0, 1.25, 0, 255, None),
    "a limited scale": (-3.0, None, 0, 255, 6 / 255),
}


def written_out(
    x: Tensor, log2_scale: Tensor, offset: Tensor | None, low: int, high: int, limit: float | None
) -> Tensor:
    """Rounding, and a limit of the scale, pass gradients straight through; clamps pass them inside."""
    scale = torch.exp2(log2_scale)
    if limit is not None:
        scale = scale + (scale.clamp(max=limit) - scale).detach()
    zero = torch.zeros((), dtype=x.dtype) if offset is None else offset.clamp(0, 1) * (high - low) + low
    zero = zero + (zero.round() - zero).detach()
    y = torch.minimum(torch.maximum(x / scale, low - zero), high - zero)
    return (y + (y.round() - y).detach()) * scale


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_formula_written_out(case: tuple):
    log2, start, low, high, limit = case
    torch.manual_seed(0)
    data, incoming = 6 * torch.randn(40, 30, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64)
    expected, found = [], []
    for dtype, results in ((torch.float64, expected), (torch.float32, found)):
        x, log2_scale = data.to(dtype, copy=True).requires_grad_(), torch.tensor(log2, dtype=dtype, requires_grad=True)
        offset = None if start is None else torch.tensor(start, dtype=dtype, requires_grad=True)
        if dtype == torch.float64:
            out = written_out(x, log2_scale, offset, low, high, limit)
        else:
            scale = torch.exp2(log2_scale.detach())
            zero = None if offset is None else offset.detach().clamp(0, 1) * (high - low) + low
            used = scale if limit is None else scale.clamp(max=limit)
            out = learned_fake_quantize(x, log2_scale, offset, levels(used, scale, zero, low, high))
        out.backward(incoming.to(dtype))
        results += [out, x.grad, log2_scale.grad, *([] if offset is None else [offset.grad])]
    assert 0 < int((expected[1] == 0).sum()) < data.numel()  # some values saturate
    for one, other in zip(found, expected, strict=True):
        # A value half way between two codes may be rounded the other way in float32.
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32_and_given_back_as_it_came():
    x, log2_scale = torch.tensor([0.3, 100.0], dtype=torch.bfloat16), torch.tensor(-4.0, requires_grad=True)
    out = learned_fake_quantize(x, log2_scale, None, levels(torch.tensor(2**-4), torch.tensor(2**-4), None, -128, 127))
    assert out.dtype == torch.bfloat16 and out.tolist() == [0.3125, 127 / 16]
