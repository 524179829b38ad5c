from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, prepare_qat
from hf_qat.graph.captured import captured_modules
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from tests.blocks import BLOCKS, Attention, NormMlp
from tests.models import resnet, spread, vit


X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def activations(model: nn.Module) -> dict[str, FakeQuantize]:
    return {path: q for path, q in fake_quantizers(model).items() if not path.endswith("weight_quantizer")}


def prepared(forward, *modules: nn.Module, inputs: object = X, target: str = "int8", **options: object) -> nn.Module:
    """A network of `modules` (`model.part[0]`, …) with the given forward, prepared."""
    return prepare_qat(spread(network(forward, *modules)), QATConfig(target, **options), inputs)


def network(forward, *modules: nn.Module) -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.ModuleList(modules)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return forward(self.part, x) if y is None else forward(self.part, x, y)

    return Network().eval()


def conv(out: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, out, 3, padding=1)


def kinds(model: nn.Module) -> dict[str, str]:
    """Type of the codes of each activation: `uint8`, or `uint8+` with a zero point."""
    return {
        path.removesuffix("_quantizer"): f"{'int' if q.spec.signed else 'uint'}{q.spec.bits}"
        + ("" if q.spec.symmetric else "+")
        for path, q in activations(model).items()
    }


def test_what_hands_values_on_has_no_quantizer_of_its_own():
    def forward(part, x):
        y = functional.max_pool2d(torch.relu(part[0](x)), 2)
        y = functional.dropout(functional.pad(y, [1, 1, 1, 1]), 0.1, False).permute(0, 2, 3, 1).contiguous()
        y = y.flatten(1, 2)[:, 1:].transpose(1, 2).reshape(y.shape[0], -1)
        return part[1](y.chunk(2, dim=1)[0])

    model = prepared(forward, conv(), nn.Linear(70, 3))
    assert set(activations(model)) == {
        "x_quantizer",
        "part.0.activation_quantizer",
        "part.1.activation_quantizer",
    }
    assert model.part[1].quantizer_of_input is model.part[0].activation_quantizer


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("int8", {"x": "uint8+", "part.0.activation": "uint8", "part.1.activation": "uint8+", "add_0": "uint8+"}),
        ("int8-symmetric", {"x": "int8", "part.0.activation": "int8", "part.1.activation": "int8", "add_0": "int8"}),
        ("TDA4VM", {"x": "int8", "part.0.activation": "uint8", "part.1.activation": "int8", "add_0": "int8"}),
        ("AM62A", {"x": "int8", "part.0.activation": "uint8", "part.1.activation": "uint8+", "add_0": "uint8+"}),
    ],
)
def test_a_relu_and_a_signed_branch_meet_in_a_sum(target, expected):
    model = prepared(lambda part, x: part[1](y := torch.relu(part[0](x))) + y, conv(), conv(), target=target)
    assert kinds(model) == expected
    assert model.part[0].activation_quantizer.spec.qmin == 0


def test_the_type_of_a_sum_spreads_along_a_chain_of_sums():
    def forward(part, x):
        y = torch.relu(part[0](x))
        y = y + torch.relu(part[1](y))  # would be unsigned, were it not for the next sum
        return y + part[2](y)

    model = prepared(forward, conv(), conv(), conv(), target="int8-symmetric")
    assert set(kinds(model).values()) == {"int8"}
    short = prepared(lambda part, x: (y := torch.relu(part[0](x))) + torch.relu(part[1](y)), conv(), conv())
    assert kinds(short) == {
        "x": "uint8+",
        "part.0.activation": "uint8",
        "part.1.activation": "uint8",
        "add_0": "uint8",
    }


