from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_qat import QATConfig, QATFxModule, QATSchedule, calibrate, convert, export_onnx, prepare_qat
from tests.models import made_once, mobilenet_v2, resnet, vit


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Dropout(0.1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(288, 4),
    )


def one_layer() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save({"model": model, "epoch": 3}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["model"]


MODELS = {"plain": (plain, 8), "one layer": (one_layer, 8), "MobileNetV2": (mobilenet_v2, 32), "ViT": (vit, 32)}

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.save": saved_and_loaded,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


@made_once
def prepared(kind: str, **recipe: object) -> tuple[nn.Module, torch.Tensor]:
    make, size = MODELS[kind]
    x = torch.randn(2, 3, size, size)
    return calibrate(prepare_qat(make(), QATConfig(**recipe), x), [x]), x


def tensors(result: object) -> torch.Tensor:
    return getattr(result, "logits", result)


def trained(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Its state after a step, with the dropout of one seed."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    tensors(model(x)).square().mean().backward()
    optimizer.step()
    model.eval()
    return model.state_dict()


@pytest.mark.parametrize(
    "kind", ["plain", "one layer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("MobileNetV2", "ViT"))]
)
def test_a_prepared_model_and_what_is_loaded_of_it_compute_train_and_convert_alike(kind, tmp_path):
    model, x = prepared(kind)
    model.eval()
    expected = tensors(model(x))
    copies = {name: way(model) for name, way in WAYS.items()}
    assert {type(loaded) for loaded in copies.values()} == {type(model)}
    step = trained(model, x)
    converted = tensors(convert(model)(x))
    for name, loaded in copies.items():
        assert torch.equal(tensors(loaded(x)), expected), name
        for key, value in trained(loaded, x).items():
            assert torch.equal(value, step[key]), (name, key)
        assert torch.equal(tensors(convert(loaded)(x)), converted), name
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    export_onnx(model, first, x, verify=False)
    export_onnx(copies["torch.save"], second, x, verify=False)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_that_is_loaded_computes_the_same_bits(way):
    model, x = prepared("plain")
    loaded = WAYS[way](convert(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_the_inputs_of_a_loaded_model_have_the_shapes_and_dtypes_that_it_was_captured_with(tmp_path):
    model, x = prepared("plain")
    loaded = saved_and_loaded(convert(model))
    report = export_onnx(loaded, tmp_path / "model.onnx")  # makes its own inputs
    assert report.samples == 2


def test_a_loaded_model_with_excluded_and_synchronized_batch_norms_freezes_them():
    model, x = prepared("plain", exclude="4", sync_batch_norm=True)
    loaded = saved_and_loaded(model)
    assert [type(module).__mro__ for module in loaded.modules()] == [
        type(module).__mro__ for module in model.modules()
    ]
    assert torch.equal(loaded.train()(x).isfinite().all(), torch.tensor(True))


SPAWNED = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(saved["model"](saved["x"]).logits, saved["expected"])
"""


@pytest.mark.slow
def test_a_new_process_that_knows_nothing_of_the_package_computes_the_same_bits(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    model = calibrate(prepare_qat(resnet(), None, x), [x]).eval()
    with torch.no_grad():
        torch.save({"model": model, "x": x, "expected": model(x).logits}, tmp_path / "all.pt")
    subprocess.run([sys.executable, "-c", SPAWNED, str(tmp_path / "all.pt")], check=True, timeout=200)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_a_schedule_looks_at_can_be_copied_at_any_step_and_the_copy_keeps_to_itself(way):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = calibrate(prepare_qat(plain(), example_inputs=x), [x])
    schedule = QATSchedule(model, 4)
    for _ in range(4):
        model.train()(x)
        again = WAYS[way](model)
        assert torch.equal(again.eval()(x), model.eval()(x))
        again.train()(torch.full_like(x, 1e3))
        noted = schedule._call._latest
        assert not noted or torch.equal(noted[0][0][0], x)
        schedule.step()


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_is_copied_with_its_schedule(way):
    x = torch.randn(2, 3, 8, 8)
    wrapper = QATFxModule(plain(), total_epochs=3, example_inputs=x).train()
    wrapper(x)
    again = WAYS[way](wrapper).train()
    wrapper.train()
    assert again.schedule.state_dict() == wrapper.schedule.state_dict()
    assert torch.equal(again.eval()(x), wrapper.eval()(x))
