"""Names of weights, against what transformers itself makes of a file that it has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_qat.checkpoints.key_names import native_names, without_wrapper
from tests.models import resnet, segformer, swin, vit


A, B = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("keys", "model", "expected"),
    [
        (["module.a", "module.b"], ["a", "b"], ["a", "b"]),
        (["module.a"], ["a"], ["a"]),
        (["module.a", "b"], ["a", "b"], ["module.a", "b"]),
        (["module.a"], ["module.a"], ["module.a"]),
        (["module.module.a"], ["module.a"], ["module.a"]),
        (["a", "b"], ["module.a", "module.b"], ["module.a", "module.b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"], ["a", "b"]),
        (["_orig_mod.a"], ["module.a"], ["module.a"]),
        (["module.a"], ["module.a", "head.b"], ["module.a"]),
        ([], ["a"], []),
    ],
    ids=[
        "of a wrapper",
        "of a wrapper of one",
        "one of two",
        "of the model",
        "of both",
        "of the model alone",
        "of two wrappers",
        "of another wrapper",
        "of a part of the model",
        "none",
    ],
)
def test_the_prefix_of_wrappers_becomes_the_models(keys: list[str], model: list[str], expected: list[str]):
    assert list(without_wrapper(dict.fromkeys(keys, A), model)) == expected


@pytest.mark.parametrize("make", [vit, swin, segformer, resnet])
def test_the_names_in_a_file_of_transformers_become_those_of_the_model(make: Callable[[], nn.Module], tmp_path: Path):
    model = make()
    model.save_pretrained(tmp_path)
    state = native_names(model, load_file(tmp_path / "model.safetensors"))
    own = model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


def test_a_key_that_the_model_has_no_name_for_keeps_its_own(tmp_path: Path):
    model = vit()
    model.save_pretrained(tmp_path)
    stored = {**load_file(tmp_path / "model.safetensors"), "decoder.weight": B}
    assert torch.equal(native_names(model, stored)["decoder.weight"], B)
