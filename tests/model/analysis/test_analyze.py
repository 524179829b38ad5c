from __future__ import annotations

import ast
import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, analyze, calibrate, convert, prepare_qat
from hf_qat.errors import CalibrationError, StageError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, resnet, vit


def calibrated(model: nn.Module, images: list[Tensor], **options: object) -> nn.Module:
    return calibrate(prepare_qat(copy.deepcopy(model), QATConfig(**options), images[0]), images, bias_correction=False)


def decibels(exact: np.ndarray, other: np.ndarray) -> float:
    exact, other = exact.astype(np.float64), other.astype(np.float64)
    return 10 * math.log10((exact**2).sum() / ((exact - other) ** 2).sum())


class TestFigures:
    def test_sqnr_of_the_outputs_is_that_of_both_models_run_by_hand(self, float_model, images):
        model = calibrated(float_model, images)
        with torch.no_grad():
            exact = np.concatenate([float_model(x).numpy() for x in images])
            rounded = np.concatenate([model(x).numpy() for x in images])
        found = analyze(model, images, sensitivity=False)
        assert found.output_sqnr == pytest.approx(decibels(exact, rounded), abs=0.01)
        assert found.layers[-1].path == "head"
        assert found.layers[-1].sqnr == pytest.approx(found.output_sqnr, abs=0.01)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_biases_that_calibration_has_corrected_are_no_part_of_the_model_in_float(self, float_model, images, bits):
        model = prepare_qat(copy.deepcopy(float_model), QATConfig(weights={"bits": bits}), images[0])
        calibrate(model, images)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            exact = np.concatenate([float_model(x).numpy() for x in images])
            rounded = np.concatenate([model(x).numpy() for x in images])
        found, told = analyze(model, images), analyze(model, images, reference=float_model)
        uncorrected = analyze(calibrated(float_model, images, weights={"bits": bits}), images)
        assert found.output_sqnr == pytest.approx(decibels(exact, rounded), abs=0.01)
        for ours, theirs, alone in zip(found.layers, told.layers, uncorrected.layers, strict=True):
            assert (ours.sqnr, ours.only_float) == pytest.approx((theirs.sqnr, theirs.only_float), abs=0.1)
            assert ours.only_quantized == pytest.approx(theirs.only_quantized, abs=0.1)
            assert ours.only_quantized == pytest.approx(alone.only_quantized, abs=0.1)  # with nothing to correct
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_sqnr_of_a_layer_is_that_of_a_float_model_with_its_codes(self, float_model, images):
        """Input and first layer alone, computed with numpy from scales and the float weight."""
        model = calibrated(float_model, images)
        scales = {path: q.scale.detach() for path, q in fake_quantizers(model).items()}
        zero = fake_quantizers(model)["x_quantizer"].zero_point.round()
        weight = float_model.first.weight.detach()
        per_channel = scales["first.weight_quantizer"].view(-1, 1, 1, 1)
        coarse = (weight / per_channel).round().clamp(-127, 127) * per_channel
        exact, rounded = [], []
        for x in images:
            codes = ((x / scales["x_quantizer"]).round() + zero).clamp(0, 255)
            bias = float_model.first.bias.detach()
            y = nn.functional.conv2d(((codes - zero) * scales["x_quantizer"]).detach(), coarse, bias)
            scale = scales["first.activation_quantizer"]
            exact.append(torch.relu(float_model.first(x)).detach().numpy())
            rounded.append(((y / scale).round().clamp(0, 255) * scale).numpy())
        layer = next(x for x in analyze(model, images, sensitivity=False).layers if x.path == "first")
        assert layer.sqnr == pytest.approx(decibels(np.stack(exact), np.stack(rounded)), abs=0.05)
        assert layer.weight_sqnr == pytest.approx(decibels(weight.numpy(), coarse.numpy()), abs=0.01)
        assert (layer.minimum, layer.maximum) == (0.0, pytest.approx(float(np.stack(exact).max())))

    def test_every_rounded_value_and_every_layer_has_one_entry(self, images):
        model = vit().eval()
        x = torch.randn(2, 3, 32, 32)
        model = calibrated(model, [x])
        found = analyze(model, [x], sensitivity=False).layers
        weights = [path for path in fake_quantizers(model) if path.endswith(".weight_quantizer")]
        assert sorted(x.path for x in found if x.weight_bits) == sorted(p.rpartition(".")[0] for p in weights)
        assert len(found) == len({x.path for x in found}) >= len(fake_quantizers(model)) - len(weights)

    def test_alone_quantized_and_alone_in_float_are_what_switches_by_hand_give(self, float_model, images):
        model = calibrated(float_model, images, weights={"bits": 4})
        quantizers = fake_quantizers(model)

        def mean(of: nn.Module) -> float:
            with torch.no_grad():
                return float(of(images[0]).mean())

        layer = next(x for x in analyze(model, images, metric=mean).layers if x.path == "second")
        assert all(quantizer.enabled for quantizer in quantizers.values())
        for path, quantizer in quantizers.items():
            quantizer.enabled = path.startswith("second.")
        assert layer.only_quantized == mean(model)
        for path, quantizer in quantizers.items():
            quantizer.enabled = not path.startswith("second.")
        assert layer.only_float == mean(model)

    def test_a_converted_model_has_the_figures_of_the_prepared_one(self, float_model, images):
        model = calibrated(float_model, images)
        before = analyze(model, images, float_model, sensitivity=False)
        after = analyze(convert(model), images, float_model)
        for x, y in zip(before.layers, after.layers, strict=True):
            assert x.path == y.path and y.only_quantized is None
            assert x.sqnr == pytest.approx(y.sqnr, abs=0.5)
            assert x.weight_sqnr == pytest.approx(y.weight_sqnr, abs=1e-4)

    def test_the_model_is_left_as_it_was(self, float_model, images):
        model = calibrated(float_model, images)
        state = {name: x.clone() for name, x in model.state_dict().items()}
        expected = model(images[0]).detach()
        analyze(model, images)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert torch.equal(model(images[0]), expected)
        assert not any(module._forward_hooks for module in model.modules())

    def test_what_is_looked_at_is_not_warned_of(self, float_model, images, caplog):
        analyze(calibrated(float_model, images), images)
        assert [x for x in caplog.records if x.name.startswith("hf_qat")] == []


