from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from hf_qat import QATConfig, analyze, calibrate, convert, prepare_qat
from hf_qat.errors import ConfigError
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import resnet


NARROW = QATConfig("w4a8", overrides={"b": {"weights": {"bits": 4}}})


@dataclass(frozen=True)
class Layer:
    """An entry as `analyze` gives it: accuracy with only this layer quantized."""

    path: str
    only_quantized: float | None
    weight_bits: int | None = 4
    activation_bits: int | None = 8
    weight_sqnr: float | None = 20.0
    own_sqnr: float | None = math.inf
    parameters: int = 100
    module: str | None = None


@dataclass(frozen=True)
class Report:
    layers: tuple[Layer, ...]
    in_float: float | None = 0.90
    config: QATConfig | None = field(default_factory=lambda: NARROW)


class TestAccuracyBudget:
    def test_what_costs_most_is_widened_until_the_rest_costs_no_more_than_allowed(self):
        """Costs 1, 10, 2 and 4 points; four bits more leave 1/256 of one. 10 and 4 widened: 3 + 14/256 = 3.05."""
        report = Report((Layer("a", 0.89), Layer("b", 0.80), Layer("c", 0.88), Layer("d", 0.86)))
        assert QATConfig.from_analysis(report, budget={"at_least": 0.869}).overrides == {
            "b": {"weights": {"bits": 8}},
            "d": {"weights": {"bits": 8}},
        }

    def test_nothing_changes_where_the_budget_is_kept_already(self):
        assert QATConfig.from_analysis(Report((Layer("a", 0.89),)), budget={"at_least": 0.88}) == NARROW

    def test_the_noisier_one_of_weights_and_activations_gets_the_bits(self):
        """Noise powers 0.01 and 0.001: of 10 points 9.1 are the activation's."""
        report = Report((Layer("a", 0.80, 8, 4, weight_sqnr=30.0, own_sqnr=20.0),))
        assert QATConfig.from_analysis(report, budget={"at_least": 0.89}).overrides["a"] == {
            "activations": {"bits": 8}
        }

    def test_noise_without_a_signal_is_all_that_a_layer_costs(self):
        """Minus infinity, in dB; all 10 points are the weight's, of which 8 bits leave 0.04."""
        report = Report((Layer("a", 0.80, 4, 4, weight_sqnr=-math.inf, own_sqnr=20.0),))
        assert QATConfig.from_analysis(report, budget={"at_least": 0.89}).overrides["a"] == {"weights": {"bits": 8}}

    def test_a_layer_that_leaves_no_signal_stays_in_float(self):
        """The metric is a ratio, in dB: no bits bring it back from minus infinity; without that layer it is 40."""
        report = Report((Layer("a", -math.inf), Layer("b", 40.0)), in_float=math.inf)
        assert QATConfig.from_analysis(report, budget={"at_least": 39.0}).exclude == ["a"]

    def test_after_the_widest_codes_comes_float(self):
        """A cost of 40 points: at 8 bits still 0.156 %."""
        report = Report((Layer("a", 0.50), Layer("b", 0.89)))
        assert QATConfig.from_analysis(report, budget={"at_least": 0.8985}).exclude == ["a"]

    def test_ti_devices_get_no_sixteen_bits(self):
        report = Report((Layer("a", 0.50, 8, 8, weight_sqnr=60.0, own_sqnr=20.0),))
        for target, wanted in (("int8", ["a", []]), ("AM68A", [None, ["a"]])):
            found = QATConfig.from_analysis(replace(report, config=QATConfig(target)), budget={"at_least": 0.85})
            assert [next(iter(found.overrides), None), found.exclude] == wanted, target

    @pytest.mark.parametrize(("in_float", "quantized"), [(0.9, math.nan), (math.nan, 0.8)])
    def test_a_metric_that_is_no_number_is_refused(self, in_float, quantized):
        report = Report((Layer("a", 0.89), Layer("b", quantized)), in_float)
        with pytest.raises(ConfigError, match="NaN"):
            QATConfig.from_analysis(report, budget={"at_least": 0.86})

    def test_a_budget_out_of_reach_says_what_can_be_expected(self):
        report = Report((Layer("a.add_0", 0.80, None, 16, None, 20.0, 0, "a"),))
        with pytest.raises(ConfigError, match=r"at_least=0.89 cannot be reached: .* 0.8 are to be expected"):
            QATConfig.from_analysis(report, budget={"at_least": 0.89})


