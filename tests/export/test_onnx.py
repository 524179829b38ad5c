from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import CaptureError, ExportError, FixedBatchError, NonFiniteError, StageError
from hf_qat.export.verify import Session
from tests.models import HUGGING_FACE, HandWritten, hand_written


INT8, INT32 = onnx.TensorProto.INT8, onnx.TensorProto.INT32


@pytest.fixture(scope="module")
def own_network() -> nn.Module:
    """A plain module, converted."""
    model = prepare_qat(hand_written(), QATConfig("int8"), torch.randn(4, 3, 16, 16))
    return convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_file_states_the_opset_and_computes_what_torch_does(opset, dynamic, converted, run_onnx, tmp_path):
    model, case = converted("resnet"), HUGGING_FACE["resnet"]
    path = tmp_path / "model.onnx"

    report = export_onnx(model, path, {"pixel_values": case.pixels(4)}, opset_version=opset, dynamic_batch=dynamic)

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", opset)]
    batch = file.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch" if dynamic else batch.dim_value == 1
    for count in (1, 3, 5) if dynamic else (1,):
        pixels = case.pixels(count, seed=2)
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits.numpy()
        step = float(model.classifier[1].activation_quantizer.scale)
        assert abs(run_onnx(file, pixels.numpy())[0] - expected).max() <= 1.01 * step
    assert report.opset == opset and report.path == path and report.samples == 4
    assert report.num_quantize_nodes == sum(node.op_type == "QuantizeLinear" for node in file.graph.node)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "convnext",
        "vit",
        "yolos",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "swin", "segformer", "detr")),
    ],
)
def test_all_kinds_of_models_leave_quantized_throughout(name, exported):
    report = exported(name)[1]
    graph = onnx.load(report.path).graph
    codes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            sources = [makers[value] for value in node.input[1:]]
            assert {source.op_type for source in sources} == {"DequantizeLinear"}
            assert [codes[source.input[0]] for source in sources] == [INT8, INT32][: len(sources)]
    assert report.float_ops == {}
    assert report.plain.top1_agreement >= 0.99


def test_codes_and_scales_in_the_file_are_those_of_the_model(exported):
    model, report = exported("resnet")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer}
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "codes")}
    assert len(layers) == 7
    for path, layer in layers.items():
        np.testing.assert_array_equal(tensors[f"{path}.weight"], layer.codes.numpy())
        np.testing.assert_array_equal(tensors[f"{path}.weight_scale"], layer.weight_scale.numpy())


def test_metadata_says_version_target_and_the_whole_config(own_network, tmp_path):
    export_onnx(own_network, tmp_path / "model.onnx", torch.randn(1, 3, 16, 16))
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata["hf_qat.target"] == "int8"
    assert metadata["hf_qat.version"]
    assert QATConfig.from_dict(json.loads(metadata["hf_qat.config"])) == QATConfig("int8")


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("resnet", ["pixel_values"], ["logits"]),
        ("yolos", ["pixel_values"], ["logits", "pred_boxes", "last_hidden_state"]),
    ],
)
def test_inputs_and_outputs_have_the_names_that_the_model_gives_them(name, inputs, outputs, exported):
    graph = onnx.load(exported(name)[1].path).graph
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == outputs


def test_nodes_have_the_names_of_modules(exported):
    names = [node.name for node in onnx.load(exported("resnet")[1].path).graph.node]
    assert "resnet.embedder.embedder.convolution/Conv" in names
    assert not [name for name in names if "_symbolic" in name or "val_" in name]
    assert len(set(names)) == len(names)


def test_a_plain_module_exports_with_and_without_example_inputs(own_network, tmp_path):
    x = torch.randn(6, 3, 16, 16)
    given = export_onnx(own_network, tmp_path / "a" / "model.onnx", x)
    guessed = export_onnx(own_network, tmp_path / "b.onnx")
    assert (given.samples, guessed.samples) == (6, 2)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert [value.name for value in onnx.load(given.path).graph.input] == ["x"]


def test_labels_in_the_example_are_left_out(converted, tmp_path):
    batch = {"pixel_values": HUGGING_FACE["resnet"].pixels(2), "labels": torch.tensor([0, 1])}
    report = export_onnx(converted("resnet"), tmp_path / "model.onnx", batch)
    assert [value.name for value in onnx.load(report.path).graph.input] == ["pixel_values"]


def test_export_leaves_the_model_alone(own_network, tmp_path):
    x = torch.randn(3, 3, 16, 16)
    before, state = own_network(x), copy.deepcopy(own_network.state_dict())
    export_onnx(own_network, tmp_path / "model.onnx", x)
    assert torch.equal(own_network(x), before)
    assert all(torch.equal(value, state[key]) for key, value in own_network.state_dict().items())


