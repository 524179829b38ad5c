"""Gradients of learned scales and offsets, against the papers' formulas, and autograd through them written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_qat.quantization.learned import learned_fake_quantize, levels
from tests.quantization.test_fake_quantize import RANGES, close, random_case, sum_to


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


def our_gradients(
    case: dict[str, np.ndarray], low: int, high: int, affine: bool, wanted: str = "x scale zero"
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of input, scale and zero point, by the chain rule from those of `log2_scale` and `offset`."""
    x, scale, zero = (torch.tensor(case[name]) for name in ("x", "scale", "zero"))
    log2_scale, offset = torch.log2(scale), (zero - low) / (high - low)
    for name, tensor in (("x", x), ("scale", log2_scale), ("zero", offset)):
        tensor.requires_grad_(name in wanted)
    values = levels(scale, scale, zero if affine else None, low, high)
    learned_fake_quantize(x, log2_scale, offset if affine else None, values).backward(torch.tensor(case["g"]))
    dscale = None if log2_scale.grad is None else log2_scale.grad / (math.log(2) * scale)
    return x.grad, dscale, None if offset.grad is None else offset.grad / (high - low)


@pytest.mark.parametrize("kind", ["narrow int8", "uint8", "uint4", "int2"])
def test_gradients_without_zero_point_are_those_of_lsq(kind):
    low, high = RANGES[kind]
    case = random_case(None, low, high, affine=False)
    dx, dscale, dzero = our_gradients(case, low, high, affine=False)
    # Esser et al. 2020, eq. 3 (d v_hat / d s) and eq. 5 (d v_hat / d v), with -Q_N = low and Q_P = high.
    ratio = (case["x"] / case["scale"]).astype(np.float64)
    inside = (low < ratio) & (ratio < high)
    eq3 = np.where(inside, np.rint(ratio) - ratio, np.where(ratio <= low, low, high))
    g = case["g"].astype(np.float64)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(dx.numpy(), np.where(inside, case["g"], 0))
    close(dscale, sum_to(g * eq3, case["scale"], None))
    assert dzero is None


@pytest.mark.parametrize("kind", ["int8", "uint8", "uint4"])
def test_gradients_with_zero_point_are_those_of_lsq_plus_by_the_chain_rule(kind):
    low, high = RANGES[kind]
    case = random_case(None, low, high, affine=True)
    dx, dscale, dzero = our_gradients(case, low, high, affine=True)
    # Bhalgat et al. 2020: x_hat = clamp(round((x - beta) / s), n, p) * s + beta has, inside the range,
    # d/ds = round(u) - u with u = (x - beta) / s and d/dbeta = 0; where it saturates d/ds = n or p and d/dbeta = 1.
    # Here beta = -zero_point * s.
    s, z = (case[name].astype(np.float64) for name in ("scale", "zero"))
    u = (case["x"] / case["scale"]).astype(np.float64) + z
    inside = (low < u) & (u < high)
    g = case["g"].astype(np.float64)
    by_scale = g * np.where(inside, np.rint(u) - u, np.where(u <= low, low, high))
    by_beta = g * np.where(inside, 0.0, 1.0)
    np.testing.assert_array_equal(dx.numpy(), np.where(inside, case["g"], 0))
    close(dscale, sum_to(by_scale - z * by_beta, case["scale"], None))
    close(dzero, sum_to(-s * by_beta, case["zero"], None))


def central_difference(function, parameter: np.ndarray, step: float) -> np.ndarray:
    gradient = np.zeros_like(parameter)
    for index in np.ndindex(parameter.shape):
        shifted = [parameter.copy(), parameter.copy()]
        shifted[0][index] += step
        shifted[1][index] -= step
        gradient[index] = (function(shifted[0]) - function(shifted[1])) / (2 * step)
    return gradient


def test_gradients_are_finite_differences_once_the_rounding_is_held_still():
    """Straight-through means: a rounding adds a constant. With those constants frozen the op has true derivatives."""
    low, high = RANGES["uint8"]
    case = random_case(None, low, high, affine=True)
    x, scale, zero, g = (case[name].astype(np.float64) for name in ("x", "scale", "zero", "g"))
    ratio = x / scale
    rounding = np.rint(ratio) - ratio

    def loss(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> float:
        y = x / scale
        inside = (low - zero < y) & (y < high - zero)
        return float((g * np.where(inside, y + rounding, np.clip(y, low - zero, high - zero)) * scale).sum())

    # No value may cross an end of the range on the way.
    edge = np.minimum(np.abs(ratio - (low - zero)), np.abs(ratio - (high - zero)))
    assert edge.min() > 1e-4
    dx, dscale, dzero = our_gradients(case, low, high, affine=True)
    close(dscale, central_difference(lambda s: loss(x, s, zero), scale, 1e-8))
    close(dzero, central_difference(lambda z: loss(x, scale, z), zero, 1e-5))
    close(dx, central_difference(lambda v: loss(v, scale, zero), x, 1e-7))


@pytest.mark.parametrize("wanted", ["x", "scale", "zero"])
def test_each_gradient_can_be_asked_for_alone(wanted):
    case = random_case(None, 0, 255, affine=True)
    together = dict(zip(("x", "scale", "zero"), our_gradients(case, 0, 255, True), strict=True))
    alone = dict(zip(("x", "scale", "zero"), our_gradients(case, 0, 255, True, wanted), strict=True))
    assert [name for name, gradient in alone.items() if gradient is not None] == [wanted]
    assert torch.equal(alone[wanted], together[wanted])


@pytest.mark.parametrize("along", [0.0, 1.0], ids=["gradients of any direction", "gradients along the values"])
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["centred gradients", "gradients of one sign"])
def test_a_million_values_sum_up_to_the_float64_gradient_of_the_scale(mean, along):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2**20).astype(np.float32)
    case = {"x": x, "g": (rng.standard_normal(x.shape) + mean + 10 * along * x).astype(np.float32)}
    case |= {"scale": np.float32(3.0 / 127), "zero": np.float32(0)}
    _, dscale, _ = our_gradients(case, -127, 127, affine=False)
    ratio = (x / case["scale"]).astype(np.float64)
    terms = case["g"] * np.where(np.abs(ratio) < 127, np.rint(ratio) - ratio, np.sign(ratio) * 127)
    # What float32 may lose, against the spread of the sum itself: sqrt(n) times the root mean square of a term.
    assert abs(float(dscale) - terms.sum()) < 0.01 * np.sqrt((terms**2).sum())
