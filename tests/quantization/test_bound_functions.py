"""What is called in place of an operation of a graph computes the same of the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_qat.quantization.bound_functions import BOUND


aten = torch.ops.aten

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
IMAGES = {dims: torch.randn(2, 3, *range(5, 5 + dims)) for dims in (1, 2, 3)}
KERNELS = {dims: torch.randn(4, 3, *[2] * dims) for dims in (1, 2, 3)}


def convolution(dims: int) -> tuple[Any, ...]:
    return IMAGES[dims], KERNELS[dims], torch.randn(4), [2] * dims, [1] * dims, [1] * dims, 1


def transposed(dims: int) -> tuple[Any, ...]:
    weight = KERNELS[dims].transpose(0, 1).contiguous()
    return IMAGES[dims], weight, torch.randn(4), [2] * dims, [1] * dims, [1] * dims, 1, [1] * dims


#: Operation → arguments, in the order of its schema, as they stand in a graph.
CASES: dict[Any, list[tuple[Any, ...]]] = {
    aten.add.Tensor: [(X, X), (X, 0.3)],
    aten.cat.default: [([X, X], 1)],
    aten.contiguous.default: [(X.transpose(1, 2),)],
    **{getattr(aten, f"conv{dims}d").default: [convolution(dims)] for dims in (1, 2, 3)},
    aten.conv_transpose1d.default: [transposed(1)],
    aten.conv_transpose2d.input: [transposed(2)],
    aten.conv_transpose3d.input: [transposed(3)],
    aten.div.Tensor: [(X, X.exp()), (X, 0.3)],
    aten.expand.default: [(X[:1], [2, -1, -1, -1])],
    aten.flatten.using_ints: [(X, 1), (X, 1, 2)],
    aten.gelu.default: [(X,)],
    aten.layer_norm.default: [(X, [5], torch.randn(5), torch.randn(5), 1e-6, False), (X, [4, 5])],
    aten.linear.default: [(X, torch.randn(7, 5), torch.randn(7)), (X, torch.randn(7, 5))],
    aten.matmul.default: [(X, X.transpose(2, 3))],
    aten.mul.Tensor: [(X, X), (X, 0.3)],
    aten.permute.default: [(X, [0, 2, 3, 1])],
    aten.relu.default: [(X,)],
    aten.reshape.default: [(X, [2, -1, 5])],
    aten.select.int: [(X, 1, 2)],
    aten.softmax.int: [(X, -1), (X, 1, torch.float64)],
    aten.sub.Tensor: [(X, X.exp()), (X, 0.3)],
    aten.sym_size.int: [(X, 2)],
    aten.to.dtype: [(X, torch.float16), (X, torch.float32, False, True)],
    aten.transpose.int: [(X, 1, 2)],
    aten.unsqueeze.default: [(X, 1)],
    aten.view.default: [(X, [2, 3, 20])],
}


@pytest.mark.parametrize("operation", BOUND, ids=str)
def test_values_and_layout_are_those_of_the_operation(operation: Any):
    for arguments in CASES[operation]:
        found, expected = BOUND[operation](*arguments), operation(*arguments)
        if isinstance(expected, Tensor):
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
            assert torch.equal(found, expected)
        else:
            assert found == expected


def test_options_have_the_names_of_the_schema():
    assert torch.equal(BOUND[aten.add.Tensor](X, X, alpha=2), aten.add.Tensor(X, X, alpha=2))
    assert torch.equal(BOUND[aten.gelu.default](X, approximate="tanh"), aten.gelu.default(X, approximate="tanh"))
    options = {"memory_format": torch.channels_last}
    assert BOUND[aten.contiguous.default](X, **options).stride() == aten.contiguous.default(X, **options).stride()