def test_a_concatenation_and_what_it_joins_share_one_quantizer_also_when_nested():
    def forward(part, x):
        inner = torch.cat([torch.relu(part[0](x)), part[1](x)], 1)
        return torch.cat([inner, functional.relu6(part[2](x))], 1)

    model = prepared(forward, conv(), conv(), conv())
    assert kinds(model) == {"x": "uint8+", "cat_1": "uint8+"}
    calibrate(model, [X])
    with torch.no_grad():
        result = model(X)
    assert result.unique().numel() <= 256
    assert result[:, 8:].min() == 0 and result[:, :4].min() == 0


def test_a_concatenation_of_what_is_not_negative_has_zero_point_0():
    def forward(part, x):
        return part[2](torch.cat([torch.relu(part[0](x)), torch.sigmoid(part[1](x))], 1))

    model = prepared(forward, conv(), conv(), nn.Conv2d(8, 4, 1))
    found = kinds(model)
    assert found == {"x": "uint8+", "part.1.activation": "uint8+", "cat_0": "uint8", "part.2.activation": "uint8+"}
    assert model.cat_0_quantizer.spec.fixed_scale is None


SIGNS = {
    "difference": (lambda a, b: a - b, False),
    "sum": (lambda a, b: a + b, True),
    "sum with a negative factor": (lambda a, b: torch.add(a, b, alpha=-1), False),
    "sum with a negative number": (lambda a, b: a + b - 1.0, False),
    "sum with a number": (lambda a, b: a + b + 1.0, True),
    "product": (lambda a, b: a * b, True),
    "product with a negative number": (lambda a, b: a * b * -2.0, False),
    "mean": (lambda a, b: (a + b).mean((2, 3)), True),
    "mean over the last axis": (lambda a, b: (a + b).mean(-1), True),
    "concatenation along the last axis": (lambda a, b: torch.cat([a, b], -1), True),
    "bilinear": (lambda a, b: functional.interpolate(a + b, scale_factor=2.0, mode="bilinear"), True),
    "bicubic": (lambda a, b: functional.interpolate(a + b, scale_factor=2.0, mode="bicubic"), False),
    "pooled": (lambda a, b: functional.avg_pool2d(a + b, 2), True),
}


@pytest.mark.parametrize(("function", "non_negative"), SIGNS.values(), ids=SIGNS)
def test_the_sign_of_a_result_of_two_relus(function, non_negative):
    model = prepared(lambda part, x: function(torch.relu(part[0](x)), torch.relu(part[1](x))), conv(), conv())
    last = list(captured_modules(model).values())[0].output_quantizers[0]
    spec = model.get_submodule(last).spec
    assert (spec.non_negative, spec.symmetric) == (non_negative, non_negative)


@pytest.mark.parametrize(
    ("target", "signed", "softmax"),
    [
        ("int8", {"uint8+"}, "uint8"),
        ("int8-symmetric", {"int8"}, "uint8"),
        ("AM62A", {"int8"}, "uint8"),
        ("TDA4VM", {"int8"}, "int8"),
    ],
)
def test_the_inputs_of_a_product_of_activations_have_the_zero_point_and_the_sign_that_the_target_demands(
    target, signed, softmax
):
    model = prepare_qat(spread(Attention()), QATConfig(target), torch.randn(2, 6, 16))
    found = kinds(model)
    assert {found["query.activation"], found["key.activation"], found["value.activation"]} == signed
    assert found["softmax_0"] == softmax
    assert found["x"] == ("uint8+" if target == "int8" else "int8")  # AM62A takes in no zero point


#: a product of the outputs of two layers → their types on TDA4VM, and that of the result.
PRODUCTS = {
    "both signed": (lambda a, b: a @ b, ["int8", "int8", "int8"]),
    "both from ReLU": (lambda a, b: torch.relu(a) @ torch.relu(b), ["uint8", "uint8", "int8"]),
    "first from ReLU": (lambda a, b: torch.relu(a) @ b, ["int8", "int8", "int8"]),
    "second from ReLU, moved": (
        lambda a, b: a.flatten(2) @ torch.relu(b).flatten(2).transpose(1, 2),
        ["int8", "int8", "int8"],
    ),
    "no product": (lambda a, b: torch.relu(a) * b, ["uint8", "int8", "int8"]),
}