class TestPlantedFaults:
    """Each is the first of the worst three, with a word that names it."""

    def test_a_layer_at_two_bits(self, float_model, images):
        model = calibrated(float_model, images, overrides={"second": {"weights": {"bits": 2}}})
        worst = analyze(model, images).worst(3)[0]
        assert worst.path == "second" and worst.weight_bits == 2
        assert "2 bits" in worst.findings[0].what and "overrides" in worst.findings[0].remedy

    def test_a_dead_channel(self, float_model, images):
        with torch.no_grad():
            float_model.first.bias[3] = -100.0
        worst = analyze(calibrated(float_model, images), images).worst(3)[0]
        assert worst.path == "first" and worst.dead_channels == 1
        assert worst.findings[0].what.startswith("1 of 16 channels")

    @pytest.mark.parametrize("affine", [True, False])
    def test_a_dead_channel_of_a_batch_norm_alone(self, images, affine):
        norm = nn.BatchNorm2d(3, affine=affine).eval()
        norm.running_mean[1] = 100.0
        model = calibrated(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3)), images)
        (first,) = [layer for layer in analyze(model, images, sensitivity=False).layers if layer.path == "0"]
        assert (first.channels, first.dead_channels) == (3, 1)

    def test_a_range_that_an_outlier_has_set(self, float_model, images):
        """One pixel of one image is ten thousand: the codes of all others are a handful."""
        spoilt = [x.clone() for x in images]
        spoilt[1][0, 0, 5, 5] = 1e4
        model = calibrated(float_model, spoilt, activations={"observer": "minmax"})
        worst = analyze(model, images).worst(3)[0]
        assert "outlier" in worst.findings[0].remedy
        assert worst.path in ("x", "first", "second")

    def test_a_range_that_is_too_narrow(self, float_model, images):
        model = calibrated(float_model, images)
        with torch.no_grad():
            model.second.activation_quantizer.log2_scale -= 4
        worst = analyze(model, images).worst(3)[0]
        assert worst.path == "second" and worst.saturated > 0.5

    def test_without_one_nothing_is_said(self, float_model, images):
        assert [x.findings for x in analyze(calibrated(float_model, images), images).layers if x.findings] == []


