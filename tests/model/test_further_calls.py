from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoModelForImageClassification

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.capture.capture import MAX_GRAPHS
from tests.models import convnext, made_once, resnet, segformer, vit


@made_once
def prepared(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A calibrated model, the float model that it was, and images."""
    model, x = make().eval(), torch.randn(4, 3, 32, 32)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    prepare_qat(model, QATConfig(), x[:2])
    return freeze_batch_norm(calibrate(model, [x], bias_correction=False)), twin, x


def tensors(output: object) -> list[Tensor]:
    return pytree.tree_leaves(output if isinstance(output, tuple) else dict(output))


def put_into_mode(model: nn.Module, training: bool) -> None:
    """With the statistics of batch norm that it has."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def require_alike(model: nn.Module, twin: nn.Module, x: Tensor, options: dict[str, object], training: bool) -> None:
    """With quantizers off the float model's outputs, of the same class and number; with them on, near to them."""
    outputs = []
    put_into_mode(twin, training)
    put_into_mode(model, training)
    for run in (twin, model, model):
        torch.manual_seed(1)
        with fake_quant_disabled(model) if len(outputs) == 1 else torch.enable_grad():
            outputs.append(run(x, **options))
    expected, exact, rounded = (tensors(output) for output in outputs)
    assert type(outputs[1]) is type(outputs[0]) and len(exact) == len(expected)
    for found, near, value in zip(exact, rounded, expected, strict=True):
        torch.testing.assert_close(found, value, atol=2e-4, rtol=2e-4)
        assert (near - value).norm() < 0.35 * value.norm()


SLOW = pytest.mark.slow
OPTIONS = [
    pytest.param(resnet, {"output_hidden_states": True}, id="ResNet, hidden states"),
    pytest.param(resnet, {"return_dict": False}, id="ResNet, tuple", marks=SLOW),
    pytest.param(vit, {"output_hidden_states": True}, id="ViT, hidden states", marks=SLOW),
    pytest.param(vit, {"output_attentions": True}, id="ViT, attentions", marks=SLOW),
    pytest.param(vit, {"return_dict": False}, id="ViT, tuple", marks=SLOW),
    pytest.param(segformer, {"output_hidden_states": True, "return_dict": False}, id="SegFormer, tuple", marks=SLOW),
    pytest.param(segformer, {"output_attentions": True}, id="SegFormer, attentions", marks=SLOW),
    pytest.param(convnext, {"output_hidden_states": True}, id="ConvNeXt, hidden states", marks=SLOW),
    pytest.param(convnext, {"return_dict": False}, id="ConvNeXt, tuple", marks=SLOW),
]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("make, options", OPTIONS)
def test_options_that_come_after_preparing_give_what_the_float_model_gives(make, options, training):
    model, twin, x = prepared(make)
    names = [name for name, _ in model.named_parameters()]
    require_alike(model, twin, x, options, training)
    assert [name for name, _ in model.named_parameters()] == names


class Mirrored(nn.Module):
    """Its options are on by default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, flip: bool = True, *, scale: float = 2.0) -> Tensor:
        return self.linear(x.flip(-1) if flip else x) * scale


class CallsMirrored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mirrored()

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.part(x, **options)


@pytest.mark.parametrize("model", [Mirrored(), CallsMirrored()], ids=["named", "handed on"])
@pytest.mark.parametrize("options", [{"flip": False}, {"scale": 0}, {"flip": True, "scale": 2.0}], ids=str)
def test_an_option_that_is_on_by_default_can_be_switched_off(model, options):
    x = torch.randn(3, 4)
    prepared = prepare_qat(copy.deepcopy(model).eval(), QATConfig(), x)
    with fake_quant_disabled(prepared):
        assert torch.equal(prepared(x, **options), model(x, **options))
        assert torch.equal(prepared(x), model(x))


def test_a_gradient_of_a_hidden_state_is_that_of_the_float_model():
    model, twin, x = prepared(resnet)
    for run in (model, twin):
        put_into_mode(run, True)
        with fake_quant_disabled(model):
            run(x, output_hidden_states=True).hidden_states[1].square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_images_of_another_size_with_interpolated_positions_are_computed_as_by_the_float_model():
    model, twin, _ = prepared(vit)
    for size in (48, 64):
        x = torch.randn(3, 3, size, size)
        require_alike(model, twin, x, {"interpolate_pos_encoding": True}, False)


def test_such_a_call_is_captured_once_and_draws_no_random_number():
    model, _, x = prepared(resnet)
    state = torch.get_rng_state()
    for _ in range(2):
        model(x, output_hidden_states=True)
    model(x[:1], output_hidden_states=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(model.resnet.graphs) == 3


@pytest.mark.slow
def test_copies_loaded_models_and_converted_ones_take_it_too(tmp_path):
    model, twin, x = prepared(resnet)
    require_alike(copy.deepcopy(model), twin, x, {"output_hidden_states": True}, False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    require_alike(loaded, twin, x, {"output_hidden_states": True}, False)
    expected = loaded(x, output_hidden_states=True).hidden_states
    for found, value in zip(convert(loaded)(x, output_hidden_states=True).hidden_states, expected, strict=True):
        assert (found - value).abs().max() <= 0.02 * value.abs().max()


class Repeats(nn.Module):
    """Is told how often it shall add itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 1, by_value: bool = False) -> Tensor:
        if by_value and x.sum() > 0:
            return x
        for _ in range(times):
            x = self.layer(x)
        return self.last(x)


def test_what_cannot_be_captured_is_refused_in_one_line_that_says_what_to_do():
    model = prepare_qat(Repeats(), QATConfig(), torch.randn(2, 4))
    with pytest.raises(CaptureError, match=r"called with by_value other than .* example_inputs= .*; or do not pass"):
        model(torch.randn(2, 4), by_value=True)


def test_a_part_has_so_many_graphs_and_no_more():
    model = prepare_qat(Repeats().eval(), QATConfig(), torch.randn(2, 4))
    for times in range(2, MAX_GRAPHS):
        model(torch.randn(3, 4), times)
    with pytest.raises(CaptureError, match=f"in {MAX_GRAPHS} ways already"):
        model(torch.randn(3, 4), MAX_GRAPHS)


class TellsSizes(nn.Module):
    """Siglip 2: a model is told how many patches an image has, and does not take it that there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, sizes: Tensor, doubled: bool = False) -> Tensor:
        if not torch.compiler.is_compiling() and int(sizes.min()) <= 0:
            raise ValueError("an image has no patches")
        y = self.layer(x) / sizes[:, :1]
        return 2 * y if doubled else y


@torch.no_grad()
def test_an_option_of_a_model_that_asks_for_its_integers_is_captured_with_those_of_the_call():
    torch.manual_seed(0)
    model, x, sizes = TellsSizes(), torch.randn(3, 4), torch.tensor([[4, 4], [2, 8], [3, 5]])
    twin = copy.deepcopy(model)
    prepare_qat(model, QATConfig(), {"x": x[:2], "sizes": sizes[:2]})
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x, sizes, doubled=True), twin(x, sizes, doubled=True))
        torch.testing.assert_close(model(x[:1], sizes[2:], doubled=True), twin(x[:1], sizes[2:], doubled=True))
