"""What a card says of the layers: counted by hand in models of a few of them."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import StageError
from hf_qat.publish.summary import InFloat, Layer, describe_spec, summarize
from hf_qat.quantization.spec import QuantizerSpec
from tests.models import HUGGING_FACE, hand_written


def converted(**config: object) -> nn.Module:
    model = prepare_qat(hand_written(), QATConfig("int8", **config), torch.randn(4, 3, 16, 16))
    return convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))


def test_layers_are_listed_in_order_with_how_they_are_quantized_and_the_number_of_their_weights():
    summary = summarize(converted(), {})
    assert summary.layers == [
        Layer("stem", "Conv2d 3×3", "int8, per channel", "", 8 * 3 * 3 * 3),  # its output shares the concatenation's
        Layer("body", "Conv2d 3×3", "int8, per channel", "uint8, zero point", 8 * 8 * 3 * 3),
        Layer("head", "Linear", "int8, per channel", "uint8, zero point", 16 * 5),
    ]
    assert summary.weights == {"int8, per channel": 3} and summary.bits == [8]
    assert summary.in_float == []


def test_depthwise_and_grouped_convolutions_are_told_apart():
    layers = (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2))
    x = torch.randn(4, 4, 8, 8)
    model = convert(calibrate(prepare_qat(nn.Sequential(*layers), QATConfig(), x), [x]))
    assert [layer.kind for layer in summarize(model, {}).layers] == ["Conv2d 3×3 depthwise", "Conv2d 1×1 grouped"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantizerSpec(8, signed=True, symmetric=True, axis=0), "int8, per channel"),
        (QuantizerSpec(4, signed=False, symmetric=False), "uint4, zero point"),
        (QuantizerSpec(8, signed=False, symmetric=True, power_of_two=True), "uint8, power-of-two scale"),
        (QuantizerSpec(8, signed=False, symmetric=True, fixed_scale=1 / 256), "uint8, fixed scale"),
    ],
)
def test_a_quantizer_is_described_in_a_few_words(spec: QuantizerSpec, words: str):
    assert describe_spec(spec) == words


def test_what_stays_in_float_inside_of_a_graph_has_the_reason_that_the_graph_knows(tmp_path):
    model = converted(exclude="body")
    float_ops = export_onnx(model, tmp_path / "model.onnx", verify=False).float_ops
    assert float_ops == {"Conv": ["Conv"]}  # the file has no name of the module, the graph has
    assert summarize(model, float_ops).in_float == [InFloat("conv2d", "`body`", "excluded by the recipe")]


def test_what_stays_in_float_outside_of_the_graphs_is_named_after_the_nodes_of_the_file(tmp_path):
    case = HUGGING_FACE["resnet"]
    batch = {"pixel_values": case.pixels(4)}
    model = prepare_qat(case.make(), QATConfig(exclude="classifier"), batch)
    path = tmp_path / "model.onnx"
    float_ops = export_onnx(convert(calibrate(model, [batch])), path, verify=False).float_ops
    assert "classifier.1/Gemm" in [node.name for node in onnx.load(path).graph.node]
    assert summarize(model, float_ops).in_float == [InFloat("Gemm", "`classifier.1/Gemm`", "excluded by the recipe")]


def test_what_a_graph_cannot_explain_is_said_of_the_file_and_a_long_list_is_cut():
    nodes = [f"cell{number}/LSTM" for number in range(7)]
    (row,) = summarize(converted(), {"LSTM": nodes}).in_float
    assert row.reason == "an input of it is not quantized, by the rules of the target"
    assert row.places.endswith("`cell4/LSTM` and 2 more")


def test_a_model_that_is_not_converted_is_refused():
    with pytest.raises(StageError, match="float model"):
        summarize(hand_written(), {})
