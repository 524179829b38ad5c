"""What is computed again in backward of what a quantizer keeps anyway: the same tensors, and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hf_qat import QATConfig, calibrate, fake_quant_disabled, freeze_batch_norm, freeze_ranges, prepare_qat
from hf_qat.quantization.saved_codes import Kept, KeptView, keep_inputs, kept_for_backward
from tests.benchmarks.memory import peak_bytes
from tests.models import HUGGING_FACE


pytestmark = pytest.mark.usefixtures("each_form")


#: Phase → whether batch norm and whether ranges are frozen.
PHASES = {"live": (False, False), "batch norm frozen": (True, False), "all frozen": (True, True)}

OBSERVED = {"learned": False, "observer": "moving_average"}

SCHEMES = {
    "learned": {},
    "4-bit weights": {"target": "w4a8"},
    "powers of two": {"target": "TDA4VM"},
    "observed": {"weights": OBSERVED, "activations": OBSERVED},
}

#: ReLU, ReLU6, squeeze and excitation, GELU, softmax and layer norm, windows of attention.
NETS = ("resnet", "vit")
OTHER_NETS = ("mobilenet_v2", "regnet", "convnext", "swin")


@cache
def prepared(net: str, scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    case = HUGGING_FACE[net]
    model, pixels = case.make(), torch.randn_like(case.pixels(3))
    prepare_qat(model, QATConfig(**SCHEMES[scheme]), {"pixel_values": pixels[:2]})
    return calibrate(model, [{"pixel_values": pixels}]), pixels


def in_phase(net: str, scheme: str, phase: str) -> tuple[nn.Module, Tensor]:
    made, pixels = prepared(net, scheme)
    bn_frozen, ranges_frozen = PHASES[phase]
    return freeze_ranges(freeze_batch_norm(copy.deepcopy(made).train(), bn_frozen), ranges_frozen), pixels


def plain() -> saved_tensors_hooks:
    """Inside, what operations keep for backward is kept as it is."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def gradients(model: nn.Module, pixels: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    pixels = pixels.clone().requires_grad_()
    out = model(pixel_values=pixels).logits if run is None else run(pixels)
    out.float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, "pixels": pixels.grad}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


CASES = [(net, "learned", "batch norm frozen") for net in NETS]
CASES += [(net, scheme, "live") for net in ("resnet", "vit") for scheme in SCHEMES]
CASES += [("mobilenet_v2", "learned", "all frozen"), ("vit", "learned", "all frozen")]
SLOW_CASES = [pytest.param(net, "learned", "batch norm frozen", marks=pytest.mark.slow) for net in OTHER_NETS]


@pytest.mark.parametrize(("net", "scheme", "phase"), CASES + SLOW_CASES)
def test_every_gradient_is_the_same_to_the_last_bit(net: str, scheme: str, phase: str):
    model, pixels = in_phase(net, scheme, phase)
    twin = copy.deepcopy(model)
    with plain():
        expected = gradients(twin, pixels)
    assert_equal(gradients(model, pixels), expected)


@pytest.mark.parametrize("net", ["resnet", "vit", "convnext"])
def test_so_it_is_under_autocast(net: str):
    model, pixels = in_phase(net, "learned", "batch norm frozen")
    with torch.autocast("cpu", torch.bfloat16):
        with plain():
            expected = gradients(model, pixels)
        assert_equal(gradients(model, pixels), expected)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.Sigmoid, nn.LeakyReLU])
def test_whatever_activation_stands_between_two_layers(activation: type[nn.Module]):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), activation())]
    model, images = nn.Sequential(*layers), torch.randn(2, 4, 12, 12)
    calibrate(prepare_qat(model, QATConfig(), images), [images])
    freeze_batch_norm(model.train())
    with plain():
        expected = gradients(model, images, model)
    assert_equal(gradients(model, images, model), expected)


def test_a_graph_that_is_kept_can_be_gone_through_again_in_parts():
    model, pixels = in_phase("vit", "learned", "batch norm frozen")
    with plain():
        expected = gradients(model, pixels)
    loss = model(pixel_values=pixels).logits.square().mean()
    named = {name: p for name, p in model.named_parameters() if name in expected}
    last = [p for name, p in named.items() if "classifier" in name]
    torch.autograd.grad(loss, last, retain_graph=True)
    for _ in range(2):
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        assert_equal(dict(zip(named, found, strict=True)), {name: expected[name] for name in named})


