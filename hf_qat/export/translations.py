"""Adaptive pooling and stable sorting in the words of ONNX: what PyTorch's exporter translates badly, or not at all.

PyTorch writes pooling to a fixed grid (pyramid pooling) as `GatherND`, `Where` and transposes of six axes, which chips
leave to their CPU. Here bins of one size become `AveragePool` or `MaxPool`. Averages of other bins become a product
with a constant matrix, each of whose columns averages one bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hf_qat.config.targets import TensorScheme
from hf_qat.errors import ExportError
from hf_qat.export.pair_translations import pairs


aten = torch.ops.aten

#: The largest code of a symmetric int8 weight.
LARGEST_CODE = 127


def translations(weights: TensorScheme) -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` for `torch.onnx.export`.

    Args:
        weights: how the target rounds weights, and so the constant matrices.
    """
    from onnxscript import FLOAT  # an optional dependency

    def average(x: Any, output_size: Any) -> Any:
        return _average(x, list(output_size), weights)

    def largest(x: Any, output_size: Any) -> Any:
        return _largest(x, list(output_size))

    def sort(self: Any, stable: Any, dim: Any = -1, descending: Any = False) -> Any:
        return _sort(self, dim, descending)

    sort.__annotations__ = {"self": FLOAT, "stable": bool, "dim": int, "descending": bool, "return": FLOAT}
    for function in (average, largest):  # the exporter reads the types of what it translates
        function.__annotations__ = {"x": FLOAT, "output_size": Sequence[int], "return": FLOAT}
    return {
        **pairs(),
        aten.adaptive_avg_pool2d.default: average,
        aten._adaptive_avg_pool2d.default: average,
        aten.adaptive_max_pool2d.default: largest,
        aten.sort.stable: sort,
    }


def _average(x: Any, grid: list[int], weights: TensorScheme) -> Any:
    """(…, C, H, W) → (…, C, *grid)."""
    from onnxscript import opset18 as op

    size = _size(x)
    if len(x.shape) == 3:
        image = op.Unsqueeze(x, _integers(op, 0))
        return op.Squeeze(_average_images(op, image, size, grid, weights), _integers(op, 0))
    return _average_images(op, x, size, grid, weights)


def _average_images(op: Any, x: Any, size: list[int], grid: list[int], weights: TensorScheme) -> Any:
    if grid == [1, 1]:
        return op.GlobalAveragePool(x)
    windows = _windows(size, grid)
    if windows is not None:
        return op.AveragePool(x, kernel_shape=windows[0], strides=windows[1])
    codes, scale = quantize_matrix(averaging_matrix(size, grid), weights)
    matrix = op.DequantizeLinear(
        _constant(op, codes), _constant(op, scale), _constant(op, np.zeros(scale.shape, np.int8)), axis=1
    )
    flat = op.Reshape(x, _integers(op, 0, 0, -1))
    return op.Reshape(op.MatMul(flat, matrix), _integers(op, 0, 0, *grid))


def _largest(x: Any, grid: list[int]) -> Any:
    """(N, C, H, W) → (N, C, *grid), and the places of these in the plane; ONNX counts them from the first image on."""
    from onnxscript import opset18 as op

    size = _size(x)
    windows = _windows(size, grid)
    if windows is None:
        raise ExportError(f"adaptive max pooling of {size} to {grid} has bins that no pool of ONNX has")
    values, places = op.MaxPool(x, kernel_shape=windows[0], strides=windows[1])
    return values, op.Mod(places, _integers(op, size[0] * size[1]))


def _sort(x: Any, axis: int, descending: bool) -> Any:
    """Values and places; of equal values the first comes first, which is how ONNX defines `TopK`."""
    from onnxscript import opset18 as op

    size = x.shape[axis]
    count = _integers(op, size) if isinstance(size, int) else op.Gather(op.Shape(x), _integers(op, axis))
    return op.TopK(x, count, axis=axis, largest=int(descending), sorted=1)


def _size(x: Any) -> list[int]:
    """Height and width."""
    size = list(x.shape[-2:])
    if not all(isinstance(length, int) for length in size):
        raise ExportError(f"adaptive pooling needs a fixed height and width to be exported, and has {size}")
    return size


def _windows(size: Sequence[int], grid: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Kernel and strides of a pool that has these bins, if there is one: all of one size, at one distance."""
    kernel, strides = [], []
    for length, bins in zip(size, grid, strict=True):
        edges = _edges(length, bins)
        sizes, steps = {end - start for start, end in edges}, {b[0] - a[0] for a, b in pairwise(edges)}
        if len(sizes) > 1 or len(steps) > 1:
            return None
        kernel.append(sizes.pop())
        strides.append(steps.pop() if steps else 1)
    return (kernel, strides) if 0 not in strides else None


def averaging_matrix(size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
    """(H · W, h · w) float64: a flat image times this matrix is the average of each bin."""
    height, width = (_bins(length, bins) for length, bins in zip(size, grid, strict=True))
    return np.kron(height, width).T


def _bins(length: int, bins: int) -> np.ndarray:
    """(bins, length): each row averages one bin."""
    rows = np.zeros((bins, length))
    for row, (start, end) in zip(rows, _edges(length, bins), strict=True):
        row[start:end] = 1 / (end - start)
    return rows


def _edges(length: int, bins: int) -> list[tuple[int, int]]:
    """Where each bin starts and ends: ⌊k · length / bins⌋, ⌈(k + 1) · length / bins⌉, as in `nn.AdaptiveAvgPool2d`."""
    return [(k * length // bins, -((k + 1) * length // -bins)) for k in range(bins)]


def quantize_matrix(matrix: np.ndarray, weights: TensorScheme) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and float32 scales, () or one for each column; per column they stand for the matrix exactly.

    Every number of a column that is not 0 is the same, so that its code is 127.
    """
    largest = matrix.max(axis=0) if weights.per_channel else np.asarray(matrix.max())
    scale = largest / LARGEST_CODE
    if weights.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    return np.rint(matrix / scale).astype(np.int8), scale.astype(np.float32)


def _constant(op: Any, value: np.ndarray) -> Any:
    from onnx import numpy_helper

    return op.Constant(value=numpy_helper.from_array(np.asarray(value)))


def _integers(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))
