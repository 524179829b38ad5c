"""What a user adds from outside: an observer, a rule for an operation, a fusion pattern, a target, a rule of TIDL."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import hf_qat
from hf_qat import QATConfig, calibrate, check_tidl, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.config.observers import OBSERVERS, register_observer
from hf_qat.config.targets import TARGETS, Target, TensorScheme, register_target
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.nodes import emitter, replace_node
from hf_qat.graph.passes.rewrite import REWRITES, register_rewrite
from hf_qat.graph.rules import RULES, Kind, Rule, register_rule
from hf_qat.quantization.observers import Observer
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.tidl.rules.registry import LAYER_RULES, Finding, layer_rule
from tests.models import spread


aten = torch.ops.aten


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    registries = (OBSERVERS, RULES, REWRITES, TARGETS, LAYER_RULES)
    before = [copy.copy(registry) for registry in registries]
    lists = {operation: list(functions) for operation, functions in {**REWRITES, **LAYER_RULES}.items()}
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.extend(entries) if isinstance(registry, list) else registry.update(entries)
    for operation, functions in {**REWRITES, **LAYER_RULES}.items():
        functions[:] = lists[operation]


def train(model: nn.Module, x: Tensor, steps: int = 30) -> None:
    """Fit a random target, and require that it got nearer."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()


def grid(model: nn.Module, path: str) -> float:
    return fake_quantizers(model)[path].scale.item()


class TwoSigma(Observer):
    """Mean ± two standard deviations of all values."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def _update(self, values: Tensor, low: float, high: float) -> None:
        self.count += values.numel()
        self.total += float(values.double().sum())
        self.squares += float(values.double().square().sum())

    def _range(self) -> tuple[float, float]:
        if not self.count:
            return math.inf, -math.inf
        mean = self.total / self.count
        spread = 2 * math.sqrt(self.squares / self.count - mean**2)
        return mean - spread, mean + spread

    def _merge_ranks(self) -> None:
        raise NotImplementedError("one process is enough here")

    @staticmethod
    def weight_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
        return 2 * rows.square().mean(1).sqrt() / spec.qmax


def test_an_observer_of_ones_own_sets_the_scales_of_activations_and_weights():
    with pytest.raises(hf_qat.errors.ConfigError, match="two_sigma"):
        QATConfig(activations={"observer": "two_sigma"})
    register_observer("two_sigma")(TwoSigma)
    config = QATConfig(weights={"observer": "two_sigma"}, activations={"observer": "two_sigma"})
    assert QATConfig.from_dict(config.to_dict()) == config

    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), 3 + torch.randn(64, 6)
    weight = model[0].weight.detach().double().numpy()
    calibrate(prepare_qat(model, config, x), [x[:32], x[32:]], bias_correction=False)
    data = x.double().numpy()
    low, high = data.mean() - 2 * data.std(), data.mean() + 2 * data.std()
    assert grid(model, "input_quantizer") == pytest.approx((high - min(low, 0.0)) / 255, rel=1e-5)
    by_hand = 2 * np.sqrt((weight**2).mean(1)) / 127
    np.testing.assert_allclose(model[0].weight_quantizer.scale.detach(), by_hand, rtol=1e-5)
    train(model, x)
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=0, atol=0)


class Cumulative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.linear(x), 1)


def test_an_operation_with_a_rule_of_ones_own_computes_on_codes():
    x = torch.randn(64, 6)
    before = prepare_qat(Cumulative(), QATConfig(), x)
    assert [operation for _, operation, _ in before.float_operations] == ["aten.cumsum.default"]

    register_rule(aten.cumsum, Rule(Kind.COMPUTE, "cumsum"))
    model = prepare_qat(Cumulative(), QATConfig(), x)
    assert set(fake_quantizers(model)) - set(fake_quantizers(before)) == {"cumsum_0_quantizer"}
    assert model.float_operations == []
    calibrate(model, [x])
    train(model, x)
    codes = model(x).detach().double().numpy() / grid(model, "cumsum_0_quantizer")
    assert np.abs(codes - np.rint(codes)).max() < 1e-3
    assert len(np.unique(np.rint(codes))) <= 256


class Swish(nn.Module):
    """SiLU as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * torch.sigmoid(x)


def silu(captured: CapturedModule, node: fx.Node) -> None:
    """x · sigmoid(x) → silu(x)."""
    x, factor = node.args
    if isinstance(factor, fx.Node) and factor.target is aten.sigmoid.default and factor.args[0] is x:
        replace_node(node, emitter(node)(aten.silu.default, x))


def test_a_fusion_pattern_of_ones_own_makes_one_operation_of_several():
    x, float_model = torch.randn(64, 6), Swish()
    before = prepare_qat(copy.deepcopy(float_model), QATConfig(), x)
    assert {"linear.activation_quantizer", "sigmoid_0_quantizer", "mul_0_quantizer"} < set(fake_quantizers(before))

    register_rewrite(aten.mul.Tensor)(silu)
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(), x)
    assert set(fake_quantizers(model)) == {"x_quantizer", "linear.weight_quantizer", "linear.activation_quantizer"}
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), float_model(x))
    calibrate(model, [x])
    train(model, x)
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=0, atol=0)


def test_a_target_of_ones_own_is_trained_with_its_bits_under_each_of_its_names():
    assert "npu6" not in hf_qat.targets()
    six = TensorScheme(bits=6)
    register_target(Target("npu6", weights=six, activations=six, aliases=("N6",), description="6 bits, no zero point"))
    assert hf_qat.targets()[-1] == "npu6"
    assert QATConfig("n6") == QATConfig("npu6")

    model, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(256, 6)
    calibrate(prepare_qat(model, QATConfig("NPU6"), x), [x])
    train(model, x)
    result = convert(model)(x)
    for layer in (model[0], model[2]):
        assert layer.weight_scale.shape == ()
        assert -31 <= layer.codes.min() < -16 and 16 < layer.codes.max() <= 31
    assert 32 < result.unique().numel() <= 64


def test_a_rule_of_ones_own_is_in_the_report_on_a_trained_model(tmp_path):
    @layer_rule("Conv")
    def even_channels(layer, device):
        if layer.output_shape[1] % 2:
            yield Finding("house-odd-channels", "an odd number of channels", "make it even", "our lab book, page 7")

    model = spread(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    x = torch.randn(8, 3, 12, 12)
    calibrate(prepare_qat(model, QATConfig("TDA4VM"), x), [x])
    train(model, x)
    path = tmp_path / "model.onnx"
    export_onnx(convert(model), path, x[:1])

    graph = onnx.load(path).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2
    found = [issue for issue in check_tidl(path, "TDA4VM").issues if issue.rule == "house-odd-channels"]
    assert [issue.layer for issue in found] == [convolutions[1].name]
    assert found[0].source == "our lab book, page 7"