def test_checkpointed_activations_give_the_same_gradients():
    model, pixels = in_phase("vit", "learned", "batch norm frozen")
    run = partial(checkpoint, lambda x: model(pixel_values=x).logits, use_reentrant=False)
    with plain():
        expected = gradients(model, pixels)
    assert_equal(gradients(model, pixels, run), expected)


def test_where_hooks_are_forbidden_all_is_kept():
    model, pixels = in_phase("resnet", "learned", "batch norm frozen")
    expected = gradients(model, pixels)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert_equal(gradients(model, pixels), expected)


def test_of_a_transformer_less_than_three_quarters_is_kept():
    model, pixels = in_phase("vit", "learned", "batch norm frozen")
    step = partial(gradients, model, pixels.repeat(16, 1, 1, 1))
    step()
    ours = peak_bytes(step)
    with plain():
        assert ours < 0.75 * peak_bytes(step)


class Sums(nn.Module):
    """A trunk to which the layers add, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = x + layer(x)
        return x


def test_every_second_sum_is_not_kept():
    torch.manual_seed(0)
    model, images = Sums(9), torch.randn(2, 8, 64, 64)
    calibrate(prepare_qat(model, QATConfig(), images), [images])
    model.train()

    def run() -> None:
        kept.append(model(images))

    kept: list[Tensor] = []
    run()
    ours = peak_bytes(run)
    with plain():
        everything = peak_bytes(run)
    # What comes into the quantizers of 9 layers and 8 sums, and 9 inputs of layers, quantized; or what comes into
    # those of the layers and of every second sum. The operation that is at work has up to four more.
    map_bytes = 4 * 2 * 8 * 64 * 64
    assert everything > (9 + 8 + 9) * map_bytes and ours < (9 + 4 + 4) * map_bytes
    with plain():
        expected = gradients(model, images, model)
    assert_equal(gradients(model, images, model), expected)


def rounded(x: Tensor, step: Tensor) -> Tensor:
    return torch.round(x / step) * step


def test_a_scale_that_has_moved_before_backward_is_an_error():
    x, step, weight = torch.randn(5), torch.tensor(0.1), torch.ones((), requires_grad=True)
    with kept_for_backward(Kept.INPUTS):
        product = keep_inputs(rounded(x, step), rounded, x, step) * weight
    step.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_another_part_keeps_what_it_is_given_itself():
    x, step, weight = torch.randn(5), torch.tensor(0.1), torch.ones((), requires_grad=True)
    with kept_for_backward(Kept.INPUTS):
        out = keep_inputs(rounded(x, step), rounded, x, step)
        product = out * weight
    with kept_for_backward(Kept.INPUTS):
        other = out * weight
    assert isinstance(product.grad_fn._raw_saved_self.data, KeptView)
    assert other.grad_fn._raw_saved_self.data[0] is out
    step.mul_(2)  # as if it was not there
    other.sum().backward()
    assert weight.grad == out.sum()


@pytest.mark.parametrize("kept", list(Kept))
def test_what_is_kept_itself_may_not_be_written_to_before_backward(kept: Kept):
    x, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    with kept_for_backward(kept):
        out, product = x.sigmoid(), x * weight
    out.mul_(2)  # an operation keeps what it puts out
    weight.detach().mul_(2)  # and what came in, as a step of an optimizer changes it
    for result in (out, product):
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is at version 1"):
            result.sum().backward()


def test_the_output_of_a_prepared_model_may_be_written_to_or_backward_refuses():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), torch.randn(2, 3, 8, 8)
    calibrate(prepare_qat(model, QATConfig(), images), [images])
    expected = gradients(model, images, lambda x: model(x) * 2)
    assert_equal(gradients(model, images, lambda x: model(x).mul_(2)), expected)
    with fake_quant_disabled(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, images, lambda x: model(x).mul_(2))  # sigmoid keeps what it puts out


def test_what_nobody_keeps_is_forgotten():
    x = torch.randn(1000)
    with kept_for_backward(Kept.INPUTS):
        out = keep_inputs(rounded(x, torch.tensor(0.1)), rounded, x, torch.tensor(0.1))
    weight = torch.ones((), requires_grad=True)
    with kept_for_backward(Kept.INPUTS):
        product = out * weight
    assert product.grad_fn._raw_saved_self.data[0] is out  # itself: nothing remembers what it was computed from
