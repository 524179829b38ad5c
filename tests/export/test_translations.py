"""Adaptive pooling against PyTorch's own, and as operators that chips have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.config.targets import TensorScheme
from hf_qat.errors import ExportError
from hf_qat.export.translations import averaging_matrix, quantize_matrix


sizes = st.tuples(st.integers(1, 17), st.integers(1, 17))
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(sizes, grids)
def test_a_flat_image_times_the_matrix_is_torchs_adaptive_average(size, grid):
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = functional.adaptive_avg_pool2d(image, grid)
    product = image.flatten(2).numpy() @ averaging_matrix(size, grid)
    np.testing.assert_allclose(product, wanted.flatten(2).numpy(), rtol=0, atol=1e-12)


@given(sizes, grids)
def test_codes_per_column_stand_for_the_matrix_and_powers_of_two_for_nearly_the_matrix(size, grid):
    matrix = averaging_matrix(size, grid)
    codes, scale = quantize_matrix(matrix, TensorScheme(per_channel=True))
    assert codes.dtype == np.int8 and scale.shape == (grid[0] * grid[1],)
    np.testing.assert_allclose(codes * scale, matrix, rtol=1e-6)
    codes, scale = quantize_matrix(matrix, TensorScheme(power_of_two=True))
    assert scale.shape == () and np.frexp(scale)[0] == 0.5 and abs(codes.astype(int)).max() <= 127
    assert abs(codes * scale - matrix).max() <= scale / 2


class Pooled(nn.Module):
    """A convolution, pooling to a fixed grid, and a convolution."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pool(self.first(x)))


MATRIX = ["Reshape", "MatMul", "Reshape"]

#: Pool → size of the image, target, the operators between the two convolutions.
CASES = {
    "bins of one size": (nn.AdaptiveAvgPool2d(4), (8, 12), "int8", ["AveragePool"]),
    "bins of one size that overlap": (nn.AdaptiveAvgPool2d((3, 1)), (7, 5), "int8", ["AveragePool"]),
    "bins of two sizes": (nn.AdaptiveAvgPool2d((3, 6)), (8, 7), "AM68A", MATRIX),
    "powers of two": (nn.AdaptiveAvgPool2d(3), (8, 7), "TDA4VM", MATRIX),
    "the whole image": (nn.AdaptiveAvgPool2d(1), (7, 5), "int8", ["GlobalAveragePool"]),
    "the largest": (nn.AdaptiveMaxPool2d(4), (8, 12), "int8", ["MaxPool"]),
}


@pytest.mark.parametrize("case", CASES)
def test_pooling_to_a_grid_is_one_operator_that_onnx_runtime_computes_as_torch_does(case, tmp_path: Path):
    pool, size, target, operators = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(3, 3, *size)
    model = convert(calibrate(prepare_qat(Pooled(pool), QATConfig(target), x), [x]).eval())
    report = export_onnx(model, tmp_path / "model.onnx", x, dynamic_batch=case == "bins of two sizes")
    assert report.max_output_lsb <= 1 and not report.float_ops
    nodes = [node.op_type for node in onnx.load(report.path).graph.node if "Linear" not in node.op_type]
    assert nodes == ["Conv", *operators, "Conv"]


def test_the_largest_of_bins_of_two_sizes_is_refused_with_both(tmp_path: Path):
    x = torch.randn(2, 3, 8, 8)
    model = convert(calibrate(prepare_qat(Pooled(nn.AdaptiveMaxPool2d(3)), QATConfig(), x), [x]).eval())
    with pytest.raises(ExportError, match=r"adaptive max pooling of \[8, 8\] to \[3, 3\] has bins"):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


class Places(nn.Module):
    """The largest of each bin of a convolution's result, with or without its place in the plane."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 1), nn.AdaptiveMaxPool2d(4, return_indices=places)

    def forward(self, x: torch.Tensor) -> object:
        return self.pool(self.conv(x))


@pytest.mark.parametrize("places", [False, True])
def test_places_of_the_largest_are_counted_in_each_plane_and_left_out_where_nobody_asks(places: bool, tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 12)
    model = convert(calibrate(prepare_qat(Places(places).eval(), QATConfig(), x), [x]))
    export_onnx(model, tmp_path / "model.onnx", x, dynamic_batch=True)
    file = onnx.load(tmp_path / "model.onnx")
    (pool,) = [node for node in file.graph.node if node.op_type == "MaxPool"]
    assert len(pool.output) == (2 if places else 1)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    results, expected = session.run(None, {"x": x.numpy()}), model(x)
    for got, wanted in zip(results, expected if places else [expected], strict=True):
        np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-6)
