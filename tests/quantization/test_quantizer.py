from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat.errors import CalibrationError
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.spec import QuantizerSpec


UINT8 = QuantizerSpec(signed=False, symmetric=False, learned=True)
RELU = QuantizerSpec(signed=False, non_negative=True, learned=True)
INT8 = QuantizerSpec(learned=True)


def quantizer(spec: QuantizerSpec, scale: float, zero_point: float | None = None, **options: object) -> FakeQuantize:
    made = FakeQuantize(spec, **options)
    made.set_qparams(torch.tensor(scale), None if zero_point is None else torch.tensor(zero_point))
    return made


def by_hand(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> np.ndarray:
    """ONNX's QuantizeLinear and DequantizeLinear."""
    codes = np.clip(np.rint(x.detach().numpy() / np.float32(scale)) + zero_point, qmin, qmax)
    return ((codes - zero_point) * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize(
    ("spec", "zero_point", "qmin", "qmax"),
    [
        (UINT8, 100, 0, 255),
        (RELU, 0, 0, 255),
        (INT8, 0, -128, 127),
        (QuantizerSpec(narrow_range=True), 0, -127, 127),
        (QuantizerSpec(non_negative=True), 0, 0, 127),
        (QuantizerSpec(bits=4, signed=False, symmetric=False), 7, 0, 15),
        (QuantizerSpec(bits=2), 0, -2, 1),
        (QuantizerSpec(bits=16, signed=False, symmetric=False), 30000, 0, 65535),
    ],
    ids=["uint8", "relu", "int8", "narrow", "positive int8", "uint4", "int2", "uint16"],
)
def test_it_rounds_as_onnx_does(spec, zero_point, qmin, qmax):
    made = quantizer(spec, 0.25, zero_point)
    x = torch.cat([torch.linspace(-100, 100, 999), torch.arange(-8, 8) * 0.125])  # ties too
    np.testing.assert_array_equal(made(x).detach().numpy(), by_hand(x, 0.25, zero_point, qmin, qmax))


def test_a_scale_per_channel_is_kept_per_channel():
    made = FakeQuantize(QuantizerSpec(axis=0, learned=True), channels=3)
    made.set_qparams(torch.tensor([0.1, 1.0, 10.0]))
    torch.testing.assert_close(made.scale, torch.tensor([0.1, 1.0, 10.0]))
    assert made.log2_scale.shape == (3,)


def test_what_is_learned_is_a_parameter_and_the_rest_is_a_buffer_under_the_same_name():
    for learned in (True, False):
        made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, learned=learned))
        assert set(dict(made.named_parameters())) == ({"log2_scale", "offset"} if learned else set())
        assert set(made.state_dict()) == {"log2_scale", "offset", "observed"}
    assert set(FakeQuantize(INT8).state_dict()) == {"log2_scale", "observed"}
    moving = FakeQuantize(QuantizerSpec(observer="moving_average"))
    assert set(moving.state_dict()) == {"log2_scale", "observed", "range_min", "range_max"}


def test_a_fixed_scale_is_never_learned_nor_changed():
    made = FakeQuantize(QuantizerSpec(signed=False, non_negative=True, learned=True, fixed_scale=1 / 256))
    assert not list(made.parameters())
    made.set_qparams(torch.tensor(3.0))
    assert made.scale == 1 / 256
    made.start_observing()
    assert made.observer is None
    made.finish_observing("softmax")
    assert made.scale == 1 / 256 and made.observed == 1


def test_the_state_survives_saving_and_loading():
    made, other = quantizer(UINT8, 0.37, 93), FakeQuantize(UINT8)
    other.load_state_dict(made.state_dict())
    x = torch.randn(100) * 30
    assert torch.equal(other(x), made(x))
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("wanted", [0.3, 0.26, 0.5, 0.7, 2.0**-20])
def test_power_of_two_scales_have_no_mantissa(wanted):
    made = quantizer(QuantizerSpec(power_of_two=True, learned=True), wanted)
    assert math.frexp(made.scale.item())[0] == 0.5
    assert made.scale.item() == 2.0 ** round(math.log2(wanted))


def test_every_power_of_two_is_kept_exactly():
    made = FakeQuantize(QuantizerSpec(power_of_two=True))
    for exponent in range(-40, 41):
        made.set_qparams(torch.tensor(2.0**exponent))
        assert made.scale.item() == 2.0**exponent


def test_the_gradient_of_a_power_of_two_scale_passes_the_rounding_of_its_exponent():
    made = quantizer(QuantizerSpec(power_of_two=True, learned=True), 0.3)
    made(torch.full((4,), 1000.0)).sum().backward()
    # All saturate: the output is 127 * 0.25, and d(2**e)/de = 2**e * ln 2.
    assert made.log2_scale.grad.item() == pytest.approx(4 * 127 * 0.25 * math.log(2), rel=1e-5)


