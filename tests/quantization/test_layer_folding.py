"""The weight of a layer as one operation: values of numpy bit for bit, gradients of autograd in float64.

On a CPU by torch; in Triton's interpreter, in which `kernels/test_kernels.py` runs this file, by the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_qat.quantization import folding, kernels
from hf_qat.quantization.kernels.folding import Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer


pytestmark = pytest.mark.usefixtures("each_form")


@pytest.fixture(params=[folding.BLOCK, 100], ids=["at once", "in blocks"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a weight together, and two channels of 45 values at a time."""
    monkeypatch.setattr(folding, "BLOCK", request.param)


@dataclass(frozen=True)
class Case:
    """A layer; without `norm` it has no batch norm."""

    norm: bool = True
    live: bool = False
    affine: bool = True
    bias: bool = True
    per_tensor: bool = False
    axis: int = 0
    power_of_two: bool = False


CASES = {
    "frozen": Case(),
    "live": Case(live=True),
    "no batch norm": Case(norm=False),
    "no bias": Case(bias=False),
    "no gamma and beta": Case(affine=False),
    "one scale": Case(per_tensor=True),
    "one scale, no batch norm": Case(per_tensor=True, norm=False),
    "one scale, live": Case(per_tensor=True, live=True),
    "transposed": Case(axis=1),
    "powers of two": Case(power_of_two=True),
    "powers of two, live": Case(power_of_two=True, live=True),
}
NAMES = ("weight", "log2_scale", "mean", "variance", "gamma", "beta", "bias")
SHAPE, EPS = (6, 5, 3, 3), 1e-5


def drawn(case: Case) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    count = SHAPE[case.axis]
    weight, mean, variance, gamma, beta, bias = (
        torch.randn(SHAPE if k == 0 else (count,), generator=generator) for k in range(6)
    )
    log2_scale = torch.full((() if case.per_tensor else (count,)), -4.3)
    values = [weight, log2_scale, mean, variance.abs() + 0.5, gamma, beta, bias]
    kept = {name: value for name, value in zip(NAMES, values, strict=True)}
    absent = {"mean", "variance", "gamma", "beta", "bias"} if not case.norm else set()
    absent |= set() if case.affine else {"gamma", "beta"}
    absent |= set() if case.bias else {"bias"}
    return {name: None if name in absent else value for name, value in kept.items()}


def ours(case: Case, tensors: dict[str, Tensor | None]) -> list[Tensor]:
    weight, log2_scale, *rest = tensors.values()
    norm = Norm(*rest) if case.norm else None
    fixed = Folding(-30, 30, case.axis, case.power_of_two, case.live, EPS, torch.float32)
    return [out for out in fold_layer(weight, log2_scale, norm, fixed) if out is not None]


