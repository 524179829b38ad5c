"""Evaluation under mixed precision, against ONNX Runtime, which knows none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import calibrate, convert, export_onnx, prepare_qat
from hf_qat.quantization.float32_arithmetic import float32_arithmetic
from hf_qat.quantization.quantizer import fake_quantizers
from tests.exported import run
from tests.models import HUGGING_FACE


PRECISIONS = [
    torch.backends.cudnn.conv,
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.matmul,
]


def calibrated(net: str) -> tuple[nn.Module, Tensor]:
    case = HUGGING_FACE[net]
    torch.manual_seed(0)
    pixels = case.pixels(16)
    model = prepare_qat(case.make(), example_inputs={"pixel_values": pixels[:2]})
    return calibrate(model, [{"pixel_values": pixels}]).eval(), pixels


@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        ("resnet", torch.bfloat16),
        pytest.param("resnet", torch.float16, marks=pytest.mark.slow),
        pytest.param("vit", torch.bfloat16, marks=pytest.mark.slow),
        ("vit", torch.float16),
    ],
    ids=str,
)
def test_in_half_precision_it_is_what_onnx_runtime_computes(net: str, dtype: torch.dtype, tmp_path: Path):
    model, pixels = calibrated(net)
    converted = convert(copy.deepcopy(model))
    export_onnx(converted, tmp_path / "model.onnx", {"pixel_values": pixels[:4]}, dynamic_batch=True)
    expected = torch.from_numpy(run(tmp_path / "model.onnx", pixels.numpy()))
    for evaluated in (model, converted):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            logits = evaluated(pixel_values=pixels).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_inputs_in_half_precision_are_widened(tmp_path: Path):
    model, pixels = calibrated("resnet")
    with torch.no_grad():
        expected = model(pixel_values=pixels.half().float()).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=pixels.half()).logits
    np.testing.assert_array_equal(logits.numpy(), expected.numpy())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_in_half_precision_it_is_the_same():
    model, pixels = calibrated("resnet")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(pixel_values=pixels).logits
        logits = torch.compile(model, backend="aot_eager", fullgraph=True)(pixel_values=pixels).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def settings_inside(model: nn.Module, pixels: Tensor) -> list[str]:
    """What stands in for float32 while a quantizer computes."""
    found: list[str] = []
    quantizer = next(q for path, q in fake_quantizers(model).items() if path.endswith("activation_quantizer"))
    handle = quantizer.register_forward_pre_hook(lambda *_: found.extend(p.fp32_precision for p in PRECISIONS))
    model(pixel_values=pixels)
    handle.remove()
    return found


@pytest.fixture
def shortcuts() -> Iterator[list[str]]:
    """Of the user, who wants to be fast."""
    before, wanted = [p.fp32_precision for p in PRECISIONS], ["tf32", "tf32", "bf16", "none"]
    for precision, value in zip(PRECISIONS, wanted, strict=True):
        precision.fp32_precision = value
    yield wanted
    for precision, value in zip(PRECISIONS, before, strict=True):
        precision.fp32_precision = value


def test_tf32_is_off_in_evaluation_and_is_what_it_was_afterwards(shortcuts: list[str]):
    model, pixels = calibrated("resnet")
    before = [p.fp32_precision for p in PRECISIONS]
    assert before[:3] == shortcuts[:3]
    with torch.no_grad():
        inside = settings_inside(model, pixels)
    assert inside[:2] == before[:2]  # a GPU's, which has no part in it
    assert set(inside[2:]) <= {"ieee", "none"}
    assert [p.fp32_precision for p in PRECISIONS] == before
    assert settings_inside(model.train(), pixels) == before


def test_a_thread_that_is_done_leaves_float32_to_the_one_that_is_not(shortcuts: list[str]):
    first, second = (float32_arithmetic([torch.zeros(1)]) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.conv.fp32_precision == shortcuts[2] == "bf16"


def test_while_a_model_computes_another_can_be_captured_in_another_thread():
    """PyTorch's exporter asks for all settings of the process."""
    model, pixels = calibrated("resnet")
    asked: list[bool] = []
    quantizer = next(q for path, q in fake_quantizers(model).items() if path.endswith("activation_quantizer"))
    quantizer.register_forward_pre_hook(lambda *_: asked.append(torch.backends.cudnn.allow_tf32))
    with torch.no_grad():
        model(pixel_values=pixels)
    assert asked


def test_it_is_what_it_was_after_an_error_too():
    model, _ = calibrated("resnet")
    before = [p.fp32_precision for p in PRECISIONS]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            model(pixel_values=torch.randn(1, 5, 32, 32))
        assert torch.is_autocast_enabled("cpu")
    assert [p.fp32_precision for p in PRECISIONS] == before


def test_a_frozen_part_in_training_stays_in_half_precision():
    model, pixels = calibrated("resnet")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pixel_values=pixels).logits.dtype == torch.bfloat16


def test_tensors_without_values_pass():
    model, pixels = calibrated("resnet")
    with torch.no_grad():
        assert model.to("meta")(pixel_values=pixels.to("meta")).logits.shape == (16, model.config.num_labels)
