"""Rows that rounding makes equal before a layer norm are warned of, and what the warning advises keeps them apart."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm
from transformers import ViTConfig, ViTForImageClassification

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.model.equal_rows import rounded_norms
from tests.models import convnext


class Tokens(nn.Module):
    """A layer norm of the sum of its input and what a linear layer makes of it, which is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Linear(4, 4)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, 4) → (N, tokens, 2)."""
        return self.head(self.norm(x + self.zero(x)))


#: With 4 bits from -7 to 8, codes are 1 apart, and with 8 bits 1/17: then the second token still has several.
LARGE, SMALL, NONE = [-7.0, 8.0, 1.0, 3.0], [0.1, 0.4, -0.2, 0.3], [0.0] * 4


@pytest.mark.parametrize(
    ("bits", "tokens", "warned"),
    [(4, [LARGE, SMALL], True), (4, [LARGE, LARGE], False), (4, [LARGE, NONE], False), (8, [LARGE, SMALL], False)],
    ids=["lost in 4 bits", "large enough", "equal in float", "kept in 8 bits"],
)
def test_a_norm_is_named_whose_rows_only_rounding_makes_equal(bits, tokens, warned, caplog):
    x = torch.tensor([tokens])
    config = QATConfig("int8", overrides={"*": {"activations": {"bits": bits, "observer": "minmax"}}})
    calibrate(prepare_qat(Tokens(), config, x), [x])
    found = [record.getMessage() for record in caplog.records if "rows of one value" in record.getMessage()]
    assert len(found) == warned
    if warned:
        assert re.match(r"Rounding to 4 bits leaves .* to 1 layer norms \(norm\): .* 3e\+02 times .* 8 bits", found[0])


def photos(count: int) -> Tensor:
    """Bright and dark images with little detail: the patches of a new ViT are far from its class token."""
    size = (64, 64)
    return (
        2 * torch.randn(count, 3, 1, 1) + interpolate(torch.randn(count, 3, 8, 8), size) + torch.randn(count, 3, *size)
    )


def norm_of_gradients(model: nn.Module, x: Tensor) -> float:
    """Of one step of training."""
    model.train()(x, labels=torch.arange(len(x))).loss.backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


@pytest.mark.slow
def test_a_new_vit_has_gradients_like_those_in_float_by_default_and_else_by_what_the_warning_advises(caplog):
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192}
    float_model = ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=4, image_size=64, patch_size=8, num_labels=8)
    )
    x = photos(8)
    expected = norm_of_gradients(copy.deepcopy(float_model), x)

    model = calibrate(prepare_qat(copy.deepcopy(float_model), QATConfig("w4a4")), [x])
    assert "rows of one value" not in caplog.text
    assert norm_of_gradients(model, x) == pytest.approx(expected, rel=0.2)

    bare = QATConfig("w4a4", layer_restrictions=False)
    model = calibrate(prepare_qat(copy.deepcopy(float_model), bare), [x])
    assert not norm_of_gradients(model, x) < 1e6 * expected
    (message,) = [record.getMessage() for record in caplog.records if "rows of one value" in record.getMessage()]
    assert "vit.layers.0.layernorm_before" in message and "1e+06 times" in message
    caplog.clear()

    advice = re.search(r"QATConfig\(…, overrides=(\{.*\})\)\.$", message)
    assert advice
    bare.update(overrides=eval(advice[1]))
    model = calibrate(prepare_qat(float_model, bare), [x])
    assert "rows of one value" not in caplog.text
    assert norm_of_gradients(model, x) == pytest.approx(expected, rel=0.2)


def test_a_float_layer_norm_hands_the_gradient_of_such_a_row_on_as_many_times():
    x = torch.full((1, 4), 3.0, requires_grad=True)
    layer_norm(x, (4,), eps=1e-12).backward(torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[1e6, -1e6, 0.0, 0.0]]))


@pytest.mark.parametrize(("restricted", "bits"), [(True, 8), (False, 4)])
def test_norms_are_found_behind_what_passes_values_on(restricted, bits):
    config = QATConfig("w4a4", layer_restrictions=restricted)
    model = prepare_qat(convnext(), config, torch.randn(2, 3, 32, 32))
    norms = {norm.path: norm for norm in rounded_norms(model)}
    found = norms["convnext.embeddings.layernorm"]  # a permutation is in between
    assert (found.eps, found.quantizer) == (1e-6, "convnext.embeddings.patch_embeddings.activation_quantizer")
    assert {norm.bits for norm in norms.values()} == {bits}


@pytest.mark.parametrize(("eps", "warned"), [(1e-12, True), (1e-5, False)])
def test_at_8_bits_rows_are_looked_for_where_each_does_great_harm(eps, warned, caplog):
    """Two passes of a batch are much of a calibration on few images."""
    tokens = Tokens()
    tokens.norm.eps = eps
    x = torch.tensor([[[1000 * value for value in LARGE], SMALL]])
    config = QATConfig("int8", activations={"observer": "minmax"})
    calibrate(prepare_qat(tokens, config, x), [x])
    assert ("rows of one value" in caplog.text) is warned