def along(x: Tensor, axis: int) -> Tensor:
    return x.view([-1 if d == axis else 1 for d in range(len(SHAPE))]) if x.dim() else x


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def textbook(case: Case, tensors: dict[str, Tensor | None], codes: Tensor) -> list[Tensor]:
    """By autograd, at the very `codes`: float64 rounds near ties to another side.

    LSQ: inside the range rounding counts as the identity, outside the code is a constant.
    """
    weight, log2_scale, mean, variance, gamma, beta, bias = tensors.values()
    exponent = straight_through(log2_scale, log2_scale.round()) if case.power_of_two else log2_scale
    scale, folded, factor = along(torch.exp2(exponent), case.axis), weight, None
    if case.norm:
        factor = 1 / torch.sqrt(variance + EPS)
        factor = factor if gamma is None else gamma * factor
        folded = weight * along(factor.detach() if case.live else factor, case.axis)
    y = folded / scale
    out = torch.where(y.abs() < 30, straight_through(y, codes), codes) * scale
    if case.live:
        return [out / along(factor.detach(), case.axis)]
    shift = None if not case.norm else mean if bias is None else mean - bias
    return [out] if shift is None else [out, (0 if beta is None else beta) - shift * factor]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_weight_is_that_of_numpy_bit_for_bit(case: Case):
    tensors = drawn(case)
    weight, log2_scale, mean, variance, gamma, beta, bias = (
        None if x is None else x.numpy() for x in tensors.values()
    )
    scale = np.asarray(torch.exp2(torch.tensor(np.rint(log2_scale) if case.power_of_two else log2_scale)))
    shape = [-1 if d == case.axis else 1 for d in range(4)]

    def per_channel(x: np.ndarray) -> np.ndarray:
        return x.reshape(shape) if x.ndim else x

    if case.norm:
        factor = torch.rsqrt(tensors["variance"] + EPS).numpy()  # one instruction, and its rounding is torch's own
        factor = factor if gamma is None else gamma * factor
        codes = np.rint(weight * per_channel(factor / scale))
        step = scale / factor if case.live else scale
    else:
        codes, step = np.rint(weight / per_channel(scale)), scale
    expected = np.clip(codes, -30, 30) * per_channel(step)
    out, *folded_bias = ours(case, tensors)
    if kernels.fuses(out):
        out, expected = out + 0.0, expected + 0.0  # of a zero, Triton's kernel loses the sign
    np.testing.assert_array_equal(out.numpy().view(np.int32), expected.view(np.int32))
    assert 0.02 < (np.abs(codes) > 30).mean() < 0.9
    if case.norm and not case.live:
        shift = mean - (0 if bias is None else bias)
        np.testing.assert_allclose(
            folded_bias[0], (0 if beta is None else beta) - shift * factor, rtol=1e-5, atol=1e-6
        )
    else:
        assert not folded_bias


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_autograd_through_the_textbook_formula_in_float64(case: Case):
    tensors = drawn(case)
    trained = [name for name in NAMES if name not in ("mean", "variance") and tensors[name] is not None]
    if case.live:
        trained = ["weight", "log2_scale"]  # what the batch norm itself sees to
    for name in trained:
        tensors[name].requires_grad_()
    outputs = ours(case, tensors)
    incoming = [torch.randn(out.shape, generator=torch.Generator().manual_seed(k)) for k, out in enumerate(outputs)]
    found = torch.autograd.grad(outputs, [tensors[name] for name in trained], incoming)

    double = {name: None if x is None else x.detach().double() for name, x in tensors.items()}
    steps = ours(case, {name: None if x is None else x.detach() for name, x in tensors.items()})[0]
    plain = textbook(case, double, torch.zeros(SHAPE, dtype=torch.float64))  # a code of 0: the step is what is left
    step = textbook(case, double, torch.ones(SHAPE, dtype=torch.float64))[0] - plain[0]
    for name in trained:
        double[name].requires_grad_()
    expected_outputs = textbook(case, double, (steps / step).round().detach())
    expected = torch.autograd.grad(expected_outputs, [double[n] for n in trained], [g.double() for g in incoming])
    for name, got, wanted in zip(trained, found, expected, strict=True):
        assert wanted.abs().max() > 0, name
        # The sums of the scale are differences of larger ones.
        close = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=close, msg=lambda m, n=name: f"{n}: {m}")


def test_each_gradient_can_be_asked_for_alone():
    for wanted in ("weight", "log2_scale", "gamma", "beta", "bias"):
        together, alone = drawn(Case()), drawn(Case())
        alone[wanted].requires_grad_()
        for name in ("weight", "log2_scale", "gamma", "beta", "bias"):
            together[name].requires_grad_()
        for tensors in (together, alone):
            weight, bias = ours(Case(), tensors)
            (weight.square().sum() + bias.square().sum()).backward()
        assert torch.equal(alone[wanted].grad, together[wanted].grad)
        assert [name for name, x in alone.items() if x.grad is not None] == [wanted]


def test_a_dead_channel_keeps_its_gradients_finite():
    tensors = drawn(Case(live=True))
    tensors["gamma"][0] = 0.0
    tensors["weight"].requires_grad_(), tensors["log2_scale"].requires_grad_()
    (out,) = ours(Case(live=True), tensors)
    out.sum().backward()
    assert out.isfinite().all() and tensors["weight"].grad.isfinite().all()
    assert tensors["log2_scale"].grad.isfinite().all()


def test_statistics_may_move_before_backward_where_the_batch_norm_is_live():
    case = Case(live=True)
    grads = []
    for moves in (False, True):
        tensors = drawn(case)
        weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
        (out,) = ours(case, tensors)
        if moves:  # as `SynchronizedBatchNorm` does, or DDP, which copies those of the first rank
            tensors["mean"].mul_(0.5)
            tensors["variance"].mul_(2.0)
            bias.detach().add_(1.0)
        out.square().sum().backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


def apart(x: Tensor | None) -> Tensor | None:
    """The same numbers, with others between them, as channels that were pruned by slicing leave them."""
    return x if x is None or not x.dim() else torch.stack([x, x + 1], -1)[..., 0]


@pytest.mark.parametrize("live", [False, True])
def test_parameters_and_statistics_may_lie_apart_in_memory(live: bool):
    case = Case(live=live)
    dense = drawn(case)
    for ours_, theirs in zip(ours(case, {k: apart(x) for k, x in dense.items()}), ours(case, dense), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_sum_of_biases_is_one_number_for_all():
    tensors = drawn(Case())
    tensors["beta"].requires_grad_(), tensors["bias"].requires_grad_()
    ours(Case(), tensors)[1].sum().backward()  # expanded in memory
    assert tensors["beta"].grad.tolist() == [1.0] * 6
    factor = tensors["gamma"].double() / (tensors["variance"].double() + EPS).sqrt()
    torch.testing.assert_close(tensors["bias"].grad.double(), factor, rtol=1e-5, atol=1e-6)
