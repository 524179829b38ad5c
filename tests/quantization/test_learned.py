"""Gradients of learned scales and offsets, against the papers' formulas, and autograd through these in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_qat.quantization.learned import learned_fake_quantize
from hf_qat.quantization.learned_gradients import levels
from tests.quantization.test_fake_quantize import RANGES, close, random_case, sum_to


pytestmark = pytest.mark.usefixtures("each_form")


@dataclass(frozen=True)
class Case:
    """A quantizer, and what its parameters come to, worked out by hand.

    Attributes:
        log2_scale, offset: its parameters; an offset of `None` is a symmetric one.
        low, high: its codes.
        scale: what an upper limit makes of `2**log2_scale`; `None` where nothing limits it.
        zero: `low + offset * (high - low)`, and the nearest code where that is none.
    """

    log2_scale: float
    offset: float | None
    low: int
    high: int
    scale: float | None = None
    zero: float = 0.0


CASES = {
    "int8": Case(-3.3, None, -128, 127),
    "int4": Case(-1.2, None, -8, 7),
    "uint8 from 0": Case(-4.1, None, 0, 255),
    "uint8 with a zero point": Case(-4.6, 0.37, 0, 255, zero=94.35),
    "uint4 with a zero point": Case(-1.1, 0.52, 0, 15, zero=7.8),
    "int8 with a zero point": Case(-4.2, 0.25, -128, 127, zero=-64.25),
    "a zero point above the codes": Case(-4.0, 1.25, 0, 255, zero=255.0),
    "a zero point below the codes": Case(-4.0, -0.5, -128, 127, zero=-128.0),
    "a limited scale": Case(-3.0, None, 0, 255, scale=6 / 255),
}


def straight_through(value: Tensor | float, like: Tensor) -> Tensor:
    """`value`, with the gradient of `like`."""
    return like + (torch.as_tensor(value, dtype=like.dtype) - like).detach()


def held(offset: Tensor) -> Tensor:
    """`offset`, held in [0, 1]; a gradient passes unless a step against it would lead further out."""
    result = straight_through(offset.detach().clamp(0, 1), offset)
    beyond = offset.detach() - result.detach()
    result.register_hook(lambda gradient: torch.zeros_like(gradient) if beyond * -gradient > 0 else gradient)
    return result


def textbook(case: Case, x: Tensor, log2_scale: Tensor, offset: Tensor | None) -> Tensor:
    """Esser et al. 2020, eq. 1 and 2; with an offset, Jacob et al. 2018, eq. 1: r = S (q - Z).

    A rounding, and a limit of the scale, pass gradients straight through (Esser et al., §2.1); so does the limit of a
    zero point that is held at the lowest or highest code, if a step against the gradient leads back to it.
    """
    scale = torch.exp2(log2_scale)
    if case.scale is not None:
        scale = straight_through(case.scale, scale)
    zero = torch.tensor(case.zero, dtype=x.dtype)
    if offset is not None:
        zero = case.low + held(offset) * (case.high - case.low)
    zero = straight_through(round(case.zero), zero)
    clipped = torch.clip(x / scale + zero, case.low, case.high)
    return scale * (straight_through(clipped.round(), clipped) - zero)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_autograd_through_the_textbook_formula_in_float64(case: Case, sign: int):
    torch.manual_seed(0)
    data, incoming = 6 * torch.randn(40, 30, dtype=torch.float64), sign * torch.randn(40, 30, dtype=torch.float64)
    leaves, results = [], []
    for dtype in (torch.float64, torch.float32):
        x = data.to(dtype, copy=True).requires_grad_()
        log2_scale = torch.tensor(case.log2_scale, dtype=dtype, requires_grad=True)
        offset = None if case.offset is None else torch.tensor(case.offset, dtype=dtype, requires_grad=True)
        leaves.append((x, log2_scale, offset))
    expected = textbook(case, *leaves[0])
    unlimited = torch.tensor(2.0**case.log2_scale)
    scale = unlimited if case.scale is None else torch.tensor(case.scale)
    zero = None if case.offset is None else torch.tensor(case.zero)
    found = learned_fake_quantize(*leaves[1], levels(scale, unlimited, zero, case.low, case.high))
    for out in (expected, found):
        out.backward(incoming.to(out.dtype))
    for out, (x, log2_scale, offset) in zip((expected, found), leaves, strict=True):
        by_offset = [] if offset is None else [torch.zeros(()) if offset.grad is None else offset.grad]
        results.append([out.detach(), x.grad, log2_scale.grad, *by_offset])
    assert 0 < int((results[0][1] == 0).sum()) < data.numel()  # some values saturate
    for wanted, got in zip(*results, strict=True):
        # A value half way between two codes may be rounded the other way in float32.
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("start", [-0.1, 1.1])
def test_an_offset_that_has_left_its_range_comes_back(start):
    """The data fill [-1, 1], so the offset of least error is a half."""
    x, log2_scale = torch.linspace(-1, 1, 500), torch.tensor(2 / 255).log2()
    offset = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=0.02)
    for _ in range(200):
        scale, zero_point = torch.exp2(log2_scale), offset.detach().clamp(0, 1) * 255
        out = learned_fake_quantize(x, log2_scale, offset, levels(scale, scale, zero_point, 0, 255))
        (out - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(offset.item() - 0.5) < 0.02


def test_a_scale_that_has_vanished_stops_no_training():
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    log2_scale = torch.tensor(-200.0, requires_grad=True)  # float32 ends at 2**-149
    scale = torch.exp2(log2_scale.detach())
    out = learned_fake_quantize(x, log2_scale, None, levels(scale, scale, None, -128, 127))
    out.sum().backward()
    assert out.tolist() == [0.0, 0.0, 0.0]
    assert x.grad.tolist() == [0.0, 0.0, 0.0] and log2_scale.grad.item() == 0.0


def test_a_gradient_too_large_for_float32_is_infinite():
    x = torch.full((10,), 100.0, requires_grad=True)
    parameters = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    scale = torch.tensor(0.5)
    out = learned_fake_quantize(x, *parameters, levels(scale, scale, 128.0, 0, 255))
    out.backward(
        torch.full((10,), 3e37)
    )  # of the scale it is ln 2 * 127 * 0.5 * 3e38, of the offset -0.5 * 255 * 3e38
    assert [parameter.grad.item() for parameter in parameters] == [math.inf, -math.inf]


def test_of_a_million_gradients_the_few_that_do_not_pass_are_those_of_the_offset():
    torch.manual_seed(0)
    x, grad = torch.randn(2_000_000, requires_grad=True), torch.randn(2_000_000) + 1
    offset, scale = torch.tensor(0.5, requires_grad=True), torch.tensor(8 / 255)
    learned_fake_quantize(x, scale.log2(), offset, levels(scale, scale, 128.0, 0, 255)).backward(grad)
    exact = x.detach().double()
    outside = (exact <= -128 * scale.double()) | (exact >= 127 * scale.double())
    wanted = -8.0 * grad.double()[outside].sum()
    assert outside.sum() < 200 and offset.grad.item() == pytest.approx(wanted.item(), rel=1e-5)
