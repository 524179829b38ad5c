from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.learned_rounding import LearnedRounding
from tests.models import hand_written


def prepared(target: str = "w4a8") -> nn.Module:
    model = prepare_qat(hand_written().eval(), QATConfig(target), torch.zeros(2, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return calibrate(model, [x], bias_correction=False)


def exact_positions(layer: nn.Module, norm: nn.Module | None) -> np.ndarray:
    """Each weight in steps, batch norm folded, in float64, by the textbook."""
    weight, scale = layer.weight.detach().double().numpy(), layer.weight_quantizer.scale.detach().double().numpy()
    if norm is not None:
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * factor.detach().numpy().reshape(-1, *[1] * (weight.ndim - 1))
    return weight / scale.reshape(-1, *[1] * (weight.ndim - 1))


def layers_and_norms(model: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    return [(model.stem, model.stem_norm), (model.body, model.body_norm), (model.head, None)]


def test_unlearned_weights_are_those_of_the_nearest_codes_and_writing_them_changes_nothing():
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    pairs = layers_and_norms(model)
    rounding = LearnedRounding([layer for layer, _ in pairs])
    for (layer, norm), weight in zip(pairs, rounding.weights(), strict=True):
        spec = layer.weight_quantizer.spec
        codes = np.rint(exact_positions(layer, norm)).clip(spec.qmin, spec.qmax)
        scale = layer.weight_quantizer.scale.detach().reshape(-1, *[1] * (weight.dim() - 1))
        np.testing.assert_allclose((weight.detach() / scale).numpy(), codes, atol=1e-4)
    assert rounding.write() == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("target", ["w4a8", "int8", "TDA4VM"])
def test_every_weight_gets_the_code_chosen_for_it_and_moves_no_further_than_into_its_cell(target):
    model = prepared(target)
    pairs = layers_and_norms(model)
    exact = [exact_positions(layer, norm) for layer, norm in pairs]
    rounding = LearnedRounding([layer for layer, _ in pairs])
    chosen = torch.rand(rounding.position.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rounding.position.copy_(chosen)
    changed = rounding.write()
    start = different = 0
    for (layer, norm), position in zip(pairs, exact, strict=True):
        spec, upper = layer.weight_quantizer.spec, chosen[start : start + position.size].numpy() >= 0.5
        start += position.size
        low = np.floor(position.clip(spec.qmin, spec.qmax)).clip(None, spec.qmax - 1)
        codes = layer.codes(layer.device_scale()).numpy()
        np.testing.assert_array_equal(codes, low + upper.reshape(position.shape))
        nearest = np.rint(position.clip(spec.qmin, spec.qmax))
        inside = np.abs(position) < spec.qmax
        assert np.abs(codes - nearest).max() == 1  # some do change, by one step
        moved = np.abs(exact_positions(layer, norm) - position)
        assert moved[codes == nearest].max() == 0 and moved[inside].max() < 0.53
        different += int((codes != nearest).sum())
    assert changed == different


def test_the_gradient_of_a_position_is_that_of_its_weight_times_the_step():
    model = prepared()
    layer = model.head
    rounding = LearnedRounding([layer])
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    (weight,) = rounding.weights()
    weight.backward(gradient)
    step: Tensor = layer.weight_quantizer.scale.detach()[:, None]
    torch.testing.assert_close(rounding.position.grad, (gradient * step).flatten())


def test_positions_stay_between_the_two_codes():
    rounding = LearnedRounding(list(qat_layers(prepared()).values()))
    with torch.no_grad():
        rounding.position[:2] = torch.tensor([-3.0, 3.0])
    rounding.limit()
    assert rounding.position[:2].tolist() == [0.0, 1.0]
