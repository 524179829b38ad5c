from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from transformers import BitConfig, BitForImageClassification

from hf_qat import QATConfig, calibrate, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.errors import StageError
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.weight_quantizer import QuantizedWeight, WeightQuantizer


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def uneven(conv: nn.Conv2d) -> nn.Conv2d:
    """Channels whose weights differ by a factor of 100: one scale for all would leave the smallest nothing."""
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-2, 0, len(conv.weight)).view(-1, 1, 1, 1))
    return conv


class StandardizedConv(nn.Conv2d):
    """BiT's: the weight is standardised in forward, here times a factor per channel."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.factor = nn.Parameter(torch.logspace(-2, 0, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return functional.conv2d(x, weight * self.factor.view(-1, 1, 1, 1), self.bias)


class Product(nn.Module):
    """x @ W, W of shape (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) * torch.logspace(-2, 0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Transposed(nn.Module):
    """F.linear with the transpose of a parameter (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) * torch.logspace(-2, 0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t())


class Tied(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x > 0).long().sum(-1)
        return functional.linear(x + self.embedding(ids), self.embedding.weight)


class TiedBias(nn.Module):
    """Two layers have weights of their own, and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class RowBias(nn.Module):
    """A linear layer by hand, with a bias of (1, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class NoBias(nn.Module):
    """A weight, and no attribute named bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def pruned() -> nn.Conv2d:
    return prune.l1_unstructured(uneven(nn.Conv2d(3, 8, 3)), "weight", 0.5)


IMAGES, ROWS = drawn(4, 3, 8, 8), drawn(4, 6)

#: What makes the module, its input, the path of the weight's quantizer, and the axis of the output channels.
CASES = {
    "weight norm": (lambda: parametrizations.weight_norm(uneven(nn.Conv2d(3, 8, 3))), IMAGES, "weight_quantizer", 0),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(uneven(nn.Conv2d(3, 8, 3))),
        IMAGES,
        "weight_quantizer",
        0,
    ),
    "pruning": (pruned, IMAGES, "weight_quantizer", 0),
    "standardised": (StandardizedConv, IMAGES, "weight_quantizer", 0),
    "transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 8, 3), dim=1),
        IMAGES,
        "weight_quantizer",
        1,
    ),
    "x @ W": (Product, ROWS, "weight_quantizer", 1),
    "linear with W.t()": (Transposed, ROWS, "weight_quantizer", 1),
    "tied": (Tied, ROWS, "embedding.weight_quantizer", 0),
    "tied bias": (TiedBias, ROWS, "first.weight_quantizer", 0),
    "bias of (1, N)": (RowBias, ROWS, "weight_quantizer", 0),
    "no bias": (NoBias, ROWS, "weight_quantizer", 0),
    "attention": (Attention, drawn(4, 5, 6), "attention.in_proj_weight_quantizer", 0),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    make, x, path, axis = CASES[request.param]

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make(), nn.Identity())

    return made, x, f"0.{path}", axis


def quantizer_at(model: nn.Module, path: str) -> FakeQuantize:
    return fake_quantizers(model)[path]


def test_it_is_rounded_as_a_weight_signed_per_channel_with_the_bits_of_weights(case):
    make, x, path, axis = case
    model = prepare_qat(make(), QATConfig(weights={"bits": 4}), x)
    spec = quantizer_at(model, path).spec
    assert (spec.bits, spec.signed, spec.symmetric, spec.qmin, spec.axis) == (4, True, True, -7, axis)


def test_with_one_scale_for_all_channels_where_the_target_has_no_more(case):
    make, x, path, _ = case
    model = prepare_qat(make(), QATConfig("TDA4VM"), x)
    spec = quantizer_at(model, path).spec
    assert (spec.axis, spec.power_of_two, quantizer_at(model, path).scale.dim()) == (None, True, 0)