def test_the_gradient_of_the_logarithm_is_that_of_the_scale_times_scale_times_log_2():
    made = quantizer(INT8, 0.5)
    x = torch.tensor([0.3, 10.1, 1000.0, -1000.0])
    made(x).sum().backward()
    y = x.numpy() / 0.5
    lsq = (np.rint(y[:2]) - y[:2]).sum() + 127 - 128  # Esser et al. 2020, eq. 3
    assert made.log2_scale.grad.item() == pytest.approx(lsq * 0.5 * math.log(2), rel=1e-4)


def test_an_offset_out_of_range_is_held_at_its_end():
    made = quantizer(UINT8, 0.1, 128)
    for value, code in ((-0.5, 0), (1.5, 255)):
        with torch.no_grad():
            made.offset.fill_(value)
        assert made.zero_point.item() == code


def test_relu_is_absorbed_by_the_clamp_in_value_and_gradient():
    made, x = quantizer(RELU, 0.02), torch.linspace(-3, 3, 301, requires_grad=True)
    made(x, "relu").sum().backward()
    twin = x.detach().clone().requires_grad_()
    reference = quantizer(RELU, 0.02)(torch.relu(twin))
    reference.sum().backward()
    assert made.absorbs("relu")
    assert torch.equal(made(x, "relu"), reference)
    assert torch.equal(x.grad, twin.grad)


def test_relu_is_computed_where_no_clamp_does():
    for spec in (UINT8, INT8):
        made, x = quantizer(spec, 0.05, 100), torch.linspace(-3, 3, 301)
        assert not made.absorbs("relu")
        assert torch.equal(made(x, "relu"), made(torch.relu(x)))
        assert made(x, "relu").min() == 0


def test_relu6_is_absorbed_only_under_a_limit_of_the_scale():
    x = torch.linspace(-3, 9, 301)
    limited = quantizer(RELU, 1.0, scale_limit=6 / 255)
    assert limited.absorbs("relu6")
    assert limited.scale.item() == pytest.approx(6 / 255)
    assert limited(x, "relu6").max().item() == pytest.approx(6.0)
    free = quantizer(RELU, 0.1)
    assert not free.absorbs("relu6")
    assert free(x, "relu6").max().item() == pytest.approx(6.0)
    torch.testing.assert_close(limited(x, "relu6"), torch.clamp(x, 0, 6), rtol=0, atol=3 / 255 * 1.001)


def test_above_its_limit_a_scale_still_gets_a_gradient_that_leads_back():
    made = quantizer(RELU, 1.0, scale_limit=6 / 255)
    made(torch.full((4,), 100.0), "relu6").sum().backward()
    assert made.log2_scale.grad > 0


@pytest.mark.parametrize("log2_scale", [-3.0, 1.3, 40.0])
def test_above_its_limit_a_scale_is_the_limit_to_the_last_bit(log2_scale: float, each_form: str):
    made = quantizer(RELU, 2.0**log2_scale, scale_limit=6 / 255)
    made.frozen = True
    assert made.scale.item() == np.float32(6 / 255)
    x = torch.linspace(-1, 7, 1000).requires_grad_()
    np.testing.assert_array_equal(made(x, "relu6").detach().numpy(), by_hand(x, 6 / 255, 0, 0, 255))


def test_switched_off_it_hands_on_what_comes_in_but_for_the_activation():
    made, x = quantizer(RELU, 0.5), torch.randn(100)
    made.enabled = False
    assert made(x) is x
    assert torch.equal(made(x, "relu"), torch.relu(x))


def test_while_observing_it_hands_on_floats_and_then_knows_the_range():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="minmax"))
    made.start_observing()
    for x in (torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 4.1])):
        assert made(x) is x
    assert made.observed == 0
    made.finish_observing("here")
    assert made.observer is None and made.observed == 1
    assert made.scale.item() == pytest.approx(5.1 / 255)
    assert made.zero_point.round().item() == 50


def test_it_observes_behind_the_activation():
    made = FakeQuantize(QuantizerSpec(signed=False, non_negative=True, observer="minmax"))
    made.start_observing()
    made(torch.tensor([-100.0, 10.0]), "relu6")
    made.finish_observing("here")
    assert made.scale.item() == pytest.approx(6 / 255)


def test_observing_nothing_is_an_error_that_names_the_quantizer():
    made = FakeQuantize(INT8)
    made.start_observing()
    with pytest.raises(CalibrationError, match=r"^encoder\.layer\.3\.add_0_quantizer: no values were observed"):
        made.finish_observing("encoder.layer.3.add_0_quantizer")
    assert made.observed == 0