@pytest.mark.parametrize(("function", "expected"), PRODUCTS.values(), ids=PRODUCTS)
def test_tda4vm_multiplies_two_activations_of_one_signedness(function, expected):
    model = prepared(lambda part, x: function(part[0](x), part[1](x)), conv(), conv(), target="TDA4VM")
    found = kinds(model)
    assert [found.pop("part.0.activation"), found.pop("part.1.activation")] == expected[:2]
    assert found.pop("x") == "int8" and list(found.values()) == expected[2:]


def test_a_sign_spreads_along_a_chain_of_products():
    def forward(part, x):
        a, b, c = (torch.relu(part[k](x)) for k in range(3))
        return (a @ b) + (b @ c) + (c @ part[3](x))

    found = kinds(prepared(forward, conv(), conv(), conv(), conv(), target="TDA4VM"))
    assert {found[f"part.{k}.activation"] for k in range(4)} == {"int8"}


@pytest.mark.parametrize(("tokens", "size", "largest"), [(6, 1.0, 1 / 128), (200, 0.2, 1 / 1024)])
def test_signed_probabilities_have_a_calibrated_power_of_two_scale_and_convert_to_the_same_bits(tokens, size, largest):
    x = size * torch.randn(4, tokens, 16, generator=torch.Generator().manual_seed(0))
    float_model = spread(Attention()).eval()
    model = prepare_qat(copy.deepcopy(float_model), QATConfig("TDA4VM"), x)
    calibrate(model, [x])
    quantizer = model.softmax_0_quantizer
    mantissa, _ = torch.frexp(quantizer.scale.detach())
    assert (quantizer.spec.fixed_scale, quantizer.spec.qmin, quantizer.spec.qmax) == (None, 0, 127)
    assert mantissa == 0.5 and quantizer.spec.symmetric
    assert quantizer.scale <= largest
    with torch.no_grad():
        wanted = model.eval()(x)
        assert (wanted - float_model(x)).norm() / float_model(x).norm() < 0.1
        assert torch.equal(convert(model)(x), wanted)


def test_an_attention_mask_belongs_to_the_softmax():
    mask = torch.full((6, 6), -1e38).triu(1)

    def forward(part, x):
        weights = torch.softmax(torch.matmul(part[0](x), part[1](x).transpose(1, 2)) * 0.25 + mask, -1)
        return torch.matmul(weights, part[2](x))

    tokens = torch.randn(4, 6, 16)
    modules = [nn.Linear(16, 16) for _ in range(3)]
    model = prepared(forward, *modules, inputs=tokens)
    assert "add_0_quantizer" not in activations(model)
    assert model.float_operations == [("", "aten.add.Tensor", "belongs to the softmax after it")]
    calibrate(model, [tokens])
    assert model.matmul_0_quantizer.scale < 1
    with torch.no_grad():
        noise = (model(tokens) - network(forward, *modules)(tokens)).norm() / model(tokens).norm()
    assert noise < 0.1


def test_softmax_and_sigmoid_of_4_bits_have_steps_of_a_sixteenth():
    model = prepared(lambda part, x: part[1](torch.sigmoid(part[0](x))), conv(), conv(), target="int8")
    assert model.sigmoid_0_quantizer.spec.fixed_scale == 1 / 256
    changes = {"activations": {"bits": 4}}
    model = prepared(
        lambda part, x: part[2](part[1](part[0](x))),
        conv(),
        nn.Sigmoid(),
        conv(),
        overrides={"part.1": changes},
    )
    assert model.part[1].activation_quantizer.spec.fixed_scale == 1 / 16


