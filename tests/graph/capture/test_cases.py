"""What was once silently another model: each case against the float model, or a figure worked out by hand."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_qat import QATConfig, calibrate, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.captured import captured_modules
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import detr, hand_written, resnet


class Auxiliary(nn.Module):
    """A second head, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        return (self.out(y), self.aux(y)) if self.training else self.out(y)


def test_an_auxiliary_head_of_training_is_there_in_training():
    float_model, x = Auxiliary(), torch.randn(2, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    with fake_quant_disabled(model):
        found = model.train()(x)
        assert [y.shape for y in found] == [(2, 4, 6, 6)] * 2
        for ours, theirs in zip(found, float_model.train()(x), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(model.eval()(x), float_model.eval()(x))


class Probe(nn.Module):
    """A linear probe: the backbone has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features.mean((2, 3)))


def test_a_backbone_under_no_grad_is_not_trained():
    x = torch.randn(4, 3, 8, 8)
    model = calibrate(prepare_qat(Probe(), example_inputs=x), [x])
    model.train()(x).sum().backward()
    assert model.backbone.weight.grad is None
    assert model.head.weight.grad.abs().max() > 0


class FourDropouts(nn.Module):
    """Attention whose dropout is an argument, or a call in training only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("module"):
            return self.attention(x, x, x, need_weights=self.kind.endswith("weights"))[0]
        if self.kind == "product":
            q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
            return self.out(mixed.transpose(1, 2).reshape(x.shape[0], 6, 16))
        y = self.out(x)
        return functional.dropout(y, 0.5) if self.training else y


@pytest.mark.parametrize("kind", ["module", "module with weights", "product", "branch"])
def test_dropout_that_is_no_module_acts_in_training_as_in_float(kind):
    float_model, x = FourDropouts(kind), torch.randn(4, 6, 16)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x).train()
    with fake_quant_disabled(model):
        torch.manual_seed(3)
        found = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(found, float_model.train()(x))
        assert not torch.equal(model(x), found)
        torch.testing.assert_close(model.eval()(x), float_model.eval()(x))


class Centre(nn.Module):
    """Subtracts a running mean that forward keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).mean((2, 3))
        with torch.no_grad():
            self.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.centre


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_buffer_that_forward_writes_moves_with_every_call(training):
    float_model, x = Centre(), torch.randn(4, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    assert model.centre.abs().max() == 0.0  # neither capture nor its proof leaves a trace
    with fake_quant_disabled(model):
        for _ in range(2):
            torch.testing.assert_close(model.train(training)(x), float_model.train(training)(x))
            torch.testing.assert_close(model.centre, float_model.centre)
    assert model.centre.abs().max() > 0.0


def test_hooks_on_inner_modules_fire_after_prepare():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    inner = model.resnet.encoder.stages[0]
    seen: list[str] = []
    inner.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    inner.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    prepare_qat(model, example_inputs={"pixel_values": x})
    assert qat_layers(inner)
    seen.clear()
    model.train()(x).logits.sum().backward()
    assert seen == ["forward", "backward"]


#: One of each kind of module: a part, a block, a layer, its batch norm, and an activation.
HOOKED = (
    "resnet.embedder",
    "resnet.encoder.stages.1",
    "resnet.encoder.stages.0.layers.0.layer.0.convolution",
    "resnet.encoder.stages.0.layers.0.layer.0.normalization",
    "resnet.encoder.stages.0.layers.0.activation",
    "classifier.1",
)


def note_calls(model: nn.Module) -> dict[str, object]:
    """What hooks of all four kinds are given, by kind and path, of the latest call."""
    seen: dict[str, object] = {}
    for path in HOOKED:
        module = model.get_submodule(path)

        def note(*given: object, key: str) -> None:
            seen[key] = given[1:]

        module.register_forward_pre_hook(partial(note, key=f"before {path}"), with_kwargs=True)
        module.register_forward_hook(partial(note, key=f"after {path}"), with_kwargs=True)
        module.register_full_backward_pre_hook(partial(note, key=f"gradients before {path}"))
        module.register_full_backward_hook(partial(note, key=f"gradients after {path}"))
    return seen


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # images require no gradient
def test_hooks_from_before_get_what_those_of_the_float_model_get_and_every_layer_is_quantized(training):
    model, x, labels = resnet(), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    twin = copy.deepcopy(model)
    ours, theirs = note_calls(model), note_calls(twin)
    prepare_qat(model, example_inputs={"pixel_values": x})
    layers = {path for path, module in twin.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert qat_layers(model).keys() >= layers  # and a batch norm on its own
    ours.clear()
    with fake_quant_disabled(model):
        model.train(training)(x, labels=labels).loss.backward()
    twin.train(training)(x, labels=labels).loss.backward()
    assert ours.keys() == theirs.keys() and len(ours) == 4 * len(HOOKED)
    for key, given in theirs.items():
        torch.testing.assert_close(ours[key], given, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_hook_on_the_captured_part_itself_acts_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].register_forward_hook(lambda module, inputs, output: output * 3.0)
    float_model, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    prepare_qat(model, example_inputs=x)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), float_model(x))


def doubled_by(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `forward` gives, twice as large."""
    return pytree.tree_map_only(Tensor, lambda tensor: 2 * tensor, forward(module, *args, **kwargs))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (resnet, "classifier.1"),
        (resnet, "resnet.encoder.stages.0.layers.0.layer.0.convolution"),
        (resnet, "resnet.encoder.stages.0.layers.0.layer.0.normalization"),
        (resnet, "resnet"),
        (resnet, ""),
        (hand_written, "body"),
        (hand_written, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_forward_that_one_module_alone_was_given_is_computed_once(make, path):
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    module = model.get_submodule(path)
    forward = type(module).forward
    module.forward = MethodType(partial(doubled_by, forward), module)
    with torch.no_grad():
        expected = getattr(model(x), "logits", model(x))
        calibrate(prepare_qat(model, QATConfig(bias_correction=False), x), [x])
        converted = convert(copy.deepcopy(model))(x)
        with fake_quant_disabled(model):
            found = model.eval()(x)
    torch.testing.assert_close(getattr(found, "logits", found), expected, atol=1e-4, rtol=1e-4)
    error = (getattr(converted, "logits", converted) - expected).abs().max()
    assert error < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "hook", [lambda module, inputs, output: None, neftune_post_forward_hook], ids=["of a user", "of transformers"]
)
def test_a_hook_that_is_added_later_warns_once(caplog, hook):
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    prepare_qat(model, example_inputs={"pixel_values": x}).eval()
    inner = model.resnet.encoder.stages[0]
    inner.register_forward_hook(hook)
    with caplog.at_level(logging.WARNING, "hf_qat"):
        model(x)
        model(x)
    messages = [record.getMessage() for record in caplog.records if "hook" in record.getMessage()]
    assert len(messages) == 1
    assert type(inner).__name__.removeprefix("QAT") in messages[0]


def test_a_hook_that_a_layer_gets_later_is_called_with_batch_norm_done_and_the_warning_says_so(caplog):
    model, x = resnet().eval(), torch.randn(2, 3, 32, 32)
    twin, block = copy.deepcopy(model), "resnet.encoder.stages.0.layers.0.layer.0"
    prepare_qat(model, example_inputs={"pixel_values": x})
    ours, theirs = [], []
    layer, norm = model.get_submodule(f"{block}.convolution"), twin.get_submodule(f"{block}.normalization")
    layer.register_forward_hook(lambda module, inputs, output: ours.append(output))
    norm.register_forward_hook(lambda module, inputs, output: theirs.append(output))
    with caplog.at_level(logging.WARNING, "hf_qat"), fake_quant_disabled(model):
        model(x)
    twin(x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert "the batch norm after it" in caplog.text and "Add hooks before prepare_qat" in caplog.text


def test_a_hook_on_a_quantizer_is_called_without_a_warning(caplog):
    model, x, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4), []
    prepared = calibrate(prepare_qat(model, example_inputs=x), [x]).eval()
    quantizer = next(q for path, q in fake_quantizers(prepared).items() if "weight" not in path)
    quantizer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with caplog.at_level(logging.WARNING, "hf_qat"):
        prepared(x)
    assert len(seen) == 1 and "hook" not in caplog.text


class Boxes(nn.Module):
    """How many there are depends on the data."""

    def forward(self, y: Tensor) -> list[Tensor]:
        return [rows[rows[:, 0] > 0] for rows in y]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.post = nn.Conv2d(3, 6, 3), Boxes()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.post(self.net(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("exclude", ["post", ()])
def test_postprocessing_that_depends_on_data_stays_float_and_the_net_is_quantized(exclude):
    float_model, x = Detector(), torch.randn(2, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(exclude=exclude), x)
    assert list(captured_modules(model)) == ["net"]
    with fake_quant_disabled(model):
        for ours, theirs in zip(model(x), float_model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


class Precise(nn.Module):
    """Float32 inside mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def test_a_region_without_autocast_computes_in_float32_under_autocast():
    float_model, x = Precise(), torch.randn(2, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    assert qat_layers(model)
    with torch.autocast("cpu", torch.bfloat16), fake_quant_disabled(model):
        found = model(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, float_model(x))
    calibrate(model, [x])
    expected = model.eval()(x)
    torch.testing.assert_close(convert(model)(x), expected)


class GradientsInside(nn.Module):
    """Input gradients, as an energy model takes them, need gradients even where the caller switched them off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
            with torch.enable_grad():
                y = self.second(y)
        return y


def test_gradients_flow_exactly_where_forward_enables_them():
    float_model, x = GradientsInside(), torch.randn(2, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x).train()
    with fake_quant_disabled(model):
        model(x).square().sum().backward()
    float_model(x).square().sum().backward()
    assert model.first.weight.grad is None
    torch.testing.assert_close(model.second.weight.grad, float_model.second.weight.grad)


def test_a_model_that_accelerate_has_wrapped_is_prepared():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # that of a trainer's test before this one
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    float_model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
    wrapped = accelerator.prepare(copy.deepcopy(float_model))
    expected = wrapped(x)
    model = prepare_qat(wrapped, example_inputs=x)
    assert len(qat_layers(model)) == 2
    with fake_quant_disabled(model):
        assert torch.equal(model(x), expected)
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclasses.dataclass
class Prediction:
    """A class of which pytree knows nothing."""

    logits: Tensor


class KeepsDict(dict):
    """Likewise."""


class Wrapped(nn.Module):
    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.wrap, self.body, self.head = wrap, nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> object:
        return self.wrap(logits=self.head(self.body(x).relu().mean((2, 3))))


@pytest.mark.parametrize("wrap", [Prediction, argparse.Namespace, KeepsDict])
def test_an_output_of_an_unknown_class_comes_back_as_it_is_with_real_tensors(wrap):
    float_model, x = Wrapped(wrap), torch.randn(2, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    with fake_quant_disabled(model):
        found, expected = model(x), float_model(x)
    assert type(found) is wrap
    read = (lambda y: y["logits"]) if wrap is KeepsDict else (lambda y: y.logits)
    assert type(read(found)) is Tensor
    torch.testing.assert_close(read(found), read(expected))
    assert len(qat_layers(model)) == 2


class Writes(nn.Module):
    """Writes next to views, in the ways in which people write them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.c, self.d, self.l = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(getattr(self, self.kind)(x).flatten(1))

    def view_before(self, x: Tensor) -> Tensor:
        y = self.c(x)
        view = y.flatten(1)
        y += 1
        return view

    def view_before_relu(self, x: Tensor) -> Tensor:
        y = self.c(x)
        view = y.view(y.shape[0], -1)
        y.relu_()
        return view

    def slice_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y[:, 1:3] *= 2
        return y

    def transpose_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.transpose(1, 2)[:, :, 0] += 1.0
        return y

    def mask_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y[y < 0] = 0.1
        return y

    def step_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y[:, :, ::2] = 0
        return y

    def input_copy_write(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0
        return self.c(x)

    def output_buffer(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 4, 8, 8, device=x.device)
        out[:, :2] = self.c(x)[:, :2]
        out[:, 2:] = self.d(self.c(x))[:, 2:]
        return out

    def copy_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.copy_(torch.relu(y))
        return y

    def unbind_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.unbind(1)[0].add_(1)
        return y

    def chunk_write(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.chunk(2, 1)[1].mul_(3)
        return y

    def input_write(self, x: Tensor) -> Tensor:
        x.add_(0.5)
        return self.c(x)


TRAINABLE = [
    "view_before",
    "view_before_relu",
    "slice_write",
    "transpose_write",
    "mask_write",
    "step_write",
    "input_copy_write",
    "output_buffer",
    "copy_write",
    "input_write",
]


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_write_next_to_a_view_is_seen_where_float_sees_it(kind):
    float_model, x = Writes(kind), torch.randn(4, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x.clone())
    with fake_quant_disabled(model):
        for training in (False, True):
            ours, theirs = x.clone(), x.clone()
            torch.testing.assert_close(model.train(training)(ours), float_model.train(training)(theirs))
            assert torch.equal(ours, theirs)
        model(x.clone()).square().sum().backward()
    float_model(x.clone()).square().sum().backward()
    for name in ("c.weight", "l.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, float_model.get_parameter(name).grad)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unbind_write", "chunk_write"])
def test_a_write_that_autograd_forbids_is_seen_where_float_sees_it(kind):
    float_model, x = Writes(kind).eval(), torch.randn(4, 3, 8, 8)
    try:
        model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    except CaptureError:
        pytest.skip("refused: its gradients cannot be proven")
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), float_model(x))


@pytest.mark.slow
def test_a_second_input_that_a_processor_gives_is_exported_with_the_batch(tmp_path):
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}
    model = detr()
    calibrate(prepare_qat(model, example_inputs=batch), [batch])
    report = export_onnx(convert(model), tmp_path / "detr.onnx", batch)
    assert report.path.exists()
    report = export_onnx(model, tmp_path / "without.onnx")  # the second input is among the random ones
    assert [value.name for value in onnx.load(report.path).graph.input] == ["pixel_values", "pixel_mask"]
    assert len(pytree.tree_leaves(model(**batch).logits)) == 1


class FrozenPart(nn.Module):
    """A part with dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_part_that_is_put_into_evaluation_alone_is_named_once(caplog):
    model, x = FrozenPart(), torch.randn(8, 4)
    calibrate(prepare_qat(model, QATConfig(), x), [x])
    model.train().body[1].eval()
    model(x)
    assert "and the graph computes it as in" not in caplog.text  # a batch norm follows its own mode
    model.body.eval()
    model(x), model(x)
    assert caplog.text.count("body of FrozenPart is in evaluation, and the graph computes it as in training") == 1
