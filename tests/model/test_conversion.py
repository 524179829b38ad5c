from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.errors import NonFiniteError, StageError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.blocks import BLOCKS, Block
from tests.models import hand_written, spread


TARGETS = ("int8", "int8-symmetric", "TDA4VM", "w4a4")
BATCH = 32


def export(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> onnx.ModelProto:
    """What PyTorch's own exporter makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, path, opset_version=18, dynamo=True, verbose=False)
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    return exported


def run(model: onnx.ModelProto, *inputs: Tensor) -> list[np.ndarray]:
    """ONNX Runtime, with its optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


class Graph:
    """An exported graph with one output, to be asked questions."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.nodes = list(graph.node)
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.last = self.made_by[graph.output[0].name]

    def of(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in kinds]

    def parameters(self, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of a QuantizeLinear or a DequantizeLinear."""
        return self.constants[node.input[1]], self.constants[node.input[2]]

    def stored(self, dtype: type) -> list[onnx.NodeProto]:
        """Each DequantizeLinear of a constant of this type."""
        nodes = self.of("DequantizeLinear")
        return [n for n in nodes if n.input[0] in self.constants and self.constants[n.input[0]].dtype == dtype]

    def origin(self, name: str) -> onnx.NodeProto:
        """The node that made a value, behind transpositions and reshapes."""
        node = self.made_by[name]
        while node.op_type in ("Transpose", "Reshape"):
            node = self.made_by[node.input[0]]
        return node

    def users(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [user for user in self.nodes if node.output[0] in user.input]

    def clip_behind(self, quantize: onnx.NodeProto) -> onnx.NodeProto | None:
        (user,) = self.users(quantize)
        return user if user.op_type == "Clip" else None


@dataclass
class Result:
    """One block on one target."""

    block: Block
    prepared: Tensor
    converted: Tensor
    onnx: np.ndarray
    graph: Graph
    activation_quantizers: int


def prepare_block(block: Block, target: str) -> nn.Module:
    model = prepare_qat(block.module(), QATConfig(target), block.data(2))
    return calibrate(model, [block.data(BATCH, seed=1)])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Result]:
    """`results(target, name)`: a block all the way through."""
    directory = tmp_path_factory.mktemp("blocks")

    @functools.cache
    def make(target: str, name: str) -> Result:
        block = BLOCKS[name]
        model = prepare_block(block, target)
        activations = sum("weight" not in path for path in fake_quantizers(model))
        x = block.data(BATCH, seed=2)
        with torch.no_grad():
            prepared = model(x)
            converted = convert(model)(x)
        exported = export(model, (x,), directory / f"{target}-{name}.onnx")
        return Result(block, prepared, converted, run(exported, x)[0], Graph(exported.graph), activations)

    return make


#: Kinds that differ from others in nothing that a target decides.
ON_ONE_TARGET = ("conv1d_bn_relu", "conv3d_bn_relu", "conv_bn_hardswish", "conv_bn_silu")
CASES = [f"{t}/{name}" for t in TARGETS for name in BLOCKS if t == "int8" or name not in ON_ONE_TARGET]

#: Of two targets that differ from int8 in the types of codes alone, every run takes one for each block.
SLOW = {f"{('int8-symmetric', 'w4a4')[k % 2]}/{name}" for k, name in enumerate(BLOCKS)}


@pytest.fixture(params=[pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def result(request: pytest.FixtureRequest, results: Callable[[str, str], Result]) -> Result:
    return results(*request.param.split("/"))


def target_of(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["result"].split("/")[0]


def test_converting_changes_no_number(result):
    assert result.prepared.unique().numel() > 8
    assert torch.equal(result.converted, result.prepared)


def test_onnx_runtime_gives_the_same_codes(result):
    assert result.graph.last.op_type == "DequantizeLinear"
    step = float(result.graph.parameters(result.graph.last)[0])
    difference = np.abs(result.onnx - result.converted.numpy())
    assert (difference == 0).mean() >= 0.9999
    assert difference.max() <= step * 1.001


def test_the_file_holds_the_pairs_weights_and_biases_that_were_worked_out_by_hand(result):
    graph, block = result.graph, result.block
    assert len(graph.of("QuantizeLinear")) == block.pairs
    assert len(graph.stored(np.int8)) == block.weights
    assert len(graph.stored(np.int32)) == block.biases
    assert len(graph.of("DequantizeLinear")) == block.pairs + block.weights + block.biases
    assert not graph.of("BatchNormalization")
    assert result.activation_quantizers == (block.quantizers or block.pairs)


def test_every_layer_computes_on_codes(result):
    graph = result.graph
    layers = graph.of("Conv", "ConvTranspose", "MatMul", "Gemm")
    assert layers
    for node in layers:
        for name in node.input[:2]:
            assert graph.origin(name).op_type == "DequantizeLinear", node.op_type
        for name in node.input[2:]:
            if result.block.biases:
                assert graph.constants[graph.made_by[name].input[0]].dtype == np.int32
            else:
                assert graph.constants[name].dtype == np.float32
    for node in graph.stored(np.int8):
        assert np.abs(graph.constants[node.input[0]].astype(int)).max() <= 127
        assert (graph.parameters(node)[1] == 0).all()


def test_an_int32_bias_has_the_scale_of_input_times_weight(result):
    graph = result.graph
    if not result.block.biases:
        pytest.skip("one float bias for two inputs")
    for node in graph.of("Conv", "ConvTranspose"):
        source, weight, bias = (graph.parameters(graph.origin(name))[0] for name in node.input)
        np.testing.assert_allclose(bias, source * weight, rtol=1e-6)


def test_scales_and_types_are_the_targets(result, request):
    graph, target = result.graph, target_of(request)
    quantize, weights = graph.of("QuantizeLinear"), graph.stored(np.int8)
    types = {graph.parameters(node)[1].dtype for node in quantize}
    scales = [graph.parameters(node)[0] for node in quantize]
    assert all(scale.shape == () for scale in scales)
    if target in ("int8", "w4a4"):
        assert types == {np.dtype(np.uint8)}
    else:
        assert all(graph.parameters(node)[1] == 0 for node in quantize)
    if target == "TDA4VM":
        scales += [graph.parameters(node)[0] for node in weights]
        assert {math.frexp(float(scale))[0] for scale in scales} == {0.5}
    else:
        channels = [graph.parameters(node)[0].size for node in weights]
        assert min(channels) > 1


def test_four_bit_codes_stay_within_four_bits(result, request):
    graph, block = result.graph, result.block
    clips = [clip for clip in map(graph.clip_behind, graph.of("QuantizeLinear")) if clip is not None]
    narrow = [node for node in graph.stored(np.int8) if np.abs(graph.constants[node.input[0]]).max() <= 7]
    if target_of(request) != "w4a4":
        assert not clips and not narrow
        return
    assert [graph.constants[clip.input[2]] for clip in clips] == [15] * block.narrow_pairs
    assert len(narrow) == block.narrow_weights


@pytest.mark.parametrize("target", ["int8", "int8-symmetric", "w4a4"])
@pytest.mark.parametrize(
    ("name", "kind"), [("residual_add", "Add"), ("residual_add_relu", "Add"), ("concat", "Concat")], ids=str
)
def test_where_tensors_meet_they_have_one_type(results, target, name, kind):
    graph = results(target, name).graph
    (node,) = graph.of(kind)
    meeting = [graph.parameters(graph.origin(value)) for value in node.input]
    (behind,) = graph.users(node)
    meeting.append(graph.parameters(behind if behind.op_type == "QuantizeLinear" else graph.users(behind)[0]))
    expected = np.int8 if target == "int8-symmetric" else np.uint8
    assert {zero_point.dtype for _, zero_point in meeting} == {np.dtype(expected)}
    if kind == "Concat":
        assert len({(float(scale), int(zero_point)) for scale, zero_point in meeting}) == 1


@pytest.mark.parametrize("target", ["int8-symmetric", "TDA4VM"])
@pytest.mark.parametrize(
    ("name", "signed", "unsigned"), [("conv_bn_relu", 1, 1), ("bilinear_resize", 3, 0), ("attention", 7, 1)], ids=str
)
def test_a_symmetric_tensor_that_cannot_be_negative_is_unsigned(results, target, name, signed, unsigned):
    if (target, name) == ("TDA4VM", "attention"):
        signed, unsigned = 8, 0  # it multiplies probabilities, too, only by what is as signed as they are
    graph = results(target, name).graph
    types = [graph.parameters(node)[1].dtype for node in graph.of("QuantizeLinear")]
    assert (types.count(np.int8), types.count(np.uint8)) == (signed, unsigned)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "kind"), [("attention", "Softmax"), ("squeeze_excite", "Sigmoid")], ids=str)
def test_unsigned_softmax_and_sigmoid_have_fixed_scales(results, target, name, kind):
    graph = results(target, name).graph
    (quantize,) = graph.users(graph.of(kind)[0])
    scale, zero_point = graph.parameters(quantize)
    if (target, kind) == ("TDA4VM", "Softmax"):  # signed, for the product behind it: its scale is calibrated
        assert zero_point.dtype == np.int8 and zero_point == 0 and np.frexp(scale)[0] == 0.5 and scale <= 1 / 128
    elif (target, kind) == ("w4a4", "Softmax"):  # rows of 6 are long for 16 codes: its scale is calibrated
        assert zero_point == 0 and 1 / 32 < scale <= 1 / 15
    else:
        assert (float(scale), int(zero_point)) == (1 / (16 if target == "w4a4" else 256), 0)


class Middle(nn.Module):
    """Three layers, the middle one to be excluded together with its batch norm and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.relu(self.first(x))))


def test_an_excluded_part_stays_float_between_a_dequantize_and_a_quantize(tmp_path):
    model = spread(Middle()).eval()
    weight = model.middle[0].weight.detach().clone()
    x = torch.randn(16, 3, 8, 8)
    prepare_qat(model, QATConfig(exclude="middle"), x[:2])
    assert set(fake_quantizers(model)) == {
        "x_quantizer",
        "first.weight_quantizer",
        "first.activation_quantizer",
        "middle.2.activation_quantizer",
        "last.weight_quantizer",
        "last.activation_quantizer",
    }
    convert(calibrate(model, [x]))
    assert torch.equal(model.middle[0].weight, weight)
    with torch.no_grad():
        expected = model(x)
    exported = export(model, (x,), tmp_path / "model.onnx")
    graph = Graph(exported.graph)
    (result,) = run(exported, x)
    difference = np.abs(result - expected.numpy())
    assert (difference == 0).mean() >= 0.999
    assert difference.max() <= float(graph.parameters(graph.last)[0]) * 1.001
    convolutions = graph.of("Conv")
    kinds = [
        [graph.made_by[name].op_type if name in graph.made_by else "" for name in n.input[:2]] for n in convolutions
    ]
    assert sorted(kinds) == [["DequantizeLinear", ""], ["DequantizeLinear"] * 2, ["DequantizeLinear"] * 2]
    assert len(graph.of("QuantizeLinear")) == 4


class DeadChannel(nn.Module):
    """One channel whose weights a batch norm makes next to nothing, and whose bias it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("target", ["int8", "TDA4VM"])
def test_the_bias_of_a_dead_channel_survives_int32(target):
    model = spread(DeadChannel()).eval()
    with torch.no_grad():
        model.norm.weight[1] = 1e-9
        model.norm.bias[1] = 2.0
        if target == "TDA4VM":  # one scale for all channels
            model.norm.weight.fill_(1e-9)
            model.norm.bias.fill_(2.0)
    x = torch.randn(8, 3, 8, 8)
    prepare_qat(model, QATConfig(target), x)
    calibrate(model, [x], bias_correction=False)
    prepared = model(x)
    assert (prepared[:, 1] - 2.0).abs().max() < 0.05
    assert torch.equal(convert(model)(x), prepared)
    codes = model.conv.bias
    assert codes.dtype == torch.int32 and codes[1].abs() > 2**20
    if target == "TDA4VM":
        assert math.frexp(float(model.conv.weight_scale))[0] == 0.5


def test_a_converted_model_is_for_inference_only():
    x = torch.randn(4, 3, 32, 32)
    model = prepare_qat(hand_written().train(), QATConfig(), x)
    calibrate(model, [x])
    assert convert(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not fake_quantizers(model)
    assert not model(x).requires_grad


def test_the_state_dict_of_a_converted_model_holds_integers_and_scales():
    x = torch.randn(4, 3, 32, 32)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]))
    kinds = {key: value.dtype for key, value in model.state_dict().items()}
    # The ReLU'd stem and the sum are joined by the concatenation, and share its quantizer.
    pairs = ("x", "body.activation", "cat_0", "mean_0", "head.activation")
    expected = {f"{layer}.{name}": kind for layer in ("stem", "body", "head") for name, kind in LAYER_STATE.items()}
    for path in pairs:
        expected |= {f"{path}_quantizer.scale": torch.float32, f"{path}_quantizer.zero_point": torch.uint8}
    assert kinds == expected


