"""What users do besides passing pixels and labels: masks, other sizes, frozen stages, parts left in float."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, prepare_qat
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.quantizer import fake_quantizers
from tests.coverage.case import Case
from tests.coverage.models import CASES


def case_of(title: str) -> Case:
    return next(case for case in CASES if case.title == title)


def pair(title: str) -> tuple[nn.Module, nn.Module]:
    """A model to prepare, and its float twin."""
    model = case_of(title).make()
    model.set_attn_implementation("eager")
    return model, copy.deepcopy(model)


@pytest.mark.slow
@torch.no_grad()
def test_a_vision_transformer_with_interpolated_positions_takes_a_larger_image():
    model, twin = pair("ViTForImageClassification")
    inputs = {"pixel_values": torch.randn(2, 3, 48, 48), "interpolate_pos_encoding": True}
    prepare_qat(model, QATConfig(), inputs)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_learns_with_a_pixel_mask():
    model, twin = pair("DetrForObjectDetection")
    case, mask = case_of("DetrForObjectDetection"), torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, 20:] = 0
    prepare_qat(model, QATConfig(), {**case.batch(2), "pixel_mask": mask})
    inputs = {**case.labelled(2), "pixel_mask": mask}
    with torch.no_grad(), fake_quant_disabled(model):
        assert math.isclose(float(model(**inputs).loss), float(twin(**inputs).loss), rel_tol=1e-4)
    calibrate(model, [{**case.batch(2), "pixel_mask": mask}], bias_correction=False)
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**copy.deepcopy(inputs)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.filterwarnings("ignore")
def test_yolos_reduces_its_matching_loss():
    case = case_of("YolosForObjectDetection")
    model = prepare_qat(case.make(), QATConfig(), case.batch(2))
    calibrate(model, [case.batch(8)], bias_correction=False)
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=2e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**case.labelled(2)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_frozen_stages_get_no_gradient_and_the_others_do():
    case = case_of("ResNetForImageClassification (basic)")
    model = case.make()
    model.resnet.embedder.requires_grad_(False)
    prepare_qat(model, QATConfig(), case.batch(2))
    calibrate(model, [case.batch(8)])
    model.train()(**case.labelled(4)).loss.backward()
    float_parameters = [(n, p) for n, p in model.named_parameters() if "quantizer" not in n]
    assert all(p.grad is None for n, p in float_parameters if n.startswith("resnet.embedder"))
    assert all(p.grad is not None for n, p in float_parameters if not n.startswith("resnet.embedder"))


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    """Calibrated; not to be changed."""
    torch.manual_seed(0)
    case = case_of("SwinForImageClassification")
    model = prepare_qat(case.make(), QATConfig(), case.batch(2))
    return calibrate(model, [case.batch(8)], bias_correction=False)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_short_last_batch_gives_what_its_images_give_alone(swin, batch):
    case, model = case_of("SwinForImageClassification"), swin
    pixels = case.batch(batch)["pixel_values"]
    together = model(pixels).logits
    alone = torch.cat([model(pixels[k : k + 1]).logits for k in range(batch)])
    # A different batch may sum in another order, and a near-tie then falls to the next code.
    assert (together - alone).abs().max() <= 0.05 * together.abs().max()


def test_an_excluded_stage_stays_float_and_the_rest_becomes_int8():
    case = case_of("ResNetForImageClassification (basic)")
    model = prepare_qat(case.make(), QATConfig(exclude=["resnet.encoder.stages.1"]), case.batch(2))
    assert not [path for path in fake_quantizers(model) if path.startswith("resnet.encoder.stages.1.layers.0.layer.0")]
    calibrate(model, [case.batch(8)])
    convert(model)
    stage = model.resnet.encoder.stages[1]
    assert not [module for module in stage.modules() if isinstance(module, QuantizedLayer)]
    assert any(isinstance(module, QuantizedLayer) for module in model.resnet.encoder.stages[0].modules())
    assert model(**case.batch(3)).logits.isfinite().all()