def test_an_operation_without_a_rule_stays_float_and_is_reported_with_its_path():
    class Cumulative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)

    model = prepared(lambda part, x: part[2](part[1](part[0](x))), conv(), Cumulative(), conv())
    assert model.float_operations == [("part.1", "aten.cumsum.default", "no rule")]
    assert kinds(model) == {
        "x": "uint8+",
        "part.0.activation": "uint8+",  # a layer's output is rounded in any case
        "part.1.activation": "uint8+",  # and what goes into the next one
        "part.2.activation": "uint8+",
    }


def test_integers_and_what_is_computed_from_them_alone_are_not_quantized():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.table(ids + 1))

    model = prepare_qat(spread(Embedded()), QATConfig(), torch.zeros(2, 3, dtype=torch.int64))
    assert set(activations(model)) == {"table.activation_quantizer", "linear.activation_quantizer"}


def test_a_parameter_that_divides_is_not_rounded_to_zero():
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.divisor = conv(), nn.Parameter(torch.tensor([1e-3, 1.0, 1.0, 1.0]).view(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) / self.divisor

    model = Divided().eval()
    with torch.no_grad():
        expected = model(X)
        result = calibrate(prepare_qat(model, QATConfig(), X), [X])(X)
    assert set(activations(model)) == {"x_quantizer", "conv.activation_quantizer", "div_0_quantizer"}
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_relu6_that_a_quantizer_computes_bounds_its_scale():
    for target, limit in (("int8", 6 / 255), ("TDA4VM", None)):
        model = prepared(lambda part, x: functional.relu6(part[0](x * 10)), conv(), target=target)
        assert model.part[0].activation_quantizer.scale_limit == limit
        calibrate(model, [X])
        with torch.no_grad():
            result = model(X)
        # A power of two reaches further than 6, so that ReLU6 itself must be computed.
        assert 5.9 < result.max() <= 6.0 and result.min() == 0


def test_the_input_of_a_child_carries_the_quantizer_of_the_child_before():
    model = prepare_qat(resnet(), QATConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    pooled = model.resnet.pooler.activation_quantizer
    assert captured_modules(model)["resnet"].output_quantizers[1] == "pooler.activation_quantizer"
    assert captured_modules(model)["classifier"].incoming_quantizer == {0: ("resnet", "pooler.activation_quantizer")}
    assert model.classifier[1].quantizer_of_input is pooled
    assert not any("input" in path for path in fake_quantizers(model))


def test_every_layer_knows_the_quantizer_in_front_of_it():
    for model in (
        prepare_qat(resnet(), QATConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)}),
        prepare_qat(vit(layers=1), QATConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)}),
    ):
        quantizers = {id(quantizer) for quantizer in fake_quantizers(model).values()}
        sources = [layer.quantizer_of_input for layer in qat_layers(model).values()]
        assert all(id(source) in quantizers for source in sources)
        weights = {id(layer.weight_quantizer) for layer in qat_layers(model).values()}
        assert not {id(source) for source in sources} & weights


