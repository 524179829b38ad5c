"""Gradients from a byte a value, against autograd through the papers' formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_qat.quantization.learned import learned_fake_quantize
from hf_qat.quantization.learned_gradients import levels
from hf_qat.quantization.residuals import byte_range, compact_fake_quantize
from tests.quantization.test_learned import CASES, Case, textbook


pytestmark = pytest.mark.usefixtures("each_form")


@pytest.mark.parametrize("span", [2, 3, 7, 15, 127, 254, 255])
def test_the_bytes_of_both_ends_lie_apart_from_all_that_says_how_a_value_was_rounded(span: int):
    own = byte_range(span)
    assert own.high - own.low == span and own.low < 0 < own.high
    ends = own.spread * own.low, own.spread * own.high
    assert -128 <= ends[0] < -own.amplitude < own.amplitude < ends[1] <= 127
    assert own.amplitude >= 63


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_what_passes_are_exact_and_gradients_of_parameters_near(case: Case):
    torch.manual_seed(0)
    shape = 400, 300
    data, incoming = 6 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    unlimited = torch.tensor(2.0**case.log2_scale)
    scale = unlimited if case.scale is None else torch.tensor(case.scale)
    values = levels(scale, unlimited, None if case.offset is None else torch.tensor(case.zero), case.low, case.high)
    results = []
    for dtype, operation in (
        (torch.float64, lambda *leaves: textbook(case, *leaves)),
        (torch.float32, lambda *leaves: learned_fake_quantize(*leaves, values)),
        (torch.float32, lambda *leaves: compact_fake_quantize(*leaves, values)),
    ):
        x = data.to(dtype, copy=True).requires_grad_()
        log2_scale = torch.tensor(case.log2_scale, dtype=dtype, requires_grad=True)
        offset = None if case.offset is None else torch.tensor(case.offset, dtype=dtype, requires_grad=True)
        out = operation(x, log2_scale, offset)
        out.backward(incoming.to(dtype))
        by_offset = torch.zeros(()) if offset is None or offset.grad is None else offset.grad
        results.append((out.detach(), x.grad, log2_scale.grad, by_offset))
    expected, theirs, ours = results
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert 0 < int((ours[1] == 0).sum()) < data.numel()
    torch.testing.assert_close(ours[3].double(), expected[3].double(), rtol=1e-4, atol=1e-4)
    # Independent residuals of up to half a step each, and steps of 1 / (2 * amplitude) of one in their bytes.
    step = float(scale) / (2 * byte_range(case.high - case.low).amplitude)
    deviation = step / 12**0.5 * incoming.norm() * float(unlimited / scale)
    assert abs(float(ours[2]) - float(expected[2])) < 4 * deviation + 1e-4 * abs(float(expected[2]))


def test_values_at_the_very_ends_of_the_range_pass_no_gradient():
    x = torch.tensor([0.0, 1e-30, 0.49, 254.51, 254.9999, 255.0, 255.2, -0.2], requires_grad=True)
    one = torch.tensor(1.0)
    compact_fake_quantize(x, torch.tensor(0.0), None, levels(one, one, None, 0, 255)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_half_precision_comes_back_as_it_came():
    x = torch.tensor([0.3, 100.0], dtype=torch.bfloat16, requires_grad=True)
    scale = torch.tensor(2.0**-4)
    out = compact_fake_quantize(x, torch.tensor(-4.0), None, levels(scale, scale, None, -128, 127))
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert out.tolist() == [0.3125, 127 / 16] and x.grad.tolist() == [1, 0]


def test_a_layout_other_than_the_gradients_makes_no_difference():
    data = torch.randn(2, 3, 5, 7)
    scale = torch.tensor(0.05)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = data.clone(memory_format=layout).requires_grad_()
        log2_scale = torch.log2(scale).requires_grad_()
        compact_fake_quantize(x, log2_scale, None, levels(scale, scale, None, -16, 15)).square().sum().backward()
        gradients.append((x.grad, log2_scale.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-5)


def test_millions_of_values_that_a_relu_takes_away_leave_the_gradient_of_the_scale_alone():
    torch.manual_seed(0)
    x, grad = torch.randn(3_000_000, requires_grad=True), torch.randn(3_000_000) + 4
    scale = torch.tensor(4 / 255)
    log2_scale = scale.log2().requires_grad_()
    compact_fake_quantize(x, log2_scale, None, levels(scale, scale, None, 0, 255)).backward(grad)
    exact, step = x.detach().double(), scale.double()
    outside = (exact <= 0) | (exact >= 255 * step)
    moved = (exact / step).round().clamp(0, 255) * step - torch.where(outside, 0.0, exact)
    terms = math.log(2) * grad.double() * moved
    assert abs(log2_scale.grad - terms.sum()) < 5e-3 * terms.square().sum().sqrt()