def test_the_stock_exporter_writes_the_same_quantizers(exported, stock_export):
    model, report = exported("resnet")
    stock = stock_export(model, HUGGING_FACE["resnet"].pixels(1))
    pools = sum(node.op_type == "MaxPool" for node in stock.graph.node)  # after which our files repeat a pair
    assert sum(node.op_type == "QuantizeLinear" for node in stock.graph.node) + pools == report.num_quantize_nodes
    assert pools == 1


def test_an_excluded_layer_is_reported_as_float(tmp_path):
    model = prepare_qat(hand_written(), QATConfig("int8", exclude="body"), torch.randn(4, 3, 16, 16))
    convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))
    report = export_onnx(model, tmp_path / "model.onnx")
    assert report.float_ops["Conv"] == ["Conv"]
    assert "Gemm" not in report.float_ops
    assert "in float: Conv (Conv)" in str(report)


@pytest.mark.parametrize("opset", [17, 18])
def test_16_bits_need_opset_21_and_get_it(opset, tmp_path):
    config = QATConfig("int8", activations={"bits": 16})
    model = prepare_qat(hand_written(), config, torch.randn(4, 3, 16, 16))
    convert(calibrate(model, [torch.randn(8, 3, 16, 16)]))
    with pytest.raises(ExportError, match="opset_version=21"):
        export_onnx(model, tmp_path / "model.onnx", opset_version=opset)
    assert list(tmp_path.iterdir()) == []
    report = export_onnx(model, tmp_path / "model.onnx", opset_version=21)
    assert report.max_output_lsb <= 100  # of 65536