def gradients(module: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    module.train(training).zero_grad()
    output = module(x)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_with_quantizers_off_outputs_and_gradients_are_those_of_the_float_model(case, training):
    make, x, _, _ = case
    wanted = gradients(make(), x, training)
    model = prepare_qat(make(), QATConfig(), x)
    with fake_quant_disabled(model):
        got = gradients(model, x, training)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_training_the_weight_is_rounded_and_both_it_and_its_scale_get_a_gradient(case):
    make, x, path, _ = case
    model = calibrate(prepare_qat(make(), QATConfig(weights={"bits": 2}), x), [x])
    rounded = gradients(model, x, training=True)[0]
    with fake_quant_disabled(model):
        assert (model(x) - rounded).norm() / rounded.norm() > 0.1
    scale = quantizer_at(model, path).log2_scale.grad
    assert scale is not None
    gradients(model, x, training=True)
    assert quantizer_at(model, path).log2_scale.grad.abs().sum() > 0


def test_after_calibration_every_output_channel_has_its_own_accuracy(case):
    make, x, _, _ = case
    wanted = make().eval()(x)
    model = calibrate(prepare_qat(make(), QATConfig(), x), [x], bias_correction=False).eval()
    for name, quantizer in fake_quantizers(model).items():
        quantizer.enabled = name.endswith("weight_quantizer")
    with torch.no_grad():
        error = (model(x) - wanted).flatten(2).transpose(0, 1).flatten(1) if wanted.dim() == 4 else (model(x) - wanted)
        channels = wanted.flatten(2).transpose(0, 1).flatten(1) if wanted.dim() == 4 else wanted
    dim = 1 if wanted.dim() == 4 else tuple(range(wanted.dim() - 1))
    assert (error.norm(dim=dim) / channels.norm(dim=dim)).max() < 0.02  # 34 dB; 9.6 dB with one scale


def test_convert_folds_it_into_codes_and_the_outputs_stay_the_same(case):
    make, x, path, axis = case
    model = calibrate(prepare_qat(make(), QATConfig(), x), [x]).eval()
    with torch.no_grad():
        wanted = model(x)
        quantizer = quantizer_at(model, path)
        assert isinstance(quantizer, WeightQuantizer)
        converted = convert(model)
        torch.testing.assert_close(converted(x), wanted, rtol=0, atol=1e-6)
    folded = converted.get_submodule(path)
    assert isinstance(folded, QuantizedWeight)
    assert folded.weight.dtype == torch.int8 and folded.weight.shape[axis] == len(folded.scale)
    with pytest.raises(StageError, match="cannot cast a converted model"):
        folded.half()


def test_onnx_has_it_as_int8_initializer_and_onnx_runtime_agrees(case, tmp_path: Path):
    make, x, path, axis = case
    model = convert(calibrate(prepare_qat(make(), QATConfig(), x), [x]))
    report = export_onnx(model, tmp_path / "model.onnx", x)
    assert report.max_output_lsb <= 1
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    codes = model.get_submodule(path).weight.numpy()
    forms = [(codes, axis), (codes.T, 1 - axis)]  # a transpose is folded into the initializer
    (found,) = [(n, a) for n, value in tensors.items() for c, a in forms if np.array_equal(value, c)]
    name, axis = found
    assert tensors[name].dtype == np.int8
    (node,) = [node for node in graph.node if name in node.input]
    assert node.op_type == "DequantizeLinear"
    assert {a.name: a.i for a in node.attribute} == {"axis": axis}
    assert tensors[node.input[1]].shape == (tensors[name].shape[axis],)


def test_a_parameter_on_the_left_of_a_product_has_one_scale():
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.mix @ x

    model = prepare_qat(Mix(), QATConfig(), drawn(2, 4, 6))
    spec = quantizer_at(model, "mix_quantizer").spec
    assert (spec.signed, spec.symmetric, spec.axis) == (True, True, None)


def test_a_parameter_that_is_used_along_both_axes_has_one_scale():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x @ self.matrix, self.matrix)

    assert quantizer_at(prepare_qat(Both(), QATConfig(), ROWS), "matrix_quantizer").spec.axis is None


def test_an_excluded_module_keeps_the_weight_that_it_computes():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 1))
    prepare_qat(model, QATConfig(exclude=["0"]), IMAGES)
    assert not any(isinstance(quantizer, WeightQuantizer) for quantizer in fake_quantizers(model).values())


def test_what_is_calculated_with_but_does_not_multiply_is_no_weight():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.linear = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.shift)

    model = prepare_qat(Shift(), QATConfig(), ROWS)
    assert not isinstance(quantizer_at(model, "shift_quantizer"), WeightQuantizer)


def tiny_bit() -> BitForImageClassification:
    torch.manual_seed(0)
    config = BitConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_groups=2, num_labels=4
    )
    return BitForImageClassification(config).eval()


@pytest.mark.parametrize(
    "converted", [pytest.param(False, marks=pytest.mark.slow), True], ids=["prepared", "converted"]
)
def test_a_bit_model_with_such_weights_is_saved_and_loaded(tmp_path: Path, converted):
    pixels = drawn(2, 3, 32, 32)
    model = prepare_qat(tiny_bit(), QATConfig(), {"pixel_values": pixels})
    calibrate(model, [{"pixel_values": pixels}])
    weights = [path for path, q in fake_quantizers(model).items() if isinstance(q, WeightQuantizer)]
    assert len(weights) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    model = convert(model) if converted else model.eval()
    model.save_pretrained(tmp_path)
    loaded = BitForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)
