"""Many weights in one launch, against one launch each and against torch; see `test_kernels.py` on where it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import calibrate, freeze_batch_norm, prepare_qat
from hf_qat.quantization.folding import fold_fake_quantize
from hf_qat.quantization.kernels.folding import FoldCall, Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer, fold_together
from hf_qat.quantization.layers import QATLayer, qat_layers
from tests.quantization.kernels.test_kernels import DEVICE, needs_triton


pytestmark = needs_triton

SHAPES = [((6, 5, 3, 3), 0), ((4, 3, 10, 11), 0), ((7, 3), 0), ((5, 6, 2, 2), 1), ((1, 1, 1, 1), 0)]


def leaves_of(shape: tuple[int, ...], axis: int, per_channel: bool) -> list[Tensor]:
    """Weight, log2 of its scale, gamma, beta and bias."""
    channels = shape[axis]
    scale = torch.empty((channels,) if per_channel else (), device=DEVICE).uniform_(-6, -4)
    return [torch.randn(shape, device=DEVICE), scale, *torch.randn(3, channels, device=DEVICE)]


def call_of(leaves: list[Tensor], statistics: tuple[Tensor, Tensor], axis: int, kind: str) -> FoldCall:
    weight, log2_scale, gamma, beta, bias = leaves
    norm = None if kind == "plain" else Norm(*statistics, gamma, beta, bias)
    return FoldCall(weight, log2_scale, norm, Folding(-127, 127, axis, False, kind == "live", 1e-5, torch.float32))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["plain", "folded", "live"])
def test_values_and_gradients_are_those_of_a_launch_each(kind: str, per_channel: bool):
    cases = []
    for number, (shape, axis) in enumerate(SHAPES):
        leaves = leaves_of(shape, axis, per_channel)
        if number == 1:
            leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
        statistics = torch.randn(shape[axis], device=DEVICE), torch.rand(shape[axis], device=DEVICE) + 0.5
        incoming = torch.randn(shape, device=DEVICE), torch.randn(shape[axis], device=DEVICE)
        cases.append((leaves, statistics, axis, incoming))
    results = []
    for together in (True, False):
        own = [[leaf.detach().clone().requires_grad_() for leaf in leaves] for leaves, *_ in cases]
        calls = [call_of(o, s, axis, kind) for o, (_, s, axis, _) in zip(own, cases, strict=True)]
        folded = fold_together(calls) if together else [fold_layer(*call) for call in calls]
        for (weight, bias), (*_, incoming) in zip(folded, cases, strict=True):
            outputs = [weight] if bias is None else [weight, bias]
            torch.autograd.backward(outputs, list(incoming[: len(outputs)]), retain_graph=True)
        found = [tensor for pair in folded for tensor in pair if tensor is not None]
        results.append(found + [leaf.grad for leaves in own for leaf in leaves if leaf.grad is not None])
    assert len(results[0]) == len(results[1]) == len(SHAPES) * {"plain": 3, "folded": 7, "live": 3}[kind]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_values_are_those_of_torch_where_kinds_are_mixed():
    plain, folded = leaves_of((6, 5, 3, 3), 0, True), leaves_of((9, 4), 0, True)
    mean, variance = torch.randn(9, device=DEVICE), torch.rand(9, device=DEVICE) + 0.5
    calls = [
        call_of(plain, (mean, variance), 0, "plain"),
        call_of(folded, (mean, variance), 0, "folded"),
        call_of(plain, (mean, variance), 0, "plain"),
    ]
    first, second, third = fold_together(calls)
    weight, log2_scale, gamma, beta, bias = folded
    factor = gamma * torch.rsqrt(variance + 1e-5)
    expected = fold_fake_quantize(weight, factor / torch.exp2(log2_scale), torch.exp2(log2_scale), -127, 127, 0)
    torch.testing.assert_close(second[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second[1], beta - (mean - bias) * factor)
    expected = fold_fake_quantize(plain[0], None, torch.exp2(plain[1]), -127, 127, 0)
    for out, none in (first, third):
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert none is None


def test_parameters_and_statistics_may_lie_apart_in_memory():
    leaves, statistics = leaves_of((6, 5, 3, 3), 0, True), torch.rand(2, 6, device=DEVICE) + 0.5
    apart = [leaf if leaf.dim() > 1 else torch.stack([leaf, leaf + 1], -1)[..., 0] for leaf in leaves]
    calls = [call_of(apart, tuple(statistics.t().contiguous().t()), 0, "folded")]
    ((weight, bias),) = fold_together(calls)
    alone, own_bias = fold_layer(*call_of(leaves, tuple(statistics), 0, "folded"))
    assert torch.equal(weight, alone) and torch.equal(bias, own_bias)


def test_what_nothing_depends_on_gets_no_gradient_from_it():
    leaves = [[leaf.requires_grad_() for leaf in leaves_of((4, 3), 0, True)] for _ in range(2)]
    statistics = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    (weight, _), _ = fold_together([call_of(own, statistics, 0, "folded") for own in leaves])
    weight.sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves[1])
    assert leaves[0][0].grad.any()


@pytest.mark.parametrize("missing", [2, 3, 4])
@pytest.mark.parametrize("kind", ["folded", "live"])
def test_a_batch_norm_or_layer_that_lacks_a_parameter(kind: str, missing: int):
    leaves = [[leaf.requires_grad_() for leaf in leaves_of(shape, axis, True)] for shape, axis in SHAPES[:2]]
    calls = []
    for own, (shape, axis) in zip(leaves, SHAPES, strict=False):
        statistics = torch.randn(shape[axis], device=DEVICE), torch.rand(shape[axis], device=DEVICE) + 0.5
        call = call_of(own, statistics, axis, kind)
        absent = ("gamma", "beta", "bias")[missing - 2]
        calls.append(
            call._replace(norm=call.norm._replace(**{absent: None}), folding=call.folding._replace(power_of_two=True))
        )
    for ours, theirs in zip(fold_together(calls), [fold_layer(*call) for call in calls], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_layer_that_is_not_float32_is_folded_by_itself(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    model = calibrate(prepare_qat(Twice().to(DEVICE), example_inputs=x), [x]).train()
    model.again.to(torch.float64)
    folded: list[int] = []
    monkeypatch.setattr(
        "hf_qat.quantization.layers.fold_together", lambda calls: folded.append(len(calls)) or fold_together(calls)
    )
    with pytest.raises(Exception, match=r"dtype|float|Double|fp64|type"):
        model(x)
    assert folded == [2]


class Twice(nn.Module):
    """One layer that is called twice, one that is not, and one in a precision of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.again, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.again(self.again(x).relu()).relu()
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float().mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_computes_as_with_a_launch_each(frozen: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    model = calibrate(prepare_qat(Twice().to(DEVICE), example_inputs=x), [x]).train()
    freeze_batch_norm(model, frozen)
    folded: list[int] = []
    results = []
    for ahead in (True, False):
        copied = copy.deepcopy(model)
        if not ahead:
            monkeypatch.setattr(QATLayer, "folds_ahead", lambda self: False)
        else:
            monkeypatch.setattr(
                "hf_qat.quantization.layers.fold_together",
                lambda calls: folded.append(len(calls)) or fold_together(calls),
            )
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            copied(x).square().mean().backward()
        results.append([p.grad for p in copied.parameters() if p.grad is not None])
        assert all("_ahead" not in layer.__dict__ for layer in qat_layers(copied).values())
    assert folded == [3]
    assert len(results[0]) == len(results[1]) >= 6
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
