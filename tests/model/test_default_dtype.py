"""The type that a program has set for new tensors changes nothing: scales and codes are found and kept in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.model import reconstruction
from hf_qat.quantization.kernels import cpu
from tests.models import hand_written, spread


TYPES = (torch.float64, torch.bfloat16)

OBSERVED = {"learned": False}
CONFIGS = {
    "learned": QATConfig("int8"),
    "four bits": QATConfig("w4a4"),
    "observed": QATConfig("int8", weights=OBSERVED, activations={**OBSERVED, "observer": "moving_average"}),
    "powers of two": QATConfig("TDA4VM"),
    "codes kept": QATConfig("int8", save_memory=True),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what is made without a type has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained(model: nn.Module, config: QATConfig, images: Tensor, effort: str = "fast") -> dict[str, Tensor]:
    """All tensors of the model after calibration and a step, its gradients, and what it answers, also in integers."""
    torch.manual_seed(0)  # dropout
    prepare_qat(model, config, images)
    calibrate(model, [images], effort=effort)
    seen = {f"calibrated {name}": value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    answer(model, images).square().mean().backward()
    seen |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    seen |= {f"trained {name}": value.clone() for name, value in model.state_dict().items()}
    seen["answer"] = answer(model.eval(), images).detach()
    seen |= {f"converted {name}": value for name, value in convert(model).state_dict().items()}
    seen["answer in integers"] = answer(model, images)
    return seen


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits."""
    outputs = model(images)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Names, types and values, to the last bit."""
    assert found.keys() == wanted.keys()
    others = [name for name in wanted if found[name].dtype != wanted[name].dtype]
    assert others == []
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_calibration_training_and_conversion_are_those_of_a_program_that_has_set_none(config, dtype):
    images = torch.randn(4, 3, 32, 32)
    wanted = trained(hand_written(), config, images)
    model = hand_written()
    with default_dtype(dtype):
        found = trained(model, config, images)
    require_equal(found, wanted)


@pytest.mark.parametrize("loops", [True, False], ids=["Numba", "PyTorch"])
def test_the_best_calibration_is_too_with_and_without_loops(loops, monkeypatch):
    works = cpu._works()
    monkeypatch.setattr(cpu, "_works", lambda: works and loops)
    monkeypatch.setattr(reconstruction, "STEPS", 20)
    config, images = QATConfig("w4a4"), torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
    model = spread(model.append(nn.Linear(64, 3)))
    wanted = trained(copy.deepcopy(model), config, images, "best")
    with default_dtype(torch.bfloat16):
        found = trained(model, config, images, "best")
    require_equal(found, wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_model_whose_images_we_make_up_is_prepared_and_its_file_verified_and_loaded(dtype, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32)
    model = ResNetForImageClassification(config)
    images = torch.randn(4, 3, 32, 32)
    with default_dtype(dtype):
        calibrate(prepare_qat(model, QATConfig("int8")), [images])
        model.save_pretrained(tmp_path / "prepared")
        loaded = ResNetForImageClassification.from_pretrained(tmp_path / "prepared").eval()
        export_onnx(convert(model), tmp_path / "model.onnx")

    torch.testing.assert_close(loaded(images).logits, answer(model, images))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"pixel_values": images[:1].numpy()})
    np.testing.assert_allclose(found, answer(model, images[:1]), rtol=1e-4, atol=1e-4)


def test_a_model_in_float64_is_refused_with_what_to_do_whatever_the_default():
    for dtype in (torch.float32, torch.float64):
        with default_dtype(dtype), pytest.raises(CaptureError, match=r"is torch\.float64.*call model\.float\(\)"):
            prepare_qat(hand_written().double(), QATConfig("int8"), torch.randn(2, 3, 32, 32).double())
