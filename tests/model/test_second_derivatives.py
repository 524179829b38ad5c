"""Rounding has no second derivative: gradient penalties are refused, and without rounding those of the float model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, fake_quant_disabled, prepare_qat
from tests.models import hand_written


OBSERVED = {"learned": False}
CONFIGS = {
    "learned": QATConfig("int8"),
    "observed": QATConfig("int8", weights=OBSERVED, activations=OBSERVED),
    "codes kept": QATConfig("int8", save_memory=True),
}


def penalize(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the squared gradient of the images, by the name of the parameter."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_gradient_penalty_is_refused_with_quantizers_and_is_the_float_models_without(config):
    torch.manual_seed(0)
    x, original = torch.randn(4, 3, 32, 32), hand_written().eval()
    model = calibrate(prepare_qat(copy.deepcopy(original), config, x[:2]), [x], bias_correction=False)

    for training in (True, False):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            penalize(copy.deepcopy(model).train(training), x)

    with fake_quant_disabled(model):
        found = penalize(model, x)
    for name, gradient in penalize(original, x).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