LAYER_STATE = {
    "weight": torch.int8,
    "bias": torch.int32,
    "weight_scale": torch.float32,
    "bias_scale": torch.float32,
}


def test_converting_before_calibrating_is_refused_with_a_quantizer_that_lacks_a_range():
    model = prepare_qat(hand_written(), QATConfig(), torch.randn(2, 3, 32, 32))
    keys = list(model.state_dict())
    with pytest.raises(StageError, match=r"cannot convert: \d+ quantizers have no range yet, for instance stem\.\w+"):
        convert(model)
    assert list(model.state_dict()) == keys


def test_converting_twice_or_calibrating_afterwards_is_refused():
    x = torch.randn(2, 3, 32, 32)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]))
    with pytest.raises(StageError, match="cannot convert: the model is converted already"):
        convert(model)
    with pytest.raises(StageError, match="cannot calibrate: the model is converted already"):
        calibrate(model, [x])


@pytest.mark.parametrize("name", ["stem.weight", "head.bias", "body_norm.running_mean", "x_quantizer.log2_scale"])
def test_a_model_that_is_not_finite_is_refused_by_the_name_of_the_tensor(name):
    x = torch.randn(2, 3, 32, 32)
    model = calibrate(prepare_qat(hand_written(), QATConfig(), x), [x])
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"cannot convert: {name} of HandWritten holds NaN"):
        convert(model)
    assert "head.weight_quantizer.log2_scale" in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast_is_converted_in_float32_alone(dtype):
    x = torch.randn(2, 3, 32, 32)
    model = calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]).to(dtype)
    with pytest.raises(StageError, match=r"log2_scale is torch\.\w+.*: call model\.float\(\) first"):
        convert(model)
    expected = model.float().eval()(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=0, atol=0)


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.float64),
    "from outside": lambda model: nn.Sequential(nn.Flatten(1), model).double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_converted_model_is_not_cast_and_its_codes_and_scales_stay(cast):
    x = torch.randn(2, 3, 32, 32)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    with pytest.raises(StageError, match=r"cannot cast a converted model to torch\.\w+: .*torch\.autocast"):
        cast(model)
    for name, value in model.float().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_converted_model_moves_and_computes_under_autocast_as_the_error_says():
    x = torch.randn(2, 3, 32, 32)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]))
    expected = model(x)
    moved = model.share_memory().to("cpu", memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    assert {value.device.type for value in model.to("meta").state_dict().values()} == {"meta"}


def test_a_prepared_model_in_pytorch_s_exporter_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As a file it has the rounding as arithmetic; of a converted one there is nothing to say."""
    x = torch.randn(2, 3, 8, 8)
    model = calibrate(prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), QATConfig(), x), [x]).eval()
    assert "Round" in {node.op_type for node in export(model, (x,), tmp_path / "prepared.onnx").graph.node}
    assert caplog.text.count("call convert(model) before torch.onnx.export") == 1
    caplog.clear()
    kinds = {node.op_type for node in export(convert(model), (x,), tmp_path / "converted.onnx").graph.node}
    assert "QuantizeLinear" in kinds and "prepared for training" not in caplog.text
