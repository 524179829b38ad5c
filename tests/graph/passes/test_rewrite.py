import copy

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, export_onnx, fake_quant_disabled, prepare_qat
from hf_qat.graph.capture.capture import capture
from hf_qat.graph.passes.rewrite import rewrite


class Call(nn.Module):
    """A function of one tensor."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class FrozenNorm(nn.Module):
    """DETR's, with its statistics in buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


class LinearNorm(nn.Module):
    """LeViT's linear layer with a batch norm over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def attend(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x.roll(1, 2), x.flip(2), attn_mask=torch.eye(6))


#: Name → module, input of one sample, the operation that must go, the ones that must come.
CASES = {
    "attention": (Call(attend), (2, 6, 4), "scaled_dot_product_attention", ["matmul", "softmax"]),
    "unfold": (Call(lambda x: functional.unfold(x, 2, stride=2)), (4, 6, 8), "im2col", ["permute"]),
    "fold": (Call(lambda x: functional.fold(x, (6, 8), 2, stride=2)), (16, 12), "col2im", ["permute"]),
    "einsum of attention": (
        Call(lambda x: torch.einsum("bhlk,bhtk->bhlt", x, x.roll(1, 2))),
        (2, 6, 4),
        "einsum",
        ["matmul"],
    ),
    "einsum of masks": (
        Call(lambda x: torch.einsum("bqc,bchw->bqhw", x.flatten(2).transpose(1, 2), x)),
        (4, 3, 5),
        "einsum",
        ["matmul"],
    ),
    "einsum over the batch": (
        Call(lambda x: torch.einsum("bhwc,hkc->bhwk", x, torch.ones(2, 5, 4))),
        (2, 6, 4),
        "einsum",
        ["matmul"],
    ),
    "masked bmm": (Call(lambda x: torch.baddbmm(x, x, x.roll(1, 1))), (5, 5), "baddbmm", ["bmm", "add"]),
    "frozen batch norm": (FrozenNorm(), (4, 3, 3), "rsqrt", ["batch_norm"]),
    "linear and batch norm": (LinearNorm(), (3, 6), "reshape_as", ["batch_norm"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_rewrite_computes_the_same_at_any_batch_size(name):
    module, shape, gone, come = CASES[name]
    inputs = [torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)) for batch in (1, 2, 5)]
    expected = [module.eval()(x) for x in inputs]
    captured = capture(module, inputs[1])[""]
    rewrite({"": captured})
    operations = {str(node.target).split(".")[1] for node in captured.graph.nodes if "." in str(node.target)}
    assert gone not in operations and operations >= set(come)
    for x, result in zip(inputs, expected, strict=True):
        torch.testing.assert_close(module(x), result)


class Attention(nn.Module):
    """`scaled_dot_product_attention` with what it may be asked for, between two linear layers."""

    def __init__(self, heads: int, masked: bool, **options) -> None:
        super().__init__()
        self.heads, self.masked, self.options = heads, masked, options
        groups = 2 if options.get("enable_gqa") else heads
        self.query, self.rest = nn.Linear(8, heads * 4), nn.Linear(8, 2 * groups * 4)
        self.last = nn.Linear(heads * 4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        key, value = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.rest(x).chunk(2, -1))
        mask = mask[:, None, None] & mask[:, None, :, None] if self.masked else None
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, **self.options)
        return self.last(mixed.transpose(1, 2).flatten(2))


ATTENTIONS = {
    "mask of truth values": (4, True, {}),
    "causal": (4, False, {"is_causal": True}),
    "grouped queries": (4, False, {"enable_gqa": True}),
    "grouped queries with a mask and a scale": (6, True, {"enable_gqa": True, "scale": 0.3}),
    "dropout": (4, True, {"dropout_p": 0.3}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_with_any_argument_is_quantized_and_is_that_of_torch_in_outputs_and_gradients(name):
    heads, masked, options = ATTENTIONS[name]
    torch.manual_seed(0)
    float_model = Attention(heads, masked, **options)
    x = torch.randn(4, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0])[:, None]  # the last image has nothing to attend to
    model = copy.deepcopy(float_model)
    prepare_qat(model, QATConfig(), (x, mask))
    operations = {str(node.target).split(".")[1] for node in model.graph.nodes if "." in str(node.target)}
    assert operations >= {"matmul", "softmax"} and "scaled_dot_product_attention" not in operations
    outputs, gradients = [], []
    for m in (model, float_model):
        torch.manual_seed(1)
        with fake_quant_disabled(model):
            outputs.append(m(x, mask))
        outputs[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in m.named_parameters() if "_quantizer" not in name})
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "dropout"])
def test_attention_with_any_argument_is_exported_quantized(name, tmp_path):
    heads, masked, options = ATTENTIONS[name]
    torch.manual_seed(0)
    float_model = Attention(heads, masked, **options).eval()
    x = torch.randn(8, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0, 5, 4, 2, 6])[:, None]
    expected = float_model(x, mask)
    model = calibrate(prepare_qat(copy.deepcopy(float_model), QATConfig(), (x, mask)), [(x, mask)])
    assert (model(x, mask) - expected).norm() < 0.1 * expected.norm()
    report = export_onnx(convert(model), tmp_path / "attention.onnx", (x, mask))
    assert report.plain.relative_error < 0.01 and report.optimized.relative_error < 0.01


def test_windows_that_overlap_stay_an_unfolding():
    module = Call(lambda x: functional.unfold(x, 3, stride=1))
    captured = capture(module, torch.randn(2, 4, 6, 8))[""]
    rewrite({"": captured})
    assert any("im2col" in str(node.target) for node in captured.graph.nodes)


@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        pytest.param((3, 4, 12, 12), nn.AvgPool2d(3, divisor_override=2), id="plain"),
        pytest.param((3, 4, 12, 11), nn.AvgPool2d(3, stride=2, padding=1, divisor_override=5), id="padded"),
        pytest.param((3, 4, 12, 11), nn.AvgPool2d((2, 3), stride=(3, 2), divisor_override=4), id="two sizes"),
        pytest.param(
            (3, 4, 12, 11), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, divisor_override=7), id="ceil and padded"
        ),
        pytest.param((3, 4, 11, 12), nn.AvgPool2d(2, ceil_mode=True, divisor_override=7), id="ceil"),
        pytest.param(
            (3, 4, 12, 12), nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=9), id="not counted"
        ),
        pytest.param((3, 4, 6, 7, 8), nn.AvgPool3d(2, 2, 1, ceil_mode=True, divisor_override=3), id="three axes"),
    ],
)
def test_average_pooling_with_a_divisor_of_its_own_is_right_in_torch_and_in_onnx(shape, pool, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    conv = nn.Conv3d if x.dim() == 5 else nn.Conv2d
    model = nn.Sequential(conv(4, 4, 1), pool).eval()
    with torch.no_grad():
        wanted = model(x)
        prepare_qat(model, QATConfig(), x)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), wanted)
        calibrate(model, [x])
        report = export_onnx(convert(model), tmp_path / "model.onnx", x)
        assert report.max_output_lsb <= 1
        assert (model(x) - wanted).norm() / wanted.norm() < 0.02


class Scattered(nn.Module):
    """A write to a slice as torch's functionalization leaves it."""

    def __init__(self, *where: int) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dim, start, end = self.where
        return torch.slice_scatter(x, x.narrow(dim, start, end - start) * 2, dim, start, end)


