from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_qat.quantization.bias import bias_scale, fit_weight_scale, quantize_bias


def test_the_scale_of_a_bias_is_that_of_the_products():
    scale = bias_scale(torch.tensor(0.02), torch.tensor([0.5, 0.25]))
    np.testing.assert_array_equal(scale, np.float32(0.02) * np.array([0.5, 0.25], np.float32))
    assert bias_scale(torch.tensor(0.02), torch.tensor(0.5)).shape == ()


def test_a_bias_is_rounded_half_to_even_in_double_precision():
    scale = torch.tensor(2.0**-24)
    # In float32 the quotients would already be rounded.
    bias = torch.tensor([0.1, -0.1, 100.0, 2.5 * 2**-24, 3.5 * 2**-24])
    expected = np.rint(bias.double().numpy() * 2**24).astype(np.int32)
    codes = quantize_bias(bias, scale)
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(codes, expected)
    assert codes[3:].tolist() == [2, 4]


def test_a_bias_beyond_int32_is_saturated():
    codes = quantize_bias(torch.tensor([1e30, -1e30, float(2**31)]), torch.tensor([1.0, 1.0, 1.0]))
    assert codes.tolist() == [2**31 - 1, -(2**31 - 1), 2**31 - 1]


def test_a_weight_scale_grows_only_where_the_bias_would_not_fit():
    scale = torch.tensor([1e-10, 1e-10, 0.01])
    bias = torch.tensor([1.0, 0.0, 1.0])
    fitted = fit_weight_scale(scale, bias, torch.tensor(0.02), power_of_two=False)
    assert torch.equal(fitted[1:], scale[1:])
    codes = bias.double() / (0.02 * fitted.double())
    assert 2**28 < codes[0] <= 2**31 - 1
    with_room = quantize_bias(bias, bias_scale(torch.tensor(0.02), fitted))
    np.testing.assert_allclose(with_room.double() * 0.02 * fitted.double(), bias, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bias", [1.0, 0.7, 3.3e-4, 0.0])
def test_a_power_of_two_stays_one_when_it_grows(bias):
    fitted = fit_weight_scale(torch.tensor(2.0**-38), torch.tensor([bias, 0.0]), torch.tensor(2.0**-6), True)
    assert fitted.shape == ()
    assert math.frexp(fitted.item())[0] == 0.5
    assert bias / (fitted.item() * 2.0**-6) <= 2**31 - 1
    assert fitted.item() == 2.0**-38 or bias / (fitted.item() / 4 * 2.0**-6) > 2**31 - 1


def test_one_scale_for_all_channels_fits_the_largest_bias():
    fitted = fit_weight_scale(torch.tensor(1e-12), torch.tensor([0.1, -5.0, 1.0]), torch.tensor(0.01), False)
    assert 5.0 / (0.01 * fitted.item()) <= 2**31 - 1
