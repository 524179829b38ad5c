"""timm's nets in training mode, dropout and stochastic depth on: themselves, where timm can be imported."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qat import prepare_qat
from tests.coverage.training import compare_steps


timm = pytest.importorskip(
    "timm", reason="timm, with the torchvision that it needs, cannot be imported", exc_type=Exception
)

#: Largest difference relative to the largest value of a tensor: weights of convolutions are folded in another order.
TOLERANCE = 2e-3

#: One of each kind that timm makes of its own layers: `BatchNormAct2d`, squeeze and excitation, its own pooling.
SAMPLE = ("efficientnet_b0", "mobilenetv3_small_050")
NETS = (
    *SAMPLE,
    "resnet18",
    "regnetx_002",
    "convnext_atto",
    "ghostnet_050",
    "mobilenetv4_conv_small_035",
    "resnetv2_18",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else [pytest.mark.slow]) for n in NETS])
def test_a_step_of_training_is_that_of_the_float_model(name):
    torch.manual_seed(0)
    float_model = timm.create_model(name, num_classes=5, drop_rate=0.2, drop_path_rate=0.2)
    x = torch.randn(4, 3, 64, 64)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x[:2])
    parity = compare_steps(model, float_model, {"x": x})
    assert max(parity.outputs, parity.gradients, parity.buffers) < TOLERANCE