class TestSizeBudget:
    def test_the_bytes_go_where_they_gain_most(self):
        """Three layers of 50 bytes at 4 bits: 50 more pay for one, and `b` gains most for a byte."""
        report = Report((Layer("a", 0.89), Layer("b", 0.80), Layer("c", 0.70, parameters=1000)))
        found = QATConfig.from_analysis(report, budget={"weight_bytes": 650})
        assert found.overrides == {"b": {"weights": {"bits": 8}}}

    def test_less_than_the_weights_take_now_is_refused(self):
        with pytest.raises(ConfigError, match="less than the 50"):
            QATConfig.from_analysis(Report((Layer("a", 0.8),)), budget={"weight_bytes": 49})


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({}, {}, r'budget must be {"at_least": metric} or {"weight_bytes": bytes}, not {}'),
        ({}, {"at_least": 1.0, "weight_bytes": 100}, "budget must be"),
        ({}, 0.9, "budget must be"),
        ({}, {"at_lest": 0.9}, "Did you mean 'at_least'"),
        ({}, {"at_least": "0.9"}, "must be a number"),
        ({"in_float": None}, {"at_least": 0.8}, "no sensitivities"),
        ({"layers": (Layer("a", None),)}, {"at_least": 0.8}, "no sensitivities"),
        ({"config": None}, {"at_least": 0.8}, "of a file"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(changes, budget, message):
    with pytest.raises(ConfigError, match=message):
        QATConfig.from_analysis(replace(Report((Layer("a", 0.8),)), **changes), budget)


@pytest.fixture(scope="module")
def batches():
    return list(torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def found(batches):
    model = calibrate(prepare_qat(resnet().eval(), QATConfig("w4a4"), batches[0]), batches)
    return analyze(model, batches)


def decibels(model, batches):
    exact = resnet().eval()
    with torch.no_grad():
        pairs = [(exact(x).logits.double(), model(x).logits.double()) for x in batches]
    signal = sum(float((e**2).sum()) for e, _ in pairs)
    noise = sum(float(((e - r) ** 2).sum()) for e, r in pairs)
    return 10 * math.log10(signal / noise)


class TestRealModel:
    @pytest.mark.parametrize("wanted", [27.0, 36.0])
    def test_the_outputs_become_as_good_as_was_asked_for(self, found, batches, wanted):
        """Of the float model's outputs, up to 3 dB: half a bit."""
        config = QATConfig.from_analysis(found, budget={"at_least": wanted})
        model = calibrate(prepare_qat(copy.deepcopy(resnet()).eval(), config, batches[0]), batches)
        assert found.output_sqnr < wanted - 3 < decibels(model, batches)

    def test_only_what_was_named_is_wider(self, found, batches):
        config = QATConfig.from_analysis(found, budget={"at_least": 27.0})
        before = prepare_qat(resnet().eval(), QATConfig("w4a4"), batches[0])
        after = fake_quantizers(prepare_qat(resnet().eval(), config, batches[0]))
        for path, quantizer in fake_quantizers(before).items():
            layer, _, kind = path.rpartition(".")
            kind = "weights" if kind == "weight_quantizer" else "activations"
            bits = config.overrides.get(layer, {}).get(kind, {}).get("bits", quantizer.spec.bits)
            assert after[path].spec.bits == bits, path

    def test_the_weights_fit_and_lose_less(self, batches):
        """Where activations have 8 bits, it is weights that cost."""
        narrow = calibrate(prepare_qat(resnet().eval(), QATConfig("w4a8"), batches[0]), batches)
        found = analyze(narrow, batches)
        size = sum(
            layer.weight.numel() * layer.weight_quantizer.spec.bits / 8 for layer in qat_layers(narrow).values()
        )
        config = QATConfig.from_analysis(found, budget={"weight_bytes": 1.5 * size})
        model = convert(calibrate(prepare_qat(resnet().eval(), config, batches[0]), batches))
        layers = [module for module in model.modules() if hasattr(module, "weight_spec")]
        taken = sum(np.prod(module.weight.shape) * module.weight_spec.bits / 8 for module in layers)
        assert size < taken <= 1.5 * size
        assert decibels(model, batches) > found.output_sqnr + 1
