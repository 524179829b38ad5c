"""`load_state_dict` of a prepared model: which checkpoints it takes, and what becomes of the ranges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat.errors import StageError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state_dict import quantizer_state
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, made_once, spread


def pixels(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@made_once
def calibrated(seed: int = 1) -> nn.Module:
    model = prepare_qat(spread(hand_written(), seed), example_inputs=pixels(1))
    return calibrate(model, [pixels()], bias_correction=False).eval()


@pytest.fixture
def float_model() -> nn.Module:
    return spread(hand_written(), 7).eval()


def test_a_float_checkpoint_loads_strictly_and_computes_what_the_float_model_does(float_model: nn.Module) -> None:
    model = calibrated()
    result = model.load_state_dict(float_model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad(), fake_quant_disabled(model):
        torch.testing.assert_close(model(pixels()), float_model(pixels()), rtol=0, atol=1e-4)


def test_after_a_float_checkpoint_ranges_are_to_be_collected(float_model: nn.Module) -> None:
    model = calibrated()
    assert all(int(quantizer.observed) == 1 for quantizer in fake_quantizers(model).values())
    model.load_state_dict(float_model.state_dict())
    assert all(int(quantizer.observed) == 0 for quantizer in fake_quantizers(model).values())
    with pytest.raises(StageError, match="no range yet"):
        convert(model)


def test_after_a_float_checkpoint_weight_scales_cover_the_new_folded_weights(float_model: nn.Module) -> None:
    model = calibrated()
    model.load_state_dict(float_model.state_dict())
    state = {key: value.numpy() for key, value in float_model.state_dict().items()}
    factor = state["stem_norm.weight"] / np.sqrt(state["stem_norm.running_var"] + 1e-5)
    folded = state["stem.weight"] * factor[:, None, None, None]
    expected = np.abs(folded).max(axis=(1, 2, 3)) / 127
    np.testing.assert_allclose(qat_layers(model)["stem"].weight_quantizer.scale.detach().numpy(), expected, rtol=1e-5)


def test_a_training_checkpoint_gives_back_the_very_model() -> None:
    model, fresh = calibrated(), prepare_qat(hand_written(), example_inputs=pixels(1)).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(pixels(seed=3)), model(pixels(seed=3)))


def test_some_but_not_all_quantizer_keys_are_an_error_that_names_a_missing_one_and_loads_nothing() -> None:
    model, state = calibrated(), calibrated(2).state_dict()
    before = copy.deepcopy(model.state_dict())
    del state["stem.weight_quantizer.log2_scale"]
    for strict in (True, False):
        with pytest.raises(WeightsError, match=r"stem\.weight_quantizer\.log2_scale"):
            model.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantizer_keys_of_another_placement_are_not_taken_for_a_float_checkpoint(float_model: nn.Module) -> None:
    state = {**float_model.state_dict(), "elsewhere.weight_quantizer.log2_scale": torch.tensor(0.0)}
    with pytest.raises(WeightsError, match="0 of the"):
        calibrated().load_state_dict(state, strict=False)


def test_a_float_checkpoint_with_a_key_missing_is_an_error_that_names_only_that_key(float_model: nn.Module) -> None:
    state = float_model.state_dict()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head\.bias"\. $'):
        calibrated().load_state_dict(state)


def test_the_rule_holds_below_a_wrapper_and_in_a_deep_copy(float_model: nn.Module) -> None:
    model = calibrated()
    wrapper = nn.ModuleDict({"student": copy.deepcopy(model)})
    wrapper.load_state_dict({f"student.{key}": value for key, value in float_model.state_dict().items()})
    torch.testing.assert_close(wrapper["student"].head.weight, float_model.head.weight, rtol=0, atol=0)
    assert all(int(quantizer.observed) == 0 for quantizer in fake_quantizers(wrapper).values())
    # The original of the copy is not touched.
    assert all(int(quantizer.observed) == 1 for quantizer in fake_quantizers(model).values())


def test_an_empty_state_dict_changes_nothing() -> None:
    model = calibrated()
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict({}, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantizer_state_is_what_preparing_adds_to_the_state_dict(float_model: nn.Module) -> None:
    model = calibrated()
    assert quantizer_state(model).keys() == model.state_dict().keys() - float_model.state_dict().keys()
    assert quantizer_state(float_model) == {}
