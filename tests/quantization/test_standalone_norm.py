import copy

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.standalone_norm import ChannelAffine, QATStandaloneBatchNorm


class NormFirst(nn.Module):
    """A batch norm that nothing precedes, of 2, 3, 4 or 5 dimensions."""

    def __init__(self, norm: type[nn.Module], affine: bool = True) -> None:
        super().__init__()
        self.norm = norm(3, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


SHAPES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def module(dims: int, affine: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(dims)
    model = NormFirst(SHAPES[dims], affine)
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(model.norm.weight, -1.5, 1.5)
        nn.init.normal_(model.norm.bias)
    return model.eval(), torch.randn(4, 3, *[5] * (dims - 2))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dims", SHAPES)
def test_it_computes_the_batch_norm_and_ends_as_int8(dims, affine):
    model, x = module(dims, affine)
    keys, expected = set(model.state_dict()), model(x)
    prepare_qat(model, QATConfig(), x)
    assert isinstance(model.norm, QATStandaloneBatchNorm) and isinstance(model.norm, nn.modules.batchnorm._BatchNorm)
    assert keys <= set(model.state_dict())
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)
    calibrate(model, [x])
    quantized = model(x)
    step = expected.max() / 255
    assert (quantized - expected).abs().max() < 4 * step
    convert(model)
    assert isinstance(model.norm, QuantizedLayer) and isinstance(model.norm, ChannelAffine)
    assert not isinstance(model.norm, nn.modules.batchnorm._BatchNorm)
    assert model.norm.codes.dtype == torch.int8
    assert torch.equal(model(x), quantized)


def test_while_live_it_follows_batch_statistics_as_the_float_batch_norm_does():
    model, x = module(4)
    twin = copy.deepcopy(model).train()
    prepare_qat(model, QATConfig(), x)
    calibrate(model, [x], bias_correction=False)
    model.train()
    expected = twin(x)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.norm.running_mean, twin.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)


def test_frozen_it_keeps_its_statistics_and_trains_its_parameters():
    model, x = module(4)
    prepare_qat(model, QATConfig(), x)
    calibrate(model, [x])
    before = model.norm.running_mean.clone()
    freeze_batch_norm(model).train()
    model(x).sum().backward()
    assert torch.equal(model.norm.running_mean, before)
    assert model.norm.weight.grad.abs().sum() > 0 and model.norm.bias.grad.abs().sum() > 0


def test_an_excluded_one_stays_a_float_batch_norm():
    model, x = module(4)
    expected = model(x)
    prepare_qat(model, QATConfig(exclude=["norm"]), x)
    calibrate(model, [x])
    convert(model)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert (model(x) - expected).abs().max() < expected.max() / 100


class CalledTwice(nn.Module):
    """One batch norm behind a convolution, and again where it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.norm(self.conv(x))))


def test_a_batch_norm_that_is_called_elsewhere_too_is_not_folded():
    torch.manual_seed(0)
    model, x = CalledTwice().eval(), torch.randn(2, 3, 4, 4)
    model.norm.running_var.uniform_(0.5, 2)
    expected = model(x)
    prepare_qat(model, QATConfig(), x)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)
    calibrate(model, [x])
    quantized = model(x)
    assert torch.equal(convert(model)(x), quantized)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_on_a_transposed_map_at_a_batch_of_one_the_gradient_is_that_of_the_formula(affine):
    """PyTorch's own batch norm on a CPU permutes it there (2.13): attention over pixels, then a batch norm."""
    model, x = module(4, affine)
    norm, weight = model.norm, torch.randn(1, 3, 5, 5)
    gamma = norm.weight.detach() if affine else torch.ones(3)
    expected = weight * (gamma / (norm.running_var + norm.eps).sqrt()).view(1, 3, 1, 1)
    model = prepare_qat(nn.Sequential(copy.deepcopy(norm)).eval(), QATConfig(), x)
    tokens = torch.randn(1, 25, 3, requires_grad=True)
    with fake_quant_disabled(model):
        (model(tokens.transpose(1, 2).reshape(1, 3, 5, 5)) * weight).sum().backward()
    torch.testing.assert_close(tokens.grad.transpose(1, 2).reshape(1, 3, 5, 5), expected)
