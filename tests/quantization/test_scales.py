"""Scales of ranges and of weights, against hand-computed figures and a search in float64 numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qat.errors import CalibrationError, ConfigError
from hf_qat.quantization.scales import LARGEST_SCALE, SMALLEST_SCALE, scale_from_range
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_scale import weight_scale


AFFINE = QuantizerSpec(signed=False, symmetric=False)
SIGNED = QuantizerSpec()
WEIGHT = QuantizerSpec(narrow_range=True, axis=0)

specs = st.builds(
    QuantizerSpec,
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    signed=st.booleans(),
    symmetric=st.booleans(),
    non_negative=st.booleans(),
    narrow_range=st.booleans(),
    power_of_two=st.booleans(),
)
numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-45, -1e-40, 3e38, -3e38])


def qparams(low: float, high: float, spec: QuantizerSpec) -> tuple[float, float]:
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), spec)
    assert scale.dtype == zero_point.dtype == torch.float32
    assert scale.shape == zero_point.shape == ()
    return float(scale), float(zero_point)


@pytest.mark.parametrize(
    ("low", "high", "spec", "scale", "zero_point"),
    [
        pytest.param(-1.0, 3.0, AFFINE, 4 / 255, 64, id="affine: 63.75 rounds to 64"),
        pytest.param(-1.0, 3.0, QuantizerSpec(symmetric=False), 4 / 255, -64, id="affine, signed codes: -64.25"),
        pytest.param(2.0, 3.0, AFFINE, 3 / 255, 0, id="affine, positive data: widened down to 0"),
        pytest.param(-3.0, -2.0, AFFINE, 3 / 255, 255, id="affine, negative data: widened up to 0"),
        pytest.param(-1.0, 3.0, SIGNED, 3 / 127, 0, id="symmetric, upper end decides"),
        pytest.param(-4.0, 3.0, SIGNED, 4 / 128, 0, id="symmetric, lower end has one code more"),
        pytest.param(-4.0, 3.0, QuantizerSpec(narrow_range=True), 4 / 127, 0, id="narrow range"),
        pytest.param(0.0, 6.0, QuantizerSpec(signed=False), 6 / 255, 0, id="unsigned, zero_point 0"),
        pytest.param(0.0, 6.0, QuantizerSpec(non_negative=True), 6 / 127, 0, id="signed, non-negative"),
        pytest.param(-1.0, 3.0, QuantizerSpec(bits=4), 3 / 7, 0, id="4 bits"),
        pytest.param(-1.0, 3.0, QuantizerSpec(bits=2, narrow_range=True), 3.0, 0, id="ternary"),
        pytest.param(-1.0, 3.0, QuantizerSpec(bits=16), 3 / 32767, 0, id="16 bits"),
        pytest.param(-1.0, 3.0, QuantizerSpec(power_of_two=True), 2**-5, 0, id="power of two above 0.0236"),
        pytest.param(-4.0, 0.0, QuantizerSpec(power_of_two=True), 2**-5, 0, id="a power of two stays"),
        pytest.param(
            -1.0,
            3.0,
            QuantizerSpec(signed=False, symmetric=False, power_of_two=True),
            2**-5,
            32,
            id="affine, power of 2",
        ),
        pytest.param(0.0, 0.3, QuantizerSpec(signed=False, fixed_scale=1 / 256), 1 / 256, 0, id="fixed"),
        pytest.param(0.0, 0.3, QuantizerSpec(symmetric=False, fixed_scale=1 / 256), 1 / 256, -128, id="fixed, affine"),
    ],
)
def test_a_range_has_the_scale_computed_by_hand(low, high, spec, scale, zero_point):
    assert qparams(low, high, spec) == (pytest.approx(scale, rel=2e-7), zero_point)


def test_an_empty_range_is_taken_as_zero_to_one():
    assert qparams(0.0, 0.0, AFFINE) == (pytest.approx(1 / 255), 0)
    assert qparams(0.0, 0.0, SIGNED) == (pytest.approx(1 / 127), 0)


def test_scales_are_bounded_on_both_sides():
    assert qparams(-1e-30, 1e-30, SIGNED) == (SMALLEST_SCALE, 0)
    assert qparams(-3e38, 3e38, AFFINE)[0] == LARGEST_SCALE
    assert math.isfinite(np.float32(LARGEST_SCALE) * np.float32(65535))
    assert np.float32(SMALLEST_SCALE) ** 2 > np.finfo(np.float32).tiny


def test_channels_have_a_scale_each():
    scale, zero_point = scale_from_range(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([3.0, 51.0, 0.0]), AFFINE)
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 0.2, 1 / 255]))
    assert zero_point.tolist() == [64, 0, 0]


@given(ends=st.tuples(numbers, numbers).map(sorted), spec=specs)
@settings(deadline=None, max_examples=300)
def test_any_range_gives_a_normal_scale_and_codes_within_half_a_step_of_its_ends(ends, spec):
    low, high = ends
    scale, zero_point = qparams(low, high, spec)
    assert SMALLEST_SCALE <= scale <= LARGEST_SCALE
    assert spec.qmin <= zero_point <= spec.qmax and zero_point == int(zero_point)
    assert not spec.symmetric or zero_point == 0
    if spec.power_of_two:
        assert math.frexp(scale)[0] == 0.5
    if max(abs(low), abs(high)) < 1e30:  # above, LARGEST_SCALE clips
        for end in (low, high):
            if end < 0 and spec.symmetric and spec.qmin == 0:
                continue  # known to be non-negative: nothing below 0 has a code
            code = min(max(round(end / scale) + zero_point, spec.qmin), spec.qmax)
            # Two roundings, of the value and of zero_point, each by half a step.
            assert (
                abs((code - zero_point) * scale - end) <= scale * (0.5 if spec.symmetric else 1.0) * (1 + 1e-5) + 1e-40
            )


@given(ends=st.tuples(st.floats(-1e6, 0, width=32), st.floats(0, 1e6, width=32)), spec=specs)
@settings(deadline=None)
def test_a_power_of_two_scale_is_the_smallest_that_covers_the_range(ends, spec):
    free = replace(spec, power_of_two=False)
    restricted = replace(spec, power_of_two=True)
    free_scale, power = qparams(*ends, free)[0], qparams(*ends, restricted)[0]
    assert power / 2 < free_scale <= power


def squared_error(weight: np.ndarray, scale: np.ndarray | float, qmin: int, qmax: int) -> np.ndarray:
    """Per row, in float64."""
    rows = weight.astype(np.float64).reshape(len(weight), -1)
    scale = np.broadcast_to(scale, len(rows))[:, None]
    return ((np.clip(np.rint(rows / scale), qmin, qmax) * scale - rows) ** 2).sum(1)


@pytest.mark.parametrize(
    ("axis", "largest"),
    [
        pytest.param(0, [4.0, 6.0], id="first axis"),
        pytest.param(1, [4.0, 6.0, 2.0], id="second axis"),
        pytest.param(-1, [4.0, 6.0, 2.0], id="last axis"),
        pytest.param(None, 6.0, id="per tensor"),
    ],
)
def test_the_minmax_scale_of_a_weight_represents_its_largest_magnitude(axis, largest):
    weight = torch.tensor([[-4.0, 3.0, 1.0], [1.0, -6.0, 2.0]], requires_grad=True)
    scale = weight_scale(weight, QuantizerSpec(narrow_range=True, axis=axis, observer="minmax"))
    torch.testing.assert_close(scale, torch.tensor(largest) / 127)
    assert not scale.requires_grad


def test_a_channel_of_zeros_takes_the_scale_of_the_largest_magnitude_of_the_weight():
    weight = torch.zeros(3, 2, 2, 2)
    weight[1], weight[2] = 5.0, -12.7
    for observer in ("minmax", "percentile", "mse"):
        scale = weight_scale(weight, QuantizerSpec(narrow_range=True, axis=0, observer=observer))
        assert scale[2] >= scale[0] > scale[1] > 0
    assert float(weight_scale(weight, QuantizerSpec(narrow_range=True, axis=0, observer="minmax"))[0]) == (
        pytest.approx(0.1)
    )


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "moving_average"])
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "power of two"])
def test_a_weight_of_zeros_has_a_scale_that_is_neither_tiny_nor_nan(observer, power_of_two):
    spec = QuantizerSpec(narrow_range=True, axis=0, observer=observer, power_of_two=power_of_two)
    scale = weight_scale(torch.zeros(4, 3), spec)
    assert ((scale >= 2**-13) & (scale <= 1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 3000])
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
@pytest.mark.usefixtures("each_form")
def test_the_mse_scale_is_close_to_the_best_of_a_thousand(bits, size, kind):
    rng = np.random.default_rng(bits * size)
    weight = (rng.standard_normal((16, size)) if kind == "normal" else rng.standard_t(3, (16, size))).astype(
        np.float32
    )
    spec = QuantizerSpec(bits=bits, narrow_range=True, axis=0, observer="mse")
    scale = weight_scale(torch.from_numpy(weight), spec).numpy()
    largest = np.abs(weight).max(1) / spec.qmax
    best = np.min([squared_error(weight, largest * f, spec.qmin, spec.qmax) for f in np.geomspace(0.01, 1, 1000)], 0)
    found = squared_error(weight, scale, spec.qmin, spec.qmax)
    # Few values have lucky scales that no coarse grid meets; at 8 bits luck is nearly all there is to win.
    assert found.sum() <= best.sum() * (1.03 if bits < 8 else 1.06 if size > 64 else 1.25)


@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.integers(1, 40),
    axis=st.sampled_from([0, None]),
)
@settings(deadline=None, max_examples=60)
def test_the_mse_scale_is_never_worse_than_the_largest_magnitude(seed, bits, size, axis):
    weight = np.random.default_rng(seed).standard_normal((5, size)).astype(np.float32)
    spec = QuantizerSpec(bits=bits, narrow_range=True, axis=axis, observer="mse")
    scale = weight_scale(torch.from_numpy(weight), spec).numpy()
    rows = weight if axis == 0 else weight.reshape(1, -1)
    largest = np.abs(rows).max(1) / spec.qmax
    found, plain = (squared_error(rows, s, spec.qmin, spec.qmax) for s in (scale, largest))
    assert (found <= plain * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
@pytest.mark.usefixtures("each_form")
def test_the_power_of_two_mse_scale_is_the_best_power_of_two(bits, axis):
    weight = np.random.default_rng(bits).standard_t(3, (12, 700)).astype(np.float32)
    spec = QuantizerSpec(bits=bits, narrow_range=True, axis=axis, observer="mse", power_of_two=True)
    scale = weight_scale(torch.from_numpy(weight), spec)
    rows = weight if axis == 0 else weight.reshape(1, -1)
    exponents = np.arange(-16, 8)
    errors = np.stack([squared_error(rows, 2.0**e, spec.qmin, spec.qmax) for e in exponents])
    np.testing.assert_array_equal(np.atleast_1d(scale.numpy()), 2.0 ** exponents[errors.argmin(0)])


@pytest.mark.usefixtures("each_form")
def test_an_outlier_is_clipped_at_four_bits_but_not_at_eight():
    weight = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([2.0])])[None]
    at = {b: float(weight_scale(weight, QuantizerSpec(bits=b, narrow_range=True, axis=0))) for b in (4, 8)}
    # Clipping costs up to 1, rounding 999 * scale**2 / 12: at a scale of 2/7, 6.8 (at 1/7, 1.7); at 2/127, 0.02.
    assert at[4] * 7 < 1.5
    assert at[8] * 127 > 1.9


def test_the_percentile_scale_leaves_out_a_thousandth_of_each_channel():
    weight = torch.arange(1.0, 2001.0).flip(0).repeat(2, 1) * torch.tensor([[1.0], [-0.5]])
    scale = weight_scale(weight, QuantizerSpec(narrow_range=True, axis=0, observer="percentile"))
    torch.testing.assert_close(scale, torch.tensor([1998.0, 999.0]) / 127)


def test_a_pruned_channel_is_not_clipped_to_nothing():
    weight = torch.zeros(1, 5000)
    weight[0, 7] = 1.27
    scale = weight_scale(weight, QuantizerSpec(narrow_range=True, axis=0, observer="percentile"))
    assert float(scale) == pytest.approx(0.01)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_channels_on_another_axis_give_the_scales_of_the_transposed_weight(observer):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    along = {axis: QuantizerSpec(bits=4, narrow_range=True, axis=axis, observer=observer) for axis in (0, 1)}
    assert torch.equal(weight_scale(weight, along[1]), weight_scale(weight.transpose(0, 1).contiguous(), along[0]))


@pytest.mark.usefixtures("each_form")
def test_a_weight_that_spans_several_blocks_has_the_scales_of_its_channels_alone():
    weight = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0], [0.1]])
    together = weight_scale(weight, WEIGHT)
    assert torch.equal(together, torch.cat([weight_scale(row[None], WEIGHT) for row in weight]))


@pytest.mark.usefixtures("each_form")
def test_every_block_of_a_long_channel_counts():
    weight = np.random.default_rng(0).standard_t(3, (1, 140_000)).astype(np.float32)
    weight[:, 130_000:] *= 1e-3  # a last block for which any scale will do
    spec = QuantizerSpec(bits=4, narrow_range=True, axis=0, observer="mse")
    found = squared_error(weight, weight_scale(torch.from_numpy(weight), spec).numpy(), -7, 7)
    fractions = np.geomspace(0.02, 1, 100)
    assert found <= 1.01 * min(squared_error(weight, np.abs(weight).max() / 7 * f, -7, 7)[0] for f in fractions)


def test_bfloat16_weights_have_float32_scales():
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = weight_scale(weight, WEIGHT)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, weight_scale(weight.float(), WEIGHT))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_a_weight_that_is_not_finite_is_an_error(bad, observer):
    weight = torch.ones(4, 3)
    weight[2, 1] = bad
    with pytest.raises(CalibrationError, match=r"weight of shape \(4, 3\) holds NaN or Inf"):
        weight_scale(weight, QuantizerSpec(axis=0, observer=observer))


def test_an_observer_without_a_rule_for_weights_is_an_error():
    with pytest.raises(ConfigError, match="'entropy' has no rule for the scale of a weight; choose one of .*'mse'"):
        weight_scale(torch.ones(2, 2), QuantizerSpec(observer="entropy"))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("each_form")
def test_no_scale_of_the_grid_has_less_squared_error_than_the_one_found(bits, threads):
    weight = np.random.default_rng(bits).standard_t(3, (40, 5000)).astype(np.float32)
    spec = QuantizerSpec(bits=bits, narrow_range=True, axis=0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = weight_scale(torch.from_numpy(weight), spec).numpy()
    finally:
        torch.set_num_threads(before)
    most = 2 ** (bits - 1) - 1

    def errors(scale: np.ndarray) -> np.ndarray:
        steps = scale.astype(np.float64)[:, None]
        return ((np.clip(np.rint(weight / steps), -most, most) * steps - weight) ** 2).sum(axis=1)

    covering = np.abs(weight).max(axis=1) / most
    coarse = np.stack([covering * 2 ** (-step / 2) for step in range(11)])
    best = coarse[np.stack([errors(scale) for scale in coarse]).argmin(axis=0), np.arange(40)]
    least = np.min([errors(best * 2 ** (step / 16)) for step in range(-8, 9)], axis=0)
    assert (errors(found) <= 1.001 * least).all()


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_a_channel_of_a_single_value_is_no_empty_one(observer):
    """Its lowest and highest value are the same, as those of a channel of zeros, which gets the widest range, are."""
    weight = torch.tensor([[0.5, 0.5, 0.5], [-0.25, -0.25, -0.25], [2.0, -3.0, 1.0], [0.0, 0.0, 0.0]])
    scale = weight_scale(weight, QuantizerSpec(narrow_range=True, axis=0, observer=observer))
    np.testing.assert_allclose(scale.numpy() * 127, [0.5, 0.25, 3, 3], rtol=1e-6)