@pytest.mark.parametrize(("where", "pieces"), [((-1, 0, 2), 2), ((1, 1, 4), 3), ((2, 2, 6), 2), ((1, 0, 5), 1)])
def test_what_is_written_to_a_slice_becomes_a_concatenation_without_empty_pieces(where, pieces):
    model = Scattered(*where)
    captured = capture(model, torch.randn(2, 5, 6))
    rewrite(captured)
    assert not any("slice_scatter" in str(node.target) for node in captured[""].graph.nodes)
    joined = [node for node in captured[""].graph.nodes if node.target is torch.ops.aten.cat.default]
    assert [len(node.args[0]) for node in joined] == ([pieces] if pieces > 1 else [])
    x = torch.randn(3, 5, 6)
    assert torch.equal(model(x), Scattered(*where)(x))


def test_a_pool_that_covers_its_map_is_a_mean():
    pool = nn.AvgPool2d(64, ceil_mode=True)
    model = nn.Sequential(pool)
    captured = capture(model, torch.randn(2, 3, 7, 5))
    rewrite(captured)
    assert any("mean" in str(node.target) for node in captured[""].graph.nodes)
    x = torch.randn(4, 3, 7, 5)
    torch.testing.assert_close(model(x), x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(model(x), nn.functional.avg_pool2d(x, 64, ceil_mode=True))


class Chosen(nn.Module):
    """The rows with the best scores, as a two-stage detector takes its queries; many scores are equal."""

    def __init__(self, largest: bool = True) -> None:
        super().__init__()
        self.linear, self.largest = nn.Linear(6, 3), largest

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.linear(x.round()).amax(-1).round()
        values, places = torch.topk(scores, 7, dim=1, largest=self.largest)
        return values, places, torch.gather(x, 1, places.unsqueeze(-1).expand(-1, -1, 6))


@pytest.mark.parametrize("largest", [True, False])
def test_of_equal_scores_the_first_is_chosen(largest):
    torch.manual_seed(0)
    model, x = Chosen(largest), torch.randn(3, 40, 6)
    with torch.no_grad():
        wanted = model(x)[0]
        scores = model.linear(x.round()).amax(-1).round()
        captured = capture(model, x)
        rewrite(captured)
        values, places, rows = model(x)
    order = np.argsort(-scores.numpy() if largest else scores.numpy(), axis=1, kind="stable")[:, :7]
    assert any(len(set(row.tolist())) < 7 for row in wanted)
    torch.testing.assert_close(values, wanted)
    np.testing.assert_array_equal(places.numpy(), order)
    torch.testing.assert_close(rows, torch.stack([image[place] for image, place in zip(x, places, strict=True)]))


def test_onnx_runtime_chooses_the_rows_that_torch_does_though_8_bit_scores_are_equal(tmp_path):
    torch.manual_seed(0)
    model, x = Chosen(), 0.6 * torch.randn(4, 40, 6)
    convert(calibrate(prepare_qat(model, QATConfig(), x), [x]).eval())
    report = export_onnx(model, tmp_path / "model.onnx", x)
    assert report.plain.max_abs_diff == report.optimized.max_abs_diff == 0
    nodes = {node.op_type: node for node in onnx.load(report.path).graph.node}
    counts = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(report.path).graph.initializer}
    assert counts[nodes["TopK"].input[1]].tolist() == [7] and "Slice" not in nodes
