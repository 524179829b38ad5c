"""The files of the devices' targets against TI's table of layer restrictions, read here by `onnx` alone."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, export_tidl, prepare_qat
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import LABELS, spread
from tests.tidl.cases import on_devices


#: Operators of the layers that are "Symmetric, Per-tensor" in docs/quantization.md, and those that require a pair.
SYMMETRIC = set(
    "MaxPool AveragePool GlobalAveragePool Sigmoid Tanh HardSigmoid Elu Relu Resize ReduceMin ReduceMax Gather Slice "
    "Split Pad Squeeze ScatterElements GridSample DepthToSpace Mul Div Sub Max Min ConvTranspose PRelu".split()
)
WANTS_PAIR = SYMMETRIC - {"Slice", "Split", "Pad", "Squeeze"} | set(
    "Conv Gemm Softmax Concat LayerNormalization Add".split()
)
MOVES = {"Reshape", "Transpose", "Flatten"}


class File:
    """A Q/DQ file, and which of its layers deviate from the table."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def zero_before(self, name: str) -> int:
        """The zero point of the activation that a value is, 0 if it comes from no pair."""
        node = self.makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.makers.get(node.input[0])
        activation = node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in self.tensors
        return int(self.tensors[node.input[2]].ravel()[0]) if activation else 0

    def pairs_after(self, name: str) -> list[int]:
        """Zero points of the pairs after a value, through what moves it, and a bias or a ReLU that belongs to it."""
        found = []
        for node in self.readers.get(name, []):
            constant = any(self.is_constant(other) for other in node.input)
            if node.op_type == "QuantizeLinear":
                found.append(int(self.tensors[node.input[2]].ravel()[0]))
            elif node.op_type in MOVES | {"Relu", "Clip"} or (node.op_type in ("Add", "Mul", "Div") and constant):
                found += self.pairs_after(node.output[0])
        return found

    def is_constant(self, name: str) -> bool:
        node = self.makers.get(name)
        return name in self.tensors or (node is not None and node.input and node.input[0] in self.tensors)

    def inside(self, node: onnx.NodeProto) -> bool:
        """Whether a node is inside SiLU, x · sigmoid(x), or GELU, x · ½ · (1 + erf(x / √2))."""
        readers = self.readers.get(node.output[0], [])
        if node.op_type == "Sigmoid":
            return any(reader.op_type == "Mul" and node.input[0] in reader.input for reader in readers)
        leads_on = any(reader.op_type == "Mul" for reader in readers)
        return any(reader.op_type == "Erf" for reader in readers) or (leads_on and self.comes_from_erf(node, 2))

    def comes_from_erf(self, node: onnx.NodeProto, steps: int) -> bool:
        """Whether an `Erf` lies at most so many nodes back."""
        makers = [self.makers[name] for name in node.input if name in self.makers]
        near = any(maker.op_type == "Erf" for maker in makers)
        return near or (steps > 1 and any(self.comes_from_erf(maker, steps - 1) for maker in makers))

    def deviations(self) -> set[tuple[str, str]]:
        """(what, name of the layer)."""
        found = set()
        for value in self.graph.input:
            if any(self.pairs_after(value.name)):
                found.add(("input", value.name))
        for node in self.graph.node:
            activations = [name for name in node.input if not self.is_constant(name)]
            product = node.op_type == "MatMul" and len(activations) == 2
            if node.op_type in SYMMETRIC or product:
                zeros = [self.zero_before(name) for name in activations] + self.pairs_after(node.output[0])
                if any(zeros):
                    found.add(("zero point", node.name or node.output[0]))
            if node.op_type in WANTS_PAIR and not self.pairs_after(node.output[0]) and not self.inside(node):
                found.add(("pair", node.name or node.output[0]))
            weights = self.makers.get(node.input[1]) if node.op_type == "ConvTranspose" else None
            if weights is not None and self.tensors[weights.input[1]].size > 1:
                found.add(("channels", node.name))
        return found


def efficientnet() -> nn.Module:
    """Two blocks, with SiLU and squeeze-excite."""
    config = transformers.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 24],
        depthwise_padding=[],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 6],
        hidden_dim=320,
        num_labels=LABELS,
    )
    return spread(transformers.EfficientNetForImageClassification(config))


@pytest.fixture(scope="module")
def files(bundled, tmp_path_factory):
    """`files(name, device)`: the bundle's model, and its `check.json`."""
    made = {}

    def get(name: str, device: str) -> tuple[File, dict]:
        if name != "efficientnet":
            directory = bundled(name, device)
        else:
            scheme = "TDA4VM" if device == "TDA4VM" else "AM68A"
            if scheme not in made:
                pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
                model = prepare_qat(efficientnet(), QATConfig(scheme), pixels)
                made[scheme] = convert(calibrate(model, [pixels]))
            pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            directory = export_tidl(made[scheme], tmp_path_factory.mktemp("net") / "b", device, [pixels])
        (path,) = (directory / "model").iterdir()
        return File(onnx.load(path).graph), json.loads((directory / "check.json").read_text())

    return get