def test_a_copy_of_a_model_keeps_the_quantizers_in_front_of_its_own_layers():
    model = prepare_qat(resnet(), QATConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    twin = copy.deepcopy(model)
    own = {id(quantizer) for quantizer in fake_quantizers(twin).values()}
    assert all(id(layer.quantizer_of_input) in own for layer in qat_layers(twin).values())
    assert all(
        id(layer.batch_norm) in {id(m) for m in twin.modules()}
        for layer in qat_layers(twin).values()
        if layer.batch_norm
    )


def test_overrides_reach_the_modules_that_their_globs_match():
    changes = {"part.1": {"weights": {"bits": 4, "per_channel": False}, "activations": {"bits": 16}}}
    model = prepared(lambda part, x: part[2](part[1](part[0](x))), conv(), conv(), conv(), overrides=changes)
    bits = [(m.weight_quantizer.spec.bits, m.activation_quantizer.spec.bits) for m in model.part]
    assert bits == [(8, 8), (4, 16), (8, 8)]
    assert model.part[1].weight_quantizer.scale.shape == ()
    assert model.part[0].weight_quantizer.scale.shape == (4,)


@pytest.mark.parametrize("target", ["w4a4", "w4a8"])
def test_image_first_and_last_layer_and_output_keep_8_bits(target):
    model = prepared(
        lambda part, x: part[2](torch.relu(part[1](torch.relu(part[0](x))))), conv(), conv(), conv(), target=target
    )
    activation = int(target[-1])
    found = {path: q.spec.bits for path, q in fake_quantizers(model).items()}
    assert found == {
        "x_quantizer": 8,
        "part.0.weight_quantizer": 8,
        "part.0.activation_quantizer": activation,
        "part.1.weight_quantizer": 4,
        "part.1.activation_quantizer": 8,  # goes into the last layer
        "part.2.weight_quantizer": 8,
        "part.2.activation_quantizer": 8,
    }


@pytest.mark.parametrize(
    ("options", "wide", "others"),
    [
        ({}, 8, 4),
        ({"layer_restrictions": False}, 4, 4),
        ({"overrides": {"*": {"activations": {"bits": 5}}}}, 5, 5),
    ],
    ids=["the target's", "unrestricted", "overridden"],
)
def test_at_4_bits_what_layer_norms_read_keeps_8_unless_the_recipe_says_otherwise(options, wide, others):
    def forward(part, x):
        y = part[2](part[1](part[0](x).transpose(1, 2)[:, 1:].flip(1)))  # laid out anew and cut on the way
        return part[4](part[3](y))

    layers = (nn.Linear(8, 8), nn.LayerNorm(8), *[nn.Linear(8, 8) for _ in range(3)])
    model = prepared(forward, *layers, inputs=torch.randn(2, 8, 8), target="w4a4", **options)
    bits = [model.part[place].activation_quantizer.spec.bits for place in range(3)]
    assert bits == [wide, others, others]


def test_the_edges_of_a_task_model_are_the_image_and_its_classifier():
    model = prepare_qat(resnet(), QATConfig("w4a4"), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    wide = {path for path, q in fake_quantizers(model).items() if q.spec.bits == 8}
    assert wide == {
        "resnet.pixel_values_quantizer",
        "resnet.embedder.embedder.convolution.weight_quantizer",
        "resnet.pooler.activation_quantizer",
        "classifier.1.weight_quantizer",
        "classifier.1.activation_quantizer",
    }


@pytest.mark.parametrize("name", ["squeeze_excite", "norm_gelu_mlp"])
def test_switching_all_quantizers_off_gives_back_the_float_block(name):
    block = BLOCKS[name]
    float_model, x = block.module(), block.data(4)
    model = prepare_qat(block.module(), QATConfig(), x)
    with fake_quant_disabled(model), torch.no_grad():
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-5, atol=1e-5)


def test_excluding_everything_leaves_nothing_to_quantize():
    float_model, x = spread(NormMlp()).eval(), torch.randn(2, 6, 16)
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(exclude=["norm", "up", "down"]), x)
    assert set(kinds(model)) == {"x", "down.activation", "gelu_0", "up.activation", "add_0"}
    calibrate(model, [x])
    assert torch.equal(convert(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_training_learns_every_scale_but_that_of_the_data(bits):
    """At fewer bits than 8, where to clip the data is for the loss to say."""
    model = prepared(lambda part, x: part[1](torch.relu(part[0](x))), conv(), conv(), activations={"bits": bits})
    fixed = {path for path, quantizer in activations(model).items() if not quantizer.learned}
    assert fixed == ({"x_quantizer"} if bits == 8 else set())
    assert "x_quantizer.log2_scale" in model.state_dict()
    calibrate(model, [X]).train()
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_quantizer_that_the_data_share_with_a_result_is_learned():
    model = prepared(lambda part, x: part[1](torch.cat([x, part[0](x)], 1)), conv(), nn.Conv2d(8, 4, 1))
    assert all(quantizer.learned for quantizer in activations(model).values())
