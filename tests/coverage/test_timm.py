"""timm's nets in training mode, dropout and stochastic depth on: themselves, where timm can be imported."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_qat import fake_quant_disabled, freeze_batch_norm, prepare_qat
from tests.coverage.test_training import TOLERANCE, differences, step, worst


timm = pytest.importorskip(
    "timm", reason="timm, with the torchvision that it needs, cannot be imported", exc_type=Exception
)

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
    freeze_batch_norm(model, False)
    with fake_quant_disabled(model):
        ours = step(model, {"x": x})
    theirs = step(float_model, {"x": x})
    assert worst(differences(dict(enumerate(ours[0])), dict(enumerate(theirs[0]))))[1] < TOLERANCE
    largest = max(float(g.abs().max()) for g in theirs[1].values() if g is not None)
    assert worst(differences(ours[1], theirs[1], 1e-3 * largest))[1] < TOLERANCE
    assert worst(differences(ours[2], theirs[2]))[1] < TOLERANCE
