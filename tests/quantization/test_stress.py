"""Numbers that break arithmetic: what scales and quantized values come of them, judged by numpy and by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_qat import calibrate, convert, prepare_qat
from hf_qat.config.qat_config import QATConfig
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.scales import LARGEST_SCALE, SMALLEST_SCALE
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_scale import weight_scale
from tests.models import resnet


OBSERVERS = ("minmax", "moving_average", "percentile", "mse")

#: Magnitudes from denormals to the end of float32, and those that the issue of half precision is about.
SIZES = (0.0, 1e-45, 1e-40, 1e-38, 1e-20, 1e-8, 1.0, 6e4, 7e4, 1e8, 1e20, 1e37, 3e38)


@st.composite
def hard_values(draw: st.DrawFn, rows: int) -> Tensor:
    """(rows, 16) float32: rows of zeros, constants, noise of any size, and noise with one outlier."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(rows):
        kind, size = (
            draw(st.sampled_from(["zeros", "constant", "noise", "outlier", "dead"])),
            draw(st.sampled_from(SIZES)),
        )
        noise = torch.rand(16, generator=generator) * 2 - 1
        row = {"zeros": 0 * noise, "constant": 0 * noise + 1, "dead": noise.clamp(max=0)}.get(kind, noise) * size
        if kind == "outlier":
            row[draw(st.integers(0, 15))] = draw(st.sampled_from(SIZES))
        made.append(row)
    return torch.stack(made)


@st.composite
def specs(draw: st.DrawFn, of_weights: bool) -> QuantizerSpec:
    symmetric = True if of_weights else draw(st.booleans())
    return QuantizerSpec(
        bits=draw(st.sampled_from([2, 4, 8, 16] if of_weights else [2, 4, 8])),
        signed=of_weights or draw(st.booleans()),
        symmetric=symmetric,
        axis=draw(st.sampled_from([None, 0])) if of_weights else None,
        power_of_two=draw(st.booleans()),
        learned=draw(st.booleans()),
        observer=draw(st.sampled_from([name for name in OBSERVERS if not of_weights or name != "moving_average"])),
    )


def is_usable(scale: Tensor) -> bool:
    """By numpy: positive, finite and normal."""
    values = scale.detach().numpy()
    return bool(np.isfinite(values).all() and (values >= np.finfo(np.float32).tiny).all())


@settings(max_examples=200)
@given(hard_values(3), specs(of_weights=True))
def test_every_finite_weight_has_a_usable_scale(weight: Tensor, spec: QuantizerSpec):
    scale = weight_scale(weight, spec)
    assert is_usable(scale)
    assert scale.shape == (() if spec.axis is None else (3,))
    assert SMALLEST_SCALE <= float(scale.min()) and float(scale.max()) <= LARGEST_SCALE


@settings(max_examples=200)
@given(hard_values(4), specs(of_weights=False), st.booleans())
def test_every_finite_activation_gives_a_usable_scale_and_finite_values_and_gradients(
    batch: Tensor, spec: QuantizerSpec, training: bool
):
    quantizer = FakeQuantize(spec).train(training)
    quantizer.start_observing()
    quantizer(batch)
    quantizer.finish_observing("here")
    assert is_usable(quantizer.scale)
    x = batch.clone().requires_grad_()
    rounded = quantizer(x)
    assert rounded.isfinite().all() and is_usable(quantizer.scale)
    rounded.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@settings(max_examples=100)
@given(hard_values(1), hard_values(1), specs(of_weights=False))
def test_what_was_calibrated_on_one_tensor_stays_finite_on_any_other(one: Tensor, other: Tensor, spec: QuantizerSpec):
    quantizer = FakeQuantize(spec).eval()
    quantizer.start_observing()
    quantizer(one)
    quantizer.finish_observing("here")
    assert quantizer(other).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_largest_half_precision_numbers_have_a_range(dtype: torch.dtype, observer: str):
    quantizer = FakeQuantize(QuantizerSpec(8, signed=True, symmetric=True, observer=observer))
    quantizer.start_observing()
    quantizer(torch.full((64,), torch.finfo(dtype).max, dtype=dtype))
    quantizer.finish_observing("here")
    assert is_usable(quantizer.scale)


MODELS = {
    "weights of 1e-20": lambda model: _scaled(model, 1e-20),
    "weights of 1e15": lambda model: _undone_by_batch_norm(model, 1e15),
    "weights of zero": lambda model: _scaled(model, 0.0),
    "one channel of zeros": lambda model: _channels(model, 0.0),
    "one channel of 1e-30": lambda model: _channels(model, 1e-30),
    "one channel of 1e4": lambda model: _channels(model, 1e4),
    "dead ReLUs": lambda model: _norms(model, "bias", -1e4),
    "batch norms of weight zero": lambda model: _norms(model, "weight", 0.0),
    "variances of zero": lambda model: _norms(model, "running_var", 0.0),
    "variances of 1e20": lambda model: _norms(model, "running_var", 1e20),
}


def _scaled(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.mul_(factor)


def _undone_by_batch_norm(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(factor)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.mul_(factor)
            module.running_var.mul_(factor**2)


def _channels(model: nn.Module, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight[0].mul_(factor)


def _norms(model: nn.Module, name: str, value: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            getattr(module, name).fill_(value)


#: The others take long, for what they are likely to find.
SAMPLE = ("weights of 1e-20", "dead ReLUs")


@pytest.mark.parametrize("target", ["int8", pytest.param("TDA4VM", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_model_of_hard_numbers_is_calibrated_trained_and_converted_without_a_nan(name: str, target: str):
    model, pixels = resnet().eval(), torch.randn(1, 3, 32, 32)  # a batch of one
    with torch.no_grad():
        MODELS[name](model)
    assert model(pixels).logits.isfinite().all()
    prepare_qat(model, QATConfig(target), {"pixel_values": pixels})
    calibrate(model, [pixels])
    assert all(is_usable(quantizer.scale) for quantizer in fake_quantizers(model).values())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(2):
        model(pixels, labels=torch.tensor([1])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(is_usable(quantizer.scale) for quantizer in fake_quantizers(model).values())
    expected = model.eval()(pixels).logits
    assert expected.isfinite().all()
    assert convert(copy.deepcopy(model))(pixels).logits.isfinite().all()
