from __future__ import annotations

import pickle

import pytest
import torch

from hf_qat.quantization.operation_pickling import overload_named, register


aten = torch.ops.aten


@pytest.mark.parametrize("operation", [aten.conv2d.default, aten.conv_transpose2d.input, aten.sym_size.int])
def test_an_operation_comes_out_of_a_pickle_as_itself(operation):
    register()
    assert pickle.loads(pickle.dumps(operation)) is operation


def test_an_operation_is_found_by_its_name_and_overload():
    assert overload_named("aten::add", "Tensor") is aten.add.Tensor
