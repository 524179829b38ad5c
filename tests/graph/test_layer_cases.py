"""Layers that are used in another way than their class is: outputs and gradients are those of the float model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.errors import CalibrationError, CaptureError, ExportError
from hf_qat.quantization.layers import qat_layers


class NormAct(nn.BatchNorm2d):
    """timm's `BatchNormAct2d`: it activates, too."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(super().forward(x))


class Called(nn.Module):
    """A convolution, and what `compute` does with it and with the batch norm after it."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.randn(4))
        self.compute = compute
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class WithoutEpsilon(nn.Module):
    """Statistics of a batch norm, in a module without `eps`, `momentum` and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.weight, self.bias = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return functional.batch_norm(self.conv(x), *statistics, self.weight, self.bias, False, 0.0, 1e-3)


def norm_of(weight=None, bias=None, training=None, momentum=0.1, eps=1e-5):
    """`F.batch_norm` of a convolution with the statistics of the module, and the rest as it is given."""

    def compute(self: Called, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.batch_norm(
            self.conv(x),
            norm.running_mean,
            norm.running_var,
            norm.weight if weight is None else weight(self),
            norm.bias if bias is None else bias(self),
            self.training if training is None else training,
            momentum,
            eps,
        )

    return compute


def convolved(*arguments: dict[str, int]):
    """The sum of calls of one weight, with several arguments."""

    def compute(self: Called, x: Tensor) -> Tensor:
        sizes = [functional.conv2d(x, self.conv.weight, self.conv.bias, **given) for given in arguments]
        return sum(y.mean((2, 3)) for y in sizes)

    return compute


CASES = {
    "a subclass of batch norm that activates": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), NormAct(4)),
    "such a subclass behind an activation": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), NormAct(4)),
    "three dilations": lambda: Called(convolved(*({"padding": d, "dilation": d} for d in (1, 2, 3)))),
    "two strides": lambda: Called(convolved({"stride": 1}, {"stride": 2})),
    "two paddings": lambda: Called(convolved({"padding": 0}, {"padding": 2})),
    "a weight of its own": lambda: Called(norm_of(weight=lambda self: self.gain)),
    "a bias of its own": lambda: Called(norm_of(bias=lambda self: self.shift)),
    "an epsilon of its own": lambda: Called(norm_of(eps=0.1)),
    "a momentum of its own": lambda: Called(norm_of(momentum=0.5)),
    "always by running statistics": lambda: Called(norm_of(training=False)),
    "always by the batch": lambda: Called(norm_of(training=True)),
    "without eps": WithoutEpsilon,
}

X = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES, ids=str)
def made(request):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return CASES[request.param]()

    return make


def step(module: nn.Module, training: bool) -> dict[str, Tensor]:
    """The output, the gradient of every parameter, and the buffers that are left."""
    module.train(training).zero_grad()
    output = module(X)
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in module.named_buffers() if "running" in name or "tracked" in name}
    return {"output": output.detach(), **gradients, **buffers}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_with_quantizers_off_a_step_is_that_of_the_float_model(made, training):
    wanted = step(made(), training)
    model = prepare_qat(made(), QATConfig(), X[:3])
    with fake_quant_disabled(model):
        got = step(model, training)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_convolution_is_quantized_and_the_onnx_file_computes_what_the_float_model_does(
    made, request, tmp_path: Path
):
    float_model = made().eval()
    with torch.no_grad():
        wanted = float_model(X)
    model = prepare_qat(made(), QATConfig(), X[:3])
    assert len(qat_layers(model)) >= 1
    calibrate(model, [X])
    converted = convert(copy.deepcopy(model)).eval()
    with torch.no_grad():
        assert (converted(X) - wanted).norm() / wanted.norm() < 0.05
    if "always by the batch" in request.node.name:
        with pytest.raises(ExportError, match="Called normalises by the statistics of each batch in evaluation, too"):
            export_onnx(converted, tmp_path / "model.onnx", X)
        assert not list(tmp_path.iterdir())
        return
    report = export_onnx(converted, tmp_path / "model.onnx", X)
    assert report.max_output_lsb is None or report.max_output_lsb <= 1
    assert report.plain.max_abs_diff < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_is_not_in_float32_is_refused_with_the_way_out_and_left_as_it_is(dtype):
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    keys = list(model.state_dict())
    with pytest.raises(CaptureError, match=r"0\.weight of Sequential is torch\.\w+, .* call model\.float\(\)"):
        prepare_qat(model, QATConfig(), torch.randn(2, 8, dtype=dtype))
    assert list(model.state_dict()) == keys and type(model) is nn.Sequential


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)))


def test_torch_cond_goes_on_in_python_and_the_layers_around_it_are_quantized():
    torch.manual_seed(0)
    model = Conditional()
    float_model = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), torch.randn(2, 8))
    assert set(qat_layers(model)) == {"linear"}
    with fake_quant_disabled(model), torch.no_grad():
        for x in (torch.ones(2, 8), -torch.ones(2, 8)):
            torch.testing.assert_close(model.eval()(x), float_model.eval()(x))


def test_torch_vmap_is_refused_with_its_name_and_what_to_do():
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.linear)(x)

    with pytest.raises(CaptureError, match=r"cannot be captured: .* torch\.vmap .*exclude="):
        prepare_qat(Mapped(), QATConfig(), torch.randn(4, 8))


@pytest.mark.parametrize(
    ("module", "operation"), [(nn.LSTM, "aten.lstm.input"), (nn.GRU, "aten.gru.input")], ids=["LSTM", "GRU"]
)
def test_a_recurrent_layer_stays_float_and_is_named(module, operation):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = module(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x)[0])

    model = prepare_qat(Recurrent(), QATConfig(), torch.randn(2, 5, 8))
    reason = "rounding its state would add up over the steps"
    assert model.float_operations == [("recurrent", operation, reason)]


class Bilinear(nn.Module):
    """Between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.product, self.last = nn.Linear(4, 4), nn.Bilinear(4, 4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.first(x), x))


def test_a_bilinear_layer_stays_float_and_is_named():
    model = prepare_qat(Bilinear(), QATConfig(), torch.randn(3, 4))
    assert model.float_operations == [("product", "aten.bilinear.default", "a product of three factors")]


def test_an_embedding_bag_stays_float_and_is_named():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.linear = nn.EmbeddingBag(10, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.linear(self.bag(ids) + x)

    model = prepare_qat(Bag(), QATConfig(), (torch.randint(0, 10, (2, 3)), torch.randn(2, 8)))
    ((path, operation, reason),) = model.float_operations
    assert (path, operation.split(".")[1], reason) == ("bag", "embedding_bag", "a table look-up")


def test_a_model_of_token_ids_alone_can_be_calibrated_and_exported(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    float_model = copy.deepcopy(model).eval()
    ids = torch.randint(0, 10, (4, 3))
    prepare_qat(model, QATConfig(), ids)
    converted = convert(calibrate(model, [ids]))
    with torch.no_grad():
        wanted = float_model(ids)
        assert (converted(ids) - wanted).norm() / wanted.norm() < 0.02
    assert export_onnx(converted, tmp_path / "model.onnx", ids).max_output_lsb <= 1


def test_integers_for_a_model_of_real_numbers_are_still_refused():
    model = prepare_qat(nn.Sequential(nn.Linear(8, 4)), QATConfig(), torch.randn(2, 8))
    with pytest.raises(CalibrationError, match="int64 only"):
        calibrate(model, [torch.randint(0, 10, (4, 8))])
