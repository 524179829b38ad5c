"""Fake quantization of folded weights, against numpy, and against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_qat.quantization import folding
from hf_qat.quantization.folding import fold_fake_quantize
from tests.quantization.test_fake_quantize import SHAPE, along, bits, close, sum_to


@pytest.fixture(params=[folding.BLOCK, 150], ids=["at once", "in blocks"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a weight together, and two channels of 60 values at a time."""
    monkeypatch.setattr(folding, "BLOCK", request.param)


FOLDS = {
    "per channel": ((6,), (6,), 0),
    "transposed convolution": ((5,), (5,), 1),
    "one scale for the folded weight": ((6,), (), 0),
    "one multiplier": ((), (5,), 1),
    "one of each": ((), (), 0),
}


def fold_case(fold: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weight, multiplier (of either sign), step and incoming gradient."""
    multipliers, steps, _ = FOLDS[fold]
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(SHAPE)
    multiplier = rng.uniform(2, 5, multipliers) * rng.choice([-1, 1], multipliers)
    step = rng.uniform(0.1, 0.4, steps)
    return tuple(np.asarray(v, dtype=np.float32) for v in (weight, multiplier, step, rng.standard_normal(SHAPE)))


@pytest.mark.parametrize("fold", FOLDS)
def test_the_folded_weight_is_that_of_numpy(fold):
    weight, multiplier, step, _ = fold_case(fold)
    axis = FOLDS[fold][2]
    ours = fold_fake_quantize(*map(torch.tensor, (weight, multiplier, step)), -7, 7, axis).numpy()
    codes = np.clip(np.rint(weight * along(multiplier, weight, axis)), -7, 7)
    np.testing.assert_array_equal(bits(ours), bits(codes * along(step, weight, axis)))
    assert 0.02 < (np.abs(codes) == 7).mean() < 0.6


@pytest.mark.parametrize("fold", FOLDS)
def test_gradients_of_the_folded_weight_are_those_of_the_formula(fold):
    weight, multiplier, step, g = fold_case(fold)
    axis = FOLDS[fold][2]
    ours = [torch.tensor(v, requires_grad=True) for v in (weight, multiplier, step)]
    fold_fake_quantize(*ours, -7, 7, axis).backward(torch.tensor(g))
    y = (weight * along(multiplier, weight, axis)).astype(np.float64)
    inside = np.abs(y) < 7
    weight, multiplier, step, g = (v.astype(np.float64) for v in (weight, multiplier, step, g))
    m, s = along(multiplier, weight, axis), along(step, weight, axis)
    close(ours[0].grad, np.where(inside, g * m * s, 0))
    close(ours[1].grad, sum_to(np.where(inside, g * weight * s, 0), multiplier, axis))
    close(ours[2].grad, sum_to(g * np.clip(np.rint(y), -7, 7), step, axis))


def test_scale_and_factor_of_a_folded_weight_get_the_gradients_of_lsq_on_the_product():
    weight, factor, scale, g = fold_case("per channel")
    factor, scale = factor / 10, scale / 4
    ours = [torch.tensor(v, requires_grad=True) for v in (weight, factor, scale)]
    fold_fake_quantize(ours[0], ours[1] / ours[2], ours[2], -7, 7, 0).backward(torch.tensor(g))
    weight, factor, scale, g = (v.astype(np.float64) for v in (weight, factor, scale, g))
    f, s = along(factor, weight, 0), along(scale, weight, 0)
    ratio = weight * f / s
    inside = np.abs(ratio) < 7
    close(ours[0].grad, np.where(inside, g * f, 0))
    close(ours[1].grad, sum_to(np.where(inside, g * weight, 0), factor, 0))
    close(ours[2].grad, sum_to(g * np.where(inside, np.rint(ratio) - ratio, np.sign(ratio) * 7), scale, 0))


def test_a_folded_weight_with_its_factor_divided_out_again_is_near_the_weight():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([0.5, -2.0, 1e-3, 30.0])
    scale = (weight.flatten(1).abs().amax(1) * factor.abs()) / 127
    out = fold_fake_quantize(weight, factor / scale, scale / factor, -127, 127, 0)
    step = (scale / factor.abs()).view(4, 1, 1, 1)
    assert ((out - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("steps", [(6,), ()], ids=["per channel", "one step"])
@pytest.mark.parametrize("wanted", ["weight", "step", "both"])
def test_without_a_multiplier_value_and_gradients_are_those_of_lsq(steps, wanted):
    rng = np.random.default_rng(5)
    weight, g = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    step = np.asarray(rng.uniform(0.1, 0.3, steps), dtype=np.float32)
    ours = [
        torch.tensor(v, requires_grad=wanted in (name, "both")) for name, v in (("weight", weight), ("step", step))
    ]
    out = fold_fake_quantize(ours[0], None, ours[1], -7, 7, 0)
    out.backward(torch.tensor(g))
    ratio = weight / along(step, weight, 0)
    codes = np.clip(np.rint(ratio), -7, 7)
    np.testing.assert_array_equal(bits(out.detach().numpy()), bits(codes * along(step, weight, 0)))
    inside = np.abs(ratio) < 7
    # Esser et al. 2020, eq. 3 and eq. 5.
    eq3 = np.where(inside, codes - ratio.astype(np.float64), np.sign(ratio) * 7)
    assert 0.02 < 1 - inside.mean() < 0.6
    if wanted in ("weight", "both"):
        np.testing.assert_array_equal(ours[0].grad.numpy(), np.where(inside, g, 0))
    if wanted in ("step", "both"):
        close(ours[1].grad, sum_to(g * eq3, step, 0))


def test_a_weight_of_one_dimension_has_one_value_per_channel():
    weight, step = torch.tensor([0.26, -0.9, 3.0], requires_grad=True), torch.full((3,), 0.1, requires_grad=True)
    out = fold_fake_quantize(weight, None, step, -7, 7, 0)
    out.backward(torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(out, torch.tensor([0.3, -0.7, 0.7]))
    assert weight.grad.tolist() == [1, 0, 0]
    torch.testing.assert_close(step.grad, torch.tensor([1 * (3 - 2.6), 2 * -7.0, 4 * 7.0]))


class TestForACompiler:
    """What it is given is another formula, of which it makes one loop; here PyTorch computes it as it is."""

    @pytest.fixture(autouse=True)
    def compiling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)

    @pytest.mark.parametrize("fold", FOLDS)
    def test_values_and_gradients_are_those_of_numpy(self, fold):
        test_the_folded_weight_is_that_of_numpy(fold)
        test_gradients_of_the_folded_weight_are_those_of_the_formula(fold)

    @pytest.mark.parametrize("wanted", ["weight", "step", "both"])
    def test_so_are_those_without_a_multiplier(self, wanted):
        test_without_a_multiplier_value_and_gradients_are_those_of_lsq((6,), wanted)
        test_without_a_multiplier_value_and_gradients_are_those_of_lsq((), wanted)
