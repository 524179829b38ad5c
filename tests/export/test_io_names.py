from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_qat.export.io_names import bind, dynamic_batch, example_of, input_names, input_tensors, named_outputs


class Many(nn.Module):
    def forward(self, image, levels, flag=True, *, mask=None):
        return image


def test_inputs_are_named_after_their_arguments_and_numbered_in_tuples():
    image, low, high, mask = (torch.randn(2, n) for n in (1, 2, 3, 4))
    bound = bind(Many(), (image, [low, high]), {"mask": mask})
    assert input_names(bound) == ["image", "levels_0", "levels_1", "mask"]
    assert all(a is b for a, b in zip(input_tensors(bound), [image, low, high, mask], strict=True))


def test_every_tensor_gets_a_dynamic_first_axis_and_a_constant_none():
    bound = bind(Many(), (torch.randn(2, 3), (torch.randn(2), torch.tensor(1.0))), {"flag": False})
    assert dynamic_batch(bound) == {"image": {0: "batch"}, "levels": ({0: "batch"}, None), "flag": None}


def test_outputs_are_named_by_keys_or_numbered():
    a, b = torch.zeros(1), torch.ones(1)
    assert [name for name, _ in named_outputs(a)] == ["output"]
    assert [name for name, _ in named_outputs((a, b))] == ["output_0", "output_1"]
    result = BaseModelOutput(last_hidden_state=a, hidden_states=(a, b))
    assert [name for name, _ in named_outputs(result)] == ["last_hidden_state", "hidden_states_0", "hidden_states_1"]


def test_an_example_has_the_captured_shapes(converted):
    example = example_of(converted("resnet"))
    assert list(example) == ["pixel_values"]
    assert example["pixel_values"].shape == (2, 3, 32, 32)


def test_nested_outputs_of_one_name_are_told_apart_and_others_keep_theirs():
    a, b, c, d = (torch.full((1,), float(k)) for k in range(4))
    tree = {"last": a, "predictor": {"last": b, "target": c}, "target_of": (d, a)}
    names = [(name, float(tensor)) for name, tensor in named_outputs(tree)]
    assert names == [("last", 0), ("predictor_last", 1), ("target", 2), ("target_of_0", 3), ("target_of_1", 0)]