def test_a_model_that_is_not_converted_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(StageError, match="prepare_qat"):
        export_onnx(HandWritten(), tmp_path / "model.onnx")
    model = prepare_qat(HandWritten(), QATConfig(), torch.randn(2, 3, 16, 16))
    with pytest.raises(StageError, match=r"convert\(copy.deepcopy\(model\)\)"):
        export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_to_are_refused(own_network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a directory"):
        export_onnx(own_network, tmp_path)
    with pytest.raises(ExportError, match="cannot write .*Choose a path"):
        export_onnx(own_network, tmp_path / "file" / "model.onnx")


@pytest.mark.parametrize("opset", [16, "17", 17.0])
def test_an_unknown_opset_is_refused(opset, own_network, tmp_path):
    with pytest.raises(ExportError, match=f"opset_version={opset!r} .*the numbers 17, 18, 21"):
        export_onnx(own_network, tmp_path / "model.onnx", opset_version=opset)


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_is_done(package, own_network, tmp_path, monkeypatch):
    for module in ("onnx", "verify"):
        monkeypatch.setattr(f"hf_qat.export.{module}.find_spec", lambda name: None if name == package else name)
    with pytest.raises(ExportError, match=r"pip install \"hf_qat\[export\]\""):
        export_onnx(own_network, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_another_size_are_refused(own_network, tmp_path):
    with pytest.raises(CaptureError, match="16"):
        export_onnx(own_network, tmp_path / "model.onnx", torch.randn(1, 3, 20, 20))


def test_a_failing_export_leaves_the_old_file_and_nothing_else(own_network, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")

    def fail(*arguments: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr("hf_qat.export.onnx.verify_onnx", fail)
    with pytest.raises(ExportError, match="^no$"):
        export_onnx(own_network, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"the old file"


class Sorted(nn.Module):
    """Ends in an operation that has no ONNX operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(self.conv(x))


def test_an_operation_without_an_onnx_operator_is_named(tmp_path):
    model = prepare_qat(Sorted(), QATConfig(), torch.randn(2, 3, 8, 8))
    convert(calibrate(model, [torch.randn(2, 3, 8, 8)]))
    with pytest.raises(ExportError, match="matrix_exp"):
        export_onnx(model, tmp_path / "model.onnx")


def test_a_converted_model_that_is_not_finite_is_refused_by_the_name_of_the_tensor(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(exclude="head"), x), [x]))
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"cannot export: head\.bias of HandWritten holds NaN"):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimized", [False, True], ids=["optimizations off", "optimizations on"])
def test_a_file_that_computes_something_else_is_not_written_and_the_earlier_one_stays(
    optimized, own_network, tmp_path, monkeypatch
):
    path, x = tmp_path / "model.onnx", torch.randn(4, 3, 16, 16)
    export_onnx(own_network, path, x)
    earlier = path.read_bytes()
    run = Session.run

    def garbage(self: Session, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = run(self, inputs)
        return [-y for y in outputs] if self.optimized == optimized else outputs

    monkeypatch.setattr(Session, "run", garbage)
    setting = "on" if optimized else "off"
    with pytest.raises(ExportError, match=rf"\(optimizations {setting}\) computes something else .* by 200% of their"):
        export_onnx(own_network, path, x)
    assert path.read_bytes() == earlier and [*tmp_path.iterdir()] == [path]


class OneByOne(nn.Module):
    """Goes through the images of a batch in a loop of Python, whose length the exporter cannot leave free."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(image[None]) for image in x])


def test_a_batch_that_cannot_be_left_free_is_refused_and_one_image_at_a_time_is_quantized(tmp_path):
    x = torch.randn(4, 4)
    model = convert(calibrate(prepare_qat(OneByOne().eval(), QATConfig(), x), [x]))
    with pytest.raises(FixedBatchError):
        export_onnx(model, tmp_path / "free.onnx", x, dynamic_batch=True)
    export_onnx(model, tmp_path / "one.onnx", x)
    operators = [node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node]
    assert operators.count("QuantizeLinear") == 2 and not (tmp_path / "free.onnx").exists()


class Returning(nn.Module):
    """A convolution, its activation and scores of it, in the form that `give` brings them into."""

    def __init__(self, give) -> None:
        super().__init__()
        self.conv, self.head, self.give = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), give

    def forward(self, x: Tensor, relu: Tensor) -> object:
        conv = self.conv(x)
        pooled = conv.relu().mean((2, 3))
        return self.give(conv, pooled, self.head(pooled) + relu, relu)


#: What a model returns, and the names of the outputs in its file, where those that it has itself are taken.
NAMED = {
    "as inputs are": (lambda conv, pooled, y, relu: {"x": y, "relu": conv}, ["x_1", "relu_1"]),
    "as operations are": (lambda conv, pooled, y, relu: {"conv2d": y, "mean": conv, "add": 2 * y}, None),
    "as weights are": (lambda conv, pooled, y, relu: {"conv.weight": y, "head.bias": pooled}, None),
    "as others in a tuple": (
        lambda conv, pooled, y, relu: {"a": (y, conv), "a_0": pooled},
        ["a_0", "a_1", "a_0_1"],
    ),
    "an input itself": (lambda conv, pooled, y, relu: (y, relu), ["output_0", "output_1"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_in_the_file_are_those_of_the_model_and_each_is_there_once(case, run_onnx, tmp_path):
    torch.manual_seed(0)
    give, names = NAMED[case]
    inputs = torch.randn(3, 3, 8, 8), torch.randn(3, 2)
    model = convert(calibrate(prepare_qat(Returning(give).eval(), QATConfig(), inputs), [inputs]))
    result = model(*inputs)
    report = export_onnx(model, tmp_path / "model.onnx", inputs, dynamic_batch=True)
    file = onnx.load(report.path)
    assert [value.name for value in file.graph.input] == ["x", "relu"]
    assert [value.name for value in file.graph.output] == (names or list(result))
    expected = result.values() if isinstance(result, dict) else result
    leaves = [leaf for value in expected for leaf in (value if isinstance(value, tuple) else [value])]
    for wanted, got in zip(leaves, run_onnx(file, *(x.numpy() for x in inputs)), strict=True):
        np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-5)


class Scaled(nn.Module):
    """Scores times a number, which is the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, factor: Tensor, x: Tensor, **others: Tensor) -> Tensor:
        return self.head(x) * factor + others["shift"]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_single_number_is_an_input_without_a_batch_and_keywords_keep_their_names(batch, run_onnx, tmp_path):
    inputs = {"factor": torch.tensor(0.5), "x": torch.randn(batch, 4), "shift": torch.randn(batch, 2)}
    model = convert(calibrate(prepare_qat(Scaled().eval(), QATConfig(), inputs), [inputs]))
    report = export_onnx(model, tmp_path / "model.onnx", inputs)
    file = onnx.load(report.path)
    shapes = {v.name: [size.dim_value for size in v.type.tensor_type.shape.dim] for v in file.graph.input}
    assert shapes == {"factor": [], "x": [1, 4], "shift": [1, 2]}
    assert report.samples == batch and report.plain.max_abs_diff < 1e-5
    one = {name: value[:1] if value.dim() else value for name, value in inputs.items()}
    got = run_onnx(file, *(value.numpy() for value in one.values()))[0]
    np.testing.assert_allclose(got, model(**one).detach().numpy(), atol=1e-5)