def test_a_moving_average_follows_the_data_in_training_alone():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="moving_average"))
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 5.0])
    made.train()(first)
    assert (made.range_min.item(), made.range_max.item(), made.observed.item()) == (-1.0, 3.0, 1)
    made.eval()(second)
    assert made.range_max.item() == 3.0
    made.train()(second)
    low, high = 0.99 * -1 + 0.01 * -2, 0.99 * 3 + 0.01 * 5
    assert made.range_min.item() == pytest.approx(low) and made.range_max.item() == pytest.approx(high)
    assert made.scale.item() == pytest.approx((high - low) / 255)
    assert made.zero_point.item() == pytest.approx(round(-low / (high - low) * 255), abs=1e-3)
    made.frozen = True
    made(second)
    assert made.range_max.item() == pytest.approx(high) and made.observed.item() == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_moving_average_goes_on_where_its_model_is_cast(dtype):
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="moving_average")).to(dtype)
    for _ in range(2):
        made.train()(torch.tensor([-1.0, 3.0], dtype=dtype))
    assert (made.range_min.item(), made.range_max.item(), made.observed.item()) == (-1.0, 3.0, 2)


@pytest.mark.parametrize("empty", [torch.empty(0, 3), torch.empty(3, 0, 5)], ids=str)
def test_a_batch_without_values_moves_no_average(empty: torch.Tensor):
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="moving_average"))
    made.train()(torch.tensor([-1.0, 3.0]))
    assert made(empty).shape == empty.shape
    assert (made.range_min.item(), made.range_max.item(), made.observed.item()) == (-1.0, 3.0, 1)


def test_a_moving_average_follows_half_precision_to_both_of_its_ends():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="moving_average"))
    made.train()(torch.tensor([-60000.0, 40000.0], dtype=torch.float16))  # 100000 is none of its numbers
    assert (made.range_min.item(), made.range_max.item(), made.observed.item()) == (-60000.0, 40000.0, 1)


def test_a_moving_average_behind_a_relu_starts_at_0():
    made = FakeQuantize(QuantizerSpec(signed=False, non_negative=True, observer="moving_average"))
    made.train()(torch.tensor([-7.0, 5.1]), "relu")
    assert made.range_min.item() == 0 and made.scale.item() == pytest.approx(5.1 / 255)


def test_a_range_from_calibration_is_where_the_moving_average_goes_on():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, observer="moving_average"))
    made.start_observing()
    made(torch.tensor([-1.0, 3.0]))
    made.finish_observing("here")
    made.train()(torch.tensor([-1.0, 13.0]))
    assert made.range_max.item() == pytest.approx(3.0 + 0.01 * 10, abs=0.02)


def test_frozen_scales_get_no_gradient_and_the_input_does():
    made, x = quantizer(UINT8, 0.1, 100), torch.randn(50, requires_grad=True)
    made.frozen = True
    made(x).sum().backward()
    assert made.log2_scale.grad is None and made.offset.grad is None
    assert torch.equal(x.grad, torch.ones(50))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_type_of_the_input_is_that_of_the_output(dtype):
    made, x = quantizer(INT8, 0.5), torch.randn(10).to(dtype)
    assert made(x).dtype == dtype
    np.testing.assert_allclose(made(x).detach().float(), by_hand(x.float(), 0.5, 0, -128, 127))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (UINT8, "uint8, per tensor, affine, learned"),
        (QuantizerSpec(axis=0, narrow_range=True), "int8, per channel"),
        (QuantizerSpec(bits=4, power_of_two=True), "int4, per tensor, power of two"),
        (QuantizerSpec(signed=False, fixed_scale=1 / 256), "uint8, per tensor, fixed scale 0.00390625"),
    ],
)
def test_it_describes_itself_in_a_line(spec, expected):
    assert FakeQuantize(spec).extra_repr() == expected


def test_quantizers_are_found_by_path():
    model = nn.Sequential(nn.Linear(2, 2), FakeQuantize(INT8), nn.Sequential(FakeQuantize(UINT8)))
    assert list(fake_quantizers(model)) == ["1", "2.0"]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_zero_points_are_those_of_evaluation_next_to_the_middle_of_two_codes(bits: int):
    spec = QuantizerSpec(bits, signed=False, symmetric=False, learned=True)
    made, x = FakeQuantize(spec), torch.linspace(-2.0, 2.0, 33) * 2**bits
    half = (torch.randint(0, spec.qmax, (40,)) + 0.5) / spec.qmax
    offsets = torch.cat([half, half.nextafter(torch.tensor(0.0)), half + 0.02 / spec.qmax, torch.tensor([-0.1, 1.1])])
    for offset in offsets:
        made.offset.data.copy_(offset)
        found = made(x)
        with torch.no_grad():
            assert torch.equal(found, made(x)), float(offset)


def test_a_zero_point_by_hand():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, learned=True))
    made.offset.data.fill_(0.31)  # 0.31 * 255 = 79.05
    assert made(torch.tensor([-1000.0, 1000.0])).tolist() == [-79.0, 176.0]