#: Nets that take long to export.
SLOW = ("mobilenet_v2", "segformer")


@pytest.mark.parametrize(("name", "device"), on_devices(("resnet", "efficientnet", "vit", *SLOW), SLOW))
def test_no_file_deviates_from_tis_table_and_check_tidl_agrees(name, device, files):
    file, check = files(name, device)
    assert file.deviations() == set()
    rules = {"asymmetric-input", "asymmetric-layer", "asymmetric-product", "pair-missing", "pair-inside"}
    assert [issue for issue in check["issues"] if issue["rule"] in rules | {"per-channel-weights"}] == []


def small(*layers: nn.Module) -> nn.Module:
    return spread(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers)).eval()


#: A network → its last quantizer, and whether that one may have a zero point on AM68A by TI's table.
CASES = {
    "convolution": (lambda: small(), "0", True),
    "average pooling": (lambda: small(nn.AvgPool2d(2)), "1", False),
    "max pooling": (lambda: small(nn.MaxPool2d(2)), "0", False),
    "resize": (lambda: small(nn.Upsample(scale_factor=2, mode="bilinear")), "1", False),
    "tanh": (lambda: small(nn.Tanh()), "1", False),
    "GELU": (lambda: small(nn.GELU()), "1", False),
    "layer norm": (lambda: small(nn.LayerNorm([8, 8])), "1", True),
    "transposed convolution": (lambda: small(nn.ConvTranspose2d(4, 4, 2, stride=2)), "1", False),
}


def zero_points(model: nn.Module) -> dict[str, bool]:
    """Whether each activation of a prepared `small` network may have a zero point: `input`, `0`, `1`."""
    found = {path.partition("_q")[0].partition(".")[0]: q for path, q in fake_quantizers(model).items()}
    return {name: not q.spec.symmetric for name, q in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_zero_points_are_where_the_table_has_them(case):
    make, last, expected = CASES[case]
    x = torch.randn(2, 3, 8, 8)
    before = zero_points(prepare_qat(make(), QATConfig("AM68A", layer_restrictions=False), x))
    after = zero_points(prepare_qat(make(), QATConfig("AM68A"), x))
    assert before["input"] and before[last] and not after["input"]
    assert after[last] == expected


def test_the_input_keeps_its_zero_point_if_the_recipe_says_so():
    x = torch.randn(2, 3, 8, 8)
    config = QATConfig("AM68A", symmetric_input=False)
    assert zero_points(prepare_qat(small(nn.AvgPool2d(2)), config, x)) == {"input": True, "0": False, "1": False}


def test_transposed_convolutions_have_one_scale_on_devices_only(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    sizes = {}
    for target in ("int8", "AM68A"):
        model = convert(
            calibrate(prepare_qat(small(nn.ConvTranspose2d(4, 4, 2, stride=2)), QATConfig(target), x), [x])
        )
        export_onnx(model, tmp_path / "m.onnx", x)
        file = File(onnx.load(tmp_path / "m.onnx").graph)
        (node,) = (node for node in file.graph.node if node.op_type == "ConvTranspose")
        sizes[target] = file.tensors[file.makers[node.input[1]].input[1]].size
    assert sizes == {"int8": 4, "AM68A": 1}


def test_a_convolution_is_rounded_before_silu_on_devices_only():
    x = torch.randn(2, 3, 8, 8)
    counts = {}
    for target in ("int8", "AM68A", "TDA4VM"):
        model = prepare_qat(small(nn.SiLU()), QATConfig(target), x)
        counts[target] = len([path for path in fake_quantizers(model) if not path.endswith("weight_quantizer")])
    assert counts == {"int8": 2, "AM68A": 3, "TDA4VM": 3}


@pytest.mark.parametrize("target", ["AM68A", "w4a4"])
def test_a_saved_recipe_from_before_there_were_restrictions_stays_without(target):
    data = QATConfig(target).to_dict()
    assert data.pop("layer_restrictions") is True
    old = QATConfig.from_dict(data)
    assert not old.layer_restrictions and old.to_dict() == data
    assert QATConfig.from_dict(QATConfig(target).to_dict()) == QATConfig(target) != old
    assert np.all([key not in QATConfig("int8").to_dict() for key in ("layer_restrictions", "symmetric_input")])
