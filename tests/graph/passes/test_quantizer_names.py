from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, prepare_qat
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import mobilenet_v2, resnet, vit


PIXELS = {"pixel_values": torch.zeros(2, 3, 32, 32)}


def names(model: nn.Module, prefix: str = "", inputs: object = None, **options: object) -> set[str]:
    """Paths of the quantizers below a prefix, without it."""
    prepare_qat(model, QATConfig(**options), PIXELS if inputs is None else inputs)
    return {path.removeprefix(prefix) for path in fake_quantizers(model) if path.startswith(prefix)}


@functools.cache
def names_of(make: Callable[[], nn.Module]) -> frozenset[str]:
    """All of a model that is prepared with the defaults."""
    return frozenset(names(make()))


def below(make: Callable[[], nn.Module], prefix: str) -> set[str]:
    return {path.removeprefix(prefix) for path in names_of(make) if path.startswith(prefix)}


def test_the_quantizers_of_a_resnet_basic_block():
    assert below(resnet, "resnet.encoder.stages.1.layers.0.") == {
        "shortcut.convolution.weight_quantizer",
        "shortcut.convolution.activation_quantizer",
        "layer.0.convolution.weight_quantizer",
        "layer.0.convolution.activation_quantizer",  # behind batch norm and ReLU
        "layer.1.convolution.weight_quantizer",
        "layer.1.convolution.activation_quantizer",
        "add_0_quantizer",  # behind the ReLU
    }


def test_the_quantizers_around_the_blocks_of_a_resnet():
    assert {path for path in names_of(resnet) if "stages" not in path} == {
        "resnet.pixel_values_quantizer",
        "resnet.embedder.embedder.convolution.weight_quantizer",
        "resnet.embedder.embedder.convolution.activation_quantizer",
        "resnet.pooler.activation_quantizer",
        "classifier.1.weight_quantizer",
        "classifier.1.activation_quantizer",
    }


@pytest.mark.slow
def test_the_quantizers_of_a_mobilenet_inverted_residual():
    assert below(mobilenet_v2, "mobilenet_v2.layer.1.") == {
        "expand_1x1.convolution.weight_quantizer",
        "expand_1x1.convolution.activation_quantizer",
        "conv_3x3.convolution.weight_quantizer",
        "conv_3x3.convolution.activation_quantizer",
        "reduce_1x1.convolution.weight_quantizer",
        "reduce_1x1.convolution.activation_quantizer",
        "add_0_quantizer",
    }


def test_the_quantizers_of_a_vit_layer():
    if not hasattr(vit().vit, "layers"):
        pytest.skip("this version of transformers names the parts of a ViT otherwise")
    linear = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    expected = {f"{path}.{kind}_quantizer" for path in linear for kind in ("weight", "activation")}
    assert below(vit, "vit.layers.1.") == expected | {
        "layernorm_before.activation_quantizer",
        "layernorm_after.activation_quantizer",
        "attention.matmul_0_quantizer",  # behind the division by the root of the width
        "attention.softmax_0_quantizer",
        "attention.matmul_1_quantizer",
        "mlp.activation_fn.activation_quantizer",
        "add_0_quantizer",
        "add_1_quantizer",
    }


@pytest.mark.parametrize(
    ("make", "excluded"),
    [
        (resnet, "resnet.encoder.stages.0"),
        (resnet, "resnet.encoder.stages.1.layers.0.layer.0.convolution"),
        (vit, "vit.*.0.*"),
        (vit, "classifier"),
    ],
)
def test_names_elsewhere_do_not_change_when_a_module_is_excluded(make, excluded):
    before, after = names_of(make), names(make(), exclude=excluded)
    outside = {path for path in before if not QATConfig(exclude=excluded).excludes(path)}
    assert outside < before
    assert outside <= after
    # What is new quantizes a value that leaves the excluded part, or a batch norm that has lost its layer.
    new = {path.rsplit(".", 1)[-1] for path in after - before}
    assert new <= {"activation_quantizer", "add_0_quantizer", "weight_quantizer"}


def test_names_depend_on_neither_target_nor_sizes():
    expected = names_of(resnet)
    assert names(resnet(), target="TDA4VM") == expected
    assert names(resnet(), inputs={"pixel_values": torch.zeros(4, 3, 64, 48)}) == expected


class Functional(nn.Module):
    """Functional operations, of the module itself and of an inner one; one activation module, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.relu(x) + 1.0
        x = self.relu(self.conv(x) + y)
        x = self.inner(x) * self.relu(y - x)
        return x + y


class WithoutRule(nn.Module):
    """An operation without a rule between two layers, and one that has a rule behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.cumsum(self.first(x), -1))
        return y + nn.functional.softplus(y)


def test_what_an_operation_without_a_rule_gives_is_named_after_it_as_others_are():
    found = names(WithoutRule(), inputs=torch.zeros(2, 4))
    assert {name for name in found if "weight" not in name} == {
        "x_quantizer",
        "first.activation_quantizer",
        "cumsum_0_quantizer",
        "second.activation_quantizer",
        "softplus_0_quantizer",
        "add_0_quantizer",
    }


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + x


def test_functional_operations_are_counted_within_their_module():
    x = torch.zeros(2, 3, 4, 4)
    assert names(Functional(), inputs=(x, x)) == {
        "x_quantizer",
        "y_quantizer",
        "relu.activation_quantizer",
        "add_0_quantizer",
        "conv.weight_quantizer",
        "conv.activation_quantizer",
        "add_1_quantizer",
        "inner.scale_quantizer",
        "inner.mul_0_quantizer",
        "inner.add_0_quantizer",
        "sub_0_quantizer",
        "mul_0_quantizer",
        "add_2_quantizer",
    }


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.conv(self.act(x))))


def test_a_module_that_is_called_twice_has_a_quantizer_for_each_call():
    assert names(Twice(), inputs=torch.zeros(2, 3, 4, 4)) == {
        "x_quantizer",
        "act.activation_quantizer",
        "conv.weight_quantizer",
        "conv.activation_quantizer",
        "act.activation_quantizer_1",
        "conv.activation_quantizer_1",
    }