class TestErrors:
    def test_a_float_model(self, float_model, images):
        with pytest.raises(StageError, match="Call prepare_qat"):
            analyze(float_model, images)

    def test_without_ranges(self, float_model, images):
        with pytest.raises(StageError, match="calibrate"):
            analyze(prepare_qat(float_model, QATConfig(), images[0]), images)

    def test_a_converted_model_without_its_float_model(self, float_model, images):
        with pytest.raises(StageError, match="reference="):
            analyze(convert(calibrated(float_model, images)), images)

    def test_a_reference_that_is_prepared(self, float_model, images):
        model = calibrated(float_model, images)
        with pytest.raises(StageError, match="prepared already"):
            analyze(model, images, model)

    def test_no_batches(self, float_model, images):
        with pytest.raises(CalibrationError, match="no batches"):
            analyze(calibrated(float_model, images), [])


def test_batch_norms_and_sums_are_compared_too():
    model, x = hand_written().eval(), torch.randn(4, 3, 16, 16)
    found = analyze(calibrated(model, [x]), [x], sensitivity=False)
    assert {"x", "stem", "body", "cat_0", "mean_0", "head"} <= {layer.path for layer in found.layers}
    assert all(25 < layer.sqnr < 80 for layer in found.layers)


def test_ranges_that_newer_images_go_beyond_are_named_with_the_share_of_values(float_model, images):
    """Calibrated on images a tenth as bright as those that come in later."""
    model = calibrated(float_model, [x * 0.1 for x in images])
    entry = next(layer for layer in analyze(model, images, sensitivity=False).layers if layer.path == "first")
    beyond = [finding.what for finding in entry.findings if "of its values lie beyond its range" in finding.what]
    entering, leaving = (fake_quantizers(model)[f"{name}_quantizer"] for name in ("x", "first.activation"))
    low, high = ((code - entering.zero_point.round()) * entering.scale for code in (0, 255))
    with torch.no_grad():
        values = torch.cat([torch.relu(float_model.first(x.clamp(low, high))).flatten() for x in images])
    share = float((values > 255.5 * leaving.scale).double().mean())
    assert share > 0.03 and len(beyond) == 1
    assert float(beyond[0].split("%")[0]) / 100 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("make", [resnet, pytest.param(vit, marks=pytest.mark.slow)])
def test_what_is_advised_for_a_value_can_be_written_and_gives_it_more_bits(make):
    """Each override in the words of a finding, as one would copy it."""
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    coarse = {"activations": {"bits": 3}}
    layers = analyze(calibrate(prepare_qat(make().eval(), QATConfig(**coarse), x), [x]), [x]).layers
    found = [(layer, finding.remedy) for layer in layers for finding in layer.findings]
    advised = {layer.path == layer.module: (layer, remedy) for layer, remedy in found if "overrides" in remedy}
    assert advised.keys() == {True, False}
    for layer, remedy in advised.values():
        (written,) = re.findall(r"overrides=({.*}}})", remedy)
        config = QATConfig(**coarse, overrides=ast.literal_eval(written))
        quantizers = fake_quantizers(prepare_qat(make().eval(), config, x))
        ends = (".activation_quantizer", "_quantizer")
        (quantizer,) = (quantizers[layer.path + end] for end in ends if layer.path + end in quantizers)
        assert quantizer.spec.bits == 4, remedy
