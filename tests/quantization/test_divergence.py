"""A scale or an offset that training has made NaN or infinite is an error that names it, in place of one of `int`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from hf_qat import (
    QATConfig,
    analyze,
    calibrate,
    convert,
    fake_quant_disabled,
    freeze_ranges,
    parameter_groups,
    prepare_qat,
)
from hf_qat.errors import NonFiniteError
from hf_qat.quantization.divergence import require_finite
from hf_qat.quantization.kernels import cpu
from tests.models import spread


def prepared(x: Tensor, **options: object) -> nn.Module:
    """A convolution and a linear layer whose results have offsets, calibrated."""
    torch.manual_seed(0)
    model = spread(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)))
    return calibrate(prepare_qat(model, QATConfig("int8", **options), x), [x], bias_correction=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_offset_that_is_not_finite_is_named(value):
    with pytest.raises(NonFiniteError, match=rf"^head\.offset is {value}: training has diverged.*calibrate\("):
        require_finite("head", torch.tensor(0.0), torch.tensor(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e4, 128.0])
def test_a_scale_too_large_for_float32_is_named(value):
    assert not torch.tensor(value).exp2().isfinite()
    with pytest.raises(NonFiniteError, match=rf"^head\.log2_scale is {value}: training has diverged"):
        require_finite("head", torch.tensor(value), None)


@pytest.mark.parametrize("value", [-math.inf, -200.0, 0.0, 127.0])
def test_a_scale_that_has_vanished_and_the_largest_one_stop_nothing(value):
    require_finite("head", torch.tensor(value), torch.tensor(7.0))


@pytest.mark.parametrize("loops", [True, False], ids=["Numba", "PyTorch"])
@pytest.mark.parametrize("save_memory", [False, True], ids=["inputs", "codes"])
def test_a_plain_loop_that_diverges_ends_in_an_error_that_names_a_quantizer(loops, save_memory, monkeypatch):
    works = cpu._works()
    monkeypatch.setattr(cpu, "_works", lambda: works and loops)
    x = torch.randn(4, 3, 6, 6)
    model = prepared(x, save_memory=save_memory).train()
    optimizer = torch.optim.SGD(parameter_groups(model, 1e30, 0.0))
    with pytest.raises(NonFiniteError, match=r"^(input_quantizer|\d\.activation_quantizer)\.\w+ is (nan|-?inf|\d)"):
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()


def test_every_way_to_use_it_says_so_and_calibration_mends_it():
    x = torch.randn(4, 3, 6, 6)
    model = prepared(x)
    expected = model.eval()(x)
    with torch.no_grad():
        model.get_parameter("1.activation_quantizer.offset").fill_(math.nan)
    for training in (True, False):
        with pytest.raises(NonFiniteError, match=r"1\.activation_quantizer\.offset is nan"):
            model.train(training)(x)
    with pytest.raises(NonFiniteError, match="offset is nan"):
        freeze_ranges(copy.deepcopy(model))(x)
    for use in (convert, lambda model: analyze(model, [x])):
        with pytest.raises(NonFiniteError, match=r"1\.activation_quantizer\.offset of Sequential holds NaN"):
            use(copy.deepcopy(model))
    with fake_quant_disabled(model):
        assert model(x).isfinite().all()
    calibrate(model, [x], bias_correction=False)
    torch.testing.assert_close(model(x), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("exponent", "scale"), [(3e4, "inf"), (-200.0, "0.0"), (-149.0, r"1\.\d+e-45")])
def test_a_scale_that_a_file_cannot_hold_is_not_converted(exponent, scale):
    x = torch.randn(4, 3, 6, 6)
    model = prepared(x)
    with torch.no_grad():
        model.get_parameter("0.weight_quantizer.log2_scale")[1] = exponent
    with pytest.raises(NonFiniteError, match=rf"^cannot convert: 0\.weight_quantizer .* has a scale of {scale}, and"):
        convert(model)
