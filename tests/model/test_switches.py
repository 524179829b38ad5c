from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, freeze_batch_norm, freeze_ranges, prepare_qat
from hf_qat.errors import StageError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, spread


def test_frozen_ranges_get_no_gradient_and_the_weights_still_do():
    model = prepare_qat(hand_written(), QATConfig(), torch.randn(2, 3, 32, 32))
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    freeze_ranges(model).train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.endswith((".log2_scale", ".offset")), name
    freeze_ranges(model, False)(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_ranges_that_are_not_learned_follow_the_data_in_training_until_they_are_frozen():
    changes = {"learned": False, "observer": "moving_average"}
    model = prepare_qat(hand_written(), QATConfig(activations=changes), torch.randn(2, 3, 32, 32))
    calibrate(model, [torch.randn(4, 3, 32, 32)], bias_correction=False)
    quantizer = model.x_quantizer
    high = quantizer.range_max.item()
    x = torch.randn(4, 3, 32, 32)
    x[0, 0, 0, 0] = 100.0
    model.eval()(x)
    assert quantizer.range_max.item() == high
    model.train()(x)
    assert quantizer.range_max.item() == pytest.approx(high + 0.01 * (100 - high), rel=1e-5)
    scale = (quantizer.range_max - quantizer.range_min) / 255
    torch.testing.assert_close(quantizer.scale, scale)
    freeze_ranges(model)(x)
    torch.testing.assert_close(quantizer.scale, scale, rtol=0, atol=0)


def test_fake_quant_disabled_puts_every_switch_back():
    model = prepare_qat(hand_written(), QATConfig(), torch.randn(2, 3, 32, 32))
    model.x_quantizer.enabled = False
    with pytest.raises(KeyError), fake_quant_disabled(model):
        assert not any(quantizer.enabled for quantizer in fake_quantizers(model).values())
        raise KeyError
    assert [path for path, q in fake_quantizers(model).items() if not q.enabled] == ["x_quantizer"]


@pytest.mark.parametrize(
    "switch", [freeze_batch_norm, freeze_ranges, lambda m: fake_quant_disabled(m).__enter__(), convert]
)
def test_the_switches_of_a_prepared_model_refuse_a_float_one(switch):
    with pytest.raises(StageError, match=r"HandWritten is a float model. Call prepare_qat\(model, config\) first"):
        switch(hand_written())


def test_with_fake_quantization_off_the_model_is_the_float_one_and_on_again_it_is_not():
    x = torch.randn(4, 3, 32, 32)
    float_model = hand_written().eval()
    model = calibrate(prepare_qat(hand_written().eval(), QATConfig("w4a4"), x), [x], bias_correction=False)
    with torch.no_grad():
        quantized, expected = model(x), float_model(x)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), quantized)
    assert (quantized - expected).norm() > 0.01 * expected.norm()


def test_a_frozen_batch_norm_keeps_its_statistics_in_training_until_it_is_live_again():
    x = 5 + torch.randn(4, 3, 32, 32)
    model = prepare_qat(hand_written(), QATConfig(), x)
    calibrate(model, [x])
    before = model.stem_norm.running_mean.clone()
    freeze_batch_norm(model).train()(x)
    assert torch.equal(model.stem_norm.running_mean, before)
    freeze_batch_norm(model, False)(x)
    assert not torch.allclose(model.stem_norm.running_mean, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@torch.no_grad()
def test_a_running_range_takes_no_batch_with_a_value_that_is_not_finite(bad):
    changes = {"learned": False, "observer": "moving_average"}
    model = prepare_qat(hand_written(), QATConfig(activations=changes), torch.randn(2, 3, 32, 32))
    calibrate(model, [torch.randn(4, 3, 32, 32)], bias_correction=False)
    freeze_batch_norm(model).train()
    before = {path: quantizer.state_dict() for path, quantizer in fake_quantizers(model).items()}
    before = copy.deepcopy(before)
    x = torch.randn(4, 3, 32, 32)
    x[0, 0, 0, 0] = bad
    model(x)
    after = fake_quantizers(model)["x_quantizer"].state_dict()
    assert all(torch.equal(value, before["x_quantizer"][key]) for key, value in after.items())
    model(torch.randn(4, 3, 32, 32))
    for path, quantizer in fake_quantizers(model).items():
        assert all(value.isfinite().all() for value in quantizer.state_dict().values()), path
    assert model.x_quantizer.observed.item() == before["x_quantizer"]["observed"].item() + 1


@pytest.mark.parametrize("excluded", ["backbone", "backbone.encoder", "decode_head"])
def test_frozen_batch_norms_of_an_excluded_child_keep_their_statistics(excluded):
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    x = torch.randn(4, 3, 64, 64)
    model = prepare_qat(transformers.UperNetForSemanticSegmentation(config), QATConfig(exclude=excluded), x)
    freeze_batch_norm(model).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert len(before) > 20
    model(x)
    assert [name for name, buffer in model.named_buffers() if name in before and not buffer.equal(before[name])] == []
    freeze_batch_norm(model, False)(x)
    moved = [name for name, buffer in model.named_buffers() if name in before and not buffer.equal(before[name])]
    assert len(moved) == len(before)


def test_statistics_of_a_frozen_batch_norm_are_not_thrown_away_by_update_bn_and_those_of_a_live_one_are_collected():
    """`torch.optim.swa_utils.update_bn` resets them, and collects them anew in training, which frozen ones ignore."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)]
    layers += [nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)]
    float_model, batches = spread(nn.Sequential(*layers)).eval(), list(torch.randn(3, 8, 3, 8, 8))
    config = QATConfig(exclude=["4", "5"])
    model = calibrate(prepare_qat(copy.deepcopy(float_model), config, batches[0]), batches, bias_correction=False)
    expected = model(batches[0])

    averaged = AveragedModel(freeze_batch_norm(model))
    with pytest.raises(StageError, match="freeze_batch_norm"):
        update_bn(batches, averaged)
    assert torch.equal(averaged(batches[0]), expected)

    with fake_quant_disabled(freeze_batch_norm(averaged.module, False)):
        update_bn(batches, averaged)
    update_bn(batches, float_model)
    for path in ("0", "3", "5"):
        ours, theirs = averaged.module.get_submodule(path), float_model.get_submodule(path)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
